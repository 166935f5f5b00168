"""Growth under a Lightning ``Trainer``: ``pip install 'lightning>=2.6'``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from itertools import islice
from typing import Any, cast, final

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_, clip_grad_value_
from torch.optim import Optimizer

from kasmina_core.growth.model import MorphogeneticModel
from kasmina_core.integrations.growing import (
    GrowthUnderTrainer,
    cannot_average,
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
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.callbacks import StochasticWeightAveraging
except ImportError as error:
    raise ImportError(
        "kasmina_core.integrations.lightning needs Lightning: pip install 'lightning>=2.6'"
    ) from error


@final
class GrowthCallback(GrowthUnderTrainer, Callback):
    """Grows the `MorphogeneticModel` in a ``LightningModule`` while a Lightning ``Trainer`` trains it.

    Each validation is an epoch of growth: its metric is noted, and before the next training batch the gates are asked
    and the policy is followed. Sanity checks do not count. The optimiser and its schedulers follow the seeds; stages,
    alphas and gains go to the trainer's loggers; ``ModelCheckpoint`` writes all that ``fit(ckpt_path=...)`` needs, with
    ``weights_only=True`` too. ``gradient_clip_val`` clips each seed apart from the host. Under DDP all processes grow
    alike: each judges every so-many-th held-out batch, and the metric is the mean, or what ``sync_dist=True`` reduced.

    ::

        growth = GrowthCallback(
            PlateauPolicy({Topology.CNN: ["conv_light"]}),
            held_out=DataLoader(held_out, batch_size=64),
            losses=lambda module, batch: cross_entropy(module(batch[0]), batch[1], reduction="none"),
        )
        Trainer(callbacks=[growth], max_epochs=20).fit(module)

    Args:
        policy: When to germinate, fossilise and cull. What its ``state_dict`` returns, if it has one, is checkpointed.
        held_out: Batches on which the gates judge seeds: a ``DataLoader`` that does not shuffle, or a list. Take others
            than those of validation, or its metric is biased by the choice of seeds.
        losses: Called with the ``LightningModule`` and a batch on its device; returns the loss of every sample,
            ``(n,)``. With counterfactual incubation its mean is what seeds learn from, so it must log nothing.
        monitor: Name of the metric, logged in validation, that the policy sees.
        model: Returns the model of a ``LightningModule`` that holds several. Default: the only one.
        optimizer: Position, among those of ``configure_optimizers``, of the optimiser that takes the seeds. Default:
            the one that holds parameters of the model.
        lr_factor: See `tie_optimizer`.
        weight_decay: See `tie_optimizer`.

    Raises:
        TypeError: If ``policy`` is no policy, or ``held_out`` can be iterated only once. At the start of ``fit``: if
            what the policy remembers is no plain data.
        ValueError: If ``held_out`` shuffles. At the start of ``fit``: if there is no model or no validation, if the
            optimiser is not clear, if samples of ``held_out`` are trained on, if the strategy is another than of one device
            or DDP, or if another callback averages weights. After a validation: if it did not log ``monitor``.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        held_out: Iterable[Any],
        losses: Callable[[Any, Any], Tensor],
        monitor: str = "val_loss",
        model: Callable[[Any], MorphogeneticModel] | None = None,
        optimizer: int | None = None,
        lr_factor: PerSeed = 1.0,
        weight_decay: PerSeed | None = None,
    ) -> None:
        check_held_out(held_out)
        super().__init__(policy, monitor, lr_factor, weight_decay)
        self._held_out = held_out
        self._losses = losses
        self._choose_model = model
        self._position = optimizer
        self._loaded: Mapping[str, Any] | None = None
        self._clips_apart = False
        self._batch: Any = None
        self._leave_out_seeds: Callable[[], None] = _nothing

    # -- the run ---------------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse strategies under which nothing can grow, and leave seeds to `step` before DDP wraps the module.

        Raises:
            ValueError: If the strategy is another than of one device or DDP.
        """
        if stage != "fit":
            return
        strategy = type(trainer.strategy).__name__
        if strategy not in ("SingleDeviceStrategy", "DDPStrategy"):
            raise ValueError(
                f"GrowthCallback grows on one device or under DDP, and this Trainer has {strategy}.\n"
                "Use Trainer(strategy='ddp'); FSDP2 takes a loop of your own with distribute(model): docs/distributed.md."
            )
        if trainer.world_size > 1:
            self._leave_out_seeds = partial(leave_out_seeds, self._find_model(pl_module), pl_module)
            self._leave_out_seeds()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tie the optimisers, which are new, to the model, whose topology a checkpoint may have restored."""
        if not trainer.enable_validation:
            raise self._no_validation()
        model = self._find_model(pl_module)
        self._refuse_averages(trainer, pl_module, model)
        self._clock.check_memory()
        optimizer = self._find_optimizer(trainer.optimizers, model)
        schedulers: list[Any] = [config.scheduler for config in trainer.lr_scheduler_configs]
        own = [one for one in schedulers if getattr(one, "optimizer", None) is optimizer]
        self._follow_with(model, optimizer, own)
        self._grow_together(trainer.world_size)
        if self._loaded is not None:
            self._clock.load_state_dict(self._run(), _with_own_numbers(self._loaded, trainer))
            self._loaded = None
        self._evaluator_before = model.growth.evaluator
        model.evaluate_with(lambda: self._evaluate(trainer, pl_module))
        self._clip_seeds_apart(pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Try the held-out batches, whose faults would else be a gate's reason many epochs later."""
        self._refuse_averages(trainer, pl_module, self._required_model())  # others may have been made since
        if trainer.val_dataloaders is not None and not sum(trainer.num_val_batches):
            raise self._no_validation()
        refuse_trained_on(trainer.train_dataloader, self._held_out)
        with self._required_model().evaluation():
            self._evaluate(trainer, pl_module, batches=1)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Step the epoch of the last validation before the batch is seen."""
        self._batch = batch
        model = self._required_model()
        if batch_idx % trainer.accumulate_grad_batches == 0 and self._clock.tick(model):
            values = readings(model)
            for logger in trainer.loggers if trainer.is_global_zero else ():
                logger.log_metrics(values, step=trainer.fit_loop.epoch_loop._batches_that_stepped)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let incubating seeds learn from the same batch; gradients are scaled here, if they are."""
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if pl_module.automatic_optimization:
            self._incubate(trainer, pl_module, trainer.accumulate_grad_batches, scaler)
        if scaler is not None:
            drop_nonfinite_seed_gradients(self._required_model())

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Let a step pass; gradients are whole and not scaled here."""
        if optimizer is not self._optimizer:
            return
        if not pl_module.automatic_optimization:  # there is a backward for each optimiser
            self._incubate(trainer, pl_module, 1, None)
        self._required_model().step()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Let go of the batch."""
        self._batch = None

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the metric, before checkpoints are written."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            metric = metric_named(trainer.callback_metrics, self.monitor)
            self._clock.note(self._required_model(), metric)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the module as it was; the optimiser goes on following until the next fit."""
        self._release(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the module as it was."""
        self._release(pl_module)

    # -- checkpoints -----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint must keep beside the weights and the topology, which are in the module's."""
        if self._loaded is not None:
            return dict(self._loaded)
        if self._model is None:
            return {}
        # Lightning's own checkpoint has no random numbers, and one process writes it.
        state = self._clock.state_dict(self._run(), rng=["torch"])
        if self._together is not None:
            everyones: list[Any] = [None] * self._together.size
            numbers = {name: t for name, t in state["tensors"].items() if "['rng']" in name}
            torch.distributed.all_gather_object(everyones, (state["rng"], numbers))
            state["ranks"] = everyones
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take what `state_dict` returned; it is used when ``fit`` starts."""
        self._loaded = state_dict or None
        self._leave_out_seeds()  # the module has those of the checkpoint by now, and is not wrapped yet

    # -- parts -----------------------------------------------------------------------------------------------------

    def _find_model(self, pl_module: LightningModule) -> MorphogeneticModel:
        if self._choose_model is None:
            return find_model(
                pl_module, "Say which: GrowthCallback(..., model=lambda module: module.student)."
            )
        chosen = self._choose_model(pl_module)
        if not isinstance(chosen, MorphogeneticModel):
            raise ValueError(
                f"model= must return a MorphogeneticModel, but returned a {type(chosen).__name__}."
            )
        return chosen

    def _refuse_averages(
        self, trainer: Trainer, pl_module: LightningModule, model: MorphogeneticModel
    ) -> None:
        for callback in trainer.callbacks:
            if isinstance(callback, StochasticWeightAveraging):  # its average is a plain copy
                raise cannot_average(type(callback).__name__)
        refuse_averages(trainer.callbacks, pl_module, model)

    def _find_optimizer(self, optimizers: list[Optimizer], model: MorphogeneticModel) -> Optimizer:
        if self._position is not None:
            if not -len(optimizers) <= self._position < len(optimizers):
                raise ValueError(
                    f"optimizer={self._position} does not exist: configure_optimizers returned {len(optimizers)}."
                )
            return optimizers[self._position]
        own = {id(p) for p in model.parameters()}
        held = ([p for group in one.param_groups for p in group["params"]] for one in optimizers)
        holding = [one for one, ps in zip(optimizers, held, strict=True) if not own.isdisjoint(map(id, ps))]
        if len(holding) != 1:
            raise ValueError(
                f"{len(holding)} of {len(optimizers)} optimisers hold parameters of the model, so it is not clear "
                "which shall take the seeds: say GrowthCallback(..., optimizer=0)."
            )
        return holding[0]

    def _sample_losses(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> Tensor:
        with trainer.precision_plugin.forward_context():
            return self._losses(pl_module, batch)

    def _no_validation(self) -> ValueError:
        return ValueError(
            "Growth goes by validation, and this Trainer runs none: define validation_step, give val_dataloaders, "
            f"and log '{self.monitor}'."
        )

    def _evaluate(self, trainer: Trainer, pl_module: LightningModule, batches: int | None = None) -> Tensor:
        def losses(batch: Any) -> Tensor:
            batch = pl_module.on_before_batch_transfer(trainer.precision_plugin.convert_input(batch), 0)
            return self._sample_losses(trainer, pl_module, trainer.strategy.batch_to_device(batch))

        with surroundings_at_rest(pl_module, self._required_model()):
            own = part_of_process(self._held_out, trainer.global_rank, trainer.world_size)
            return losses_of_samples(islice(own, batches), losses)

    def _incubate(self, trainer: Trainer, pl_module: LightningModule, share: int, scaler: Any) -> None:
        model, batch = self._required_model(), self._batch

        def loss() -> Tensor:
            found = losses_of_samples([batch], lambda b: self._sample_losses(trainer, pl_module, b))
            return found.mean() / share

        with surroundings_at_rest(pl_module, model):
            model.incubate(loss, scaler)

    def _clip_seeds_apart(self, pl_module: LightningModule) -> None:
        model, clip = self._required_model(), pl_module.configure_gradient_clipping

        def clip_both_sides(
            optimizer: Optimizer,
            gradient_clip_val: float | None = None,
            gradient_clip_algorithm: str | None = None,
        ) -> None:
            limit = gradient_clip_val or 0.0
            algorithm = gradient_clip_algorithm
            settings: Any = {"gradient_clip_val": gradient_clip_val, "gradient_clip_algorithm": algorithm}
            clip_one: Any = clip_grad_value_ if algorithm == "value" else clip_grad_norm_
            clip_seed = (lambda seed: clip_one(seed, limit)) if limit else None
            clip_apart(model, lambda: clip(optimizer, **settings), clip_seed)

        # Lightning has no hook between this method, which sees host and seeds together, and the optimiser's step.
        cast("Any", pl_module).configure_gradient_clipping = clip_both_sides
        self._clips_apart = True

    def _release(self, pl_module: LightningModule) -> None:
        if self._clips_apart:
            vars(pl_module).pop("configure_gradient_clipping", None)
            self._clips_apart = False
            self._required_model().evaluate_with(self._evaluator_before)
            self._evaluator_before = self._batch = None
        self._grow_alone()
        self._leave_out_seeds = _nothing


def _nothing() -> None:
    pass


def _with_own_numbers(state: Any, trainer: Trainer) -> Any:
    """Return a record with the random numbers that this process had, if as many processes wrote it."""
    if not isinstance(state, Mapping):
        return state  # the clock says what is wrong with it
    ranks = state.get("ranks")
    rest = {key: value for key, value in state.items() if key != "ranks"}
    if not isinstance(ranks, list) or len(ranks) != trainer.world_size:
        return rest
    rng, tensors = ranks[trainer.global_rank]
    return rest | {"rng": rng, "tensors": {**state.get("tensors", {}), **tensors}}
