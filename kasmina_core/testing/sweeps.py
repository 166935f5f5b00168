"""Trials of many foreign hosts, for the sweeps of kits: a glob that holds slots, and the whole life of one seed."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol, final

import torch
from torch import Tensor, nn

from kasmina_core.growth.config import GrowthConfig
from kasmina_core.growth.model import MorphogeneticModel
from kasmina_core.lifecycle import SeedStage
from kasmina_core.packs.discovery import default_registry
from kasmina_core.testing.comparing import same_bits, tensors_in
from kasmina_core.testing.host_with_slots import open_gates
from kasmina_core.topology import Topology

BLUEPRINTS: Final = {Topology.CNN: "cnn:conv_light", Topology.TRANSFORMER: "transformer:mlp"}
"""Blueprints that are taken first; of other topologies the first that is installed."""

Call = Callable[[nn.Module], Any]
"""Runs a host, or a model around it, on the example."""


class SweptRow(Protocol):
    """What `shares` counts of a host that ran."""

    points: int
    glob: str
    life: str


@final
@dataclass
class Life:
    """How far a seed came.

    Attributes:
        ended: ``"whole"``, or where it ended.
        blueprint: Of the seed; empty if none was chosen.
        reason: Why it ended; empty if it is whole.
    """

    ended: str = ""
    blueprint: str = ""
    reason: str = ""


def live(
    host: nn.Module,
    grow: Callable[..., MorphogeneticModel],
    call: Call,
    heard: Callable[[nn.Module, list[str]], Collection[str]],
    *,
    last: bool = False,
) -> Life:
    """Let one seed live its life: trained while the host is as without it, fossilised, saved and loaded.

    Args:
        host: In evaluation; it is changed.
        grow: Makes a model of a host, with ``config=``.
        call: Runs it.
        heard: Runs a bare host forward and backward, and returns those of some paths on which its loss depends.
        last: Whether to take the last point that fits, not the first.
    """
    life, bare = Life(), copy.deepcopy(host)
    stage = "attach"
    try:
        model = grow(host, config=_config())
        model.evaluate_with(lambda: _loss(call(host)).detach().expand(2))
        paths = heard(bare, [slot.point.path for slot in model.slots.values()])
        fitting = [
            slot
            for slot in model.slots.values()
            if slot.point.path in paths and _blueprint(slot.point.topology)
        ]
        if not fitting:
            raise AssertionError("no installed blueprint fits a point on which the outputs depend")
        place = fitting[-1 if last else 0]
        life.blueprint = _blueprint(place.point.topology)
        stage = "training"
        model.germinate(place.name, life.blueprint)
        _until(model, place.name, SeedStage.TRAINING)
        _compare(bare, model, call)
        stage = "fossilising"
        with torch.no_grad():
            for parameter in model.seed_parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        _until(model, place.name, SeedStage.FOSSILIZED)
        stage = "saving and loading"
        file = io.BytesIO()
        torch.save(model.state_dict(), file)
        file.seek(0)
        other = grow(bare, config=_config())
        other.load_state_dict(torch.load(file, weights_only=True))
        if not _same(_outputs(model.eval(), call), _outputs(other.eval(), call)):
            raise AssertionError("the loaded model computes something else")
    except Exception as error:
        life.ended, life.reason = f"ends at {stage}", said(error)
    else:
        life.ended = "whole"
    return life


def run(module: nn.Module, call: Call) -> list[Tensor]:
    """Run a module forward and backward from fixed random numbers, and return its outputs."""
    torch.manual_seed(0)
    module.zero_grad()
    output = call(module)
    _loss(output).backward()  # type: ignore[no-untyped-call]  # untyped in torch
    return [tensor.detach() for _, tensor in tensors_in(output)]


def globs_of(model: nn.Module) -> tuple[list[str], list[str]]:
    """Return globs for the members of each container, and for the parts of these."""
    whole, inner = [], []
    for path, module in model.named_modules():
        if path and isinstance(module, (nn.ModuleList, nn.Sequential)) and len(module):
            whole.append(f"{path}.*")
            inner += [f"{path}.*.{name}" for name, _ in module[0].named_children()]
    return whole, inner


def first_that_attaches(patterns: Iterable[str], attach: Callable[[str], MorphogeneticModel]) -> str:
    """Return the first glob that holds slots; empty if none does."""
    for pattern in patterns:
        try:
            attach(pattern).detach_slots()
        except Exception:
            continue
        return pattern
    return ""


def shares(ran: Sequence[SweptRow]) -> str:
    """Return how many hosts of those that ran offer points, hold slots by a glob, and saw a whole life."""
    counts = {
        "offer points by themselves": sum(row.points > 0 for row in ran),
        "by a glob": sum(bool(row.glob) for row in ran),
        "whole lives": sum(row.life == "whole" for row in ran),
    }
    return ", ".join(f"{what} {n} ({n / len(ran):.1%})" for what, n in counts.items())


def said(error: Exception) -> str:
    """Return an error in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines)}"[:600]


