"""Growth under a trainer: the parts that callbacks of all trainers share."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from itertools import islice
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import (
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
)

from kasmina_core.checkpoints.growth_state import counters_of
from kasmina_core.checkpoints.migrations import part, upgraded
from kasmina_core.checkpoints.run_state import Run, apply_beside_trainer, collect, memory_of
from kasmina_core.errors import CheckpointError
from kasmina_core.evidence.measuring import Evaluator
from kasmina_core.growth.model import MorphogeneticModel
from kasmina_core.growth.plain_data import FORMAT_VERSION, meaning, to_json
from kasmina_core.parallel.distributed import DistributedGrowth, Wrap, distribute
from kasmina_core.policies.protocol import Policy
from kasmina_core.quiet import kept_modes
from kasmina_core.records import read
from kasmina_core.training.averaging import pairs_by_position
from kasmina_core.training.clipping import drop_nonfinite_seed_gradients
from kasmina_core.training.optim import PerSeed, tie_optimizer, untie_optimizer


def find_model(root: nn.Module, how_to_choose: str) -> MorphogeneticModel:
    """Return the one `MorphogeneticModel` in a module, itself included; a ValueError if there is none, or are several."""
    found = {name: m for name, m in root.named_modules() if isinstance(m, MorphogeneticModel)}
    if not found:
        raise ValueError(
            f"{type(root).__name__} holds no MorphogeneticModel, so nothing in it can grow.\n"
            "Put the part that is to grow into one: MorphogeneticModel(host, slots=[...], example=...)."
        )
    if len(found) > 1:
        raise ValueError(
            f"{type(root).__name__} holds {len(found)} MorphogeneticModels: "
            f"{', '.join(name or '(itself)' for name in found)}.\n{how_to_choose}"
        )
    return next(iter(found.values()))


def refuse_averages(holders: Iterable[object], module: nn.Module, model: MorphogeneticModel) -> None:
    """Raise a ValueError if a callback or the trained module holds an average that pairs the model by position."""
    held = [(type(holder).__name__, value) for holder in holders for value in vars(holder).values()]
    held += [(type(module).__name__, part) for part in module.modules()]
    for holder, value in held:
        if pairs_by_position(value, model):
            raise cannot_average(holder)


def cannot_average(holder: str) -> ValueError:
    return ValueError(
        f"{holder} averages weights and pairs those of two models by position: beside GrowthCallback it would end the "
        "run at the first germination, or leave seeds out of the average.\n"
        "Leave it out, and let a callback of yours average: self.average = GrowingAveragedModel(model) when training "
        "starts, and self.average.update_parameters(model) after each batch. It follows growth."
    )


def check_held_out(held_out: object) -> None:
    """Raise a TypeError or ValueError for held-out batches that are not the same at every pass."""
    if not isinstance(held_out, Iterable) or isinstance(held_out, Iterator):
        raise TypeError(
            "held_out must give the same batches each time it is gone through: a DataLoader or a list, "
            f"not {type(held_out).__name__}."
        )
    if isinstance(getattr(held_out, "sampler", None), RandomSampler):
        raise ValueError(
            "held_out shuffles. Seeds are judged by the same samples in the same order with and without them: "
            "give a DataLoader with shuffle=False."
        )


def refuse_trained_on(training: object, held_out: object) -> None:
    """Raise a ValueError if held-out samples are certainly among those of the training, datasets or loaders of them."""
    trained, judged = _samples_of(training), _samples_of(held_out)
    if trained is None or judged is None or trained[0] is not judged[0]:
        return
    if common := set(trained[1]).intersection(judged[1]):
        raise ValueError(
            "Seeds are judged by samples that nothing else learns from, and held_out has samples of the training data.\n"
            f"  held_out: {len(set(judged[1])):,} samples of a {type(judged[0]).__name__}, "
            f"{len(common):,} of which are trained on\n"
            "Divide the dataset before: training, held_out = torch.utils.data.random_split(dataset, [0.9, 0.1])."
        )


def _samples_of(data: Any) -> tuple[object, Sequence[int]] | None:
    """Return the dataset below all subsets and samplers, and which samples of it are used, if that can be told."""
    if isinstance(data, DataLoader):
        sampler, below = data.sampler, _samples_of(data.dataset)
        if below is None or isinstance(sampler, SequentialSampler | RandomSampler | DistributedSampler):
            return below
        chosen = sampler.indices if isinstance(sampler, SubsetRandomSampler) else None
    elif isinstance(data, Subset):
        chosen, below = data.indices, _samples_of(data.dataset)
    else:
        is_dataset = isinstance(data, Sized) and hasattr(data, "__getitem__")
        return (data, range(len(data))) if is_dataset and not isinstance(data, IterableDataset) else None
    return None if chosen is None or below is None else (below[0], [below[1][int(i)] for i in chosen])


def part_of_process(batches: Iterable[Any], rank: int, processes: int) -> Iterable[Any]:
    """Return the held-out batches of one process of a job: every so-many-th, unless the sampler divides them already.

    Raises:
        ValueError: If there are fewer batches than processes.
    """
    if processes < 2 or isinstance(getattr(batches, "sampler", None), DistributedSampler):
        return batches
    if isinstance(batches, Sized) and len(batches) < processes:
        raise ValueError(
            f"held_out has {len(batches)} batches for {processes} processes: give at least one to each, with a smaller "
            "batch size."
        )
    return _EverySoMany(batches, rank, processes)


@final
class _EverySoMany:
    """Every so-many-th of some batches, each time it is gone through."""

    def __init__(self, batches: Iterable[Any], start: int, step: int) -> None:
        self._batches, self._start, self._step = batches, start, step

    def __iter__(self) -> Iterator[Any]:
        return islice(self._batches, self._start, None, self._step)


def losses_of_samples(batches: Iterable[Any], losses: Callable[[Any], Tensor]) -> Tensor:
    """Return the loss of every sample of the batches, ``(n,)``; a ValueError if there is none, or no vector."""
    parts = []
    for batch in batches:
        part = losses(batch)
        if not isinstance(part, Tensor) or part.dim() != 1:
            found = f"shape {tuple(part.shape)}" if isinstance(part, Tensor) else type(part).__name__
            raise ValueError(
                f"losses must return one loss per sample of the batch, a tensor of shape (n,), not {found}.\n"
                "With torch's loss functions that is reduction='none'; for sequences, the mean over each one's tokens."
            )
        parts.append(part)
    if not parts:
        raise ValueError("held_out is empty: seeds cannot be judged without samples.")
    return torch.cat(parts)


@contextmanager
def surroundings_at_rest(root: nn.Module, model: MorphogeneticModel) -> Iterator[None]:
    """Run the block with every module of ``root`` outside of the model, which sets its own, in eval mode."""
    inside = set(model.modules())
    with kept_modes(root):
        for module in root.modules():
            if module not in inside:
                module.training = False
        yield


def clip_apart(
    model: MorphogeneticModel,
    clip_rest: Callable[[], Any],
    clip_seed: Callable[[list[nn.Parameter]], Any] | None,
) -> Any:
    """Clip as a trainer does, and each seed separately as `clip_gradients` does.

    Args:
        model: The model.
        clip_rest: Clips all gradients; called while no seed has one.
        clip_seed: Clips the gradients of parameters; called once per seed with a finite one. ``None`` leaves seeds
            alone, without a wait for the device.

    Returns:
        What ``clip_rest`` returns.
    """
    seeds = [model.seed_parameters(slot) for slot in model.slots]
    kept = [(p, p.grad) for parameters in seeds for p in parameters]
    for parameter, _ in kept:
        parameter.grad = None
    try:
        result = clip_rest()
    finally:
        for parameter, gradient in kept:
            parameter.grad = gradient
    if clip_seed is None:
        return result
    drop_nonfinite_seed_gradients(model)
    for parameters in seeds:
        if any(p.grad is not None for p in parameters):
            clip_seed(parameters)
    return result


def readings(model: MorphogeneticModel) -> dict[str, float]:
    """Return numbers for a logger: each slot's `SeedStage`, alpha and last gain, and the count of seeds' parameters."""
    values: dict[str, float] = {"growth/seed_parameters": sum(p.numel() for p in model.seed_parameters())}
    for name, slot in model.slots.items():
        values[f"growth/{name}/stage"] = int(slot.stage)
        values[f"growth/{name}/alpha"] = slot.alpha
        if slot.last_evidence is not None:
            values[f"growth/{name}/gain"] = slot.last_evidence.gain
    return values


@final
class GrowthClock:
    """Steps a model's epochs at a trainer's validations, and collects what a checkpoint needs.

    A validation is noted when it ends; the epoch is stepped before the next training step. So a checkpoint that the
    trainer writes in between holds the model that was measured, and a resumed run takes the same step.

    Raises:
        TypeError: If ``policy`` is none.
    """

    def __init__(self, policy: Policy) -> None:
        if isinstance(policy, type) or not isinstance(policy, Policy):
            hint = f" Give an instance: {policy.__name__}(...)." if isinstance(policy, type) else ""
            raise TypeError(
                f"The first argument must be a policy, an object with decide(observation), not {policy!r}.{hint}"
            )
        self.policy = policy
        self.noted: float | None = None

    def note(self, model: MorphogeneticModel, metric: float) -> None:
        """Note that a validation ended with this metric, of which every process of a job has its own, or the mean."""
        # Agreed now: the one process that writes a checkpoint writes what all will step by.
        self.noted = model.growth.agreement.metric(metric)
        for slot in model.slots.values():
            if slot.seed is not None:
                slot.share_deviation()

    def tick(self, model: MorphogeneticModel) -> bool:
        """Step an epoch and follow the policy if a validation was noted since the last; return whether it was."""
        if self.noted is None:
            return False
        metric, self.noted = self.noted, None
        model.step_epoch(metric)
        model.follow(self.policy)
        return True

    def state_dict(self, run: Run, rng: Collection[str] = ()) -> dict[str, Any]:
        """Return what the trainer's checkpoint must hold besides the model's ``state_dict``, optimisers and schedulers.

        Args:
            run: The model, the optimiser that is tied to it, and the policy.
            rng: Global random numbers that the trainer does not write.

        Returns:
            Data for JSON, and under ``tensors`` the tensors by name.
        """
        data = collect(run, rng=rng)
        for name in ("topology", "optimizers", "schedulers", "scaler", "data_position", "extra"):
            del data[name]
        tensors: dict[str, Tensor] = {}
        data = {"version": FORMAT_VERSION, "noted": self.noted} | counters_of(run.model) | data
        text = to_json(data, "The record of growth", tensors.__setitem__)
        return {**json.loads(text), "tensors": tensors}

    def check_memory(self) -> None:
        """Raise a TypeError if the policy's ``state_dict`` returns anything but plain data."""
        name = f"{type(self.policy).__name__}.state_dict()"
        try:
            to_json(memory_of(self.policy), name)
        except CheckpointError as error:
            raise TypeError(
                f"{name} must return plain data (mappings, lists, text, numbers, None), which a checkpoint can hold: "
                f"{error}"
            ) from error

    def load_state_dict(self, run: Run, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned, after the trainer has loaded its own part.

        Raises:
            CheckpointError: If it is of another version or damaged, or does not fit; nothing is changed.
        """
        what = "The checkpoint's record of growth"
        state = upgraded("trainer", state, what)
        tensors = part(state, "tensors", Mapping, what)
        data = meaning({k: v for k, v in state.items() if k != "tensors"}, what, tensors.__getitem__)
        noted = read(float | None, data.get("noted"), what, "noted")
        apply_beside_trainer(run, data)
        self.noted = noted


class GrowthUnderTrainer:
    """Base of the callbacks: the model that grows, and the optimiser that is tied to it."""

    def __init__(
        self, policy: Policy, monitor: str, lr_factor: PerSeed, weight_decay: PerSeed | None
    ) -> None:
        self.monitor = monitor
        self._clock = GrowthClock(policy)
        self._tie: dict[str, Any] = {"lr_factor": lr_factor, "weight_decay": weight_decay}
        self._model: MorphogeneticModel | None = None
        self._optimizer: Optimizer | None = None
        self._evaluator_before: Evaluator | None = None
        self._together: DistributedGrowth | None = None

    def _grow_together(self, processes: int) -> None:
        """Let the model of each process of a job decide with the others, if there are others."""
        if processes > 1:
            self._together = distribute(self._required_model(), wrap=Wrap.OUTSIDE)

    def _grow_alone(self) -> None:
        if self._together is not None:
            self._together.leave()
            self._together = None

    def _required_model(self) -> MorphogeneticModel:
        assert self._model is not None  # the start of the run comes first
        return self._model

    def _run(self) -> Run:
        return Run.of(self._required_model(), self._optimizer, policy=self._clock.policy)

    def _follow_with(self, model: MorphogeneticModel, optimizer: Any, schedulers: Iterable[Any]) -> None:
        """Tie an optimiser to the model in place of the one before."""
        if self._model is not None and self._optimizer is not None:
            untie_optimizer(self._model, self._optimizer)
        self._model = model
        self._optimizer = tie_optimizer(model, optimizer, schedulers=schedulers, **self._tie)


def metric_named(metrics: Mapping[str, Any], name: str) -> float:
    """Return one of a trainer's metrics as a number; the ValueError for a missing one lists those that are there."""
    if name not in metrics:
        known = ", ".join(sorted(map(str, metrics))) or "none"
        raise ValueError(
            f"Validation gave no metric '{name}', by which growth is decided.\n"
            f"  logged: {known}\n"
            "Log it in validation, or name one of those with monitor=."
        )
    return float(metrics[name])
