"""Plain pictures of a model: what a policy may look at, and a summary for people."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, final

from kasmina_core.policies.protocol import Observation, SlotObservation

if TYPE_CHECKING:
    from kasmina_core.growth.config import GrowthConfig
    from kasmina_core.growth.context import Growth
    from kasmina_core.slots.slot import SeedSlot
    from kasmina_core.slotted import SlottedModel


@final
@dataclass(frozen=True, slots=True)
class SlotSummary:
    """One row of `MorphogeneticModel.summary`.

    Attributes:
        parameters: Parameters of the seed.
        trainable_share: Trainable parameters of the seed over those of the model, in [0, 1].
    """

    slot: str
    stage: str
    blueprint: str
    alpha: float
    parameters: int
    trainable_share: float


def observe(model: SlottedModel, growth: Growth, config: GrowthConfig) -> Observation:
    """Return what a policy may look at, as plain data."""
    return Observation(
        epoch=growth.epoch,
        metric=growth.last_metric,
        higher_is_better=config.higher_is_better,
        host_parameters=sum(p.numel() for p in model.host_parameters()),
        seed_parameters=sum(p.numel() for p in model.seed_parameters()),
        slots=tuple(_observe_slot(model, growth, slot) for slot in model.slots.values()),
        lost_epochs=growth.lost_epochs,
    )


def _observe_slot(model: SlottedModel, growth: Growth, slot: SeedSlot) -> SlotObservation:
    state, gate, evidence = slot.state, slot.last_gate, slot.last_evidence
    metrics = state.metrics if state is not None else None
    return SlotObservation(
        slot=slot.name,
        topology=slot.point.topology,
        dim=slot.point.dim,
        stage=slot.stage,
        blueprint=state.blueprint_id if state is not None else "",
        seed_id=state.seed_id if state is not None else "",
        alpha=slot.alpha,
        epochs_in_stage=metrics.epochs_in_current_stage if metrics is not None else 0,
        epochs_total=metrics.epochs_total if metrics is not None else 0,
        is_paused=state.is_paused if state is not None else False,
        is_stopped=state.is_stopped if state is not None else False,
        deviation=metrics.deviation if metrics is not None else None,
        kept_seed=growth.kept_seeds[slot.name].seed_id if slot.name in growth.kept_seeds else "",
        can_revert=not growth.obstacle_to_revert(slot),
        parameters=sum(p.numel() for p in model.seed_parameters(slot.name)),
        shape=slot.shape,
        isolation_violations=metrics.isolation_violations if metrics is not None else 0,
        ramp_progress=metrics.ramp_progress if metrics is not None else 0.0,
        improvement_since_stage_start=metrics.improvement_since_stage_start if metrics is not None else None,
        gain=evidence.gain if evidence is not None else None,
        gain_t=evidence.t if evidence is not None else None,
        gate_passed=gate.passed if gate is not None else None,
        gate_reason=gate.reason if gate is not None else "",
        cull_reason=state.cull_reason if state is not None else "",
    )


def summary(model: SlottedModel) -> list[SlotSummary]:
    """Return one row per slot: stage, blueprint, alpha, parameters, trainable share."""
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    rows = []
    for slot in model.slots.values():
        parameters = model.seed_parameters(slot.name)
        own = sum(p.numel() for p in parameters if p.requires_grad)
        rows.append(
            SlotSummary(
                slot=slot.name,
                stage=slot.stage.name,
                blueprint=slot.state.blueprint_id if slot.seed is not None and slot.state is not None else "",
                alpha=slot.alpha,
                parameters=sum(p.numel() for p in parameters),
                trainable_share=own / trainable if trainable else 0.0,
            )
        )
    return rows


def summary_table(model: SlottedModel) -> str:
    """Return `summary` as aligned text, the host in the last line."""
    rows_of_slots = summary(model)
    head = ("slot", "stage", "blueprint", "alpha", "parameters", "trainable")
    rows = [
        (
            r.slot,
            r.stage,
            r.blueprint or "-",
            f"{r.alpha:.2f}",
            f"{r.parameters:,}",
            f"{r.trainable_share:.1%}",
        )
        for r in rows_of_slots
    ]
    host = sum(p.numel() for p in model.host_parameters())
    learns = any(p.requires_grad for p in model.parameters())
    share = 1.0 - sum(r.trainable_share for r in rows_of_slots) if learns else 0.0
    rows.append(("(host)", "-", type(model.host).__name__, "-", f"{host:,}", f"{share:.1%}"))
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    return "\n".join(
        "  ".join(
            cell.rjust(w) if i > 2 else cell.ljust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in [head, *rows]
    )
