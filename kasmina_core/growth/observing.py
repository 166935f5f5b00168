"""Plain pictures of a model: what a policy may look at, and a summary for people."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast, final

from kasmina_core.events import EpochEnded, SlotReading
from kasmina_core.lifecycle import SeedState
from kasmina_core.policies.protocol import Observation, SlotObservation
from kasmina_core.quiet import parameters_by_id

if TYPE_CHECKING:
    from torch import nn

    from kasmina_core.growth.config import GrowthConfig
    from kasmina_core.growth.context import Growth
    from kasmina_core.growth.model import MorphogeneticModel
    from kasmina_core.growth.slot import SeedSlot
    from kasmina_core.slotted import SlotMap, SlottedModel


@final
@dataclass(frozen=True, slots=True)
class SlotSummary:
    """One row of `MorphogeneticModel.summary`.

    Attributes:
        parameters: Parameters of the seed.
        trainable_share: Trainable parameters of the seed over those of the model, in [0, 1].
        unasked: Names of the gates that were not asked, because the seed was put in straight.
    """

    slot: str
    stage: str
    blueprint: str
    alpha: float
    parameters: int
    trainable_share: float
    unasked: tuple[str, ...] = ()


def observe(model: MorphogeneticModel, growth: Growth, config: GrowthConfig) -> Observation:
    """Return what a policy may look at, as plain data."""
    host, seeds = _parameters(model)
    slots = zip(model.slots.values(), seeds, strict=True)
    return Observation(
        epoch=growth.epoch,
        metric=growth.last_metric,
        higher_is_better=config.higher_is_better,
        host_parameters=_size(host),
        seed_parameters=_size(_each_once(seeds)),
        slots=tuple(_observe_slot(growth, slot, _size(added)) for slot, added in slots),
        lost_epochs=growth.lost_epochs,
        flops=growth.flops,
        steps=growth.steps,
        budget=growth.budget,
        can_go_straight=growth.can_go_straight,
    )


def epoch_ended(model: SlottedModel, growth: Growth) -> EpochEnded:
    """Return the event of an epoch: the model and every slot as they are."""
    host, seeds = _parameters(model)
    slots = zip(cast("SlotMap[SeedSlot]", model.slots).values(), seeds, strict=True)
    return EpochEnded(
        metric=growth.last_metric,
        host_parameters=_size(host),
        seed_parameters=_size(_each_once(seeds)),
        flops=growth.flops,
        lost_epochs=growth.lost_epochs,
        slots=tuple(_reading(slot, _size(added)) for slot, added in slots),
    )


def _reading(slot: SeedSlot, parameters: int) -> SlotReading:
    if (state := slot.state) is None:
        return SlotReading(slot.name, slot.stage.name)
    metrics, evidence = state.metrics, slot.last_evidence
    return SlotReading(
        slot=slot.name,
        stage=slot.stage.name,
        seed_id=state.seed_id,
        blueprint=state.blueprint_id if slot.seed is not None else "",
        alpha=slot.alpha,
        parameters=parameters,
        epochs_in_stage=metrics.epochs_in_current_stage,
        is_paused=state.is_paused,
        gain=evidence.gain if evidence is not None else None,
        deviation=metrics.deviation,
        gradient_norm=metrics.gradient_norm,
        isolation_violations=metrics.isolation_violations,
        unasked=state.unasked,
    )


def _parameters(model: SlottedModel) -> tuple[list[nn.Parameter], list[list[nn.Parameter]]]:
    """Return the host's parameters, and for each slot those that its seed added."""
    host = parameters_by_id(model.host)
    added = [[p for p in slot.seed_parameters() if id(p) not in host] for slot in model.slots.values()]
    return list(host.values()), added


def _each_once(seeds: Iterable[Iterable[nn.Parameter]]) -> Iterable[nn.Parameter]:
    return {id(p): p for added in seeds for p in added}.values()


def _size(parameters: Iterable[nn.Parameter]) -> int:
    return sum(p.numel() for p in parameters)


def _observe_slot(growth: Growth, slot: SeedSlot, parameters: int) -> SlotObservation:
    state = slot.state or SeedState("", "", slot.name)
    metrics, gate, evidence = state.metrics, slot.last_gate, slot.last_evidence
    return SlotObservation(
        slot=slot.name,
        topology=slot.point.topology,
        dim=slot.point.dim,
        stage=slot.stage,
        blueprint=state.blueprint_id,
        seed_id=state.seed_id,
        alpha=slot.alpha,
        epochs_in_stage=metrics.epochs_in_current_stage,
        epochs_total=metrics.epochs_total,
        is_paused=state.is_paused,
        is_stopped=state.is_stopped,
        deviation=metrics.deviation,
        kept_seed=growth.kept_seeds[slot.name].seed_id if slot.name in growth.kept_seeds else "",
        can_revert=not growth.obstacle_to_revert(slot),
        parameters=parameters,
        shape=slot.shape,
        isolation_violations=metrics.isolation_violations,
        ramp_progress=metrics.ramp_progress,
        improvement_since_stage_start=metrics.improvement_since_stage_start,
        gain=evidence.gain if evidence is not None else None,
        gain_t=evidence.t if evidence is not None else None,
        gate_passed=gate.passed if gate is not None else None,
        gate_reason=gate.reason if gate is not None else "",
        cull_reason=state.cull_reason,
        gate_verdict=gate.verdict.value if gate is not None else "",
        gate_score=gate.score if gate is not None else None,
        can_advance=slot.can_advance,
        unasked=state.unasked,
    )


def summary(model: SlottedModel) -> list[SlotSummary]:
    """Return one row per slot: stage, blueprint, alpha, parameters, trainable share."""
    return _summary(model)[0]


def _summary(model: SlottedModel) -> tuple[list[SlotSummary], int, float]:
    """Return one row per slot, the host's parameters, and the host's share of what is trainable."""
    host, seeds = _parameters(model)
    size = _size(host)
    learning = size - _size(p for p in host if not p.requires_grad)
    trainable = learning + _size(p for p in _each_once(seeds) if p.requires_grad)
    rows = [
        SlotSummary(
            slot=slot.name,
            stage=slot.stage.name,
            blueprint=slot.state.blueprint_id if slot.seed is not None and slot.state is not None else "",
            alpha=slot.alpha,
            parameters=_size(added),
            trainable_share=_size(p for p in added if p.requires_grad) / trainable if trainable else 0.0,
            unasked=slot.state.unasked if slot.state is not None else (),
        )
        for slot, added in zip(model.slots.values(), seeds, strict=True)
    ]
    return rows, size, learning / trainable if trainable else 0.0


def summary_table(model: SlottedModel) -> str:
    """Return `summary` as aligned text, the host in the last line."""
    found, host, share = _summary(model)
    rows = [("slot", "stage", "blueprint", "alpha", "parameters", "trainable")]
    for row in found:
        numbers = f"{row.alpha:.2f}", f"{row.parameters:,}", f"{row.trainable_share:.1%}"
        stage = f"{row.stage}, {' '.join(row.unasked)} not asked" if row.unasked else row.stage
        rows.append((row.slot, stage, row.blueprint or "-", *numbers))
    rows.append(("(host)", "-", type(model.host).__name__, "-", f"{host:,}", f"{share:.1%}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(w) if i > 2 else cell.ljust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )
