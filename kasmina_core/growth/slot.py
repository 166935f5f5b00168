"""The slot as users get it: default settings, seeds from packs, and a record in the ``state_dict``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, cast, final

import torch
from torch import Tensor, nn

from kasmina_core.blueprints.catalogue import BlueprintRegistry
from kasmina_core.blueprints.germination import size_unbuilt, try_seed
from kasmina_core.errors import CheckpointError
from kasmina_core.gates.checks import GateCheckSpec, GateContext
from kasmina_core.gates.paired import SeedEvidence
from kasmina_core.gates.sequential import Look, PairedGain
from kasmina_core.gates.trend import TrendGap
from kasmina_core.growth.config import GrowthConfig
from kasmina_core.growth.plain_data import from_bytes, to_bytes
from kasmina_core.growth.record import SlotRecord
from kasmina_core.hosts import InjectionPoint
from kasmina_core.lifecycle import SeedState, is_failure_stage
from kasmina_core.packs.discovery import default_registry
from kasmina_core.records import Record
from kasmina_core.sharding import local_part
from kasmina_core.slots import slot as core
from kasmina_core.slots.owner import Trial
from kasmina_core.slots.settings import RampUnit
from kasmina_core.topology import Topology
from kasmina_core.verdicts import GateLevel, GateResult

if TYPE_CHECKING:
    from kasmina_core.slots.slot import SeedSlot as CoreSlot


_VANISHING_GRADIENT: Final = 1e-7
_EXPLODING_GRADIENT: Final = 1e2
_HARMLESS_SIZE = 1 << 20
"""Values up to which a seed may be built that does not fit what was saved of it; torch then says where."""


@final
class PackSeeds:
    """Makes seeds from blueprints of a registry.

    A copy has the same registry; one that was pickled has the installed packs.

    Args:
        registry: The blueprints; ``None`` for the installed packs, which are loaded when one is first asked for.
    """

    def __init__(self, registry: BlueprintRegistry | None = None) -> None:
        self._registry = registry

    def __deepcopy__(self, memo: dict[int, Any]) -> PackSeeds:
        return PackSeeds(self._registry)

    def __reduce__(self) -> tuple[Any, ...]:
        return PackSeeds, ()

    @property
    def registry(self) -> BlueprintRegistry:
        """The blueprints."""
        return self._registry if self._registry is not None else default_registry().blueprints

    @registry.setter
    def registry(self, registry: BlueprintRegistry) -> None:
        self._registry = registry

    def find(self, blueprint_id: str, topology: Topology) -> str:
        return self.registry.get(blueprint_id, topology).id

    def describe(self, blueprint_id: str) -> str:
        entry = self.registry.get(blueprint_id)
        return f"{entry.id} of {entry.origin}"

    def make(
        self,
        blueprint_id: str,
        point: InjectionPoint,
        options: Mapping[str, Any],
        like: Tensor,
        random_seed: int,
        may_draw: bool,
    ) -> Trial:
        return try_seed(self.registry, blueprint_id, point, options, like, random_seed, may_draw)


@final
class ConfiguredGates:
    """Judges seeds at the gates of a configuration, with the gate checks of packs.

    Args:
        config: Holds the gates, and whether packs may add checks.
        seeds: Whose registry holds the checks of packs.
    """

    def __init__(self, config: GrowthConfig, seeds: PackSeeds) -> None:
        self._config = config
        self._seeds = seeds

    @property
    def _pack_checks(self) -> Sequence[GateCheckSpec]:
        return list(self._seeds.registry.gate_checks.values()) if self._config.pack_gate_checks else []

    @property
    def joined(self) -> tuple[str, ...]:
        return tuple(check.name for check in self._pack_checks)

    def judge_trial(self, state: SeedState, trial: Trial) -> GateResult:
        context = GateContext(state, germination=trial.findings)
        return self._config.gates.check(GateLevel.G0, context, self._pack_checks)

    def judge(self, slot: CoreSlot, gate: GateLevel | int) -> GateResult:
        context = GateContext(
            cast("SeedState", slot.state),
            lambda: cast("SeedEvidence | None", slot.measure_once()),
            slot.notes.stage.gains,
            parameters_finite=lambda: _is_finite(slot),
            look=lambda: Look(slot.notes.take_look(), slot.notes.error_share),
            screen=lambda: cast("PairedGain | None", slot.owner.screen(slot)),
            trend=lambda: _gap(slot),
            since_insertion=_since_insertion(slot),
            lag=slot.config.straight.lag,
        )
        return self._config.gates.check(gate, context, self._pack_checks)

    def foresee(self, slot: CoreSlot, gate: GateLevel) -> bool | None:
        context = GateContext(
            cast("SeedState", slot.state),
            parameters_finite=lambda: _is_finite_here(slot),
            since_insertion=_since_insertion(slot),
            lag=slot.config.straight.lag,
        )
        answer = self._config.gates.foresee(gate, context, self._pack_checks)
        # These gates read isolation and deviation anew when they are asked.
        return None if answer and gate in (GateLevel.G2, GateLevel.G5) else answer


def _is_finite_here(slot: CoreSlot) -> bool:
    return all(bool(local_part(p).isfinite().all()) for p in slot.seed_parameters())


def _gap(slot: CoreSlot) -> TrendGap | None:
    """Return what the model has gained over the trend of its host before a slot's seed was put in."""
    state = cast("SeedState", slot.state)
    if (metric := state.metrics.current_metric) is None:
        return None
    return TrendGap.of(
        slot.notes.trend,
        slot.owner.learned_epochs,
        metric,
        higher_is_better=state.metrics.higher_is_better,
    )


