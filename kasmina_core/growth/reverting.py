"""Copies in memory to go back to: the host before a seed began to contribute, a seed that was put aside."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Protocol, cast, final, runtime_checkable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from kasmina_core.errors import CheckpointError
from kasmina_core.records import Count, Mark, Record
from kasmina_core.sharding import reshard

if TYPE_CHECKING:
    from kasmina_core.slots.slot import SeedSlot


@runtime_checkable
class HostStateKeeper(Protocol):
    """A listener that also knows something of the host's parameters, such as an optimiser's momenta."""

    def keep(self, parameters: Sequence[nn.Parameter]) -> Callable[[], None]:
        """Copy what is known of the parameters now; the returned function puts it back."""
        ...


@final
@dataclass(frozen=True, slots=True)
class _SavedHost(Record):
    epoch: Count
    contributors: list[str]
    tensors: dict[str, Tensor]
    optimizers: list[dict[str, dict[str, Any]] | None]
    lost_epochs: Annotated[Count | None, Mark.LATER] = None


@final
@dataclass(frozen=True, slots=True, eq=False)
class HostSnapshot:
    """Copies of the host and of the other seeds that contribute, and what listeners know of their parameters.

    Attributes:
        epoch: Epochs the model had stepped.
        contributors: Ids of the other seeds that contributed.
        copies: The tensors by name, as `contributing_tensors` names them.
        kept: What puts back what the listeners knew.
        lost_epochs: Epochs that reverts had given up by then; ``None`` where an earlier version saved it.
    """

    epoch: int
    contributors: frozenset[str]
    copies: Mapping[str, Tensor]
    kept: Sequence[Callable[[], None]]
    lost_epochs: int | None = None

    @classmethod
    def take(
        cls,
        host: nn.Module,
        slots: Iterable[SeedSlot],
        slot: SeedSlot,
        keepers: Iterable[HostStateKeeper],
        epoch: int,
        lost_epochs: int,
        earlier: Iterable[HostSnapshot] = (),
    ) -> HostSnapshot:
        """Copy what is to be put back should a slot's seed, which is about to contribute, be culled later.

        What is the same in an ``earlier`` snapshot is shared with it: seeds that are put in together cost one copy.
        """
        others, earlier = list(slots), list(earlier)
        tensors = contributing_tensors(host, others, slot)
        parameters = [tensor for tensor in tensors.values() if isinstance(tensor, nn.Parameter)]
        known = {name: copied for each in earlier for name, copied in each.copies.items()}
        kept = [keeper.keep(parameters) for keeper in keepers]
        for each in kept:
            if isinstance(each, KeptOptimizerState):
                each.share(state for one in earlier for state in one.kept)
        return cls(
            epoch,
            frozenset(_contributors(others, slot)),
            {
                name: known[name] if _is_same(tensor, known.get(name)) else tensor.detach().clone()
                for name, tensor in tensors.items()
            },
            kept,
            lost_epochs,
        )

    def to_dict(
        self, tensors: Mapping[str, Tensor], optimizers: Sequence[Optimizer]
    ) -> dict[str, Any] | None:
        """Return plain data and tensors.

        Returns:
            ``None`` if a listener other than a tied optimiser knows something, or nothing can be put back any more,
            because a seed that contributed then is gone.

        Args:
            tensors: Those of `contributing_tensors` now.
            optimizers: Those whose state is saved too.
        """
        known = {id(kept.optimizer): kept for kept in self.kept if isinstance(kept, KeptOptimizerState)}
        if len(known) < len(self.kept) or not self.copies.keys() <= tensors.keys():
            return None
        names = {id(tensor): name for name, tensor in tensors.items()}
        return {
            "epoch": self.epoch,
            "lost_epochs": self.lost_epochs,
            "contributors": sorted(self.contributors),
            "tensors": dict(self.copies),
            "optimizers": [
                {names[id(p)]: state for p, state in known[id(one)].states.items() if id(p) in names}
                if id(one) in known
                else None
                for one in optimizers
            ],
        }

    @classmethod
    def from_dict(
        cls, data: Any, tensors: Mapping[str, Tensor], optimizers: Sequence[Optimizer], slot: str
    ) -> HostSnapshot:
        """Rebuild from `to_dict`, in the dtypes and on the devices of ``tensors``.

        Args:
            data: What `to_dict` returned.
            tensors: Those of `contributing_tensors` now.
            optimizers: In the order in which they were saved; none leaves their state alone in a revert.
            slot: Name of the slot, for messages.

        Raises:
            CheckpointError: If it is damaged, or does not fit the tensors.
        """
        what = f"The host kept for slot '{slot:.80}'"
        saved = _SavedHost.from_dict(data, what)
        parameters = {
            name: tensor
            for name, tensor in tensors.items()
            if name in saved.tensors and isinstance(tensor, nn.Parameter)
        }
        if foreign := {name for states in saved.optimizers for name in states or ()} - parameters.keys():
            raise CheckpointError(f"{what} is damaged: it has no parameter {min(foreign)!r:.80}.")
        for name, tensor in saved.tensors.items():
            if name not in tensors or tensors[name].shape != tensor.shape:
                here = tuple(tensors[name].shape) if name in tensors else "nothing"
                raise CheckpointError(
                    f"{what} does not fit this one at '{name!s:.80}'.\n"
                    f"  kept: {tuple(tensor.shape)}\n  here: {here}"
                )
        copies = {
            name: tensor.to(tensors[name].device, tensors[name].dtype)
            for name, tensor in saved.tensors.items()
        }
        kept = [
            KeptOptimizerState(
                one,
                parameters.values(),
                {parameters[name]: _beside(parameters[name], state) for name, state in states.items()},
            )
            for one, states in zip(optimizers, saved.optimizers, strict=False)
            if states is not None
        ]
        return cls(saved.epoch, frozenset(saved.contributors), copies, kept, saved.lost_epochs)

    def difference(self, tensors: Mapping[str, Tensor]) -> str:
        """Return, one line per tensor, where the copies do not fit these tensors; empty if they do."""
        here, kept = _forms(tensors), _forms(self.copies)
        odd = sorted(name for name in {*here, *kept} if here.get(name) != kept.get(name))
        return "\n".join(
            f"  {name}: kept {kept.get(name, 'nothing')}, now {here.get(name, 'nothing')}" for name in odd
        )

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Write the copies into the tensors and let the keepers put back what they knew; gradients are dropped.

        Args:
            tensors: Those of `contributing_tensors` now; `difference` must have found none.
        """
        with torch.no_grad():
            for name, tensor in tensors.items():
                tensor.copy_(self.copies[name])
                tensor.grad = None
        for put_back in self.kept:
            put_back()


