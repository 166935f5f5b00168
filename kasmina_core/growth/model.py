"""The model: a host with slots in which seeds grow. It wires the rooms; each verb is a short call."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from kasmina_core.blueprints.catalogue import BlueprintRegistry
from kasmina_core.errors import CheckpointError, TransitionError
from kasmina_core.evidence.attribution import Attribution
from kasmina_core.evidence.measuring import Evaluator, GateSamples
from kasmina_core.gates.paired import SeedEvidence
from kasmina_core.gates.sequential import PairedGain
from kasmina_core.growth import commands, incubation, observing
from kasmina_core.growth.agreement import no_inference_mode, verb
from kasmina_core.growth.arguments import event_target, one_number
from kasmina_core.growth.closing import GrowthVerdict, closing_verdict
from kasmina_core.growth.config import GrowthConfig
from kasmina_core.growth.context import EventTarget, Growth, SeedParameterListener
from kasmina_core.growth.plain_data import from_bytes
from kasmina_core.growth.slot import SeedSlot, SeedTelemetry
from kasmina_core.growth.watching.living import one_look
from kasmina_core.hosts import InjectionPoint
from kasmina_core.lifecycle import SeedStage, SeedState
from kasmina_core.policies.protocol import Command, CommandOutcome, Observation, Policy
from kasmina_core.positions import ContextReader
from kasmina_core.probing import ProbedPoint
from kasmina_core.slotted import HAS_SLOTS, SLOTS_KEY, SlotMap, SlottedModel
from kasmina_core.verdicts import GateResult

if TYPE_CHECKING:
    from kasmina_core.packs.discovery import PluginRegistry


class MorphogeneticModel(SlottedModel):
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
        causal: Whether points given by path lie in a causal host, in which position ``t`` must not see positions after
            it; or a mapping that says it of towers: ``{"encoder": False, "decoder": True}``. Default: found by running
            the host with one position changed; where nothing tells, they are causal.
        context: Reads what positions mean off each call of the host: which are padding, which belong to one document,
            which are cached. Seeds that mix positions need it: `EveryPosition`, `TorchTransformer` or a `ContextReader`
            of one's own. Default: the host's ``context_reader()``, if it has one.

    Raises:
        HostError: If a point does not exist, does not fire exactly once, or is not as declared; the host is left as
            it was.
        TypeError: If an argument is something else than that.
    """

    growth: Growth

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
        causal: bool | Mapping[str, bool] | None = None,
        context: ContextReader | None = None,
    ) -> None:
        config = config or GrowthConfig()
        if not isinstance(config, GrowthConfig):
            raise TypeError(f"config must be a GrowthConfig, not {config!r}.")
        telemetry = event_target(telemetry)
        samples = GateSamples(evaluator) if evaluator is not None else None
        blueprints = registry if isinstance(registry, BlueprintRegistry | None) else registry.blueprints

        def make_slot(found: ProbedPoint) -> SeedSlot:
            return SeedSlot(
                found.point, found.shape, config, blueprints, dtype=found.dtype, device=found.device
            )

        super().__init__(host, slots, make_slot, example=example, causal=causal, context=context)
        # Not `config`: trainers take a model's `config` for that of a transformers model.
        self.growth_config = config
        self.register_load_state_dict_pre_hook(_nest_as_saved)  # type: ignore[no-untyped-call]  # torch
        self.register_load_state_dict_post_hook(_offer_slots)  # type: ignore[no-untyped-call]  # torch
        self._grow_with(Growth(self, config, samples, telemetry))

    def _grow_with(self, growth: Growth) -> None:
        self.growth = growth
        for slot in self.slots.values():
            slot.owned_by = weakref.ref(growth)

    @property
    def slots(self) -> SlotMap[SeedSlot]:
        """The slots by name, in the order in which they were asked for."""
        return cast("SlotMap[SeedSlot]", super().slots)

    @property
    def epoch(self) -> int:
        """Epochs the model has stepped."""
        return self.growth.epoch

    @property
    def lost_epochs(self) -> int:
        """Epochs of the host that reverts gave up."""
        return self.growth.lost_epochs

    @property
    def outcomes(self) -> tuple[CommandOutcome, ...]:
        """What became of each command of the policy at the last `follow`, in order."""
        return self.growth.outcomes

    # -- commands --------------------------------------------------------------------------------------------------

    @verb
    def germinate(
        self,
        slot: str,
        blueprint: str,
        seed_id: str | None = None,
        *,
        straight: bool = False,
        **options: Any,
    ) -> SeedState:
        """Make a seed in a slot. See `SeedSlot.germinate`.

        With ``straight=True`` it contributes at once, before anything is proved: proof after in place of proof before.
        The host is kept, so that ``cull(slot, revert=True)`` puts it back, bit for bit.

        The global random generators are borrowed for a moment: a thread that draws from them meanwhile draws others.
        """
        self.demand_slots()
        state = self.slots[slot].germinate(blueprint, seed_id, straight=straight, **options)
        self.follow_modules()
        return state

    @verb
    def open_slot(self, slot: str) -> SeedSlot:
        """Open a further slot at a point whose seeds are all fossils: behind the last one, for growth that goes on.

        It is called after its point and has a number: ``block2__2`` behind ``block2``, then ``block2__3``. It is a slot as
        any other: seeds in it see the host with the fossils before it. Checkpoints, ``state_dict`` and copies hold it, so
        a load opens it again. ``GrowthConfig(nested_slots=n)`` opens up to ``n`` at each point by itself, each when the
        seed before it becomes a fossil.

        Args:
            slot: Name of any slot at the point.

        Returns:
            The new slot.

        Raises:
            TransitionError: If the last slot at the point holds no fossil.
            HostError: If a slot elsewhere has the name.
        """
        self.demand_slots()
        last = self.chain_of(self.slots[slot])[-1]
        with self.growth.command(last, f"open_slot({slot!r})"):
            if last.stage is not SeedStage.FOSSILIZED:
                raise TransitionError(
                    f"No slot can be opened behind '{last.name}', which is {last.stage.name}: the seed there must be a "
                    "fossil, since what is behind it learns from its output.\n"
                    f"Germinate in '{last.name}', or advance its seed, first."
                )
            return cast("SeedSlot", self.open_behind(last))

    @verb
    def advance_stage(self, slot: str, target: SeedStage | None = None) -> GateResult:
        """Ask the gate for the next stage of a slot's seed. See `SeedSlot.advance_stage`."""
        self.follow_modules()
        return self.slots[slot].advance_stage(target)

    @verb
    def regerminate(self, slot: str) -> SeedState:
        """Make the seed that was put aside in a slot again, with the weights it had; it starts at GERMINATED.

        Raises:
            GerminationError: If none was put aside (``cull(slot, keep=True)``; `save_checkpoint` saves it, a ``state_dict``
                or a copy of the model does not), the slot is not dormant, or the weights do not fit. No seed is there then.
        """
        return commands.regerminate(self.growth, self.slots[slot])

    @verb
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
        commands.cull(self, self.growth, self.slots[slot], reason, revert=revert, keep=keep)

    def can_revert(self, slot: str) -> bool:
        """Say whether culling a slot's seed now could put the host back."""
        return not self.growth.obstacle_to_revert(self.slots[slot])

    @no_inference_mode()
    def step(self) -> None:
        """Let one optimiser step pass: after ``backward``, before the optimiser clears the gradients."""
        growth = self.growth
        growth.untracked.look(self, growth.tied_optimizers)
        growth.agreement.gradients(is_step=True)
        growth.steps += 1
        if growth.misuse.awaits_step or (self.training and not growth.misuse.was_in_training):
            growth.misuse.note_step(self)
        for slot in self.slots.values():
            if slot.seed is not None:
                slot.step()

    @verb
    def step_epoch(
        self,
        metric: float | Tensor | None = None,
        *,
        flops: float | None = None,
        budget: float | None = None,
    ) -> dict[str, GateResult]:
        """Let one epoch pass in every slot. See `SeedSlot.step_epoch`.

        An epoch that is interrupted, by an exception or a signal's, did not happen: epoch, metrics, alphas, gates and
        stages are as before the call, and its events are not sent. Called again it does what it would have done.

        Args:
            metric: Validation metric of the whole model, one number.
            flops: Training FLOPs since the start of the run, for the `EpochEnded` event and policies.
            budget: Training FLOPs that the run may spend in all, for policies.

        Returns:
            By slot, what the gate of this epoch said, where one was asked.

        Raises:
            TypeError: If the metric is no number.
            ValueError: If it is a tensor of several.
        """
        growth = self.growth
        self.follow_modules()
        value = one_number(metric) if metric is not None else None
        growth.untracked.look(self, growth.tied_optimizers)
        results = {}
        growth.misuse.epoch_ends(self)
        with growth.whole_epoch(), growth.command(None, "step_epoch"):
            growth.last_metric = value = growth.agreement.metric(value)
            growth.epoch += 1
            growth.flops, growth.budget = flops, budget
            growth.note_metric(value)
            for name, slot in self.slots.items():
                if slot.state is not None and (result := slot.step_epoch(value)) is not None:
                    results[name] = result
            growth.emit(observing.epoch_ended(self, growth))
        growth.journal.note_metric(value, growth.epoch, self.growth_config.higher_is_better)
        growth.journal.note_epoch(self.slots.values(), results, growth.untracked.forgotten)
        growth.misuse.epoch_ended(self, results, growth.tied_optimizers)
        return results

    @verb
    def execute(self, command: Command) -> SeedState | GateResult | None:
        """Carry out one command of a policy.

        Returns:
            The new seed's state, what the gate said, or ``None``, as the command is.

        Raises:
            TransitionError: If the command is not allowed now.
            TypeError: If it is no command.
        """
        return commands.execute(self, command)

    @verb
    def follow(self, policy: Policy) -> list[Command]:
        """Ask a policy once and carry out its commands, in order; call it after `step_epoch`.

        A command is refused if a gate does not pass, or the command is not allowed or not possible now. It changes
        nothing then, and the next one is carried out. `outcomes` and a `CommandRefused` event say why.

        Returns:
            The commands that were carried out; the reason of one that put the host back says by how many epochs.

        Raises:
            TypeError: If it is no policy, or decides on something else than a list of commands; nothing is carried out.
            HostError: If the host lacks the module of a slot.
            DistributedError: If the processes of a job do not agree. Whatever is raised while commands are carried out
                has a note that says how many were not; `outcomes` has those before.

        Warns:
            MisuseWarning: If something else than a gate refused a command, once per kind of command and slot; or if
                the policy remembers nothing of a model that was loaded.
        """
        self.growth.misuse.note_policy(policy)
        return commands.follow(self, policy)

    # -- learning and measuring ------------------------------------------------------------------------------------

    @no_inference_mode()
    def incubate(self, closure: Callable[[], Tensor], scaler: Any = None) -> dict[str, Tensor]:
        """Run the counterfactual pass: each incubating seed learns from the loss its own output would give.

        For each seed in TRAINING (``Incubation.COUNTERFACTUAL``) the closure runs once more with the slot's output
        replaced by the seed's; the gradient of that loss goes to the seed's parameters and nowhere else. The host is
        in eval mode meanwhile, so that no statistics move, and random numbers are as before.

        With ``GrowthConfig(joint_incubation=True)`` seeds that learn in the same call share one pass: the batch is split
        in as many parts as there are seeds, and in each part another seed is in place. A seed's gradient is that of the
        loss of its part, ``n / n_part`` times its share in the mean over the ``n`` samples. That takes a loss which is a
        mean over samples, each by itself, and a host in which no sample depends on another in eval mode. The first
        time that a seed learns it is tried: a second pass disturbs the other samples, and a `MisuseWarning` says if
        that changes what the seed learns. Such a seed learns as without it, and so do
        all seeds of models with sharded parameters. A batch with fewer samples than seeds, or than twice as many where
        one has batch normalisation, takes more passes.

        A call that raises did not happen: no gradient is left of it, and ``incubate_every`` does not count it.

        Call it before the optimiser step, with the same batch or a part of it. With
        ``GrowthConfig(incubate_every=k)`` a seed learns in one call of ``k``. With straight-through incubation, or where no seed
        incubates, nothing runs, so a training loop may always call it.

        Args:
            closure: Returns the scalar loss of this model on a batch.
            scaler: A ``torch.amp.GradScaler`` whose scale the gradients are to carry, if one is in use.

        Returns:
            The loss with the seed, by slot; detached. Seeds that shared a pass have its loss, with all of them in place.

        Raises:
            HostError: If the host uses reentrant gradient checkpointing, which cannot give the gradient to chosen
                parameters; use ``use_reentrant=False``.
            TypeError: If the closure cannot be called.
        """
        return incubation.incubate(self, self.growth_config, closure, scaler)

    def evaluate_with(
        self, evaluator: Evaluator | None, *, higher_is_better: bool = False, fixed_samples: bool = True
    ) -> None:
        """Give the gates held-out samples to decide on.

        What the evaluator closes over lives as long as the model, or until other samples are given. If that is the model
        itself, the two wait for Python's collector.

        Args:
            evaluator: Returns the loss of every sample, ``(n,)``, of the same samples in the same order at every call,
                computed with this model. It runs in eval mode without gradients, three times a measurement. The
                samples must not be trained on, and must not depend on each other: of text a sequence is a sample.
            higher_is_better: Whether it returns a metric that grows with quality instead of a loss.
            fixed_samples: Whether the samples are the same in every epoch. If each epoch draws others, still the same
                within it, losses of different epochs are never paired.

        Raises:
            TypeError: If it cannot be called. One that fails later is reported in a `MisuseWarning`, once.
        """
        given = GateSamples(evaluator, higher_is_better, fixed_samples) if evaluator is not None else None
        self.growth.examiner.use(given)
        self.growth.misuse.forget_evaluator()
        self.growth.journal.doubts.clear()

    @property
    def replay_faults(self) -> dict[str, str]:
        """By slot, why a measurement runs the part of the host before the slot in every pass; empty if none does."""
        return dict(self.growth.examiner.measurer.faults)

    @property
    def is_replaying(self) -> bool:
        """Whether a pass of a measurement goes on in which the part of the host before a slot does not run.

        An evaluator that counts what a pass costs must tell the two apart.
        """
        return self.growth.examiner.measurer.is_replaying

    @verb
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
        samples = GateSamples(evaluator, higher_is_better)
        return self.growth.examiner.measurer.measure(chosen, samples, alphas).evidence

    @verb
    def screen(self, evaluator: Evaluator | None = None) -> dict[str, PairedGain]:
        """Measure the first-order gain of every incubating seed, in one forward and backward. See `screening.screen`.

        Args:
            evaluator: Other samples than the gates'.

        Returns:
            By slot, the gain per unit of alpha as the seed begins to blend; empty if none incubates.

        Raises:
            ValueError: If there is no evaluator, or its losses carry no graph.
        """
        return self.growth.examiner.screen(evaluator)

    @verb
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
            permutations: Orders to draw instead of trying every subset, at least 2; needed for more than 5 seeds.
            generator: What to draw them with.

        Raises:
            ValueError: If there is no evaluator, a slot has no active seed, there is none at all, there are too many for
                every subset, or permutations lack a generator.
        """
        return self.growth.examiner.attribute(slots, evaluator, permutations, generator)

    # -- events and pictures ---------------------------------------------------------------------------------------

    def emit_to(self, telemetry: EventTarget | None) -> None:
        """Send events to ``telemetry`` from now on; ``None`` stops them.

        Raises:
            TypeError: If it takes no events; a sink goes into a `Telemetry` first.
        """
        self.growth.telemetry = event_target(telemetry)

    def listen(self, listener: SeedParameterListener) -> None:
        """Call ``listener`` when parameters come and go."""
        self.growth.listeners.append(listener)

    def telemetry_records(self) -> list[SeedTelemetry]:
        """Return the record of every seed at this moment, as plain data."""
        records = (slot.telemetry(self.epoch) for slot in self.slots.values())
        return [record for record in records if record is not None]

    def observe(self) -> Observation:
        """Return what a policy may look at, as plain data."""
        return observing.observe(self, self.growth, self.growth_config)

    def summary(self) -> list[observing.SlotSummary]:
        """Return one row per slot: stage, blueprint, alpha, parameters, trainable share."""
        return observing.summary(self)

    def summary_table(self) -> str:
        """Return `summary` as aligned text, the host in the last line."""
        return observing.summary_table(self)

    def verdict(self, training_metric: float | None = None) -> GrowthVerdict:
        """Say why growth ended as it did, in at most three sentences with figures.

        Of a run without a kept seed: whether something is set up wrongly (no epoch was stepped, the metric is NaN, missing,
        always the same or of the other direction, seeds have no gradient or are in no optimiser, gates have no samples), the
        host fits its training data and has capacity to spare, there were too few held-out samples (and how many would be
        needed), the metric never was on a plateau, or one check refused the seeds. Of others: what stayed, and which of it
        is unproved, because it was kept in the last 5 epochs. See `GrowthCause`.

        Args:
            training_metric: The metric of the last epoch, as given to `step_epoch`, but on training data. Without it nothing
                is said of how well the host fits them.
        """
        growth = self.growth
        return closing_verdict(
            growth.journal,
            growth.epoch,
            growth.last_metric,
            training_metric,
            self.growth_config.higher_is_better,
            growth.lost_epochs,
        )

    # -- persistence -----------------------------------------------------------------------------------------------

    @no_inference_mode()
    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load weights and topology: seeds are rebuilt, or removed, as the saved model had them.

        A seed that differs in values alone stays, and they are copied into its parameters.

        Raises:
            KasminaError: If a saved seed cannot be rebuilt.
            RuntimeError: If keys or shapes differ, as in torch, or ``strict=False`` leaves out a tensor of a seed that must
                be built. In both cases the model is as before.

        Warns:
            MisuseWarning: If fossils go because the state is that of a bare host.
        """
        growth = self.growth
        growth.misuse.restart()
        with growth.undone_on_error() as before:
            # A slot reports its seed when it is rebuilt, before the load can fail: listeners are called once it is whole.
            listeners, growth.listeners = growth.listeners, []
            try:
                result = super().load_state_dict(state_dict, strict, assign)
            finally:
                growth.listeners = listeners
            with one_look():  # many seeds change at once, and each look is a walk over the heap
                before.call(listeners, self.slots.values())
        growth.misuse.awaits_memory = any(slot.seed is not None for slot in self.slots.values())
        return result

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"growth": self.growth.in_a_copy()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        copied: Any = self.growth
        growth = Growth(self, self.growth_config)
        vars(growth).update(copied)
        self._grow_with(growth)


def _nest_as_saved(
    model: nn.Module,
    state_dict: Mapping[str, Any],
    prefix: str,
    local_metadata: Mapping[str, Any],
    *_others: object,
) -> None:
    """Open and close slots behind fossils, as the records say; a damaged one is reported by its slot."""
    grown = cast("MorphogeneticModel", model)
    has_slots = HAS_SLOTS in local_metadata or any(
        key.startswith(f"{prefix}{SLOTS_KEY}.") for key in state_dict
    )
    grown.growth.misuse.note_load(() if has_slots else grown.slots.values())

    def has_behind(name: str) -> bool:
        record = state_dict.get(f"{prefix}{SLOTS_KEY}.{name}._extra_state")
        if isinstance(record, Tensor):
            try:
                record = from_bytes(record, f"The saved state of slot '{name}'")
            except CheckpointError:
                return False
        return isinstance(record, Mapping) and record.get("slot_behind") is True

    grown.nest(has_behind)


def _offer_slots(model: nn.Module, _keys: object) -> None:
    growth = cast("MorphogeneticModel", model).growth
    growth.offer_slots()
    growth.misuse.loaded()
