"""Two processes grow one model: the same seeds, decisions and weights on both, on the evidence of both."""

from __future__ import annotations

import copy
import gc
import os
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from numeric_helpers import (
    COUNTERFACTUAL,
    STRAIGHT_THROUGH,
    ConvSeed,
    cnn_host,
    cnn_model,
    generator,
    grow_to,
    images,
    labels,
    registry,
    same_tensors,
    snapshot,
    walk_to,
)
from ranks import Outcomes, checks_in, everywhere, on_each_rank, run_checks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from kasmina_core import (
    DistributedGrowth,
    GerminationError,
    Incubation,
    MisuseWarning,
    MorphogeneticModel,
    RampUnit,
    SeedEvidence,
    SeedStage,
    TransitionError,
    clip_gradients,
    distribute,
    drop_nonfinite_seed_gradients,
    tie_optimizer,
)

BOTH = (STRAIGHT_THROUGH, COUNTERFACTUAL)


def batch(rank: int, step: int = 0) -> tuple[Tensor, Tensor]:
    return images(6, seed=100 + 2 * step + rank), labels(6, seed=200 + 2 * step + rank)


def loss_of(module: Callable[[Tensor], Tensor], rank: int, step: int = 0) -> Tensor:
    x, y = batch(rank, step)
    return F.cross_entropy(module(x), y)


def train(
    net: DistributedGrowth, optimizer: torch.optim.Optimizer, rank: int, steps: int = 2, first: int = 0
) -> None:
    model = net.model
    for step in range(first, first + steps):
        optimizer.zero_grad()
        loss_of(net, rank, step).backward()
        model.incubate(lambda step=step: loss_of(model, rank, step))
        model.step()
        optimizer.step()


