"""The environment: one action and one epoch per step; the reward is what growth was worth at equal FLOPs."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, Final, final

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from kasmina_core import (
    Arm,
    Command,
    Continue,
    FlopLedger,
    KasminaError,
    MisuseWarning,
    Observation,
    SeedStage,
    Task,
    TelemetryEvent,
    default_registry,
    load_task,
    start_arm,
)
from torch import Tensor

from kasmina_rl.actions import Actions, Kinds
from kasmina_rl.encoding import BLUEPRINT_FIELDS, BOUND, RUN_FIELDS, SLOT_FIELDS, Encoder, Numbers
from kasmina_rl.episodes import Deal, HostAlone, deal, host_alone, toy_task

LAST: Final = 5
"""Epochs over which the last value is a mean: one epoch's is noisy, and could be chosen."""

PRESETS: Final[Mapping[str, Mapping[str, Any]]] = {
    "toy": {"task": "toy", "blueprints": ("vector:norm", "vector:bottleneck", "vector:mlp"), "epochs": 80},
    "digits": {
        "task": "digits",
        "blueprints": ("cnn:conv_heavy", "cnn:conv_light", "cnn:norm"),
        "epochs": 100,
    },
    "chars": {
        "task": "chars",
        "blueprints": ("transformer:mlp", "transformer:attention", "transformer:norm"),
        "epochs": 50,
    },
}
"""What the registered environments are made with."""


