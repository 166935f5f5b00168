"""The checks that run a blueprint's modules on a device: shapes, numbers, gradients, precisions, memory formats."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from kasmina_core.checks.findings import Bench, Built, NotRepeatableError, Tally, told
from kasmina_core.topology import Topology

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

IDENTITY_TOLERANCE: Final = 0.5
"""How far a seed may be from the identity at birth, as a part of the RMS of its input."""

FORMAT_TOLERANCE: Final = 0.01
"""How far outputs in two memory formats may differ, as a part of the RMS of the output; TF32 stays far below it."""

QUICK_DEVICE_CHECKS: Final = (
    "output_shape",
    "output_dtype",
    "output_finite",
    "input_unchanged",
    "forward_draws_no_random_numbers",
    "gradient_at_birth",
    "gradient_to_input",
    "identity_at_birth",
)
FULL_DEVICE_CHECKS: Final = ("other_dtypes", "autocast", "channels_last")

_EXPECTED: Final[Mapping[str, str]] = {
    "output_shape": "the shape of the input",
    "output_dtype": "the dtype and device of the input",
    "output_finite": "finite values",
    "input_unchanged": "an input that is left as it was",
    "forward_draws_no_random_numbers": "0 draws",
    "gradient_at_birth": "a finite norm above 0",
    "gradient_to_input": "a finite norm above 0",
    "identity_at_birth": "an output near the input",
    "other_dtypes": "features of the dtype it was given and converted to",
    "autocast": "finite features and gradients",
    "channels_last": "the memory format of the input, and the same values",
}
_TOLERANCES: Final = {
    "identity_at_birth": f"{IDENTITY_TOLERANCE} of the input's RMS",
    "channels_last": f"{FORMAT_TOLERANCE} of the output's RMS",
}


def device_check_names(topology: Topology, full: bool) -> tuple[str, ...]:
    """Return the checks of a device, in the order of reports."""
    if not full:
        return QUICK_DEVICE_CHECKS
    of_topology = [c for c in FULL_DEVICE_CHECKS if topology is Topology.CNN or c != "channels_last"]
    return (*QUICK_DEVICE_CHECKS, *of_topology)


def check_on_device(bench: Bench, built: Sequence[Built], device: torch.device, full: bool) -> bool:
    """Run the modules on ``device``; return whether anything ran there."""
    tally = Tally()
    problem = "no module was built"
    for made in built:
        try:
            module = made.module.to(device)
        except (Exception, SystemExit) as error:
            problem = f"a module could not be moved to {device}: {error!r}"
            continue
        for shape, training in example_shapes(bench.spec.topology, made.width):
            module.train(training)
            where = f"{made.where}, input {shape}" + ("" if training else ", eval mode")
            try:
                problem = _run_once(module, shape, device, where, tally, bench) or problem
            except Exception as error:  # what it returned cannot even be looked at
                _fail_to_run(tally, where, shape, error)
    ran = bool(tally.runs)
    if full and built and "output_shape" not in tally.failures and ran:
        _run_full(bench, built[0].width, device, tally)
    for name in device_check_names(bench.spec.topology, full):
        if (failure := tally.failures.get(name)) is not None:
            bench.failed(name, device=str(device), **failure)
        elif runs := tally.runs.get(name):
            bench.passed(
                name,
                device=str(device),
                measured=tally.measured.get(name, f"{runs} inputs"),
                expected=_EXPECTED[name],
                tolerance=_TOLERANCES.get(name, "none"),
            )
        else:
            bench.not_run(name, tally.problems.get(name, problem), device=str(device))
    return ran


def example_shapes(topology: Topology, width: int) -> list[tuple[tuple[int, ...], bool]]:
    """Return shapes of features, each with whether the module is in training mode."""
    if topology is Topology.CNN:
        return [((2, width, 8, 8), True), ((1, width, 7, 5), True), ((3, width, 5, 6), False)]
    return [((2, 16, width), True), ((1, 7, width), True), ((3, 1, width), False)]


def rms(values: Tensor) -> float:
    """Return the root mean square."""
    return float(values.detach().float().square().mean().sqrt())


# -- at birth ---------------------------------------------------------------------------------------------------------


def _run_once(
    module: nn.Module,
    shape: tuple[int, ...],
    device: torch.device,
    where: str,
    tally: Tally,
    bench: Bench,
) -> str:
    """Run forward and, in training mode, backward once; return why nothing could be checked, or ``""``."""
    import torch

    leaf = torch.randn(shape, dtype=torch.float32).to(device).requires_grad_()
    x = leaf.clone()  # in-place writes to it are seen below, and are an error on a leaf
    cotangent = torch.randn(shape, dtype=torch.float32).to(device)
    version, features = x._version, leaf.detach()
    before = _generator_states(device)
    try:
        y: object = bench.call(module, x)
    except torch.OutOfMemoryError as error:
        return f"{device} has too little memory free: {error}"
    except (Exception, SystemExit) as error:
        _fail_to_run(tally, where, shape, error)
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
    tally.ran("output_shape")
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
    if not module.training:
        return ""
    if not bad:
        _judge_identity(y, features, where, tally)
    return _judge_gradients(module, y, leaf, cotangent, where, tally)


def _fail_to_run(tally: Tally, where: str, shape: tuple[int, ...], error: BaseException) -> None:
    tally.fail(
        "output_shape",
        where,
        "does not run",
        shape,
        told(error),
        "Features have the declared topology, any batch and size; a width it cannot take is refused by accepts_width.",
        error,
    )


def _judge_identity(y: Tensor, features: Tensor, where: str, tally: Tally) -> None:
    distance = rms(y.to(features) - features) / rms(features)
    tally.farthest = max(tally.farthest, distance)
    tally.measured["identity_at_birth"] = f"{tally.farthest:.3g} of the input's RMS"
    tally.judge(
        "identity_at_birth",
        distance <= IDENTITY_TOLERANCE,
        where,
        "is far from the identity at birth",
        f"an output within {IDENTITY_TOLERANCE} of the input's RMS",
        f"{distance:.3g} of the input's RMS away",
        "Return x plus a branch whose last layer starts at zero: a new seed then leaves the host as it is.",
        None,
        _TOLERANCES["identity_at_birth"],
    )


def _judge_gradients(
    module: nn.Module, y: Tensor, leaf: Tensor, cotangent: Tensor, where: str, tally: Tally
) -> str:
    """Run backward once; return why a gradient could not be judged, or ``""``."""
    trainable = [p for p in module.parameters() if p.requires_grad]
    module.zero_grad(set_to_none=True)
    error: BaseException | None = None
    if y.requires_grad:
        try:
            y.backward(cotangent.to(y))  # type: ignore[no-untyped-call]  # untyped in torch
        except (Exception, SystemExit) as raised:
            error = raised
    gradients = [p.grad for p in trainable if p.grad is not None]
    norm = _norm(gradients)
    found = f"{norm:.3g}"
    hint = (
        "Something multiplies by zero before every parameter. Zero-initialise the last layer alone, and put no "
        "norm or ReLU after it."
    )
    if error is not None:
        norm, found = 0.0, told(error)
        hint = "Backward of the output must work once."
    elif not trainable:
        norm, found = 0.0, "no trainable parameter"
        hint = "A seed learns: give it a parameter, or do not declare it."
    elif not gradients:
        norm, found = 0.0, "the output depends on no parameter"
        hint = "Do not detach, and leave gradient mode alone."
    elif not norm < float("inf"):
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
    if error is not None:
        return "backward raised"
    onward = _norm([leaf.grad] if leaf.grad is not None else [])
    tally.judge(
        "gradient_to_input",
        0.0 < onward < float("inf"),
        where,
        "passes no usable gradient on to its input",
        _EXPECTED["gradient_to_input"],
        f"{onward:.3g}",
        "The layers of the host before the slot learn through the seed: do not detach the input.",
    )
    return ""


def _norm(tensors: Sequence[Tensor]) -> float:
    import torch

    return float(torch.stack([t.float().norm() for t in tensors]).norm()) if tensors else 0.0


def _generator_states(device: torch.device) -> list[Tensor]:
    import torch

    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return states


# -- precisions and memory formats ------------------------------------------------------------------------------------


def _run_full(bench: Bench, width: int, device: torch.device, tally: Tally) -> None:
    import torch

    shape = example_shapes(bench.spec.topology, width)[0][0]
    trial = _Trial(bench, width, shape, device, tally)
    jobs: dict[str, Callable[[_Trial], None]] = {"other_dtypes": _check_dtypes, "autocast": _check_autocast}
    if bench.spec.topology is Topology.CNN:
        jobs["channels_last"] = _check_format
    for name, job in jobs.items():
        try:
            job(trial)
        except torch.OutOfMemoryError as error:
            tally.problems[name] = f"{device} has too little memory free: {error}"
        except NotRepeatableError as error:
            tally.problems[name] = f"a second module could not be built: {error}"


class _Trial:
    """A width and a device, and how to run a module there for one of the full checks."""

    def __init__(
        self,
        bench: Bench,
        width: int,
        shape: tuple[int, ...],
        device: torch.device,
        tally: Tally,
    ) -> None:
        self.bench, self.width, self.shape, self.device, self.tally = bench, width, shape, device, tally

    def run(self, name: str, module: nn.Module, x: Tensor, where: str, hint: str) -> Tensor | None:
        """Return the features, or ``None`` once a failure is kept."""
        import torch

        expected = _EXPECTED[name]
        try:
            y: Any = self.bench.call(module, x)
        except torch.OutOfMemoryError:
            raise
        except (Exception, SystemExit) as error:
            found: object = told(error)
            self.tally.fail(name, where, "does not run", expected, found, hint, error)
            return None
        if not isinstance(y, torch.Tensor) or y.shape != x.shape:
            found = tuple(y.shape) if isinstance(y, torch.Tensor) else type(y).__name__
            claim = "does not return features of the shape it was given"
            self.tally.fail(name, where, claim, tuple(x.shape), found, hint)
            return None
        return y


def _check_dtypes(trial: _Trial) -> None:
    import torch

    bench, width, shape, device, tally = trial.bench, trial.width, trial.shape, trial.device, trial.tally

    name = "other_dtypes"
    hint = "Create tensors in forward with dtype=x.dtype, or register them as buffers, which .to() converts."
    dtypes = [torch.float64, torch.bfloat16] + ([torch.float16] if device.type == "cuda" else [])
    for dtype in dtypes:
        where = f"dim={width}, input {shape} of {dtype}"
        x = torch.randn(shape).to(device, dtype)
        y = trial.run(name, bench.need(width).to(device, dtype), x, where, hint)
        if y is None:
            return
        finite = bool(torch.isfinite(y).all())
        tally.judge(
            name,
            y.dtype is dtype and finite,
            where,
            "does not keep the dtype of its host" if y.dtype is not dtype else "returns NaN or infinity",
            f"finite features of {dtype}",
            str(y.dtype) if y.dtype is not dtype else "values that are not finite",
            hint,
        )
    tally.measured[name] = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def _check_autocast(trial: _Trial) -> None:
    import torch

    width, shape, device, tally = trial.width, trial.shape, trial.device, trial.tally
    module = trial.bench.need(width).to(device)

    name = "autocast"
    half = torch.bfloat16
    if device.type == "cuda" and not torch.cuda.is_bf16_supported():
        half = torch.float16
    where = f"dim={width}, input {shape}, autocast to {half}"
    hint = (
        "Under autocast a layer may return half precision while x stays as it is: bring tensors to one dtype, as in "
        "y.to(x.dtype), before an operation that asks for equal ones."
    )
    leaf = torch.randn(shape).to(device).requires_grad_()
    with torch.autocast(device.type, half):
        y = trial.run(name, module, leaf.clone(), where, hint)
    if y is None:
        return
    try:
        y.float().backward(torch.randn(shape).to(device))  # type: ignore[no-untyped-call]  # untyped in torch
    except torch.OutOfMemoryError:
        raise
    except (Exception, SystemExit) as error:
        found = told(error)
        tally.fail(name, where, "has no backward pass under autocast", _EXPECTED[name], found, hint, error)
        return
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    finite = all(bool(torch.isfinite(t).all()) for t in (y, *gradients))
    tally.judge(
        name,
        finite and y.is_floating_point(),
        where,
        "gives NaN, infinity or no numbers under autocast",
        _EXPECTED[name],
        "values that are not finite" if not finite else str(y.dtype),
        hint,
    )
    tally.measured[name] = f"{str(half).removeprefix('torch.')}, forward and backward"


def _check_format(trial: _Trial) -> None:
    import torch

    width, shape, device, tally = trial.width, trial.shape, trial.device, trial.tally
    module = trial.bench.need(width).to(device)

    name = "channels_last"
    where = f"dim={width}, input {shape} in channels_last"
    hint = "Do not call contiguous() or view() on features: reshape, or return y.to(memory_format=...) of the input."
    plain = torch.randn(shape).to(device)
    x = plain.to(memory_format=torch.channels_last)
    y = trial.run(name, module, x, where, hint)
    z = trial.run(name, module, plain, f"dim={width}, input {shape}", hint)
    if y is None or z is None:
        return
    kept = width == 1 or y.is_contiguous(memory_format=torch.channels_last)
    if not tally.judge(
        name,
        kept,
        where,
        "does not keep the memory format of its input",
        "channels_last",
        "contiguous" if y.is_contiguous() else f"strides {tuple(y.stride())}",
        hint,
    ):
        return
    size, distance = rms(z), rms(y - z)
    tally.judge(
        name,
        distance <= FORMAT_TOLERANCE * size,
        where,
        "computes something else in another memory format",
        _EXPECTED[name],
        f"{distance / size if size else distance:.3g} of the output's RMS away",
        hint,
        None,
        _TOLERANCES[name],
    )
    tally.measured[name] = "kept, with the same values"
