"""Check of seeds that mix positions: whether they say so, and heed padding, documents and cached positions."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, cast

from kasmina_core.blueprints.declarations import MIXES_POSITIONS
from kasmina_core.blueprints.foreign import described
from kasmina_core.checks.findings import Bench, Built

if TYPE_CHECKING:
    from torch import Tensor, nn

POSITIONS: Final = "positions"
"""The name of the check."""

LENGTH: Final = 64
"""Positions of the sequence on which it is tried whether a seed mixes them."""

TOLERANCE: Final = 1e-4
"""Largest difference, as a part of the norm of what is compared."""

_UNSAID: Final = (
    f"Declare mixes='{MIXES_POSITIONS}' and take forward(features, context=WHOLE_SEQUENCES): a SeedContext says which "
    "positions are padding, of another document, or cached. A seed that does not mix treats each position by itself."
)
_UNHEEDED: Final = (
    "Use context.visible(features, causal=...) as attention's mask and context.with_past(name, tensor) for keys and values, "
    "or else see to it that nothing comes from a position where context.real is False or context.documents differs."
)


def check_positions(bench: Bench, built: Sequence[Built]) -> None:
    """Try on random sequences, with random weights, whether seeds mix positions, and how those that do treat them.

    With random weights since a seed at birth changes nothing at all.
    """
    spec = bench.spec
    if spec.topology.sequence_axis is None:
        return
    chosen = [*[made for made in built if not made.causal][:1], *[made for made in built if made.causal][:1]]
    if not chosen:
        bench.not_run(POSITIONS, "no module was built")
        return
    for made in chosen:
        try:
            verdict = _judge(bench, made)
        except (Exception, SystemExit) as error:
            if not spec.mixes:
                bench.not_run(POSITIONS, f"a module with random weights could not be run: {described(error)}")
                return
            verdict = ("cannot be run with a context", described(error), _UNHEEDED)
        finally:
            bench.note_settings()
        if verdict is None:
            continue
        claim, measured, hint = verdict
        facts: dict[str, Any] = {"where": made.where, "measured": measured, "hint": hint}
        if not claim:
            bench.not_run(POSITIONS, measured)
            return
        bench.failed(
            POSITIONS, claim, expected="as if alone", tolerance=f"{TOLERANCE:g} of the norm", **facts
        )
        return
    said = "as if alone: padded, packed, cached" if spec.mixes else "each position by itself"
    bench.passed(POSITIONS, measured=said)


def _judge(bench: Bench, made: Built) -> tuple[str, str, str] | None:
    """Return claim, measured and hint of a failure; an empty claim if nothing can be said; ``None`` if all is well."""
    import torch

    module = with_random_weights(made.module)
    topology = bench.spec.topology
    axis = cast("int", topology.sequence_axis)
    rest = [2 if letter != topology.width else made.width for letter in topology.axes[1:]]
    del rest[axis - 1]
    x = torch.randn(1, LENGTH, *rest)

    def run(features: Tensor, *context: Any) -> Tensor:
        """Run the module on features whose positions are moved to axis 1, (b, t, ...)."""
        grown: Tensor = bench.call(module, features.movedim(1, axis), *context)
        return grown.detach().float().movedim(axis, 1)  # not under no_grad, a setting that is watched

    whole = run(x)
    if not torch.equal(run(x), whole):
        return "", "two passes over the same features differ", ""
    parts = [k for k in (1, LENGTH // 2, LENGTH - 1) if not _agree(run(x[:, k:]), whole[:, k:])]
    if not bench.spec.mixes:
        found = f"the features of {LENGTH - parts[0]} positions differ without the others" if parts else ""
        return ("mixes positions and does not say so", found, _UNSAID) if parts else None
    is_causal = all(_agree(run(x[:, :k]), whole[:, :k]) for k in (1, LENGTH // 2))
    for what, differs in _TRIALS.items():
        if (what != "cached positions" or is_causal) and (found := differs(run, rest)):
            return (f"mixes positions and does not heed {what}", found, _UNHEEDED)
    return None


def with_random_weights(module: nn.Module) -> nn.Module:
    """Return a copy of a seed in eval mode whose every parameter is drawn anew, so that no part of it is zero."""
    import torch

    trial = copy.deepcopy(module).float().eval()
    with torch.no_grad():
        for parameter in trial.parameters():
            fan_in = parameter[0].numel() if parameter.dim() > 1 else 1
            parameter.normal_(std=fan_in**-0.5)
    return trial


def _agree(one: Tensor, other: Tensor) -> bool:
    return bool((one - other).norm() <= TOLERANCE * other.norm())


_Run = Callable[..., "Tensor"]
_LENGTHS: Final = (7, 4, 1)


def _padding(run: _Run, rest: Sequence[int]) -> str:
    """Compare sequences of several lengths in one batch with each alone; a row of padding must give numbers."""
    import torch

    from kasmina_core.positions import SeedContext

    t = _LENGTHS[0]
    alone = [torch.randn(1, length, *rest) for length in _LENGTHS]
    for side in ("right", "left", "both"):
        batch, real = torch.randn(len(_LENGTHS) + 1, t, *rest), torch.zeros(len(_LENGTHS) + 1, t).bool()
        for row, one in enumerate(alone):
            free = t - one.shape[1]
            start = {"right": 0, "left": free, "both": free // 2}[side]
            batch[row, start : start + one.shape[1]], real[row, start : start + one.shape[1]] = one[0], True
        grown = run(batch, SeedContext(real=real))
        if not bool(grown.isfinite().all()):
            return "NaN or infinity in a row that is all padding"
        for row, one in enumerate(alone):
            if not _agree(grown[row][real[row]], run(one)[0]):
                padded = "both sides" if side == "both" else f"the {side}"
                return f"{one.shape[1]} positions padded to {t} on {padded} differ"
    return ""


def _documents(run: _Run, rest: Sequence[int]) -> str:
    """Compare documents in one row with each alone."""
    import torch

    from kasmina_core.positions import SeedContext

    alone = [torch.randn(1, length, *rest) for length in _LENGTHS]
    numbers = torch.cat([torch.full((1, length), i) for i, length in enumerate(_LENGTHS)], 1)
    grown = run(torch.cat(alone, 1), SeedContext(documents=numbers))
    for part, one in zip(torch.split(grown, list(_LENGTHS), 1), alone, strict=True):
        if not _agree(part, run(one)):
            return f"a document of {one.shape[1]} positions differs when it is packed with others"
    return ""


def _cache(run: _Run, rest: Sequence[int]) -> str:
    """Compare a sequence that comes in pieces with the same in one."""
    import torch

    from kasmina_core.positions import SeedContext

    x, store, pieces, past = torch.randn(2, sum(_LENGTHS), *rest), dict[str, Any](), [], 0
    for piece in torch.split(x, list(_LENGTHS), 1):
        pieces.append(run(piece, SeedContext(past=past, store=store)))
        past += piece.shape[1]
    return "" if _agree(torch.cat(pieces, 1), run(x)) else "positions behind cached ones differ"


_TRIALS: Final[Mapping[str, Callable[[_Run, Sequence[int]], str]]] = {
    "padding": _padding,
    "documents": _documents,
    "cached positions": _cache,
}
