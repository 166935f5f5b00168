"""Checkpoints written by two processes are read by one and the other way round, sharded or not, or change nothing."""

from __future__ import annotations

import copy
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from numeric_helpers import causal_host, causal_model, grow_to, registry, same_tensors, tokens
from ranks import Outcomes, checks_in, everywhere, folder_of_checks, on_each_rank, run_checks, shard
from torch import Tensor
from torch.distributed.tensor import DTensor

from kasmina_core import (
    CheckpointError,
    DistributedError,
    DistributedGrowth,
    InexactResume,
    KasminaError,
    PlateauPolicy,
    SeedStage,
    Topology,
    distribute,
    load_distributed,
    save_distributed,
    tie_optimizer,
)
from kasmina_core.checkpoints.files import sealed

ONE_GROUP = True

Run = tuple[DistributedGrowth, torch.optim.Optimizer]


def start(*, sharded: bool = False, **config: Any) -> Run:
    model = causal_model(causal_host(seed=1), **config)
    if sharded:
        for block in model.host.blocks:
            shard(block)
        shard(model.host)
    net = distribute(model, timeout=10.0)
    return net, tie_optimizer(model, torch.optim.AdamW(model.parameters(), lr=1e-2))


def train(run: Run, rank: int, first: int, steps: int = 2) -> list[float]:
    net, optimizer = run
    losses = []
    for step in range(first, first + steps):
        ids = tokens(4, seed=50 + 2 * step + rank)

        def loss_of(module: Callable[[Tensor], Tensor], ids: Tensor = ids) -> Tensor:
            return F.cross_entropy(module(ids[:, :-1]).mT, ids[:, 1:])

        optimizer.zero_grad()
        loss = loss_of(net)
        loss.backward()
        net.model.incubate(lambda loss_of=loss_of: loss_of(net.model))
        net.model.step()
        optimizer.step()
        losses.append(loss.item())
    return losses


def grown(rank: int, **settings: Any) -> Run:
    run = start(**settings)
    model = run[0].model
    train(run, rank, 0)
    grow_to(model, "blocks.0", SeedStage.BLENDING, "mlp", alpha=0.25)
    train(run, rank, 2)
    grow_to(model, "blocks.1", SeedStage.TRAINING, "mlp")
    train(run, rank, 4)
    model.step_epoch(1.5)
    return run


def whole(tensor: Any) -> Any:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def picture(run: Run) -> list[Any]:
    """Everything a run goes on from, whole, as one process sees it."""
    net, optimizer = run
    model = net.model
    names = {id(p): n for n, p in model.named_parameters()}
    state = {names[id(p)]: {k: whole(v) for k, v in s.items()} for p, s in optimizer.state.items()}
    records = {name: slot.get_extra_state() for name, slot in model.slots.items()}
    parameters = {n: whole(p.detach()) for n, p in model.named_parameters()}
    return copy.deepcopy([parameters, sorted(state.items()), records, model.epoch, model.observe()])


@on_each_rank
def loaded_run_goes_on_as_the_one_that_was_saved(rank: int) -> None:
    for sharded in (False, True):
        folder = folder_of_checks() / f"two-{sharded}"
        run = grown(rank, sharded=sharded)
        save_distributed(folder, run[0], optimizer=run[1], extra={"sharded": sharded})
        before = picture(run)
        if rank == 0:
            torch.save(before[:2], f"{folder}.pt")
        fresh = start(sharded=sharded)
        assert load_distributed(folder, fresh[0], optimizer=fresh[1]) == {"sharded": sharded}
        assert same_tensors(picture(fresh), before)
        assert all(isinstance(p, DTensor) for p in fresh[0].model.parameters()) is sharded
        assert train(fresh, rank, 6, 3) == train(run, rank, 6, 3)
        run[0].model.step_epoch(1.0)
        fresh[0].model.step_epoch(1.0)
        assert same_tensors(picture(fresh), picture(run))