@final
class GrowEnv(gymnasium.Env[dict[str, Numbers], Any]):
    """Growth of one host on one task, as a Markov decision process.

    An episode has a fresh host, samples dealt anew and a budget of training FLOPs: those of ``epochs`` epochs of the
    host alone. It is terminated when they are spent. A step carries out one command (with ``per_slot`` one per slot),
    and trains one epoch. Gates stay: an action asks, it forces nothing.

    With ``L`` the mean loss on samples that nothing else looks at, ``F`` the FLOPs spent:

        value(t)  = L_alone(F(t)) - L_kept(t)
        reward(t) = value(t) - value(t - 1)

    ``L_kept`` is the model as it would be kept now: with its fossils, without seeds on trial. ``L_alone`` is the same
    host trained alone for the same FLOPs, whatever incubation, gates and culled seeds cost. The last value is the mean of
    the last five epochs. So waiting earns exactly 0, and what comes and goes earns its FLOPs, with a minus.

    Args:
        task: Name for `load_task`, or a `Task`.
        host: The host; default the task's.
        blueprints: Candidates; default all that fit a slot.
        slots: Points; default all that the host declares.
        epochs: Budget, in epochs of the host alone; default the task's.
        actions: ``basic`` or ``full``; see `Actions`.
        per_slot: Whether an action is one command per slot, ``MultiDiscrete``.
        episodes: How many different episodes there are. A host alone is trained once for each of them, and remembered;
            ``None`` draws another in each `reset`.
        ramp_epochs: Length of the alpha ramp; default the task's.
        host_options: Keywords for the host's factory.
        batch_size: Samples per training batch; default the task's.
        lr: Learning rate of Adam; default the task's.
        preset: Defaults of a registered environment: ``toy``, ``digits`` or ``chars``.

    Attributes:
        seen: The last observation as policies of the library take it.
        actions: What an action asks for.
        arm: The model that grows and what it spent; ``None`` while nothing but waiting was asked for.
        alone: The host alone on the same samples.
        dealt: The samples of the episode.
        gaps: After each epoch, the losses of the host alone less those of the model, ``(n,)``.
        budget: FLOPs of the episode.

    Raises:
        KasminaError: If there is no such task, host, point or blueprint, or they do not fit each other.
        ValueError: If a candidate fits no slot, or gate G0 refuses it.
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["ansi"]}

    def __init__(
        self,
        task: str | Task | None = None,
        *,
        host: str | None = None,
        blueprints: Sequence[str] = (),
        slots: Sequence[str] = (),
        epochs: int | None = None,
        actions: Kinds = "basic",
        per_slot: bool = False,
        episodes: int | None = None,
        ramp_epochs: float | None = None,
        host_options: Mapping[str, Any] | None = None,
        batch_size: int | None = None,
        lr: float | None = None,
        preset: str = "",
        render_mode: str | None = None,
    ) -> None:
        defaults = PRESETS[preset] if preset and task is None else {}
        chosen = task if task is not None else defaults.get("task", "digits")
        if isinstance(chosen, str):
            chosen = toy_task() if chosen in ("toy", "rl:toy") else load_task(chosen)
        self.task: Task = chosen if ramp_epochs is None else replace(chosen, ramp_epochs=ramp_epochs)
        self.epochs = int(epochs or defaults.get("epochs") or chosen.epochs)
        self.episodes, self.per_slot, self.render_mode = episodes, per_slot, render_mode
        self._arguments: dict[str, Any] = {
            "host": host,
            "slots": tuple(slots),
            "host_options": dict(host_options or {}),
            "batch_size": batch_size,
            "lr": lr,
        }
        self._events: list[TelemetryEvent] = []
        self._ledger = FlopLedger()
        template = self._start(deal(self.task, 0).task, 0, grows=True)
        names = tuple(blueprints) or tuple(defaults.get("blueprints", ()))
        self.candidates = _resolved(template, names)
        self._blank = template.model.observe()
        self.actions = Actions(tuple(template.model.slots), self.candidates, actions)
        _demand_fit(template, self.actions)
        self.encoder = Encoder(self.candidates)
        n = len(self.actions.slots)
        box = partial(spaces.Box, -BOUND, BOUND, dtype=np.float32)
        self.observation_space = spaces.Dict(
            {
                "run": box((len(RUN_FIELDS),)),
                "slots": box((n, len(SLOT_FIELDS))),
                "candidates": box((len(self.candidates), len(BLUEPRINT_FIELDS))),
            }
        )
        each = 1 + len(self.actions.of_slot[0])
        self.action_space = (
            spaces.MultiDiscrete([each] * n) if per_slot else spaces.Discrete(len(self.actions.commands))
        )
        self._done = True

    # -- Gymnasium -------------------------------------------------------------------------------------------------

    @torch.enable_grad()
    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Numbers], dict[str, Any]]:
        """Begin an episode.

        Args:
            seed: For the numbers of the episodes from now on.
            options: ``{"episode": n}`` begins a certain one.
        """
        super().reset(seed=seed)
        drawn = int(self.np_random.integers(self.episodes or 2**31 - 1))
        self.episode = int((options or {}).get("episode", drawn))
        self.dealt = deal(self.task, self.episode)
        key = (self.task.name, id(self.task), repr(self._arguments), self.episode)
        if self.task.name in ("toy", "digits", "chars", "code"):
            key = (self.task.name, 0, repr(self._arguments), self.episode)
        self.alone = host_alone(key, partial(_new_alone, self._start, self.dealt, self.episode, self.epochs))
        self.alone.demand(1)
        self.budget = self.epochs * self.alone.flops[1]
        self.arm: Arm | None = None
        self._events.clear()
        self.encoder.reset()
        self.epoch, self.flops, self._done = 0, 0.0, False
        self.gaps: list[Tensor] = []
        self._value = 0.0
        self.seen = self._look(self.alone.val[0])
        return self._encoded(), self._info()

    @torch.enable_grad()
    def step(self, action: Any) -> tuple[dict[str, Numbers], float, bool, bool, dict[str, Any]]:
        """Carry out an action, then train one epoch. An action that is not legal is refused, and costs nothing more."""
        if self._done:
            raise gymnasium.error.ResetNeeded("The budget of this episode is spent: call reset().")
        commands = [c for c in self.commands_of(action) if not isinstance(c, Continue)]
        self._events.clear()
        refusals: list[str] = []
        if self.arm is None and commands:
            self.materialise()
        self.epoch += 1
        if self.arm is None:
            self.alone.demand(self.epoch)
            self.flops, kept = self.alone.flops[self.epoch], self.alone.reward[self.epoch]
            self.seen = self._look(self.alone.val[self.epoch])
        else:
            refusals = self._train(self.arm, commands)
            self.flops, kept = float(self.arm.ledger.total), self.losses_if_kept()
        self.gaps.append(self.alone.at(self.flops) - kept)
        self.encoder.note(self.seen)
        self._done = self.flops >= self.budget
        gaps = self.gaps[-LAST:] if self._done else self.gaps[-1:]
        value = float(torch.stack(gaps).mean(0).mean())
        reward, self._value = value - self._value, value
        info = self._info() | {"refusals": refusals}
        if self._done:
            info |= self._outcome(torch.stack(gaps).mean(0))
        return self._encoded(), reward, self._done, False, info

    def action_masks(self) -> Any:
        """Return which actions are legal now, as booleans; of one command per slot, one mask after the other."""
        return self._mask().astype(bool)

    def render(self) -> str:  # type: ignore[override]
        """Return the epoch, the value so far, and the slots, as text."""
        slots = ", ".join(f"{s.slot}: {s.stage.name} {s.blueprint}".strip() for s in self.seen.slots)
        spent = self.flops / self.budget
        return f"epoch {self.epoch}, {spent:.0%} of the budget, value {self._value:+.4f}; {slots}"

    # -- parts -----------------------------------------------------------------------------------------------------

    def commands_of(self, action: Any) -> list[Command]:
        """Return what an action asks for.

        Raises:
            gymnasium.error.InvalidAction: If it does not lie in the action space.
        """
        if not self.action_space.contains(action):
            raise gymnasium.error.InvalidAction(
                f"{action!r:.200} is no action of {self.action_space}: {self._valid_actions()}."
            )
        if not self.per_slot:
            return [self.actions.commands[int(action)]]
        tables = zip(np.asarray(action).tolist(), self.actions.of_slot, strict=True)
        return [table[number - 1] for number, table in tables if number]

    def _valid_actions(self) -> str:
        if not self.per_slot:
            return f"a whole number from 0 to {len(self.actions.commands) - 1}"
        return (
            f"{len(self.actions.slots)} whole numbers from 0 to {len(self.actions.of_slot[0])}, one per slot"
        )

    def report(self) -> dict[str, float]:
        """Return the losses on the samples of reports: of the model as it would be kept, and of the host alone."""
        alone = self.alone.report_at(self.flops)
        arm = self.arm
        if arm is None:
            return {"kept": alone, "alone": alone}
        arm.task = self.dealt.report
        kept = float(self.losses_if_kept().mean())
        arm.task = self.dealt.task
        return {"kept": kept, "alone": alone}

    def start(self, episode: int) -> Arm:
        """Return a new arm with the host alone of an episode."""
        return self._start(deal(self.task, episode).task, episode, grows=False)

    def _start(self, task: Task, episode: int, *, grows: bool) -> Arm:
        return start_arm(
            task,
            grows=grows,
            seed=episode,
            ledger=self._ledger if grows else None,
            telemetry=_Collector(self._events) if grows else None,
            **self._arguments,
        )

    def materialise(self) -> None:
        """Make the model, as it is after the epochs in which nothing was asked of it."""
        self._ledger.total = 0
        arm = self._start(self.dealt.task, self.episode, grows=True)
        self.alone.bring(arm, self.epoch)
        for epoch in range(1, self.epoch + 1):
            flops = self.alone.flops[epoch]
            arm.model.step_epoch(self.alone.val[epoch], flops=flops, budget=self.budget)
        arm.budget = self.budget
        self._events.clear()
        self.arm = arm

    def _train(self, arm: Arm, commands: Sequence[Command]) -> list[str]:
        refusals = []
        if commands:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", MisuseWarning)  # info has the refusals
                arm.model.follow(_Script(commands))
            refusals = [outcome.refusal for outcome in arm.model.outcomes if not outcome.done]
        arm.train_epoch()
        arm.end_epoch()
        self.seen = arm.model.observe()
        return refusals

    def losses_if_kept(self) -> Tensor:
        """Return the reward's losses of the model with its fossils and without seeds on trial, ``(n,)``.

        Raises:
            TypeError: If nothing was asked of the model yet, so that it was not made.
        """
        if (arm := self.arm) is None:
            raise TypeError("There is no model yet: nothing but waiting was asked for.")
        with ExitStack() as left_out:
            for name, slot in arm.model.slots.items():
                if slot.is_active and slot.stage is not SeedStage.FOSSILIZED:
                    left_out.enter_context(arm.model.bypassed(name))
            return arm.losses("test")

    def _look(self, loss: float) -> Observation:
        return replace(
            self._blank,
            epoch=self.epoch,
            metric=loss if self.epoch else None,
            flops=self.flops if self.epoch else None,
            budget=self.budget if self.epoch else None,
            can_go_straight=self.epoch >= 3,
        )

    def _encoded(self) -> dict[str, Numbers]:
        return self.encoder.encode(self.seen)

    def _mask(self) -> Any:
        mask = self.actions.mask(self.seen)
        if not self.per_slot:
            return mask
        wait = np.ones(1, np.int8)
        parts = np.split(mask[1:], len(self.actions.slots))
        return np.concatenate([np.concatenate([wait, part]) for part in parts])

    def _info(self) -> dict[str, Any]:
        return {
            "action_mask": self._mask(),
            "events": tuple(self._events),
            "episode_number": self.episode,  # "episode" belongs to recorders of statistics
            "epoch": self.epoch,
            "flops": self.flops,
            "value": self._value,
        }

    def _outcome(self, gap: Tensor) -> dict[str, Any]:
        """Return the value of the episode with the half width of its 95 % interval over the reward's samples."""
        return {
            "value": float(gap.mean()),
            "half_width": 1.96 * float(gap.std()) / math.sqrt(len(gap)),
            "seeds_kept": sum(slot.stage is SeedStage.FOSSILIZED for slot in self.seen.slots),
        }


