"""Compiling a model in both ways, and counting the graphs of a life."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from kasmina_core import MorphogeneticModel, SeedStage


def compiled_outside(
    model: MorphogeneticModel, backend: Callable[..., object] | str
) -> Callable[..., Tensor]:
    return torch.compile(model, fullgraph=True, backend=backend)


def compiled_in_place(
    model: MorphogeneticModel, backend: Callable[..., object] | str
) -> Callable[..., Tensor]:
    model.compile(fullgraph=True, backend=backend)
    return model


def graphs_per_stage(
    model: MorphogeneticModel, call: Callable[[], Tensor], counter: CompileCounter, slot: str, blueprint: str
) -> dict[str, int]:
    """Walk a slot through a whole life, calling the model several times a stage; graphs compiled by stage."""
    place, counts, last = model.slots[slot], {}, counter.frame_count

    def note(stage: str) -> None:
        nonlocal last
        for _ in range(2):
            call().sum().backward()
        counts[stage], last = counter.frame_count - last, counter.frame_count

    note("DORMANT")
    model.germinate(slot, blueprint)
    note("GERMINATED")
    model.advance_stage(slot)
    note("TRAINING")
    model.advance_stage(slot)
    note("BLENDING at 0")
    place.set_alpha(0.1)
    note("BLENDING")
    for alpha in (0.2, 0.25, 0.5, 0.75, 0.9, 1.0):
        place.set_alpha(alpha)
        note(f"alpha {alpha}")
    while place.stage is not SeedStage.FOSSILIZED:
        if place.stage is SeedStage.PROBATIONARY:
            place.step_epoch()
        assert model.advance_stage(slot)
        note(place.stage.name)
    return counts
