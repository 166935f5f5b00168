"""The model: a host with slots, and what one does with all of them at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol, cast, final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from kasmina_core.blueprints.catalogue import BlueprintRegistry
from kasmina_core.errors import GerminationError, HostError, TransitionError
from kasmina_core.events import AlphaChanged, GateEvaluated, SeedTelemetry, StageChanged, TelemetryEvent
from kasmina_core.evidence.attribution import Attribution, attribute
from kasmina_core.evidence.isolation import GradientIsolationMonitor
from kasmina_core.evidence.measuring import Evaluator as Evaluator
from kasmina_core.evidence.measuring import GateSamples, SeedMeasurer
from kasmina_core.evidence.screening import ScreenOfEpoch, screen
from kasmina_core.gates.paired import SeedEvidence
from kasmina_core.gates.sequential import PairedGain
from kasmina_core.gates.thresholds import ErrorBudget
from kasmina_core.growth.agreement import ALONE, Agreement, own_samples
from kasmina_core.growth.config import GrowthConfig, Incubation
from kasmina_core.growth.incubation import give_gradient
from kasmina_core.growth.reverting import (
    HostSnapshot,
    HostStateKeeper,
    KeptSeed,
    contributing_tensors,
    obstacle_to_revert,
)
from kasmina_core.growth.undo import ModelBefore
from kasmina_core.growth.watching.graphs import GraphForesight
from kasmina_core.growth.watching.misuse import Misuse, decided, one_number
from kasmina_core.growth.watching.untracked import UntrackedSeeds
from kasmina_core.hosts import HostProtocol, InjectionPoint, SlotHook, submodule
from kasmina_core.isolation import IsolationReading
from kasmina_core.lifecycle import SeedStage, SeedState
from kasmina_core.policies.protocol import (
    Advance,
    Command,
    Continue,
    Cull,
    Germinate,
    Observation,
    Pause,
    Policy,
    Regerminate,
    Resume,
    SetAlpha,
    SlotObservation,
)
from kasmina_core.probing import example_of, lookup, probe, requested_points
from kasmina_core.quiet import devices_of, private_rng, quiet_evaluation
from kasmina_core.sharding import kept_whole, reshard
from kasmina_core.slots.slot import ForwardMode, SeedSlot
from kasmina_core.state_keys import WRAPPER, NamesOf, without_wrapper
from kasmina_core.verdicts import GateResult

if TYPE_CHECKING:
    from kasmina_core.packs.discovery import PluginRegistry

SLOTS_KEY = "kasmina_slots"


class SeedParameterListener(Protocol):
    """Hears of parameters that come and go; optimisers are tied to a model through one."""

    def seed_added(self, slot: str, parameters: Sequence[nn.Parameter]) -> None:
        """Take new parameters. May raise: the germination is then refused."""
        ...

    def seed_removed(self, slot: str, parameters: Sequence[nn.Parameter]) -> None:
        """Forget parameters."""
        ...


class EventTarget(Protocol):
    """Takes events; `Telemetry` is one."""

    def emit(self, event: TelemetryEvent) -> None:
        """Take an event; never raises, never waits."""
        ...


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


class SlotMap(Mapping[str, SeedSlot]):
    """The slots by name; a point's path works too."""

    def __init__(self, slots: Iterable[SeedSlot]) -> None:
        self._slots = {slot.name: slot for slot in slots}

    def __getitem__(self, name: str) -> SeedSlot:
        if not isinstance(name, str):
            raise TypeError(
                f"A slot is asked for by its name, not {name!r}. Slots: {', '.join(self._slots)}."
            )
        if (slot := self._slots.get(name)) is not None:
            return slot
        by_path = {slot.point.path: slot for slot in self._slots.values()}
        if name in by_path:
            return by_path[name]
        return cast("SeedSlot", lookup(name, self._slots, "slot"))

    def __iter__(self) -> Iterator[str]:
        return iter(self._slots)

    def __len__(self) -> int:
        return len(self._slots)

    def __contains__(self, name: object) -> bool:
        return name in self._slots or any(slot.point.path == name for slot in self._slots.values())

    def __repr__(self) -> str:
        return f"SlotMap({', '.join(f'{slot.name}: {slot.stage.name}' for slot in self._slots.values())})"


