"""A timm or torchvision model with slots."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, final

from kasmina_core import (
    BlueprintRegistry,
    ContextReader,
    GrowthConfig,
    HostError,
    InjectionPoint,
    MorphogeneticModel,
    Telemetry,
)
from torch import Tensor, nn

from kasmina_timm.checkpointing import attach_guard
from kasmina_timm.positions import TimmCall
from kasmina_timm.structure import example_inputs, points


@final
class GrowingModel(MorphogeneticModel):
    """A `MorphogeneticModel` whose host is a timm or torchvision model; made by `grow`.

    It refuses to run where timm's gradient checkpointing was turned on after the slots were attached and would pass
    them by. Everything else is as in its base.

    Args:
        host: The model.
        context: As for `MorphogeneticModel`; ``None`` for `TimmCall`.
        options: Its other options.
    """

    def __init__(
        self, host: nn.Module, *args: Any, context: ContextReader | None = None, **options: Any
    ) -> None:
        super().__init__(host, *args, context=context or TimmCall(), **options)
        self._guards = [attach_guard(host, slot.point.path) for slot in self.slots.values()]

    def detach_slots(self) -> nn.Module:
        """Take the slots off the host and return it as it was; seeds stay behind with this model."""
        for guard in self._guards:
            if guard is not None:
                guard.remove()
        self._guards = []
        return super().detach_slots()


def grow(
    model: nn.Module,
    slots: str | InjectionPoint | Iterable[str | InjectionPoint] | None = None,
    *,
    every: int = 1,
    example: object = None,
    config: GrowthConfig | None = None,
    registry: BlueprintRegistry | None = None,
    telemetry: Telemetry | None = None,
    evaluator: Callable[[], Tensor] | None = None,
    context: ContextReader | None = None,
) -> GrowingModel:
    """Give a timm or torchvision model slots in which seeds can grow.

    The model stays what it is, with its class, keys and methods; the slots hang on the outputs of its stages or blocks.

    Args:
        model: The model, such as one of ``timm.create_model``.
        slots: Where: names or paths of its `points`, paths of modules, globs such as ``"blocks.*.mlp"`` or
            `InjectionPoint` declarations; ``None`` for the model's `points`.
        every: Distance between points where ``slots`` is ``None``: 2 takes every second one.
        example: Inputs for one forward, a tensor or a tuple of arguments, which proves that the slots work; ``None``
            for `example_inputs`.
        config: How seeds are treated.
        registry: Where blueprints come from; ``None`` for the installed packs.
        telemetry: Takes the events.
        evaluator: Returns the loss of every held-out sample, ``(n,)``, for the gates.
        context: Reads what positions mean off each call, for seeds that mix them; ``None`` for `TimmCall`.

    Raises:
        HostError: If points cannot be derived, or a place cannot hold a slot; the model is left as it was.

    >>> from timm.models import ConvNeXt
    >>> grow(ConvNeXt(depths=(1, 1, 1, 1), dims=(4, 8, 8, 16)), every=2).slots
    SlotMap(stages_1: DORMANT, stages_3: DORMANT)
    """
    example = example_inputs(model) if example is None else example
    named: list[str | InjectionPoint]
    if slots is None:
        named = [*points(model, every, example=example)]
    else:
        wanted = [slots] if isinstance(slots, (str, InjectionPoint)) else list(slots)
        named = _named(model, wanted, example)
    return GrowingModel(
        model,
        named,
        example=example,
        config=config,
        registry=registry,
        telemetry=telemetry,
        evaluator=evaluator,
        context=context,
    )


def _named(
    model: nn.Module, wanted: list[str | InjectionPoint], example: object
) -> list[str | InjectionPoint]:
    """Return what was asked for, with names and paths of derived points replaced by these."""
    derived: dict[str, InjectionPoint] = {}
    if any(isinstance(item, str) for item in wanted):
        try:
            found = points(model, example=example)
        except HostError:
            found = []
        derived = {key: point for point in found for key in (point.name, point.path)}
    return [derived.get(item, item) if isinstance(item, str) else item for item in wanted]
