"""Registration checks of a blueprint: size, shapes, gradient and side effects, measured on a device."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from fractions import Fraction
from functools import cache
from importlib.machinery import PathFinder
from itertools import chain
from typing import TYPE_CHECKING, Any, Final

from kasmina_core.blueprints.declarations import BlueprintSpec
from kasmina_core.blueprints.foreign import described
from kasmina_core.checks.devices import (
    FULL_DEVICE_CHECKS,
    QUICK_DEVICE_CHECKS,
    check_on_device,
    device_check_names,
)
from kasmina_core.checks.findings import Bench, Built
from kasmina_core.checks.global_state import preserved_global_state
from kasmina_core.checks.modules import (
    GRID_WIDTHS,
    MODULE_CHECKS,
    check_grid,
    check_independence,
    check_module,
)
from kasmina_core.checks.positions import POSITIONS, check_positions
from kasmina_core.checks.reports import CheckResult, CheckStatus, ValidationReport
from kasmina_core.checks.samples import SAMPLES, check_samples
from kasmina_core.records import is_plain

if TYPE_CHECKING:
    import torch
    from torch import nn

PREFERRED_WIDTHS: Final = (64, 24, 7)
"""Widths that are tried first; 7 shows a module that needs a divisible width and does not say so."""

CHECK_NAMES: Final = (
    "declaration",
    "accepts_width",
    "factory",
    "options",
    "global_state",
    "param_estimate",
    "param_count",
    "independent_builds",
    POSITIONS,
    *QUICK_DEVICE_CHECKS,
    SAMPLES,
    "shape_grid",
    *FULL_DEVICE_CHECKS,
    *MODULE_CHECKS,
)
"""Every check that a report can hold, causes before consequences: the first failure is the one to read."""

FULL_CHECKS: Final = frozenset(("shape_grid", *FULL_DEVICE_CHECKS, *MODULE_CHECKS))
"""The checks that registration leaves out, because they take longer."""

LEFT_OUT: Final = "left to the full checks, `kasmina plugins check`"

_RESERVED: Final = ("dim", "self", "slot", "blueprint", "blueprint_id", "seed_id")
_WIDTHS: Final = 3
_SEED: Final = 0x6B61736D696E61  # unlikely in a factory, so that one which seeds the generators is seen
_FATAL: Final = ("factory", "accepts_width", "output_shape")
_LADDER: Final = tuple(chain(PREFERRED_WIDTHS, (32, 16, 48, 96, 128, 8, 256, 12, 20, 512), range(1, 1025)))


def check_blueprint_spec(
    spec: BlueprintSpec,
    *,
    device: str | torch.device | None = None,
    widths: Sequence[int] | None = None,
    origin: str = "",
    full: bool = True,
) -> ValidationReport:
    """Build a blueprint at several widths, run it, and report whether it keeps what it declares.

    The size is that of fvcore's ``parameter_count``. The global random numbers, default dtype, default device and
    thread settings are left as they were found. CUDA is not initialised where ``device`` is ``"cpu"``.

    Args:
        spec: The declaration.
        device: Where modules run: ``"cpu"``, ``"cuda"`` or one such device. ``None`` runs them on the CPU and, where
            there is one, on the current CUDA device.
        widths: Feature widths to use, instead of three that the blueprint accepts.
        origin: Who offers it, for messages, such as ``"kasmina-cnn 0.1"``.
        full: Whether the checks of `FULL_CHECKS` run as well: more sizes, precisions, memory formats, both modes, copies
            and operations. Registration leaves them out.

    Source: https://github.com/facebookresearch/fvcore/blob/main/fvcore/nn/parameter_count.py
    """
    import torch

    with ExitStack() as stack:
        stack.enter_context(preserved_global_state())
        torch.set_default_dtype(torch.float32)
        torch.set_num_threads(1)  # the tensors are small, and a pool of threads would not survive a fork
        if torch.get_default_device().type != "cpu":
            torch.set_default_device(None)
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        return _Examination(spec, origin, full).report(device, widths)


class _Examination:
    """The checks of one blueprint while they run."""

    def __init__(self, spec: BlueprintSpec, origin: str, full: bool) -> None:
        self.spec = spec
        self.origin = origin
        self.full = full

    def report(self, device: str | torch.device | None, widths: Sequence[int] | None) -> ValidationReport:
        import torch

        from kasmina_core.quiet import private_rng

        self.asked, self.runnable, self.absent = _devices(device)
        with private_rng(_SEED, *(torch.device(name) for name in self.runnable)):
            self.bench = Bench(self.spec)
            self._check_declaration()
            chosen = self._choose_widths(widths)
            built = self._build_all(chosen)
            self._check_options(built)
            self._check_size(built)
            second = check_independence(self.bench, built)
            check_positions(self.bench, built)
            used = [
                name
                for name in self.runnable
                if check_on_device(self.bench, built, torch.device(name), self.full)
            ]
            if self.runnable:
                forms = {made.causal: made for made in reversed(built)}  # of each form the first width
                chosen_forms = built if self.full else [*forms.values()]
                check_samples(self.bench, chosen_forms, second, self.runnable[0])
            for name, why in self.absent.items():
                names = device_check_names(self.spec.topology, self.full)
                self.bench.none_ran(names, why, device=name, needed=_kind(name) in self.asked)
            self._check_whole(built, chosen, () if widths is not None else GRID_WIDTHS)
            self.bench.judge_settings(bool(built))
        checks = sorted(self.bench.results, key=_order)
        return ValidationReport(self.spec.name, self.origin, tuple(used), self.asked, tuple(checks))

    def _check_whole(self, built: Sequence[Built], chosen: Sequence[int], more: Sequence[int]) -> None:
        """Run the checks of modules as a whole, on the first device that is used."""
        import torch

        names = ("shape_grid", *MODULE_CHECKS)
        if not self.full:
            longer = device_check_names(self.spec.topology, True)[len(QUICK_DEVICE_CHECKS) :]
            self.bench.none_ran((*names, *longer), LEFT_OUT, needed=False)
        elif not self.runnable:
            reasons = (why for name, why in self.absent.items() if _kind(name) in self.asked)
            self.bench.none_ran(names, next(reasons, "no device can be used"))
        elif not built or any(
            c.status is CheckStatus.FAILED and c.name in _FATAL for c in self.bench.results
        ):
            self.bench.none_ran(names, "modules cannot be built and run at every width that is used")
        else:
            home = torch.device(self.runnable[0])
            taken = [width for width in more if width not in chosen and self._takes(width)]
            check_grid(self.bench, [*chosen, *taken], home)
            check_module(self.bench, built[0].width, home)

    def _takes(self, width: int) -> bool:
        try:
            return self.spec.refusal(width) is None
        except (Exception, SystemExit):  # accepts_width was judged at the widths that are used
            return False

    # -- before any device ------------------------------------------------------------------------------------------

    def _check_declaration(self) -> None:
        """Look at what the declaration says of itself; nothing foreign runs."""
        spec = self.spec
        estimate, options, dim = spec.param_estimate, spec.options, spec.estimate_dim
        is_width = dim is None or (isinstance(dim, int) and not isinstance(dim, bool) and dim > 0)
        is_count = not isinstance(estimate, int) or (not isinstance(estimate, bool) and estimate >= 0)
        is_function = spec.accepts_width is None or callable(spec.accepts_width)
        is_mapping = isinstance(options, Mapping)
        rules: list[tuple[bool, str, str, object]] = [
            (isinstance(spec.description, str), "description", "text", spec.description),
            (isinstance(spec.source, str), "source", "text", spec.source),
            (is_width, "estimate_dim", "a width of at least 1, or None", dim),
            (is_count, "param_estimate", "a count of 0 or more", estimate),
            (is_function, "accepts_width", "a function of the width, or None", spec.accepts_width),
            (isinstance(spec.takes_causal, bool), "takes_causal", "True or False", spec.takes_causal),
            (is_mapping, "options", "a mapping from names to defaults", options),
        ]
        for name, default in options.items() if is_mapping else ():
            usable = isinstance(name, str) and name.isidentifier() and name not in _RESERVED
            free = name != "causal" or not spec.takes_causal
            plain = "plain data, which a checkpoint can hold"
            rules += [
                (usable, "options", "names that can be keyword arguments of germinate", name),
                (free, "options", "no 'causal': takes_causal=True passes it already", name),
                (is_plain(default), f"options[{name!r}]", plain, default),
            ]
        wrong = [rule for ok, *rule in rules if not ok]
        if not wrong:
            self.bench.passed("declaration", measured="complete")
            return
        where, expected, found = wrong[0]
        also = ", ".join(str(field) for field, _, _ in wrong[1:])
        self.bench.failed(
            "declaration",
            "is declared with a field that cannot be used",
            where=where,
            expected=expected,
            measured=repr(found),
            hint="Correct it in the BlueprintSpec." + (f" Also: {also}." if also else ""),
        )

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
                claim = f"cannot say whether it takes width {width}"
                self._refuse_width(
                    width, claim, described(error), "accepts_width(dim) must not raise.", error=error
                )
                return chosen
            if reason is None:
                chosen.append(width)
            elif not isinstance(reason, str) or not reason:
                hint = "accepts_width(dim) returns None for a width it accepts and the reason, as text, for others."
                self._refuse_width(width, "does not say why it refuses a width", repr(reason), hint)
                return chosen
            elif width in own:
                claim, hint = (
                    "refuses the width its size was counted at",
                    "Set estimate_dim to a width that accepts_width accepts.",
                )
                self._refuse_width(width, claim, reason, hint, expected=f"None at estimate_dim={width}")
        if chosen:
            self.bench.passed("accepts_width", measured=f"uses {', '.join(map(str, chosen))}")
        else:
            why = "no width from 1 to 1024 is accepted" if widths is None else "none given is accepted"
            self.bench.not_run("accepts_width", why)
        return chosen

    def _refuse_width(self, width: int, claim: str, measured: str, hint: str, **facts: Any) -> None:
        facts = {"expected": "None, or the reason as text", "where": f"dim={width}"} | facts
        self.bench.failed("accepts_width", claim, measured=measured, hint=hint, **facts)

    def _build_all(self, widths: Sequence[int]) -> list[Built]:
        variants = [(width, False) for width in widths]
        if self.spec.takes_causal and widths:
            variants.append((widths[0], True))
        results = [self.bench.build(width, causal) for width, causal in variants]
        built = [made for made in results if isinstance(made, Built)]
        failures = [made for made in results if isinstance(made, CheckResult)]
        self.bench.results += failures[:1]
        if not results:
            self.bench.not_run("factory", "there is no width to build it at")
        elif not failures:
            self.bench.passed("factory", measured=f"built at {len(built)} widths or variants")
        return built

    def _check_options(self, built: Sequence[Built]) -> None:
        """Build once more with every option at its declared default."""
        if not self.spec.options or not built:
            return
        made = self.bench.build(built[0].width, options=self.spec.options)
        if not isinstance(made, CheckResult):
            self.bench.passed("options", measured=f"takes {', '.join(self.spec.options)}")
            return
        hint = "Declare in options the keyword arguments of the factory, each with a default that it accepts."
        claim = "does not take the options it declares"
        self.bench.results.append(replace(made, name="options", claim=claim, hint=hint))

    def _check_size(self, built: Sequence[Built]) -> None:
        """Compare ``param_estimate`` with fvcore's count at every width that it speaks of."""
        count = _fvcore_counter()
        plain = [made for made in built if not made.causal]
        if isinstance(count, str) or not plain:
            self.bench.not_run("param_estimate", count if isinstance(count, str) else "no module was built")
            return
        counts: dict[int, int] = {}
        for made in plain:
            try:
                counts[made.width] = count(made.module)
            except (Exception, SystemExit) as error:
                self.bench.not_run("param_estimate", f"fvcore could not count: {error!r}", where=made.where)
        wrong: list[tuple[int, int]] = []
        for width, counted in counts.items():
            try:
                declared = self.spec.declared_params(width)
            except (Exception, SystemExit) as error:
                self.bench.failed(
                    "param_estimate",
                    "cannot say which size it has",
                    where=f"dim={width}",
                    expected=f"{counted} (fvcore)",
                    measured=described(error),
                    hint="param_estimate(dim) returns the number of parameters as an int.",
                    error=error,
                )
                continue
            if declared is None:
                self.bench.passed("param_count", where=f"dim={width}", measured=counted)
            elif declared == counted:
                self.bench.passed("param_estimate", where=f"dim={width}", expected=declared, measured=counted)
            else:
                wrong.append((width, declared))
        hint = self._estimate_to_paste(counts, count) if wrong else ""
        for width, declared in wrong:
            self.bench.failed(
                "param_estimate",
                "does not have the size it declares",
                where=f"dim={width}",
                expected=declared,
                measured=counts[width],
                hint=hint,
            )
        if len(counts) < 2:
            self.bench.not_run("param_estimate", "only one width could be counted, and two are asked for")

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
                    more[candidate] = count(self.bench.need(candidate))
            except (Exception, SystemExit):  # the estimate is wrong already; this only helps to correct it
                continue
        if formula := _polynomial(more):
            return f"Set param_estimate=lambda dim: {formula}."
        return f"Set param_estimate={counts[width]}, estimate_dim={width}, or correct the function."


