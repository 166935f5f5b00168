"""Checks of a host with slots: empty slots and seeds in TRAINING change nothing, contributing seeds take part."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any, Final, final

import torch
from torch import Tensor, nn

from kasmina_core.blueprints.catalogue import BlueprintRegistry
from kasmina_core.blueprints.declarations import BlueprintSpec
from kasmina_core.gates.gates import QualityGates
from kasmina_core.gates.thresholds import GateThresholds
from kasmina_core.growth.config import GrowthConfig
from kasmina_core.growth.model import MorphogeneticModel
from kasmina_core.hosts import InjectionPoint
from kasmina_core.lifecycle import SeedStage
from kasmina_core.slots.forward import ForwardMode
from kasmina_core.testing.comparing import (
    Run,
    all_tensors,
    difference,
    mode_name,
    random_state,
    unlike,
    unlike_names,
)
from kasmina_core.topology import Topology

if TYPE_CHECKING:
    from kasmina_core.testing.hosts import Trial

_LOUD: Final = (0.5, 2.0)
"""Range of a loud seed's weights: no two alike, or a normalisation behind the slot could take them out again."""


@final
class BendSeed(nn.Module):
    """``x + w |x|`` with one weight per feature, 0 at birth: the identity until somebody moves ``w``."""

    def __init__(self, dim: int, topology: Topology) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(topology.shape(dim)[1:]))

    def forward(self, x: Tensor) -> Tensor:
        """Return the bent features."""
        return x + self.weight * x.abs()


def open_gates(**thresholds: Any) -> QualityGates:
    """Return gates that every finite measurement passes: the host is on trial, not the seed."""
    easy = {"min_gain": -1e9, "min_t": -1e9, "max_harm_t": 1e9, "max_output_deviation": 1e9}
    return QualityGates(thresholds=GateThresholds(min_samples=2, **easy | thresholds))


def check_slots(trial: Trial) -> None:
    """Run the checks of the host with slots.

    Raises:
        Stop: If one failed that the others build on.
    """
    _attach_and_detach(trial)
    _compare(trial, _model(trial, trial.twin()), "dormant_output", "empty slots")
    _training(trial)
    _grown(trial)


def _registry(trial: Trial) -> BlueprintRegistry:
    registry = BlueprintRegistry()
    declared = (item.topology for item, _ in trial.points if isinstance(item, InjectionPoint))
    for topology in dict.fromkeys([*Topology, *declared]):  # that of a pack under test may not be loaded
        spec = BlueprintSpec(topology.value, topology, partial(BendSeed, topology=topology), lambda dim: dim)
        registry.register(spec, pack="conformance")
    return registry


def _model(trial: Trial, host: nn.Module) -> MorphogeneticModel:
    at_once = {"min_training_epochs": 0, "min_shadowing_epochs": 0, "min_probation_epochs": 0}
    gates = open_gates(max_isolation_violations=10**9, **at_once)
    config = GrowthConfig(gates=gates, isolation_every=0)
    model = MorphogeneticModel(
        host,
        trial.slots,
        example=trial.example,
        config=config,
        registry=_registry(trial),
        causal=trial.causal,
    )
    model.evaluate_with(lambda: torch.zeros(2))
    return model


