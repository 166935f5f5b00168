"""A host with slots as one module: attach and detach, parameters, evaluation, and ``state_dict`` keys."""

from __future__ import annotations

import functools
import inspect
import re
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from types import FunctionType
from typing import Any, Final, Self, TypeVar, cast, final
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from kasmina_core.carried import refusal_of
from kasmina_core.causality import demand_towers, with_causality
from kasmina_core.errors import HostError, KasminaError, MisuseWarning, warn_caller
from kasmina_core.hosts import HostProtocol, InjectionPoint, SlotHook, demand_openness, submodule
from kasmina_core.lifecycle import SeedStage
from kasmina_core.outputs import split_path
from kasmina_core.positions import CallBegins, CallEnds, ContextReader, HostCalls, read_calls
from kasmina_core.probing import (
    ProbedPoint,
    example_of,
    lookup,
    parameter_dtype,
    probe,
    requested_points,
    unread,
    without_gradient,
)
from kasmina_core.quiet import Turns, parameters_by_id, quiet_evaluation
from kasmina_core.slots.forward import ForwardMode, Slot
from kasmina_core.slots.slot import SeedSlot
from kasmina_core.state_keys import WRAPPER, NamesOf, without_wrapper

SLOTS_KEY: Final = "kasmina_slots"

HAS_SLOTS: Final = "has_slots"
"""In the metadata of a ``state_dict`` of a model, whose keys are those of its bare host while its slots are empty."""

BEHIND: Final = "__"
"""Between the name of a point and the number of a slot at it, from 2 on: ``block2``, ``block2__2``, ``block2__3``."""


_Slot = TypeVar("_Slot", bound=SeedSlot, covariant=True)


def name_behind(chain: Sequence[SeedSlot]) -> str:
    """Return the name of the slot that would be opened behind the slots at a point."""
    return f"{chain[0].name}{BEHIND}{len(chain) + 1}"