@final
@dataclass(frozen=True, slots=True)
class KeptSeed(Record):
    """A seed that was put aside: what it was made from, and its weights and buffers."""

    seed_id: str
    blueprint_id: str
    options: Mapping[str, Any]
    weights: Mapping[str, Any]

    @classmethod
    def of(cls, slot: SeedSlot) -> KeptSeed | None:
        """Return what a slot's seed is now, or ``None`` if it holds none; the tensors are the seed's own."""
        if slot.seed is None or slot.state is None:
            return None
        state = slot.state
        return cls(state.seed_id, state.blueprint_id, copy.deepcopy(slot.options), slot.seed.state_dict())

    def load_into(self, seed: nn.Module) -> None:
        """Give a seed the weights; where it is sharded, each process its shards.

        Raises:
            RuntimeError: If they do not fit.
        """
        own = seed.state_dict()
        seed.load_state_dict(
            {
                name: _sharded_like(value, own[name]) if isinstance(value, Tensor) and name in own else value
                for name, value in self.weights.items()
            }
        )


def contributing_tensors(
    host: nn.Module, slots: Iterable[SeedSlot], apart_from: SeedSlot
) -> dict[str, Tensor]:
    """Return parameters and buffers of the host and of every other seed whose output is in the model's, by name."""
    modules = {"host": host} | {
        f"{slot.name}.seed": cast("nn.Module", slot.seed)
        for slot in _contributors(slots, apart_from).values()
    }
    for module in modules.values():
        reshard(module)
    return {
        f"{prefix}.{name}": tensor
        for prefix, module in modules.items()
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]
    }


