"""Growth under a Hugging Face ``Trainer``: ``pip install 'transformers>=5.2' 'accelerate>=1.1'``."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, Final, final

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_
from torch.utils.data import DataLoader, Subset

from kasmina_core.checkpoints.files import new_id, read_tensors, with_shared, write_tensors
from kasmina_core.checkpoints.run_state import several
from kasmina_core.errors import CheckpointError
from kasmina_core.growth.model import MorphogeneticModel
from kasmina_core.integrations.growing import (
    GrowthUnderTrainer,
    check_held_out,
    clip_apart,
    find_model,
    losses_of_samples,
    metric_named,
    part_of_process,
    readings,
    refuse_averages,
    refuse_trained_on,
    surroundings_at_rest,
)
from kasmina_core.parallel.distributed import leave_out_seeds
from kasmina_core.policies.protocol import Policy
from kasmina_core.training.clipping import drop_nonfinite_seed_gradients
from kasmina_core.training.optim import PerSeed

try:
    from transformers import Trainer, TrainerCallback
    from transformers.utils.generic import can_return_loss, find_labels
except ImportError as error:
    raise ImportError(
        "kasmina_core.integrations.huggingface needs transformers and accelerate: pip install 'transformers>=5.2' 'accelerate>=1.1'"
    ) from error

STATE_KEY: Final = "kasmina"
"""Where the record of growth stands among the ``stateful_callbacks`` of ``trainer_state.json``."""

TENSORS: Final = "growth.safetensors"
"""The record's tensors, in the folder of the trainer's checkpoint."""


@final
class GrowthCallback(GrowthUnderTrainer, TrainerCallback):
    """Grows the `MorphogeneticModel` that a Hugging Face ``Trainer`` trains.

    Each evaluation within ``train`` is an epoch of growth: its metric is noted, and before the next training step the
    gates are asked and the policy is followed. An evaluation before which nothing was learned (``eval_on_start``) does
    not count. The optimiser and its scheduler follow the seeds; stages, alphas and gains go through ``trainer.log``;
    the trainer's checkpoints hold all that ``train(resume_from_checkpoint=...)`` and ``load_best_model_at_end`` need.
    ``max_grad_norm`` clips each seed apart from the host. Under ``torchrun`` all processes grow alike, and each judges
    every so-many-th held-out sample.

    A callback alone gets neither the batch nor a call when the optimiser is made, so it has to be attached:

    ::

        model = MorphogeneticModel(host, slots=["transformer.h.*"], example=example, causal=True)
        trainer = Trainer(model, args, train_dataset=train, eval_dataset=val)
        GrowthCallback(policy, held_out=held_out).attach(trainer)
        trainer.train()

    Args:
        policy: When to germinate, fossilise and cull. What its ``state_dict`` returns, if it has one, must be plain
            data and is checkpointed.
        held_out: A dataset on which the gates judge seeds, collated as the trainer collates; or a ``DataLoader`` that
            does not shuffle. Take another than that of evaluation, or its metric is biased by the choice of seeds.
        losses: Called with the trainer's model and a batch on its device; returns the loss of every sample, ``(n,)``.
            Default: the trainer's own ``compute_loss``, sample by sample, which is slower.
        monitor: Name of the metric, as evaluation reports it, that the policy sees.
        lr_factor: See `tie_optimizer`.
        weight_decay: See `tie_optimizer`.

    Raises:
        TypeError: If ``policy`` is no policy.
        ValueError: If ``held_out`` shuffles. At the start of ``train``: if samples of it are trained on.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        held_out: Any,
        losses: Callable[[Any, Any], Tensor] | None = None,
        monitor: str = "eval_loss",
        lr_factor: PerSeed = 1.0,
        weight_decay: PerSeed | None = None,
    ) -> None:
        if isinstance(held_out, DataLoader):
            check_held_out(held_out)
        super().__init__(policy, monitor, lr_factor, weight_decay)
        self._held_out = held_out
        self._losses = losses
        self._trainer: Any = None
        self._folder: Path | None = None
        self._learned_until = 0
        self._without_metric: Mapping[str, Any] | None = None

    def attach(self, trainer: Trainer) -> Trainer:
        """Add this to a trainer's callbacks, and wrap the methods of it that call no callback.

        These are ``create_optimizer``, ``training_step``, ``save_model``, ``_load_from_checkpoint`` and its accelerator's
        ``clip_grad_norm_``. If the trainer's model is a `MorphogeneticModel`, what the trainer reads from a model's
        forward and config (columns, names of labels, keywords of the loss) is read from its host.

        Returns:
            The trainer.

        Raises:
            ValueError: If the trainer's model holds no `MorphogeneticModel` or several, the trainer does not evaluate,
                trains under DeepSpeed or FSDP or on several devices in one process, makes models itself, smooths labels,
                or grows already.
        """
        if self._trainer is not None or any(
            isinstance(c, GrowthCallback) for c in trainer.callback_handler.callbacks
        ):
            raise ValueError("A GrowthCallback is attached once, and a trainer has one.")
        args = trainer.args
        for name, is_used in (("DeepSpeed", trainer.is_deepspeed_enabled), ("FSDP", trainer.is_fsdp_enabled)):
            if is_used:
                raise ValueError(
                    f"GrowthCallback does not grow under {name}: start the trainer with torchrun, without it.\n"
                    "FSDP2 takes a loop of your own with distribute(model): docs/distributed.md."
                )
        if args.n_gpu > 1:
            raise ValueError(
                f"GrowthCallback grows on one device per process, and this trainer has {args.n_gpu} in one process.\n"
                "Start it with torchrun, or let CUDA_VISIBLE_DEVICES name one device."
            )
        if args.eval_strategy == "no":
            raise ValueError(
                "Growth goes by evaluation, and this trainer runs none: "
                "give it an eval_dataset and TrainingArguments(eval_strategy='epoch')."
            )
        if trainer.model_init is not None or trainer.label_smoother is not None:
            raise ValueError(
                "A model that grows is given to the trainer as model=, not made anew by model_init; and for "
                "label_smoothing_factor the trainer would have to know its class: give a compute_loss_func."
            )
        model = find_model(trainer.model, "One of them can grow under a Trainer.")
        if trainer.model is model:
            _show_host(trainer, model)
        self._trainer, self._model = trainer, model
        if args.world_size > 1:
            leave_out_seeds(model, trainer.model)
        self._wrap_methods(trainer, model)
        trainer.add_callback(self)
        return trainer

    # -- the run ---------------------------------------------------------------------------------------------------

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Restore a checkpoint's record, tie the scheduler too, and try the held-out samples.

        Raises:
            TypeError: If what the policy remembers is no plain data.
            ValueError: If this callback was not attached, another one averages weights, or the samples cannot be
                measured.
            CheckpointError: If the record cannot be read.
        """
        if self._trainer is None:
            raise ValueError("Attach it instead of listing it: GrowthCallback(...).attach(trainer).")
        model = self._required_model()
        refuse_averages(self._trainer.callback_handler.callbacks, self._trainer.model, model)
        refuse_trained_on(self._trainer.train_dataset, self._held_out)
        if (saved := state.stateful_callbacks.get(STATE_KEY)) is not None:
            saved = self._with_tensors(saved)
        self._clock.check_memory()
        self._follow_with(model, kwargs["optimizer"], several(kwargs["lr_scheduler"]))
        self._grow_together(args.world_size)
        if saved is not None:
            self._clock.load_state_dict(self._run(), saved)
        self._learned_until = state.global_step
        self._evaluator_before = model.growth.evaluator
        batches = self._batches()
        model.evaluate_with(lambda: self._evaluate(batches))
        with model.evaluation():  # else a fault would be a gate's reason many epochs later
            self._evaluate(islice(batches, 1))

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Step the epoch of the last evaluation before the batch is seen."""
        if self._without_metric is not None:
            metric_named(self._without_metric, self.monitor)
        if self._clock.tick(self._required_model()):
            self._trainer.log(readings(self._required_model()))

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Let a step pass; gradients are whole here."""
        self._required_model().step()

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: Mapping[str, Any], **kwargs: Any
    ) -> None:
        """Note the metric, before a checkpoint is written."""
        if not self._trainer.is_in_train or state.global_step <= self._learned_until:
            return
        if self.monitor not in metrics:  # with several evaluation sets it comes with one of them
            self._without_metric = {**(self._without_metric or {}), **metrics}
            return
        self._without_metric, self._learned_until = None, state.global_step
        self._clock.note(self._required_model(), metric_named(metrics, self.monitor))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Give the model its own evaluator back; the optimiser goes on following."""
        self._required_model().evaluate_with(self._evaluator_before)
        self._evaluator_before = None
        self._grow_alone()

    # -- checkpoints -----------------------------------------------------------------------------------------------

    def _write(self, folder: Path) -> None:
        """Write the tensors into a checkpoint's folder, and the record to where the trainer writes it down next."""
        state = self._clock.state_dict(self._run())
        state["id"], tensors = new_id(), state.pop("tensors")
        state["same"], _ = write_tensors(folder / TENSORS, tensors, {"record": state["id"]})
        self._trainer.state.stateful_callbacks[STATE_KEY] = state

    def _with_tensors(self, state: Any) -> Any:
        """Return a record with its tensors, which are in the folder that the trainer loaded the model from."""
        if not isinstance(state, Mapping) or not isinstance(state.get("same"), Mapping):
            return state  # of an older format, which had none
        folder = self._folder or Path("?")
        if not (folder / TENSORS).is_file():
            raise CheckpointError(
                f"The checkpoint {folder} lacks {TENSORS}, which GrowthCallback wrote into it."
            )
        tensors = read_tensors(folder / TENSORS, {"record": str(state.get("id"))}, apart=True)
        return {**state, "tensors": with_shared(tensors, state["same"])}

    # -- parts -----------------------------------------------------------------------------------------------------

    def _wrap_methods(self, trainer: Any, model: MorphogeneticModel) -> None:
        create_optimizer, training_step = trainer.create_optimizer, trainer.training_step
        save_model, load_model = trainer.save_model, trainer._load_from_checkpoint
        accelerator = trainer.accelerator

        def create_and_tie(*args: Any, **kwargs: Any) -> Any:
            optimizer = create_optimizer(*args, **kwargs)
            # Before a checkpoint's state is loaded, which has the seeds' groups.
            self._follow_with(model, trainer.optimizer, several(trainer.lr_scheduler))
            return optimizer

        def step_and_incubate(trained: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            kept = dict(inputs)
            loss = training_step(trained, inputs, *args, **kwargs)
            self._incubate(trained, kept, args[0] if args else kwargs.get("num_items_in_batch"))
            if accelerator.scaler is not None:
                drop_nonfinite_seed_gradients(model)
            return loss

        def save_apart(output_dir: str | None = None, _internal_call: bool = False) -> None:
            handle = trainer.model.register_state_dict_post_hook(_separate_tensors)
            try:
                save_model(output_dir, _internal_call)
            finally:
                handle.remove()
            if (
                _internal_call and output_dir is not None and trainer.args.should_save
            ):  # a checkpoint, whose trainer_state.json comes next
                self._write(Path(output_dir))

        def load_and_note(folder: str, *args: Any, **kwargs: Any) -> Any:
            self._folder = Path(folder)
            result = load_model(folder, *args, **kwargs)
            if trainer.args.world_size > 1:  # it is not wrapped yet, and has the seeds of the checkpoint
                leave_out_seeds(model, trainer.model)
            return result

        def clip_both_sides(parameters: Iterable[nn.Parameter], *limits: Any, **named: Any) -> Any:
            accelerator.unscale_gradients()

            def clip(found: Iterable[nn.Parameter]) -> Tensor:
                return clip_grad_norm_(found, *limits, **named)

            return clip_apart(model, lambda: clip(parameters), clip)

        trainer.create_optimizer = create_and_tie
        trainer.training_step = step_and_incubate
        trainer.save_model = save_apart
        trainer._load_from_checkpoint = load_and_note
        accelerator.clip_grad_norm_ = clip_both_sides

    def _batches(self) -> Iterable[Any]:
        trainer = self._trainer
        rank, processes = trainer.args.process_index, trainer.args.world_size
        if isinstance(self._held_out, DataLoader):
            return part_of_process(self._held_out, rank, processes)
        collate = trainer._get_collator_with_removed_columns(trainer.data_collator, description="held-out")
        samples = self._held_out
        if processes > 1:
            samples = Subset(samples, range(rank, len(samples), processes))
        return DataLoader(samples, batch_size=trainer.args.eval_batch_size, collate_fn=collate)

    def _loss(self, trained: nn.Module, inputs: Mapping[str, Any], items: Any = None) -> Tensor:
        trainer = self._trainer
        # compute_loss may take the labels out of the batch.
        kwargs = {} if items is None else {"num_items_in_batch": items}
        with trainer.compute_loss_context_manager():
            loss: Tensor = trainer.compute_loss(trained, trainer._prepare_inputs(dict(inputs)), **kwargs)
        return loss

    def _evaluate(self, batches: Iterable[Any]) -> Tensor:
        trainer = self._trainer
        trained = _inside_ddp(trainer.model_wrapped)

        def losses(batch: Any) -> Tensor:
            if self._losses is not None:
                return self._losses(trained, trainer._prepare_inputs(batch))
            return torch.stack([self._loss(trained, one).reshape(()) for one in _one_by_one(batch)])

        with surroundings_at_rest(trainer.model, self._required_model()):
            return losses_of_samples(batches, losses)

    def _incubate(self, trained: nn.Module, inputs: Mapping[str, Any], items: Any) -> None:
        trainer = self._trainer
        scaled = getattr(trainer, "loss_is_scaled_for_ga", None)
        if scaled is None:
            scaled = trainer.compute_loss_func is not None or (
                trainer.model_accepts_loss_kwargs and items is not None
            )
        # Earlier versions of transformers let accelerate divide too.
        share = trainer.accelerator.gradient_accumulation_steps
        share *= 1 if scaled else trainer.current_gradient_accumulation_steps
        with surroundings_at_rest(trainer.model, self._required_model()):
            self._required_model().incubate(
                lambda: self._loss(_inside_ddp(trained), inputs, items) / share,
                trainer.accelerator.scaler,
            )


def _inside_ddp(trained: nn.Module) -> nn.Module:
    """Return what DDP wraps: passes of one process alone, and those for seeds, must not wait for the others."""
    return trained.module if isinstance(trained, DistributedDataParallel) else trained


def _show_host(trainer: Any, model: MorphogeneticModel) -> None:
    """Let a trainer read off the host what it has read off the model around it, whose forward takes anything."""
    host = model.host
    if trainer.args.label_names is None:
        trainer.label_names = find_labels(type(host))
    trainer.can_return_loss = can_return_loss(type(host))
    parameters = inspect.signature(host.forward).parameters
    trainer._signature_columns = [*parameters, "label", "label_ids", *trainer.label_names]
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    trainer.model_accepts_loss_kwargs = getattr(host, "accepts_loss_kwargs", takes_any)
    if hasattr(trainer, "_loss_shifts_labels"):
        from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

        encodes = getattr(getattr(host, "config", None), "is_encoder_decoder", False)
        loss = LOSS_MAPPING.get(getattr(host, "loss_type", None))
        trainer._loss_shifts_labels = loss is ForCausalLMLoss and not encodes
    shown: Any = model
    if (config := getattr(host, "config", None)) is not None:
        shown.config = config
        config.use_cache = getattr(trainer.args, "use_cache", False)
    shown._keys_to_ignore_on_save = getattr(host, "_keys_to_ignore_on_save", None)
    for name in ("gradient_checkpointing_enable", "activation_checkpointing_enable"):
        if hasattr(host, name):
            setattr(shown, name, getattr(host, name))


def _separate_tensors(module: nn.Module, state_dict: dict[str, Any], prefix: str, metadata: Any) -> None:
    """Give every tensor that shares memory with another (tied weights) a copy of its own, which safetensors asks for."""
    seen: set[tuple[torch.device, int]] = set()
    for key, value in state_dict.items():
        if not isinstance(value, Tensor) or value.device.type == "meta":
            continue
        place = (value.device, value.untyped_storage().data_ptr())
        if value.numel() and place in seen:
            state_dict[key] = value.clone(memory_format=torch.contiguous_format)
        elif not value.is_contiguous():
            state_dict[key] = value.contiguous()
        seen.add(place)


def _one_by_one(batch: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Give each sample of a batch as a batch of its own."""
    tensors = [v for v in batch.values() if isinstance(v, Tensor) and v.dim()]
    size = len(tensors[0]) if tensors else 0
    for i in range(size):
        yield {
            key: value[i : i + 1]
            if isinstance(value, Tensor) and value.dim() and len(value) == size
            else value
            for key, value in batch.items()
        }
