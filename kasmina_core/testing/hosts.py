"""What a host must show: its points are what they say, and slots change nothing until a seed is there."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Final, final

import torch
from torch import Tensor, nn

from kasmina_core.blueprints.catalogue import BlueprintRegistry
from kasmina_core.blueprints.declarations import BlueprintSpec, HostSpec, import_factory
from kasmina_core.checks.global_state import preserved_global_state
from kasmina_core.checks.reports import CheckResult, CheckStatus
from kasmina_core.errors import KasminaError
from kasmina_core.gates.gates import QualityGates
from kasmina_core.gates.thresholds import GateThresholds
from kasmina_core.growth.config import GrowthConfig
from kasmina_core.growth.model import MorphogeneticModel
from kasmina_core.hosts import InjectionPoint, features_in, submodule
from kasmina_core.lifecycle import SeedStage
from kasmina_core.probing import call_with, requested_points
from kasmina_core.quiet import private_rng
from kasmina_core.slots.slot import ForwardMode
from kasmina_core.testing.comparing import Run, difference, random_state, run, tensors_in, unlike_names
from kasmina_core.testing.offered import OfferedHost, host_of
from kasmina_core.testing.reports import HOST_CHECKS, HostReport
from kasmina_core.topology import Topology

_SEED: Final = 0x686F7374
_LOUD: Final = (0.5, 2.0)
"""Range of a loud seed's weights: no two alike, or a normalisation behind the slot could take them out again."""

_UNDEMANDING: Final = QualityGates(
    thresholds=GateThresholds(
        min_training_epochs=0,
        min_shadowing_epochs=0,
        min_probation_epochs=0,
        max_isolation_violations=10**9,
        min_samples=2,
        min_gain=-1e9,
        min_t=-1e9,
        max_harm_t=1e9,
        max_output_deviation=1e9,
    )
)
"""Gates that let every seed pass: the host is on trial here, not the seed."""


def check_host(
    host: nn.Module | Callable[[], nn.Module] | HostSpec | str,
    example: object = None,
    *,
    slots: Iterable[str | InjectionPoint] | None = None,
    causal: bool = False,
    options: Mapping[str, Any] | None = None,
    device: str | torch.device | None = None,
) -> HostReport:
    """Prove that a host can hold slots, and report what was found.

    Everything is done to copies; the host that is given stays as it is, and so do the global random numbers and
    torch's settings. The checks, in their order (`HOST_CHECKS`):

    - ``builds``: the factory returns a module; ``deepcopy``: a copy computes the same and shares no tensor.
    - ``injection_points``: they exist, their names differ, and asking twice gives the same ones.
    - ``example_runs``, ``repeatable_forward``: from equal random numbers, equal outputs in both modes.
    - ``points_fire_once``, ``points_as_declared``: in both modes; layout and width are the declared ones.
    - ``attaches``; ``keys_unchanged``, ``hooks_restored``, ``modes_unchanged``, ``buffers_unchanged`` (and
      parameters), ``random_numbers_unchanged``: slots come and go without a trace.
    - ``dormant_output``, ``training_output``, ``training_gradient``: bit-equal to the bare host's, with its buffers
      and random numbers.
    - ``gradient_at_alpha_one``: with seeds that are the identity at alpha 1, every parameter that the bare host
      trains still gets a gradient.
    - ``slots_take_features``: each slot is called once, and the host goes on with what it returns.
    - ``deepcopy_with_seeds``: a copy of a grown model uses the copy's slots.
    - ``causal_claim``, where a point is declared causal: changing inputs at later positions changes no feature at
      earlier ones. Of several inputs with positions one is enough, since a decoder may look at all of an encoder's.

    Args:
        host: A module, a function or class that makes one, a `HostSpec`, or the id ``pack:name`` of one in an
            installed pack.
        example: Inputs for one forward: a tensor, a tuple of arguments or a mapping of keywords. Default: the host's
            ``example_inputs()``.
        slots: As for `MorphogeneticModel`; ``None`` for all points that the host declares.
        causal: Whether points given by path lie in a causal host.
        options: Keyword arguments for the factory.
        device: Where to run; ``None`` leaves the host where it is.

    Raises:
        UnknownNameError: If nobody offers the id.
        PluginError: If its pack cannot be used.
    """
    with ExitStack() as stack:
        stack.enter_context(preserved_global_state())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        trial = _Trial(host, options or {}, device)
        trial.run(example, slots, causal)
    return HostReport(trial.name, trial.origin, trial.place, tuple(trial.in_order()))


