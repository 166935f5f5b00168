"""Training that grows: modules put in by hand, and the lifecycle."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, final

from torch import Tensor, nn

from benchmarks.growth.arms import Arm
from benchmarks.growth.blueprints import registry
from benchmarks.growth.settings import Setting, make_host
from benchmarks.growth.training import Training
from kasmina_core import (
    BanditPolicy,
    FixedTimesPolicy,
    GateCheckSpec,
    GateProfile,
    GateThresholds,
    Germinate,
    GrowthConfig,
    Incubation,
    InjectionPoint,
    MorphogeneticModel,
    Observation,
    PlateauPolicy,
    Policy,
    QualityGates,
    RampUnit,
    SeedStage,
    SlotObservation,
    StartComparison,
    TelemetryEvent,
    TournamentPolicy,
    tie_optimizer,
)
from kasmina_core.events import SeedCulled, SeedFossilized, SeedGerminated, StageChanged
from kasmina_core.experiments.flops import flop_counter
from kasmina_core.quiet import derived_seed, private_rng


@final
@dataclass(frozen=True, slots=True)
class Recipe:
    """What ours is run with; chosen on validation losses, the same for every task.

    Attributes:
        patience: Intervals without improvement that make a plateau.
        min_delta: Smallest improvement that counts, as a share of the loss.
        together: Seeds, or inserted modules, that start at the same time, each in a slot of its own.
        min_training: Intervals in TRAINING before G2.
        training: Intervals in TRAINING after which a refused seed is culled.
        seed_rate: Learning rate of a seed in TRAINING over the host's.
        every: Steps of which one incubates.
        contest: Intervals in TRAINING of a contender in a tournament.
        ramp: Intervals of the alpha ramp.
        probation: Intervals in the stages after the ramp after which a refused seed is culled.
        embargo: Intervals that a slot cools down.
        own_schedule: Whether a seed that is not yet kept is spared the host's decay of the learning rate.
        lenient: Whether G2 asks no more of a seed than that it does no harm, and leaves the proof to G5.
        max_harm: Standard errors of harm that G2 and G4 let pass.
        min_gain: Gain that G5 asks of each of the last intervals of probation, besides the proof.
        start: What G5 asks of the model against its host as it was when blending began.
        last: Share of the budget after which nothing new grows or is put in: it would not be done in time.
    """

    patience: int = 3
    min_delta: float = 0.01
    together: int = 2
    min_training: int = 1
    training: int = 8
    seed_rate: float = 0.3
    every: int = 1
    contest: int = 3
    ramp: float = 2.0
    probation: int = 12
    embargo: int = 1
    own_schedule: bool = False
    lenient: bool = True
    max_harm: float = 2.0
    min_gain: float = -math.inf
    start: StartComparison = StartComparison.NO_HARM
    last: float = 0.7


RECIPE: Final = Recipe()


def make_policy(setting: Setting, arm: Arm, seed: int, recipe: Recipe, spent: Callable[[], float]) -> Policy:
    """Build the policy of an arm; ``spent`` says how much of the budget is gone."""

    def blueprints(slot: SlotObservation) -> Sequence[str]:
        if spent() > recipe.last:
            return ()
        return setting.blueprints(arm.pool, slot.slot, seed)

    care = {"max_training_epochs": recipe.training, "max_probation_epochs": recipe.probation}
    plateau = {"patience": recipe.patience, "min_delta": recipe.min_delta}
    match arm.policy:
        case "times":
            epochs = [round(share * setting.intervals) for share in setting.times]
            return FixedTimesPolicy(blueprints, epochs=epochs, **care)
        case "bandit":
            return BanditPolicy(blueprints, seed=derived_seed(seed, "bandit"), **plateau, **care)
        case "tournament":
            return TournamentPolicy(blueprints, incubation_epochs=recipe.contest, **plateau, **care)
        case "plateau":
            return PlateauPolicy(blueprints, max_growing=recipe.together, **plateau, **care)


class Inserted(nn.Module):
    """A part of a host with a module behind it."""

    def __init__(self, part: nn.Module, module: nn.Module) -> None:
        super().__init__()
        self.part, self.module = part, module

    def forward(self, x: Tensor) -> Tensor:
        """Return the module's output for the part's."""
        out: Tensor = self.module(self.part(x))
        return out


def make_module(point: InjectionPoint, blueprint: str, seed: int, *, random: bool = False) -> nn.Module:
    """Build a blueprint's module by hand; ``random`` draws its last layer as torch would."""
    blueprints = registry()
    options = {"causal": point.causal} if blueprints.get(blueprint).spec.takes_causal else {}
    with private_rng(derived_seed(seed, "inserted", point.name)):
        module = blueprints.create(blueprint, point.dim, **options)
        for part in module.modules() if random else ():
            if part is not module and hasattr(part, "reset_parameters"):
                part.reset_parameters()
    return module