def pair(**config: Any) -> tuple[MorphogeneticModel, torch.optim.Optimizer, DistributedGrowth]:
    model = cnn_model(**config)
    optimizer = tie_optimizer(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
    return model, optimizer, distribute(model, timeout=10.0)


def weights(model: MorphogeneticModel) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_alike(model: MorphogeneticModel, optimizer: torch.optim.Optimizer | None = None) -> None:
    topology = [(s.name, s.stage, s.alpha, s.state and s.state.blueprint_id) for s in model.slots.values()]
    state = [*optimizer.state_dict()["state"].values()] if optimizer is not None else []
    one, other = everywhere((topology, weights(model), state))
    assert one[0] == other[0]
    assert same_tensors(one[1:], other[1:])


@on_each_rank
def stages_weights_and_optimisers_are_the_same_after_every_event_of_a_life(rank: int) -> None:
    for incubation in BOTH:
        model, optimizer, net = pair(incubation=incubation)
        train(net, optimizer, rank)
        seen = []
        model.germinate("norm", "norm")
        model.germinate("norm2", "conv")
        for _ in range(20):
            assert_alike(model, optimizer)
            seen.append(model.slots["norm"].stage)
            train(net, optimizer, rank, first=3 * len(seen))
            assert_alike(model, optimizer)
            if model.slots["norm"].stage is SeedStage.FOSSILIZED:
                break
            if model.slots["norm"].stage is SeedStage.PROBATIONARY:
                model.step_epoch()
                assert model.advance_stage("norm")
            else:
                model.step_epoch(1.0)
            if len(seen) == 4:
                model.cull("norm2")
                assert_alike(model, optimizer)
        assert seen[-1] is SeedStage.FOSSILIZED
        assert set(seen) == {*SeedStage} & {s for s in SeedStage if 2 <= s <= 7}
        train(net, optimizer, rank, first=900)
        assert_alike(model, optimizer)
        assert (
            len(set(map(str, everywhere(snapshot(model)["kasmina_slots.norm.seed.norm.running_mean"])))) == 1
        )


@on_each_rank
def growth_goes_on_behind_a_fossil_alike(rank: int) -> None:
    model, optimizer, net = pair(nested_slots=1)
    grow_to(model, "norm", SeedStage.FOSSILIZED)
    assert [*model.slots] == ["norm", "norm__2", "norm2", "act2"]
    train(net, optimizer, rank)
    for stage in (SeedStage.TRAINING, SeedStage.BLENDING, SeedStage.FOSSILIZED):
        if model.slots["norm__2"].state is None:
            grow_to(model, "norm__2", stage, "norm")
        else:
            walk_to(model, "norm__2", stage)
        train(net, optimizer, rank, first=10 * stage)
        assert_alike(model, optimizer)
    with pytest.raises(TransitionError, match="behind 'norm2', which is DORMANT"):
        model.open_slot("norm2")
    assert model.open_slot("norm").name == "norm__3"
    assert_alike(model, optimizer)


@on_each_rank
def gradients_of_host_and_seeds_are_the_mean_of_both_ranks(rank: int) -> None:
    for incubation in BOTH:
        for stage in (SeedStage.TRAINING, SeedStage.BLENDING, SeedStage.FOSSILIZED):
            alone = []
            for other in range(2):
                model = cnn_model(incubation=incubation)
                grow_without_warning(model, stage)
                loss_of(model, other).backward()
                model.incubate(lambda other=other, model=model: loss_of(model, other))
                alone.append([p.grad for p in model.parameters()])
            model, _, net = pair(incubation=incubation)
            grow_to(model, "norm", stage)
            loss_of(net, rank).backward()
            model.incubate(lambda model=model: loss_of(model, rank))
            model.step()
            for found, a, b in zip([p.grad for p in model.parameters()], *alone, strict=True):
                assert a is not None
                torch.testing.assert_close(found, (a + b) / 2, rtol=1e-6, atol=1e-9)


@on_each_rank
def seeds_share_a_pass_where_both_ranks_found_that_they_may(rank: int) -> None:
    model, optimizer, net = pair(incubation=COUNTERFACTUAL, joint_incubation=True)
    for slot in ("norm", "norm2"):
        grow_to(model, slot, SeedStage.TRAINING)
    x, y = batch(rank)
    for count, answer in ((6 if rank else 1, None), (6, False)):  # one sample cannot be shared by two seeds
        optimizer.zero_grad()
        loss_of(net, rank).backward()
        model.incubate(lambda count=count: F.cross_entropy(model(x[:count]), y[:count]))
        model.step()
        optimizer.step()
        assert_alike(model, optimizer)
        found = [model.slots[slot].notes.is_coupled for slot in ("norm", "norm2")]
        assert everywhere(found) == [[answer] * 2] * 2


def grow_without_warning(model: MorphogeneticModel, stage: SeedStage) -> None:
    with pytest.warns(UserWarning, match=r"one of 2 processes.*distribute\(model\)"):
        grow_to(model, "norm", stage)


@on_each_rank
def seed_culled_from_training_leaves_no_trace(rank: int) -> None:
    def run(grow: bool, incubation: Incubation = STRAIGHT_THROUGH) -> list[Any]:
        torch.manual_seed(5)
        host = cnn_host(dropout=0.3)
        net: Any
        if grow:
            model = cnn_model(host, incubation=incubation)
            net, optimizer = distribute(model), torch.optim.Adam(host.parameters(), lr=1e-2)
            tie_optimizer(model, optimizer)
        else:
            net, optimizer = DistributedDataParallel(host), torch.optim.Adam(host.parameters(), lr=1e-2)
        losses = []
        for step in range(8):
            if grow and step == 2:
                model.germinate("norm", "conv")
                model.germinate("norm2", "norm")
                assert model.advance_stage("norm")
                assert model.advance_stage("norm2")
            optimizer.zero_grad()
            loss = loss_of(net, rank, step)
            loss.backward()
            if grow:
                model.incubate(lambda step=step: loss_of(model, rank, step))
                model.step()
                if step in (3, 5):
                    assert all(p.grad.any() for p in model.seed_parameters())
                    assert model.measure("norm") is not None
                    model.slots["norm"].check_isolation()
            optimizer.step()
            losses.append(loss.detach())
            if grow and step == 5:
                model.cull("norm")
                model.cull("norm2")
        return [
            losses,
            snapshot(host),
            [optimizer.state[p] for p in host.parameters()],
            torch.get_rng_state(),
        ]

    expected = run(False)
    for incubation in BOTH:
        assert same_tensors(run(True, incubation), expected)


@on_each_rank
def evidence_is_that_of_the_samples_of_both_ranks(rank: int) -> None:
    x, y = images(9, seed=31), labels(9, seed=32)
    mine = slice(0, 6) if rank == 0 else slice(6, 9)
    model, _, _ = pair()
    grow_to(model, "norm", SeedStage.TRAINING)

    def losses(part: slice) -> Tensor:
        return F.cross_entropy(model(x[part]), y[part], reduction="none")

    found = model.measure("norm", lambda: losses(mine))
    alone = copy.deepcopy(model)
    model = alone
    expected = alone.measure("norm", lambda: torch.cat([losses(slice(0, 6)), losses(slice(6, 9))]))
    assert found.samples == 9
    assert found == expected == everywhere(found)[1 - rank]


@on_each_rank
def the_same_samples_count_once(rank: int) -> None:
    x, y = images(9, seed=31), labels(9, seed=32)
    model, _, _ = pair()
    grow_to(model, "norm", SeedStage.TRAINING)

    def losses(part: slice) -> Tensor:
        return F.cross_entropy(model(x[part]), y[part], reduction="none")

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = model.measure("norm", lambda: losses(slice(0, 9)))
        shares = model.attribute(["norm"], lambda: losses(slice(0, 9)))
        apart = model.measure("norm", lambda: losses(slice(0, 5) if rank == 0 else slice(5, 9)))
    (same,) = [str(w.message) for w in said if w.category is MisuseWarning]
    assert "Ranks 0 and 1 return the same held-out losses" in same
    assert found.samples == shares.joint.samples == apart.samples == 9
    assert found.gain == pytest.approx(apart.gain, abs=1e-7)
    assert found.standard_error == pytest.approx(apart.standard_error, rel=1e-4)


@on_each_rank
def metric_is_the_mean_of_the_ranks_that_have_one(rank: int) -> None:
    model, _, _ = pair()
    grow_to(model, "norm", SeedStage.TRAINING)
    model.step_epoch([1.0, 4.0][rank])
    assert model.observe().metric == 2.5
    model.step_epoch([None, 4.0][rank])
    assert model.observe().metric == 4.0
    model.step_epoch(0.1)
    assert model.observe().metric == 0.1
    model.step_epoch()
    assert model.observe().metric is None
    assert model.slots["norm"].state.metrics.current_metric == 0.1


@on_each_rank
def policy_of_rank_zero_decides(rank: int) -> None:
    from kasmina_core import Advance, Cull, Germinate

    class Torn:
        def decide(self, observation: Any) -> list[Any]:
            if observation.slots[0].stage is SeedStage.DORMANT:
                return [Germinate("norm", "conv", {"std": 0.1 + rank})]
            return [[Advance("norm")], [Cull("norm", "no")]][rank]

    model, _, _ = pair()
    assert model.follow(Torn()) == [Germinate("norm", "conv", {"std": 0.1})]
    assert model.follow(Torn()) == [Advance("norm")]
    assert everywhere(model.slots["norm"].stage) == [SeedStage.TRAINING] * 2
    assert_alike(model)


@on_each_rank
def refused_command_is_refused_everywhere_and_the_others_go_on(rank: int) -> None:
    from kasmina_core import Cull, Germinate, MisuseWarning

    class Hasty:
        def decide(self, observation: Any) -> list[Any]:
            return [Cull("norm", "dormant"), Germinate("norm", "nobody's"), Germinate("norm", "conv")]

    model, _, _ = pair()
    with pytest.warns(MisuseWarning, match="was refused"):
        assert model.follow(Hasty()) == [Germinate("norm", "conv")]
    assert everywhere([outcome.done for outcome in model.outcomes]) == [[False, False, True]] * 2
    assert_alike(model)


@on_each_rank
def seed_that_draws_on_the_process_gets_the_weights_of_rank_zero(rank: int) -> None:
    class Own(ConvSeed):
        def __init__(self, dim: int) -> None:
            super().__init__(dim)
            nn.init.constant_(self.conv.bias, 0.001 * os.getpid())
            self.register_buffer("note", torch.tensor(os.getpid()))

    model, _, _ = pair(seeds=registry(own=Own))
    model.germinate("norm", "own")
    assert_alike(model)
    first, second = everywhere((os.getpid(), int(model.slots["norm"].seed.note)))
    assert first[0] == first[1] == second[1] != second[0]


@on_each_rank
def germination_refused_on_one_rank_is_refused_on_both_and_changes_nothing(rank: int) -> None:
    class Moody(ConvSeed):
        def __init__(self, dim: int) -> None:
            if rank == 1:
                raise OSError("the disk of rank 1 is full")
            super().__init__(dim)

    class Wide(ConvSeed):
        def __init__(self, dim: int) -> None:
            super().__init__(dim)
            self.more = nn.Parameter(torch.zeros(1 + rank))

    seeds = registry(moody=Moody, wide=Wide, **({"rare": ConvSeed} if rank == 0 else {}))
    model, optimizer, net = pair(seeds=seeds)
    before = model.state_dict(), optimizer.state_dict(), torch.get_rng_state()

    class Listener:
        refuses = False

        def seed_added(self, slot: str, parameters: Any) -> None:
            if rank == 0 and self.refuses:
                raise RuntimeError("rank 0 has no memory left")

        def seed_removed(self, slot: str, parameters: Any) -> None:
            pass

    listener = Listener()
    model.listen(listener)
    for blueprint, reason in (
        ("moody", "the disk of rank 1 is full"),
        ("rare", "No blueprint 'rare' is registered|rank 1: UnknownNameError"),
        ("wide", r"do not build the same seed.*\n  rank 0:.*more \(1,\).*\n  rank 1:.*more \(2,\)"),
        ("conv", "rank 0 has no memory left"),
    ):
        listener.refuses = blueprint == "conv"
        with pytest.raises((GerminationError, KeyError, RuntimeError), match=reason) as caught:
            model.germinate("norm", blueprint)
        if rank == (0 if blueprint == "rare" else 1) and blueprint not in ("moody", "wide"):
            assert isinstance(caught.value, GerminationError)
        assert model.slots["norm"].stage is SeedStage.DORMANT
        assert same_tensors((model.state_dict(), optimizer.state_dict(), torch.get_rng_state()), before)
        assert len(optimizer.param_groups) == 1
    listener.refuses = False
    model.germinate("norm", "conv")
    train(net, optimizer, rank)
    assert_alike(model, optimizer)


@on_each_rank
def evaluator_that_raises_on_one_rank_fails_the_gate_on_both(rank: int) -> None:
    model, optimizer, net = pair()
    grow_to(model, "norm", SeedStage.TRAINING)
    good = model.growth.evaluator

    def evaluate() -> Tensor:
        if rank == 1:
            raise OSError("the data of rank 1 is gone")
        return good()

    model.evaluate_with(evaluate)
    with pytest.warns(MisuseWarning, match="the data of rank 1 is gone"):
        result = model.step_epoch()["norm"]
    assert not result
    assert "the data of rank 1 is gone" in result.reason
    train(net, optimizer, rank)
    model.evaluate_with(good)
    assert model.step_epoch()["norm"]
    assert_alike(model)


@on_each_rank
def violation_on_one_rank_counts_once_on_both(rank: int) -> None:
    model, _, _ = pair()
    grow_to(model, "norm", SeedStage.TRAINING)
    if rank == 1:
        seed = model.slots["norm"].seed
        seed.register_forward_hook(
            lambda module, args, out: (
                out + 0 * model.host.norm.weight.sum() + model.host.norm.bias.view(-1, 1, 1)
            )
        )
    reading = model.slots["norm"].check_isolation()
    assert reading.is_violation
    assert everywhere(model.slots["norm"].state.metrics.isolation_violations) == [1, 1]


@on_each_rank
def wrapper_is_made_anew_only_when_a_seed_begins_or_ceases_to_contribute(rank: int) -> None:
    model, optimizer, net = pair(ramp_unit=RampUnit.STEP, ramp_steps=8, embargo_epochs=0)
    first = net.module
    model.germinate("norm", "conv")
    model.advance_stage("norm")
    train(net, optimizer, rank)
    model.cull("norm")
    for _ in range(3):
        model.step_epoch()
    assert net.module is first
    place = grow_to(model, "norm", SeedStage.BLENDING, alpha=0.0)
    assert net.module is first
    train(net, optimizer, rank, steps=3)
    assert place.alpha > 0.0
    second = net.module
    assert second is not first
    train(net, optimizer, rank)
    assert net.module is second
    place.pause()
    train(net, optimizer, rank)
    third = net.module
    assert third is not second
    place.resume()
    train(net, optimizer, rank)
    assert net.module is not third
    gone = weakref.ref(model.slots["norm"].seed_parameters()[0])
    del first, second, third, place
    model.cull("norm")
    gc.collect()
    assert gone() is None
    train(net, optimizer, rank)
    assert_alike(model, optimizer)


@on_each_rank
def host_is_put_back_alike_when_a_late_seed_is_culled(rank: int) -> None:
    model, optimizer, net = pair(keep_snapshot=True)
    grow_to(model, "norm", SeedStage.TRAINING)
    train(net, optimizer, rank)
    before = weights(model)
    assert model.advance_stage("norm")
    model.slots["norm"].set_alpha(0.5)
    train(net, optimizer, rank)
    assert not torch.equal(weights(model)["host.stem.weight"], before["host.stem.weight"])
    model.cull("norm", revert=True)
    assert_alike(model, optimizer)
    assert same_tensors(weights(model), {name: t for name, t in before.items() if name.startswith("host.")})
    train(net, optimizer, rank)
    assert_alike(model, optimizer)


@on_each_rank
def clipping_and_dropping_see_the_mean_gradient_of_seeds(rank: int) -> None:
    found = []
    for clips in (False, True):
        model, optimizer, net = pair()
        grow_to(model, "norm", SeedStage.TRAINING)
        grow_to(model, "norm2", SeedStage.TRAINING)
        loss_of(net, rank).backward()
        if rank == 1:
            model.slots["norm2"].seed.conv.bias.grad[0] = torch.inf
        if clips:
            net.average_gradients()
            assert drop_nonfinite_seed_gradients(model) == ("norm2",)
            norms = everywhere(clip_gradients(model, 1e9).seed_norms["norm"])
            assert torch.equal(*norms)
        model.step()
        found.append([p.grad for p in model.seed_parameters("norm")])
        assert clips is (model.slots["norm2"].seed.conv.bias.grad is None)
        if clips:
            optimizer.step()
            assert_alike(model, optimizer)
    assert same_tensors(*found)


@on_each_rank
def gradients_accumulate_without_talking_until_the_last_pass(rank: int) -> None:
    sums = []
    for split in (False, True):
        model, _, net = pair()
        model.eval()  # batch statistics would see other batches
        grow_to(model, "norm", SeedStage.BLENDING)
        grow_to(model, "norm2", SeedStage.TRAINING)
        model.host.train()
        for module in model.modules():
            module.training = not isinstance(module, nn.BatchNorm2d)
        for slot in model.slots.values():
            slot.train()
        x, y = batch(rank)
        if split:
            with net.no_sync():
                F.cross_entropy(net(x[:3]), y[:3], reduction="sum").backward()
            F.cross_entropy(net(x[3:]), y[3:], reduction="sum").backward()
        else:
            F.cross_entropy(net(x), y, reduction="sum").backward()
        model.step()
        sums.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*sums, strict=True):
        assert a.any()
        torch.testing.assert_close(a, b)


