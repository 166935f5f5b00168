"""What a blueprint must show before it is registered: its size, shapes, gradient and manners, measured on a device."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain
from typing import TYPE_CHECKING, Any, Final

from kasmina_core.blueprints import BlueprintSpec
from kasmina_core.global_state import preserved_global_state, read_settings, restore_settings
from kasmina_core.reports import CheckResult, CheckStatus, RegistrationReport
from kasmina_core.topology import Topology

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

PREFERRED_WIDTHS: Final = (64, 24, 7)
"""Widths that are tried first; 7 shows a module that needs a divisible width and does not say so."""

_WIDTHS: Final = 3
_SEED: Final = 0x6B61736D696E61  # unlikely in a factory, so that one which seeds the generators is seen
_LADDER: Final = tuple(chain(PREFERRED_WIDTHS, (32, 16, 48, 96, 128, 8, 256, 12, 20, 512), range(1, 1025)))

_DEVICE_CHECKS: Final = (
    "output_shape",
    "output_dtype",
    "output_finite",
    "input_unchanged",
    "forward_draws_no_random_numbers",
    "gradient_at_birth",
)

CHECK_NAMES: Final = (
    "accepts_width",
    "factory",
    "options",
    "global_state",
    "param_estimate",
    "param_count",
    *_DEVICE_CHECKS,
)
"""Every check that a report can hold, in its order."""


def check_blueprint_spec(
    spec: BlueprintSpec,
    *,
    device: str | torch.device | None = None,
    widths: Sequence[int] | None = None,
    origin: str = "",
) -> RegistrationReport:
    """Build a blueprint at several widths, run it, and report whether it keeps what it declares.

    The size is that of fvcore's ``parameter_count``. The global random numbers, default dtype, default device and
    thread settings are left as they were found.

    Args:
        spec: The declaration.
        device: Where modules run: ``"cpu"``, ``"cuda"`` or one such device. ``None`` runs them on the CPU and, where
            there is one, on the current CUDA device.
        widths: Feature widths to use, instead of three that the blueprint accepts.
        origin: Who offers it, for messages, such as ``"kasmina-cnn 0.1"``.

    Source: https://github.com/facebookresearch/fvcore/blob/main/fvcore/nn/parameter_count.py
    """
    import torch

    with ExitStack() as stack:
        stack.enter_context(preserved_global_state())
        torch.set_default_dtype(torch.float32)
        if torch.get_default_device().type != "cpu":
            torch.set_default_device(None)
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        return _Examination(spec, origin).report(device, widths)


@dataclass(slots=True)
class _Built:
    """A module of the blueprint, at one width, on the CPU."""

    width: int
    causal: bool
    module: nn.Module

    @property
    def where(self) -> str:
        return f"dim={self.width}" + (", causal=True" if self.causal else "")


class _Examination:
    """The checks of one blueprint while they run."""

    def __init__(self, spec: BlueprintSpec, origin: str) -> None:
        self.spec = spec
        self.origin = origin
        self.results: list[CheckResult] = []
        self.changed_settings: dict[str, Any] = {}

    def report(self, device: str | torch.device | None, widths: Sequence[int] | None) -> RegistrationReport:
        import torch

        from kasmina_core.randomness import private_rng

        asked, runnable, absent = _devices(device)
        with private_rng(_SEED, *(torch.device(name) for name in runnable)):
            self.settings = read_settings()
            chosen = self._choose_widths(widths)
            built = self._build_all(chosen)
            self._check_options(built)
            self._check_size(built)
            used = []
            for name in runnable:
                ran = self._check_on(torch.device(name), built)
                used += [name] if ran else []
            for name, why in absent.items():
                for check in _DEVICE_CHECKS:
                    self._not_run(check, why, device=name)
            if self.changed_settings:
                self._fail(
                    "global_state",
                    "changes settings of the whole program",
                    expected={name: str(self.settings[name]) for name in self.changed_settings},
                    measured={name: str(value) for name, value in self.changed_settings.items()},
                    hint="Leave them alone in the factory and in forward; they were put back.",
                )
            elif built:
                self._pass("global_state", measured="unchanged")
            else:
                self._not_run("global_state", "no module was built")
        return RegistrationReport(
            self.spec.name, self.origin, tuple(used), asked, tuple(sorted(self.results, key=_order))
        )

    # -- before any device ------------------------------------------------------------------------------------------

    def _choose_widths(self, widths: Sequence[int] | None) -> list[int]:
        """Return the widths to use, at most `_WIDTHS` unless they are given, the estimate's own first."""
        spec = self.spec
        own = [spec.estimate_dim] if spec.estimate_dim is not None else []
        wanted = [*own, *(widths if widths is not None else _LADDER)]
        limit = len(wanted) if widths is not None else _WIDTHS
        chosen: list[int] = []
        for width in dict.fromkeys(wanted):
            if len(chosen) == limit:
                break
            try:
                reason = spec.refusal(width)
            except (Exception, SystemExit) as error:
                self._fail(
                    "accepts_width",
                    f"cannot say whether it takes width {width}",
                    where=f"dim={width}",
                    expected="None, or the reason as text",
                    measured=f"{type(error).__name__}: {error}",
                    hint="accepts_width(dim) must not raise.",
                    error=error,
                )
                return chosen
            if reason is None:
                chosen.append(width)
            elif not isinstance(reason, str) or not reason:
                self._fail(
                    "accepts_width",
                    "does not say why it refuses a width",
                    where=f"dim={width}",
                    expected="None, or the reason as text",
                    measured=repr(reason),
                    hint="accepts_width(dim) returns None for a width it accepts and the reason, as text, for others.",
                )
                return chosen
            elif width in own:
                self._fail(
                    "accepts_width",
                    "refuses the width its size was counted at",
                    where=f"dim={width}",
                    expected=f"None at estimate_dim={width}",
                    measured=reason,
                    hint="Set estimate_dim to a width that accepts_width accepts.",
                )
        if chosen:
            self._pass("accepts_width", measured=f"uses {', '.join(map(str, chosen))}")
        else:
            self._not_run(
                "accepts_width",
                "no width from 1 to 1024 is accepted" if widths is None else "none given is accepted",
            )
        return chosen

    def _build_all(self, widths: Sequence[int]) -> list[_Built]:
        variants = [(width, False) for width in widths]
        if self.spec.takes_causal and widths:
            variants.append((widths[0], True))
        failed = False
        built = []
        for width, causal in variants:
            made, failure = self._build(width, causal)
            if made is not None:
                built.append(made)
            elif not failed and failure is not None:
                self.results.append(failure)
                failed = True
        if built and not failed:
            self._pass("factory", measured=f"built at {len(built)} widths or variants")
        elif not built and not failed:
            self._not_run("factory", "there is no width to build it at")
        return built

    def _build(
        self, width: int, causal: bool = False, options: Mapping[str, Any] | None = None
    ) -> tuple[_Built | None, CheckResult | None]:
        from torch import nn
        from torch.nn.parameter import is_lazy

        given = dict(options or {}) | ({"causal": causal} if self.spec.takes_causal else {})
        where = f"dim={width}" + "".join(f", {name}={value!r}" for name, value in given.items())
        claim, hint, error = "", "", None
        measured = ""
        try:
            module: object = self.spec.load_factory()(width, **given)
        except (Exception, SystemExit) as raised:
            error, measured = raised, f"{type(raised).__name__}: {raised}"
            claim = "could not be built at a width it accepts"
            hint = (
                "Let accepts_width return a reason for widths that the factory cannot take."
                if isinstance(raised, (ValueError, AssertionError, RuntimeError))
                else "The factory is called as factory(dim, **options) and returns an nn.Module."
            )
        else:
            if not isinstance(module, nn.Module):
                measured, claim = f"{type(module).__name__}", "is not built as a module"
                hint = "The factory is called as factory(dim, **options) and returns an nn.Module."
            elif any(is_lazy(tensor) for tensor in chain(module.parameters(), module.buffers())):
                measured, claim = "uninitialised (lazy) parameters", "is not complete when it is built"
                hint = "Give every layer its size: the width is known, and optimisers need the parameters."
            else:
                self._note_settings()
                return _Built(width, causal, module), None
        self._note_settings()
        return None, CheckResult(
            "factory",
            CheckStatus.FAILED,
            where=where,
            expected="an nn.Module",
            measured=measured,
            hint=hint,
            claim=claim,
            error=error,
        )

    def _check_options(self, built: Sequence[_Built]) -> None:
        """Build once more with every option at its declared default."""
        if not self.spec.options or not built:
            return
        _, failure = self._build(built[0].width, options=self.spec.options)
        if failure is None:
            self._pass("options", measured=f"takes {', '.join(self.spec.options)}")
            return
        self._fail(
            "options",
            "does not take the options it declares",
            where=failure.where,
            expected=failure.expected,
            measured=failure.measured,
            hint="Declare in options the keyword arguments of the factory, each with a default that it accepts.",
            error=failure.error,
        )

    def _check_size(self, built: Sequence[_Built]) -> None:
        """Compare ``param_estimate`` with fvcore's count at every width that it speaks of."""
        count = _fvcore_counter()
        plain = [made for made in built if not made.causal]
        if isinstance(count, str) or not plain:
            self._not_run("param_estimate", count if isinstance(count, str) else "no module was built")
            return
        counts: dict[int, int] = {}
        for made in plain:
            try:
                counts[made.width] = count(made.module)
            except (Exception, SystemExit) as error:
                self._not_run("param_estimate", f"fvcore could not count: {error!r}", where=made.where)
        wrong: list[tuple[int, int]] = []
        for width, counted in counts.items():
            try:
                declared = self.spec.declared_params(width)
            except (Exception, SystemExit) as error:
                self._fail(
                    "param_estimate",
                    "cannot say which size it has",
                    where=f"dim={width}",
                    expected=f"{counted} (fvcore)",
                    measured=f"{type(error).__name__}: {error}",
                    hint="param_estimate(dim) returns the number of parameters as an int.",
                    error=error,
                )
                continue
            if declared is None:
                self._pass("param_count", where=f"dim={width}", measured=counted)
            elif declared == counted:
                self._pass("param_estimate", where=f"dim={width}", expected=declared, measured=counted)
            else:
                wrong.append((width, declared))
        hint = self._estimate_to_paste(counts, count) if wrong else ""
        for width, declared in wrong:
            self._fail(
                "param_estimate",
                "does not have the size it declares",
                where=f"dim={width}",
                expected=declared,
                measured=counts[width],
                hint=hint,
            )
        if len(counts) < 2:
            self._not_run("param_estimate", "only one width could be counted, and two are asked for")

    def _estimate_to_paste(self, counts: Mapping[int, int], count: Callable[[nn.Module], int]) -> str:
        width = next(iter(counts))
        if self.spec.estimate_dim is not None and not callable(self.spec.param_estimate):
            return f"Set param_estimate={counts[width]}, or estimate_dim to the width you measured at."
        more = dict(counts)
        for candidate in _LADDER[:20]:
            if len(more) > 4:
                break
            try:
                if candidate not in more and self.spec.refusal(candidate) is None:
                    made, _ = self._build(candidate)
                    more |= {candidate: count(made.module)} if made is not None else {}
            except (Exception, SystemExit):  # the estimate is wrong already; this only helps to correct it
                break
        if formula := _polynomial(more):
            return f"Set param_estimate=lambda dim: {formula}."
        return f"Set param_estimate={counts[width]}, estimate_dim={width}, or correct the function."

    # -- on a device ------------------------------------------------------------------------------------------------

    def _check_on(self, device: torch.device, built: Sequence[_Built]) -> bool:
        """Run the modules on ``device``; return whether anything ran there."""
        tally = _Tally()
        problem = "no module was built"
        for made in built:
            try:
                module = made.module.to(device)
            except (Exception, SystemExit) as error:
                problem = f"a module could not be moved to {device}: {error!r}"
                continue
            for shape, training in _inputs(self.spec.topology, made.width):
                module.train(training)
                where = f"{made.where}, input {shape}" + ("" if training else ", eval mode")
                problem = self._run_once(module, shape, device, where, tally) or problem
                self._note_settings()
        for name in _DEVICE_CHECKS:
            if (failure := tally.failures.get(name)) is not None:
                self._fail(name, device=str(device), **failure)
            elif runs := tally.runs.get(name):
                self._pass(name, device=str(device), measured=f"{len(runs)} inputs", expected=_EXPECTED[name])
            else:
                self._not_run(name, problem, device=str(device))
        return bool(tally.runs)

    def _run_once(
        self, module: nn.Module, shape: tuple[int, ...], device: torch.device, where: str, tally: _Tally
    ) -> str:
        """Run forward and, in training mode, backward once; return why nothing could be checked, or ``""``."""
        import torch

        x = torch.randn(shape, dtype=torch.float32).to(device)
        cotangent = torch.randn(shape, dtype=torch.float32).to(device)
        version = x._version
        before = _generator_states(device)
        try:
            y: object = module(x)
        except torch.OutOfMemoryError as error:
            return f"{device} has too little memory free: {error}"
        except (Exception, SystemExit) as error:
            tally.fail(
                "output_shape",
                where,
                "does not run",
                shape,
                f"{type(error).__name__}: {error}",
                "Features have the declared topology, any batch and size; a width it cannot take is refused by "
                "accepts_width.",
                error,
            )
            return "forward raised"
        after = _generator_states(device)
        if not isinstance(y, torch.Tensor) or tuple(y.shape) != shape:
            found = tuple(y.shape) if isinstance(y, torch.Tensor) else type(y).__name__
            tally.fail(
                "output_shape",
                where,
                "does not return features of the shape it was given",
                shape,
                found,
                "Keep width and length (padding, stride 1, a last projection), and return one tensor.",
            )
            return "forward returned no features of the right shape"
        tally.ran("output_shape", where)
        tally.judge(
            "output_dtype",
            y.dtype is x.dtype and y.device == x.device,
            where,
            "does not return features of the dtype and device it was given",
            f"{x.dtype} on {x.device}",
            f"{y.dtype} on {y.device}",
            "Create tensors in forward with dtype=x.dtype, device=x.device, or register them as buffers.",
        )
        bad = 0 if bool(torch.isfinite(y).all()) else int((~torch.isfinite(y)).sum())
        tally.judge(
            "output_finite",
            not bad,
            where,
            "returns NaN or infinity at birth",
            "0 values that are not finite",
            f"{bad} of {y.numel()}",
            "Check initial values and divisions; add an eps where a norm or a variance can be 0.",
        )
        tally.judge(
            "input_unchanged",
            x._version == version,
            where,
            "changes its input",
            "an input that is left as it was",
            f"{x._version - version} in-place writes",
            "The input is the host's own features: use no inplace=True and no x.add_() on it.",
        )
        tally.judge(
            "forward_draws_no_random_numbers",
            all(torch.equal(a, b) for a, b in zip(before, after, strict=True)),
            where,
            "draws global random numbers in forward",
            "0 draws",
            "the generator moved",
            "A seed that draws them changes the host's run: set dropout to 0 by default, or use a generator of its own.",
        )
        if module.training:
            self._judge_gradient(module, y, cotangent, where, tally)
        return ""

    def _judge_gradient(
        self, module: nn.Module, y: Tensor, cotangent: Tensor, where: str, tally: _Tally
    ) -> None:
        import torch

        trainable = [p for p in module.parameters() if p.requires_grad]
        norm, found, error = 0.0, "0.0", None
        hint = (
            "Something multiplies by zero before every parameter. Zero-initialise the last layer alone, and put no "
            "norm or ReLU after it."
        )
        if not trainable:
            found, hint = (
                "no trainable parameter",
                "A seed learns: give it a parameter, or do not declare it.",
            )
        elif not y.requires_grad:
            found, hint = (
                "the output depends on no parameter",
                "Do not detach, and leave gradient mode alone.",
            )
        else:
            module.zero_grad(set_to_none=True)
            try:
                y.backward(cotangent)  # type: ignore[no-untyped-call]  # untyped in torch
                grads = [p.grad for p in trainable if p.grad is not None]
                norm = float(torch.stack([g.norm() for g in grads]).norm()) if grads else 0.0
                found = f"{norm:.3g}"
            except (Exception, SystemExit) as raised:
                error, found = raised, f"{type(raised).__name__}: {raised}"
                hint = "Backward of the output must work once."
            if norm != norm or norm == float("inf"):
                hint = "The gradient at birth is not finite: check initial values and divisions."
        tally.judge(
            "gradient_at_birth",
            0.0 < norm < float("inf"),
            where,
            "has no usable gradient at birth",
            _EXPECTED["gradient_at_birth"],
            found,
            hint,
            error,
        )

    # -- keeping the results ----------------------------------------------------------------------------------------

    def _note_settings(self) -> None:
        for name, value in restore_settings(self.settings).items():
            self.changed_settings.setdefault(name, value)

    def _pass(self, name: str, **facts: Any) -> None:
        self.results.append(CheckResult(name, CheckStatus.PASSED, **facts))

    def _fail(self, name: str, claim: str, **facts: Any) -> None:
        self.results.append(CheckResult(name, CheckStatus.FAILED, claim=claim, **facts))

    def _not_run(self, name: str, why: str, **facts: Any) -> None:
        self.results.append(CheckResult(name, CheckStatus.NOT_RUN, hint=why, **facts))


