"""Topologies: what the axes of features mean. One row each; packs add rows."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Final, final
from weakref import WeakSet

from kasmina_core.errors import NameConflictError, TopologyError, did_you_mean

_VALUE: Final = re.compile(r"[a-z][a-z0-9]*([_-][a-z0-9]+)*")


class _Members(type):
    """Lets the class be iterated: ``for topology in Topology``."""

    def __iter__(cls) -> Iterator[Topology]:
        return iter(list(_KNOWN.values()))


@final
class Topology(metaclass=_Members):
    """What the axes of the features at an injection point mean; seeds see them in this order, batch first.

    - ``CNN``: ``(b, c, h, w)``, the width is ``c``.
    - ``TRANSFORMER``: ``(b, t, d)``, the width is ``d``; positions along ``t``.
    - ``VECTOR``: ``(b, d)``, the width is ``d``.
    - ``SIGNAL``: ``(b, c, t)``, the width is ``c``; time along ``t``.
    - ``VOLUME``: ``(b, c, d, h, w)``, the width is ``c``.

    ``Topology(name)`` looks a member up, ``for topology in Topology`` lists them, and `declare` makes one for a pack.
    There is one object per row, which copies and pickles keep: compare with ``is``.

    Attributes:
        value: The name.
        axes: One letter per axis; ``b`` is the batch and comes first.
        width: The letter of the width.
        memory_formats: Names of ``torch.memory_format`` in which hosts hold such features, besides the contiguous one.
        detach_input_in_blending: Whether a seed's input is detached while it blends in, unless
            ``GrowthConfig.gradient_policies`` says otherwise.

    Raises:
        TopologyError: If there is none of that name; the message lists those there are.

    >>> Topology("cnn")
    <Topology.CNN: 'cnn'>
    >>> Topology.SIGNAL.axes, Topology.SIGNAL.width, str(Topology.SIGNAL)
    (('b', 'c', 't'), 'c', '(b, c, t)')
    """

    __slots__ = (
        "_causal",
        "_examples",
        "_sequence",
        "axes",
        "detach_input_in_blending",
        "memory_formats",
        "value",
        "width",
    )

    CNN: ClassVar[Topology]
    TRANSFORMER: ClassVar[Topology]
    VECTOR: ClassVar[Topology]
    SIGNAL: ClassVar[Topology]
    VOLUME: ClassVar[Topology]

    value: str
    axes: tuple[str, ...]
    width: str
    memory_formats: tuple[str, ...]
    detach_input_in_blending: bool
    _sequence: str
    _causal: str
    _examples: tuple[tuple[int, ...], ...]

    def __new__(cls, value: object) -> Topology:
        """Return the member of that name."""
        if isinstance(value, Topology):
            return value
        if isinstance(value, str) and (found := _KNOWN.get(value.lower())) is not None:
            return found
        raise TopologyError(
            f"{value!r} is not a topology.{did_you_mean(str(value), _KNOWN)} Valid: {', '.join(_KNOWN)}. "
            "A pack can add others: a name is known once its pack is loaded (kasmina plugins list)."
        )

    @classmethod
    def declare(
        cls,
        value: str,
        axes: Sequence[str],
        *,
        width: str,
        sequence: str = "",
        causal: str = "",
        examples: Sequence[Sequence[int]] = (),
        memory_formats: Sequence[str] = (),
        detach_input_in_blending: bool = True,
    ) -> Topology:
        """Return a topology for a pack, which returns it from ``kasmina_topologies``; loading the pack adds its name.

        Args:
            value: Its name: lower case letters, digits, ``_`` and ``-``.
            axes: One lower case letter per axis, the batch ``b`` first, as ``"bnft"``. Not more than one batch.
            width: The axis that blueprints are built for, as ``"f"``: ``InjectionPoint.dim`` long.
            sequence: The axis whose positions may be padding, belong to documents or be cached; empty for none.
            causal: The axis along which a host may be causal; empty for none.
            examples: Sizes of features that the checks of blueprints try, each the batch and the axes other than the
                width, in order. Several positions along each axis for a start, a single sample next; the last is tried
                in eval mode. The default does so.
            memory_formats: See the class.
            detach_input_in_blending: See the class.

        Raises:
            TopologyError: If a row cannot be used; the message says what is wrong with it.

        >>> Topology.declare("spectrum", "bfnt", width="f").feature_dim
        1
        """
        letters, positions = tuple(axes), len(axes) - 2
        sizes = tuple(map(tuple, examples)) or _examples(positions)
        row = (value, letters, width, sequence, causal, sizes, tuple(memory_formats))
        if problem := _problem(*row):
            raise TopologyError(f"Topology {value!r}: {problem}")
        return _of_row(*row, detach_input_in_blending)

    @property
    def layout(self) -> str:
        """The letters of the axes, joined: ``"bchw"``."""
        return "".join(self.axes)

    @property
    def ndim(self) -> int:
        """Number of dimensions of a feature tensor."""
        return len(self.axes)

    @property
    def feature_dim(self) -> int:
        """Index of the width in a feature tensor: 1 for ``(b, c, h, w)``; -1 where it is the last axis."""
        index = self.axes.index(self.width)
        return -1 if index == self.ndim - 1 else index

    @property
    def sequence_axis(self) -> int | None:
        """Index of the axis whose positions may be padding, belong to documents or be cached; ``None`` for none."""
        return self.axes.index(self._sequence) if self._sequence else None

    @property
    def causal_axis(self) -> int | None:
        """Index of the axis along which a host may be causal; ``None`` for none."""
        return self.axes.index(self._causal) if self._causal else None

    @property
    def can_be_causal(self) -> bool:
        """Whether a host may be causal along an axis."""
        return bool(self._causal)

    def shape(self, dim: int, batch: int = 1, sizes: Sequence[int] = ()) -> tuple[int, ...]:
        """Return the shape of features of width ``dim``.

        Args:
            dim: The width.
            batch: Number of samples.
            sizes: Sizes of the axes besides batch and width, in order; default 1 each.

        >>> Topology.CNN.shape(8, 2, (5, 7))
        (2, 8, 5, 7)
        """
        left = iter(sizes or (1,) * (self.ndim - 2))
        return (batch, *(dim if axis == self.width else next(left) for axis in self.axes[1:]))

    def example_shapes(self, dim: int) -> list[tuple[int, ...]]:
        """Return shapes of features of width ``dim`` that a blueprint must take; the last one in eval mode.

        >>> Topology.TRANSFORMER.example_shapes(8)
        [(2, 16, 8), (1, 7, 8), (3, 1, 8)]
        """
        return [self.shape(dim, sizes[0], sizes[1:]) for sizes in self._examples]

    def order(self, layout: str) -> tuple[int, ...]:
        """Return the order for ``permute`` that brings features held as ``layout`` into the topology's own.

        Raises:
            TopologyError: If ``layout`` does not consist of the topology's axes.

        >>> Topology.CNN.order("bhwc")
        (0, 3, 1, 2)
        """
        if sorted(layout) != sorted(self.axes):
            raise TopologyError(
                f"{layout!r} is not a layout of {self.value}: give each of its axes once, as {self.layout!r}, in the order "
                "in which the host holds them."
            )
        return tuple(layout.index(axis) for axis in self.axes)

    def __reduce__(self) -> tuple[Any, ...]:
        # By row, not by name: a copy is the same object, also where the pack that adds the name is not loaded.
        row = (self.value, self.axes, self.width, self._sequence, self._causal, self._examples)
        return _of_row, (*row, self.memory_formats, self.detach_input_in_blending)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"A topology cannot be changed: {self.value}.{name}.")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"A topology cannot be changed: {self.value}.{name}.")

    def __str__(self) -> str:
        return f"({', '.join(self.axes)})"

    def __repr__(self) -> str:
        return f"<Topology.{self.value.upper()}: {self.value!r}>"


_ROWS: Final[dict[tuple[Any, ...], Topology]] = {}
_KNOWN: Final[dict[str, Topology]] = {}

_HOLDERS: Final[dict[str, WeakSet[Any]]] = {}


def admit(topology: Topology, holder: object) -> None:
    """Make a topology known by its name, for as long as something holds it.

    Args:
        topology: The topology.
        holder: What needs it, such as the declarations of a pack. It is not kept alive; ``str(holder)`` is for messages.

    Raises:
        NameConflictError: If another topology has the name, and something holds that; the message names both holders.
    """
    known, holders = _KNOWN.get(topology.value), _HOLDERS.setdefault(topology.value, WeakSet())
    if known is not None and known is not topology and (known in _BUNDLED or holders):
        raise NameConflictError(
            f"2 topologies are named '{topology.value}':\n"
            f"  {known}, {'bundled with kasmina' if known in _BUNDLED else ', '.join(sorted(map(str, holders)))}\n"
            f"  {topology}, {holder}\nRename one, or let one pack import that of the other."
        )
    if known is not topology:
        holders.clear()
        _KNOWN[topology.value] = topology
    holders.add(holder)


def withdraw(topology: Topology, holder: object) -> None:
    """Undo `admit`: a name that nothing holds is forgotten, unless it is a bundled one."""
    holders = _HOLDERS.get(topology.value, WeakSet())
    holders.discard(holder)
    if not holders and topology not in _BUNDLED and _KNOWN.get(topology.value) is topology:
        del _KNOWN[topology.value]


def _of_row(*row: Any) -> Topology:
    """Return the one object of a row; a row that is new is not known by name."""
    if (known := _ROWS.get(row)) is not None:
        return known
    made: Topology = object.__new__(Topology)
    names = ("value", "axes", "width", "_sequence", "_causal", "_examples")
    for name, part in zip((*names, "memory_formats", "detach_input_in_blending"), row, strict=True):
        object.__setattr__(made, name, part)
    return _ROWS.setdefault(row, made)


def _examples(positions: int) -> tuple[tuple[int, ...], ...]:
    """Return sizes for so many axes besides batch and width, at least two values per feature where modules train."""
    if positions == 0:
        return ((4,), (2,), (1,))
    several, some = (
        [(6, 5, 4)[i % 3] for i in range(positions)],
        [(5, 3, 2)[i % 3] for i in range(positions)],
    )
    return ((2, *several), (1, *some), (3, *[1] * positions))


def _problem(
    value: str,
    axes: tuple[str, ...],
    width: str,
    sequence: str,
    causal: str,
    examples: tuple[tuple[int, ...], ...],
    memory_formats: tuple[str, ...],
) -> str:
    """Return what is wrong with a row, or an empty text."""
    if not isinstance(value, str) or not _VALUE.fullmatch(value):
        return "its name must be of lower case letters, digits, '_' and '-', a letter first."
    letters = all(isinstance(axis, str) and len(axis) == 1 and "a" <= axis <= "z" for axis in axes)
    if not letters or len(set(axes)) < len(axes) or len(axes) < 2 or axes[0] != "b":
        return f"axes must be different lower case letters, 'b' for the batch first, as 'bchw', not {axes!r}."
    for name, axis in (("width", width), ("sequence", sequence), ("causal", causal)):
        if axis not in (axes[1:] if name == "width" else ("", *axes[1:])):
            return f"{name} must be one of its axes {', '.join(axes[1:])}, not {axis!r}."
    if width in (sequence, causal):
        return f"the width {width!r} has no positions: it cannot be the axis of a sequence, nor a causal one."
    sizes = all(
        len(each) == len(axes) - 1 and all(type(size) is int and size > 0 for size in each)
        for each in examples
    )
    if not sizes or len(examples) < 2:
        others = ", ".join(axis for axis in axes if axis != width)
        return f"examples must be two or more, each with the sizes of {others}, not {examples!r}."
    if any(not isinstance(name, str) for name in memory_formats):
        return f"memory_formats must be names, as 'channels_last', not {memory_formats!r}."
    return ""


Topology.CNN = Topology.declare(
    "cnn",
    "bchw",
    width="c",
    examples=((2, 8, 8), (1, 7, 5), (3, 5, 6)),
    memory_formats=("channels_last",),
)
Topology.TRANSFORMER = Topology.declare(
    "transformer",
    "btd",
    width="d",
    sequence="t",
    causal="t",
    examples=((2, 16), (1, 7), (3, 1)),
    detach_input_in_blending=False,
)
Topology.VECTOR = Topology.declare("vector", "bd", width="d")
Topology.SIGNAL = Topology.declare("signal", "bct", width="c", causal="t", examples=((2, 16), (1, 7), (3, 5)))
Topology.VOLUME = Topology.declare("volume", "bcdhw", width="c", memory_formats=("channels_last_3d",))

_BUNDLED: Final = (Topology.CNN, Topology.TRANSFORMER, Topology.VECTOR, Topology.SIGNAL, Topology.VOLUME)
for _topology in _BUNDLED:
    _KNOWN[_topology.value] = _topology