def _blueprint(topology: Topology) -> str:
    """Return the id of an installed blueprint for a topology, empty if there is none."""
    known = [spec.id for spec in default_registry().blueprints.list_for_topology(topology)]
    chosen = BLUEPRINTS.get(topology)
    return chosen if chosen in known else next(iter(known), "")


def _config() -> GrowthConfig:
    return GrowthConfig(ramp_steps=2, gates=open_gates(min_training_epochs=1, min_probation_epochs=1))


def _until(model: MorphogeneticModel, slot: str, stage: SeedStage) -> None:
    for _ in range(40):
        if model.slots[slot].stage is stage:
            return
        model.step_epoch(1.0)
        if stage is SeedStage.FOSSILIZED and model.slots[slot].stage is SeedStage.PROBATIONARY:
            model.advance_stage(slot)
    raise AssertionError(f"{stage.name} was not reached: {model.slots[slot].last_gate}")


def _compare(bare: nn.Module, model: MorphogeneticModel, call: Call) -> None:
    """Compare a forward and backward pass with the bare host's, which is in evaluation and, if it can be, in training."""
    for training in (False, True):
        bare.train(training), model.train(training)
        for slot in model.slots.values():
            slot.train()
        try:
            expected = run(bare, call)
        except Exception:  # some train on labels only
            continue
        grown = run(model, call)
        if not _same(expected, grown) and not _same(expected, run(bare, call)):
            continue  # a host that seeds itself by the clock is not even as it is itself
        _compare_runs(bare, model, expected, grown)
        if not training and not any(
            p.grad is not None and bool(p.grad.any()) for p in model.seed_parameters()
        ):
            raise AssertionError("the seed has no gradient")


def _compare_runs(
    bare: nn.Module, model: MorphogeneticModel, expected: list[Tensor], found: list[Tensor]
) -> None:
    if not _same(expected, found):
        raise AssertionError("outputs are not those of the bare host")
    grown = dict(model.host.named_parameters())
    for name, parameter in bare.named_parameters():
        ours = grown[name].grad
        if (parameter.grad is None) != (ours is None) or (
            ours is not None and parameter.grad is not None and not same_bits(parameter.grad, ours)
        ):
            raise AssertionError(f"the gradient of {name} is not that of the bare host")


def _outputs(module: nn.Module, call: Call) -> list[Tensor]:
    torch.manual_seed(0)
    with torch.no_grad():
        return [tensor for _, tensor in tensors_in(call(module))]


def _loss(output: Any) -> Tensor:
    """Return a number in which every finite value of every differentiable output has a part."""
    terms = [
        (torch.where(tensor.isfinite(), tensor, 0).float() * _ramp(tensor)).mean()
        for _, tensor in tensors_in(output)
        if tensor.is_floating_point() and (tensor.requires_grad or not torch.is_grad_enabled())
    ]
    if not terms:
        raise AssertionError("none of its outputs has a gradient")
    return torch.stack(terms).sum()


def _ramp(tensor: Tensor) -> Tensor:
    return torch.linspace(-1.0, 1.0, tensor.numel()).view_as(tensor)


def _same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(same_bits(x, y) for x, y in zip(a, b, strict=True))