@final
class SlotMap(Mapping[str, _Slot]):
    """The slots by name; a point's path works too."""

    def __init__(self, slots: Mapping[str, _Slot]) -> None:
        self._slots = slots

    def __getitem__(self, name: str) -> _Slot:
        if not isinstance(name, str):
            raise TypeError(
                f"A slot is asked for by its name, not {name!r}. Slots: {', '.join(self._slots)}."
            )
        if (slot := self._slots.get(name)) is not None:
            return slot
        by_path = {slot.point.path: slot for slot in [*self._slots.values()][::-1]}  # the first at a point
        if name in by_path:
            return by_path[name]
        is_path = any(sign in name for sign in ".:")
        return cast("_Slot", lookup(name, by_path if is_path else self._slots, "slot"))

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

    Public methods and properties of the host's class work on the model too, where it has none of that name:
    ``model.generate(...)``, ``model.device``, ``model.get_input_embeddings()``. The host's forward runs in them as
    always, slots included. Not taken over are: what torch defines; what would save or publish the host without its
    seeds (``save_pretrained``, ``push_to_hub``, ``from_pretrained``); how the host takes slots; and attributes of the instance, above all
    ``config``, by which trainers take a model for one of transformers. They are at ``model.host``.

    Args:
        host: Any module. One with `HostProtocol` declares its points.
        slots: Names or paths of points, globs or declarations; ``None`` for all that the host declares.
        make_slot: Makes the slot for a point that was proved.
        example: Inputs for one forward; default the host's ``example_inputs()``.
        causal: Whether points given by path lie in a causal host, or a mapping that says it of towers:
            ``{"encoder": False, "decoder": True}``. What is not said is found by values, see `with_causality`.
        context: Reads what positions mean off the host's call; default the host's ``context_reader()``, if it has one.

    Raises:
        HostError: If a point does not exist, does not fire exactly once, or is not as declared; the host is left as
            it was.
        TypeError: If the host is no module, ``slots`` names something else than points, or ``context`` cannot be called.
    """

    def __init__(
        self,
        host: nn.Module,
        slots: Iterable[str | InjectionPoint] | None,
        make_slot: Callable[[ProbedPoint], SeedSlot],
        *,
        example: object = None,
        causal: bool | Mapping[str, bool] | None = None,
        context: ContextReader | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(host, nn.Module):
            hint = f" Make one of the class: {host.__name__}(...)." if isinstance(host, type) else ""
            raise TypeError(f"host must be a module, not {host!r:.200}.{hint}")
        if context is None and callable(offered := getattr(host, "context_reader", None)):
            context = offered()
        if context is not None and not callable(context):
            raise TypeError(f"context must read a call, as EveryPosition() does, not {context!r:.200}.")
        submodule(host, getattr(context, "module", ""))
        _take_off_lost_slots(host)
        demand_openness(host)
        if example is None:
            example = example_of(host)
        demand_towers(host, causal)
        wanted = requested_points(host, slots)
        by_path = [item for item in wanted if isinstance(item, str)]
        proved, doubts = with_causality(host, probe(host, wanted, example), by_path, example, causal)
        lost = without_gradient(host, proved, example)
        silent = {} if context is None else unread(host, context, proved, example)
        self.host = host
        self._handles: dict[str, RemovableHandle] = {}
        self._is_detached = False
        self._hung: set[str] = set()
        self._turns = Turns()
        self.add_module(
            SLOTS_KEY,
            nn.ModuleDict({found.point.name: make_slot(found).train(host.training) for found in proved}),
        )
        self._calls, taking = HostCalls(context), list(self.slots.values())
        for found, slot in zip(proved, taking, strict=True):
            slot.has_proved_layout, slot.doubt, slot.calls = (
                found.is_proved,
                doubts.get(slot.name, ""),
                self._calls,
            )
            slot.unread, slot.has_gradient = silent.get(slot.name, ""), slot.name not in lost
        # Here, not at germination: torch.compile ignores a hook that is added after the first compiled call.
        attached: list[SeedSlot] = []
        try:
            for slot in taking:
                self._attach(slot)
                attached.append(slot)
        except Exception:
            for slot in attached:
                self._detach(slot)
            raise
        self._taking = taking
        self._reading: list[RemovableHandle] = []
        if context is not None:
            self._reading = read_calls(self._calls, host, taking)
        self.training = host.training
        self._hang_together()
        self.register_state_dict_post_hook(_strip_host_prefix)  # type: ignore[no-untyped-call]  # torch
        self.register_load_state_dict_pre_hook(_add_host_prefix)  # type: ignore[no-untyped-call]  # torch
        self.register_load_state_dict_post_hook(_name_as_the_file)  # type: ignore[no-untyped-call]  # torch

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the host, its features passing through the slots.

        Raises:
            HostError: If the module of a slot that holds a seed is gone from the host, or is called more than once.
        """
        # A graph must hold neither locks nor walks over modules; in one, commands and saves look after the slots.
        if torch.compiler.is_compiling() or "_is_replica" in self.__dict__:
            self._calls.begin_forward()
            output = self.host(*args, **kwargs)
            self._calls.end_forward()
            return output
        self._turns.enter()
        try:
            self.follow_modules()
            self._calls.begin_forward()
            return self.host(*args, **kwargs)
        finally:
            self._calls.end_forward()
            self._turns.leave()

    def __getattr__(self, name: str) -> Any:
        # torch.func.functional_call finds and sets parts of the host by their names in the state_dict.
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in _parts_of(self.__dict__):
                return getattr(self.host, name)
            kind = _own_of_host(self.__dict__, name)
            if kind is None and name in _SAVES_THE_HOST and hasattr(self.host, name):
                raise AttributeError(
                    f"'{type(self).__name__}' object has no attribute '{name}': it would take the host without its seeds. save_checkpoint and "
                    f"load_checkpoint keep both, export_model makes a plain module; model.host.{name} is the host's own."
                ) from None
            if kind is None:
                raise
            found = getattr(self.host, name)
            return found if isinstance(kind, property) else self._following(found)

    def _following(self, method: Callable[..., Any]) -> Callable[..., Any]:
        """Return a method of the host that keeps what a forward of the model does: slots follow, and other threads wait."""

        @functools.wraps(method)
        def call(*args: Any, **kwargs: Any) -> Any:
            self._turns.enter()
            try:
                self.follow_modules()
                return method(*args, **kwargs)
            finally:
                self._turns.leave()

        return call

    def __setattr__(self, name: str, value: Any) -> None:
        is_own = name in self.__dict__ or hasattr(type(self), name)
        if is_own or name not in _parts_of(self.__dict__):
            super().__setattr__(name, value)
        elif name in self.host._parameters and isinstance(value, Tensor):
            # functional_call puts plain tensors there.
            self.host._parameters[name] = cast("nn.Parameter", value)
        else:
            setattr(self.host, name, value)

    def _fqn_modifiers(self) -> dict[str, str]:
        """Return, for `torch.distributed.checkpoint.state_dict`, the attribute behind which each part of the host is."""
        return dict.fromkeys(_parts_of(self.__dict__), "host")

    @property
    def slots(self) -> SlotMap[SeedSlot]:
        """The slots by name, in the order in which they were asked for; those behind others follow these."""
        return SlotMap(cast("Mapping[str, SeedSlot]", getattr(self, SLOTS_KEY)._modules))

    def host_parameters(self) -> list[nn.Parameter]:
        """Return the host's parameters, each once."""
        return list(self.host.parameters())

    def seed_parameters(self, slot: str | None = None) -> list[nn.Parameter]:
        """Return the parameters that seeds added, each once, without any that belong to the host.

        Args:
            slot: Name of one slot; default all.
        """
        chosen = [self.slots[slot]] if slot is not None else list(self.slots.values())
        unique = {id(p): p for s in chosen for p in s.seed_parameters()}
        if unique:
            host = parameters_by_id(self.host)
            return [p for key, p in unique.items() if key not in host]
        return []

    @contextmanager
    def bypassed(self, slot: str) -> Iterator[Self]:
        """Run the block with the model as it would be without that slot's seed, fossils included."""
        with self.slots[slot].forced(ForwardMode.PASS):
            yield self

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """Run the block in eval mode without gradients; training modes and random numbers are then as before.

        Forwards of other threads wait meanwhile.
        """
        with self.alone():
            try:
                with quiet_evaluation(self):
                    yield
            finally:
                for slot in self.slots.values():
                    slot.refresh_mode()

    def alone(self) -> AbstractContextManager[None]:
        """Let forwards of other threads wait while the block changes how slots compute."""
        return self._turns.alone()

    @property
    def is_evaluating(self) -> bool:
        """Whether the calling thread is inside of `evaluation`: in an evaluator, or a closure of ``incubate``."""
        return self._turns.is_alone

    # -- slots behind slots ------------------------------------------------------------------------------------------

    def chains(self) -> list[list[SeedSlot]]:
        """Return for each point its slots, in the order in which features pass them."""
        slots = list(self.slots.values())
        behind = {id(one) for slot in slots for one in slot.behind}
        chains = [[slot] for slot in slots if id(slot) not in behind]
        for chain in chains:
            while chain[-1].behind:
                chain.append(cast("SeedSlot", chain[-1].behind[0]))
        return chains

    def chain_of(self, slot: SeedSlot) -> list[SeedSlot]:
        """Return the slots at the point of a slot, in the order in which features pass them."""
        return next(chain for chain in self.chains() if any(one is slot for one in chain))

    def open_behind(self, slot: SeedSlot) -> SeedSlot:
        """Open a slot behind the last one at a slot's point. No hook is new: the last one calls it.

        Raises:
            HostError: If a slot elsewhere has its name.
        """
        chain = self.chain_of(slot)
        last, name = chain[-1], name_behind(chain)
        if name in self.slots:
            raise HostError(
                f"A slot behind '{last.name}' would be called '{name}', and a slot elsewhere has this name.\n"
                "Give that point another one: InjectionPoint(name, path, ...)."
            )
        new = last.another(replace(last.point, name=name))
        new.calls, new.doubt, new.has_proved_layout = last.calls, last.doubt, last.has_proved_layout
        new.owned_by = last.owned_by
        last.behind = (new.train(last.training),)
        last.refresh_mode()
        self._hold([one for chain in self.chains() for one in chain])
        return new

    def close_behind(self, slot: SeedSlot) -> None:
        """Take away the slots behind a slot, with the seeds in them."""
        chain = self.chain_of(slot)
        gone = chain[chain.index(slot) + 1 :]
        for one in gone:
            one.clear()
        for one in (slot, *gone):
            one.behind = ()
        slot.refresh_mode()
        self._hold([one for one in self.slots.values() if one not in gone])

    def nest(self, has_behind: Callable[[str], bool]) -> None:
        """Open and close slots until there is one behind each slot of whose name ``has_behind`` says so."""
        for first, *_ in self.chains():
            last = first
            while has_behind(last.name):
                last = cast("SeedSlot", last.behind[0]) if last.behind else self.open_behind(last)
            if last.behind:
                self.close_behind(last)

    def kept_slots(self) -> Callable[[], None]:
        """Return what makes the set of slots what it is now; what the slots hold is somebody else's."""
        held = list(self.slots.values())
        return lambda: self._hold(held)

    def _hold(self, slots: list[SeedSlot]) -> None:
        # In place: hooks, compiled graphs and callers know the containers.
        held = cast("dict[str, nn.Module | None]", getattr(self, SLOTS_KEY)._modules)
        held.clear()
        held.update((slot.name, slot) for slot in slots)
        self._taking[:] = slots
        for slot in slots:
            _MODEL_OF[slot] = weakref.ref(self)

    # -- attaching -------------------------------------------------------------------------------------------------

    def detach_slots(self) -> nn.Module:
        """Take the slots off the host and return it as it was; seeds stay behind with this model."""
        for slot in self.slots.values():
            self._detach(slot)
        for handle in self._reading:
            handle.remove()
        self._hung, self._is_detached, self._reading = set(), True, []
        return self.host

    def demand_slots(self) -> None:
        """Demand that `detach_slots` was not called.

        Raises:
            HostError: If it was.
        """
        if self._is_detached:
            raise HostError(
                "The slots of this model were taken off its host with detach_slots(): a seed would take no part.\n"
                "Make a new model of the host: MorphogeneticModel(host, ...)."
            )

    def follow_modules(self) -> None:
        """Hang slots whose module was replaced or wrapped on the one that stands at their path now.

        What changes modules after slots were attached: adapters and their merging, conversion to SyncBatchNorm,
        quantisation, ``host.head = ...``. Empty slots follow once they hold a seed.

        Raises:
            HostError: If there is no module at the path of a slot that holds a seed.

        Warns:
            MisuseWarning: If a slot moved.
        """
        moved = []
        # Not `self.slots`: this runs in every forward.
        for slot in cast("Iterable[SeedSlot]", getattr(self, SLOTS_KEY).values()):
            if slot.seed is not None and slot.point.name in self._hung:
                module = self._module_of(slot)
                if not _has_slot(module, slot):
                    moved.append((slot, module))
        for slot, _ in moved:  # all of them first: two modules may have changed places
            self._detach(slot)
        for slot, module in moved:
            self._attach(slot)
            way_out = "" if slot.stage is SeedStage.FOSSILIZED else ", or cull the seed"
            warn_caller(
                f"The module of slot '{slot.name}' was replaced: its seed ({slot.stage.name}) now follows the "
                f"{type(module).__name__} that stands at '{slot.point.path}'. If it does not belong there, put the former "
                f"module back{way_out}. Give new parameters to the optimiser, and compile a compiled model again.",
                MisuseWarning,
            )

    def _module_of(self, slot: SeedSlot) -> nn.Module:
        path, module = split_path(slot.point.path)[0], cast("nn.Module | None", self.host)
        for part in path.split(".") if path else ():
            module = module._modules.get(part) if module is not None else None
        if module is None:
            raise HostError(
                f"The module of slot '{slot.name}' is gone: {type(self.host).__name__} has no '{path}' any more, so its "
                f"seed ({slot.stage.name}) would take no part.\n"
                "Put a module there, or take all slots off with model.detach_slots()."
            )
        return module

    def _attach(self, slot: SeedSlot) -> None:
        if isinstance(self.host, HostProtocol) and slot.point in list(self.host.injection_points()):
            self.host.register_slot(slot.name, slot)
            return
        module = submodule(self.host, slot.point.path)
        hanging = [hook.slot for hook in module._forward_hooks.values() if isinstance(hook, SlotHook)]
        if any(all(other is not own for own in self.slots.values()) for other in hanging):
            raise HostError(
                f"'{slot.point.path}' already has a slot: a host can be in one model at a time.\n"
                "Take the slots of the other model off first: old_model.detach_slots()."
            )
        self._handles[slot.name] = module.register_forward_hook(SlotHook(slot, slot.point.path))

    def _detach(self, slot: SeedSlot) -> None:
        if (handle := self._handles.pop(slot.name, None)) is not None:
            handle.remove()
        elif isinstance(self.host, HostProtocol) and slot is self.chain_of(slot)[0]:
            self.host.unregister_slot(slot.name)

    def _hang_together(self) -> None:
        """Note which slots hang on a module by our hook, and whose they are."""
        self._hung = {
            slot.name
            for slot in self.slots.values()
            if _has_slot(submodule(self.host, slot.point.path), slot)
        }
        for slot in self.slots.values():
            _MODEL_OF[slot] = weakref.ref(self)

    # -- persistence -----------------------------------------------------------------------------------------------

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return weights and what has grown, as `torch.nn.Module.state_dict` does.

        Raises:
            HostError: If the module of a slot that holds a seed is gone from the host.
        """
        self.follow_modules()
        return super().state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_turns": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]  # torch
        self._turns = Turns()
        self._hang_together()

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load weights and topology: seeds are rebuilt, or removed, as the saved model had them.

        A seed that differs in values alone stays, and they are copied into its parameters.

        Raises:
            KasminaError: If a saved seed cannot be rebuilt.
            RuntimeError: If keys or shapes differ, as in torch.
        """
        if not assign:
            return super().load_state_dict(without_wrapper(state_dict), strict)
        self._leave_meta(state_dict)
        before = {slot.point.path: self._dtype_beside(slot) for slot in self.slots.values()}
        result = super().load_state_dict(without_wrapper(state_dict), strict, assign)
        for slot in self.slots.values():
            own, dtype = slot.alpha_buffer.dtype, before[slot.point.path]
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
                for name, buffer in slot.named_buffers(recurse=False):
                    setattr(slot, name, torch.zeros_like(buffer, device=devices[0]))