def _since_insertion(slot: CoreSlot) -> int:
    state = cast("SeedState", slot.state)
    by_step = slot.config.straight.lag_unit is RampUnit.STEP
    return slot.notes.steps if by_step else state.metrics.epochs_total


def _is_finite(slot: CoreSlot) -> bool:
    """Return whether every parameter of the seed is finite in every process of a job."""
    return slot.owner.everywhere(slot, "finite parameters", _is_finite_here(slot))


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class SeedTelemetry(Record):
    """A seed's record at one moment, as plain data.

    Attributes:
        metric: Last metric of the whole model.
        delta: Improvement of the whole model since the stage began.
        gain: Last paired gain of the seed itself.
        deviation: How far the seed was from the host while it learned apart, relative to the host's RMS.
        gradient_norm: L2 norm of the seed's gradient, mean over the last epoch.
        gradient_health: 1 for a healthy gradient, 0 for none, a vanishing, an exploding or a NaN one.
        is_vanishing: Norm below 1e-7.
        is_exploding: Norm above 1e2, infinite or NaN.
    """

    seed_id: str
    slot: str
    blueprint_id: str
    stage: str
    epoch: int
    epochs_in_current_stage: int
    alpha: float
    metric: float | None
    delta: float | None
    gain: float | None
    deviation: float | None
    gradient_norm: float | None
    gradient_health: float
    is_vanishing: bool
    is_exploding: bool


@final
class WeighedRecord(dict[str, Any]):
    """A slot's record whose seed has its weights elsewhere than in the state dict, and room for them was demanded."""


@final
@dataclass(frozen=True, slots=True)
class _WithWeights:
    """A slot's record in a state dict that holds the seed's weights too."""

    record: Mapping[str, Any] | Tensor


def _shapes(seed: nn.Module) -> dict[str, torch.Size]:
    return {name: t.shape for name, t in [*seed.named_parameters(), *seed.named_buffers()]}