class _Script:
    """A policy that says what it was given."""

    def __init__(self, commands: Sequence[Command]) -> None:
        self.commands = commands

    def decide(self, observation: Observation) -> Sequence[Command]:
        return self.commands


class _Collector:
    """Takes events."""

    def __init__(self, events: list[TelemetryEvent]) -> None:
        self.events = events

    def emit(self, event: TelemetryEvent) -> None:
        self.events.append(event)


def _new_alone(start: Any, dealt: Deal, episode: int, epochs: int) -> HostAlone:
    return HostAlone(partial(start, dealt.task, episode, grows=False), dealt, epochs)


def _resolved(template: Arm, names: Sequence[str]) -> tuple[str, ...]:
    registry, points = default_registry().blueprints, [s.point for s in template.model.slots.values()]
    if names:
        return tuple(registry.get(name, points[0].topology).id for name in names)
    found = [
        entry.id
        for point in points
        for entry in registry.list_for_topology(point.topology)
        if entry.spec.refusal(point.dim) is None
    ]
    return tuple(dict.fromkeys(found))


def _demand_fit(template: Arm, actions: Actions) -> None:
    """Try each candidate in each slot that it fits: what gate G0 refuses could never be grown."""
    fitted = set()
    for slot in template.model.observe().slots:
        for name in actions.fitting(slot):
            try:
                template.model.germinate(slot.slot, name)
            except KasminaError as error:
                raise ValueError(f"Leave '{name}' out of blueprints=: {error}") from error
            template.model.slots[slot.slot].clear()
            fitted.add(name)
    if unfit := [name for name in actions.candidates if name not in fitted]:
        raise ValueError(f"Leave these out of blueprints=, they fit no slot: {', '.join(unfit)}.")
