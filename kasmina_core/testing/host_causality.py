"""Check of points declared causal: changing later inputs must change no earlier feature."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kasmina_core.causality import changed_at, said_of
from kasmina_core.checks.reports import CheckStatus
from kasmina_core.hosts import InjectionPoint
from kasmina_core.testing.comparing import features_at, mapped, path_of, tensors_in
from kasmina_core.topology import Topology

if TYPE_CHECKING:
    from kasmina_core.testing.hosts import Trial


def check_causality(trial: Trial) -> None:
    """Change later inputs and look at earlier features, at each point that is declared causal."""
    claimed = [
        (path_of(item), axis, shape[axis])
        for item, shape in trial.points
        if (axis := _causal_axis(trial, item, shape)) is not None
    ]
    if not claimed:
        return
    verdicts = [_causal_at(trial, path, axis, length) for path, axis, length in claimed]
    untested = [path for (path, *_), verdict in zip(claimed, verdicts, strict=True) if verdict is None]
    faults = {f"'{path}'": verdict or "" for (path, *_), verdict in zip(claimed, verdicts, strict=True)}
    if untested and not any(faults.values()):
        trial.keep(
            "causal_claim",
            CheckStatus.NOT_RUN,
            device="",
            hint=f"no input could be changed position by position to see it in the features of '{untested[0]}'; "
            "give an example of 2 positions or more, (b, t) or (b, t, d), with several values",
        )
        return
    trial.judge(
        "causal_claim",
        faults,
        "looks ahead at a point that is declared causal",
        "features that no later input changes",
        "Mask the attention (is_causal=True), or declare the point causal=False.",
    )


def _causal_axis(trial: Trial, item: str | InjectionPoint, shape: tuple[int, ...]) -> int | None:
    """Return the axis of the host's features along which a point is said to be causal; ``None`` if it is not."""
    if isinstance(item, str):
        return 1 if said_of(item, trial.causal) and len(shape) == Topology.TRANSFORMER.ndim else None
    axis = item.topology.causal_axis
    return item.axes.index(item.topology.axes[axis]) if item.causal and axis is not None else None


def _causal_at(trial: Trial, path: str, axis: int, length: int) -> str | None:
    """Return how a point looks ahead, ``""`` if it does not, ``None`` if no input tells.

    Every axis of an input that is as long as the features' may be the one of their positions.
    """
    plain = _features(trial, path, trial.example)
    leaks: list[str] = []
    places = [
        (name, tensor, place)
        for name, tensor in tensors_in(trial.example, "input")
        for place in range(tensor.dim())
        if tensor.dim() > 1 and tensor.shape[place] == length > 1
    ]
    for name, tensor, place in places:
        effective, leak = False, ""
        for cut in sorted({1, length // 2, length - 1}):
            try:
                changed = changed_at(tensor, place, cut, length - cut)
                features = _features(trial, path, _with(trial.example, tensor, changed))
            except Exception:  # a value that this input does not take; it says nothing
                continue
            if features.shape != plain.shape:
                continue
            before = [part.narrow(axis, 0, cut) for part in (plain, features)]
            after = [part.narrow(axis, cut, length - cut) for part in (plain, features)]
            effective = effective or not _close(*after)
            if not leak and not _close(*before):
                leak = f"{name} from position {cut} on changes features before position {cut}"
        if effective and not leak:
            return ""
        leaks += [leak] if leak else []
    return leaks[0] if leaks else None


def _with(example: object, old: Tensor, new: Tensor) -> object:
    return mapped(example, lambda tensor: new if tensor is old else tensor)


def _features(trial: Trial, path: str, example: object) -> Tensor:
    seen = features_at(trial.twin().eval(), [path], example, trial.device)
    features: Tensor = seen[path][0]
    return features


def _close(a: Tensor, b: Tensor) -> bool:
    a, b = a.double(), b.double()
    scale = float(a.abs().max()) if a.numel() else 0.0
    return bool(torch.allclose(a, b, rtol=1e-5, atol=1e-6 * scale, equal_nan=True))
