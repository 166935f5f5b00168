"""Checks of a host: its points are as declared, and slots change nothing until a seed is there."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kasmina_core.blueprints.declarations import HostSpec, import_factory
from kasmina_core.checks.global_state import preserved_global_state
from kasmina_core.checks.reports import CheckResult, CheckStatus
from kasmina_core.errors import KasminaError
from kasmina_core.hosts import InjectionPoint, submodule
from kasmina_core.probing import call_with, requested_points
from kasmina_core.quiet import private_rng
from kasmina_core.testing.comparing import (
    SEED,
    Run,
    all_tensors,
    difference,
    features_at,
    mapped,
    mode_name,
    path_of,
    run,
    tensors_in,
    unlike,
)
from kasmina_core.testing.host_causality import check_causality
from kasmina_core.testing.host_with_slots import check_slots
from kasmina_core.testing.offered import host_of
from kasmina_core.testing.reports import HOST_CHECKS, HostReport
from kasmina_core.topology import Topology


def check_host(
    host: nn.Module | Callable[[], nn.Module] | HostSpec | str,
    example: object = None,
    *,
    slots: Iterable[str | InjectionPoint] | None = None,
    causal: bool | Mapping[str, bool] | None = None,
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
    - ``causal_claim``, where a point is declared or said to be causal: changing inputs at later positions changes no feature at
      earlier ones. Of several inputs with positions one is enough, since a decoder may look at all of an encoder's.

    Args:
        host: A module, a function or class that makes one, a `HostSpec`, or the id ``pack:name`` of one in an
            installed pack.
        example: Inputs for one forward: a tensor, a tuple of arguments or a mapping of keywords. Default: the host's
            ``example_inputs()``.
        slots: As for `MorphogeneticModel`; ``None`` for all points that the host declares.
        causal: Whether points given by path are causal, for all of them or by tower, as for `MorphogeneticModel`:
            ``{"encoder": False, "decoder": True}``.
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
        trial = Trial(host, options or {}, device)
        try:
            trial.look_alone(example, slots, causal)
            check_slots(trial)
            check_causality(trial)
        except Stop as stop:
            trial.leave_out(str(stop))
    return HostReport(
        trial.name,
        trial.origin,
        trial.place,
        tuple(trial.results[name] for name in HOST_CHECKS if name in trial.results),
    )


class Stop(Exception):
    """The checks that follow cannot run; the message says why."""


class Trial:
    """The checks of one host while they run."""

    def __init__(self, given: object, options: Mapping[str, Any], device: str | torch.device | None) -> None:
        self.given: object = given
        self.options = dict(options)
        self.asked_device = torch.device(device) if device is not None else None
        self.origin, self.place = "", ""
        self.results: dict[str, CheckResult] = {}
        self.spec: HostSpec | None = None
        if isinstance(given, str):
            self.spec, self.origin = host_of(given)
            self.name = given
        elif isinstance(given, HostSpec):
            self.name, self.spec = given.name, given
        else:
            kind = type(given) if isinstance(given, nn.Module) else given
            self.name = getattr(kind, "__name__", type(given).__name__)

    def look_alone(
        self,
        example: object,
        slots: Iterable[str | InjectionPoint] | None,
        causal: bool | Mapping[str, bool] | None,
    ) -> None:
        """Run the checks of the bare host.

        Raises:
            Stop: If one failed that the others build on.
        """
        self.slots = [slots] if isinstance(slots, (str, InjectionPoint)) else slots
        self.slots = list(self.slots) if self.slots is not None else None
        self.causal = causal
        self.host = self._first_copy(self._build())
        self.wanted = self._points()
        self.example = self._example(example)
        self.bare = {mode: self._run_bare(mode) for mode in (True, False)}
        self.points = self._fired()

    def leave_out(self, why: str) -> None:
        """Keep for each check that has no result that it did not run."""
        for name in HOST_CHECKS:
            if name not in self.results and name != "causal_claim":
                self.keep(name, CheckStatus.NOT_RUN, device="", hint=why)

    # -- keeping the results ------------------------------------------------------------------------------------

    def keep(self, name: str, status: CheckStatus, **facts: Any) -> None:
        """Keep the result of a check."""
        self.results[name] = CheckResult(name, status, **{"device": self.place} | facts)

    def pass_(self, name: str, measured: object) -> None:
        """Keep that a check passed."""
        self.keep(name, CheckStatus.PASSED, measured=measured)

    def fail(
        self, name: str, claim: str, expected: object, measured: object, hint: str, **facts: Any
    ) -> None:
        """Keep that a check failed."""
        facts |= {"claim": claim, "expected": expected, "measured": measured, "hint": hint}
        self.keep(name, CheckStatus.FAILED, **facts)

    def judge(self, name: str, faults: Mapping[str, str], claim: str, expected: str, hint: str) -> None:
        """Pass if there is no fault, else fail with the first; keys say where."""
        where, fault = next(((where, fault) for where, fault in faults.items() if fault), ("", ""))
        if fault:
            self.fail(name, claim, expected, fault, hint, where=where)
        else:
            self.pass_(name, expected)

    @contextmanager
    def attempt(self, name: str, claim: str, expected: str, hint: str = "See the error.") -> Iterator[None]:
        """Fail ``name`` and stop if the block raises."""
        try:
            yield
        except Stop:
            raise
        except (Exception, SystemExit) as error:
            text = str(error) if isinstance(error, KasminaError) else f"{type(error).__name__}: {error}"
            self.fail(name, claim, expected, text, hint, error=error)
            raise Stop(f"'{name}' failed") from error

    # -- the bare host --------------------------------------------------------------------------------------------

    def _build(self) -> nn.Module:
        if isinstance(self.given, nn.Module):
            self.pass_("builds", "given as a module")
            return self.given
        factory: object = self.spec.factory if self.spec is not None else self.given
        with self.attempt(
            "builds", "cannot be built", "an nn.Module", "Call it yourself with the same options to see more."
        ):
            with private_rng(SEED):
                made: object = import_factory(f"Host '{self.name}'", factory)(**self.options)  # type: ignore[arg-type]  # checked there
            if not isinstance(made, nn.Module):
                raise TypeError(f"the factory returned {type(made).__name__}")
        if self.spec is None:
            self.name = type(made).__name__
        self.pass_("builds", type(made).__name__)
        return made

    def _first_copy(self, host: nn.Module) -> nn.Module:
        with self.attempt(
            "deepcopy",
            "cannot be copied",
            "copy.deepcopy(host) works",
            "Keep open files, locks, generators and lambdas out of the module, or write __deepcopy__.",
        ):
            twin = copy.deepcopy(host)
            shared = {id(t) for t in all_tensors(host).values()} & {id(t) for t in all_tensors(twin).values()}
            fault = difference(all_tensors(host), all_tensors(twin))
        if shared or fault:
            self.fail(
                "deepcopy",
                "is not copied whole",
                "equal tensors of its own",
                f"{len(shared)} tensors are shared with the original" if shared else fault,
                "Do not keep parameters or buffers where __deepcopy__ passes them on as they are.",
            )
            raise Stop("'deepcopy' failed")
        self.pass_("deepcopy", "equal tensors of its own")
        if self.asked_device is not None:
            twin = twin.to(self.asked_device)
        tensors = all_tensors(twin).values()
        self.device = next((t.device for t in tensors), self.asked_device or torch.device("cpu"))
        self.place = str(self.device)
        return twin

    def twin(self) -> nn.Module:
        """Return a copy of the host."""
        return copy.deepcopy(self.host)

    def call(self, model: nn.Module, host: nn.Module, training: bool) -> Run:
        """Call a model on the example; keep what it does to the host's own tensors."""
        own = all_tensors(self.host)
        return run(model, host, own, self.example, training=training, device=self.device)

    def _points(self) -> list[str | InjectionPoint]:
        host = self.host
        with self.attempt(
            "injection_points",
            "does not say where slots go",
            "points that exist, each with a name of its own",
            "Correct injection_points(), or name the places: check_host(host, slots=['layer3']).",
        ):
            wanted = requested_points(host, self.slots)
            for item in wanted:
                submodule(host, path_of(item))
            names = [item.name for item in wanted if isinstance(item, InjectionPoint)]
            if twice := sorted({name for name in names if names.count(name) > 1}):
                raise ValueError(f"the name '{twice[0]}' is used for more than one point")
            if requested_points(host, self.slots) != wanted:
                raise ValueError("asking twice gives different points")
            declared = self.spec.topology if self.spec is not None else None
            for item in wanted:
                if declared and isinstance(item, InjectionPoint) and item.topology is not declared:
                    raise ValueError(
                        f"the HostSpec declares {declared.value}, point '{item.name}' {item.topology.value}"
                    )
        self.pass_("injection_points", f"{len(wanted)} points")
        return wanted

    def _example(self, example: object) -> object:
        with self.attempt(
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
                example = mapped(example, lambda tensor: tensor.to(self.asked_device))
            for training in (True, False):
                with private_rng(SEED, self.device), torch.no_grad():
                    output = call_with(self.twin().train(training), example)
                if not any(tensor.is_floating_point() for _, tensor in tensors_in(output)):
                    raise TypeError(f"the output holds no floating-point tensor: {type(output).__name__}")
        self.pass_("example_runs", "both modes")
        return example

    def _run_bare(self, training: bool) -> Run:
        first, second = (self.call(twin, twin, training) for twin in (self.twin(), self.twin()))
        if fault := unlike(first, second) or difference(first.gradients, second.gradients):
            self.fail(
                "repeatable_forward",
                "computes something else each time",
                "equal results from equal random numbers",
                fault,
                "Nothing else can be compared. Take randomness from torch's generators only, and state out of forward; "
                "on CUDA try torch.use_deterministic_algorithms(True).",
                where=mode_name(training),
            )
            raise Stop("'repeatable_forward' failed, so that nothing can be compared")
        if not training:
            self.pass_("repeatable_forward", "both modes")
        return first

    def _fired(self) -> list[tuple[str | InjectionPoint, tuple[int, ...]]]:
        """Count what each point returns in both modes; return the points with the shape of their features."""
        paths = [path_of(item) for item in self.wanted]
        counts: dict[str, str] = {}
        shapes: dict[str, str] = {}
        found: list[tuple[str | InjectionPoint, tuple[int, ...]]] = []
        for training in (True, False):
            seen = features_at(self.twin().train(training), paths, self.example, self.device)
            for item, path in zip(self.wanted, paths, strict=True):
                where = f"'{path}', {mode_name(training)}"
                if (times := len(seen[path])) != 1:
                    counts[where] = f"{times} times"
                    continue
                features = seen[path][0]
                if misfit := _misfit(item, features):
                    shapes[where] = misfit
                elif not training:
                    found.append((item, tuple(features.shape)))
        self.judge(
            "points_fire_once",
            counts,
            "has a point that does not fire once",
            "once a forward pass",
            "Name a submodule that every forward pass calls once; a module that is used twice is no point.",
        )
        self.judge(
            "points_as_declared",
            shapes,
            "has a point that is not as declared",
            "features of the declared topology, layout and width",
            "Set dim, topology and layout of the InjectionPoint to what the submodule returns.",
        )
        if counts or shapes:
            raise Stop("its points are not as declared")
        return found


def _misfit(item: str | InjectionPoint, features: object) -> str:
    """Return in what features differ from what a point declares; empty if they fit."""
    if not isinstance(features, Tensor):
        return f"{type(features).__name__}, no tensor"
    shape = tuple(features.shape)
    if not features.is_floating_point() or features.dim() not in {topology.ndim for topology in Topology}:
        return f"{features.dtype} of shape {shape}"
    if isinstance(item, InjectionPoint):
        fits = features.dim() == item.topology.ndim
        if not fits or shape[item.axes.index(item.topology.width)] != item.dim:
            return f"features {shape}, where {item.topology.value} ({', '.join(item.axes)}), width {item.dim}, is declared"
    return ""
