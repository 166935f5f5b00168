"""Building a seed and trying it once before anything depends on it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kasmina_core.blueprints.catalogue import BlueprintRegistry
from kasmina_core.blueprints.declarations import BlueprintSpec
from kasmina_core.blueprints.foreign import contained, shown
from kasmina_core.errors import BlueprintError, KasminaError
from kasmina_core.hosts import InjectionPoint
from kasmina_core.quiet import generator_states, kept_buffers, private_rng
from kasmina_core.slots.owner import Trial
from kasmina_core.topology import Topology


def try_seed(
    registry: BlueprintRegistry,
    blueprint_id: str,
    point: InjectionPoint,
    options: Mapping[str, Any],
    like: Tensor,
    random_seed: int,
    may_draw: bool,
) -> Trial:
    """Build a seed for a point and run it on random features in both modes, on random numbers of its own.

    Args:
        registry: Where the blueprint is.
        blueprint_id: Its id.
        point: Where the seed will be.
        options: Options of the blueprint.
        like: An empty tensor with the shape of one sample's features, and the slot's dtype and device.
        random_seed: From which the seed's weights are drawn.
        may_draw: Whether its forward may draw from the global random numbers. In the host's own pass it may not: the
            host would then draw others.

    Raises:
        UnknownNameError: If nobody offers the blueprint.
    """
    trial = Trial()
    findings = trial.findings
    entry = registry.get(blueprint_id)
    spec = entry.spec
    trial.mixes = bool(spec.mixes)
    trial.takes_causal = spec.takes_causal
    findings["blueprint known"] = (True, "")
    fits = spec.topology is point.topology
    findings["topology"] = (fits, "" if fits else _other_topology(registry, spec.topology, point.topology))
    try:
        refusal = spec.refusal(point.dim)
    except Exception as error:
        refusal = f"accepts_width raised {shown(error)}"
    findings["width"] = (refusal is None, refusal or "")
    if not fits or refusal is not None:
        return trial
    with private_rng(random_seed, like.device):
        try:
            seed = registry.create(blueprint_id, point.dim, causal=point.causal, options=options)
            if not isinstance(seed, nn.Module):
                raise BlueprintError(f"its factory returned {type(seed).__name__}, not a torch.nn.Module")
            seed = seed.to(like.device, like.dtype)
        except Exception as error:
            text = str(error) if isinstance(error, KasminaError) else f"its factory raised {shown(error)}"
            findings["builds"] = (False, text)
            return trial
        findings["builds"] = (True, "")
        features = torch.randn((2, *like.shape[1:])).to(like)  # batch statistics need more than one value
        given, numbers = features.clone(), generator_states(like.device)
        try:
            with contained(), torch.no_grad(), kept_buffers(seed):
                seed.train()(given)
                drew = not all(map(torch.equal, numbers, generator_states(like.device)))
                output = seed.eval()(given)
        except Exception as error:
            findings["shape"] = (False, f"its forward raised {shown(error)}")
            return trial
        fits = isinstance(output, Tensor) and output.shape == features.shape
        mixed = _mixed(seed, features, spec) if fits and not entry.distribution else ""
        findings["kept apart"] = (not mixed, mixed)
    if not isinstance(output, Tensor):
        findings["shape"] = (False, f"its forward returned {type(output).__name__}, not a tensor")
        return trial
    shapes = f"host: {tuple(features.shape)}, seed: {tuple(output.shape)}"
    findings["shape"] = (output.shape == features.shape, shapes)
    findings["dtype"] = (output.is_floating_point(), f"host: {features.dtype}, seed: {output.dtype}")
    is_meta = output.device.type == "meta"
    findings["finite output"] = (is_meta or bool(output.isfinite().all()), "")
    findings["input unchanged"] = (
        given._version == 0,
        "its forward must not write into the features it is given: the host reads them too",
    )
    advice = "use GrowthConfig(incubation='counterfactual'), or a seed that draws none"
    findings["random numbers"] = (
        may_draw or not drew,
        f"its forward draws global random numbers, which changes the host's in straight-through TRAINING; {advice}",
    )
    trial.seed = seed
    return trial


def _mixed(seed: nn.Module, features: Tensor, spec: BlueprintSpec) -> str:
    """Return which features a seed mixes that must be kept apart; nothing if none, or if its values do not tell.

    The checks at registration ask the same, and more; this is for a blueprint that was registered by hand.

    Args:
        seed: A new seed; a copy with random weights runs, since a last layer of zeros would hide what is before it.
        features: What it takes, two samples.
        spec: Its blueprint.
    """
    if features.is_meta:
        return ""
    axis = None if spec.mixes else spec.topology.sequence_axis
    try:
        with contained(), torch.no_grad():
            moved = copy.deepcopy(seed).eval()
            for parameter in moved.parameters():
                if parameter.is_floating_point():
                    parameter.add_(0.3 * torch.randn(parameter.shape).to(parameter))
            plain = moved(features.clone())
            if not bool(plain.isfinite().all()) or not torch.equal(plain, moved(features.clone())):
                return ""
            most = max(1e-4, 8 * torch.finfo(plain.dtype).eps) * _rms(plain)
            if _rms((moved(_changed(features, 0)) - plain)[:1]) > most:
                return (
                    "another sample changes a sample's features: compute nothing over the batch in eval mode"
                )
            last = features.shape[axis] - 1 if axis is not None else 0
            if (
                axis is not None
                and last
                and _rms((moved(_changed(features, axis)) - plain).narrow(axis, 0, last)) > most
            ):
                return (
                    "another position changes a position's features, and its blueprint does not say so: "
                    "BlueprintSpec(..., mixes='positions'), and a forward that takes a context (docs/positions.md)"
                )
    except Exception:  # it does not run on other values, which tells nothing
        return ""
    return ""


def _changed(features: Tensor, axis: int) -> Tensor:
    """Return the features with other values at the last entry of an axis."""
    other = features.clone()
    last = other.narrow(axis, features.shape[axis] - 1, 1)
    last.copy_(1.0 - 3.0 * last)
    return other


def _rms(values: Tensor) -> float:
    return float(values.float().square().mean().sqrt())


def _other_topology(registry: BlueprintRegistry, own: Topology, here: Topology) -> str:
    known = [entry.id for entry in registry.list_for_topology(here)]
    more = ", …" if len(known) > 8 else ""
    offered = (
        f"for {here.value} there are {', '.join(known[:8])}{more}" if known else f"none is for {here.value}"
    )
    return f"blueprint: {own.value}, slot: {here.value}; {offered}"


def size_unbuilt(
    registry: BlueprintRegistry, blueprint_id: str, point: InjectionPoint, options: Mapping[str, Any]
) -> int:
    """Return how many values a seed's parameters and buffers have, without room for them.

    0 if its factory cannot work without: that a blueprint is unknown, or refuses its options, is for `try_seed` to say.
    """
    try:
        with torch.device("meta"), private_rng(0):
            seed = registry.create(blueprint_id, point.dim, causal=point.causal, options=options)
            return sum(t.numel() for t in (*seed.parameters(), *seed.buffers()))
    except Exception:
        return 0