def _devices(device: str | torch.device | None) -> tuple[tuple[str, ...], list[str], dict[str, str]]:
    """Return the kinds asked for, the devices that work, and why each other one does not.

    CUDA is never initialised where there is none.
    """
    import torch

    wanted = torch.device(device) if device is not None else None
    kind = wanted.type if wanted is not None else ""
    asked, runnable, absent = [], [], {}
    if kind in ("", "cpu"):
        asked.append("cpu")
        runnable.append("cpu")
    else:
        absent["cpu"] = "not asked for"
    if kind not in ("", "cuda"):
        absent["cuda"] = "not asked for"
        if kind != "cpu":
            asked.append(kind)
            absent[str(wanted)] = "the registration checks run on cpu and cuda"
    elif not torch.cuda.is_available():
        absent["cuda"] = "this machine has no CUDA device"
        asked += ["cuda"] * bool(kind)
    else:
        asked.append("cuda")
        try:
            index = wanted.index if wanted is not None else None
            place = f"cuda:{torch.cuda.current_device() if index is None else index}"
            torch.zeros((), device=place)
            runnable.append(place)
        except (RuntimeError, AssertionError) as error:
            absent["cuda"] = f"the CUDA device cannot be used: {error}"
    return tuple(asked), runnable, absent


def _fvcore_counter() -> Callable[[nn.Module], int] | str:
    """Return a function that counts parameters with fvcore, or why there is none."""
    try:
        parameter_count = _parameter_count()
    except (ImportError, AttributeError) as error:
        return f"fvcore cannot be imported: {error}"
    return lambda module: int(parameter_count(module)[""])


@cache
def _parameter_count() -> Callable[[nn.Module], Mapping[str, int]]:
    """Return ``fvcore.nn.parameter_count``.

    Its file is imported by itself: the package around it compiles loss functions, which takes several times as long.
    """
    package = importlib.util.find_spec("fvcore")
    folders = (package and package.submodule_search_locations) or ()
    file = PathFinder.find_spec("parameter_count", [os.path.join(folder, "nn") for folder in folders])
    if file is None or file.loader is None:
        raise ImportError("no module fvcore.nn.parameter_count")
    module = importlib.util.module_from_spec(file)
    file.loader.exec_module(module)
    count: Callable[[nn.Module], Mapping[str, int]] = module.parameter_count
    return count


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
    return (CHECK_NAMES.index(check.name), int(check.status is CheckStatus.NOT_RUN))


def _kind(device: str) -> str:
    return device.partition(":")[0]
