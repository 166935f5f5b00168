"""Building a seed and trying it once before anything depends on it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kasmina_core.blueprints.catalogue import BlueprintRegistry
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
    spec = registry.get(blueprint_id).spec
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
