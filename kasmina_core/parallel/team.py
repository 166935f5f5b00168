"""Agreement of the processes of a job: their models are compared, and their measurements combined."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import fields, replace
from typing import Any, Final, cast, final

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kasmina_core.errors import DistributedError, GerminationError, KasminaError, MisuseWarning, warn_caller
from kasmina_core.growth.agreement import Agreement
from kasmina_core.growth.model import MorphogeneticModel
from kasmina_core.isolation import IsolationReading
from kasmina_core.parallel.control import ControlGroup, FailedSomewhere, by_rank
from kasmina_core.policies.protocol import Command
from kasmina_core.slots.slot import SeedSlot

_MIXER: Final = 0x9E3779B97F4A7C15 - 2**64
_BEGINNING: Final = "the beginning of a command"
_BITS: Final = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@final
class Team(Agreement):
    """The processes of a job that hold the same model; the `Agreement` of each.

    Before a command all compare where they stand: the command itself, the stage, alpha, blueprint and version, width
    and weights of every seed. After it they compare whether it was carried out and where it led. A germination that
    is refused on one rank is refused on all, and changes nothing on any.

    Args:
        model: This process's copy.
        control: Exchanges messages between them.
        shard: Replaces a new seed's parameters by this process's shards, in place; ``None`` to leave them whole.
        average: Makes the gradients of seeds the same everywhere; its argument is whether an optimiser step follows.

    Raises:
        DistributedError: If hosts, slots or settings differ.
    """

    def __init__(
        self,
        model: MorphogeneticModel,
        control: ControlGroup,
        shard: Callable[[nn.Module], None] | None,
        average: Callable[[bool], None],
    ) -> None:
        self._model = model
        self._control = control
        self._shard = shard
        self._average = average
        self._depth = 0
        self._same_samples = False
        self._attempted = ""
        self._kind: type[KasminaError] = KasminaError
        self._failed: Exception | None = None
        self._compare("distribute()", _setup(model) | _standing(model, with_weights=False))

    # -- commands --------------------------------------------------------------------------------------------------

    @contextmanager
    def command(self, slot: SeedSlot | None, text: str) -> Iterator[None]:
        """Carry out a command everywhere, or fail everywhere.

        Raises:
            DistributedError: If a process is missing, stands elsewhere, or came to another end.
            GerminationError: If a germination was refused on another rank.
            KasminaError: If another command was refused there before it began; nothing is changed then.
        """
        outermost = self._depth == 0
        germinates = text.startswith("germinate(")
        if outermost:
            self._begin(text, GerminationError if germinates else KasminaError)
        self._depth += 1
        try:
            with self._attempt(text, GerminationError) if germinates else nullcontext():
                yield
        except DistributedError:
            raise
        except Exception as error:
            if outermost and not germinates:
                self._end(text, error)
            raise
        else:
            if outermost:
                self._end(text, None)
        finally:
            self._depth -= 1

    @contextmanager
    def refusals(self, text: str) -> Iterator[None]:
        """Report an error that was raised before the first exchange of a command: the others wait in theirs.

        Raises:
            DistributedError: If the others do not begin a command.
        """
        number = self._control.number
        try:
            yield
        except DistributedError:
            raise
        except Exception as error:
            if self._depth == 0 and not self._attempted and self._control.number == number:
                with suppress(FailedSomewhere):
                    self._control.exchange(text, attempt=_BEGINNING, failure=_described(error))
            raise

    def _begin(self, text: str, kind: type[KasminaError]) -> None:
        standing = _standing(self._model)
        if self._attempted:
            self._compare(text, standing)
            return
        try:
            standings = self._control.exchange(text, standing, attempt=_BEGINNING)
        except FailedSomewhere as failure:
            raise kind(
                f"{text} was refused on another rank; nothing was changed on any.\n{failure}"
            ) from None
        self._require_equal(text, standings)

    @property
    def rank(self) -> int:
        """Rank of this process."""
        return self._control.rank

    @property
    def process_group(self) -> dist.ProcessGroup:
        """The gloo group of the processes, with the time limit."""
        return self._control.process_group

    def first(self, what: str, value: Any = None) -> Any:
        """Return rank 0's value, when all have called this."""
        return self._say(what, value)[0]

    def everyone(self, what: str, value: Any) -> list[Any]:
        """Return the values of all ranks, in their order."""
        return self._say(what, value)

    def attempt(self, what: str) -> AbstractContextManager[None]:
        """Do something that leaves no trace if it fails; if it fails on one rank it fails on all.

        Raises:
            KasminaError: If it failed on another rank.
        """
        return self._attempt(what, KasminaError)

    @contextmanager
    def _attempt(self, what: str, kind: type[KasminaError]) -> Iterator[None]:
        before = self._attempted, self._kind, self._failed
        self._attempted, self._kind, self._failed = what, kind, None
        try:
            yield
        except DistributedError:
            raise
        except Exception as error:
            if error is not self._failed:
                with suppress(FailedSomewhere):
                    self._control.exchange(what, attempt=what, failure=_described(error))
            raise
        finally:
            self._attempted, self._kind, self._failed = before

    def _say(self, step: str, payload: Any = None) -> list[Any]:
        try:
            return self._control.exchange(step, payload, attempt=self._attempted)
        except FailedSomewhere as failure:
            if self._attempted:
                self._failed = self._kind(f"{self._attempted} failed on another rank.\n{failure}")
                raise self._failed from None
            raise self._control.give_up(
                DistributedError(f"Another rank failed while this one was at {step}.\n{failure}")
            ) from None

    def _end(self, text: str, error: Exception | None) -> None:
        """Compare how a command ended; returns if it failed everywhere."""
        failure = _described(error) if error is not None else ""
        try:
            standings = self._control.exchange(
                f"the end of {text}", _standing(self._model, with_weights=False), failure=failure
            )
        except FailedSomewhere as failed:
            if len(failed.failures) == self._control.size:
                return
            raise self._control.give_up(
                DistributedError(
                    f"{text} was not carried out on every rank: they are no longer the same.\n{failed}"
                )
            ) from error
        self._require_equal(f"the end of {text}", standings)

    def _compare(self, text: str, standing: Mapping[str, Any]) -> None:
        self._require_equal(text, self._say(text, dict(standing)))

    def _require_equal(self, text: str, standings: Sequence[Mapping[str, Any]]) -> None:
        keys = list(dict.fromkeys(key for standing in standings for key in standing))
        told = [
            f"{key}\n{by_rank(values)}"
            for key in keys
            if len(set(values := [str(standing.get(key, "nothing")) for standing in standings])) > 1
        ]
        if told:
            lines = [f"The processes disagree at {text}.", *told[:8]]
            if any("weights" in line for line in told):
                lines += [
                    "Gradients of seeds are averaged in model.step(): call it after backward, on every rank."
                ]
            raise self._control.give_up(DistributedError("\n".join(lines)))

    # -- what is put together --------------------------------------------------------------------------------------

    def metric(self, value: float | None) -> float | None:
        """Return the mean over the ranks that have one; ``None`` if none has."""
        found = [other for other in self._say("the metric", value) if other is not None]
        if not found or len(set(found)) == 1:
            return found[0] if found else None
        try:
            return math.fsum(found) / len(found)
        except (OverflowError, ValueError):  # fsum refuses inf - inf
            return math.nan

    def samples(self, losses: Tensor) -> Tensor:
        """Return the per-sample losses of all ranks, rank after rank; each may have another number."""
        found = self._say("losses of samples", losses.detach().cpu())
        return torch.cat(found).to(losses.device)

    def counts(self, losses: Sequence[Tensor]) -> bool:
        """Return whether this rank's samples count: not if an earlier rank's losses are the same, bit for bit.

        Warns once if ranks hold the same samples.
        """
        own = ([tuple(each.shape) for each in losses], _checksum(losses))
        found = self._say("whose samples are the same", own)
        first = [found.index(each) for each in found]
        if first != list(range(len(found))) and not self._same_samples:
            self._same_samples = True
            repeated = next(rank for rank, earlier in enumerate(first) if rank != earlier)
            warn_caller(
                f"Ranks {first[repeated]} and {repeated} return the same held-out losses, bit for bit: the same samples "
                "count once.\nLet the evaluator of each rank return its own part of the samples; if it gathers them from "
                "all ranks itself, all is well.",
                MisuseWarning,
            )
        return first[self.rank] == self.rank

    def largest(self, what: str, value: float) -> float:
        """Return the largest value of all ranks; NaN if any is NaN."""
        found = self._say(what, value)
        return math.nan if any(map(math.isnan, found)) else float(max(found))

    def isolation(self, slot: SeedSlot, reading: IsolationReading) -> IsolationReading:
        """Return the reading with the largest leak of all ranks, so that a violation counts once."""
        return replace(reading, leak=self.largest(f"isolation of '{slot.name}'", reading.leak))

    def commands(self, chosen: Sequence[Command]) -> Sequence[Command]:
        """Return the commands that rank 0's policy chose."""
        return cast("Sequence[Command]", self.first("the commands of the policy", list(chosen)))

    def gradients(self, *, is_step: bool) -> None:
        """Average the gradients of the seeds that no wrapper averages."""
        self._average(is_step)

    # -- a new seed ------------------------------------------------------------------------------------------------

    def seed_made(self, slot: SeedSlot, seed: nn.Module, blueprint_id: str) -> None:
        """Make a new seed the same on each rank: its structure is compared, its weights are rank 0's; then shard it.

        Raises:
            GerminationError: If the ranks do not build the same seed.
        """
        if self._attempted:
            self._same_seed(f"the seed of '{slot.name}'", slot, seed, blueprint_id)
        if self._shard is not None:
            self._shard(seed)

    def _same_seed(self, what: str, slot: SeedSlot, seed: nn.Module, blueprint_id: str) -> None:
        structure = _structure(_tensors(seed))
        judges = "".join(f", judged by {check}" for check in slot.judge.joined)
        found = self._say(
            what,
            (f"{slot.maker.describe(blueprint_id)}{judges}", structure, _checksum(_tensors(seed).values())),
        )
        for told in ([origin for origin, _, _ in found], [text for _, text, _ in found]):
            if len(set(told)) > 1:
                self._failed = GerminationError(
                    f"The processes do not build the same seed for slot '{slot.name}'.\n{by_rank(told)}\n"
                    "Install the same packs on every machine."
                )
                raise self._failed
        if len({checksum for _, _, checksum in found}) > 1:
            self.send_from_first(what, _tensors(seed).values())

    def send_from_first(self, what: str, tensors: Iterable[Tensor]) -> None:
        """Copy rank 0's values into tensors that have the same shapes everywhere."""
        own = list(tensors)
        whole = [tensor.detach().cpu() for tensor in own] if self.rank == 0 else None
        first: list[Tensor] = self.first(f"weights of {what}", whole)
        with torch.no_grad():
            for tensor, value in zip(own, first, strict=True):
                tensor.copy_(value)

    def seed_accepted(self, slot: SeedSlot) -> None:
        """Raise a GerminationError if another rank refuses the new seed."""
        if self._attempted:
            self._say(f"acceptance of the seed of '{slot.name}'")