class _Tally:
    """For each check of a device: where it ran, and the first failure."""

    def __init__(self) -> None:
        self.runs: dict[str, list[str]] = {}
        self.failures: dict[str, dict[str, Any]] = {}

    def ran(self, name: str, where: str) -> None:
        self.runs.setdefault(name, []).append(where)

    def judge(self, name: str, ok: bool, where: str, *failure: Any) -> None:
        if ok:
            self.ran(name, where)
        else:
            self.fail(name, where, *failure)

    def fail(
        self,
        name: str,
        where: str,
        claim: str,
        expected: object,
        measured: object,
        hint: str,
        error: BaseException | None = None,
    ) -> None:
        self.ran(name, where)
        self.failures.setdefault(
            name,
            {
                "claim": claim,
                "where": where,
                "expected": list(expected) if isinstance(expected, tuple) else expected,
                "measured": list(measured) if isinstance(measured, tuple) else measured,
                "hint": hint,
                "error": error,
            },
        )


_EXPECTED: Final[Mapping[str, str]] = {
    "output_shape": "the shape of the input",
    "output_dtype": "the dtype and device of the input",
    "output_finite": "finite values",
    "input_unchanged": "an input that is left as it was",
    "forward_draws_no_random_numbers": "0 draws",
    "gradient_at_birth": "a finite norm above 0",
}