def insert(host: nn.Module, point: InjectionPoint, module: nn.Module) -> None:
    """Put a module behind a part of the host."""
    parent, _, leaf = point.path.rpartition(".")
    setattr(host.get_submodule(parent), leaf, Inserted(host.get_submodule(point.path), module))


class InsertionTraining(Training):
    """Puts a module in when the policy would germinate, and keeps it."""

    def __init__(self, setting: Setting, host: nn.Module, arm: Arm, recipe: Recipe, *args: Any) -> None:
        super().__init__(setting, host, *args)
        self.arm = arm
        self.points = {point.name: point for point in host.injection_points()}
        self.kept: dict[str, str] = {}
        self.policy = make_policy(setting, arm, self.seed, recipe, lambda: self.spent)

    @property
    def shape(self) -> Hashable:
        return tuple(sorted(self.kept.items()))

    def factor(self, group: dict[str, Any]) -> float:
        if self.arm.warmup and "born" in group:
            return min(1.0, (self.steps - group["born"] + 1) / (self.arm.warmup * self.setting.interval))
        return 1.0

    def look(self, val_loss: float, val_accuracy: float) -> None:
        slots = tuple(
            SlotObservation(
                name,
                point.topology,
                point.dim,
                SeedStage.FOSSILIZED if name in self.kept else SeedStage.DORMANT,
            )
            for name, point in self.points.items()
        )
        for command in self.policy.decide(Observation(self.intervals, val_loss, False, 0, 0, slots)):
            assert isinstance(command, Germinate)
            self.put_in(command.slot, command.blueprint)

    def put_in(self, slot: str, blueprint: str) -> None:
        """Put a module in and tell the optimiser."""
        module = make_module(self.points[slot], blueprint, self.seed, random=self.arm.random)
        insert(self.module, self.points[slot], module)
        self.optimizer.add_param_group({"params": list(module.parameters()), "born": self.steps})
        self.kept[slot] = blueprint
        self.log.append((self.intervals, slot, "kept", blueprint))


def gates_of(arm: Arm, recipe: Recipe, extra: Sequence[GateCheckSpec] = ()) -> QualityGates:
    """Return the gates of an arm."""
    if arm.gates is GateProfile.REPORT:
        return QualityGates(arm.gates, extra_checks=extra)
    thresholds = GateThresholds.proof_in_probation() if recipe.lenient else GateThresholds()
    thresholds = replace(
        thresholds,
        min_training_epochs=recipe.min_training,
        against_start=recipe.start,
        max_harm_t=recipe.max_harm,
        min_gain=recipe.min_gain,
    )
    return QualityGates(thresholds=thresholds, extra_checks=extra)


def config_of(
    setting: Setting,
    arm: Arm,
    recipe: Recipe,
    seed: int,
    extra: Sequence[GateCheckSpec] = (),
) -> GrowthConfig:
    """Return how an arm treats its seeds."""
    report = arm.gates is GateProfile.REPORT
    return GrowthConfig(
        incubation=arm.incubation,
        incubate_every=recipe.every,
        max_deviation=math.inf if report else 0.1,
        ramp_unit=RampUnit.STEP,
        ramp_steps=max(1, round(recipe.ramp * setting.interval)),
        embargo_epochs=recipe.embargo,
        higher_is_better=report,
        gates=gates_of(arm, recipe, extra),
        keep_snapshot=not report,
        seed=derived_seed(seed, "seeds"),
    )


