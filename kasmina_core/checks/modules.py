"""Checks of a module as a whole: independent builds, sizes, modes, copies, operations."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from kasmina_core.blueprints.foreign import described
from kasmina_core.checks.devices import example_shapes, rms
from kasmina_core.checks.findings import Bench, Built, NotRepeatableError
from kasmina_core.checks.reports import CheckResult
from kasmina_core.topology import Topology

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

MODULE_CHECKS: Final = ("eval_and_train", "state_dict", "pickle", "deepcopy", "flops")
"""Checks of a module as a whole, on the first device that is used."""

GRID_WIDTHS: Final = (1, 2, 3, 5, 12, 33, 96)
"""Widths that `check_grid` adds to those at which the other checks run."""

MODE_TOLERANCE: Final = 1e-4
"""Largest difference of outputs between modes and between copies, as a part of their RMS."""

_GRID: Final = ((2, 1), (1, 5), (1, 7, 3, 2), (2, 13, 9, 5), (3, 4, 6, 3), (3, 33, 2))
"""Batch, and sizes of the axes of positions, which are repeated as often as a topology needs."""

_TOLERANCE: Final = f"{MODE_TOLERANCE:g} of the output's RMS"


def check_independence(bench: Bench, built: Sequence[Built]) -> Built | None:
    """Build a second module, see whether any two hold one parameter, and return it."""
    name = "independent_builds"
    if not built:
        bench.not_run(name, "no module was built")
        return None
    second = bench.build(built[0].width, built[0].causal)
    if isinstance(second, CheckResult):
        bench.failed(
            name,
            "cannot be built twice",
            where=built[0].where,
            expected="a second module",
            measured=second.measured,
            hint="Every germination builds a module of its own with the same factory.",
            error=second.error,
        )
        return None
    owners: dict[tuple[Any, ...], int] = {}
    shared: set[str] = set()
    for number, made in enumerate([*built, second]):
        for path, parameter in made.module.named_parameters():
            if parameter.numel() and owners.setdefault(_memory(parameter), number) != number:
                shared.add(path)
    bench.judge(
        name,
        not shared,
        "shares parameters between modules that were built apart",
        "Create every parameter inside the factory: a module-level or cached one is trained by every seed.",
        where=built[0].where if shared else "",
        expected="0 shared parameters",
        measured=", ".join(sorted(shared)) or 0,
    )
    return second


def _memory(tensor: Tensor) -> tuple[Any, ...]:
    return (tensor.device, tensor.untyped_storage().data_ptr())


# -- sizes --------------------------------------------------------------------------------------------------------------


def check_grid(bench: Bench, widths: Sequence[int], home: torch.device) -> None:
    """Compare output and input shapes on a grid of sizes: on the meta device where that works, else at home."""
    import torch

    if not widths:
        bench.not_run("shape_grid", "no module was built")
        return
    problem, because = None, ""
    for device in (
        torch.device("meta"),
        home,
    ):  # many modules cannot run on meta: a failure there says nothing
        try:
            problem = _first_misfit(bench, widths, device)
        except torch.OutOfMemoryError as error:
            bench.not_run("shape_grid", f"{home} has too little memory free: {error}", device=str(home))
            return
        except (Exception, SystemExit) as error:
            problem = ("", error)
        if problem is None:
            break
        because = f"; not on meta: {str(_text(problem[1])).strip().partition(chr(10))[0][:120]}"
    sizes = len(grid_shapes(bench.spec.topology, 1))
    said = f"{len(widths) * sizes} inputs at widths {', '.join(map(str, widths))}, batch 1 and odd sizes among them"
    where, found = problem or ("", said + because)
    bench.judge(
        "shape_grid",
        problem is None,
        "does not take every size of features",
        "A host gives features of any batch, height, width or length. Refuse widths by accepts_width.",
        device=str(device),
        where=where,
        expected="the shape of the input",
        measured=_text(found),
        error=found if isinstance(found, BaseException) else None,
    )


def _text(found: Any) -> Any:
    return described(found) if isinstance(found, BaseException) else found


def grid_shapes(topology: Topology, width: int) -> list[tuple[tuple[int, ...], bool]]:
    """Return shapes of features, each with whether the module is in training mode.

    >>> grid_shapes(Topology.TRANSFORMER, 8)[0]
    ((1, 1, 8), False)
    """
    shapes = {}
    # A sequence may grow by one position at a time, of one sample.
    for batch, *sizes in [(1, 1), *_GRID] if topology.sequence_axis is not None else _GRID:
        positions = [sizes[axis % len(sizes)] for axis in range(topology.ndim - 2)]
        # Statistics over a batch need several values: positions, or where there are none, samples.
        several = math.prod(positions) > 1 if positions else batch > 1
        shapes[topology.shape(width, batch, positions)] = several
    return list(shapes.items())


def _first_misfit(bench: Bench, widths: Sequence[int], device: torch.device) -> tuple[str, Any] | None:
    """Return where, and the wrong shape or the exception; ``None`` if every shape is kept."""
    import torch

    for width in widths:
        # Built on the CPU and moved: a factory that sets the default device would tangle with a context of one.
        made = bench.build(width)
        if isinstance(made, CheckResult):
            return (f"dim={width}", made.error or made.measured)
        module = made.module.to(device)
        for shape, training in grid_shapes(bench.spec.topology, width):
            where = f"dim={width}, input {shape}" + ("" if training else ", eval mode")
            module.train(training)
            try:
                y: object = bench.call(module, torch.zeros(shape, device=device))
            except torch.OutOfMemoryError:
                raise
            except (Exception, SystemExit) as error:
                return (where, error)
            if not isinstance(y, torch.Tensor):
                return (where, type(y).__name__)
            if tuple(y.shape) != shape:
                return (where, list(y.shape))
    return None


# -- modes and copies -----------------------------------------------------------------------------------------------------


def check_module(bench: Bench, width: int, home: torch.device) -> None:
    """Run a module with moved parameters in both modes, copy it in three ways, and count its operations."""
    import torch

    shape = example_shapes(bench.spec.topology, width)[0][0]
    jobs: dict[str, Callable[[], None]] = {}
    try:
        trained = _moved(bench.need(width).to(home), shape, home, bench)
        x = torch.randn(shape).to(home)
        # Copies first: running a module in training mode may move its statistics.
        copies: dict[str, Callable[[nn.Module], Any]] = {
            "state_dict": lambda module: _through_state_dict(module, bench.need(width).to(home)),
            "pickle": lambda module: pickle.loads(pickle.dumps(module)),
            "deepcopy": copy.deepcopy,
        }
        for name, make in copies.items():
            jobs[name] = partial(_check_copy, name, make, trained, x, width, bench)
        jobs["eval_and_train"] = lambda: _check_modes(trained, x, width, bench)
        jobs["flops"] = lambda: _count_flops(bench.need(width).to(home).eval(), x[:1], width, bench)
    except (Exception, SystemExit) as error:
        bench.none_ran(MODULE_CHECKS, f"a module could not be run once: {described(error)}", device=str(home))
        return
    for name, job in jobs.items():
        try:
            job()
        except torch.OutOfMemoryError as error:
            bench.not_run(name, f"{home} has too little memory free: {error}", device=str(home))
        except NotRepeatableError as error:
            bench.not_run(name, f"a second module could not be built: {error}", device=str(home))
        except Exception as error:  # what it returned cannot even be looked at
            bench.not_run(name, f"its output cannot be compared: {error!r}", device=str(home))
        bench.note_settings()


def _moved(module: nn.Module, shape: tuple[int, ...], home: torch.device, bench: Bench) -> nn.Module:
    """Return a module as it is in the middle of training: after a pass, every parameter away from where it began."""
    import torch

    module.train()
    bench.call(module, torch.randn(shape).to(home).requires_grad_().clone())
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.is_floating_point():
                parameter.add_(0.1 * torch.randn(parameter.shape).to(parameter))
    return module


def _through_state_dict(module: nn.Module, fresh: nn.Module) -> nn.Module:
    import torch

    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    return fresh


_LOST: Final = {
    "state_dict": (
        "is not kept by its state_dict",
        "Keep what is not drawn anew at build in parameters and buffers, and plain data in get_extra_state.",
    ),
    "pickle": (
        "cannot be pickled",
        "Define the module's class at the top of its file, and hold no lambda, open file or generator in it.",
    ),
    "deepcopy": (
        "cannot be copied by copy.deepcopy",
        "Keep no tensor of a forward pass in the module, and let __deepcopy__ copy the parameters.",
    ),
}


def _check_copy(
    name: str, make: Callable[[nn.Module], Any], module: nn.Module, x: Tensor, width: int, bench: Bench
) -> None:
    """Copy the module and compare what both compute in eval mode."""
    import torch

    claim, hint = _LOST[name]
    facts: dict[str, Any] = {"device": str(x.device), "where": f"dim={width}"}
    facts["expected"] = "a copy that computes the same"
    try:
        twin = make(module)
        module.eval()
        twin.eval()
        distance = _distance(bench.call(twin, x.clone()), bench.call(module, x.clone()))
        mine = {_memory(tensor) for tensor in module.parameters() if tensor.numel()}
        # A state dict is loaded into a module that was built: whether that is its own, `check_independence` says.
        shared = name != "state_dict" and any(
            _memory(tensor) in mine for tensor in twin.parameters() if tensor.numel()
        )
    except (torch.OutOfMemoryError, NotRepeatableError):
        raise
    except (Exception, SystemExit) as error:
        bench.failed(name, claim, measured=described(error), hint=hint, error=error, **facts)
        return
    same = distance <= MODE_TOLERANCE
    found = "the same output" if same else f"outputs differ by {distance:.3g} of their RMS"
    if shared:
        found = "the copy shares parameters with the module"
    bench.judge(name, same and not shared, claim, hint, measured=found, tolerance=_TOLERANCE, **facts)


def _check_modes(module: nn.Module, x: Tensor, width: int, bench: Bench) -> None:
    """Compare the outputs of eval and of training mode."""
    name, hint = "eval_and_train", "A host is trained in one mode and measured in the other."
    facts: dict[str, Any] = {"device": str(x.device), "where": f"dim={width}"}
    outputs: list[Any] = []
    for training in (False, True):
        module.train(training)
        try:
            outputs.append(bench.call(module, x.clone()).detach())  # one may write to it
        except (Exception, SystemExit) as error:
            bench.failed(
                name,
                f"does not run in {'training' if training else 'eval'} mode",
                expected="features in both modes",
                measured=described(error),
                hint=hint,
                error=error,
                **facts,
            )
            return
    kept, trained = outputs
    if kept.shape != trained.shape or kept.shape != x.shape:
        bench.failed(
            name,
            "returns other shapes in eval than in training mode",
            expected=list(x.shape),
            measured=f"{tuple(kept.shape)} in eval, {tuple(trained.shape)} in training mode",
            hint=hint,
            **facts,
        )
    elif varying := _varies_by_mode(module):
        found = f"one shape; outputs may differ by {varying}"
        bench.passed(name, expected="one shape in both modes", measured=found, **facts)
    else:
        distance = _distance(trained, kept)
        same = distance <= MODE_TOLERANCE
        bench.judge(
            name,
            same,
            "computes something else in eval than in training mode, and holds no dropout and no batch norm",
            "Do not read self.training: what is measured would not be what was trained.",
            expected="equal outputs",
            measured="equal outputs" if same else f"{distance:.3g} of the output's RMS apart",
            tolerance=_TOLERANCE,
            **facts,
        )


def _varies_by_mode(module: nn.Module) -> str:
    """Return the class of a layer that rightly differs between the modes, or ``""``."""
    from torch import nn

    for layer in module.modules():
        batch = isinstance(layer, (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm))
        dropout = isinstance(layer, nn.modules.dropout._DropoutNd) and layer.p > 0
        if batch or dropout or isinstance(layer, nn.RReLU):
            return type(layer).__name__
    return ""


def _distance(y: Tensor, z: Tensor) -> float:
    """Return the RMS of the difference as a part of that of ``z``; infinite if the shapes differ."""
    import torch

    if y.shape != z.shape:
        return float("inf")
    if torch.allclose(y, z, rtol=0, atol=0, equal_nan=True):
        return 0.0
    apart, size = rms(y - z), rms(z)
    return apart / size if size else apart


def _count_flops(module: nn.Module, x: Tensor, width: int, bench: Bench) -> None:
    from kasmina_core.checks.flops import count_flops

    facts: dict[str, Any] = {"device": str(x.device), "where": f"dim={width}, input {tuple(x.shape)}"}
    try:
        count = count_flops(module, x)
    except (Exception, SystemExit) as error:
        bench.not_run("flops", f"nothing could count them: {described(error)}", **facts)
        return
    measured: dict[str, Any] = {"multiply_adds": count.multiply_adds, "counted_by": count.counted_by}
    bench.passed("flops", measured=measured | ({"because": count.because} if count.because else {}), **facts)