def _attach_and_detach(trial: Trial) -> None:
    host, modes = _with_mixed_modes(trial, 1)
    before, numbers = _Snapshot(host), random_state(trial.device)
    with trial.attempt(
        "attaches",
        "cannot be given slots",
        "MorphogeneticModel(host) works",
        "Its register_slot(name, slot) must pass the features of that point through slot.",
    ):
        model = _model(trial, host)
        attached, numbers_attached = _Snapshot(host), random_state(trial.device)
        model_keys = list(model.state_dict())
        model.detach_slots()
        other, other_modes = _with_mixed_modes(trial, 0)
        other_model = _model(trial, other)
        other_attached = _Snapshot(other)
        other_model.detach_slots()
    trial.pass_("attaches", f"{len(trial.points)} slots")
    after = _Snapshot(host)
    while_there, taken_off = "with slots attached", "after they were taken off"
    moments = ((while_there, attached), (taken_off, after))
    trial.judge(
        "keys_unchanged",
        {while_there: unlike_names(before.keys, model_keys)}
        | {where: unlike_names(before.keys, now.keys) for where, now in moments}
        | {f"submodules {where}": unlike_names(before.modules, now.modules) for where, now in moments},
        "does not keep its state_dict keys and submodules",
        "those of the bare host",
        "register_slot must not make the slot a child or a buffer: use a forward hook, as HookedHost does.",
    )
    trial.judge(
        "hooks_restored",
        {taken_off: unlike_names(before.hooks, after.hooks)},
        "keeps hooks after the slots are gone",
        "the hooks of the bare host",
        "unregister_slot(name) must undo register_slot(name): remove the handle.",
    )
    trial.judge(
        "modes_unchanged",
        {where: _unlike_modes(modes, now.modes) for where, now in moments}
        | {
            f"{where}, other modes": _unlike_modes(other_modes, now.modes)
            for where, now in ((while_there, other_attached), (taken_off, _Snapshot(other)))
        },
        "does not keep its training modes",
        "each submodule's own",
        "Do not call train() or eval() in register_slot, unregister_slot or injection_points.",
    )
    trial.judge(
        "buffers_unchanged",
        {where: difference(before.tensors, now.only(before.tensors)) for where, now in moments},
        "does not keep its parameters and buffers",
        "bit-equal values",
        "Leave tensors alone in register_slot and unregister_slot.",
    )
    trial.judge(
        "random_numbers_unchanged",
        {while_there: difference(numbers, numbers_attached)}
        | {taken_off: difference(numbers, random_state(trial.device))},
        "draws random numbers when slots come or go",
        "0 draws",
        "Draw none in injection_points, register_slot and unregister_slot.",
    )


def _with_mixed_modes(trial: Trial, odd: int) -> tuple[nn.Module, dict[str, bool]]:
    """Return a copy in which every other submodule is in eval mode, as users freeze some, and the modes."""
    host = trial.twin()
    for number, module in enumerate(host.modules()):
        module.training = number % 2 != odd
    return host, {name: module.training for name, module in host.named_modules()}


def _compare(trial: Trial, model: MorphogeneticModel, name: str, what: str) -> Run:
    """Judge ``name``: with this model, outputs, buffers and random numbers are the bare host's in both modes."""
    runs: dict[bool, Run] = {}
    faults: dict[str, str] = {}
    with trial.attempt(name, f"does not run with {what}", "the output of the bare host"):
        for training in (False, True):  # a run in training mode may move statistics
            runs[training] = trial.call(model, model.host, training)
            faults[mode_name(training)] = unlike(trial.bare[training], runs[training])
    trial.judge(
        name,
        faults,
        f"does not compute the same with {what}",
        "output, buffers and random numbers of the bare host, bit for bit",
        "register_slot must put slot(features) in place of the features and do nothing else.",
    )
    return runs[True]


def _training(trial: Trial) -> None:
    with trial.attempt("training_output", "cannot hold a seed", "germination in every slot"):
        model = _model(trial, trial.twin())
        _grow(model, SeedStage.TRAINING)
        _make_loud(model)
    grown = _compare(trial, model, "training_output", "seeds in TRAINING")
    trial.judge(
        "training_gradient",
        {"train mode": difference(trial.bare[True].gradients, grown.gradients)},
        "does not learn the same with seeds in TRAINING",
        "gradients of the bare host, bit for bit",
        "register_slot must not detach the features, and must use what the slot returns.",
    )


def _grow(model: MorphogeneticModel, stage: SeedStage) -> None:
    for name, slot in model.slots.items():
        model.germinate(name, f"conformance:{slot.point.topology.value}")
        while slot.stage is not stage:
            if slot.stage is SeedStage.BLENDING:
                slot.set_alpha(1.0)
            result = model.advance_stage(name)
            if not result:
                raise RuntimeError(f"a seed stays in {slot.stage.name}: {result}")


def _grown(trial: Trial) -> None:
    with trial.attempt(
        "gradient_at_alpha_one", "does not run with seeds at alpha 1", "a forward and a backward pass"
    ):
        model = _model(trial, trial.twin())
        _grow(model, SeedStage.SHADOWING)
        learned = trial.call(model, model.host, True).gradients
    wanted = [name for name, grad in trial.bare[True].gradients.items() if bool(grad.any())]
    starved = [name for name in wanted if name not in learned or not bool(learned[name].any())]
    trial.judge(
        "gradient_at_alpha_one",
        {"train mode": f"none at {', '.join(starved[:4])}" if starved else ""},
        "is starved of gradient behind seeds at alpha 1",
        f"a gradient at each of the {len(wanted)} tensors that the bare host trains",
        "Do not detach the features, the slot's output, or run slots without gradients.",
    )
    _slots_take_features(trial, model)
    _copies_with_seeds(trial, model)