def obstacle_to_revert(
    snapshot: HostSnapshot | None, host: nn.Module, slots: Iterable[SeedSlot], slot: SeedSlot
) -> str:
    """Return why the host cannot be put back to a slot's snapshot; empty if it can."""
    if snapshot is None:
        return (
            "no snapshot of the host was kept. GrowthConfig(keep_snapshot=True) keeps one from BLENDING on; "
            "save_checkpoint saves it, and a copy or a model that was loaded otherwise has none."
        )
    others = list(slots)
    if changed := sorted(snapshot.contributors ^ set(_contributors(others, slot))):
        return (
            f"other seeds have begun or ceased to contribute since: {', '.join(changed)}. "
            "Revert those that came later first, or cull without revert."
        )
    if difference := snapshot.difference(contributing_tensors(host, others, slot)):
        return f"the host has other tensors than then.\n{difference}"
    return ""


def _contributors(slots: Iterable[SeedSlot], apart_from: SeedSlot) -> dict[str, SeedSlot]:
    return {
        slot.state.seed_id: slot
        for slot in slots
        if slot is not apart_from and slot.state is not None and slot.is_active and not slot.is_apart
    }


@final
@dataclass(frozen=True, slots=True, eq=False)
class KeptOptimizerState:
    """An optimiser's state of some parameters; calling it puts it back.

    Learning rates and other settings of groups are not part of it: they belong to the schedule, which goes on.

    Attributes:
        optimizer: The optimiser.
        parameters: All that are to be put back; those without a state then have none.
        states: States by parameter.
    """

    optimizer: Optimizer
    parameters: Collection[nn.Parameter]
    states: Mapping[nn.Parameter, dict[str, Any]]

    @classmethod
    def of(cls, optimizer: Optimizer, parameters: Iterable[nn.Parameter]) -> KeptOptimizerState:
        """Copy an optimiser's state of some parameters now."""
        wanted = list(parameters)
        states = {p: copy.deepcopy(optimizer.state[p]) for p in wanted if p in optimizer.state}
        return cls(optimizer, wanted, states)

    def share(self, earlier: Iterable[object]) -> None:
        """Take the tensors of earlier copies of the same optimiser's state, where they are the same."""
        for other in earlier:
            if not isinstance(other, KeptOptimizerState) or other.optimizer is not self.optimizer:
                continue
            for p, state in self.states.items():
                for name, known in other.states.get(p, {}).items():
                    if _is_same(state.get(name), known):
                        state[name] = known

    def __call__(self) -> None:
        for p in self.parameters:
            if p not in self.states:
                self.optimizer.state.pop(p, None)
            else:
                self.optimizer.state[p] = _copied_into(self.optimizer.state.get(p, {}), self.states[p])


def _is_same(one: object, other: object) -> bool:
    """Whether two plain tensors are equal bit for bit; ``False`` where that cannot be told cheaply."""
    if not (type(one) in (Tensor, nn.Parameter) and type(other) is Tensor and isinstance(one, Tensor)):
        return False
    if (one.dtype, one.device, one.shape) != (other.dtype, other.device, other.shape) or one.is_complex():
        return False
    # 0 and -0 are equal numbers and other bits.
    return torch.equal(one, other) and torch.equal(one.signbit(), other.signbit())


def _beside(parameter: nn.Parameter, state: dict[str, Any]) -> dict[str, Any]:
    """Return a state with its tensors where the parameter is; a count of steps stays where it was."""
    return {
        key: value.to(parameter.device) if isinstance(value, Tensor) and value.dim() else value
        for key, value in state.items()
    }


def _copied_into(present: dict[str, Any], before: dict[str, Any]) -> dict[str, Any]:
    """Return ``before``, in the tensors of ``present`` where they fit: a captured graph knows them by address."""
    result = {}
    for name, value in before.items():
        place = present.get(name)
        if isinstance(value, Tensor) and isinstance(place, Tensor) and place.shape == value.shape:
            result[name] = place.copy_(value)
        else:
            result[name] = copy.deepcopy(value)
    present.clear()
    present.update(result)
    return present


def _forms(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    return {name: f"{tuple(tensor.shape)} {tensor.dtype}" for name, tensor in tensors.items()}


def _sharded_like(tensor: Tensor, like: Any) -> Tensor:
    """Return a whole tensor sharded as another one of its shape is; then every process has to ask."""
    mesh = getattr(like, "device_mesh", None)
    if mesh is None or hasattr(tensor, "device_mesh"):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(like.device), mesh, like.placements)
