"""Two processes share one model's weights with FSDP2; seeds are sharded when they germinate."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from numeric_helpers import (
    COUNTERFACTUAL,
    STRAIGHT_THROUGH,
    causal_host,
    causal_model,
    grow_to,
    same_tensors,
    tokens,
    walk_to,
)
from ranks import Outcomes, checks_in, on_each_rank, run_checks, shard
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor

from kasmina_core import (
    DistributedGrowth,
    GerminationError,
    MorphogeneticModel,
    SeedStage,
    Wrap,
    distribute,
    tie_optimizer,
)

ONE_GROUP = True
BOTH = (STRAIGHT_THROUGH, COUNTERFACTUAL)


def sharded_model(**config: Any) -> tuple[MorphogeneticModel, DistributedGrowth]:
    model = causal_model(causal_host(), **config)
    for block in model.host.blocks:
        shard(block)
    shard(model.host)
    return model, distribute(model, timeout=10.0)


def loss_of(module: Callable[[Tensor], Tensor], rank: int, step: int = 0) -> Tensor:
    ids = tokens(4, seed=50 + 2 * step + rank)
    return F.cross_entropy(module(ids[:, :-1]).mT, ids[:, 1:])


def train(
    net: DistributedGrowth, optimizer: torch.optim.Optimizer, rank: int, steps: int = 2, first: int = 0
) -> None:
    for step in range(first, first + steps):
        optimizer.zero_grad()
        loss_of(net, rank, step).backward()
        net.model.incubate(lambda step=step: loss_of(net.model, rank, step))
        net.model.step()
        torch.nn.utils.clip_grad_norm_(net.model.host_parameters(), 1.0)
        optimizer.step()


def whole(model: MorphogeneticModel) -> dict[str, Tensor]:
    named = model.named_parameters()
    return {n: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone() for n, p in named}


@on_each_rank
def seed_behind_a_fossil_is_sharded_and_learns_as_under_ddp(rank: int) -> None:
    runs = []
    for sharded in (False, True):
        if sharded:
            model, net = sharded_model(nested_slots=1)
        else:
            model = causal_model(causal_host(), nested_slots=1)
            net = distribute(model)
        optimizer = tie_optimizer(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
        for slot in ("blocks.0", "blocks_0__2"):
            grow_to(model, slot, SeedStage.TRAINING, "mlp")
            train(net, optimizer, rank)
            walk_to(model, slot, SeedStage.FOSSILIZED)
            train(net, optimizer, rank, first=9)
        if sharded:
            assert all(isinstance(p, DTensor) for p in model.parameters())
        runs.append(whole(model))
    assert runs[0].keys() == runs[1].keys()
    for name, tensor in runs[0].items():
        torch.testing.assert_close(runs[1][name], tensor, rtol=1e-3, atol=1e-4)


@on_each_rank
def whole_life_equals_that_under_ddp(rank: int) -> None:
    """FSDP2 and DDP compute the same model: what differs is the order of sums."""
    for incubation in BOTH:
        runs = []
        for sharded in (False, True):
            if sharded:
                model, net = sharded_model(incubation=incubation)
            else:
                model = causal_model(causal_host(), incubation=incubation)
                net = distribute(model)
            assert net.wrap is (Wrap.FSDP if sharded else Wrap.DDP)
            optimizer = tie_optimizer(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
            stages, first = [], 0
            model.germinate("blocks.0", "mlp")
            model.germinate("blocks.1", "mlp")
            for _ in range(12):
                first += 2
                train(net, optimizer, rank, first=first)
                model.step_epoch(1.0)
                stages.append(model.slots["blocks.0"].stage)
                if len(stages) == 3:
                    model.cull("blocks.1")
                if stages[-1] is SeedStage.PROBATIONARY:
                    model.step_epoch()
                    assert model.advance_stage("blocks.0")
            train(net, optimizer, rank, first=900)
            if sharded:
                assert all(isinstance(p, DTensor) for p in model.parameters())
                assert isinstance(model.slots["blocks.0"].seed, FSDPModule)
            norm = model.slots["blocks.0"].state.metrics.gradient_norm
            runs.append((stages, model.measure("blocks.0"), norm, whole(model)))
        for a, b in zip(runs[0][3].values(), runs[1][3].values(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        assert runs[0][0] == runs[1][0]
        assert runs[0][0][-1] is SeedStage.FOSSILIZED
        assert runs[0][1].gain == pytest.approx(runs[1][1].gain, rel=1e-3, abs=1e-6)
        assert runs[0][2] == pytest.approx(runs[1][2], rel=1e-3)


@on_each_rank
def seeds_compute_in_the_precision_of_the_layers_around_them(rank: int) -> None:
    half = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for incubation in BOTH:
        model = causal_model(causal_host(), incubation=incubation)
        for block in model.host.blocks:
            shard(block, mp_policy=half)
        shard(model.host, mp_policy=replace(half, output_dtype=torch.float32))
        net = distribute(model, timeout=10.0)
        optimizer = tie_optimizer(model, torch.optim.SGD(model.parameters(), lr=0.1))
        model.germinate("blocks.0", "mlp")
        for step in range(12):
            train(net, optimizer, rank, first=2 * step)
            model.step_epoch(1.0)
            if model.slots["blocks.0"].stage is SeedStage.PROBATIONARY:
                model.step_epoch()
                assert model.advance_stage("blocks.0")
        assert model.slots["blocks.0"].stage is SeedStage.FOSSILIZED
        assert {p.dtype for p in model.parameters()} == {torch.float32}


@on_each_rank
def layers_of_different_precision_each_give_their_seeds_their_own(rank: int) -> None:
    model = causal_model(causal_host())
    half = MixedPrecisionPolicy(param_dtype=torch.bfloat16, output_dtype=torch.float32)
    shard(model.host.blocks[0], mp_policy=half)
    shard(model.host)
    net = distribute(model, timeout=10.0)
    optimizer = tie_optimizer(model, torch.optim.SGD(model.parameters(), lr=0.1))
    seen = {}
    for slot in ("blocks.0", "blocks.1"):
        grow_to(model, slot, SeedStage.TRAINING, "mlp")
        model.slots[slot].seed.linear.register_forward_hook(
            lambda _m, _a, output, slot=slot: seen.update({slot: output.dtype})
        )
    train(net, optimizer, rank)
    assert seen == {"blocks.0": torch.bfloat16, "blocks.1": torch.float32}


def run_of_the_host(grow: bool, rank: int, **config: Any) -> list[Any]:
    torch.manual_seed(5)
    model, net = sharded_model(**config)
    optimizer = tie_optimizer(model, torch.optim.Adam(model.parameters(), lr=1e-2))
    losses = []
    for step in range(8):
        if grow and step == 2:
            model.germinate("blocks.0", "mlp")
            assert model.advance_stage("blocks.0")
        optimizer.zero_grad()
        loss = loss_of(net, rank, step)
        loss.backward()
        if grow:
            model.incubate(lambda step=step: loss_of(model, rank, step))
            model.step()
            if step in (3, 4):
                assert all(p.grad.full_tensor().any() for p in model.seed_parameters())
                assert model.measure("blocks.0") is not None
                model.slots["blocks.0"].check_isolation()
                assert model.slots["blocks.0"].state.metrics.isolation_violations == 0
        optimizer.step()
        losses.append(loss.detach())
        if grow and step == 5:
            model.cull("blocks.0")
    state = [
        [t.full_tensor() if isinstance(t, DTensor) else t for t in v.values()]
        for v in optimizer.state.values()
    ]
    return [losses, whole(model), state, torch.get_rng_state()]


@on_each_rank
def seed_culled_from_training_leaves_no_trace(rank: int) -> None:
    expected = run_of_the_host(False, rank)
    for incubation in BOTH:
        assert same_tensors(run_of_the_host(True, rank, incubation=incubation), expected)


@on_each_rank
def whole_model_may_be_the_root_and_seeds_are_shards_at_any_time(rank: int) -> None:
    model = causal_model(causal_host(), incubation=COUNTERFACTUAL)
    shard(model)
    net = distribute(model)
    optimizer = tie_optimizer(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
    grow_to(model, "blocks.0", SeedStage.TRAINING, "mlp")
    grow_to(model, "blocks.1", SeedStage.BLENDING, "mlp")
    held = [id(p) for p in model.seed_parameters()]
    for moment in range(3):
        train(net, optimizer, rank, first=2 * moment)
        model.measure("blocks.1")
        with torch.no_grad():
            net(tokens(2))
        assert [id(p) for p in model.seed_parameters()] == held
        assert all(
            isinstance(p, DTensor) and p.to_local().numel() < p.numel() for p in model.seed_parameters()
        )
    assert {id(p) for g in optimizer.param_groups if "kasmina_slot" in g for p in g["params"]} == set(held)
    assert all(isinstance(optimizer.state[p]["exp_avg"], DTensor) for p in model.seed_parameters())
    model.cull("blocks.1")
    model.cull("blocks.0")
    assert len(optimizer.param_groups) == 1
    assert len(optimizer.state) == len(model.host_parameters())
    train(net, optimizer, rank, first=50)


@on_each_rank
def paused_seed_keeps_its_weights_and_learns_again_when_it_goes_on(rank: int) -> None:
    for stage in (SeedStage.TRAINING, SeedStage.BLENDING):
        model, net = sharded_model()
        optimizer = tie_optimizer(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
        place = grow_to(model, "blocks.0", stage, "mlp")
        train(net, optimizer, rank)
        for paused in (True, False):
            place.pause() if paused else place.resume()
            before = whole(model)
            train(net, optimizer, rank, first=9)
            moved = {name for name, value in whole(model).items() if not torch.equal(value, before[name])}
            assert "host.head.weight" in moved
            assert ("kasmina_slots.blocks_0.seed.linear.weight" in moved) is not paused


@on_each_rank
def host_is_put_back_when_a_late_seed_is_culled_and_the_seed_can_be_had_again(rank: int) -> None:
    model, net = sharded_model(keep_snapshot=True, embargo_epochs=0)
    optimizer = tie_optimizer(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
    grow_to(model, "blocks.0", SeedStage.TRAINING, "mlp")
    train(net, optimizer, rank)
    before = whole(model)
    with torch.no_grad():
        net(tokens(2))  # leaves the host's root whole
    assert model.advance_stage("blocks.0")
    model.slots["blocks.0"].set_alpha(0.5)
    train(net, optimizer, rank)
    learned = {n: t for n, t in whole(model).items() if "seed" in n}
    model.cull("blocks.0", revert=True, keep=True)
    assert same_tensors(whole(model), {name: t for name, t in before.items() if name.startswith("host.")})
    while model.slots["blocks.0"].state is not None:
        model.step_epoch()
    model.regerminate("blocks.0")
    assert same_tensors({n: t for n, t in whole(model).items() if "seed" in n}, learned)
    train(net, optimizer, rank)


@on_each_rank
def seed_is_sharded_as_the_caller_says(rank: int) -> None:
    model = causal_model(causal_host())
    shard(model.host)
    seen = []

    def shard_in_parts(seed: torch.nn.Module) -> None:
        seen.append(seed)
        shard(seed.linear)
        shard(seed)

    net = distribute(model, shard=shard_in_parts)
    optimizer = tie_optimizer(model, torch.optim.SGD(model.parameters(), lr=0.1))
    place = grow_to(model, "blocks.0", SeedStage.BLENDING, "mlp")
    assert seen == [place.seed]
    train(net, optimizer, rank)
    assert isinstance(place.seed.linear, FSDPModule)
    assert all(isinstance(p, DTensor) for p in model.seed_parameters())


@on_each_rank
def seed_that_cannot_be_sharded_is_refused_and_changes_nothing(rank: int) -> None:
    model, net = sharded_model()
    optimizer = tie_optimizer(model, torch.optim.SGD(model.parameters(), lr=0.1))
    before = whole(model)
    with pytest.raises(GerminationError, match=r"cannot be sharded: .*scalar"):
        model.germinate("blocks.0", "foreign-rows")
    assert model.slots["blocks.0"].stage is SeedStage.DORMANT
    assert same_tensors(whole(model), before)
    model.germinate("blocks.0", "mlp")
    train(net, optimizer, rank)


@on_each_rank
def seeds_that_were_there_before_are_sharded_and_their_optimiser_follows(rank: int) -> None:
    model = causal_model(causal_host())
    shard(model.host)
    with pytest.warns(UserWarning, match="one of 2 processes"):
        grow_to(model, "blocks.0", SeedStage.BLENDING, "mlp")
    optimizer = tie_optimizer(model, torch.optim.SGD(model.parameters(), lr=0.1))
    net = distribute(model)
    assert all(isinstance(p, DTensor) for p in model.seed_parameters())
    before = whole(model)
    train(net, optimizer, rank)
    moved = {name for name, value in whole(model).items() if not torch.equal(value, before[name])}
    assert "kasmina_slots.blocks_0.seed.linear.weight" in moved


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    return run_checks(__file__, Path(tmp_path_factory.mktemp("fsdp")))


@pytest.mark.parametrize("check", checks_in(globals()))
def test_in_two_processes(outcomes: Outcomes, check: str) -> None:
    outcomes.require(check)