def _described(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return dict(module.named_parameters()) | dict(module.named_buffers())


def _structure(tensors: Mapping[str, Tensor]) -> str:
    return ", ".join(f"{name} {tuple(t.shape)} {t.dtype}" for name, t in tensors.items())


def _setup(model: MorphogeneticModel) -> dict[str, Any]:
    """Return what must be equal before anything else is worth comparing, by name."""
    config = model.growth_config
    host = [*model.host.named_parameters()]
    told: dict[str, Any] = {
        "host": type(model.host).__name__,
        "host parameters": sum(p.numel() for _, p in host),
        "shapes of host parameters": hashlib.sha256(_structure(dict(host)).encode()).hexdigest()[:12],
        "slots": ", ".join(f"{slot.name} ({slot.point.topology.value})" for slot in model.slots.values()),
        "gates": f"{config.gates.profile.value}, {config.gates.thresholds}",
        "extra gate checks": ", ".join(check.name for check in config.gates.extra_checks),
    }
    return told | {f"config.{f.name}": getattr(config, f.name) for f in fields(config) if f.name != "gates"}


def _standing(model: MorphogeneticModel, *, with_weights: bool = True) -> dict[str, Any]:
    """Return where a model stands in its growth, by name."""
    told: dict[str, Any] = {"epoch": model.epoch, "has an evaluator": model.growth.evaluator is not None}
    for slot in model.slots.values():
        told[f"slot '{slot.name}', width"] = slot.point.dim
        told[f"slot '{slot.name}', stage"] = slot.stage.name
        told[f"slot '{slot.name}', germinations"] = slot.germinations
        if (state := slot.state) is not None:
            told[f"slot '{slot.name}', alpha"] = slot.alpha
            told[f"slot '{slot.name}', seed"] = f"{state.seed_id} from {state.blueprint_id}"
            told[f"slot '{slot.name}', paused"] = state.is_paused
        if slot.seed is not None:
            told[f"slot '{slot.name}', parameters"] = sum(p.numel() for p in slot.seed_parameters())
            if with_weights:
                told[f"slot '{slot.name}', checksum of weights"] = _checksum(slot.seed_parameters())
    return told


def _checksum(tensors: Iterable[Tensor]) -> str:
    """Return a number that depends on every bit of the tensors and their order; shards, which differ, are left out."""
    total = 0
    for tensor in tensors:
        if hasattr(tensor, "to_local") or tensor.device.type == "meta" or not tensor.numel():
            continue
        plain = tensor.detach().contiguous()
        bits = (torch.view_as_real(plain) if plain.is_complex() else plain).view(-1)
        words = bits.view(_BITS[bits.element_size()]).to(torch.int64)
        places = torch.arange(1, words.numel() + 1, device=words.device) * _MIXER
        total = (31 * total + int((words * places).sum())) % 2**64
    return f"{total:016x}"