class MorphogeneticModel(nn.Module):
    """A host with slots in which seeds grow.

    The host keeps its class, its keys and its own hooks; the slots hang on its submodules' outputs. They are attached
    here, once, so call ``torch.compile`` afterwards. Empty slots add no key to the ``state_dict``: a model without
    seeds saves and loads like its bare host.

    Compiled, each forward mode of each slot is a graph of its own: up to 4 in training and 4 without gradients. torch
    stops at 8, so set ``torch._dynamo.config.recompile_limit`` to 8 times the number of slots that will hold seeds; a
    `RecompileLimitWarning` says so before the limit is reached.

    Args:
        host: Any module. One with `HostProtocol` declares its points; for others name them in ``slots``.
        slots: Names or paths of points, globs (``"layers.*"``) or `InjectionPoint` declarations; ``None`` for all that
            the host declares.
        config: How seeds are treated.
        example: Inputs for one forward: a tensor, a tuple of arguments or a mapping of keywords. It proves that each
            point fires, once, with the declared features. Default: the host's ``example_inputs()``.
        registry: Where blueprints and the gate checks of packs come from; ``None`` for the installed packs, which are
            loaded when a blueprint or a gate is first asked for.
        telemetry: Takes the events.
        evaluator: See `evaluate_with`.
        causal: Whether points given by path lie in a causal host.

    Raises:
        HostError: If a point does not exist, does not fire exactly once, or is not as declared; the host is left as
            it was.
        TypeError: If an argument is something else than that.
    """

    def __init__(
        self,
        host: nn.Module,
        slots: Iterable[str | InjectionPoint] | None = None,
        *,
        config: GrowthConfig | None = None,
        example: object = None,
        registry: BlueprintRegistry | PluginRegistry | None = None,
        telemetry: EventTarget | None = None,
        evaluator: Evaluator | None = None,
        causal: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(host, nn.Module):
            hint = f" Make one of the class: {host.__name__}(...)." if isinstance(host, type) else ""
            raise TypeError(f"host must be a module, not {host!r:.200}.{hint}")
        if example is None:
            example = example_of(host)
        proved = probe(host, requested_points(host, slots), example, causal=causal)
        self.host = host
        # Not `config`: trainers take a model's `config` for that of a transformers model.
        self.growth_config = config or GrowthConfig()
        if not isinstance(self.growth_config, GrowthConfig):
            raise TypeError(f"config must be a GrowthConfig, not {config!r}.")
        blueprints = registry if isinstance(registry, BlueprintRegistry | None) else registry.blueprints
        self.epoch = 0
        self.lost_epochs = 0
        self._sequence = 0
        self._snapshots: dict[str, HostSnapshot] = {}
        self._kept_seeds: dict[str, KeptSeed] = {}
        self._telemetry = _event_target(telemetry)
        self._graphs = GraphForesight()
        self._gate_samples = GateSamples(evaluator) if evaluator is not None else None
        self._measurer = SeedMeasurer(self)
        self._screens = ScreenOfEpoch()
        self._untracked = UntrackedSeeds()
        self._misuse = Misuse()
        self._listeners: list[SeedParameterListener] = [self._untracked]
        self._agreement: Agreement = ALONE
        self._gather_samples: Callable[[Tensor], Tensor] = own_samples
        self._handles: dict[str, RemovableHandle] = {}
        self._last_metric: float | None = None
        self._before: ModelBefore | None = None
        self.add_module(
            SLOTS_KEY,
            nn.ModuleDict(
                {
                    found.point.name: SeedSlot(
                        found.point,
                        found.shape,
                        self.growth_config,
                        blueprints,
                        dtype=_parameter_dtype(host, found.point.path, found.dtype),
                        device=found.device,
                    ).train(host.training)
                    for found in proved
                }
            ),
        )
        attached: list[SeedSlot] = []
        try:
            for slot in self.slots.values():
                self._attach(slot)
                attached.append(slot)
        except Exception:
            for slot in attached:
                self._detach(slot)
            raise
        self.training = host.training
        self.register_state_dict_post_hook(_strip_host_prefix)  # type: ignore[no-untyped-call]  # torch
        self.register_load_state_dict_pre_hook(_add_host_prefix)  # type: ignore[no-untyped-call]  # torch
        self._own_slots()

    # -- the model as a module -------------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the host, its features passing through the slots."""
        return self.host(*args, **kwargs)

    @property
    def slots(self) -> SlotMap:
        """The slots by name, in the order in which they were asked for."""
        return SlotMap(cast("Iterable[SeedSlot]", getattr(self, SLOTS_KEY).values()))

    def host_parameters(self) -> list[nn.Parameter]:
        """Return the host's parameters, each once."""
        return list(self.host.parameters())

    def seed_parameters(self, slot: str | None = None) -> list[nn.Parameter]:
        """Return the parameters that seeds added, each once, without any that belong to the host.

        Args:
            slot: Name of one slot; default all.
        """
        owned = {id(p) for p in self.host.parameters()}
        chosen = [self.slots[slot]] if slot is not None else list(self.slots.values())
        unique = {id(p): p for s in chosen for p in s.seed_parameters() if id(p) not in owned}
        return list(unique.values())

    def detach_slots(self) -> nn.Module:
        """Take the slots off the host and return it as it was; seeds stay behind with this model."""
        for slot in self.slots.values():
            self._detach(slot)
        return self.host

    def _attach(self, slot: SeedSlot) -> None:
        if isinstance(self.host, HostProtocol) and slot.point in list(self.host.injection_points()):
            self.host.register_slot(slot.name, slot)
            return
        module = submodule(self.host, slot.point.path)
        if any(isinstance(hook, SlotHook) for hook in module._forward_hooks.values()):
            raise HostError(f"'{slot.point.path}' already has a slot: a host can be in one model at a time.")
        self._handles[slot.name] = module.register_forward_hook(SlotHook(slot))

    def _detach(self, slot: SeedSlot) -> None:
        if (handle := self._handles.pop(slot.name, None)) is not None:
            handle.remove()
        elif isinstance(self.host, HostProtocol):
            self.host.unregister_slot(slot.name)

    def _own_slots(self) -> None:
        owner = _Owner(self)
        for slot in self.slots.values():
            slot._owner = owner

    # -- commands --------------------------------------------------------------------------------------------------

    def germinate(self, slot: str, blueprint: str, seed_id: str | None = None, **options: Any) -> SeedState:
        """Make a seed in a slot. See `SeedSlot.germinate`."""
        return self.slots[slot].germinate(blueprint, seed_id, **options)

    def advance_stage(self, slot: str, target: SeedStage | None = None) -> GateResult:
        """Ask the gate for the next stage of a slot's seed. See `SeedSlot.advance_stage`."""
        return self.slots[slot].advance_stage(target)

    def regerminate(self, slot: str) -> SeedState:
        """Make the seed that was put aside in a slot again, with the weights it had; it starts at GERMINATED.

        Raises:
            GerminationError: If none was put aside (``cull(slot, keep=True)``; `save_checkpoint` saves it, a ``state_dict``
                or a copy of the model does not), the slot is not dormant, or the weights do not fit. No seed is there then.
        """
        chosen = self.slots[slot]
        kept = self._kept_seeds.get(chosen.name)
        if kept is None:
            raise GerminationError(
                f"No seed was put aside in slot '{chosen.name}'. cull(slot, keep=True) does so; of what is saved, "
                "save_checkpoint's checkpoints alone hold it, and copies of a model do not."
            )
        state = chosen.germinate(kept.blueprint_id, **kept.options)
        try:
            cast("nn.Module", chosen.seed).load_state_dict(kept.weights)
        except RuntimeError as error:
            chosen._clear()
            raise GerminationError(
                f"The weights of '{kept.seed_id}' do not fit what '{kept.blueprint_id}' builds now: {error}"
            ) from error
        del self._kept_seeds[chosen.name]
        return state

    def cull(self, slot: str, reason: str = "asked to", *, revert: bool = False, keep: bool = False) -> None:
        """Remove a slot's seed. See `SeedSlot.cull`.

        Args:
            slot: Name of the slot.
            reason: Why, for people.
            revert: Whether to put the host back, bit for bit, to what it was when the seed began to blend in: its
                parameters and buffers, those of the other seeds that contribute, and the state that tied optimisers
                have of them. Learning rates, schedules and random numbers go on. What the host learned since is lost;
                ``lost_epochs`` and the event say how much. A seed that does not contribute yet is just culled.
            keep: Whether to put the seed aside for `regerminate`, in place of another one of this slot.

        Raises:
            TransitionError: If there is no seed, it is fossilised, or, with ``revert``, there is no snapshot
                (``GrowthConfig(keep_snapshot=True)`` keeps one; `save_checkpoint` saves it, copies have none), or
                other seeds have begun or ceased to contribute since. Nothing is changed then.
        """
        chosen = self.slots[slot]
        kept = KeptSeed.of(chosen) if keep else None
        if revert and SeedStage.BLENDING <= chosen.stage < SeedStage.FOSSILIZED:
            self._cull_and_revert(chosen, reason)
        else:
            chosen.cull(reason)
        if kept is not None:
            self._kept_seeds[chosen.name] = kept

    def _cull_and_revert(self, chosen: SeedSlot, reason: str) -> None:
        if obstacle := obstacle_to_revert(
            self._snapshots.get(chosen.name), self.host, self.slots.values(), chosen
        ):
            raise TransitionError(
                f"The seed in slot '{chosen.name}' cannot be culled with revert=True: {obstacle}"
            )
        snapshot = self._snapshots[chosen.name]
        lost = self.epoch - snapshot.epoch
        with self._agreement.command(chosen, f"revert({chosen.name!r})"):
            chosen.cull(reason, lost_epochs=lost)
            self._misuse.restart()
            snapshot.restore(contributing_tensors(self.host, self.slots.values(), chosen))
            self.lost_epochs += lost

    def can_revert(self, slot: str) -> bool:
        """Say whether culling a slot's seed now could put the host back."""
        chosen = self.slots[slot]
        return not obstacle_to_revert(
            self._snapshots.get(chosen.name), self.host, self.slots.values(), chosen
        )

    def _before_move(self, slot: SeedSlot, target: SeedStage) -> None:
        if target is SeedStage.BLENDING and self.growth_config.keep_snapshot:
            keepers = [listener for listener in self._listeners if isinstance(listener, HostStateKeeper)]
            self._snapshots[slot.name] = HostSnapshot.take(
                self.host, self.slots.values(), slot, keepers, self.epoch
            )
        elif target in (SeedStage.FOSSILIZED, SeedStage.CULLED):
            self._snapshots.pop(slot.name, None)

    def step(self) -> None:
        """Let one optimiser step pass: after ``backward``, before the optimiser clears the gradients."""
        self._untracked.look(self, self._tied_optimizers())
        self._agreement.gradients(is_step=True)
        if self._misuse.awaits_step:
            self._misuse.note_step(self)
        for slot in self.slots.values():
            if slot.seed is not None:
                slot.step()

    def step_epoch(self, metric: float | Tensor | None = None) -> dict[str, GateResult]:
        """Let one epoch pass in every slot. See `SeedSlot.step_epoch`.

        Args:
            metric: Validation metric of the whole model, one number.

        Returns:
            By slot, what the gate of this epoch said, where one was asked.

        Raises:
            TypeError: If the metric is no number.
            ValueError: If it is a tensor of several.
        """
        value = one_number(metric) if metric is not None else None
        self._untracked.look(self, self._tied_optimizers())
        results = {}
        self._misuse.epoch_ends(self)
        with self._agreement.command(None, "step_epoch"):
            self._last_metric = value = self._agreement.metric(value)
            self.epoch += 1
            for name, slot in self.slots.items():
                if slot.state is not None and (result := slot.step_epoch(value)) is not None:
                    results[name] = result
        self._misuse.epoch_ended(self, results, self._tied_optimizers())
        return results

    def execute(self, command: Command) -> SeedState | GateResult | None:
        """Carry out one command of a policy.

        Returns:
            The new seed's state, what the gate said, or ``None``, as the command is.

        Raises:
            TransitionError: If the command is not allowed now.
            TypeError: If it is no command.
        """
        match command:
            case Germinate(slot, blueprint, options):
                return self.germinate(slot, blueprint, **dict(options))
            case Advance(slot):
                return self.advance_stage(slot)
            case Regerminate(slot):
                return self.regerminate(slot)
            case Cull(slot, reason, revert, keep):
                self.cull(slot, reason, revert=revert, keep=keep)
            case SetAlpha(slot, alpha):
                self.slots[slot].set_alpha(alpha)
            case Pause(slot):
                self.slots[slot].pause()
            case Resume(slot):
                self.slots[slot].resume()
            case Continue():
                pass
            case _:
                raise TypeError(f"{command!r} is not a command.")
        return None

    def observe(self) -> Observation:
        """Return what a policy may look at, as plain data."""
        return Observation(
            epoch=self.epoch,
            metric=self._last_metric,
            higher_is_better=self.growth_config.higher_is_better,
            host_parameters=sum(p.numel() for p in self.host_parameters()),
            seed_parameters=sum(p.numel() for p in self.seed_parameters()),
            slots=tuple(self._observe_slot(slot) for slot in self.slots.values()),
            lost_epochs=self.lost_epochs,
        )

    def _observe_slot(self, slot: SeedSlot) -> SlotObservation:
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
            kept_seed=self._kept_seeds[slot.name].seed_id if slot.name in self._kept_seeds else "",
            can_revert=self.can_revert(slot.name),
            parameters=sum(p.numel() for p in self.seed_parameters(slot.name)),
            shape=slot.shape,
            isolation_violations=metrics.isolation_violations if metrics is not None else 0,
            ramp_progress=metrics.ramp_progress if metrics is not None else 0.0,
            improvement_since_stage_start=metrics.improvement_since_stage_start
            if metrics is not None
            else None,
            gain=evidence.gain if evidence is not None else None,
            gain_t=evidence.t if evidence is not None else None,
            gate_passed=gate.passed if gate is not None else None,
            gate_reason=gate.reason if gate is not None else "",
            cull_reason=state.cull_reason if state is not None else "",
        )

    def follow(self, policy: Policy) -> list[Command]:
        """Ask a policy once and carry out what it says; call it after `step_epoch`.

        A germination that gate G0 refuses is told in an event and passed over.

        Returns:
            The commands that were carried out.

        Raises:
            TypeError: If it is no policy, or decides on something else than a list of commands.
        """
        done = []
        with self._agreement.command(None, "follow"):
            for command in self._agreement.commands(decided(policy, self.observe())):
                try:
                    self.execute(command)
                except GerminationError as error:
                    if not (isinstance(error.result, GateResult) and isinstance(command, Germinate)):
                        raise
                    self._tell_of_refusal(command, error.result)
                else:
                    done.append(command)
        return done

    def _tell_of_refusal(self, command: Germinate, result: GateResult) -> None:
        self._emit(
            GateEvaluated(
                slot=command.slot,
                gate="G0",
                passed=False,
                reason=f"{command.blueprint}: {result.reason}",
                checks=tuple(check.to_dict() for check in result.checks),
            )
        )

    # -- learning and measuring ------------------------------------------------------------------------------------

    def incubate(self, closure: Callable[[], Tensor], scaler: Any = None) -> dict[str, Tensor]:
        """Run the counterfactual pass: each incubating seed learns from the loss its own output would give.

        For each seed in TRAINING (``Incubation.COUNTERFACTUAL``) the closure runs once more with the slot's output
        replaced by the seed's; the gradient of that loss goes to the seed's parameters and nowhere else. The host is
        in eval mode meanwhile, so that no statistics move, and random numbers are as before.

        Call it before the optimiser step, with the same batch or a part of it. With
        ``GrowthConfig(incubate_every=k)`` a seed learns in one call of ``k``. With straight-through incubation, or where no seed
        incubates, nothing runs, so a training loop may always call it.

        Args:
            closure: Returns the scalar loss of this model on a batch.
            scaler: A ``torch.amp.GradScaler`` whose scale the gradients shall carry, if one is in use.

        Returns:
            The loss with the seed, by slot; detached.

        Raises:
            HostError: If the host uses reentrant gradient checkpointing, which cannot give the gradient to chosen
                parameters; use ``use_reentrant=False``.
        """
        losses: dict[str, Tensor] = {}
        with ExitStack() as all_passes:
            for name, slot in self.slots.items():
                if (
                    self.growth_config.incubation is not Incubation.COUNTERFACTUAL
                    or not slot.is_incubating
                    or not slot.begin_incubation()
                    or not any(p.requires_grad for p in self.seed_parameters(name))
                ):
                    continue
                if not losses:  # the first: modes are switched once for all of them
                    all_passes.enter_context(self._evaluation())
                    devices = devices_of(self)
                elif self.training or self.host.training:  # the closure has switched them
                    self.eval()
                with private_rng(None, *devices), torch.enable_grad():
                    losses[name] = self._incubate(slot, closure, scaler)
        return losses

    def _incubate(self, slot: SeedSlot, closure: Callable[[], Tensor], scaler: Any) -> Tensor:
        seed = cast("nn.Module", slot.seed)
        with kept_whole(seed), slot.forced(ForwardMode.REPLACE):
            seed.train()
            try:
                loss = closure()
                scaled = scaler.scale(loss) if scaler is not None else loss
                # Asked after the forward, which puts whole parameters in the place of shards.
                learning = [p for p in self.seed_parameters(slot.name) if p.requires_grad]
                give_gradient(scaled, learning)
            finally:
                seed.eval()
                reshard(self)
        return loss.detach()

    def evaluate_with(
        self, evaluator: Evaluator | None, *, higher_is_better: bool = False, fixed_samples: bool = True
    ) -> None:
        """Give the gates held-out samples to decide on.

        Args:
            evaluator: Returns the loss of every sample, ``(n,)``, of the same samples in the same order at every call,
                computed with this model. It runs in eval mode without gradients, three times a measurement. The
                samples must not be trained on, and must not depend on each other: of text a sequence is a sample.
            higher_is_better: Whether it returns a metric that grows with quality instead of a loss.
            fixed_samples: Whether the samples are the same in every epoch. If each epoch draws others, still the same
                within it, losses of different epochs are never paired.

        Raises:
            TypeError: If it cannot be called. One that fails later is told of in a `MisuseWarning`, once.
        """
        given = GateSamples(evaluator, higher_is_better, fixed_samples) if evaluator is not None else None
        if None not in (given, self._gate_samples):  # other samples than those that were measured
            for slot in self.slots.values():
                slot.forget_host_losses()
        self._gate_samples = given

    @property
    def _evaluator(self) -> Evaluator | None:
        return self._gate_samples.evaluator if self._gate_samples is not None else None

    @property
    def replay_faults(self) -> dict[str, str]:
        """By slot, why a measurement runs the part of the host before the slot in every pass; empty if none does."""
        return dict(self._measurer.faults)

    @property
    def is_replaying(self) -> bool:
        """Whether a pass of a measurement goes on in which the part of the host before a slot does not run.

        An evaluator that counts what a pass costs must tell the two apart.
        """
        return self._measurer.is_replaying

    def measure(
        self, slot: str, evaluator: Evaluator | None = None, *, higher_is_better: bool = False
    ) -> SeedEvidence | None:
        """Measure a slot's seed on held-out samples, with it at alpha 1 and smaller alphas, and without it.

        Args:
            slot: Name of the slot.
            evaluator: Other samples than the gates', measured now. Default the gates', measured once an epoch.
            higher_is_better: Whether ``evaluator`` returns a metric that grows with quality.

        Returns:
            The evidence, or ``None`` if the slot has no active seed or there is no evaluator.

        Raises:
            TypeError: If the evaluator cannot be called, or returns no tensor.
            ValueError: If it returns no vector of at least two numbers.
        """
        chosen = self.slots[slot]
        if evaluator is None:
            return chosen.measure()
        if not chosen.is_active:
            return None
        alphas = self.growth_config.gates.thresholds.smaller_alphas
        return self._measurer.measure(chosen, GateSamples(evaluator, higher_is_better), alphas).evidence

    def screen(self, evaluator: Evaluator | None = None) -> dict[str, PairedGain]:
        """Measure the first-order gain of every incubating seed, in one forward and backward. See `screening.screen`.

        Args:
            evaluator: Other samples than the gates'.

        Returns:
            By slot, the gain per unit of alpha as the seed begins to blend; empty if none incubates.

        Raises:
            ValueError: If there is no evaluator, or its losses carry no graph.
        """
        names = [slot.name for slot in self.slots.values() if slot.is_apart]
        return screen(self, self._samples_of(evaluator), names) if names else {}

    def attribute(
        self,
        slots: Iterable[str] | None = None,
        evaluator: Evaluator | None = None,
        *,
        permutations: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Attribution:
        """Say whom of several seeds, fossils too, a joint gain is due to. See `attribution.attribute`.

        Args:
            slots: Names of slots, or one name; ``None`` for all with an active seed.
            evaluator: Other samples than the gates'.
            permutations: Orders to draw where there are more than 5 seeds.
            generator: What to draw them with.

        Raises:
            ValueError: If there is no evaluator, nothing to attribute to, or too many seeds for every subset.
        """
        return attribute(
            self, self._samples_of(evaluator), slots, permutations=permutations, generator=generator
        )

    def _samples_of(self, evaluator: Evaluator | None) -> GateSamples:
        samples = self._gate_samples if evaluator is None else GateSamples(evaluator)
        if samples is None:
            raise ValueError("There are no held-out samples: give an evaluator, here or with evaluate_with.")
        return samples

    @contextmanager
    def bypassed(self, slot: str) -> Iterator[MorphogeneticModel]:
        """Run the block with the model as it would be without that slot's seed, fossils included."""
        with self.slots[slot].forced(ForwardMode.PASS):
            yield self

    @contextmanager
    def _evaluation(self) -> Iterator[None]:
        try:
            with quiet_evaluation(self):
                yield
        finally:
            for slot in self.slots.values():
                slot._refresh_mode()

    # -- events ----------------------------------------------------------------------------------------------------

    def emit_to(self, telemetry: EventTarget | None) -> None:
        """Send events to ``telemetry`` from now on; ``None`` stops them.

        Raises:
            TypeError: If it takes no events; a sink goes into a `Telemetry` first.
        """
        self._telemetry = _event_target(telemetry)

    def listen(self, listener: SeedParameterListener) -> None:
        """Tell ``listener`` of parameters that come and go."""
        self._listeners.append(listener)

    def _tied_optimizers(self) -> list[Optimizer]:
        tied = (getattr(listener, "optimizer", None) for listener in self._listeners)
        return [optimizer for optimizer in tied if isinstance(optimizer, Optimizer)]

    def _emit(self, event: TelemetryEvent) -> None:
        if self._telemetry is not None:
            self._telemetry.emit(replace(event, epoch=self.epoch, sequence=self._sequence))
        self._sequence += 1

    def telemetry_records(self) -> list[SeedTelemetry]:
        """Return the record of every seed at this moment, as plain data."""
        records = (slot.telemetry(self.epoch) for slot in self.slots.values())
        return [record for record in records if record is not None]

    # -- summary ---------------------------------------------------------------------------------------------------

    def summary(self) -> list[SlotSummary]:
        """Return one row a slot: stage, blueprint, alpha, parameters, trainable share."""
        trainable = sum(p.numel() for p in self.parameters() if p.requires_grad)
        rows = []
        for slot in self.slots.values():
            parameters = self.seed_parameters(slot.name)
            own = sum(p.numel() for p in parameters if p.requires_grad)
            rows.append(
                SlotSummary(
                    slot=slot.name,
                    stage=slot.stage.name,
                    blueprint=slot.state.blueprint_id
                    if slot.seed is not None and slot.state is not None
                    else "",
                    alpha=slot.alpha,
                    parameters=sum(p.numel() for p in parameters),
                    trainable_share=own / trainable if trainable else 0.0,
                )
            )
        return rows

    def summary_table(self) -> str:
        """Return `summary` as aligned text, the host in the last line."""
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
            for r in self.summary()
        ]
        host = sum(p.numel() for p in self.host_parameters())
        learns = any(p.requires_grad for p in self.parameters())
        share = 1.0 - sum(r.trainable_share for r in self.summary()) if learns else 0.0
        rows.append(("(host)", "-", type(self.host).__name__, "-", f"{host:,}", f"{share:.1%}"))
        widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
        return "\n".join(
            "  ".join(
                cell.rjust(w) if i > 2 else cell.ljust(w)
                for i, (cell, w) in enumerate(zip(row, widths, strict=True))
            )
            for row in [head, *rows]
        )

    # -- persistence -----------------------------------------------------------------------------------------------

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load weights and topology: seeds are rebuilt, or removed, as the saved model had them.

        Raises:
            KasminaError: If a saved seed cannot be rebuilt.
            RuntimeError: If keys or shapes differ, as in torch. In both cases the model is as before.
        """
        self._misuse.restart()
        with self._undone_on_error() as before:
            listeners, self._listeners = self._listeners, []
            try:
                if assign:
                    self._leave_meta(state_dict)
                result = super().load_state_dict(without_wrapper(state_dict), strict, assign)
                if assign:
                    for slot in self.slots.values():
                        dtype = _parameter_dtype(self.host, slot.point.path, slot.alpha_buffer.dtype)
                        slot.alpha_buffer = torch.full_like(slot.alpha_buffer, slot.alpha, dtype=dtype)
            finally:
                self._listeners = listeners
            before.tell(listeners)
        return result

    @contextmanager
    def _undone_on_error(self) -> Iterator[ModelBefore]:
        """Undo what the block does to host and slots if it raises; a block inside of another is part of that."""
        if self._before is not None:
            yield self._before
            return
        self._before = ModelBefore(self.host, self.slots.values())
        try:
            yield self._before
        except BaseException:
            self._before.put_back()
            raise
        else:
            self._snapshots, self._kept_seeds = {}, {}
        finally:
            self._before = None

    def _leave_meta(self, state_dict: Mapping[str, Any]) -> None:
        """Move what no file holds off the meta device, to where the assigned tensors are."""
        devices = [
            t.device
            for key, t in state_dict.items()
            if isinstance(t, Tensor) and not key.endswith("_extra_state")
        ]
        for slot in self.slots.values():
            if slot.device.type == "meta" and devices:
                slot.alpha_buffer = torch.zeros_like(slot.alpha_buffer, device=devices[0])
                for name in ("deviation", "training_deviation"):
                    setattr(slot, name, torch.zeros_like(slot.deviation, device=devices[0]))

    def __getstate__(self) -> dict[str, Any]:
        # What points at the outside (sinks, loaders, optimisers) does not travel with a copy.
        return self.__dict__ | {
            "_telemetry": None,
            "_gate_samples": None,
            "_measurer": None,
            "_untracked": None,
            "_misuse": None,
            "_before": None,
            "_listeners": [],
            "_snapshots": {},
            "_kept_seeds": {},
            "_agreement": ALONE,
            "_gather_samples": own_samples,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]  # torch
        self._measurer = SeedMeasurer(self)
        self._untracked = UntrackedSeeds(slot.name for slot in self.slots.values() if slot.seed is not None)
        self._misuse = Misuse()
        self._listeners = [self._untracked]
        self._own_slots()


class _Owner:
    """What a slot sees of its model; no module, so that the model is not a child of its slots."""

    def __init__(self, model: MorphogeneticModel) -> None:
        self._model = model

    def emit(self, event: TelemetryEvent) -> None:
        self._model._emit(event)
        if isinstance(event, StageChanged | AlphaChanged):
            self._model._graphs.look(self._model.slots.values())

    def measure(
        self, slot: SeedSlot, host_losses: Tensor | None
    ) -> tuple[SeedEvidence, Tensor | None] | None:
        self._model._graphs.look(self._model.slots.values(), measured=slot)
        samples = self._model._gate_samples
        if samples is None:
            return None
        thresholds = slot.config.gates.thresholds
        asked = slot.is_incubating and thresholds.prove_before_blending
        alphas = thresholds.smaller_alphas if asked else ()
        try:
            measured = self._model._measurer.measure(slot, samples, alphas, host_losses)
        except Exception as error:
            self._model._misuse.note_failure(slot, error)
            raise
        self._model._misuse.note_measurement(self._model, slot, measured)
        return measured.evidence, measured.without

    def screen(self, slot: SeedSlot) -> PairedGain | None:
        model = self._model
        if model._gate_samples is None:
            return None
        # What cannot be screened is measured in full.
        with suppress(Exception), model._agreement.attempt("first-order screen"):
            return model._screens.of(model, slot, model._gate_samples)
        return None

    def error_share(self, slot: SeedSlot) -> float:
        slots = self._model.slots.values()
        if slot.config.gates.thresholds.error_budget is ErrorBudget.PER_RUN:
            if slot.stage is not SeedStage.GERMINATED:
                return slot.notes.error_share
            number = sum(each.germinations for each in slots)
            return 1.0 / (number * (number + 1))
        return 1.0 / sum(SeedStage.GERMINATED <= each.stage <= SeedStage.PROBATIONARY for each in slots)

    def measure_isolation(self, slot: SeedSlot) -> IsolationReading:
        reading = GradientIsolationMonitor(self._model.host.named_parameters()).measure(slot)
        return self._model._agreement.isolation(slot, reading)

    def command(self, slot: SeedSlot, text: str) -> AbstractContextManager[None]:
        return self._model._agreement.command(slot, text)

    def everywhere(self, slot: SeedSlot, what: str, holds: bool) -> bool:
        return self._model._agreement.largest(f"{what} of '{slot.name}'", float(not holds)) == 0.0

    def seed_made(self, slot: SeedSlot, seed: nn.Module, blueprint_id: str) -> None:
        self._model._agreement.seed_made(slot, seed, blueprint_id)

    def largest(self, slot: SeedSlot, what: str, value: float) -> float:
        return self._model._agreement.largest(f"{what} of '{slot.name}'", value)

    def before_move(self, slot: SeedSlot, target: SeedStage) -> None:
        self._model._before_move(slot, target)

    def seed_added(self, slot: SeedSlot, parameters: Sequence[nn.Parameter]) -> None:
        told: list[SeedParameterListener] = []
        try:
            for listener in self._model._listeners:
                listener.seed_added(slot.name, parameters)
                told.append(listener)
            self._model._agreement.seed_accepted(slot)
        except Exception:
            for listener in told:
                listener.seed_removed(slot.name, parameters)
            raise

    def seed_removed(self, slot: SeedSlot, parameters: Sequence[nn.Parameter]) -> None:
        for listener in self._model._listeners:
            listener.seed_removed(slot.name, parameters)


def _event_target(telemetry: EventTarget | None) -> EventTarget | None:
    if telemetry is not None and not callable(getattr(telemetry, "emit", None)):
        raise TypeError(f"{telemetry!r} takes no events. Give a Telemetry, such as Telemetry([sink]).")
    return telemetry


def _parameter_dtype(host: nn.Module, path: str, features: torch.dtype) -> torch.dtype:
    """Dtype for a seed at ``path``: that of the nearest parameters, since autocast may give features another."""
    for module in (submodule(host, path), host):
        for parameter in module.parameters():
            if parameter.is_floating_point():
                return parameter.dtype
    return features


def _strip_host_prefix(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any]
) -> None:
    own = prefix + "host."
    for key in [key for key in state_dict if key.startswith(prefix)]:
        value = state_dict.pop(key)
        state_dict[prefix + key.removeprefix(own) if key.startswith(own) else key] = value
    metadata = getattr(state_dict, "_metadata", None)
    if metadata is not None:
        for key in [key for key in metadata if key.startswith(own)]:
            metadata.setdefault(prefix + key.removeprefix(own), metadata[key])


def _add_host_prefix(
    module: nn.Module,
    state_dict: dict[str, Any],
    prefix: str,
    local_metadata: dict[str, Any],
    strict: bool,
    missing_keys: list[str],
    unexpected_keys: list[str],
    error_msgs: list[str],
) -> None:
    own_name = NamesOf(cast("MorphogeneticModel", module).host)
    given = {key: state_dict.pop(key) for key in list(state_dict) if key.startswith(prefix)}
    for key, value in given.items():
        name = key.removeprefix(prefix)
        while name.startswith(f"{WRAPPER}."):  # the keys of torch.compile(model)
            name = name.removeprefix(f"{WRAPPER}.")
        if not name.startswith(f"{SLOTS_KEY}."):
            name = f"host.{own_name(name)}"
        # Of two keys that mean the same one stays foreign, and is reported.
        state_dict[prefix + name if prefix + name not in state_dict else key] = value