@on_each_rank
def all_that_a_run_needs_is_in_the_checkpoint_sharded_or_not(rank: int) -> None:
    for sharded in (False, True):
        folder = folder_of_checks() / f"whole-{sharded}"
        runs = [start(sharded=sharded, keep_snapshot=True, embargo_epochs=0) for _ in range(2)]
        model, optimizer = runs[0][0].model, runs[0][1]
        rests = [
            {
                "schedulers": torch.optim.lr_scheduler.StepLR(run[1], 2, gamma=0.5),
                "policy": PlateauPolicy({Topology.TRANSFORMER: ["mlp"]}),
                "scaler": torch.amp.GradScaler("cpu", init_scale=2.0 ** (3 + i)),
                "generators": {"loader": torch.Generator().manual_seed(10 * i + rank)},
            }
            for i, run in enumerate(runs)
        ]
        train(runs[0], rank, 0)
        grow_to(model, "blocks.1", SeedStage.TRAINING, "mlp")
        train(runs[0], rank, 2)
        model.cull("blocks.1", keep=True)
        grow_to(model, "blocks.0", SeedStage.BLENDING, "mlp", alpha=0.25)
        train(runs[0], rank, 4)
        rests[0]["schedulers"].step()
        rests[0]["policy"].decide(model.observe())
        rests[0]["scaler"].scale(torch.ones(()))
        torch.manual_seed(100 + rank)
        save_distributed(folder, runs[0][0], optimizer=optimizer, **rests[0])
        drawn = [torch.rand(()), torch.rand((), generator=rests[0]["generators"]["loader"])]
        load_distributed(folder, runs[1][0], optimizer=runs[1][1], **rests[1])
        assert [torch.rand(()), torch.rand((), generator=rests[1]["generators"]["loader"])] == drawn
        for name in ("schedulers", "policy", "scaler"):
            assert rests[1][name].state_dict() == rests[0][name].state_dict(), name
        for run in runs:
            train(run, rank, 6)
            assert run[0].model.can_revert("blocks.0")
            run[0].model.cull("blocks.0", revert=True)
            while run[0].model.slots["blocks.1"].state is not None:
                run[0].model.step_epoch(1.0)
            run[0].model.regerminate("blocks.1")
            train(run, rank, 8)
        assert same_tensors(picture(runs[1]), picture(runs[0]))


@on_each_rank
def checkpoint_of_one_process_is_read_by_two(rank: int) -> None:
    expected = torch.load(folder_of_checks() / "one.pt", weights_only=True)
    for sharded in (False, True):
        fresh = start(sharded=sharded)
        with pytest.warns(InexactResume, match=r"(?s)saved by: 1 processes.*here:     2"):
            load_distributed(folder_of_checks() / "one", fresh[0], optimizer=fresh[1])
        assert same_tensors(picture(fresh)[:2], expected)
        train(fresh, rank, 6)
        assert fresh[0].model.slots["blocks.0"].stage is SeedStage.BLENDING


@on_each_rank
def checkpoint_of_one_engine_is_read_by_the_other(rank: int) -> None:
    for sharded in (False, True):
        expected = torch.load(folder_of_checks() / f"two-{not sharded}.pt", weights_only=True)
        fresh = start(sharded=sharded)
        load_distributed(folder_of_checks() / f"two-{not sharded}", fresh[0], optimizer=fresh[1])
        assert same_tensors(picture(fresh)[:2], expected)


@on_each_rank
def grown_model_is_emptied_by_a_checkpoint_without_seeds(rank: int) -> None:
    for sharded in (False, True):
        folder = folder_of_checks() / f"empty-{sharded}"
        run = start(sharded=sharded)
        train(run, rank, 0)
        save_distributed(folder, run[0], optimizer=run[1])
        other = grown(rank, sharded=sharded)
        load_distributed(folder, other[0], optimizer=other[1])
        assert other[0].model.slots["blocks.0"].stage is SeedStage.DORMANT
        assert len(other[1].param_groups) == 1
        assert same_tensors(picture(other)[:3], picture(run)[:3])
        assert train(other, rank, 2) == train(run, rank, 2)


