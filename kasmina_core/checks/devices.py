"""Checks of a blueprint's modules on a device: shapes, numbers, gradients, precisions, memory formats."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from kasmina_core.blueprints.foreign import described
from kasmina_core.checks.findings import Bench, Built, NotRepeatableError, Tally, Words
from kasmina_core.topology import Topology

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

IDENTITY_TOLERANCE: Final = 0.5
"""Largest distance of a seed from the identity at birth, as a part of the RMS of its input."""

FORMAT_TOLERANCE: Final = 0.01
"""Largest difference of outputs in two memory formats, as a part of their RMS; TF32 stays far below it."""

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

_WORDS: Final[Mapping[str, Words]] = {
    "output_shape": Words(
        "the shape of the input",
        "does not return features of the shape it was given",
        "Keep width and length (padding, stride 1, a last projection), and return one tensor.",
    ),
    "output_dtype": Words(
        "the dtype and device of the input",
        "does not return features of the dtype and device it was given",
        "Create tensors in forward with dtype=x.dtype, device=x.device, or register them as buffers.",
    ),
    "output_finite": Words(
        "finite values",
        "returns NaN or infinity at birth",
        "Check initial values and divisions; add an eps where a norm or a variance can be 0.",
    ),
    "input_unchanged": Words(
        "an input that is left as it was",
        "changes its input",
        "The input is the host's own features: use no inplace=True and no x.add_() on it.",
    ),
    "forward_draws_no_random_numbers": Words(
        "0 draws",
        "draws global random numbers in forward",
        "A seed that draws them changes the host's run: set dropout to 0 by default, or use a generator of its own.",
    ),
    "gradient_at_birth": Words(
        "a finite norm above 0",
        "has no usable gradient at birth",
        "Something multiplies by zero before every parameter. Zero-initialise the last layer alone, and put no norm or "
        "ReLU after it.",
    ),
    "gradient_to_input": Words(
        "a finite norm above 0",
        "passes no usable gradient on to its input",
        "The layers of the host before the slot learn through the seed: do not detach the input.",
    ),
    "identity_at_birth": Words(
        f"an output within {IDENTITY_TOLERANCE} of the input's RMS",
        "is far from the identity at birth",
        "Return x plus a branch whose last layer starts at zero: a new seed then leaves the host as it is.",
        f"{IDENTITY_TOLERANCE} of the input's RMS",
    ),
    "other_dtypes": Words(
        "finite features of the dtype it was given and converted to",
        "does not keep the dtype of its host",
        "Create tensors in forward with dtype=x.dtype, or register them as buffers, which .to() converts.",
    ),
    "autocast": Words(
        "finite features and gradients",
        "gives NaN, infinity or no numbers under autocast",
        "Under autocast a layer may return half precision while x stays as it is: bring tensors to one dtype, as in "
        "y.to(x.dtype), before an operation that asks for equal ones.",
    ),
    "channels_last": Words(
        "the memory format of the input, and the same values",
        "does not keep the memory format of its input",
        "Do not call contiguous() or view() on features: reshape, or return y.to(memory_format=...) of the input.",
        f"{FORMAT_TOLERANCE} of the output's RMS",
    ),
}


def device_check_names(topology: Topology, full: bool) -> tuple[str, ...]:
    """Return the checks of a device, in the order of reports."""
    if not full:
        return QUICK_DEVICE_CHECKS
    of_topology = [c for c in FULL_DEVICE_CHECKS if topology.memory_formats or c != "channels_last"]
    return (*QUICK_DEVICE_CHECKS, *of_topology)


def check_on_device(bench: Bench, built: Sequence[Built], device: torch.device, full: bool) -> bool:
    """Run the modules on ``device``; return whether anything ran there."""
    tally = Tally(_WORDS)
    problem = "no module was built"
    for number, made in enumerate(built):
        try:
            module = made.module.to(device)
        except (Exception, SystemExit) as error:
            problem = f"a module could not be moved to {device}: {error!r}"
            continue
        examples = example_shapes(bench.spec.topology, made.width)
        if (
            number and not full
        ):  # the first width runs on every shape, each other one on a shape in training mode
            examples = [examples[number % (len(examples) - 1)]]
        for shape, training in examples:
            module.train(training)
            where = f"{made.where}, input {shape}" + ("" if training else ", eval mode")
            try:
                problem = _run_once(module, shape, device, where, tally, bench) or problem
            except Exception as error:  # what it returned cannot even be looked at
                _fail_to_run(tally, where, shape, error)
    ran = bool(tally.runs)
    if full and ran and "output_shape" not in tally.failures:
        _FullChecks(bench, built[0].width, device, tally).run()
    for name in device_check_names(bench.spec.topology, full):
        if (failure := tally.failures.get(name)) is not None:
            bench.failed(name, device=str(device), **failure)
        elif runs := tally.runs.get(name):
            words = _WORDS[name]
            measured = tally.measured.get(name, f"{runs} inputs")
            bench.passed(
                name,
                device=str(device),
                measured=measured,
                expected=words.expected,
                tolerance=words.tolerance,
            )
        else:
            bench.not_run(name, tally.problems.get(name, problem), device=str(device))
    return ran


def example_shapes(topology: Topology, width: int) -> list[tuple[tuple[int, ...], bool]]:
    """Return shapes of features, each with whether the module is in training mode."""
    *shapes, last = topology.example_shapes(width)
    return [*((shape, True) for shape in shapes), (last, False)]


def rms(values: Tensor) -> float:
    """Return the root mean square."""
    return float(values.detach().float().square().mean().sqrt())


# -- at birth ---------------------------------------------------------------------------------------------------------


def _run_once(
    module: nn.Module, shape: tuple[int, ...], device: torch.device, where: str, tally: Tally, bench: Bench
) -> str:
    """Run forward and, in training mode, backward once; return why nothing could be checked, or ``""``."""
    import torch

    from kasmina_core.quiet import generator_states

    leaf = torch.randn(shape, dtype=torch.float32).to(device).requires_grad_()
    x = leaf.clone()  # in-place writes to it are seen below, and are an error on a leaf
    cotangent = torch.randn(shape, dtype=torch.float32).to(device)
    version, features = x._version, leaf.detach()
    before = generator_states(device)
    try:
        y: object = bench.call(module, x)
    except torch.OutOfMemoryError as error:
        return f"{device} has too little memory free: {error}"
    except (Exception, SystemExit) as error:
        _fail_to_run(tally, where, shape, error)
        return "forward raised"
    after = generator_states(device)
    if not isinstance(y, torch.Tensor) or tuple(y.shape) != shape:
        tally.fail("output_shape", where, _shape_of(y), expected=shape)
        return "forward returned no features of the right shape"
    tally.ran("output_shape")
    wanted, found = (f"{tensor.dtype} on {tensor.device}" for tensor in (x, y))
    tally.judge("output_dtype", wanted == found, where, found, expected=wanted)
    bad = int((~torch.isfinite(y)).sum())
    tally.judge("output_finite", not bad, where, f"{bad} of {y.numel()} are not finite")
    writes = x._version - version
    tally.judge("input_unchanged", not writes, where, f"{writes} in-place writes")
    still = all(map(torch.equal, before, after))
    tally.judge("forward_draws_no_random_numbers", still, where, "the generator moved")
    if not module.training:
        return ""
    if not bad:
        distance = rms(y.to(features) - features) / rms(features)
        tally.farthest = max(tally.farthest, distance)
        tally.measured["identity_at_birth"] = f"{tally.farthest:.3g} of the input's RMS"
        found = f"{distance:.3g} of the input's RMS away"
        tally.judge("identity_at_birth", distance <= IDENTITY_TOLERANCE, where, found)
    return _judge_gradients(module, y, leaf, cotangent, where, tally)


def _shape_of(y: object) -> object:
    import torch

    return tuple(y.shape) if isinstance(y, torch.Tensor) else type(y).__name__


def _fail_to_run(tally: Tally, where: str, shape: tuple[int, ...], error: BaseException) -> None:
    tally.fail(
        "output_shape",
        where,
        described(error),
        expected=shape,
        claim="does not run",
        hint="Features have the declared topology, any batch and size; a width it cannot take is refused by accepts_width.",
        error=error,
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
            _backward(y, cotangent.to(y))
        except (Exception, SystemExit) as raised:
            error = raised
    gradients = [p.grad for p in trainable if p.grad is not None]
    norm = _norm(gradients)
    found, hint = f"{norm:.3g}", ""
    if error is not None:
        norm, found, hint = 0.0, described(error), "Backward of the output must work once."
    elif not trainable:
        found, hint = "no trainable parameter", "A seed learns: give it a parameter, or do not declare it."
    elif not gradients:
        found, hint = "the output depends on no parameter", "Do not detach, and leave gradient mode alone."
    elif not norm < float("inf"):
        hint = "The gradient at birth is not finite: check initial values and divisions."
    tally.judge("gradient_at_birth", 0.0 < norm < float("inf"), where, found, hint=hint, error=error)
    if error is not None:
        return "backward raised"
    onward = _norm([leaf.grad] if leaf.grad is not None else [])
    tally.judge("gradient_to_input", 0.0 < onward < float("inf"), where, f"{onward:.3g}")
    return ""


def _backward(y: Tensor, cotangent: Tensor) -> None:
    """Give ``y`` the gradient ``cotangent``, and what it was computed from the gradients that follow."""
    # From the sum, not by y.backward(cotangent): for a given gradient torch imports sympy, some 0.4 s.
    (y * cotangent).sum().real.backward()  # type: ignore[no-untyped-call]  # untyped in torch


def _norm(tensors: Sequence[Tensor]) -> float:
    import torch

    return float(torch.stack([t.float().norm() for t in tensors]).norm()) if tensors else 0.0


# -- precisions and memory formats ------------------------------------------------------------------------------------


class _FullChecks:
    """The full checks of one width on one device."""

    def __init__(self, bench: Bench, width: int, device: torch.device, tally: Tally) -> None:
        self.bench, self.width, self.device, self.tally = bench, width, device, tally
        self.shape = example_shapes(bench.spec.topology, width)[0][0]
        self.where = f"dim={width}, input {self.shape}"

    def run(self) -> None:
        import torch

        jobs = {"other_dtypes": self._dtypes, "autocast": self._autocast}
        if self.bench.spec.topology.memory_formats:
            jobs["channels_last"] = self._formats
        for name, job in jobs.items():
            try:
                job(name)
            except torch.OutOfMemoryError as error:
                self.tally.problems[name] = f"{self.device} has too little memory free: {error}"
            except NotRepeatableError as error:
                self.tally.problems[name] = f"a second module could not be built: {error}"

    def _features(self) -> Tensor:
        import torch

        return torch.randn(self.shape).to(self.device)

    def _module(self) -> nn.Module:
        return self.bench.need(self.width).to(self.device)

    def _call(self, name: str, module: nn.Module, x: Tensor, where: str) -> Tensor | None:
        """Return the features, or ``None`` once a failure is kept."""
        import torch

        try:
            y: Any = self.bench.call(module, x)
        except torch.OutOfMemoryError:
            raise
        except (Exception, SystemExit) as error:
            self.tally.fail(name, where, described(error), claim="does not run", error=error)
            return None
        if not isinstance(y, torch.Tensor) or y.shape != x.shape:
            claim = _WORDS["output_shape"].claim
            self.tally.fail(name, where, _shape_of(y), claim=claim, expected=tuple(x.shape))
            return None
        return y

    def _dtypes(self, name: str) -> None:
        import torch

        dtypes = [torch.float64, torch.bfloat16] + [torch.float16] * (self.device.type == "cuda")
        for dtype in dtypes:
            where = f"{self.where} of {dtype}"
            y = self._call(name, self._module().to(dtype), self._features().to(dtype), where)
            if y is None:
                return
            if y.dtype is not dtype:
                self.tally.fail(name, where, str(y.dtype))
            else:
                finite = bool(torch.isfinite(y).all())
                self.tally.judge(
                    name, finite, where, "values that are not finite", claim="returns NaN or infinity"
                )
        self.tally.measured[name] = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)

    def _autocast(self, name: str) -> None:
        import torch

        module, device = self._module(), self.device
        lacks = device.type == "cuda" and not torch.cuda.is_bf16_supported()
        half = torch.float16 if lacks else torch.bfloat16
        where = f"{self.where}, autocast to {half}"
        leaf = self._features().requires_grad_()
        with torch.autocast(device.type, half):
            y = self._call(name, module, leaf.clone(), where)
        if y is None:
            return
        try:
            _backward(y.float(), self._features())
        except torch.OutOfMemoryError:
            raise
        except (Exception, SystemExit) as error:
            claim = "has no backward pass under autocast"
            self.tally.fail(name, where, described(error), claim=claim, error=error)
            return
        gradients = [p.grad for p in module.parameters() if p.grad is not None]
        finite = all(bool(torch.isfinite(t).all()) for t in (y, *gradients))
        found = str(y.dtype) if finite else "values that are not finite"
        self.tally.judge(name, finite and y.is_floating_point(), where, found)
        self.tally.measured[name] = f"{str(half).removeprefix('torch.')}, forward and backward"

    def _formats(self, name: str) -> None:
        for memory_format in self.bench.spec.topology.memory_formats:
            self._format(name, memory_format)

    def _format(self, name: str, format_name: str) -> None:
        import torch

        module, plain = self._module(), self._features()
        memory_format: torch.memory_format = getattr(torch, format_name)
        where = f"{self.where} in {format_name}"
        y = self._call(name, module, plain.to(memory_format=memory_format), where)
        z = self._call(name, module, plain, self.where)
        if y is None or z is None:
            return
        if not (self.width == 1 or y.is_contiguous(memory_format=memory_format)):
            found = "contiguous" if y.is_contiguous() else f"strides {tuple(y.stride())}"
            self.tally.fail(name, where, found)
            return
        size, distance = rms(z), rms(y - z)
        found = f"{distance / size if size else distance:.3g} of the output's RMS away"
        claim = "computes something else in another memory format"
        self.tally.judge(name, distance <= FORMAT_TOLERANCE * size, where, found, claim=claim)
        self.tally.measured[name] = "kept, with the same values"