_MODEL_OF: Final[WeakKeyDictionary[nn.Module, weakref.ref[SlottedModel]]] = WeakKeyDictionary()


def _has_slot(module: nn.Module, slot: nn.Module) -> bool:
    """Say whether a hook passes the module's output through the slot."""
    return any(isinstance(hook, SlotHook) and hook.slot is slot for hook in module._forward_hooks.values())


def _is_lost(slot: nn.Module) -> bool:
    return (model := _MODEL_OF.get(slot)) is not None and model() is None


def _take_off_lost_slots(host: nn.Module) -> None:
    """Take slots off a host whose model is gone: nobody else can.

    Raises:
        HostError: If the model is there.
    """
    for module in host.modules():
        for key, begins in list(module._forward_pre_hooks.items()):
            if isinstance(begins, CallBegins) and _is_lost(begins.slots[0]):
                module._forward_pre_hooks.pop(key)
        for key, hook in list(module._forward_hooks.items()):
            if isinstance(hook, CallEnds) and _is_lost(hook.slots[0]):
                module._forward_hooks.pop(key)
            if not isinstance(hook, SlotHook):
                continue
            slot = cast("SeedSlot", hook.slot)
            if (model := _MODEL_OF.get(slot)) is None:
                if isinstance(slot, Slot):  # a copy: a model knows its slots, those of a copied model too
                    raise HostError(
                        f"This {type(host).__name__} already has a slot, or is a copy of a host that had: {refusal_of(host)}."
                    )
                continue
            if model() is not None:
                raise HostError(
                    f"'{slot.point.path}' already has a slot: a host can be in one model at a time.\n"
                    "Name all points in one model, or take the slots of the other off first: old_model.detach_slots()."
                )
            if isinstance(host, HostProtocol):
                host.unregister_slot(slot.name)
            module._forward_hooks.pop(key, None)
            if slot.is_active and not slot.is_apart:
                warn_caller(
                    f"The model that held this {type(host).__name__} is gone, and with it the seed in slot "
                    f"'{slot.name}' ({slot.stage.name}): the host computes without it now.",
                    MisuseWarning,
                )