class _Stop(Exception):
    """The checks that follow cannot run; the message says why."""


@final
class BendSeed(nn.Module):
    """``x + w |x|`` with a weight a feature, 0 at birth: the identity until somebody moves ``w``."""

    def __init__(self, dim: int, topology: Topology) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros((dim, 1, 1) if topology is Topology.CNN else (dim,)))

    def forward(self, x: Tensor) -> Tensor:
        """Return the bent features."""
        return x + self.weight * x.abs()


def _cnn_seed(dim: int) -> BendSeed:
    return BendSeed(dim, Topology.CNN)


def _transformer_seed(dim: int) -> BendSeed:
    return BendSeed(dim, Topology.TRANSFORMER)


def _registry() -> BlueprintRegistry:
    registry = BlueprintRegistry()
    for topology, factory in ((Topology.CNN, _cnn_seed), (Topology.TRANSFORMER, _transformer_seed)):
        spec = BlueprintSpec(topology.value, topology, factory, lambda dim: dim)
        registry.register(spec, pack="conformance")
    return registry


class _Trial:
    """The checks of one host while they run."""

    def __init__(self, given: object, options: Mapping[str, Any], device: str | torch.device | None) -> None:
        self.given: object = given
        self.options = dict(options)
        self.asked_device = torch.device(device) if device is not None else None
        self.origin, self.place = "", ""
        self.results: dict[str, CheckResult] = {}
        self.spec: HostSpec | None = None
        if isinstance(given, str):
            self._take(host_of(given))
        elif isinstance(given, HostSpec):
            self._take(OfferedHost(given.name, given))
        else:
            kind = type(given) if isinstance(given, nn.Module) else given
            self.name = getattr(kind, "__name__", type(given).__name__)

    def _take(self, offered: OfferedHost) -> None:
        self.name, self.spec, self.origin = offered.label, offered.spec, offered.origin

    def in_order(self) -> Iterator[CheckResult]:
        return (self.results[name] for name in HOST_CHECKS if name in self.results)

    def run(self, example: object, slots: Iterable[str | InjectionPoint] | None, causal: bool) -> None:
        try:
            self.slots = [slots] if isinstance(slots, (str, InjectionPoint)) else slots
            self.slots = list(self.slots) if self.slots is not None else None
            self.causal = causal
            self.host = self._first_copy(self._build())
            self.wanted = self._points()
            self.example = self._example(example)
            self.bare = {mode: self._run_bare(mode) for mode in (True, False)}
            self.points = self._fired()
            self._attach_and_detach()
            self._dormant()
            self._training()
            self._grown()
            self._causal()
        except _Stop as stop:
            for name in HOST_CHECKS:
                if name not in self.results and name != "causal_claim":
                    self._keep(CheckResult(name, CheckStatus.NOT_RUN, hint=str(stop)))

    # -- keeping the results ------------------------------------------------------------------------------------

    def _keep(self, result: CheckResult) -> None:
        self.results.setdefault(result.name, result)

    def _pass(self, name: str, measured: object = None) -> None:
        self._keep(CheckResult(name, CheckStatus.PASSED, device=self.place, measured=measured))

    def _fail(
        self,
        name: str,
        claim: str,
        expected: object,
        measured: object,
        hint: str,
        error: BaseException | None = None,
        where: str = "",
    ) -> None:
        self.results[name] = CheckResult(
            name,
            CheckStatus.FAILED,
            device=self.place,
            where=where,
            expected=expected,
            measured=measured,
            hint=hint,
            claim=claim,
            error=error,
        )

    def _judge(self, name: str, faults: Mapping[str, str], claim: str, expected: str, hint: str) -> None:
        """Pass if there is no fault, else fail with the first; keys say where."""
        found = {where: fault for where, fault in faults.items() if fault}
        if not found:
            self._pass(name, expected)
            return
        where, fault = next(iter(found.items()))
        self._fail(name, claim, expected, fault, hint, where=where)

    @contextmanager
    def _attempt(self, name: str, claim: str, expected: str, hint: str) -> Iterator[None]:
        """Fail ``name`` and stop if the block raises."""
        try:
            yield
        except _Stop:
            raise
        except (Exception, SystemExit) as error:
            text = str(error) if isinstance(error, KasminaError) else f"{type(error).__name__}: {error}"
            self._fail(name, claim, expected, text, hint, error)
            raise _Stop(f"'{name}' failed") from error

    # -- the bare host --------------------------------------------------------------------------------------------

    def _build(self) -> nn.Module:
        if isinstance(self.given, nn.Module):
            self._pass("builds", "given as a module")
            return self.given
        factory: object = self.spec.factory if self.spec is not None else self.given
        with self._attempt(
            "builds", "cannot be built", "an nn.Module", "Call it yourself with the same options to see more."
        ):
            with private_rng(_SEED):
                made: object = import_factory(f"Host '{self.name}'", factory)(**self.options)  # type: ignore[arg-type]  # checked there
            if not isinstance(made, nn.Module):
                raise TypeError(f"the factory returned {type(made).__name__}")
        if self.spec is None:
            self.name = type(made).__name__
        self._pass("builds", type(made).__name__)
        return made

    def _first_copy(self, host: nn.Module) -> nn.Module:
        with self._attempt(
            "deepcopy",
            "cannot be copied",
            "copy.deepcopy(host) works",
            "Keep open files, locks, generators and lambdas out of the module, or write __deepcopy__.",
        ):
            twin = copy.deepcopy(host)
            shared = {id(t) for t in _all_tensors(host).values()} & {
                id(t) for t in _all_tensors(twin).values()
            }
            unlike = difference(_all_tensors(host), _all_tensors(twin))
        if shared or unlike:
            self._fail(
                "deepcopy",
                "is not copied whole",
                "equal tensors of its own",
                f"{len(shared)} tensors are shared with the original" if shared else unlike,
                "Do not keep parameters or buffers where __deepcopy__ passes them on as they are.",
            )
            raise _Stop("'deepcopy' failed")
        self._pass("deepcopy", "equal tensors of its own")
        if self.asked_device is not None:
            twin = twin.to(self.asked_device)
        tensors = _all_tensors(twin).values()
        self.device = next((t.device for t in tensors), self.asked_device or torch.device("cpu"))
        self.place = str(self.device)
        return twin

    def _twin(self) -> nn.Module:
        return copy.deepcopy(self.host)

    def _run(self, model: nn.Module, host: nn.Module, training: bool) -> Run:
        own = _all_tensors(self.host)
        return run(model, host, own, self.example, training=training, device=self.device, seed=_SEED)

    def _points(self) -> list[str | InjectionPoint]:
        host = self.host
        with self._attempt(
            "injection_points",
            "does not say where slots go",
            "points that exist, each with a name of its own",
            "Correct injection_points(), or name the places: check_host(host, slots=['layer3']).",
        ):
            wanted = requested_points(host, self.slots)
            for item in wanted:
                submodule(host, item.path if isinstance(item, InjectionPoint) else item)
            names = [item.name for item in wanted if isinstance(item, InjectionPoint)]
            if twice := sorted({name for name in names if names.count(name) > 1}):
                raise ValueError(f"the name '{twice[0]}' is used for more than one point")
            if requested_points(host, self.slots) != wanted:
                raise ValueError("asking twice gives different points")
            other = [p for p in wanted if isinstance(p, InjectionPoint) and self.spec is not None]
            for point in other:
                if self.spec is not None and point.topology is not self.spec.topology:
                    raise ValueError(
                        f"the HostSpec declares {self.spec.topology.value}, point '{point.name}' {point.topology.value}"
                    )
        self._pass("injection_points", f"{len(wanted)} points")
        return wanted

    def _example(self, example: object) -> object:
        with self._attempt(
            "example_runs",
            "does not run on its example",
            "a forward pass in both modes that returns a floating-point tensor",
            "Give inputs that the host takes, as example= or by example_inputs(): a tensor, a tuple or a mapping.",
        ):
            if example is None:
                offered = getattr(self.host, "example_inputs", None)
                if not callable(offered):
                    raise TypeError("no example was given, and the host has no example_inputs()")
                example = offered()
            elif self.asked_device is not None:
                example = _moved(example, self.asked_device)
            for training in (True, False):
                with private_rng(_SEED, self.device), torch.no_grad():
                    output = call_with(self._twin().train(training), example)
                if not any(tensor.is_floating_point() for _, tensor in tensors_in(output)):
                    raise TypeError(f"the output holds no floating-point tensor: {type(output).__name__}")
        self._pass("example_runs", "both modes")
        return example

    def _run_bare(self, training: bool) -> Run:
        first, second = (self._run(twin, twin, training) for twin in (self._twin(), self._twin()))
        if fault := _unlike(first, second) or difference(first.gradients, second.gradients):
            self._fail(
                "repeatable_forward",
                "computes something else each time",
                "equal results from equal random numbers",
                fault,
                "Nothing else can be compared. Take randomness from torch's generators only, and state out of forward; "
                "on CUDA try torch.use_deterministic_algorithms(True).",
                where=_mode(training),
            )
            raise _Stop("'repeatable_forward' failed, so that nothing can be compared")
        if not training:
            self._pass("repeatable_forward", "both modes")
        return first

    def _fired(self) -> list[tuple[str | InjectionPoint, tuple[int, ...]]]:
        """Count what each point returns in both modes; return the points with the shape of their features."""
        paths = [item.path if isinstance(item, InjectionPoint) else item for item in self.wanted]
        counts: dict[str, str] = {}
        shapes: dict[str, str] = {}
        found: list[tuple[str | InjectionPoint, tuple[int, ...]]] = []
        for training in (True, False):
            seen = _outputs_at(self._twin().train(training), paths, self.example, self.device)
            for item, path in zip(self.wanted, paths, strict=True):
                where = f"'{path}', {_mode(training)}"
                times = len(seen[path])
                counts[where] = "" if times == 1 else f"{times} times"
                if times != 1:
                    continue
                features = features_in(seen[path][0])
                shapes[where] = _misfit(item, features)
                if not shapes[where] and not training:
                    found.append((item, tuple(features.shape)))
        self._judge(
            "points_fire_once",
            counts,
            "has a point that does not fire once",
            "once a forward pass",
            "Name a submodule that every forward pass calls once; a module that is used twice is no point.",
        )
        self._judge(
            "points_as_declared",
            shapes,
            "has a point that is not as declared",
            "(b, c, h, w) or (b, t, d) of the declared width",
            "Set dim and topology of the InjectionPoint to what the submodule returns.",
        )
        if any(counts.values()) or any(shapes.values()):
            raise _Stop("its points are not as declared")
        return found

    # -- with slots -----------------------------------------------------------------------------------------------

    def _model(self, host: nn.Module) -> MorphogeneticModel:
        config = GrowthConfig(gates=_UNDEMANDING, isolation_every=0)
        model = MorphogeneticModel(
            host, self.slots, example=self.example, config=config, registry=_registry(), causal=self.causal
        )
        model.evaluate_with(lambda: torch.zeros(2))
        return model

    def _attach_and_detach(self) -> None:
        host, modes = self._with_mixed_modes(1)
        before, numbers = _Snapshot(host), random_state(self.device)
        with self._attempt(
            "attaches",
            "cannot be given slots",
            "MorphogeneticModel(host) works",
            "Its register_slot(name, slot) must pass the features of that point through slot.",
        ):
            model = self._model(host)
            attached, numbers_attached = _Snapshot(host), random_state(self.device)
            model_keys = list(model.state_dict())
            model.detach_slots()
            other, other_modes = self._with_mixed_modes(0)
            other_model = self._model(other)
            other_attached = _Snapshot(other)
            other_model.detach_slots()
        self._pass("attaches", f"{len(self.points)} slots")
        after = _Snapshot(host)
        while_there, taken_off = "with slots attached", "after they were taken off"
        moments = ((while_there, attached), (taken_off, after))
        self._judge(
            "keys_unchanged",
            {while_there: unlike_names(before.keys, model_keys)}
            | {where: unlike_names(before.keys, now.keys) for where, now in moments}
            | {f"submodules {where}": unlike_names(before.modules, now.modules) for where, now in moments},
            "does not keep its state_dict keys and submodules",
            "those of the bare host",
            "register_slot must not make the slot a child or a buffer: use a forward hook, as HookedHost does.",
        )
        self._judge(
            "hooks_restored",
            {taken_off: unlike_names(before.hooks, after.hooks)},
            "keeps hooks after the slots are gone",
            "the hooks of the bare host",
            "unregister_slot(name) must undo register_slot(name): remove the handle.",
        )
        self._judge(
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
        self._judge(
            "buffers_unchanged",
            {where: difference(before.tensors, now.only(before.tensors)) for where, now in moments},
            "does not keep its parameters and buffers",
            "bit-equal values",
            "Leave tensors alone in register_slot and unregister_slot.",
        )
        self._judge(
            "random_numbers_unchanged",
            {while_there: difference(numbers, numbers_attached)}
            | {taken_off: difference(numbers, random_state(self.device))},
            "draws random numbers when slots come or go",
            "0 draws",
            "Draw none in injection_points, register_slot and unregister_slot.",
        )

    def _with_mixed_modes(self, odd: int) -> tuple[nn.Module, dict[str, bool]]:
        """Return a copy in which every other submodule is in eval mode, as users freeze some, and the modes."""
        host = self._twin()
        for number, module in enumerate(host.modules()):
            module.training = number % 2 != odd
        return host, {name: module.training for name, module in host.named_modules()}

    def _compare(self, model: MorphogeneticModel, name: str, what: str) -> Run:
        """Judge ``name``: with this model, outputs, buffers and random numbers are the bare host's in both modes."""
        runs: dict[bool, Run] = {}
        faults: dict[str, str] = {}
        with self._attempt(
            name, f"does not run with {what}", "the output of the bare host", "See the error."
        ):
            for training in (False, True):  # a run in training mode may move statistics
                runs[training] = self._run(model, model.host, training)
                faults[_mode(training)] = _unlike(self.bare[training], runs[training])
        self._judge(
            name,
            faults,
            f"does not compute the same with {what}",
            "output, buffers and random numbers of the bare host, bit for bit",
            "register_slot must put slot(features) in place of the features and do nothing else.",
        )
        return runs[True]

    def _dormant(self) -> None:
        self._compare(self._model(self._twin()), "dormant_output", "empty slots")

    def _training(self) -> None:
        with self._attempt(
            "training_output", "cannot hold a seed", "germination in every slot", "See the error."
        ):
            model = self._model(self._twin())
            self._grow(model, SeedStage.TRAINING)
            _make_loud(model)
        grown = self._compare(model, "training_output", "seeds in TRAINING")
        self._judge(
            "training_gradient",
            {"train mode": difference(self.bare[True].gradients, grown.gradients)},
            "does not learn the same with seeds in TRAINING",
            "gradients of the bare host, bit for bit",
            "register_slot must not detach the features, and must use what the slot returns.",
        )

    def _grow(self, model: MorphogeneticModel, stage: SeedStage) -> None:
        for name, slot in model.slots.items():
            model.germinate(name, f"conformance:{slot.point.topology.value}")
            while slot.stage is not stage:
                if slot.stage is SeedStage.BLENDING:
                    slot.set_alpha(1.0)
                result = model.advance_stage(name)
                if not result:
                    raise RuntimeError(f"a seed stays in {slot.stage.name}: {result}")

    def _grown(self) -> None:
        with self._attempt(
            "gradient_at_alpha_one",
            "does not run with seeds at alpha 1",
            "a forward and a backward pass",
            "See the error.",
        ):
            model = self._model(self._twin())
            self._grow(model, SeedStage.SHADOWING)
            learned = self._run(model, model.host, True).gradients
        wanted = [name for name, grad in self.bare[True].gradients.items() if bool(grad.any())]
        starved = [name for name in wanted if name not in learned or not bool(learned[name].any())]
        self._judge(
            "gradient_at_alpha_one",
            {"train mode": f"none at {', '.join(starved[:4])}" if starved else ""},
            "is starved of gradient behind seeds at alpha 1",
            f"a gradient at each of the {len(wanted)} tensors that the bare host trains",
            "Do not detach the features, the slot's output, or run slots without gradients.",
        )
        self._slots_take_features(model)
        self._copies_with_seeds(model)

    def _slots_take_features(self, model: MorphogeneticModel) -> None:
        """Call the model with each seed alone made loud: the slot is called once, and the output must change."""
        shapes = [shape for _, shape in self.points]
        quiet = self._output(model)
        _make_loud(model)
        faults: dict[str, str] = {}
        for (name, slot), shape in zip(model.slots.items(), shapes, strict=True):
            calls: list[tuple[int, ...]] = []
            with ExitStack() as stack:
                for other in model.slots.values():
                    if other is not slot:
                        stack.enter_context(other.forced(ForwardMode.PASS))
                handle = slot.register_forward_pre_hook(
                    lambda _m, args, calls=calls: calls.append(args[0].shape)
                )
                stack.callback(handle.remove)
                loud = self._output(model)
            if len(calls) != 1:
                faults[f"slot '{name}'"] = f"called {len(calls)} times"
            elif tuple(calls[0]) != shape:
                faults[f"slot '{name}'"] = f"given {tuple(calls[0])}, the point has {shape}"
            elif not difference(quiet, loud):
                faults[f"slot '{name}'"] = "a seed that changes the features changes no output"
        self._judge(
            "slots_take_features",
            faults,
            "does not pass its features through a slot",
            "one call a forward pass, whose result the host goes on with",
            "register_slot(name, slot) must put slot(features) in place of the features at that point.",
        )

    def _copies_with_seeds(self, model: MorphogeneticModel) -> None:
        faults: dict[str, str] = {}
        with self._attempt(
            "deepcopy_with_seeds",
            "cannot be copied with seeds",
            "copy.deepcopy(model) works",
            "See the error.",
        ):
            before = self._output(model)
            twin = copy.deepcopy(model)
            faults["the copy"] = difference(before, self._output(twin))
            calls: list[str] = []
            for whose, one in (("original", model), ("copy", twin)):
                for slot in one.slots.values():
                    slot.register_forward_pre_hook(lambda _m, _a, whose=whose: calls.append(whose))
            self._output(twin)
            strangers = calls.count("original")
            faults["slots called by the copy"] = f"{strangers} of the original" if strangers else ""
            faults["own slots called"] = "" if "copy" in calls else "none"
        self._judge(
            "deepcopy_with_seeds",
            faults,
            "does not copy its wiring to the slots",
            "a copy that uses the copy's slots",
            "A lambda or closure keeps the original slot: hook an object that holds it (SlotHook), as HookedHost does.",
        )

    def _output(self, model: nn.Module) -> dict[str, Tensor]:
        """Return the outputs in eval mode; `_compare` of dormant and training seeds covers the other mode."""
        host = model.host if isinstance(model, MorphogeneticModel) else model
        return self._run(model, host, False).outputs

    # -- the causal claim -------------------------------------------------------------------------------------------

    def _causal(self) -> None:
        claimed = [
            (item.path if isinstance(item, InjectionPoint) else item, shape[1])
            for item, shape in self.points
            if len(shape) == Topology.TRANSFORMER.ndim
            and (item.causal if isinstance(item, InjectionPoint) else self.causal)
        ]
        if not claimed:
            return
        verdicts = [self._causal_at(path, length) for path, length in claimed]
        untested = [path for (path, _), verdict in zip(claimed, verdicts, strict=True) if verdict is None]
        faults = {f"'{path}'": verdict or "" for (path, _), verdict in zip(claimed, verdicts, strict=True)}
        if untested and not any(faults.values()):
            self._keep(
                CheckResult(
                    "causal_claim",
                    CheckStatus.NOT_RUN,
                    hint=f"no input could be changed position by position to see it in the features of '{untested[0]}'; "
                    "give an example of 2 positions or more, (b, t) or (b, t, d), with several values",
                )
            )
            return
        self._judge(
            "causal_claim",
            faults,
            "looks ahead at a point that is declared causal",
            "features that no later input changes",
            "Mask the attention (is_causal=True), or declare the point causal=False.",
        )

    def _causal_at(self, path: str, length: int) -> str | None:
        """Return how a point looks ahead, ``""`` if it does not, ``None`` if no input tells."""
        plain = self._features(path, self.example)
        leaks: list[str] = []
        for name, tensor in tensors_in(self.example, "input"):
            if tensor.dim() < 2 or tensor.shape[1] != length or length < 2:
                continue
            effective, leak = False, ""
            for cut in sorted({1, length // 2, length - 1}):
                changed = _changed_from(tensor, cut)
                try:
                    features = self._features(path, _replaced(self.example, tensor, changed))
                except Exception:  # a value that this input does not take; it says nothing
                    continue
                if features.shape != plain.shape:
                    continue
                effective = effective or not _close(plain[:, cut:], features[:, cut:])
                if not leak and not _close(plain[:, :cut], features[:, :cut]):
                    leak = f"{name} from position {cut} on changes features before position {cut}"
            if effective and not leak:
                return ""
            leaks += [leak] if leak else []
        return leaks[0] if leaks else None

    def _features(self, path: str, example: object) -> Tensor:
        seen = _outputs_at(self._twin().eval(), [path], example, self.device)
        features: Tensor = features_in(seen[path][0])
        return features


# -- small things -----------------------------------------------------------------------------------------------------


@final
class _Snapshot:
    """What slots must leave as it was."""

    def __init__(self, host: nn.Module) -> None:
        self.keys = list(host.state_dict())
        self.modules = [name for name, _ in host.named_modules(remove_duplicate=False)]
        self.modes = {name: module.training for name, module in host.named_modules()}
        self.tensors = {name: tensor.detach().clone() for name, tensor in _all_tensors(host).items()}
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


def _all_tensors(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _make_loud(model: MorphogeneticModel) -> None:
    with torch.no_grad():
        for parameter in model.seed_parameters():
            parameter.copy_(torch.linspace(*_LOUD, parameter.numel()).view_as(parameter))


def _mode(training: bool) -> str:
    return "train mode" if training else "eval mode"


def _unlike(bare: Run, found: Run) -> str:
    return (
        difference(bare.outputs, found.outputs)
        or difference(bare.buffers, found.buffers)
        or difference(bare.random_state, found.random_state)
    )


def _unlike_modes(before: Mapping[str, bool], after: Mapping[str, bool]) -> str:
    changed = [name for name in before if name in after and before[name] is not after[name]]
    return f"'{changed[0]}' is in {_mode(after[changed[0]])}" if changed else ""


def _misfit(item: str | InjectionPoint, features: object) -> str:
    """Return in what features differ from what a point declares; empty if they fit."""
    if not isinstance(features, Tensor):
        return f"{type(features).__name__}, no tensor"
    layouts = {topology.ndim: topology for topology in Topology}
    if not features.is_floating_point() or features.dim() not in layouts:
        return f"{features.dtype} of shape {tuple(features.shape)}"
    topology = layouts[features.dim()]
    dim = features.shape[topology.feature_dim]
    if isinstance(item, InjectionPoint) and (item.topology, item.dim) != (topology, dim):
        return (
            f"{topology.value}, width {dim}, where {item.topology.value}, width {item.dim}, is declared "
            f"(features {tuple(features.shape)})"
        )
    return ""


def _outputs_at(
    host: nn.Module, paths: Iterable[str], example: object, device: torch.device
) -> dict[str, list[Any]]:
    """Run a host once without gradients and return what the submodules at ``paths`` returned."""
    seen: dict[str, list[Any]] = {path: [] for path in paths}
    for path, outputs in seen.items():
        submodule(host, path).register_forward_hook(lambda _m, _a, out, kept=outputs: kept.append(_kept(out)))
    with private_rng(_SEED, device), torch.no_grad():
        call_with(host, example)
    return seen


def _kept(output: Any) -> Any:
    """Return an output whose features cannot be written to by what comes after (an in-place ReLU)."""
    features = features_in(output)
    return features.clone() if isinstance(features, Tensor) else output


def _moved(example: Any, device: torch.device) -> Any:
    if isinstance(example, Tensor):
        return example.to(device)
    if isinstance(example, Mapping):
        return {key: _moved(value, device) for key, value in example.items()}
    if isinstance(example, (tuple, list)):
        return type(example)(_moved(value, device) for value in example)
    return example


def _replaced(example: Any, old: Tensor, new: Tensor) -> Any:
    if example is old:
        return new
    if isinstance(example, Mapping):
        return {key: _replaced(value, old, new) for key, value in example.items()}
    if isinstance(example, (tuple, list)):
        return type(example)(_replaced(value, old, new) for value in example)
    return example


def _changed_from(tensor: Tensor, cut: int) -> Tensor:
    """Return the tensor with other values from position ``cut`` on; whole numbers stay among those that occur.

    >>> _changed_from(torch.tensor([[3, 5, 9]]), 1)
    tensor([[3, 9, 3]])
    """
    changed = tensor.clone()
    if tensor.is_floating_point():
        changed[:, cut:] = 1.0 - 2.0 * tensor[:, cut:]
    elif tensor.dtype is not torch.bool:
        values = torch.unique(tensor)
        if len(values) == 1:
            changed[:, cut:] += -1 if int(values[0]) > 0 else 1
        else:
            place = torch.searchsorted(values, tensor[:, cut:].contiguous())
            changed[:, cut:] = values[(place + 1) % len(values)]
    return changed


def _close(a: Tensor, b: Tensor) -> bool:
    a, b = a.double(), b.double()
    scale = float(a.abs().max()) if a.numel() else 0.0
    return bool(torch.allclose(a, b, rtol=1e-5, atol=1e-6 * scale, equal_nan=True))
