"""Check that a seed lets no sample change another one's features, whatever its weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from kasmina_core.blueprints.foreign import described
from kasmina_core.checks.devices import example_shapes, rms
from kasmina_core.checks.findings import Bench, Built
from kasmina_core.checks.reports import CheckResult

SAMPLES: Final = "samples_apart"

SAMPLE_TOLERANCE: Final = 1e-4
"""Largest change of a sample's features by other samples, as a part of the RMS of the output."""

_CLAIM: Final = "lets one sample change another's features"
_HINT: Final = (
    "Compute nothing over the batch in eval mode: the batch is axis 0 (batch_first=True), and norms take running "
    "statistics or those of one sample."
)


def check_samples(bench: Bench, built: Sequence[Built], spare: Built | None, device: str) -> None:
    """Change one of three samples, and run one alone, in eval mode with random weights; the others must not change.

    Args:
        bench: Builds and runs the modules.
        built: A module of each width and form to try; others like them are changed in their place.
        spare: A module that nothing else uses.
        device: Where they run.
    """
    import torch

    from kasmina_core.quiet import private_rng

    if not built:
        bench.not_run(SAMPLES, "no module was built")
        return
    with private_rng(None, torch.device(device)):
        for made in built:
            try:
                worst, what = _worst(bench, made, spare, device)
            except (Exception, SystemExit) as error:  # another check says what is wrong
                bench.not_run(SAMPLES, f"a module does not run: {described(error)}", device=device)
                return
            if not worst <= SAMPLE_TOLERANCE:
                bench.failed(
                    SAMPLES,
                    _CLAIM,
                    device=device,
                    where=made.where,
                    expected="features that no other sample changes",
                    measured=f"{worst:.3g} of the output's RMS, by {what}",
                    hint=_HINT,
                    tolerance=f"{SAMPLE_TOLERANCE:g} of the output's RMS",
                )
                return
    bench.passed(
        SAMPLES,
        device=device,
        expected="features that no other sample changes",
        measured=f"{len(built)} modules with random weights, in eval mode",
        tolerance=f"{SAMPLE_TOLERANCE:g} of the output's RMS",
    )


def _worst(bench: Bench, made: Built, spare: Built | None, device: str) -> tuple[float, str]:
    """Return the largest change of a sample that stayed, and what made it."""
    import torch

    if spare is not None and (spare.width, spare.causal) == (made.width, made.causal):
        again: Built | CheckResult = spare
    else:
        again = bench.build(made.width, made.causal)
    if isinstance(again, CheckResult):
        raise RuntimeError(again.measured)
    module = again.module.to(device).eval()
    first = example_shapes(bench.spec.topology, made.width)[0][0]
    x = torch.randn((3, *first[1:])).to(device)
    changed: list[tuple[str, Any, slice, slice]] = []
    for number, stay in ((0, slice(1, 3)), (2, slice(0, 2))):
        other = x.clone()
        other[number] = torch.randn(first[1:]).to(device) * 3 + 1
        changed.append((f"another sample at place {number}", other, stay, stay))
    changed.append(("its being alone", x[1:2], slice(1, 2), slice(0, 1)))
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.is_floating_point():  # a last layer of zeros would hide what is before it
                parameter.add_(0.3 * torch.randn(parameter.shape).to(parameter))
    plain = bench.call(module, x.clone()).detach()
    if plain.shape != x.shape or not bool(torch.isfinite(plain).all()):
        raise RuntimeError("no finite features of the right shape")
    found = []
    for what, other, before, after in changed:
        apart = bench.call(module, other.clone()).detach()[after] - plain[before]
        found.append((rms(apart) / (rms(plain) or 1.0), what))
    return max(found, key=lambda pair: float("inf") if pair[0] != pair[0] else pair[0])