class SeedSlot(core.SeedSlot):
    """Holds at most one seed at an injection point and moves it through its life.

    Its commands and stages are those of `kasmina_core.slots.slot.SeedSlot`.

    Attributes:
        built_anew: While a load goes on that built the seed anew: prefix of its keys, and the load's errors.

    Args:
        point: Where the slot is.
        shape: Shape of the features seen there; its batch size is ignored.
        config: How seeds are treated.
        registry: Where blueprints come from; ``None`` for the installed packs.
        dtype: Floating dtype of the host at this point.
        device: Device of the host at this point.
    """

    config: GrowthConfig
    maker: PackSeeds

    def __init__(
        self,
        point: InjectionPoint,
        shape: tuple[int, ...],
        config: GrowthConfig | None = None,
        registry: BlueprintRegistry | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        config, seeds = config or GrowthConfig(), PackSeeds(registry)
        super().__init__(
            point, shape, config, seeds, ConfiguredGates(config, seeds), dtype=dtype, device=device
        )
        self.built_anew: tuple[str, list[str]] | None = None
        self.register_load_state_dict_post_hook(_demand_whole_seed)  # type: ignore[no-untyped-call]  # torch

    def another(self, point: InjectionPoint) -> SeedSlot:
        """Return an empty slot like this one, at a point with the same features."""
        slot = SeedSlot(point, self.shape, self.config, dtype=self.alpha_buffer.dtype, device=self.device)
        slot.maker, slot.judge = self.maker, self.judge
        return slot

    @property
    def last_evidence(self) -> SeedEvidence | None:
        """The seed's evidence as last measured, or ``None``."""
        return cast("SeedEvidence | None", self.notes.evidence)

    @property
    def last_gate(self) -> GateResult | None:
        """The gate result of this epoch, the latest if there are several."""
        return next(reversed(self.notes.answers.values()), None)

    def measure(self) -> SeedEvidence | None:
        """Return the seed's evidence of this epoch, measuring it if nobody has yet.

        Returns:
            The evidence, or ``None`` if the seed is not active or the model has no evaluator.
        """
        return cast("SeedEvidence | None", super().measure())

    def telemetry(self, epoch: int = 0) -> SeedTelemetry | None:
        """Return the seed's record as plain data, or ``None`` in a dormant slot."""
        state = self.state
        if state is None:
            return None
        norm = state.metrics.gradient_norm
        exploding = norm is not None and not norm <= _EXPLODING_GRADIENT
        vanishing = norm is not None and norm < _VANISHING_GRADIENT
        return SeedTelemetry(
            seed_id=state.seed_id,
            slot=self.name,
            blueprint_id=state.blueprint_id,
            stage=state.stage.name,
            epoch=epoch,
            epochs_in_current_stage=state.metrics.epochs_in_current_stage,
            alpha=self.alpha,
            metric=state.metrics.current_metric,
            delta=state.metrics.improvement_since_stage_start,
            gain=self.notes.evidence.gain if self.notes.evidence is not None else None,
            deviation=state.metrics.deviation,
            gradient_norm=norm,
            gradient_health=0.0 if norm is None or exploding or vanishing else 1.0,
            is_vanishing=vanishing,
            is_exploding=exploding,
        )

    def get_extra_state(self) -> dict[str, Any]:
        """Return everything but the weights as plain data; the ``state_dict`` holds it as bytes, in a tensor."""
        return SlotRecord.of(self).to_dict()

    def set_extra_state(self, state: Mapping[str, Any] | Tensor) -> None:
        """Rebuild the seed and its place in life from `get_extra_state`; its weights are loaded after that.

        In a ``load_state_dict`` that holds weights, a seed of the same blueprint, options and shapes stays.

        Args:
            state: What `get_extra_state` returned, or the tensor that the ``state_dict`` holds of it.

        Raises:
            CheckpointError: If the data is of another version, damaged, or does not fit this slot; nothing is changed.
            UnknownNameError: If nobody offers the blueprint.
        """
        in_place = isinstance(state, _WithWeights)
        record = self._record(state.record if isinstance(state, _WithWeights) else state)
        saved, seed, takes_context = record.state, None, False
        if saved is not None and not is_failure_stage(saved.stage):
            trial = self._make_seed(saved.blueprint_id, record.options, record.germinations, saved.stage)
            if trial.seed is None or trial.faults:
                raise CheckpointError(
                    f"The saved seed '{saved.seed_id}' cannot be rebuilt in slot '{self.name}': {trial.faults}"
                )
            seed, takes_context = trial.seed.train(self.training), trial.mixes
            known = dict(seed.named_parameters())
            if unknown := [name for name in record.frozen_by_pause if name not in known]:
                raise CheckpointError(
                    f"The saved seed '{saved.seed_id}' was paused with parameters it does not have: "
                    f"{', '.join(unknown)}."
                )
            if in_place and self._holds_like(saved, record.options, seed):
                seed = self.seed
            else:
                self._announce(saved, seed)
        if seed is not None and seed is self.seed:
            if self.state is not None and self.state.is_paused:
                self._thaw()
            self._begin_notes()
        else:
            self.clear()
        self.germinations = record.germinations
        if saved is None:
            return
        self.state, self.seed, self.schedule = saved, seed, record.schedule
        self.takes_context = takes_context
        self.options, self.notes = record.options, record.notes
        if not record.deviation < 0.0:  # NaN was measured too
            self.training_deviation.fill_(record.deviation)
            self.has_training_deviation.fill_(True)
        self.alpha_buffer.fill_(saved.metrics.alpha)
        if seed is not None and saved.is_paused:
            self._freeze(record.frozen_by_pause)
        self.refresh_mode()

    def _holds_like(self, saved: SeedState, options: Mapping[str, Any], seed: nn.Module) -> bool:
        """Whether the slot's seed differs from one that was built from a record in values alone."""
        return (
            self.seed is not None
            and self.state is not None
            and (self.state.blueprint_id, self.options) == (saved.blueprint_id, options)
            and _shapes(self.seed) == _shapes(seed)
        )

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        key = prefix + "_extra_state"
        record = destination.pop(key)
        if self.state is not None:  # safetensors and distributed checkpoints take tensors alone
            destination[key] = to_bytes(record, f"The state of slot '{self.name}'")
        else:  # an empty slot leaves no key: the model then saves like its bare host
            # Its next seed must differ from the last one, after a load too.
            metadata = getattr(destination, "_metadata", {}).get(prefix.removesuffix("."))
            if metadata is not None:
                metadata["germinations"] = self.germinations

    def demand_room(self, state: Mapping[str, Any] | Tensor, room: int) -> None:
        """Refuse a saved state whose seed has more values than were saved of it, before it is built.

        Args:
            state: As for `set_extra_state`.
            room: How many values were saved.

        Raises:
            CheckpointError: If so, or the data is damaged.
        """
        record = self._record(state)
        if record.state is None or is_failure_stage(record.state.stage):
            return
        asked = size_unbuilt(self.maker.registry, record.state.blueprint_id, self.point, record.options)
        if asked > max(room, _HARMLESS_SIZE):
            raise CheckpointError(
                f"The saved seed '{record.state.seed_id}' of slot '{self.name}' is larger than what was saved of it.\n"
                f"  its options ask for: {asked:,} values\n"
                f"  saved:               {room:,}"
            )

    def _record(self, state: Mapping[str, Any] | Tensor) -> SlotRecord:
        what = f"The saved state of slot '{self.name}'"
        data = from_bytes(state, what) if isinstance(state, Tensor) else state
        return SlotRecord.for_slot(data, self.name, self.point.causal)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        key, with_weights = prefix + "_extra_state", False
        if key not in state_dict:
            empty = {"state": None, "germinations": local_metadata.get("germinations", self.germinations)}
            state_dict = {**state_dict, key: self.get_extra_state() | empty}
        else:
            start, record = f"{prefix}seed.", state_dict[key]
            saved = [
                t.numel()
                for name, t in state_dict.items()
                if name.startswith(start) and isinstance(t, Tensor)
            ]
            if not isinstance(record, WeighedRecord):
                self.demand_room(record, sum(saved))
            with_weights = bool(saved) or isinstance(record, Tensor)
            # With assign=True parameters are other objects, which optimisers must be told of.
            if with_weights and not local_metadata.get("assign_to_params_buffers", False):
                state_dict = {**state_dict, key: _WithWeights(record)}
        before = self.seed
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        self.built_anew = (f"{prefix}seed.", error_msgs) if with_weights and self.seed is not before else None


def _demand_whole_seed(slot: nn.Module, keys: Any) -> None:
    """Let a load fail, strict or not, that built a seed anew without all of its weights."""
    slot = cast("SeedSlot", slot)
    built, slot.built_anew = slot.built_anew, None
    if built is None:
        return
    start, messages = built
    if lacking := [key for key in keys.missing_keys if key.startswith(start)]:
        messages.append(
            f"The saved seed of slot '{slot.name}' lacks {', '.join(lacking)}. It differs from what the slot held, so it "
            "was built anew, and there are no former values to keep."
        )
