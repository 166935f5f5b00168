"""Replay: several passes over the same samples in which the part of the host before a slot runs once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, is_dataclass
from typing import Any, Final, final

import torch
from torch import Tensor, nn

MAX_BYTES: Final = 2**28
"""Bytes of outputs that a tape holds at most (256 MiB); modules beyond that run anew in every pass."""

_PLAIN: Final = (bool, int, float, str, torch.dtype, torch.device, torch.Size)


class _Uncopyable(Exception):
    """A value that cannot be kept for later passes."""


class ReplayDiverged(Exception):
    """A later pass did not call the host as the first one did."""


@final
@dataclass(slots=True)
class _Call:
    """One call of one module in the recording pass."""

    is_recorded: bool = False
    is_inside: bool = False  # of a module that is recorded as a whole
    output: Any = None
    nbytes: int = 0


@final
class ReplayTape:
    """Records what happens before a slot in one pass, and plays it in later ones.

    In the recording pass each module of the host runs as usual. The output of a module that is done before the slot is
    reached is kept; where a whole module is done, what is inside it is not kept besides. In a later pass these modules
    return a copy of what is kept and do not run, so that only the slot and what follows it compute. Hooks on them run
    as always; hooks inside of them do not.

    Both passes must give the host the same inputs, which is checked: `ReplayDiverged` otherwise. A host whose modules
    depend on more than their inputs must be caught by comparing once with a pass without a tape. Nothing of the host
    is changed but ``forward`` of its modules for the time of a pass. Under ``torch.compile`` nothing is recorded.

    Args:
        host: What the evaluator runs.
        slot: The slot: what comes before its first call in a forward of the host is kept.
        max_bytes: Bytes that may be kept.

    Attributes:
        fault: Why nothing can be replayed; empty if it can.
        is_of_other_samples: Whether the first inputs of a later pass were others, which nothing after the slot can explain.
    """

    def __init__(self, host: nn.Module, slot: nn.Module, max_bytes: int = MAX_BYTES) -> None:
        self.fault = ""
        self.is_of_other_samples = False
        self._host = host
        self._slot = slot
        self._free = max_bytes
        self._calls: dict[nn.Module, list[_Call]] = {}
        self._order: list[_Call] = []
        self._inputs: list[Any] = []
        self._depth = 0
        self._is_past_slot = False
        self._next: dict[nn.Module, int] = {}
        self._forwards = 0

    @property
    def most_samples(self) -> int | None:
        """How many samples the host was given at most in the recorded pass, whichever axis they are; ``None`` if unknown."""
        return sum(map(_most_samples, self._inputs)) if len(self._inputs) == self._forwards else None

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Run the block, one pass over the samples, and keep what comes before the slot."""
        with self._in_place_of_forwards(self._record):
            yield
        if not self._forwards and not self.fault:
            self.fault = "no forward of the host was seen: it is compiled, or the evaluator does not run it"
        for calls in self._calls.values():
            calls[:] = [call for call in calls if not call.is_inside]

    @contextmanager
    def replaying(self) -> Iterator[None]:
        """Run the block, another pass over the same samples, without what was kept.

        Raises:
            ReplayDiverged: At its end, if the block failed or did not do the same as the recording one. What it
                computed is then of no use.
        """
        self._next = dict.fromkeys(self._calls, 0)
        before, self._forwards = self._forwards, 0
        try:
            with self._in_place_of_forwards(self._play):
                yield
        except Exception as error:
            # A module that did not run may have filled what a later one reads, as a cache; or the evaluator made another
            # error of a divergence. One that fails by itself does so in the full pass that follows, too.
            self.fault = self.fault or f"a pass from the tape failed with {type(error).__name__}: {error}"
            raise ReplayDiverged(self.fault) from error
        if not self.fault and self._forwards != before:
            self.fault = f"the host ran {self._forwards} times instead of {before}"
        if self.fault:
            raise ReplayDiverged(self.fault)

    @contextmanager
    def _in_place_of_forwards(self, take: Callable[..., Any]) -> Iterator[None]:
        inside_slot = set(self._slot.modules())
        modules = [m for m in self._host.modules() if m not in inside_slot]
        before = [(m, m.__dict__.get("forward")) for m in modules]
        # A hook, not another forward: a slot that passes features on is not called unless somebody listens to it.
        handle = self._slot.register_forward_pre_hook(self._pass_slot)
        try:
            for module in modules:
                if not isinstance(module, torch.jit.ScriptModule):
                    module.__dict__["forward"] = _taking(take, module, module.forward)
            yield
        finally:
            handle.remove()
            self._depth = 0
            for module, own in before:
                if own is not None:
                    module.__dict__["forward"] = own
                else:
                    module.__dict__.pop("forward", None)

    def _pass_slot(self, module: nn.Module, args: Any) -> None:
        if not torch.compiler.is_compiling():
            self._is_past_slot = True

    def _record(self, module: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if module is self._host:
            self._enter(args, kwargs)
        elif self._depth == 0:
            self.fault = (
                self.fault or f"the evaluator runs {type(module).__name__} outside of the host's forward"
            )
        call = _Call()
        self._calls.setdefault(module, []).append(call)
        start = len(self._order)
        self._order.append(call)
        self._depth += 1
        try:
            output = forward(*args, **kwargs)
        finally:
            self._depth -= 1
        if module is self._host and not self._is_past_slot:
            self.fault = self.fault or "a forward of the host did not reach the slot"
        if not self._is_past_slot and not self.fault:
            self._keep(call, output, start)
        return output

    def _enter(self, args: Any, kwargs: Any) -> None:
        self._is_past_slot = False
        self._forwards += 1
        if self._depth:
            self.fault = self.fault or "the host calls itself"
        try:
            self._inputs.append(_copied((args, kwargs)))
        except _Uncopyable as error:
            self.fault = self.fault or f"the host is given {error}"

    def _keep(self, call: _Call, output: Any, start: int) -> None:
        inner = self._order[start + 1 :]
        freed = sum(other.nbytes for other in inner)
        size = _nbytes(output)
        if size > self._free + freed:
            return
        try:
            call.output = _copied(output)
        except _Uncopyable:
            return
        call.is_recorded, call.nbytes = True, size
        self._free += freed - size
        for other in inner:
            other.is_inside, other.output = True, None
        del self._order[start + 1 :]

    def _play(self, module: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if module is self._host:
            self._is_past_slot = False
            if self._forwards >= len(self._inputs) or not _same(self._inputs[self._forwards], (args, kwargs)):
                self.is_of_other_samples = self._forwards == 0
                self._diverge("the host was given other inputs than in the first pass")
            self._forwards += 1
        at = self._next.get(module, 0)
        calls = self._calls.get(module, ())
        if at >= len(calls):
            self._diverge(f"{type(module).__name__} was called more often than in the first pass")
        self._next[module] = at + 1
        call = calls[at]
        return _copied(call.output) if call.is_recorded else forward(*args, **kwargs)

    def _diverge(self, why: str) -> None:
        self.fault = self.fault or why  # an evaluator may swallow the exception
        raise ReplayDiverged(self.fault)


def _taking(take: Callable[..., Any], module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
    def taken(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():  # a trace must not hold the tape
            return forward(*args, **kwargs)
        return take(module, forward, args, kwargs)

    return taken


def _copied(value: Any) -> Any:
    """Return a copy of what goes into or comes out of a module.

    Raises:
        _Uncopyable: If it holds anything but plain tensors without gradient, plain data, and containers of them.
    """
    if value is None or type(value) in _PLAIN:
        return value
    if type(value) is Tensor:
        if value.requires_grad:
            raise _Uncopyable("a tensor that requires a gradient")
        return value.clone()
    if type(value) in (tuple, list):
        return type(value)(map(_copied, value))
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(_copied, value))
    if type(value) is dict:
        return {key: _copied(item) for key, item in value.items()}
    if is_dataclass(value) and isinstance(value, dict):  # the outputs of transformers
        return type(value)(**{key: _copied(item) for key, item in value.items()})
    raise _Uncopyable(f"a {type(value).__name__}")


def _nbytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, Mapping):
        value = list(value.values())
    return sum(map(_nbytes, value)) if isinstance(value, (tuple, list)) else 0


def _most_samples(value: Any) -> int:
    if isinstance(value, Tensor):
        return max(value.shape[:2], default=1)
    if isinstance(value, Mapping):
        value = list(value.values())
    return sum(map(_most_samples, value)) if isinstance(value, (tuple, list)) else 0


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        is_like = isinstance(b, Tensor) and (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)
        return is_like and (torch.equal(a, b) or bool(((a == b) | (a.isnan() & b.isnan())).all()))
    if isinstance(a, Mapping):
        return isinstance(b, Mapping) and list(a) == list(b) and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, (tuple, list)):
        return isinstance(b, (tuple, list)) and len(a) == len(b) and all(map(_same, a, b))
    return bool(type(a) is type(b) and a == b)
