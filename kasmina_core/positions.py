"""What the positions of a sequence mean to a seed that mixes them, and the way there from the host's call."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Final, Protocol, cast, final
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from kasmina_core.errors import HostError
from kasmina_core.hosts import InjectionPoint
from kasmina_core.outputs import split_path

NO_READER: Final = (
    "it mixes positions, and nobody says which are padding, which belong together and which are cached. Make the model "
    "with context=EveryPosition() if the host knows no padding, no packed documents and no cache: "
    "MorphogeneticModel(host, ..., context=EveryPosition()). Else give it a reader of the host's calls, or use a seed "
    "that treats each position by itself"
)
"""Why a seed that mixes positions is refused in a model without a `ContextReader`."""

NESTED: Final = (
    "{where} would be given a nested tensor: in evaluation torch's encoder packs padded sequences into one. Leave them as "
    "they are: nn.TransformerEncoder(..., enable_nested_tensor=False), or encoder.use_nested_tensor = False for one that is "
    "made already, such as the encoder of nn.Transformer."
)

_METADATA: Final = "kasmina_host_call"


@final
@dataclass(frozen=True, slots=True, eq=False)
class SeedContext:
    """What a seed that mixes positions must know of the features ``(b, t, d)`` that it is given.

    In another topology ``t`` is the size of the axis `Topology.sequence_axis`; where that is not 1, give it to `visible` and
    `with_past` as ``dim``. With a cache the features are those of the ``t`` new positions, and ``past`` positions came
    before: ``real`` and ``documents`` are of all ``past + t``.

    Attributes:
        real: Which positions are no padding, ``(b, past + t)``, bool; ``None`` if all are real.
        documents: Which document each position belongs to, ``(b, past + t)``, whole numbers; ``None`` if each row is
            one document. No position may learn of another document.
        causal: Whether this call of the host is causal. An injection point that is causal always is.
        past: How many positions are cached.
        store: What a seed keeps of the cached positions, by name; ``None`` if there is no cache. See `with_past`.

    >>> context = SeedContext(real=torch.tensor([[True, True, False]]))
    >>> context.visible(torch.zeros(1, 3, 8))[0, 0].int().tolist()
    [[1, 1, 0], [1, 1, 0], [1, 1, 1]]
    """

    real: Tensor | None = None
    documents: Tensor | None = None
    causal: bool = False
    past: int = 0
    store: MutableMapping[str, Any] | None = None

    def of_samples(self, start: int, stop: int) -> SeedContext:
        """Return the context of some samples of the batch.

        Raises:
            HostError: If there is a cache, which is of the whole batch.
        """
        if self.store is not None:
            raise HostError("A cache is of the whole batch: a part of it cannot be taken.")
        return dataclasses.replace(
            self,
            real=None if self.real is None else self.real[start:stop],
            documents=None if self.documents is None else self.documents[start:stop],
        )

    def visible(self, features: Tensor, *, causal: bool = False, dim: int = 1) -> Tensor | None:
        """Return which positions each position may look at, for ``scaled_dot_product_attention``.

        A position of padding may look at itself too, so that no row of a softmax is empty.

        Args:
            features: The new positions, ``(b, t, d)`` or with ``t`` on another axis.
            causal: Whether the seed is causal.
            dim: The axis of ``features`` that holds the positions: ``sequence_axis`` of the seed's topology.

        Returns:
            Bool ``(b or 1, 1, t, past + t)``, True where it may; ``None`` if nothing but ``causal`` limits it.
        """
        if self.real is None and self.documents is None and not self.past and causal >= self.causal:
            return None
        whole = self.past + features.shape[dim]
        there = torch.arange(whole, device=features.device)[None, :]
        here = there[:, self.past :].mT  # (t, 1)
        seen = (there <= here if causal or self.causal else there == there)[None]  # (1, t or 1, past + t)
        if self.documents is not None:
            seen = seen & (self.documents[:, self.past :, None] == self.documents[:, None, :])
        if self.real is not None:
            seen = seen & self.real[:, None, :]
        return (seen | (there == here)).unsqueeze(1)

    def with_past(self, name: str, new: Tensor, *, dim: int = 1) -> Tensor:
        """Return a tensor of the new positions behind that of the cached ones, and keep both for the next call.

        Args:
            name: What it is, such as ``"keys"``; a name of the seed's own.
            new: Of the ``t`` new positions, of any shape.
            dim: The axis of ``new`` that holds the positions: 2 for keys ``(b, heads, t, d)``.

        Returns:
            Of all ``past + t`` positions; ``new`` itself without a cache.

        Raises:
            HostError: If the seed did not see the cached positions: it was not there, or did not run.
        """
        if self.store is None:
            return new
        kept, whole = self.store.get(name), new
        if self.past:
            known = 0 if kept is None else kept.shape[dim]
            if kept is None or known < self.past:
                raise HostError(
                    "The host's cache holds positions that this seed has not seen.\n"
                    f"  cached: {self.past}\n  seen:   {known}\n"
                    "Begin with an empty cache after a seed came, or was bypassed."
                )
            # A cache that was cropped keeps its first positions.
            whole = torch.cat([kept.narrow(dim, 0, self.past), new], dim)
        self.store[name] = whole
        return whole

    def part(self, name: str) -> SeedContext:
        """Return the context for a part of what it is given to, with cached names of its own.

        A seed of several layers that keep ``"keys"`` gives each ``context.part("layer0")``, ``"layer1"`` and so on.
        """
        return self if self.store is None else replace(self, store=self.store.setdefault(name, {}))

    @classmethod
    def from_allowed(cls, allowed: Tensor) -> SeedContext:
        """Read a matrix of who may look at whom.

        Args:
            allowed: Bool ``(b, t, t)``, True where row ``i`` may look at column ``j``.

        Raises:
            HostError: If the matrix is no combination of padding, documents in a row and causality.
        """
        if torch.compiler.is_compiling():
            raise HostError("A matrix of attention cannot be read in a compiled graph: give a mask (b, t).")
        real = allowed.diagonal(dim1=1, dim2=2)
        documents = allowed.int().argmax(-1)  # the first position that one may look at
        rows = real[:, :, None]
        same = rows & real[:, None, :] & (documents[:, :, None] == documents[:, None, :])
        for causal in (True, False):
            if torch.equal((same.tril() if causal else same) & rows, allowed & rows):
                return cls(
                    None if bool(real.all()) else real,
                    documents if bool((same.any(-1) & (documents != documents[:, :1])).any()) else None,
                    causal,
                )
        raise HostError(
            "This attention mask is no combination of padding, documents and causality, so a seed that mixes positions "
            "cannot follow it. Use a seed that treats each position by itself, or give a mask (b, t)."
        )

    def demand_fit(self, features: Tensor, dim: int, where: str) -> None:
        """Demand that the tensors are of these features, whose axis of positions is ``dim``.

        Raises:
            HostError: If not.
        """
        expected = (features.shape[0], self.past + features.shape[dim])
        for name, tensor in (("real", self.real), ("documents", self.documents)):
            if tensor is not None and tuple(tensor.shape) != expected:
                cached = f", {self.past} cached" if self.past else ""
                raise HostError(
                    f"What the reader says of positions does not fit the features in {where}.\n"
                    f"  {name}: {tuple(tensor.shape)}\n  features: {tuple(features.shape)}{cached}\n"
                    f"The mask must be {expected}, one entry for each position there. If the host shortens or pads sequences "
                    "itself, give inputs of a length that it keeps, leave the mask out, or make the model with a reader of "
                    "your own, context=reader, that returns the mask as it is there."
                )


WHOLE_SEQUENCES: Final = SeedContext()
"""The context in which every position is real, each row is one document, and nothing is cached."""

Contexts = SeedContext | Mapping[str, SeedContext]
"""One context for every slot, or several by the path of the module that they are for."""


class ContextReader(Protocol):
    """Says what the positions mean in one call of the host.

    It may have an attribute ``module``, the path of the submodule whose call is to be read instead of the host's; it
    then says nothing about slots elsewhere. A method ``ended(context, output)``, which is called with what it
    returned and what the host did, to tie a store to a cache. And a method ``entries(host)``, which returns the paths of
    submodules that are called outside of the host's forward too, as ``generate`` calls an encoder: such a call is read
    with the submodule in the place of the host.
    """

    def __call__(
        self, host: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> SeedContext | Mapping[str, SeedContext]:
        """Return the context of a call, or of each part of the host by its path.

        Args:
            host: The module that is called.
            args: Its positional arguments; `call_arguments` gives them names.
            kwargs: Its keyword arguments.

        Raises:
            HostError: If seeds could not be told rightly what the positions mean.
        """
        ...


@final
class HostCall:
    """One call of a host, with what it says of positions."""

    def __init__(self, contexts: Contexts) -> None:
        self.contexts = contexts

    def of(self, path: str) -> SeedContext | None:
        """Return the context for the module at a path: that of the nearest module around it."""
        if isinstance(self.contexts, SeedContext):
            return self.contexts
        parts = split_path(path)[0].split(".")
        for n in range(len(parts), -1, -1):
            if (found := self.contexts.get(".".join(parts[:n]))) is not None:
                return found
        return None


class _Here(threading.local):
    def __init__(self) -> None:
        # Not attributes of the class: a compiled graph guards on whether the thread has some of its own.
        self.call: HostCall | None = None
        self.is_entry = False
        self.fired: tuple[str, ...] | None = None


@final
class HostCalls:
    """The calls of one host that go on, at most one per thread: what they say of positions, and which slots fired.

    Args:
        reader: Reads a call; ``None`` if nobody can.
    """

    def __init__(self, reader: ContextReader | None = None) -> None:
        self.reader = reader
        self._here = _Here()
        self._differentiable: WeakSet[HostCall] = WeakSet()

    def __getstate__(self) -> dict[str, Any]:
        return {"reader": self.reader}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["reader"])

    def begin(self, host: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Read a call of the host that begins in this thread."""
        self._here.call = None
        if self.reader is not None:
            self._here.call = HostCall(self.reader(host, args, kwargs))

    def end(self, output: object = None) -> None:
        """Forget the call of this thread; a backward of its output finds it again."""
        call = self._here.call
        if call is None:
            return
        self._here.call = None
        if output is not None and callable(ended := getattr(self.reader, "ended", None)):
            ended(call.contexts, output)
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return
        for tensor in _tensors_in(output):
            if tensor.grad_fn is not None:
                # The graph keeps the call, so that gradient checkpointing runs the seed again with its context.
                cast("dict[str, Any]", tensor.grad_fn.metadata)[_METADATA] = call
                self._differentiable.add(call)

    def enter(self, part: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Read a call of a part of the host, unless it is in a call of the host, or runs again in a backward."""
        again = not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
        if self._here.call is None and not again:
            self.begin(part, args, kwargs)
            self._here.is_entry = True

    def leave(self, output: object = None) -> None:
        """Forget the call of a part, if it was read."""
        if self._here.is_entry:
            self._here.is_entry = False
            self.end(output)

    def begin_forward(self) -> None:
        """Begin a forward of this thread in which each slot may fire once."""
        self._here.fired = ()

    def end_forward(self) -> None:
        """End it."""
        self._here.fired = None

    def note_firing(self, slot: str) -> None:
        """Note that a slot computes its seed.

        Raises:
            HostError: If it did before in the same forward.
        """
        fired = self._here.fired
        if fired is None:
            return
        if slot not in fired:
            self._here.fired = (*fired, slot)
        # In a backward within the forward, gradient checkpointing may run a module again.
        elif torch.compiler.is_compiling() or torch._C._current_graph_task_id() == -1:
            raise HostError(
                f"The module of slot '{slot}' is called more than once in this forward, and was called once when slots were "
                "attached: the gates measure a seed that computes once per forward.\n"
                "Name a module around it that is called once, or give each call a module of its own; "
                f"model.cull('{slot}') takes the seed out."
            )

    @contextmanager
    def stated(self, context: SeedContext) -> Iterator[None]:
        """Run the block as if the host were called with this context."""
        before, self._here.call = self._here.call, HostCall(context)
        try:
            yield
        finally:
            self._here.call = before

    def context_at(self, point: InjectionPoint, features: Tensor) -> SeedContext:
        """Return the context for the features at a point.

        Raises:
            HostError: If the host is not being called, or its call says nothing, or something else, of them.
        """
        where = f"slot '{point.name}'"
        call = self._here.call
        if call is None:
            call = self._recomputed(where)
        context = call.of(point.path)
        if context is None:
            raise HostError(
                f"The reader says nothing of the positions in {where}, at '{point.path}', where a seed mixes them.\n"
                "Make the model with a reader that returns a context for that part of the host, context=reader, or use a seed "
                "that treats each position by itself."
            )
        context.demand_fit(features, sequence_axis(point), where)
        if context.past and not (point.causal or context.causal):
            raise HostError(
                f"A cache holds positions that could not look at those after them, and {where} is not causal.\n"
                "Call the host without a cache."
            )
        return context.part(point.name)

    def _recomputed(self, where: str) -> HostCall:
        """Return the call to which a module belongs that runs again in a backward."""
        if torch.compiler.is_compiling() or torch._C._current_graph_task_id() == -1:
            raise HostError(
                f"The seed in {where} mixes positions, and what they mean is read from the host's call: call the model, "
                "not a part of it."
            )
        calls = list(self._differentiable)
        if not calls:
            raise HostError(
                f"The seed in {where} runs again in a backward, and the call that it belongs to is not known: the "
                "host's output holds no tensor with a gradient."
            )
        if not all(_same(calls[0].contexts, call.contexts) for call in calls[1:]):
            raise HostError(
                f"The seed in {where} runs again in a backward (gradient checkpointing), and {len(calls)} forwards with "
                "different masks wait for theirs. Call backward after each forward, and keep no output of an earlier one "
                "(detach it)."
            )
        return calls[0]


@final
class CallBegins:
    """A forward pre-hook of a host that reads its call if a slot's seed asks for it.

    Args:
        calls: The host's calls.
        slots: The slots (`kasmina_core.slots.forward.Slot`) in the host.
        is_entry: Whether it is the hook of a part that is called outside of the host's forward too.
    """

    def __init__(self, calls: HostCalls, slots: Sequence[Any], is_entry: bool = False) -> None:
        self.calls = calls
        self.slots = slots
        self.is_entry = is_entry

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        for slot in self.slots:
            if slot.takes_context and slot.mode:
                if self.is_entry:
                    self.calls.enter(module, args, kwargs)
                else:
                    self.calls.begin(module, args, kwargs)
                return


@final
class CallEnds:
    """A forward hook of a host that forgets its call. Its arguments are those of `CallBegins`."""

    def __init__(self, calls: HostCalls, slots: Sequence[Any], is_entry: bool = False) -> None:
        self.calls = calls
        self.slots = slots
        self.is_entry = is_entry

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if self.is_entry:
            self.calls.leave(output)
        else:
            self.calls.end(output)


def read_calls(calls: HostCalls, host: nn.Module, slots: Sequence[Any]) -> list[RemovableHandle]:
    """Have the calls of a host read, and those of its parts that come without one, and return the hooks' handles.

    Args:
        calls: Those of the host, with a reader.
        host: The host.
        slots: The slots in it.
    """
    entries = getattr(calls.reader, "entries", None)
    paths = [getattr(calls.reader, "module", ""), *(entries(host) if callable(entries) else ())]
    handles: list[RemovableHandle] = []
    for i, path in enumerate(paths):
        module = host.get_submodule(path)
        begins, ends = CallBegins(calls, slots, i > 0), CallEnds(calls, slots, i > 0)
        handles.append(module.register_forward_pre_hook(begins, with_kwargs=True))
        handles.append(module.register_forward_hook(ends, always_call=True))
    return handles


@final
class _Standing:
    """Stands for the slot of a seed that is a part of its host."""

    takes_context = True
    mode = 1


@final
class _GivesContext:
    """A forward pre-hook of such a seed, which hands it the context."""

    def __init__(self, calls: HostCalls, point: InjectionPoint) -> None:
        self.calls = calls
        self.point = point

    def __call__(self, module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor, SeedContext]:
        return args[0], self.calls.context_at(self.point, args[0])


@final
class _KeepsPadding:
    """A forward hook of such a seed, after which positions of padding have their features."""

    def __init__(self, point: InjectionPoint) -> None:
        self.point = point

    def __call__(self, module: nn.Module, args: tuple[Tensor, SeedContext], output: Tensor) -> Tensor:
        return without_padding(self.point, *args, output)


def follow_calls(host: nn.Module, reader: ContextReader, seeds: Mapping[nn.Module, InjectionPoint]) -> None:
    """Give seeds that are parts of a host, without slots, the contexts of its calls, by hooks.

    Args:
        host: The host.
        reader: Reads its calls.
        seeds: The seeds that mix positions, each with the point at which it is.
    """
    calls = HostCalls(reader)
    read_calls(calls, host, [_Standing()])
    for seed, point in seeds.items():
        seed.register_forward_pre_hook(_GivesContext(calls, point))
        seed.register_forward_hook(_KeepsPadding(point))


def without_padding(point: InjectionPoint, features: Tensor, context: SeedContext, grown: Tensor) -> Tensor:
    """Return what a seed made of the features at a point, and the features where there is padding."""
    if context.real is None or grown.shape != features.shape:
        return grown
    real, axis = context.real[:, context.past :], sequence_axis(point)
    shape = [size if i in (0, axis) else 1 for i, size in enumerate(features.shape)]
    return torch.where(real.view(shape), grown, features)


def sequence_axis(point: InjectionPoint) -> int:
    """Return the axis of the positions that a seed at a point mixes."""
    return cast("int", point.topology.sequence_axis)


def _tensors_in(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors_in(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors_in(item)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from _tensors_in(getattr(value, field.name))


def _same(a: Contexts, b: Contexts) -> bool:
    if isinstance(a, SeedContext):
        if not isinstance(b, SeedContext) or (a.causal, a.past) != (b.causal, b.past):
            return False
        pairs = ((a.real, b.real), (a.documents, b.documents))
        return all(x is y or (x is not None and y is not None and torch.equal(x, y)) for x, y in pairs)
    return isinstance(b, Mapping) and a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
