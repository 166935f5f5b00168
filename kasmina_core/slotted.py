"""A host with slots as one module: attach and detach, parameters, evaluation, and ``state_dict`` keys."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final, Self, TypeVar, cast, final

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from kasmina_core.errors import HostError, KasminaError
from kasmina_core.hosts import HostProtocol, InjectionPoint, SlotHook, submodule
from kasmina_core.probing import (
    ProbedPoint,
    example_of,
    lookup,
    parameter_dtype,
    probe,
    requested_points,
)
from kasmina_core.quiet import quiet_evaluation
from kasmina_core.slots.slot import ForwardMode, SeedSlot
from kasmina_core.state_keys import WRAPPER, NamesOf, without_wrapper

SLOTS_KEY: Final = "kasmina_slots"


@final
class SlotMap(Mapping[str, SeedSlot]):
    """The slots by name; a point's path works too."""

    def __init__(self, slots: Iterable[SeedSlot]) -> None:
        self._slots = {slot.name: slot for slot in slots}

    def __getitem__(self, name: str) -> SeedSlot:
        if not isinstance(name, str):
            raise TypeError(
                f"A slot is asked for by its name, not {name!r}. Slots: {', '.join(self._slots)}."
            )
        if (slot := self._slots.get(name)) is not None:
            return slot
        by_path = {slot.point.path: slot for slot in self._slots.values()}
        if name in by_path:
            return by_path[name]
        return cast("SeedSlot", lookup(name, self._slots, "slot"))

    def __iter__(self) -> Iterator[str]:
        return iter(self._slots)

    def __len__(self) -> int:
        return len(self._slots)

    def __contains__(self, name: object) -> bool:
        return name in self._slots or any(slot.point.path == name for slot in self._slots.values())

    def __repr__(self) -> str:
        return f"SlotMap({', '.join(f'{slot.name}: {slot.stage.name}' for slot in self._slots.values())})"