def _inputs(topology: Topology, width: int) -> list[tuple[tuple[int, ...], bool]]:
    """Return shapes of features, each with whether the module is in training mode."""
    if topology is Topology.CNN:
        return [((2, width, 8, 8), True), ((1, width, 7, 5), True), ((3, width, 5, 6), False)]
    return [((2, 16, width), True), ((1, 7, width), True), ((3, 1, width), False)]


def _devices(
    device: str | torch.device | None,
) -> tuple[tuple[str, ...], list[str], dict[str, str]]:
    """Return the kinds asked for, the devices that work, and why each other one does not.

    CUDA is never initialised where there is none.
    """
    import torch

    wanted = torch.device(device) if device is not None else None
    asked, runnable, absent = [], [], {}
    if wanted is None or wanted.type == "cpu":
        asked.append("cpu")
        runnable.append("cpu")
    else:
        absent["cpu"] = "not asked for"
    if wanted is not None and wanted.type == "cpu":
        absent["cuda"] = "not asked for"
    elif wanted is not None and wanted.type != "cuda":
        asked.append(wanted.type)
        absent[str(wanted)] = "the registration checks run on cpu and cuda"
        absent["cuda"] = "not asked for"
    elif not torch.cuda.is_available():
        absent["cuda"] = "this machine has no CUDA device"
        if wanted is not None:
            asked.append("cuda")
    else:
        asked.append("cuda")
        try:
            index = (
                wanted.index
                if wanted is not None and wanted.index is not None
                else torch.cuda.current_device()
            )
            torch.zeros((), device=f"cuda:{index}")
            runnable.append(f"cuda:{index}")
        except (RuntimeError, AssertionError) as error:
            absent["cuda"] = f"the CUDA device cannot be used: {error}"
    return tuple(asked), runnable, absent


