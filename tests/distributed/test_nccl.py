"""Growth over NCCL: in one process where there is one GPU, in two where there are two."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from numeric_helpers import COUNTERFACTUAL, STRAIGHT_THROUGH, cnn_host, cnn_model, images, labels
from ranks import Outcomes, checks_in, everywhere, on_each_rank, run_checks
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from kasmina_core import DistributedGrowth, SeedStage, distribute, tie_optimizer

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def loss_of(module: Callable[[Tensor], Tensor], rank: int, step: int) -> Tensor:
    x, y = images(6, seed=100 + 2 * step + rank).cuda(), labels(6, seed=200 + 2 * step + rank).cuda()
    return F.cross_entropy(module(x), y)


def train(net: DistributedGrowth, optimizer: torch.optim.Optimizer, rank: int, first: int) -> None:
    for step in range(first, first + 2):
        optimizer.zero_grad()
        loss_of(net, rank, step).backward()
        net.model.incubate(lambda step=step: loss_of(net.model, rank, step))
        net.model.step()
        optimizer.step()


def digest(net: DistributedGrowth) -> list[float]:
    whole = [p.full_tensor() if isinstance(p, DTensor) else p for p in net.model.parameters()]
    return [float(p.detach().double().sum()) for p in whole]


def live(net: DistributedGrowth, rank: int) -> None:
    model = net.model
    optimizer = tie_optimizer(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
    model.germinate("norm", "conv")
    model.germinate("norm2", "conv")
    first = 0
    while model.slots["norm"].stage is not SeedStage.FOSSILIZED:
        train(net, optimizer, rank, first)
        assert len(set(map(str, everywhere(digest(net))))) == 1
        model.step_epoch(1.0 + rank)
        if model.slots["norm"].stage is SeedStage.PROBATIONARY:
            model.step_epoch()
            assert model.advance_stage("norm")
        first += 2
        assert first < 40
        if first == 6:
            gone = weakref.ref(model.slots["norm2"].seed_parameters()[0])
            model.cull("norm2")
            gc.collect()
            assert gone() is None
    train(net, optimizer, rank, first)
    assert len(set(map(str, everywhere(digest(net))))) == 1


@on_each_rank
def life_under_ddp(rank: int) -> None:
    for incubation in (STRAIGHT_THROUGH, COUNTERFACTUAL):
        net = distribute(cnn_model(cnn_host().cuda(), incubation=incubation), timeout=60.0)
        assert isinstance(net.module, DistributedDataParallel)
        live(net, rank)


@on_each_rank
def life_under_fsdp(rank: int) -> None:
    for incubation in (STRAIGHT_THROUGH, COUNTERFACTUAL):
        host = cnn_host().cuda()
        fully_shard(host)
        net = distribute(cnn_model(host, incubation=incubation), timeout=60.0)
        live(net, rank)
        assert all(isinstance(p, DTensor) and p.is_cuda for p in net.model.parameters())


@pytest.fixture(scope="module", params=[1, 2], ids=["one process", "two processes"])
def outcomes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    if torch.cuda.device_count() < request.param:
        pytest.skip(f"needs {request.param} CUDA devices")
    folder = Path(tmp_path_factory.mktemp("nccl"))
    return run_checks(__file__, folder, size=request.param, backend="nccl")


@pytest.mark.parametrize("check", checks_in(globals()))
def test_over_nccl(outcomes: Outcomes, check: str) -> None:
    outcomes.require(check)
