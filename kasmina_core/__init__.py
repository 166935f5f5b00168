"""Kasmina: networks that grow while they train.

Everything public is here; a name is imported when it is first used, so that listing plugins needs no torch.
PYTEST_DONT_REWRITE: a program may import this and then start pytest, which finds our fixtures.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kasmina_core.attachment import HookedHost as HookedHost
    from kasmina_core.attribution import Attribution as Attribution
    from kasmina_core.attribution import SeedShare as SeedShare
    from kasmina_core.averaging import GrowingAveragedModel as GrowingAveragedModel
    from kasmina_core.blending import AlphaSchedule as AlphaSchedule
    from kasmina_core.blending import blend_with_isolation as blend_with_isolation
    from kasmina_core.blueprints import BlueprintRegistry as BlueprintRegistry
    from kasmina_core.blueprints import BlueprintSpec as BlueprintSpec
    from kasmina_core.blueprints import RegisteredBlueprint as RegisteredBlueprint
    from kasmina_core.calibration import Calibration as Calibration
    from kasmina_core.calibration import CalibrationError as CalibrationError
    from kasmina_core.calibration import calibrate as calibrate
    from kasmina_core.catalogue import HostRegistry as HostRegistry
    from kasmina_core.check_cache import PassCache as PassCache
    from kasmina_core.checkpoint import InterruptedSave as InterruptedSave
    from kasmina_core.checkpoint import LoadedCheckpoint as LoadedCheckpoint
    from kasmina_core.checkpoint import load_checkpoint as load_checkpoint
    from kasmina_core.checkpoint import save_checkpoint as save_checkpoint
    from kasmina_core.checks import check_blueprint_spec as check_blueprint_spec
    from kasmina_core.clipping import ClippedGradients as ClippedGradients
    from kasmina_core.clipping import clip_gradients as clip_gradients
    from kasmina_core.clipping import drop_nonfinite_seed_gradients as drop_nonfinite_seed_gradients
    from kasmina_core.config import GradientPolicy as GradientPolicy
    from kasmina_core.config import GrowthConfig as GrowthConfig
    from kasmina_core.config import Incubation as Incubation
    from kasmina_core.config import RampUnit as RampUnit
    from kasmina_core.discovery import PluginRegistry as PluginRegistry
    from kasmina_core.discovery import default_registry as default_registry
    from kasmina_core.discovery import reset_default_registry as reset_default_registry
    from kasmina_core.distributed import DistributedGrowth as DistributedGrowth
    from kasmina_core.distributed import Wrap as Wrap
    from kasmina_core.distributed import distribute as distribute
    from kasmina_core.distributed_checkpoint import load_distributed as load_distributed
    from kasmina_core.distributed_checkpoint import save_distributed as save_distributed
    from kasmina_core.errors import AmbiguousNameError as AmbiguousNameError
    from kasmina_core.errors import BlueprintError as BlueprintError
    from kasmina_core.errors import CheckpointError as CheckpointError
    from kasmina_core.errors import DistributedError as DistributedError
    from kasmina_core.errors import ExportError as ExportError
    from kasmina_core.errors import GerminationError as GerminationError
    from kasmina_core.errors import HostError as HostError
    from kasmina_core.errors import KasminaError as KasminaError
    from kasmina_core.errors import MisuseWarning as MisuseWarning
    from kasmina_core.errors import NameConflictError as NameConflictError
    from kasmina_core.errors import PluginError as PluginError
    from kasmina_core.errors import SeedShapeError as SeedShapeError
    from kasmina_core.errors import SwitchError as SwitchError
    from kasmina_core.errors import TopologyError as TopologyError
    from kasmina_core.errors import TransitionError as TransitionError
    from kasmina_core.errors import UnknownNameError as UnknownNameError
    from kasmina_core.events import AlphaChanged as AlphaChanged
    from kasmina_core.events import BlueprintRegistered as BlueprintRegistered
    from kasmina_core.events import GateEvaluated as GateEvaluated
    from kasmina_core.events import IncubationStopped as IncubationStopped
    from kasmina_core.events import IsolationViolation as IsolationViolation
    from kasmina_core.events import SeedCulled as SeedCulled
    from kasmina_core.events import SeedFossilized as SeedFossilized
    from kasmina_core.events import SeedGerminated as SeedGerminated
    from kasmina_core.events import SeedTelemetry as SeedTelemetry
    from kasmina_core.events import StageChanged as StageChanged
    from kasmina_core.events import TelemetryEvent as TelemetryEvent
    from kasmina_core.events import TelemetryEventType as TelemetryEventType
    from kasmina_core.evidence import SeedEvidence as SeedEvidence
    from kasmina_core.export import export_model as export_model
    from kasmina_core.gates import CheckVerdict as CheckVerdict
    from kasmina_core.gates import ErrorBudget as ErrorBudget
    from kasmina_core.gates import GateCheck as GateCheck
    from kasmina_core.gates import GateCheckSpec as GateCheckSpec
    from kasmina_core.gates import GateLevel as GateLevel
    from kasmina_core.gates import GateProfile as GateProfile
    from kasmina_core.gates import GateResult as GateResult
    from kasmina_core.gates import GateThresholds as GateThresholds
    from kasmina_core.gates import QualityGates as QualityGates
    from kasmina_core.gates import StartComparison as StartComparison
    from kasmina_core.graphs import RecompileLimitWarning as RecompileLimitWarning
    from kasmina_core.growth_state import OtherBlueprintVersion as OtherBlueprintVersion
    from kasmina_core.growth_state import rebuild_topology as rebuild_topology
    from kasmina_core.growth_state import topology_of as topology_of
    from kasmina_core.hookspecs import hookimpl as hookimpl
    from kasmina_core.hookspecs import hookspec as hookspec
    from kasmina_core.hosts import HostProtocol as HostProtocol
    from kasmina_core.hosts import HostSpec as HostSpec
    from kasmina_core.hosts import InjectionPoint as InjectionPoint
    from kasmina_core.isolation import GradientIsolationMonitor as GradientIsolationMonitor
    from kasmina_core.isolation import IsolationReading as IsolationReading
    from kasmina_core.isolation import bound_deviation as bound_deviation
    from kasmina_core.isolation import straight_through as straight_through
    from kasmina_core.lifecycle import VALID_TRANSITIONS as VALID_TRANSITIONS
    from kasmina_core.lifecycle import SeedMetrics as SeedMetrics
    from kasmina_core.lifecycle import SeedStage as SeedStage
    from kasmina_core.lifecycle import SeedState as SeedState
    from kasmina_core.lifecycle import is_active_stage as is_active_stage
    from kasmina_core.lifecycle import is_failure_stage as is_failure_stage
    from kasmina_core.lifecycle import is_terminal_stage as is_terminal_stage
    from kasmina_core.lifecycle import is_valid_transition as is_valid_transition
    from kasmina_core.model import MorphogeneticModel as MorphogeneticModel
    from kasmina_core.model import SlotSummary as SlotSummary
    from kasmina_core.optim import tie_optimizer as tie_optimizer
    from kasmina_core.optim import untie_optimizer as untie_optimizer
    from kasmina_core.optimizer_names import load_named_optimizer_state as load_named_optimizer_state
    from kasmina_core.optimizer_names import named_optimizer_state as named_optimizer_state
    from kasmina_core.packs import PackReason as PackReason
    from kasmina_core.packs import PackRecord as PackRecord
    from kasmina_core.packs import PackState as PackState
    from kasmina_core.packs import list_packs as list_packs
    from kasmina_core.policies.bandit import BanditPolicy as BanditPolicy
    from kasmina_core.policies.budget import BudgetPolicy as BudgetPolicy
    from kasmina_core.policies.budget import SeedCost as SeedCost
    from kasmina_core.policies.budget import blueprint_costs as blueprint_costs
    from kasmina_core.policies.growing import GrowingPolicy as GrowingPolicy
    from kasmina_core.policies.growing import SeedCare as SeedCare
    from kasmina_core.policies.plateau import FixedTimesPolicy as FixedTimesPolicy
    from kasmina_core.policies.plateau import PlateauPolicy as PlateauPolicy
    from kasmina_core.policies.tournament import TournamentPolicy as TournamentPolicy
    from kasmina_core.policies.triggers import FixedTimes as FixedTimes
    from kasmina_core.policies.triggers import Plateau as Plateau
    from kasmina_core.policies.triggers import Trigger as Trigger
    from kasmina_core.policy import Advance as Advance
    from kasmina_core.policy import Command as Command
    from kasmina_core.policy import Continue as Continue
    from kasmina_core.policy import Cull as Cull
    from kasmina_core.policy import Germinate as Germinate
    from kasmina_core.policy import NoGrowthPolicy as NoGrowthPolicy
    from kasmina_core.policy import Observation as Observation
    from kasmina_core.policy import Pause as Pause
    from kasmina_core.policy import Policy as Policy
    from kasmina_core.policy import Regerminate as Regerminate
    from kasmina_core.policy import Resume as Resume
    from kasmina_core.policy import SetAlpha as SetAlpha
    from kasmina_core.policy import SlotObservation as SlotObservation
    from kasmina_core.random_states import InexactResume as InexactResume
    from kasmina_core.reports import CheckResult as CheckResult
    from kasmina_core.reports import CheckStatus as CheckStatus
    from kasmina_core.reports import ValidationReport as ValidationReport
    from kasmina_core.reports import ValidationVerdict as ValidationVerdict
    from kasmina_core.seed_files import graft_seeds as graft_seeds
    from kasmina_core.seed_files import save_seeds as save_seeds
    from kasmina_core.seed_schedules import ConstantRate as ConstantRate
    from kasmina_core.seed_schedules import WarmupCosine as WarmupCosine
    from kasmina_core.seed_schedules import schedule_seeds as schedule_seeds
    from kasmina_core.sequential import Finding as Finding
    from kasmina_core.sequential import LevelSpending as LevelSpending
    from kasmina_core.sequential import PairedGain as PairedGain
    from kasmina_core.slots import SeedSlot as SeedSlot
    from kasmina_core.snapshot import HostStateKeeper as HostStateKeeper
    from kasmina_core.switches import Switches as Switches
    from kasmina_core.telemetry import CallableSink as CallableSink
    from kasmina_core.telemetry import JsonLinesSink as JsonLinesSink
    from kasmina_core.telemetry import MemorySink as MemorySink
    from kasmina_core.telemetry import Sink as Sink
    from kasmina_core.telemetry import Telemetry as Telemetry
    from kasmina_core.topology import Topology as Topology
    from kasmina_core.untracked import UntrackedSeedWarning as UntrackedSeedWarning

_HOME = {
    "Advance": "policy",
    "AlphaChanged": "events",
    "AlphaSchedule": "blending",
    "AmbiguousNameError": "errors",
    "Attribution": "attribution",
    "BanditPolicy": "policies.bandit",
    "BlueprintError": "errors",
    "BlueprintRegistered": "events",
    "BlueprintRegistry": "blueprints",
    "BlueprintSpec": "blueprints",
    "BudgetPolicy": "policies.budget",
    "Calibration": "calibration",
    "CalibrationError": "calibration",
    "CallableSink": "telemetry",
    "CheckResult": "reports",
    "CheckStatus": "reports",
    "CheckVerdict": "gates",
    "CheckpointError": "errors",
    "ClippedGradients": "clipping",
    "Command": "policy",
    "ConstantRate": "seed_schedules",
    "Continue": "policy",
    "Cull": "policy",
    "DistributedError": "errors",
    "DistributedGrowth": "distributed",
    "ErrorBudget": "gates",
    "ExportError": "errors",
    "Finding": "sequential",
    "FixedTimes": "policies.triggers",
    "FixedTimesPolicy": "policies.plateau",
    "GateCheck": "gates",
    "GateCheckSpec": "gates",
    "GateEvaluated": "events",
    "GateLevel": "gates",
    "GateProfile": "gates",
    "GateResult": "gates",
    "GateThresholds": "gates",
    "Germinate": "policy",
    "GerminationError": "errors",
    "GradientIsolationMonitor": "isolation",
    "GradientPolicy": "config",
    "GrowingAveragedModel": "averaging",
    "GrowingPolicy": "policies.growing",
    "GrowthConfig": "config",
    "HookedHost": "attachment",
    "HostError": "errors",
    "HostProtocol": "hosts",
    "HostRegistry": "catalogue",
    "HostSpec": "hosts",
    "HostStateKeeper": "snapshot",
    "Incubation": "config",
    "IncubationStopped": "events",
    "InexactResume": "random_states",
    "InjectionPoint": "hosts",
    "InterruptedSave": "checkpoint",
    "IsolationReading": "isolation",
    "IsolationViolation": "events",
    "JsonLinesSink": "telemetry",
    "KasminaError": "errors",
    "LevelSpending": "sequential",
    "LoadedCheckpoint": "checkpoint",
    "MemorySink": "telemetry",
    "MisuseWarning": "errors",
    "MorphogeneticModel": "model",
    "NameConflictError": "errors",
    "NoGrowthPolicy": "policy",
    "Observation": "policy",
    "OtherBlueprintVersion": "growth_state",
    "PackReason": "packs",
    "PackRecord": "packs",
    "PackState": "packs",
    "PairedGain": "sequential",
    "PassCache": "check_cache",
    "Pause": "policy",
    "Plateau": "policies.triggers",
    "PlateauPolicy": "policies.plateau",
    "PluginError": "errors",
    "PluginRegistry": "discovery",
    "Policy": "policy",
    "QualityGates": "gates",
    "RampUnit": "config",
    "RecompileLimitWarning": "graphs",
    "Regerminate": "policy",
    "RegisteredBlueprint": "blueprints",
    "Resume": "policy",
    "SeedCare": "policies.growing",
    "SeedCost": "policies.budget",
    "SeedCulled": "events",
    "SeedEvidence": "evidence",
    "SeedFossilized": "events",
    "SeedGerminated": "events",
    "SeedMetrics": "lifecycle",
    "SeedShapeError": "errors",
    "SeedShare": "attribution",
    "SeedSlot": "slots",
    "SeedStage": "lifecycle",
    "SeedState": "lifecycle",
    "SeedTelemetry": "events",
    "SetAlpha": "policy",
    "Sink": "telemetry",
    "SlotObservation": "policy",
    "SlotSummary": "model",
    "StageChanged": "events",
    "StartComparison": "gates",
    "SwitchError": "errors",
    "Switches": "switches",
    "Telemetry": "telemetry",
    "TelemetryEvent": "events",
    "TelemetryEventType": "events",
    "Topology": "topology",
    "TopologyError": "errors",
    "TournamentPolicy": "policies.tournament",
    "TransitionError": "errors",
    "Trigger": "policies.triggers",
    "UnknownNameError": "errors",
    "UntrackedSeedWarning": "untracked",
    "VALID_TRANSITIONS": "lifecycle",
    "ValidationReport": "reports",
    "ValidationVerdict": "reports",
    "WarmupCosine": "seed_schedules",
    "Wrap": "distributed",
    "blend_with_isolation": "blending",
    "blueprint_costs": "policies.budget",
    "bound_deviation": "isolation",
    "calibrate": "calibration",
    "check_blueprint_spec": "checks",
    "clip_gradients": "clipping",
    "default_registry": "discovery",
    "distribute": "distributed",
    "drop_nonfinite_seed_gradients": "clipping",
    "export_model": "export",
    "graft_seeds": "seed_files",
    "hookimpl": "hookspecs",
    "hookspec": "hookspecs",
    "is_active_stage": "lifecycle",
    "is_failure_stage": "lifecycle",
    "is_terminal_stage": "lifecycle",
    "is_valid_transition": "lifecycle",
    "list_packs": "packs",
    "load_checkpoint": "checkpoint",
    "load_distributed": "distributed_checkpoint",
    "load_named_optimizer_state": "optimizer_names",
    "named_optimizer_state": "optimizer_names",
    "rebuild_topology": "growth_state",
    "reset_default_registry": "discovery",
    "save_checkpoint": "checkpoint",
    "save_distributed": "distributed_checkpoint",
    "save_seeds": "seed_files",
    "schedule_seeds": "seed_schedules",
    "straight_through": "isolation",
    "tie_optimizer": "optim",
    "topology_of": "growth_state",
    "untie_optimizer": "optim",
}

__all__ = sorted(_HOME)
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module 'kasmina_core' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"kasmina_core.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
