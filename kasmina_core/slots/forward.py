"""The slot's forward: a module that computes a seed in one of a few modes, and knows nothing of stages."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from typing import Self, cast, final

import torch
from torch import Tensor, nn

from kasmina_core.blending import blend_with_isolation, like_host, memory_format_of
from kasmina_core.errors import HostError, SeedShapeError, TransitionError
from kasmina_core.hosts import InjectionPoint
from kasmina_core.isolation import isolated, note_largest, relative_deviation
from kasmina_core.positions import NESTED, WHOLE_SEQUENCES, HostCalls, SeedContext, without_padding
from kasmina_core.quiet import kept_buffers, kept_modes


@final
class ForwardMode(IntEnum):
    """What a slot's forward does; a plain int of these is assigned at each transition."""

    PASS = 0
    STRAIGHT_THROUGH = 1
    BLEND_DETACHED = 2
    BLEND = 3
    SEED = 4
    REPLACE = 5
    MEASURE = 6
    THROUGH = 7
    PART = 8


# Plain ints: a compiled graph guards on a constant, and an Enum member costs a lookup per call.
_PASS, _STRAIGHT_THROUGH, _BLEND_DETACHED, _BLEND, _SEED, _REPLACE, _MEASURE, _THROUGH, _PART = map(
    int, ForwardMode
)


class PartTooSmall(Exception):
    """A batch is too small to be parted; ``seeds`` is for how many it would do."""

    def __init__(self, seeds: int) -> None:
        super().__init__(seeds)
        self.seeds = seeds


@final
@dataclass(slots=True)
class Part:
    """The part of each batch on which a seed's output replaces the host's in the mode PART.

    Attributes:
        index: Which part.
        count: Of how many, which are equal but for one sample.
        least: Samples that a part must have.
        disturbs: Whether the host's features of the other samples are disturbed, to see what depends on them.
        mine: Samples of the part that went through.
        samples: Samples that went through.
    """

    index: int
    count: int
    least: int = 1
    disturbs: bool = False
    mine: int = 0
    samples: int = 0