def _slots_take_features(trial: Trial, model: MorphogeneticModel) -> None:
    """Call the model with each seed alone made loud: the slot is called once, and the output must change."""
    shapes = [shape for _, shape in trial.points]
    quiet = _output(trial, model)
    _make_loud(model)
    faults: dict[str, str] = {}
    for (name, slot), shape in zip(model.slots.items(), shapes, strict=True):
        calls: list[tuple[int, ...]] = []
        with ExitStack() as stack:
            for other in model.slots.values():
                if other is not slot:
                    stack.enter_context(other.forced(ForwardMode.PASS))
            handle = slot.register_forward_pre_hook(lambda _m, args, calls=calls: calls.append(args[0].shape))
            stack.callback(handle.remove)
            loud = _output(trial, model)
        if len(calls) != 1:
            faults[f"slot '{name}'"] = f"called {len(calls)} times"
        elif tuple(calls[0]) != shape:
            faults[f"slot '{name}'"] = f"given {tuple(calls[0])}, the point has {shape}"
        elif not difference(quiet, loud):
            faults[f"slot '{name}'"] = "a seed that changes the features changes no output"
    trial.judge(
        "slots_take_features",
        faults,
        "does not pass its features through a slot",
        "one call a forward pass, whose result the host goes on with",
        "register_slot(name, slot) must put slot(features) in place of the features at that point.",
    )


def _copies_with_seeds(trial: Trial, model: MorphogeneticModel) -> None:
    faults: dict[str, str] = {}
    with trial.attempt("deepcopy_with_seeds", "cannot be copied with seeds", "copy.deepcopy(model) works"):
        before = _output(trial, model)
        twin = copy.deepcopy(model)
        faults["the copy"] = difference(before, _output(trial, twin))
        calls: list[str] = []
        for whose, one in (("original", model), ("copy", twin)):
            for slot in one.slots.values():
                slot.register_forward_pre_hook(lambda _m, _a, whose=whose: calls.append(whose))
        _output(trial, twin)
        strangers = calls.count("original")
        faults["slots called by the copy"] = f"{strangers} of the original" if strangers else ""
        faults["own slots called"] = "" if "copy" in calls else "none"
    trial.judge(
        "deepcopy_with_seeds",
        faults,
        "does not copy its wiring to the slots",
        "a copy that uses the copy's slots",
        "A lambda or closure keeps the original slot: hook an object that holds it (SlotHook), as HookedHost does.",
    )


def _output(trial: Trial, model: MorphogeneticModel) -> dict[str, Tensor]:
    """Return the outputs in eval mode; `_compare` of dormant and training seeds covers the other mode."""
    return trial.call(model, model.host, False).outputs


@final
class _Snapshot:
    """The parts of a host that slots must leave unchanged."""

    def __init__(self, host: nn.Module) -> None:
        self.keys = list(host.state_dict())
        self.modules = [name for name, _ in host.named_modules(remove_duplicate=False)]
        self.modes = {name: module.training for name, module in host.named_modules()}
        self.tensors = {name: tensor.detach().clone() for name, tensor in all_tensors(host).items()}
        self.hooks = [
            f"{name or type(host).__name__}: {kind.strip('_')}"
            for name, module in host.named_modules()
            for kind, hooks in sorted(vars(module).items())
            if kind.endswith("_hooks") and isinstance(hooks, Mapping)
            for _ in hooks
        ]

    def only(self, names: Collection[str]) -> dict[str, Tensor]:
        """Return the tensors of these names."""
        return {name: tensor for name, tensor in self.tensors.items() if name in names}


def _make_loud(model: MorphogeneticModel) -> None:
    with torch.no_grad():
        for parameter in model.seed_parameters():
            parameter.copy_(torch.linspace(*_LOUD, parameter.numel()).view_as(parameter))


def _unlike_modes(before: Mapping[str, bool], after: Mapping[str, bool]) -> str:
    changed = [name for name in before if name in after and before[name] is not after[name]]
    return f"'{changed[0]}' is in {mode_name(after[changed[0]])}" if changed else ""