@on_each_rank
def what_fails_on_one_rank_fails_on_both_and_changes_nothing(rank: int) -> None:
    for sharded in (False, True):
        folder = folder_of_checks() / f"two-{sharded}"
        run = grown(rank, sharded=sharded)
        run[0].model.cull("blocks.0")
        before = picture(run)
        missing = folder_of_checks() / "nowhere" if rank == 1 else folder
        with pytest.raises(KasminaError, match=r"nowhere|rank 1"):
            load_distributed(missing, run[0], optimizer=run[1])
        assert same_tensors(picture(run), before)
        with pytest.raises(KasminaError, match=r"'object' object|cannot be written|rank 0"):
            save_distributed(folder, run[0], optimizer=run[1], extra=object() if rank == 0 else None)
        assert same_tensors(picture(run), before)
        train(run, rank, 9)
        fresh = start(sharded=sharded)
        load_distributed(folder, fresh[0], optimizer=fresh[1])


@on_each_rank
def damaged_tensors_change_nothing(rank: int) -> None:
    folder, broken = folder_of_checks() / "two-True", folder_of_checks() / "truncated"
    if rank == 0:
        shutil.copytree(folder, broken)
        for file in broken.glob("*.distcp"):
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    everywhere(None)
    run = grown(rank, sharded=True)
    before = picture(run)
    with pytest.raises(CheckpointError, match="cut off or replaced"):
        load_distributed(broken, run[0], optimizer=run[1])
    assert same_tensors(picture(run), before)
    train(run, rank, 9)


@on_each_rank
def processes_that_were_not_distributed_are_told_so(rank: int) -> None:
    with pytest.raises(DistributedError, match=r"call distribute\(model\) first"):
        save_distributed(folder_of_checks() / "never", causal_model(causal_host()))


# -- one process -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = Path(tmp_path_factory.mktemp("checkpoints"))
    run = grown(0)
    save_distributed(folder / "one", run[0].model, optimizer=run[1], extra=[1, float("inf"), "text"])
    torch.save(picture(run)[:2], folder / "one.pt")
    return folder


@pytest.fixture(scope="module")
def outcomes(folder: Path) -> Outcomes:
    return run_checks(__file__, folder)


@pytest.mark.parametrize("check", checks_in(globals()))
def test_in_two_processes(outcomes: Outcomes, check: str) -> None:
    outcomes.require(check)


@pytest.mark.parametrize("sharded", [False, True])
def test_checkpoint_of_two_processes_is_read_by_one(outcomes: Outcomes, folder: Path, sharded: bool) -> None:
    outcomes.require("loaded_run_goes_on_as_the_one_that_was_saved")
    fresh = start()
    assert load_distributed(folder / f"two-{sharded}", fresh[0], optimizer=fresh[1], rng=False) == {
        "sharded": sharded
    }
    assert same_tensors(picture(fresh)[:2], torch.load(folder / f"two-{sharded}.pt", weights_only=True))
    train(fresh, 0, 6)
    assert fresh[0].model.slots["blocks.0"].stage is SeedStage.BLENDING


def test_one_process_goes_on_exactly(folder: Path) -> None:
    run, fresh = grown(0), start()
    assert load_distributed(folder / "one", fresh[0], optimizer=fresh[1]) == [1, float("inf"), "text"]
    assert same_tensors(picture(fresh), picture(run))
    assert train(fresh, 0, 6) == train(run, 0, 6)


class Evil:
    def __reduce__(self) -> Any:
        return os.system, ("echo stolen > stolen",)


