"""Commands on a slot that need the model around it, and the commands of policies."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any, cast

from torch import nn

from kasmina_core.errors import DistributedError, GerminationError, HostError, KasminaError, TransitionError
from kasmina_core.events import CommandDone, CommandRefused, GateEvaluated
from kasmina_core.growth.arguments import decided, require_policy
from kasmina_core.growth.context import Growth
from kasmina_core.growth.reverting import KeptSeed, contributing_tensors
from kasmina_core.lifecycle import REVERTIBLE, SeedState
from kasmina_core.policies.protocol import (
    Advance,
    Command,
    CommandOutcome,
    Continue,
    Cull,
    Germinate,
    Pause,
    Policy,
    Regerminate,
    Resume,
    SetAlpha,
)
from kasmina_core.slots.slot import SeedSlot
from kasmina_core.verdicts import GateResult

if TYPE_CHECKING:
    from kasmina_core.growth.model import MorphogeneticModel
    from kasmina_core.slotted import SlottedModel


def regerminate(growth: Growth, chosen: SeedSlot) -> SeedState:
    """Make the seed that was put aside in a slot again. See `MorphogeneticModel.regerminate`."""
    kept = growth.kept_seeds.get(chosen.name)
    if kept is None:
        raise GerminationError(
            f"No seed was put aside in slot '{chosen.name}'. cull(slot, keep=True) does so; of what is saved, "
            "save_checkpoint's checkpoints alone hold it, and copies of a model do not."
        )
    state = chosen.germinate(kept.blueprint_id, **kept.options)
    try:
        kept.load_into(cast("nn.Module", chosen.seed))
    except RuntimeError as error:
        chosen.clear()
        raise GerminationError(
            f"The weights of '{kept.seed_id}' do not fit what '{kept.blueprint_id}' builds now: {error}"
        ) from error
    del growth.kept_seeds[chosen.name]
    return state


def cull(
    model: SlottedModel, growth: Growth, chosen: SeedSlot, reason: str, *, revert: bool, keep: bool
) -> None:
    """Remove a slot's seed. See `MorphogeneticModel.cull`."""
    kept = KeptSeed.of(chosen) if keep else None
    if not revert or chosen.stage not in REVERTIBLE:
        chosen.cull(reason)
    elif obstacle := growth.obstacle_to_revert(chosen):
        raise TransitionError(
            f"The seed in slot '{chosen.name}' cannot be culled with revert=True: {obstacle}"
        )
    else:
        snapshot = growth.snapshots[chosen.name]
        # Reverts since then gave up epochs too, which are counted already.
        since = growth.lost_epochs - (
            snapshot.lost_epochs if snapshot.lost_epochs is not None else growth.lost_epochs
        )
        lost = growth.epoch - snapshot.epoch - since
        with growth.command(chosen, f"revert({chosen.name!r})"):
            chosen.cull(reason, lost_epochs=lost)
            growth.misuse.restart()
            snapshot.restore(contributing_tensors(model.host, model.slots.values(), chosen))
            growth.forget_lost(lost)
    if kept is not None:
        growth.kept_seeds[chosen.name] = kept


def execute(model: MorphogeneticModel, command: Command) -> SeedState | GateResult | None:
    """Carry out one command of a policy. See `MorphogeneticModel.execute`."""
    match command:
        case Germinate(slot, blueprint, options, straight):
            return model.germinate(slot, blueprint, straight=straight, **dict(options))
        case Advance(slot):
            return model.advance_stage(slot)
        case Regerminate(slot):
            return model.regerminate(slot)
        case Cull(slot, reason, revert, keep):
            model.cull(slot, reason, revert=revert, keep=keep)
        case SetAlpha(slot, alpha):
            model.slots[slot].set_alpha(alpha)
        case Pause(slot):
            model.slots[slot].pause()
        case Resume(slot):
            model.slots[slot].resume()
        case Continue():
            pass
        case _:
            raise TypeError(f"{command!r} is not a command.")
    return None


def follow(model: MorphogeneticModel, policy: Policy) -> list[Command]:
    """Ask a policy once and carry out its commands. See `MorphogeneticModel.follow`."""
    growth = model.growth
    growth.outcomes = ()
    require_policy(policy)
    with growth.command(None, "follow"):
        commands = growth.agreement.commands(decided(policy, model.observe()))
        growth.journal.note_policy(policy)
        for command in commands:
            before = growth.lost_epochs
            try:
                refusal = _refusal(model, command)
            except BaseException as error:
                done, left = len(growth.outcomes), len(commands) - len(growth.outcomes) - 1
                error.add_note(
                    f"This happened in follow, at {command!r:.200}: {done} commands before it were tried (see outcomes), "
                    f"{left} after it were not."
                )
                raise
            if isinstance(command, Cull) and (lost := growth.lost_epochs - before):
                gone = f"{lost} epoch{'s' * (lost > 1)} of the host's training given up"
                command = replace(command, reason=f"{command.reason}; {gone}")
            growth.outcomes += (CommandOutcome(command, refusal),)
    return [outcome.command for outcome in growth.outcomes if outcome.done]


def _refusal(model: MorphogeneticModel, command: Command) -> str:
    """Carry out a command; return why it was refused, or nothing."""
    growth, refusal = model.growth, ""
    name, slot = type(command).__name__, "" if isinstance(command, Continue) else command.slot
    arguments: dict[str, Any] = {
        field.name: getattr(command, field.name) for field in fields(command) if field.name != "slot"
    }
    try:
        result = model.execute(command)
        if isinstance(result, GateResult) and not result.passed:
            refusal = str(result)
    except (DistributedError, HostError):  # not the command's fault: no other one could be carried out
        raise
    except (KasminaError, ValueError) as error:
        refusal = str(error) or type(error).__name__
        result = getattr(error, "result", None)
        if isinstance(result, GateResult) and isinstance(command, Germinate):
            growth.emit(
                GateEvaluated(
                    slot=slot,
                    gate="G0",
                    passed=False,
                    verdict=result.verdict.value,
                    reason=f"{command.blueprint}: {result.reason}",
                    checks=tuple(check.to_dict() for check in result.checks),
                )
            )
        else:
            growth.misuse.note_refusal(command, slot, refusal)
    if refusal:
        growth.emit(CommandRefused(slot=slot, command=name, reason=refusal, arguments=arguments))
    elif not isinstance(command, Continue):
        growth.emit(CommandDone(slot=slot, command=name, arguments=arguments))
    return refusal