class LifecycleTraining(Training):
    """Grows seeds; every pass of the lifecycle is charged."""

    def __init__(
        self,
        setting: Setting,
        host: nn.Module,
        arm: Arm,
        recipe: Recipe,
        seed: int,
        *rest: Any,
        config: GrowthConfig | None = None,
    ) -> None:
        config = config or config_of(setting, arm, recipe, seed)
        self.model = MorphogeneticModel(host, config=config, registry=registry(), telemetry=self)
        super().__init__(setting, self.model, seed, *rest)
        tie_optimizer(self.model, self.optimizer)
        self.arm, self.recipe = arm, recipe
        self.policy: Policy | None = make_policy(setting, arm, seed, recipe, lambda: self.spent)
        self.model.evaluate_with(lambda: self.losses("gate", charged=True))

    def emit(self, event: TelemetryEvent) -> None:
        """Write down what became of a seed."""
        if isinstance(event, SeedGerminated):
            self.log.append((self.intervals, event.slot, "germinated", event.blueprint_id))
        elif isinstance(event, SeedFossilized):
            self.log.append((self.intervals, event.slot, "kept", event.blueprint_id))
        elif isinstance(event, SeedCulled):
            self.log.append((self.intervals, event.slot, f"culled in {event.stage}", event.blueprint_id))
        elif isinstance(event, StageChanged) and event.after == "BLENDING":
            self.log.append((self.intervals, event.slot, "blending", ""))

    @property
    def shape(self) -> Hashable:
        return tuple(
            (slot.mode, slot.is_incubating, slot.state.blueprint_id if slot.state is not None else "")
            for slot in self.model.slots.values()
        )

    def factor(self, group: dict[str, Any]) -> float:
        if "kasmina_slot" not in group:
            return 1.0
        stage = self.model.slots[group["kasmina_slot"]].stage
        rate = self.recipe.seed_rate if stage <= SeedStage.TRAINING else 1.0
        if self.recipe.own_schedule and stage < SeedStage.FOSSILIZED:
            rate /= max(0.01, self.schedule(self.spent))
        return rate

    def after_backward(self, closure: Callable[[], Tensor]) -> None:
        if self.arm.incubation is Incubation.COUNTERFACTUAL:
            self.ledger.charge(("incubate", self.shape), lambda: self.model.incubate(closure))
        self.model.step()

    def losses(self, split: str, *, charged: bool = False) -> Tensor:
        """Return the loss of every sample of a split; charged if the run pays for it."""
        if not charged:
            return super().losses(split)
        # Counted anew each time: a measurement may leave out what it knows already.
        with flop_counter() as counter:
            found = super().losses(split)
        self.ledger.total += counter.get_total_flops()
        return found

    def look(self, val_loss: float, val_accuracy: float) -> None:
        report = self.arm.gates is GateProfile.REPORT
        self.model.step_epoch(100 * val_accuracy if report else val_loss)
        if self.policy is None:
            return
        seen = replace(self.model.observe(), metric=val_loss, higher_is_better=False)
        for command in self.policy.decide(seen):
            self.model.execute(command)


def start(
    setting: Setting,
    arm: Arm,
    host_name: str,
    seed: int,
    lr: float,
    schedule: str,
    budget: float,
    recipe: Recipe = RECIPE,
) -> Training:
    """Build the training of an arm."""
    host = make_host(setting, host_name, seed)
    rest = (seed, lr, schedule, budget)
    match arm.grows:
        case "nothing":
            return Training(setting, host, *rest)
        case "from birth":
            for point in host.injection_points():  # type: ignore[operator]
                insert(host, point, make_module(point, setting.good[0], seed))
            return Training(setting, host, *rest)
        case "insertion":
            return InsertionTraining(setting, host, arm, recipe, *rest)
        case "lifecycle":
            return LifecycleTraining(setting, host, arm, recipe, *rest)
        case "adapter":
            from benchmarks.growth.adapters import AdapterTraining

            return AdapterTraining(setting, host, arm, recipe, *rest)
        case "gromo":
            from benchmarks.growth.gromo_arm import GromoTraining

            return GromoTraining(setting, recipe, *rest)