def _generator_states(device: torch.device) -> list[Tensor]:
    import torch

    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return states


def _fvcore_counter() -> Callable[[nn.Module], int] | str:
    """Return a function that counts parameters with fvcore, or why there is none."""
    try:
        with warnings.catch_warnings():
            # fvcore scripts functions when it is imported, which torch deprecates.
            warnings.simplefilter("ignore")
            from fvcore.nn import parameter_count
    except ImportError as error:
        return f"fvcore cannot be imported: {error}"
    return lambda module: int(parameter_count(module)[""])


def _polynomial(counts: Mapping[int, int]) -> str | None:
    """Return ``a * dim * dim + b * dim + c`` through all of four or more counts, if whole numbers do that.

    >>> _polynomial({1: 3, 2: 8, 3: 15, 4: 24})
    'dim * dim + 2 * dim'
    """
    if len(counts) < 4:
        return None
    (x0, y0), (x1, y1), (x2, y2) = list(counts.items())[:3]
    slope01, slope12 = Fraction(y1 - y0, x1 - x0), Fraction(y2 - y1, x2 - x1)
    a = (slope12 - slope01) / (x2 - x0)
    b = slope01 - a * (x0 + x1)
    c = y0 - a * x0 * x0 - b * x0
    if any(part.denominator != 1 for part in (a, b, c)):
        return None
    if any(a * x * x + b * x + c != y for x, y in counts.items()):
        return None
    terms = []
    for factor, power in ((int(a), "dim * dim"), (int(b), "dim"), (int(c), "")):
        if factor:
            size = " * ".join(
                filter(None, (str(abs(factor)) if abs(factor) != 1 or not power else "", power))
            )
            terms.append(("- " if factor < 0 else "+ ") + size)
    text = " ".join(terms).removeprefix("+ ")
    return text or "0"


def _order(check: CheckResult) -> tuple[int, int]:
    """Causes before consequences: the first failure is the one to read."""
    return (CHECK_NAMES.index(check.name), int(check.status is CheckStatus.NOT_RUN))
