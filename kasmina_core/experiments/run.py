"""A run: the same host trained twice, once grown and once alone, for the same training FLOPs."""

from __future__ import annotations

import math
import platform
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from itertools import chain
from statistics import fmean
from typing import Annotated, Any, Final, Protocol, final

import torch
from torch import Tensor, nn

from kasmina_core._version import __version__
from kasmina_core.blueprints.declarations import import_factory
from kasmina_core.checkpoints.growth_state import growth_of, rebuild_growth
from kasmina_core.errors import BlueprintError, CheckpointError, UnknownNameError, did_you_mean
from kasmina_core.events import (
    GatesNotAsked,
    RunStarted,
    SeedCulled,
    SeedFossilized,
    SeedGerminated,
    StageChanged,
    TelemetryEvent,
)
from kasmina_core.experiments.arm import Arm, logits_of
from kasmina_core.experiments.flops import FlopLedger
from kasmina_core.experiments.named import accepted_keywords, called, is_reference, named_object
from kasmina_core.experiments.progress import Beginning, Progress, ProgressFolder, progress_of
from kasmina_core.experiments.record import (
    GROWN,
    HOST_ALONE,
    ArmResult,
    EpochRecord,
    EpochSlot,
    RunRecord,
    SeedRecord,
)
from kasmina_core.experiments.tasks import Task, TaskError
from kasmina_core.gates.paired import SeedEvidence
from kasmina_core.gates.thresholds import GateThresholds
from kasmina_core.growth.config import GrowthConfig
from kasmina_core.growth.context import EventTarget
from kasmina_core.growth.model import MorphogeneticModel
from kasmina_core.hosts import HostProtocol
from kasmina_core.packs.discovery import PluginRegistry, default_registry
from kasmina_core.policies.bundled import BUNDLED, build_policy
from kasmina_core.policies.protocol import (
    Advance,
    Policy,
    SlotObservation,
)
from kasmina_core.quiet import derived_seed, kept_buffers, private_rng, quiet_evaluation
from kasmina_core.readers import EveryPosition
from kasmina_core.records import Count, Mark, Record
from kasmina_core.telemetry import Telemetry
from kasmina_core.telemetry.sinks import for_json
from kasmina_core.topology import Topology
from kasmina_core.verdicts import Finding, GateResult

FINAL_EPOCHS: Final = 5
"""Final figures are means over the models of at most this many last epochs, because one epoch's are noisy."""


@final
@dataclass(frozen=True, slots=True)
class RunSettings(Record):
    """Everything that decides a run; two runs with equal settings on one machine are equal bit for bit.

    Attributes:
        host: Id of the host, ``module:callable`` or ``file.py:callable``; ``None`` for the task's, or the first one of its
            topology.
        slots: Names, paths or globs of points; empty for all that the host declares.
        blueprints: Blueprints to grow from; empty lets the policy choose among all of the topology.
        policy: Name of a bundled policy, or of one from a pack.
        incubation: Value of `Incubation`.
        seed: For the split, the weights, the order of the samples and the seeds.
        device: Torch device.
        proof: ``probation``: the gates are `GateThresholds.proof_in_probation`; ``training``: those of `GateThresholds`,
            which ask for proof before a seed blends in, too.
        nested_slots: How many further slots open at each point, each behind a new fossil.
        sizes: Whether the host is also trained with the kept seeds in it from the start, once for each size that the
            run went through.
    """

    task: str
    host: str | None
    slots: tuple[str, ...]
    blueprints: tuple[str, ...]
    policy: str
    incubation: str
    epochs: int
    batch_size: int
    lr: float
    seed: int
    device: str
    ramp_epochs: float
    host_options: Mapping[str, Any]
    policy_options: Mapping[str, Any] = field(default_factory=dict)
    proof: str = "probation"
    nested_slots: Annotated[Count, Mark.LATER] = 0
    sizes: Annotated[bool, Mark.LATER] = False


class Display(Protocol):
    """Shows how a run goes on; `RunDisplay` is one."""

    def epoch(self, record: EpochRecord) -> None:
        """Show an epoch of the grown arm."""
        ...

    def phase(self, text: str, total: float | None = None) -> None:
        """Show what comes next."""
        ...

    def advance(self, amount: float = 1.0) -> None:
        """Move the phase's progress on."""
        ...