def manifest_without(part: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        data = json.loads((folder / "manifest.json").read_text())
        del data[part]
        del data["crc32_of_the_above"]
        (folder / "manifest.json").write_bytes(sealed(json.dumps(data)))

    return damage


def with_metadata(folder: Path, content: bytes) -> None:
    """Replace torch's description, and its size in the manifest, as somebody with bad intentions would."""
    (folder / ".metadata").write_bytes(content)
    data = json.loads((folder / "manifest.json").read_text())
    del data["crc32_of_the_above"]
    data["files"][".metadata"] = len(content)
    (folder / "manifest.json").write_bytes(sealed(json.dumps(data)))


def leads_elsewhere(folder: Path) -> None:
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    for stored in metadata.storage_data.values():
        stored.relative_path = "../one/__0_0.distcp"
    with_metadata(folder, pickle.dumps(metadata))


def of_a_newer_version(folder: Path) -> None:
    text = (folder / "manifest.json").read_text().replace('"version": 3', '"version": 99', 1)
    (folder / "manifest.json").write_bytes(sealed(text.partition(', "crc32_of_the_above"')[0] + "}"))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda f: with_metadata(f, pickle.dumps(Evil())), "asks for posix.system"),
        (lambda f: with_metadata(f, (f / ".metadata").read_bytes()[:200]), "cannot be read"),
        (lambda f: (f / ".metadata").write_bytes((f / ".metadata").read_bytes()[:200]), "cut off"),
        (lambda f: (f / ".metadata").unlink(), r"lacks \.metadata"),
        (lambda f: (f / "__0_0.distcp").unlink(), r"lacks __0_0\.distcp"),
        (leads_elsewhere, "leads elsewhere"),
        (lambda f: (f / "manifest.json").write_text("{}"), "no manifest of a"),
        (lambda f: (f / "manifest.json").unlink(), "is no checkpoint"),
        (of_a_newer_version, "saved:    99"),
        (manifest_without("topology"), "damaged"),
    ],
    ids=lambda value: "" if callable(value) else value,
)
def test_damaged_or_hostile_checkpoint_runs_nothing_and_changes_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: Callable[[Path], Any], reason: str
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folder / "one", tmp_path / "damaged")
    damage(tmp_path / "damaged")
    run = start()
    train(run, 0, 0)
    before = picture(run)
    with pytest.raises(CheckpointError, match=reason):
        load_distributed(tmp_path / "damaged", run[0], optimizer=run[1])
    assert same_tensors(picture(run), before)
    assert not (tmp_path / "stolen").exists()


def test_other_host_or_lack_of_a_blueprint_changes_nothing(folder: Path) -> None:
    wide = causal_model(type(causal_host())(dim=12))
    before = copy.deepcopy(wide.state_dict())
    with pytest.raises(CheckpointError, match="'dim': 8"):
        load_distributed(folder / "one", wide)
    assert same_tensors(dict(wide.state_dict()), dict(before))
    poor = causal_model(causal_host())
    seeds = registry()
    seeds.unregister("tiny:mlp")
    for slot in poor.slots.values():
        slot.maker.registry = seeds
    with pytest.raises(CheckpointError, match="blueprint: tiny:mlp"):
        load_distributed(folder / "one", poor)
    deep = causal_model(type(causal_host())(layers=3))
    with pytest.raises(CheckpointError, match=r"another host.\n  model/blocks.2.*: here, not saved"):
        load_distributed(folder / "one", deep)
    assert deep.slots["blocks.0"].stage is SeedStage.DORMANT


def test_one_before_is_kept_when_a_save_fails(folder: Path, tmp_path: Path) -> None:
    run = grown(0)
    save_distributed(tmp_path / "kept", run[0], optimizer=run[1], extra=1)
    with pytest.raises(CheckpointError):
        save_distributed(tmp_path / "kept", run[0], optimizer=run[1], extra=object())
    assert load_distributed(tmp_path / "kept", run[0], optimizer=run[1]) == 1
    save_distributed(tmp_path / "kept", run[0], optimizer=run[1], extra=2)
    assert load_distributed(tmp_path / "kept.previous", run[0]) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept", "kept.previous"]