@on_each_rank
def wrapper_that_somebody_else_made_stays_right_for_all_seeds(rank: int) -> None:
    for incubation in BOTH:
        model = cnn_model(incubation=incubation)
        optimizer = tie_optimizer(model, torch.optim.Adam(model.parameters(), lr=1e-2))
        outer = nn.Sequential(model)
        wrapper = DistributedDataParallel(outer)
        net = distribute(model, wrap="outside")

        def steps(wrapper: nn.Module, model: MorphogeneticModel = model, optimizer: Any = optimizer) -> None:
            for step in range(2):
                optimizer.zero_grad()
                loss_of(wrapper, rank, step).backward()
                model.incubate(lambda step=step: loss_of(model, rank, step))
                model.step()
                optimizer.step()
            assert_alike(model, optimizer)

        for stage in (SeedStage.TRAINING, SeedStage.BLENDING, SeedStage.FOSSILIZED):
            slot = {3: "norm", 4: "norm2", 7: "act2"}[int(stage)]
            grow_to(model, slot, stage)
            steps(wrapper)
        net.leave_out_seeds(outer)
        again = DistributedDataParallel(outer)
        steps(again)
        model.slots["norm2"].pause()
        model.cull("norm")
        steps(again)


@on_each_rank
def frozen_host_trains_its_seeds(rank: int) -> None:
    model = cnn_model()
    for p in model.host.parameters():
        p.requires_grad_(False)
    net = distribute(model)
    grow_to(model, "norm", SeedStage.TRAINING)
    optimizer = tie_optimizer(model, torch.optim.SGD(model.seed_parameters(), lr=0.1))
    before = weights(model)
    train(net, optimizer, rank)
    grow_to(model, "norm2", SeedStage.BLENDING)
    train(net, optimizer, rank)
    assert_alike(model)
    assert not same_tensors(before, weights(model))