def _parts_of(attributes: Mapping[str, Any]) -> set[str]:
    host = attributes.get("_modules", {}).get("host")
    return set() if host is None else {*host._modules, *host._parameters, *host._buffers}


_SAVES_THE_HOST: Final = {"from_pretrained", "push_to_hub", "save_pretrained"}
_NOT_TAKEN_OVER: Final = _SAVES_THE_HOST | {
    "context_reader",
    "example_inputs",
    "injection_points",
    "register_slot",
    "unregister_slot",
}


def _own_of_host(attributes: Mapping[str, Any], name: str) -> FunctionType | property | None:
    """Return the public method or property of the host's class that works on the model too, if there is one."""
    host = attributes.get("_modules", {}).get("host")
    if host is None or name.startswith("_") or name in _NOT_TAKEN_OVER:
        return None
    found = inspect.getattr_static(type(host), name, None)
    function = found.fget if isinstance(found, property) else getattr(found, "__func__", found)
    if not isinstance(function, FunctionType) or (function.__module__ or "").partition(".")[0] == "torch":
        return None
    return cast("FunctionType | property", found)


_Model = TypeVar("_Model", bound=SlottedModel)


def held_weakly(model: _Model) -> Callable[[], _Model]:
    """Return a function that returns the model, and raises `KasminaError` once the model is gone.

    What a model owns refers back to it in this way: a strong reference would keep its memory until the garbage
    collector runs.
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
    local_metadata[HAS_SLOTS] = True
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
    model = cast("SlottedModel", module)
    model.__dict__["_loading"] = prefix, error_msgs


def _name_as_the_file(module: nn.Module, keys: Any) -> None:
    """Take the prefix that no file has off what is missing, unexpected or does not fit."""
    prefix, messages = module.__dict__.pop("_loading")
    inside = re.compile(rf"(?<![\w.]){re.escape(prefix)}host\.")
    for texts in (keys.missing_keys, keys.unexpected_keys, messages):
        texts[:] = [inside.sub(lambda _: prefix, text, count=1) for text in texts]
