"""Check of points declared causal: changing later inputs must change no earlier feature."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kasmina_core.checks.reports import CheckStatus
from kasmina_core.hosts import InjectionPoint
from kasmina_core.testing.comparing import features_at, mapped, path_of, tensors_in
from kasmina_core.topology import Topology

if TYPE_CHECKING:
    from kasmina_core.testing.hosts import Trial


def check_causality(trial: Trial) -> None:
    """Change later inputs and look at earlier features, at each point that is declared causal."""
    claimed = [
        (path_of(item), shape[1])
        for item, shape in trial.points
        if len(shape) == Topology.TRANSFORMER.ndim
        and (item.causal if isinstance(item, InjectionPoint) else trial.causal)
    ]
    if not claimed:
        return
    verdicts = [_causal_at(trial, path, length) for path, length in claimed]
    untested = [path for (path, _), verdict in zip(claimed, verdicts, strict=True) if verdict is None]
    faults = {f"'{path}'": verdict or "" for (path, _), verdict in zip(claimed, verdicts, strict=True)}
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


def _causal_at(trial: Trial, path: str, length: int) -> str | None:
    """Return how a point looks ahead, ``""`` if it does not, ``None`` if no input tells."""
    plain = _features(trial, path, trial.example)
    leaks: list[str] = []
    for name, tensor in tensors_in(trial.example, "input"):
        if tensor.dim() < 2 or tensor.shape[1] != length or length < 2:
            continue
        effective, leak = False, ""
        for cut in sorted({1, length // 2, length - 1}):
            try:
                features = _features(trial, path, _with(trial.example, tensor, _changed_from(tensor, cut)))
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


def _with(example: object, old: Tensor, new: Tensor) -> object:
    return mapped(example, lambda tensor: new if tensor is old else tensor)


def _features(trial: Trial, path: str, example: object) -> Tensor:
    seen = features_at(trial.twin().eval(), [path], example, trial.device)
    features: Tensor = seen[path][0]
    return features


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