class Slot(nn.Module):
    """A seed's place in a host, and the modes of its forward.

    ``forward`` reads one integer, ``mode``, and 0-d buffers that change in place: a compiled model needs one graph per
    mode. The buffers have the host's device and ``alpha_buffer`` its dtype; none of them is saved.

    Args:
        point: Where the slot is.
        shape: Shape of the features seen there, in the order of the topology; its batch size is ignored.
        max_deviation: Bound of the straight-through gradient, see `bounded_straight_through`.
        dtype: Floating dtype of the host at this point.
        device: Device of the host at this point.

    Attributes:
        seed: The seed's module, or ``None``.
        takes_context: Whether the seed mixes positions and so is given a `SeedContext` with its features.
        calls: The calls of the host, which say what positions mean.
        mode: The present `ForwardMode`, as an int. THROUGH stands for PASS where there is a slot behind: a hook need not
            call a slot whose mode is PASS.
        behind: The slot behind this one at the same point, or none: it is given what this one returns. Not a child of
            this one, but of the model.
        has_proved_layout: Whether the layout of the point was proved or stated.
        part: The samples that are the seed's in the mode PART.
        turn: Orders for ``permute``, from the host's layout to the topology's and back; ``None`` if they are the same.
        deviation: Largest ``rms(seed - host) / rms(host)`` of the present measurement.
        ran_compiled: Whether a pass of the present measurement ran in a compiled graph.
        training_deviation: Largest deviation since it was last read, of passes in which the seed learned.
        has_training_deviation: Whether there was such a pass.
    """

    alpha_buffer: Tensor
    deviation: Tensor
    ran_compiled: Tensor
    training_deviation: Tensor
    has_training_deviation: Tensor

    def __init__(
        self,
        point: InjectionPoint,
        shape: tuple[int, ...],
        max_deviation: float,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        if len(shape) != point.topology.ndim or shape[point.topology.feature_dim] != point.dim:
            raise SeedShapeError(point.topology.shape(point.dim), shape)
        self.point = point
        self.shape = tuple(shape)
        self.max_deviation = max_deviation
        self.seed: nn.Module | None = None
        self.takes_context = False
        self.calls = HostCalls()
        self.mode: int = _PASS
        self.behind: tuple[Slot, ...] = ()
        self._override: int | None = None
        self.part = Part(0, 1)
        self.has_proved_layout = True
        self.turn: tuple[tuple[int, ...], tuple[int, ...]] | None = None
        if point.axes != point.topology.layout:
            back = tuple(map(point.topology.axes.index, point.axes))
            self.turn = (point.topology.order(point.axes), back)
        for name, kind in (
            ("alpha_buffer", dtype),
            ("deviation", torch.float32),
            ("ran_compiled", torch.bool),
            ("training_deviation", torch.float32),
            ("has_training_deviation", torch.bool),
        ):
            self.register_buffer(name, torch.zeros((), dtype=kind, device=device), persistent=False)

    @property
    def name(self) -> str:
        """Name of the slot: its injection point's."""
        return self.point.name

    @property
    def device(self) -> torch.device:
        """Device of the slot."""
        return self.alpha_buffer.device

    @property
    def alpha(self) -> float:
        """Blend weight in [0, 1], unrounded; 0 as long as nobody blends."""
        return 0.0

    @property
    def natural_mode(self) -> ForwardMode:
        """The forward mode where nobody forces another."""
        return ForwardMode.PASS

    @property
    def is_forced(self) -> bool:
        """Whether somebody runs the slot in another forward mode than its natural one."""
        return self._override is not None

    def seed_parameters(self) -> list[nn.Parameter]:
        """Return the parameters of the seed, each once; empty if there is no seed."""
        return list(self.seed.parameters()) if self.seed is not None else []

    def forward(self, features: Tensor) -> Tensor:
        """Return the features with what the seed does to them in the present mode.

        Args:
            features: The host's, in the layout of the point.

        Raises:
            SeedShapeError: If the seed returns another shape.
            HostError: If the features are a nested tensor, have other axes than when the slot was attached, or come more
                than once in a forward; or if the seed mixes positions and it is not known what they mean.
        """
        if self.mode == _PASS:
            return features
        output = features if self.mode == _THROUGH else self._turned(features)
        for slot in self.behind:
            if slot.is_called:
                output = slot(output)
        return output

    @property
    def is_called(self) -> bool:
        """Whether a call does anything: the slot computes, or somebody listens to it."""
        return self.mode != _PASS or bool(self._forward_hooks or self._forward_pre_hooks)

    def _turned(self, features: Tensor) -> Tensor:
        """Compute the present mode on features in the layout of the point."""
        if features.dim() != len(self.shape):
            axes = ", ".join(self.point.axes)
            raise HostError(
                f"Slot '{self.name}' is given features of another kind than when it was attached.\n"
                f"  attached: ({axes}), width {self.point.dim}\n"
                f"  given:    shape {tuple(features.shape)}\n"
                "Name a submodule whose output always has these axes, or call the host with inputs of one kind."
            )
        self.calls.note_firing(self.name)
        if self.turn is None:
            return self._compute(features)
        there, back = self.turn
        # Views: isolation needs the batch first, and the seed the order of its topology.
        output = self._compute(features.permute(there)).permute(back)
        memory_format = memory_format_of(features)
        return output if memory_format is None else output.contiguous(memory_format=memory_format)

    def _compute(self, features: Tensor) -> Tensor:
        """Compute the present mode on features in the order of the topology."""
        mode = self.mode
        if mode == _SEED:
            return like_host(self._grow(features), features)
        if mode == _STRAIGHT_THROUGH:
            # Detached: a gradient that goes on from the seed would change the host, which trains as if it were alone.
            output = self._grow(features.detach())
            learned, deviation = isolated(features, output, self.max_deviation)
            self._note_training(deviation)
            return learned
        if mode == _BLEND_DETACHED:
            return blend_with_isolation(features, self._grow(features.detach()), self.alpha_buffer)
        if mode == _BLEND:
            return blend_with_isolation(features, self._grow(features), self.alpha_buffer)
        if mode == _PART:
            return self._replace_part(features)
        detached = features.detach()
        replaced = like_host(self._grow(detached), detached)
        found = relative_deviation(detached, replaced)
        if mode == _REPLACE:
            self._note_training(found)
        else:
            note_largest(self.deviation, found)
            if torch.compiler.is_compiling():
                # Of a compiled pass only writes to tensors remain.
                self.ran_compiled.fill_(True)
        return replaced

    def _replace_part(self, features: Tensor) -> Tensor:
        """Return the features with the seed's output in the place of the samples of its part."""
        part, samples = self.part, features.shape[0]
        if samples < part.least * part.count:
            raise PartTooSmall(samples // part.least)
        start, stop = (samples * end // part.count for end in (part.index, part.index + 1))
        mine = features[start:stop].detach()
        context = None
        if self.takes_context:
            context = self.calls.context_at(self.point, features).of_samples(start, stop)
        replaced = like_host(self._grow(mine, context), mine)
        self._note_training(relative_deviation(mine, replaced))
        part.mine, part.samples = part.mine + stop - start, part.samples + samples
        if part.disturbs:
            size = features.detach().square().mean().sqrt().clamp(min=1e-3)
            features = features + size * torch.randn_like(features)
        return torch.cat([features[:start], replaced, features[stop:]])

    def _grow(self, features: Tensor, context: SeedContext | None = None) -> Tensor:
        if features.is_nested:
            raise HostError(NESTED.format(where=f"Slot '{self.name}'"))
        seed = cast("nn.Module", self.seed)
        grown: Tensor
        if self.takes_context:
            context = context or self.calls.context_at(self.point, features)
            grown = seed(features, context)
            return without_padding(self.point, features, context, grown)
        grown = seed(features)
        return grown

    def _note_training(self, deviation: Tensor) -> None:
        if note_largest(self.training_deviation, deviation):
            self.has_training_deviation.fill_(True)

    def isolated_forward(self, features: Tensor) -> Tensor:
        """Compute the straight-through forward, whatever the present mode, on whole sequences; buffers are kept.

        Args:
            features: In the order of the topology, whatever the host's layout.

        Raises:
            TransitionError: If there is no seed.
        """
        if self.seed is None:
            raise TransitionError(f"Slot '{self.name}' holds no seed.")
        with self.forced(ForwardMode.STRAIGHT_THROUGH), kept_buffers(self), kept_modes(self.seed):
            self.seed.eval()
            with self.calls.stated(WHOLE_SEQUENCES):
                return self._compute(features)

    def begin_measurement(self) -> None:
        """Forget the deviation of the measurement before."""
        self.deviation.zero_()
        self.ran_compiled.zero_()

    def forget_training_deviation(self) -> None:
        """Forget the deviation of passes in which the seed learned."""
        self.training_deviation.zero_()
        self.has_training_deviation.zero_()

    @contextmanager
    def blend_weight(self, alpha: float) -> Iterator[None]:
        """Run the block with another blend weight for the forward modes that blend."""
        before = self.alpha_buffer.clone()
        self.alpha_buffer.fill_(alpha)
        try:
            yield
        finally:
            self.alpha_buffer.copy_(before)

    @contextmanager
    def forced(self, mode: ForwardMode) -> Iterator[None]:
        """Run the block in another forward mode; without a seed nothing changes."""
        before = self._override
        self._override = int(mode)
        self.refresh_mode()
        try:
            yield
        finally:
            self._override = before
            self.refresh_mode()

    def refresh_mode(self) -> None:
        """Assign ``mode`` anew: the forced one if there is a seed, else the natural one."""
        mode = int(self.natural_mode) if self._override is None or self.seed is None else self._override
        self.mode = _THROUGH if mode == _PASS and self.behind else mode

    def train(self, mode: bool = True) -> Self:
        """Set training mode; the natural mode may depend on it."""
        super().train(mode)
        self.refresh_mode()
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        was_meta = self.alpha_buffer.is_meta
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch
        # No file holds these buffers. `to_empty` leaves noise in them, and a cast through bf16 a rounded alpha.
        self.alpha_buffer.fill_(self.alpha)
        if was_meta and not self.alpha_buffer.is_meta:
            self.begin_measurement()
            self.forget_training_deviation()
        return self