class SlottedModel(nn.Module):
    """A host whose features pass through slots.

    The host keeps its class, its keys and its own hooks. Empty slots add no key to the ``state_dict``.

    Args:
        host: Any module. One with `HostProtocol` declares its points.
        slots: Names or paths of points, globs or declarations; ``None`` for all that the host declares.
        make_slot: Makes the slot for a point that was proved.
        example: Inputs for one forward; default the host's ``example_inputs()``.
        causal: Whether points given by path lie in a causal host.

    Raises:
        HostError: If a point does not exist, does not fire exactly once, or is not as declared; the host is left as
            it was.
        TypeError: If the host is no module, or ``slots`` names something else than points.
    """

    def __init__(
        self,
        host: nn.Module,
        slots: Iterable[str | InjectionPoint] | None,
        make_slot: Callable[[ProbedPoint], SeedSlot],
        *,
        example: object = None,
        causal: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(host, nn.Module):
            hint = f" Make one of the class: {host.__name__}(...)." if isinstance(host, type) else ""
            raise TypeError(f"host must be a module, not {host!r:.200}.{hint}")
        if example is None:
            example = example_of(host)
        proved = probe(host, requested_points(host, slots), example, causal=causal)
        self.host = host
        self._handles: dict[str, RemovableHandle] = {}
        self.add_module(
            SLOTS_KEY,
            nn.ModuleDict({found.point.name: make_slot(found).train(host.training) for found in proved}),
        )
        attached: list[SeedSlot] = []
        try:
            for slot in self.slots.values():
                self._attach(slot)
                attached.append(slot)
        except Exception:
            for slot in attached:
                self._detach(slot)
            raise
        self.training = host.training
        self.register_state_dict_post_hook(_strip_host_prefix)  # type: ignore[no-untyped-call]  # torch
        self.register_load_state_dict_pre_hook(_add_host_prefix)  # type: ignore[no-untyped-call]  # torch

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the host, its features passing through the slots."""
        return self.host(*args, **kwargs)

    @property
    def slots(self) -> SlotMap:
        """The slots by name, in the order in which they were asked for."""
        return SlotMap(cast("Iterable[SeedSlot]", getattr(self, SLOTS_KEY).values()))

    def host_parameters(self) -> list[nn.Parameter]:
        """Return the host's parameters, each once."""
        return list(self.host.parameters())

    def seed_parameters(self, slot: str | None = None) -> list[nn.Parameter]:
        """Return the parameters that seeds added, each once, without any that belong to the host.

        Args:
            slot: Name of one slot; default all.
        """
        owned = {id(p) for p in self.host.parameters()}
        chosen = [self.slots[slot]] if slot is not None else list(self.slots.values())
        unique = {id(p): p for s in chosen for p in s.seed_parameters() if id(p) not in owned}
        return list(unique.values())

    @contextmanager
    def bypassed(self, slot: str) -> Iterator[Self]:
        """Run the block with the model as it would be without that slot's seed, fossils included."""
        with self.slots[slot].forced(ForwardMode.PASS):
            yield self

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """Run the block in eval mode without gradients; training modes and random numbers are then as before."""
        try:
            with quiet_evaluation(self):
                yield
        finally:
            for slot in self.slots.values():
                slot._refresh_mode()

    # -- attaching -------------------------------------------------------------------------------------------------

    def detach_slots(self) -> nn.Module:
        """Take the slots off the host and return it as it was; seeds stay behind with this model."""
        for slot in self.slots.values():
            self._detach(slot)
        return self.host

    def _attach(self, slot: SeedSlot) -> None:
        if isinstance(self.host, HostProtocol) and slot.point in list(self.host.injection_points()):
            self.host.register_slot(slot.name, slot)
            return
        module = submodule(self.host, slot.point.path)
        if any(isinstance(hook, SlotHook) for hook in module._forward_hooks.values()):
            raise HostError(f"'{slot.point.path}' already has a slot: a host can be in one model at a time.")
        self._handles[slot.name] = module.register_forward_hook(SlotHook(slot))

    def _detach(self, slot: SeedSlot) -> None:
        if (handle := self._handles.pop(slot.name, None)) is not None:
            handle.remove()
        elif isinstance(self.host, HostProtocol):
            self.host.unregister_slot(slot.name)

    # -- persistence -----------------------------------------------------------------------------------------------

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load weights and topology: seeds are rebuilt, or removed, as the saved model had them.

        Raises:
            KasminaError: If a saved seed cannot be rebuilt.
            RuntimeError: If keys or shapes differ, as in torch.
        """
        if not assign:
            return super().load_state_dict(without_wrapper(state_dict), strict)
        self._leave_meta(state_dict)
        before = [(slot, self._dtype_beside(slot)) for slot in self.slots.values()]
        result = super().load_state_dict(without_wrapper(state_dict), strict, assign)
        for slot, dtype in before:
            own = slot.alpha_buffer.dtype
            # Assigned parameters may have another dtype. A slot follows those beside it, unless it differed from them.
            slot.alpha_buffer = torch.full_like(
                slot.alpha_buffer, slot.alpha, dtype=self._dtype_beside(slot) if own == dtype else own
            )
        return result

    def _dtype_beside(self, slot: SeedSlot) -> torch.dtype:
        return parameter_dtype(self.host, slot.point.path, slot.alpha_buffer.dtype)

    def _leave_meta(self, state_dict: Mapping[str, Any]) -> None:
        """Move what no file holds off the meta device, to where the assigned tensors are."""
        devices = [
            t.device
            for key, t in state_dict.items()
            if isinstance(t, Tensor) and not key.endswith("_extra_state")
        ]
        for slot in self.slots.values():
            if slot.device.type == "meta" and devices:
                slot.alpha_buffer = torch.zeros_like(slot.alpha_buffer, device=devices[0])
                for name in ("deviation", "training_deviation"):
                    setattr(slot, name, torch.zeros_like(slot.deviation, device=devices[0]))


_Model = TypeVar("_Model", bound=SlottedModel)


def held_weakly(model: _Model) -> Callable[[], _Model]:
    """Return a function that returns the model, and raises `KasminaError` once the model is gone.

    What a model owns, its slots and what they ask, must know it in this way: a strong reference back would keep the model
    and its memory until Python's collector comes by.
    """
    reference = weakref.ref(model)

    def the_model() -> _Model:
        if (found := reference()) is None:
            raise KasminaError("The model of this slot is gone. Keep a reference to it as long as its slots.")
        return found

    return the_model


def _strip_host_prefix(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any]
) -> None:
    own = prefix + "host."
    for key in [key for key in state_dict if key.startswith(prefix)]:
        value = state_dict.pop(key)
        state_dict[prefix + key.removeprefix(own) if key.startswith(own) else key] = value
    metadata = getattr(state_dict, "_metadata", None)
    if metadata is not None:
        for key in [key for key in metadata if key.startswith(own)]:
            metadata.setdefault(prefix + key.removeprefix(own), metadata[key])


def _add_host_prefix(
    module: nn.Module,
    state_dict: dict[str, Any],
    prefix: str,
    local_metadata: dict[str, Any],
    strict: bool,
    missing_keys: list[str],
    unexpected_keys: list[str],
    error_msgs: list[str],
) -> None:
    own_name = NamesOf(cast("SlottedModel", module).host)
    given = {key: state_dict.pop(key) for key in list(state_dict) if key.startswith(prefix)}
    for key, value in given.items():
        name = key.removeprefix(prefix)
        while name.startswith(f"{WRAPPER}."):  # the keys of torch.compile(model)
            name = name.removeprefix(f"{WRAPPER}.")
        if not name.startswith(f"{SLOTS_KEY}."):
            name = f"host.{own_name(name)}"
        # If two keys map to one name, the second stays as it is, so torch reports it as unexpected.
        state_dict[prefix + name if prefix + name not in state_dict else key] = value