@on_each_rank
def model_that_was_grown_before_gets_the_seeds_of_rank_zero(rank: int) -> None:
    model = cnn_model(seed=0)
    with pytest.warns(UserWarning, match="one of 2 processes"):
        grow_to(model, "norm", SeedStage.BLENDING)
    with torch.no_grad():
        for p in model.seed_parameters():
            p.add_(0.5 * rank)
    net = distribute(model)
    net(images())
    assert_alike(model)
    assert isinstance(net.module, DistributedDataParallel)


@on_each_rank
def evaluation_talks_to_nobody(rank: int) -> None:
    model, _, net = pair()
    if rank == 0:
        model.eval()
        with torch.no_grad():
            assert torch.equal(net(images()), model(images()))


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    return run_checks(__file__, Path(tmp_path_factory.mktemp("ddp")))


@pytest.mark.parametrize("check", checks_in(globals()))
def test_in_two_processes(outcomes: Outcomes, check: str) -> None:
    outcomes.require(check)


def test_process_that_is_alone_is_not_changed() -> None:
    model = cnn_model()
    net = distribute(model)
    assert net.module is model
    assert (net.rank, net.size, net.wrap) == (0, 1, None)
    optimizer = tie_optimizer(model, torch.optim.Adam(model.parameters()))
    grow_to(model, "norm", SeedStage.BLENDING)
    with net.no_sync():
        train(net, optimizer, 0)
    assert isinstance(model.measure("norm"), SeedEvidence)
    assert torch.randint(9, (1,), generator=generator()).numel() == 1