@final
class SeedLog:
    """Records the life of every seed from the events of a model, and passes the events on."""

    def __init__(self) -> None:
        self.onward: EventTarget | None = None
        self._lives: dict[str, dict[str, Any]] = {}
        self.evidence: dict[str, SeedEvidence] = {}
        self._reasons: dict[str, str] = {}
        self._findings: dict[str, tuple[str, Finding]] = {}

    def note(self, seed_id: str, evidence: SeedEvidence | None, verdict: GateResult | None) -> None:
        """Record the evidence of a seed in an epoch, and its gate's verdict."""
        if evidence is not None:
            self.evidence[seed_id] = evidence
        if verdict is not None:
            self._reasons[seed_id] = verdict.reason
            if verdict.finding is not None and verdict.gate is not None:
                self._findings[seed_id] = verdict.gate.name, verdict.finding

    def state_dict(self) -> dict[str, Any]:
        """Return what is remembered as plain data."""
        return {
            "lives": self._lives,
            "reasons": self._reasons,
            "evidence": {seed: evidence.to_dict() for seed, evidence in self.evidence.items()},
            "findings": {seed: [gate, found.to_dict()] for seed, (gate, found) in self._findings.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._lives, self._reasons = dict(state["lives"]), dict(state["reasons"])
        self.evidence = {seed: SeedEvidence.from_dict(found) for seed, found in state["evidence"].items()}
        self._findings = {
            seed: (gate, Finding.from_dict(found)) for seed, (gate, found) in state["findings"].items()
        }

    @property
    def seed_folders(self) -> tuple[str, ...]:
        """See `Telemetry.seed_folders`."""
        return tuple(getattr(self.onward, "seed_folders", ()))

    def emit(self, event: TelemetryEvent) -> None:
        """Record an event."""
        if self.onward is not None:
            self.onward.emit(event)
        if not event.seed_id:
            return
        life = self._lives.setdefault(
            event.seed_id, {"stages": [], "outcome": "unfinished", "ended_epoch": None}
        )
        if isinstance(event, SeedGerminated):
            life |= {"slot": event.slot, "blueprint": event.blueprint_id, "parameters": event.parameters}
            life["germinated_epoch"] = event.epoch
        elif isinstance(event, GatesNotAsked):
            life["unasked"] = event.gates
        elif isinstance(event, StageChanged):
            life["stages"].append((event.after, event.epoch))
        elif isinstance(event, SeedFossilized):
            life |= {"outcome": "fossilized", "ended_epoch": event.epoch, "reason": "G5 passed"}
        elif isinstance(event, SeedCulled):
            reverted = f"; the host lost {event.lost_epochs} epochs with it" if event.reverted else ""
            life |= {"outcome": "culled", "ended_epoch": event.epoch, "reason": event.reason + reverted}

    def records(
        self, reasons: Mapping[str, str] | None = None, gains: Mapping[str, float | None] | None = None
    ) -> list[SeedRecord]:
        """Return the seeds in order of germination.

        Args:
            reasons: What the last gate of each seed said, where nothing was noted.
            gains: Last measured gain of each seed, where nothing was noted.
        """
        records = []
        for seed_id, life in self._lives.items():
            if "slot" not in life:
                continue  # of events that begin after its germination
            known: dict[str, Any] = {
                "reason": self._reasons.get(seed_id, (reasons or {}).get(seed_id, "")),
                "gain": (gains or {}).get(seed_id),
            } | life
            if seed_id in self._findings:
                gate, finding = self._findings[seed_id]
                known["finding"] = {"gate": gate} | finding.to_dict()
            if (evidence := self.evidence.get(seed_id)) is not None:
                low, high = evidence.interval
                known |= {
                    "gain": evidence.gain,
                    "gain_low": low,
                    "gain_high": high,
                    "samples": evidence.samples,
                }
            records.append(SeedRecord(seed_id=seed_id, **known))
        return records


def _host_options(task: Task) -> dict[Topology, dict[str, Any]]:
    """Return the topologies of hosts that fit a task, the task's own first, with the options that such hosts get."""
    if task.kind == "language-model":
        return {Topology.TRANSFORMER: {"vocab_size": task.vocab_size, "max_len": task.input_shape[0]}}
    classes = {"num_classes": task.n_classes} if task.n_classes is not None else {}
    flat = {Topology.VECTOR: {"in_features": math.prod(task.input_shape), **classes}}
    if len(task.input_shape) != 3:
        return flat
    images = {"in_channels": task.input_shape[0], **classes}
    return {Topology.CNN: images, **flat}


def make_host(plugins: PluginRegistry, task: Task, settings: RunSettings) -> tuple[str, nn.Module]:
    """Build the host of a run, with weights that depend on ``settings.seed`` alone, and try it on two samples.

    It is the host that the settings name, else the task's, else the first of the task's topology: the id of a pack's, or
    a function or class that is called with those that it takes of ``in_channels``, ``in_features``, ``num_classes``,
    ``image_size``, or ``vocab_size`` and ``max_len``, depending on the task, and of the task's host options.

    Raises:
        UnknownNameError: If there is no such host, or none for the task.
        BlueprintError: If the host has no option of a name in ``settings.host_options``, or does not fit the task.
        TaskError: If the task cannot be learned by it: the message has the shapes of both.
    """
    fitting = _host_options(task)
    named = settings.host or task.host
    if named is None:
        named = _first_host(plugins, next(iter(fitting)))
    if isinstance(named, str) and is_reference(named, plugins.hosts):
        host_id, factory = named, named_object("host", named)
    elif isinstance(named, str):
        host_id = plugins.hosts.resolve(named)
        factory = import_factory(f"Host '{host_id}'", plugins.hosts.get(host_id).factory)
    else:
        host_id, factory = getattr(named, "__qualname__", type(named).__name__), named
    if isinstance(factory, nn.Module) or not callable(factory):
        raise TaskError(
            f"The host '{host_id}' must be a class or a function that makes a module, because the run trains two of it "
            f"from the same start; it is {type(factory).__name__}."
        )
    taken = accepted_keywords(factory)
    for name in settings.host_options:
        if taken is not None and name not in taken:
            raise BlueprintError(f"Host '{host_id}' has no option '{name}'.{did_you_mean(name, taken)}")
    if host_id in plugins.hosts:
        spec = plugins.hosts.get(host_id)
        takes_images = spec.topology is Topology.TRANSFORMER and (taken is None or "in_channels" in taken)
        if takes_images and (images := fitting.get(Topology.CNN)):
            fitting[spec.topology] = {"image_size": task.input_shape[-1], **images}
        if spec.topology not in fitting:
            raise BlueprintError(
                f"Host '{host_id}' does not fit task '{task.name}'.\n"
                f"  host: {spec.topology.value}\n  task: {' or '.join(topology.value for topology in fitting)}"
            )
        offered = dict(fitting[spec.topology])
    else:
        offered = {name: value for options in fitting.values() for name, value in options.items()}
        offered |= {"image_size": task.input_shape[-1]} if "in_channels" in offered else {}
    # A factory that takes anything hands it on to a class, which refuses what it does not know.
    if taken is None:
        chosen = offered if host_id in plugins.hosts else {}
    else:
        chosen = {k: v for k, v in (offered | dict(task.host_options)).items() if k in taken}
    chosen |= settings.host_options
    with private_rng(derived_seed(settings.seed, "host")):
        if host_id in plugins.hosts:
            host: Any = plugins.hosts.create(host_id, **chosen)
        else:
            host = called(f"Host '{host_id}'", partial(factory, **chosen), {})
    if not isinstance(host, nn.Module):
        raise TaskError(f"Host '{host_id}' must be a torch.nn.Module, not {type(host).__name__}.")
    host = host.to(settings.device)
    _try_host(host_id, host, task)
    return host_id, host


def beginning_of(plugins: PluginRegistry, task: Task, settings: RunSettings) -> Beginning:
    """Return the checksums of what a run of these settings begins with.

    Raises:
        KasminaError: If there is no such host, or it cannot learn the task.
    """
    return Beginning.of(make_host(plugins, task, settings)[1], task)


def _try_host(host_id: str, host: nn.Module, task: Task) -> None:
    """Raise a `TaskError` if a host cannot learn a task, as far as two samples tell."""
    inputs, targets = (part[:2] for part in task.train)
    n = len(inputs)
    facts = f"  inputs:  {tuple(inputs.shape)}, {inputs.dtype}\n  targets: {tuple(targets.shape)}, {targets.dtype}"
    at_fault = f"Host '{host_id}' cannot learn task '{task.name}'"
    try:
        with quiet_evaluation(host), kept_buffers(host):
            logits = logits_of(host(inputs))
    except TaskError:
        raise
    except Exception as error:
        raise TaskError(f"{at_fault}: its forward raised {type(error).__name__}: {error}\n{facts}") from error
    found = f"  output:  {tuple(logits.shape)}, {logits.dtype}"
    if task.sample_loss is None:
        wanted = (n, task.n_classes) if task.kind == "classification" else (*inputs.shape, task.vocab_size)
        if tuple(logits.shape) != wanted:
            raise TaskError(
                f"{at_fault}: its output has another shape.\n  expected: {wanted}\n{found}\n{facts}"
            )
    for what, figure in (("loss", task.loss), ("metric", task.metric)):
        try:
            value = figure(logits, targets)
        except Exception as error:
            raise TaskError(
                f"{at_fault}: the {what} raised {type(error).__name__}: {error}\n{found}\n{facts}"
            ) from error
        if not isinstance(value, Tensor) or tuple(value.shape) != (n,):
            shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise TaskError(
                f"Task '{task.name}': the {what} must give one number per sample; leave out the mean.\n"
                f"  expected: {(n,)}\n  found:    {shape}"
            )


def _first_host(plugins: PluginRegistry, topology: Topology) -> str:
    fitting = [name for name in plugins.hosts.ids() if plugins.hosts.get(name).topology is topology]
    if not fitting:
        raise UnknownNameError(
            f"No installed pack offers a host for {topology.value}; install one that does."
        )
    bundled = {record.name for record in plugins.packs if record.distribution == "kasmina"}
    return min(fitting, key=lambda name: (name.partition(":")[0] not in bundled, name))


def candidates(
    plugins: PluginRegistry, model: MorphogeneticModel, named: Sequence[str]
) -> Callable[[SlotObservation], Sequence[str]]:
    """Return a function that lists the blueprints for a slot: those named, or all that fit, the largest first.

    Raises:
        UnknownNameError: If nobody offers a named blueprint.
        BlueprintError: If a named blueprint fits no slot; the message gives the reasons.
    """
    registry = plugins.blueprints
    chosen = []
    for name in named:
        points = [slot.point for slot in model.slots.values()]
        entry = registry.get(name, points[0].topology)
        reasons = [
            f"  {point.name}: it is for {entry.spec.topology.value}, the slot for {point.topology.value}"
            if entry.spec.topology is not point.topology
            else f"  {point.name}: {refusal}"
            for point in points
            if entry.spec.topology is not point.topology
            or (refusal := entry.spec.refusal(point.dim)) is not None
        ]
        if len(reasons) == len(points):
            raise BlueprintError("\n".join([f"Blueprint '{entry.id}' fits no slot of this host.", *reasons]))
        chosen.append(entry)

    def fitting(slot: SlotObservation) -> list[str]:
        offered = chosen or sorted(
            # A module that is there under two names is tried once.
            {
                f"{e.spec.factory} {e.spec.options}": e for e in registry.list_for_topology(slot.topology)
            }.values(),
            key=lambda entry: (-(entry.spec.declared_params(slot.dim) or 0), entry.id),
        )
        return [
            e.id for e in offered if e.spec.topology is slot.topology and e.spec.refusal(slot.dim) is None
        ]

    return fitting


def make_policy(plugins: PluginRegistry, model: MorphogeneticModel, settings: RunSettings) -> Policy:
    """Build the policy of a run. A plan takes whole blocks first where the user names no blueprint.

    A policy from a pack is called with ``blueprints=``, a function that lists candidates for a slot's observation, and
    with ``settings.policy_options``.

    Raises:
        UnknownNameError: If there is no policy of that name, or no such blueprint.
        BlueprintError: If a blueprint that the user named fits no slot.
        PolicyOptionError: If the policy does not take one of its options.
    """
    fitting = candidates(plugins, model, settings.blueprints)
    if settings.policy == "plan" and not settings.blueprints:
        everything = fitting

        def fitting(slot: SlotObservation) -> Sequence[str]:
            return sorted(everything(slot), key=lambda name: not name.endswith(":block"))

    offered = plugins.policies()
    if settings.policy in BUNDLED:
        factory = BUNDLED[settings.policy]
    elif settings.policy in offered or ":" in settings.policy:
        factory = offered[settings.policy]
    else:
        known = [*BUNDLED, *offered]
        raise UnknownNameError(
            f"There is no policy '{settings.policy}'.{did_you_mean(settings.policy, known)}"
        )
    return build_policy(
        settings.policy,
        factory,
        fitting,
        settings.policy_options,
        registry=plugins.blueprints,
        seed=derived_seed(settings.seed, "policy"),
        epochs=settings.epochs,
    )


def make_model(
    plugins: PluginRegistry,
    task: Task,
    settings: RunSettings,
    config: GrowthConfig,
    telemetry: EventTarget | None = None,
) -> tuple[str, MorphogeneticModel]:
    """Build the host of a run with its slots; return the host's id too.

    Raises:
        KasminaError: If there is no such host or point, or the host does not take an option.
    """
    host_id, host = make_host(plugins, task, settings)
    declares = isinstance(host, HostProtocol)
    slots = settings.slots or (task.slots if settings.host is None else ())
    if not slots and not declares:
        paths = [path for path, _ in host.named_modules() if path]
        raise TaskError(
            f"Host '{host_id}' declares no points for slots: name them with --slots, such as --slots '{paths[0]}'.\n"
            f"  modules: {', '.join(paths[:12])}{', …' if len(paths) > 12 else ''}"
            if paths
            else f"Host '{host_id}' has no submodule that a slot could follow."
        )
    is_text = task.kind == "language-model"
    model = MorphogeneticModel(
        host,
        slots or None,
        config=config,
        example=None if declares and hasattr(host, "example_inputs") else (task.train.inputs[:2],),
        registry=plugins.blueprints,
        telemetry=telemetry,
        causal=is_text,  # its targets are the next tokens
        context=EveryPosition() if is_text and not hasattr(host, "context_reader") else None,
    )
    return host_id, model


def start_arm(
    task: Task,
    *,
    host: str | None = None,
    slots: Sequence[str] = (),
    host_options: Mapping[str, Any] | None = None,
    grows: bool = True,
    config: GrowthConfig | None = None,
    batch_size: int | None = None,
    lr: float | None = None,
    seed: int = 0,
    budget: float | None = None,
    ledger: FlopLedger | None = None,
    telemetry: EventTarget | None = None,
    plugins: PluginRegistry | None = None,
) -> Arm:
    """Build a host for a task, as ``kasmina grow`` does, and the arm that trains it.

    Equal arguments give the same arm. With ``grows=False`` the host, of the same weights, trains alone.

    Args:
        task: What it learns; see `load_task`.
        host: Id of a pack's host, ``module:callable`` or ``file.py:callable``; default the task's, or the first one of
            its topology.
        slots: Names, paths or globs of points; empty for all that the host declares.
        host_options: Keywords for the host's factory.
        grows: Whether slots are attached.
        config: How seeds are treated; default `GrowthConfig.recommended`, with a ramp as long as the task says.
        batch_size: Samples per training batch; default the task's.
        lr: Learning rate of Adam; default the task's.
        seed: For the weights, the order of the samples and the seeds.
        budget: Training FLOPs that the run may spend, for policies.
        ledger: See `Arm`.
        telemetry: Takes the events of the model.
        plugins: Where hosts and blueprints come from; default the installed packs.

    Raises:
        KasminaError: If there is no such host or point, or the host cannot learn the task.
    """
    plugins = plugins or default_registry()
    settings = RunSettings(
        task=task.name,
        host=host,
        slots=tuple(slots),
        blueprints=(),
        policy="none",
        incubation="",
        epochs=task.epochs,
        batch_size=batch_size or task.batch_size,
        lr=task.lr if lr is None else lr,
        seed=seed,
        device=str(task.train.inputs.device),
        ramp_epochs=task.ramp_epochs,
        host_options=host_options or {},
    )
    module: nn.Module
    if grows:
        steps = math.ceil(len(task.train.inputs) / settings.batch_size)
        config = config or GrowthConfig.recommended(
            steps, ramp_epochs=settings.ramp_epochs, seed=derived_seed(seed, "seeds")
        )
        _, module = make_model(plugins, task, settings, config, telemetry)
    else:
        _, module = make_host(plugins, task, settings)
    return Arm(
        module,
        task,
        batch_size=settings.batch_size,
        lr=settings.lr,
        seed=seed,
        budget=budget,
        ledger=ledger,
    )


@final
class GrowthRun:
    """Trains both arms and fills the record. ``interrupt`` ends it after the current batch.

    Args:
        settings: What decides the run.
        task: What is learned.
        plugins: Where hosts, blueprints and policies come from.
        display: Shows how it goes on.
        progress: Keeps what is needed to go on after each epoch; what it holds is gone on from.
        command: What was typed, for the record.
    """

    def __init__(
        self,
        settings: RunSettings,
        task: Task,
        plugins: PluginRegistry,
        display: Display,
        progress: ProgressFolder | None = None,
        command: str = "",
    ) -> None:
        self.settings = settings
        self.task = task
        self._display = display
        self._interrupted = False
        self._each_epoch: Callable[[str, EpochRecord], object] = lambda arm, epoch: None
        self._log = SeedLog()
        steps_per_epoch = math.ceil(len(task.train.inputs) / settings.batch_size)
        self._plugins = plugins
        self._config = config = GrowthConfig.recommended(
            steps_per_epoch,
            ramp_epochs=settings.ramp_epochs,
            incubation=settings.incubation,
            nested_slots=settings.nested_slots,
            seed=derived_seed(settings.seed, "seeds"),
            **({"gates": GateThresholds()} if settings.proof == "training" else {}),
        )
        host_id, self.model = make_model(plugins, task, settings, config, self._log)
        self._policy = make_policy(plugins, self.model, settings)
        self._grown = self._arm(self.model)
        self._alone = self._arm(make_host(plugins, task, settings)[1])
        self._progress = progress
        self._began = beginning_of(plugins, task, settings) if progress is not None else None
        self._telemetry: EventTarget | None = None
        self._since: Progress | None = None
        self.record = RunRecord(
            task=task.name,
            metric_name=task.metric_name,
            host=host_id,
            config=settings.to_dict(),
            higher_is_better=task.higher_is_better,
            made_with={
                "command": command,
                **_versions(),
                "slots": list(self.model.slots),
                "growth": for_json(config.to_dict()),
            },
        )

    def interrupt(self) -> None:
        """Ask the run to end with what there is."""
        self._interrupted = True

    def go_on(self) -> None:
        """Make model, policy and record what they were after the last epoch that ``progress`` holds.

        Raises:
            CheckpointError: If what it holds is damaged or does not fit.
            ResumeError: If the task or the host is not what the run began with.
        """
        if self._progress is None or self._began is None or not self._progress.exists:
            return
        self._since = since = self._progress.load(self._grown, self._policy, self._alone, self._began)
        found = RunRecord.from_dict(since.record)
        now, then = _versions(), {name: found.made_with.get(name) for name in _versions()}
        if then != now and found.made_with:
            found.notes.append(f"The run began with {_listed(then)} and went on with {_listed(now)}.")
        for field_ in fields(RunRecord):
            setattr(self.record, field_.name, getattr(found, field_.name))
        self._log.load_state_dict(since.log)

    def run(
        self,
        telemetry: EventTarget | None = None,
        each_epoch: Callable[[str, EpochRecord], object] = lambda arm, epoch: None,
    ) -> RunRecord:
        """Train, measure and return the record.

        Args:
            telemetry: Takes the events of the grown model.
            each_epoch: Called with the name of the arm and each epoch, when the record holds it.
        """
        self._log.onward = telemetry
        self._telemetry, self._each_epoch = telemetry, each_epoch
        if telemetry is not None:
            settings = self.settings.to_dict() | {"host": self.record.host}
            telemetry.emit(RunStarted(settings=settings, made_with=self.record.made_with))
        for arm in chain((self._grow, self._train_alone), self._sizes()):
            with private_rng(
                derived_seed(self.settings.seed, "training"), torch.device(self.settings.device)
            ):
                arm()
        self.record.interrupted = self._interrupted
        self.record.notes.append(test_figures_note(self.record))
        if self._interrupted:
            self.record.notes.append(
                "The run was stopped before its end; the figures are those of what was trained."
            )
        return self.record

    def _grow(self) -> None:
        model, arm = self.model, self._grown
        if self.record.arm(GROWN) is not None:  # the run goes on where the host alone is trained
            return
        self._display.phase(f"growing the host on {self.task.name}", self.settings.epochs)
        result = self._train(GROWN, arm, self.record.epochs, epochs=self.settings.epochs)
        for name, slot in model.slots.items():
            if slot.is_active and slot.state is not None:
                # A kept seed is measured on the test samples: no decision was made on them.
                evidence = model.measure(name, partial(arm.losses, "test"))
                if evidence is not None:
                    self._log.evidence[slot.state.seed_id] = evidence
        if model.epoch:
            self.record.verdict = str(model.verdict(arm.evaluate("train")[0]))
        self.record.seeds = self._log.records()
        if model.lost_epochs:
            self.record.notes.append(
                f"{model.lost_epochs} epochs of the host's training were given up to undo what seeds did that were "
                "culled late; their operations are charged."
            )
        self.record.arms.append(result)

    def _train_alone(self) -> None:
        grown = self.record.arm(GROWN)
        if grown is None or self._interrupted:
            return
        self._display.phase("training the same host alone for the same training FLOPs", grown.flops)
        if self._alone.ledger.total:
            self._display.advance(self._alone.ledger.total)
        result = self._train(HOST_ALONE, self._alone, self.record.baseline, budget=grown.flops)
        if not self._interrupted:  # a host that was trained for less is no comparison
            self.record.arms.append(result)

    def _sizes(self) -> Iterator[Callable[[], None]]:
        """Yield the training of each fixed size; what was kept is known once the grown arm has ended."""
        if not self.settings.sizes or self._interrupted:
            return
        kept = [seed for seed in self.record.seeds if seed.outcome == "fossilized"]
        if not kept:
            self.record.notes.append(
                "No seed was kept, so the host alone is the only fixed size of this run."
            )
        for last in sorted({seed.germinated_epoch for seed in kept}):
            yield partial(self._train_size, {seed.slot for seed in kept if seed.germinated_epoch <= last})

    def _train_size(self, kept: set[str]) -> None:
        """Train the host with the seeds of these slots from the start, as fossils with the weights of their birth."""
        grown = self.record.arm(GROWN)
        if grown is None or self._interrupted:
            return
        data = growth_of(self.model)
        slots = {name: saved for name, saved in data["slots"].items() if name in kept}
        _, model = make_model(self._plugins, self.task, self.settings, self._config)
        rebuild_growth(model, data | {"slots": slots})
        arm = self._arm(model)
        name = f"{arm.parameters:,} parameters"
        self._display.phase(f"training {name} from the start for the same training FLOPs", grown.flops)
        epochs = self.record.sizes[name] = []
        result = self._train(name, arm, epochs, budget=grown.flops)
        if self._interrupted:
            del self.record.sizes[name]
        else:
            self.record.arms.append(result)

    def _arm(self, module: nn.Module) -> Arm:
        settings = self.settings
        return Arm(module, self.task, batch_size=settings.batch_size, lr=settings.lr, seed=settings.seed)

    def _train(
        self,
        name: str,
        arm: Arm,
        records: list[EpochRecord],
        *,
        epochs: float = math.inf,
        budget: float = math.inf,
    ) -> ArmResult:
        """Train one arm for so many epochs or FLOPs, record its epochs, and return its final figures."""
        started, ledger = time.perf_counter(), arm.ledger
        last: deque[tuple[float, float]] = deque(maxlen=FINAL_EPOCHS)
        if self._since is not None and self._since.arm == name:
            started -= self._since.seconds
            last.extend(self._since.last)

        def is_over() -> bool:
            return self._interrupted or ledger.total >= budget

        while len(records) < epochs and ledger.total < budget:
            before = ledger.total
            loss = arm.train_epoch(is_over)
            if loss is None or self._interrupted:
                break
            val_loss, val_metric = arm.evaluate("val")
            grows = arm.module is self.model
            gate = self._step_epoch(arm, val_loss) if grows else ""
            slots = [self._slot_record(slot) for slot in self.model.slots] if grows else ()
            flops = float(ledger.total)
            record = EpochRecord(
                len(records) + 1, loss, val_loss, val_metric, arm.parameters, flops, slots, gate
            )
            records.append(record)
            self._each_epoch(name, record)
            last.append(arm.evaluate("test"))
            if grows:
                self._display.epoch(record)
            else:
                self._display.advance(ledger.total - before)
            now = time.perf_counter()
            self._keep(name, arm, list(last), now - started)
            started += time.perf_counter() - now  # to write is not to train
        seconds = time.perf_counter() - started
        val_loss, _ = arm.evaluate("val")
        test_loss, test_metric = map(fmean, zip(*(last or [arm.evaluate("test")]), strict=True))
        return ArmResult(
            name, arm.parameters, float(ledger.total), len(records), val_loss, test_loss, test_metric, seconds
        )

    def _keep(self, name: str, arm: Arm, last: list[tuple[float, float]], seconds: float) -> None:
        """Write what the run needs to go on from here."""
        if self._progress is None or self._began is None or name not in (GROWN, HOST_ALONE):
            return  # a fixed size is trained anew
        if isinstance(self._telemetry, Telemetry):
            self._telemetry.flush()  # a run that is killed now has the events of the epochs that it has
        progress = progress_of(name, arm, self.record, self._log.state_dict(), last, seconds, self._began)
        try:
            self._progress.save(arm, self._policy, progress)
        except (OSError, CheckpointError) as error:  # a full disk ends no run
            note = f"The run cannot be resumed from its last epochs: {error}"
            self.record.notes += [note] if note not in self.record.notes else []

    def _step_epoch(self, arm: Arm, val_loss: float) -> str:
        """End an epoch of the grown model, follow its policy, and return what the gates said."""
        verdicts = arm.end_epoch(val_loss)
        for slot in self.model.slots.values():
            if slot.state is not None:
                self._log.note(slot.state.seed_id, slot.last_evidence, verdicts.get(slot.name))
        device = torch.device(self.settings.device)
        with private_rng(derived_seed(self.settings.seed, "policy", arm.epochs), device):
            self.model.follow(self._policy)
        for outcome in self.model.outcomes:
            if not outcome.done and not isinstance(
                outcome.command, Advance
            ):  # a gate's verdict is in the record
                self.record.notes.append(outcome.refusal)
        return "; ".join(
            f"{slot}: {verdict}" for slot, verdict in verdicts.items() if verdict.gate is not None
        )

    def _slot_record(self, name: str) -> EpochSlot:
        slot = self.model.slots[name]
        evidence = slot.last_evidence
        blueprint = slot.state.blueprint_id if slot.state is not None and slot.seed is not None else ""
        gain = evidence.gain if evidence is not None else None
        return EpochSlot(name, slot.stage.name, blueprint, slot.alpha, gain)


def _versions() -> dict[str, str]:
    return {"kasmina": __version__, "torch": torch.__version__, "python": platform.python_version()}


def _listed(versions: Mapping[str, object]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def test_figures_note(record: RunRecord) -> str:
    """Return a sentence on how many epochs' models the final figures are means over."""
    counts = {arm.name: min(arm.epochs, FINAL_EPOCHS) for arm in record.arms}
    if len(set(counts.values())) > 1:
        each = ", ".join(f"{name}: {epochs}" for name, epochs in counts.items())
        return f"Test figures are means over the models of the last epochs ({each})."
    epochs = next(iter(counts.values()), 0)
    if epochs == 0:
        return "Test figures are those of the model as it was when the run was stopped."
    if epochs == 1:
        return "Test figures are those of the model after the last epoch."
    return f"Test figures are means over the models of the last {epochs} epochs."
