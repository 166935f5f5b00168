"""A checkpoint holds everything a run needs, is there at every instant, and is refused as a whole where it does not fit."""

from __future__ import annotations

import copy
import errno
import inspect
import json
import os
import random
import shutil
import socket
import stat
import subprocess
import sys
import time
import warnings
import zlib
from pathlib import Path

import numpy
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from state_helpers import (
    EVERY_STAGE,
    FIRST,
    SECOND,
    bring_to,
    make_host,
    make_model,
    make_registry,
    open_config,
    picture,
    rewrite,
    same_picture,
    train_once,
)
from torch import nn
from torch.optim import lr_scheduler

from kasmina_core import (
    BanditPolicy,
    CheckpointError,
    InterruptedSave,
    MorphogeneticModel,
    PlateauPolicy,
    SeedStage,
    Topology,
    load_checkpoint,
    save_checkpoint,
    tie_optimizer,
)
from kasmina_core.checkpoints import files as checkpoint_files


def parts(turned=False, registry=None):
    """A model and all that trains it."""
    model, recorder = make_model(registry=registry)
    parameters = model.host_parameters()
    groups = [{"params": parameters[:3], "lr": 0.02}, {"params": parameters[3:]}]
    optimizer = torch.optim.AdamW(groups[::-1] if turned else groups, 1e-2)
    scheduler = lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.9**epoch)
    tie_optimizer(model, optimizer, schedulers=[scheduler], lr_factor=0.5)
    policy = PlateauPolicy({Topology.CNN: ["normed"]}, patience=1)
    return model, optimizer, scheduler, policy, recorder


def go_on(model, optimizer, scheduler, policy, recorder, epochs=4):
    seen, start = [], len(recorder.events)
    for _ in range(epochs):
        seen += [train_once(model, optimizer), train_once(model, optimizer)]
        model.step_epoch(seen[-1])
        model.follow(policy)
        scheduler.step()
    return seen, [event.to_dict() for event in recorder.events[start:]]


def grown(stage=SeedStage.BLENDING):
    whole = parts()
    bring_to(whole[0], stage)
    go_on(*whole, epochs=1)
    return whole


def save(folder, whole, **more):
    model, optimizer, scheduler, policy, _ = whole
    return save_checkpoint(folder, model, optimizer=optimizer, schedulers=scheduler, policy=policy, **more)


def load(folder, whole, **more):
    model, optimizer, scheduler, policy, _ = whole
    return load_checkpoint(folder, model, optimizer=optimizer, schedulers=scheduler, policy=policy, **more)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("stage", EVERY_STAGE)
def test_a_run_that_is_loaded_goes_on_like_one_that_was_not_interrupted(stage, turned, tmp_path):
    whole = grown(stage)
    save(tmp_path / "point", whole)
    torch.manual_seed(99)
    again = parts(turned)
    load(tmp_path / "point", again)
    assert whole[0].epoch == again[0].epoch
    for _ in range(2):
        (losses, events), (losses_again, events_again) = go_on(*whole), go_on(*again)
        assert all(map(torch.equal, losses, losses_again))
        assert events == events_again
    before, after = picture(whole[0]), picture(again[0])
    for key in ("weights", "records", "stages", "modes", "trainable", "epoch"):
        assert same_picture(before[key], after[key]), key
    assert policy_state(whole) == policy_state(again)


def policy_state(whole):
    return whole[3].state_dict()


def test_random_numbers_go_on_as_saved(tmp_path):
    whole = grown()
    generator = torch.Generator().manual_seed(5)
    save(tmp_path / "point", whole, rng=("torch", "python", "numpy"), generators={"loader": generator})
    expected = [torch.rand(3), random.random(), numpy.random.rand(), torch.rand(2, generator=generator)]
    other = torch.Generator()
    load(tmp_path / "point", parts(), generators={"loader": other})
    found = [torch.rand(3), random.random(), numpy.random.rand(), torch.rand(2, generator=other)]
    assert same_picture(expected, found)


def test_random_numbers_are_left_alone_if_asked(tmp_path):
    whole = grown()
    save(tmp_path / "point", whole)
    again = parts()
    before = torch.get_rng_state()
    torch.manual_seed(3)
    state = torch.get_rng_state()
    load(tmp_path / "point", again, rng=False)
    assert torch.equal(torch.get_rng_state(), state)
    torch.set_rng_state(before)


def test_data_position_and_more_come_back(tmp_path):
    whole = grown()
    average = {"weight": torch.arange(3.0), 7: (1, [None, float("inf")])}
    save(tmp_path / "point", whole, data_position={"epoch": 2, "batch": 5}, extra=average)
    found = load(tmp_path / "point", parts())
    assert found.data_position == {"epoch": 2, "batch": 5}
    assert same_picture(found.extra, average)
    assert found.versions["torch"] == torch.__version__


def test_the_weights_load_without_us(tmp_path):
    whole = grown()
    save(tmp_path / "point", whole)
    fresh, _ = make_model()
    fresh.load_state_dict(load_file(tmp_path / "point" / "weights.safetensors"))
    assert same_picture(picture(fresh)["weights"], picture(whole[0])["weights"])
    read = json.loads((tmp_path / "point" / "manifest.json").read_text())
    slot = read["topology"]["slots"][FIRST]
    assert slot["record"]["state"]["blueprint_id"] == "mine:scale"
    assert slot["point"] == {"path": "2", "dim": 4, "topology": "cnn", "causal": False}


class Tied(nn.Sequential):
    """The last layer is the first one's weight again; another sees a part of it."""

    def __init__(self):
        super().__init__(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(1, 4, 3, padding=1))
        self[2].weight = self[0].weight
        self.register_buffer("part", self[0].bias.detach()[1:3])

    def forward(self, x):
        return self[2](self[1](self[0](x)).mean(1, keepdim=True)) + self.part.sum()


def test_tied_weights_are_written_once_and_stay_tied(tmp_path):
    def tied(seed):
        torch.manual_seed(seed)
        return MorphogeneticModel(Tied(), ("1",), example=torch.zeros(1, 1, 5, 5), registry=make_registry())

    model, fresh = tied(1), tied(2)
    save_checkpoint(tmp_path / "point", model)
    assert "2.weight" not in load_file(tmp_path / "point" / "weights.safetensors")
    load_checkpoint(tmp_path / "point", fresh)
    assert fresh.host[2].weight is fresh.host[0].weight
    assert same_picture(dict(model.state_dict()), dict(fresh.state_dict()))


SCHEDULERS = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda e: 0.9**e),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda e: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [1, 1, 3]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, total_iters=3),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, total_iters=3),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o), lr_scheduler.ExponentialLR(o, 0.9)], [2]
    ),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 9),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 9),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, 3),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=12),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 2),
}


def test_every_scheduler_that_torch_ships_is_tried():
    shipped = {
        name
        for name, one in vars(lr_scheduler).items()
        if inspect.isclass(one)
        and issubclass(one, lr_scheduler.LRScheduler)
        and one is not lr_scheduler.LRScheduler
        and not name.startswith("_")
    }
    assert shipped == set(SCHEDULERS)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_goes_on_where_it_was(name, turned, tmp_path):
    def made(turned):
        model, _ = make_model()
        parameters = model.host_parameters()
        groups = [{"params": parameters[:3], "lr": 0.02}, {"params": parameters[3:]}]
        optimizer = torch.optim.SGD(groups[::-1] if turned else groups, 0.01, momentum=0.9)
        scheduler = SCHEDULERS[name](optimizer)
        return model, tie_optimizer(model, optimizer, schedulers=[scheduler]), scheduler

    def step(model, optimizer, scheduler, times):
        rates = []
        for _ in range(times):
            train_once(model, optimizer)
            scheduler.step(1.0) if name == "ReduceLROnPlateau" else scheduler.step()
            named = {id(p): n for n, p in model.named_parameters()}
            rates.append({named[id(p)]: g["lr"] for g in optimizer.param_groups for p in g["params"]})
        return rates

    whole = made(False)
    bring_to(whole[0], SeedStage.TRAINING)
    step(*whole, 3)
    save_checkpoint(tmp_path / "point", whole[0], optimizer=whole[1], schedulers=[whole[2]])
    again = made(turned)
    load_checkpoint(tmp_path / "point", again[0], optimizer=again[1], schedulers=[again[2]])
    assert step(*whole, 4) == step(*again, 4)


def test_a_scheduler_that_holds_what_cannot_be_written_is_named(tmp_path):
    whole = grown()
    whole[2].verdict = object()
    with pytest.raises(
        CheckpointError, match=r"schedulers\[0\]\['state'\]\['verdict'\] cannot be written: it is <object"
    ):
        save(tmp_path / "point", whole)
    assert list(tmp_path.iterdir()) == []


def test_a_scaler_comes_back(tmp_path):
    model, _ = make_model()
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(torch.ones(()))
    save_checkpoint(tmp_path / "point", model, scaler=scaler)
    other = torch.amp.GradScaler("cpu", init_scale=2.0)
    load_checkpoint(tmp_path / "point", model, scaler=other)
    assert other.state_dict() == scaler.state_dict()


def test_wrapped_models_are_saved_and_loaded_as_what_is_in_them(tmp_path):
    class Parallel(nn.Module):  # DistributedDataParallel keeps the model under this name
        def __init__(self, module):
            super().__init__()
            self.module = module

    model = grown()[0]
    save_checkpoint(tmp_path / "point", Parallel(torch.compile(model, backend="eager")))
    fresh, _ = make_model()
    load_checkpoint(tmp_path / "point", torch.compile(fresh, backend="eager"))
    assert same_picture(picture(model)["weights"], picture(fresh)["weights"])
    with pytest.raises(TypeError, match="Linear is not a MorphogeneticModel"):
        save_checkpoint(tmp_path / "other", nn.Linear(1, 1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_checkpoint_loads_in_another_dtype(dtype, tmp_path):
    whole = grown()
    save(tmp_path / "point", whole)
    model, optimizer, scheduler, policy, recorder = parts()
    model.to(dtype)
    load(tmp_path / "point", (model, optimizer, scheduler, policy, recorder))
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert {s["exp_avg"].dtype for s in optimizer.state.values()} == {dtype}


# -- the folder -------------------------------------------------------------------------------------------------------


def test_the_checkpoint_before_is_kept_or_not(tmp_path):
    whole = grown()
    folder = tmp_path / "point"
    for number in range(3):
        save(folder, whole, data_position=number)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["point", "point.previous"]
    assert load(folder, parts()).data_position == 2
    assert load(tmp_path / "point.previous", parts()).data_position == 1
    save(folder, whole, data_position=3, keep_previous=False)
    assert [path.name for path in tmp_path.iterdir()] == ["point"]


def test_a_kill_while_the_one_before_is_removed_stops_no_later_save(tmp_path, monkeypatch):
    whole, folder = grown(), tmp_path / "point"
    save(folder, whole)
    unlink = Path.unlink

    def dies(path, *arguments, **options):
        unlink(path, *arguments, **options)
        raise KeyboardInterrupt  # when one file of it is gone

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", dies)
        with pytest.raises(KeyboardInterrupt):
            save(folder, whole, data_position=1, keep_previous=False)
    assert load(folder, parts()).data_position == 1
    save(folder, whole, data_position=2, keep_previous=False)
    assert load(folder, parts()).data_position == 2


@pytest.mark.parametrize("content", ["a file", "a folder"])
def test_what_is_no_checkpoint_is_not_replaced(content, tmp_path):
    target = tmp_path / "point"
    target.write_text("mine") if content == "a file" else (target / "photos").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="is there and is no checkpoint"):
        save(target, grown())
    assert os.listdir(tmp_path) == ["point"]
    assert target.read_text() == "mine" if content == "a file" else (target / "photos").is_dir()


def test_what_others_put_into_a_checkpoints_folder_survives_any_number_of_saves(tmp_path):
    whole, folder = grown(), tmp_path / "point"
    save(folder, whole)
    (folder / "notes.txt").write_text("mine")
    (folder / "logs" / "deep").mkdir(parents=True)
    with open(folder / "logs" / "deep" / "open.txt", "w") as opened:
        (folder / "shortcut").symlink_to("notes.txt")
        inode = (folder / "notes.txt").stat().st_ino
        for number in range(3):
            save(folder, whole, data_position=number, keep_previous=number != 1)
            opened.write(f"{number}")
    assert (folder / "notes.txt").read_text() == (folder / "shortcut").read_text() == "mine"
    assert (folder / "notes.txt").stat().st_ino == inode
    assert (folder / "logs" / "deep" / "open.txt").read_text() == "012"
    assert load(folder, parts()).data_position == 2
    assert sorted(one.name for one in (tmp_path / "point.previous").iterdir()) == sorted(
        [W, T, "manifest.json"]
    )


def test_what_others_put_into_the_checkpoint_before_is_not_removed_with_it(tmp_path):
    whole, folder = grown(), tmp_path / "point"
    save(folder, whole)
    save(folder, whole, data_position=1)
    (tmp_path / "point.previous" / "notes.txt").write_text("mine")
    with pytest.raises(
        CheckpointError, match=r"notes\.txt is none of a checkpoint's files.*Put it elsewhere"
    ):
        save(folder, whole)
    assert (tmp_path / "point.previous" / "notes.txt").read_text() == "mine"
    assert load(folder, parts()).data_position == 1


@pytest.mark.parametrize("content", ['{"name": "my app"}', "no JSON", '["kasmina checkpoint"]'])
def test_a_folder_with_a_manifest_of_something_else_is_not_replaced(content, tmp_path):
    (tmp_path / "point").mkdir()
    (tmp_path / "point" / "manifest.json").write_text(content)
    for _ in range(2):
        with pytest.raises(CheckpointError, match="is there and is no checkpoint"):
            save(tmp_path / "point", grown())
    assert (tmp_path / "point" / "manifest.json").read_text() == content


def test_a_manifest_that_claims_other_peoples_files_gets_none_of_them_removed(tmp_path):
    whole, folder = grown(), tmp_path / "point"
    save(folder, whole)
    (folder / "photo.jpg").write_text("mine")
    manifest = json.loads((folder / "manifest.json").read_text())
    rewrite(folder / "manifest.json", manifest | {"files": manifest["files"] | {"photo.jpg": 4}})
    for _ in range(2):
        save(folder, whole)
    assert (folder / "photo.jpg").read_text() == "mine"


@pytest.mark.parametrize("place", ["/", "a/../b", "."])
def test_odd_names_of_folders_are_one_clear_error_or_work(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here.txt").write_text("mine")
    model = parts()[0]
    if place == "a/../b":
        save_checkpoint(place, model)
        load_checkpoint(place, model)
        assert sorted(os.listdir(tmp_path)) == ["b", "here.txt"]
        return
    with pytest.raises(CheckpointError, match=r"has no name|is there and is no checkpoint"):
        save_checkpoint(place, model)
    with pytest.raises(CheckpointError, match=r"is no checkpoint: it has no manifest\.json"):
        load_checkpoint(place, model)


def test_a_checkpoint_that_may_not_be_read_is_one_clear_error(saved, target, monkeypatch):
    def denied(self):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))

    monkeypatch.setattr("pathlib.Path.read_bytes", denied)
    says = refused(saved, target, f"The checkpoint {saved} cannot be read: Permission denied")
    assert "\n" not in says


def test_where_signal_0_is_ctrl_c_no_process_is_sent_one(tmp_path, monkeypatch):
    monkeypatch.setattr("kasmina_core.checkpoints.files._POSIX", False)
    monkeypatch.setattr("kasmina_core.checkpoints.files.fcntl", None)
    monkeypatch.setattr(os, "kill", None)
    model = parts()[0]
    left = tmp_path / f".point.writing-{socket.gethostname()}-4194305-0"
    left.mkdir()
    for _ in range(3):
        save_checkpoint(tmp_path / "point", model)
    load_checkpoint(tmp_path / "point", model)
    assert left.is_dir()


def test_files_are_flushed_through_handles_that_may_write(tmp_path, monkeypatch):
    import fcntl

    flushed, fsync = [], os.fsync

    def noted(handle):
        mode = fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_ACCMODE
        flushed.append(mode == os.O_RDWR or stat.S_ISDIR(os.fstat(handle).st_mode))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", noted)
    save_checkpoint(tmp_path / "point", parts()[0])
    assert flushed
    assert all(flushed)


SAVER = """
import sys, torch
sys.path.insert(0, {here!r})
from test_checkpoint import parts
from kasmina_core import save_checkpoint
model = parts()[0]
number = int(sys.argv[1])
while True:
    number += 10
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.fill_(number)
    save_checkpoint({folder!r}, model, data_position=number)
    print(number, flush=True)
"""


@pytest.mark.parametrize("savers", [1, 3])
def test_loads_beside_savers_read_one_consistent_version_always(savers, tmp_path):
    model, folder = parts()[0], tmp_path / "point"
    code = SAVER.format(here=str(Path(__file__).parent), folder=str(folder))
    saving = [
        subprocess.Popen([sys.executable, "-c", code, str(i)], stdout=subprocess.PIPE) for i in range(savers)
    ]
    try:
        for one in saving:
            assert one.stdout.readline()
        seen = set()
        loads, end = 0, time.monotonic() + 60
        while loads < 60 // savers or (len(seen) <= 3 and time.monotonic() < end):
            loads += 1
            number = load_checkpoint(folder, model).data_position
            assert all(bool((tensor == number).all()) for tensor in model.parameters())
            seen.add(number)
        assert len(seen) > 3
        assert all(one.poll() is None for one in saving)
    finally:
        for one in saving:
            one.kill()
            one.communicate()
    load_checkpoint(folder, model)


def test_a_file_that_goes_while_the_checkpoint_is_replaced_is_read_from_the_new_one(tmp_path, monkeypatch):
    save(tmp_path / "point", grown(), data_position=1)
    size_of, replaced = checkpoint_files._size_of, []

    def replaced_meanwhile(file):
        if file.name != checkpoint_files.MANIFEST and not replaced:
            replaced.append(file)
            save(tmp_path / "point", grown(), data_position=2)
            raise FileNotFoundError(2, "No such file or directory", str(file))
        return size_of(file)

    monkeypatch.setattr(checkpoint_files, "_size_of", replaced_meanwhile)
    assert load(tmp_path / "point", parts()).data_position == 2
    assert replaced


def test_a_link_to_a_folder_stays_a_link(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "point").symlink_to(tmp_path / "disk")
    whole = grown()
    save(tmp_path / "point", whole, data_position=1)
    save(tmp_path / "point", whole, data_position=2)
    assert (tmp_path / "point").is_symlink()
    assert load(tmp_path / "point", parts()).data_position == 2


def test_what_a_dead_process_left_is_removed_and_what_a_living_one_writes_is_not(tmp_path):
    import socket

    left = [
        tmp_path / f".point.{what}-{socket.gethostname()}-{pid}"
        for what, pid in (("writing", 4194305), ("removing", 4194306))
    ]
    living = tmp_path / f".point.writing-{socket.gethostname()}-{os.getppid()}"
    for folder in (*left, living):
        folder.mkdir()
    save(tmp_path / "point", grown())
    assert not any(folder.exists() for folder in left)
    assert living.exists()


def test_a_seed_that_was_put_aside_comes_back_after_a_resume_with_the_weights_it_had(tmp_path):
    models = [parts()[0] for _ in range(2)]
    bring_to(models[0], SeedStage.TRAINING)
    with torch.no_grad():
        models[0].slots[FIRST].seed.weight.add_(1.0)
    models[0].cull(FIRST, keep=True)
    save_checkpoint(tmp_path / "point", models[0])
    load_checkpoint(tmp_path / "point", models[1])
    for model in models:
        assert model.observe().slots[0].kept_seed == f"{FIRST}-1"
        while model.slots[FIRST].state is not None:
            model.step_epoch(1.0)
        model.regerminate(FIRST)
    assert same_picture(*(dict(model.state_dict()) for model in models))


def test_threads_that_save_to_one_folder_at_once_leave_a_whole_checkpoint(tmp_path):
    from concurrent.futures import ThreadPoolExecutor

    model = parts()[0]
    with ThreadPoolExecutor(4) as pool:
        saves = [pool.submit(save_checkpoint, tmp_path / "point", model) for _ in range(24)]
    for one in saves:
        assert one.result() == tmp_path / "point"
    load_checkpoint(tmp_path / "point", parts()[0])
    load_checkpoint(tmp_path / "point.previous", parts()[0])
    assert sorted(os.listdir(tmp_path)) == ["point", "point.previous"]


@pytest.mark.parametrize("name", ["file/point", "n" * 250])
def test_what_the_disk_refuses_is_a_checkpoint_error_that_names_the_folder(name, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointError, match=f"{name} cannot be written: "):
        save_checkpoint(tmp_path / name, parts()[0])
    assert os.listdir(tmp_path) == ["file"]


def test_safetensors_reads_what_is_written_of_any_dtype_and_the_sum_is_the_files(tmp_path):
    values = torch.arange(24).reshape(2, 3, 4)
    real = (
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.float8_e4m3fn,
        torch.float8_e5m2,
    )
    whole = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint16, torch.uint8, torch.bool)
    tensors = {str(dtype): values.to(dtype) for dtype in (*real, *whole, torch.complex64)}
    tensors |= {"number": torch.tensor(1.5), "empty": torch.zeros(0, 3), 'ünï"\n😀': torch.ones(1)}
    same, crc32 = checkpoint_files.write_tensors(tmp_path / "own", tensors, {"checkpoint": "é"})
    read_back = load_file(tmp_path / "own")
    assert read_back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        found = read_back[name]
        assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
        assert found.flatten().view(torch.uint8).equal(tensor.flatten().view(torch.uint8)), name
    with safe_open(tmp_path / "own", framework="pt") as opened:
        assert opened.metadata() == {"checkpoint": "é"}
    save_file(tensors, tmp_path / "theirs", {"checkpoint": "é"})
    assert (tmp_path / "own").stat().st_size == (tmp_path / "theirs").stat().st_size
    assert (same, crc32) == ({}, zlib.crc32((tmp_path / "own").read_bytes()))
    assert sorted(os.listdir(tmp_path)) == ["own", "theirs"]


def test_a_tensor_is_written_with_the_values_that_a_lazy_view_of_it_shows(tmp_path):
    values = torch.view_as_complex(torch.randn(3, 2))
    tensors = {"turned": torch.randn(3, 4).t(), "conj": values.conj(), "negated": values.conj().imag}
    checkpoint_files.write_tensors(tmp_path / "own", tensors, {})
    for name, read_back in load_file(tmp_path / "own").items():
        assert torch.equal(read_back, tensors[name].resolve_neg()), name


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("wide", torch.zeros(2, dtype=torch.complex128), "'wide' is of torch.complex128"),
        ("__metadata__", torch.zeros(2), "'__metadata__' is no name for a tensor"),
        ("\ud800", torch.zeros(2), "surrogates not allowed"),
    ],
)
def test_a_tensor_that_the_format_cannot_hold_is_refused_and_leaves_the_file_that_was_there(
    name, value, message, tmp_path
):
    (tmp_path / "file").write_text("before")
    with pytest.raises(CheckpointError, match=f"cannot be written to file: .*{message}"):
        checkpoint_files.write_tensors(tmp_path / "file", {name: value}, {})
    assert (tmp_path / "file").read_text() == "before"
    assert os.listdir(tmp_path) == ["file"]


def test_a_save_within_a_save_as_by_a_signals_handler_harms_neither(tmp_path, monkeypatch):
    from kasmina_core.checkpoints import checkpoint

    write, signals = checkpoint.write_manifest, [1]

    def interrupted(*args):
        if signals and signals.pop():
            save_checkpoint(tmp_path / "point", parts()[0], data_position="within")
        write(*args)

    monkeypatch.setattr(checkpoint, "write_manifest", interrupted)
    save_checkpoint(tmp_path / "point", parts()[0], data_position="around")
    assert load_checkpoint(tmp_path / "point", parts()[0]).data_position == "around"
    assert load_checkpoint(tmp_path / "point.previous", parts()[0]).data_position == "within"


def test_a_save_in_the_midst_of_a_germination_is_refused_and_the_checkpoint_before_it_stays(tmp_path):
    model = parts()[0]
    save_checkpoint(tmp_path / "point", model, data_position="before")
    refused = []

    class Saves:
        def emit(self, event):
            try:
                save_checkpoint(tmp_path / "point", model, data_position=type(event).__name__)
            except CheckpointError as error:
                refused.append(str(error))
                assert load_checkpoint(tmp_path / "point", parts()[0]).data_position == "before"

    model.emit_to(Saves())
    model.germinate(FIRST, "scale")
    assert refused
    assert all(f"slot '{FIRST}' is being germinated" in text for text in refused)
    assert load_checkpoint(tmp_path / "point", parts()[0]).data_position == "StageChanged"


class Stop(BaseException):
    """As if the process had been killed: nothing cleans up after it."""


def interrupt_at(number, monkeypatch):
    """Let the save end before its number-th call that touches the disk; returns how many there were."""
    from kasmina_core.checkpoints import checkpoint

    counted = [0]

    def counting(function):
        def call(*args, **kwargs):
            if counted[0] == number:
                raise Stop
            counted[0] += 1
            return function(*args, **kwargs)

        return call

    for place, name in (
        (checkpoint, "write_tensors"),
        (checkpoint, "write_manifest"),
        (checkpoint_files, "flush"),
        (checkpoint_files, "_remove"),
        (checkpoint_files.os, "rename"),
        (checkpoint_files.os, "link"),
    ):
        monkeypatch.setattr(place, name, counting(getattr(place, name)))
    remove = shutil.rmtree
    gone = lambda *args, **kwargs: None if counted[0] == number else counting(remove)(*args, **kwargs)  # noqa: E731
    monkeypatch.setattr(checkpoint_files.shutil, "rmtree", gone)
    return counted


@pytest.mark.parametrize(("earlier", "foreign"), [(0, False), (1, False), (2, False), (2, True)])
def test_a_save_that_ends_at_any_call_leaves_a_whole_checkpoint(earlier, foreign, tmp_path):
    whole = grown()
    for number in range(40):
        folder = tmp_path / str(number) / "point"
        for position in range(earlier):
            save(folder, whole, data_position=position)
        if foreign:
            (folder / "notes").mkdir()
            (folder / "notes" / "mine.txt").write_text("mine")
        with pytest.MonkeyPatch.context() as patch:
            interrupt_at(number, patch)
            try:
                save(folder, whole, data_position="new")
                ended = True
            except Stop:
                ended = False
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", InterruptedSave)
            if earlier or ended:
                assert load(folder, parts()).data_position in (earlier - 1, "new")
            save(folder, whole, data_position="later")
            assert load(folder, parts()).data_position == "later"
        assert not foreign or (folder / "notes" / "mine.txt").read_text() == "mine"
        assert {one.name for one in folder.parent.iterdir()} <= {"point", "point.previous"}
        if ended:
            break
    assert ended
    assert number >= 8


def test_a_folder_that_was_being_replaced_is_said_to_be(tmp_path):
    save(tmp_path / "point", grown(), data_position=1)
    os.rename(tmp_path / "point", tmp_path / "point.previous")
    with pytest.warns(InterruptedSave, match=r"(?s)point was being replaced.*point\.previous"):
        assert load(tmp_path / "point", parts()).data_position == 1


# -- what does not fit ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "point"
    whole = grown()
    bring_to(whole[0], SeedStage.TRAINING, SECOND, "normed")
    go_on(*whole, epochs=1)
    generator = torch.Generator()
    save(folder, whole, rng=("torch", "python"), generators={"loader": generator}, data_position=[1])
    return folder


@pytest.fixture(scope="module")
def target():
    """Another run, in which something has grown too, that no load may touch."""
    whole = parts()
    bring_to(whole[0], SeedStage.SHADOWING, SECOND)
    go_on(*whole, epochs=1)
    return whole, torch.Generator().manual_seed(1)


def everything(whole, generator):
    model, optimizer, scheduler, policy, recorder = whole
    return copy.deepcopy(
        {
            **picture(model, optimizer),
            "counters": [model.epoch, model.growth.sequence, model.growth.last_metric],
            "scheduler": scheduler.state_dict(),
            "groups": [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups],
            "held": [[id(p) for p in g["params"]] for g in optimizer.param_groups],
            "policy": policy.state_dict(),
            "generator": generator.get_state(),
            "python": random.getstate(),
            "events": len(recorder.events),
        }
    )


def refused(folder, target, says="", error=CheckpointError):
    whole, generator = target
    before = everything(whole, generator)
    with pytest.raises(error, match=says) as caught:
        load(folder, whole, generators={"loader": generator})
    assert same_picture(before, everything(whole, generator))
    return str(caught.value)


@pytest.fixture
def damaged(saved, tmp_path):
    """A copy of a checkpoint and a way to change its manifest."""
    folder = tmp_path / "point"
    shutil.copytree(saved, folder)

    def change(*path_and_value):
        *path, last, value = path_and_value
        manifest = json.loads((folder / "manifest.json").read_text())
        inside = manifest
        for step in path:
            inside = inside[step]
        if value is None and not isinstance(inside, list):
            del inside[last]
        else:
            inside[last] = value
        rewrite(folder / "manifest.json", manifest)
        return folder

    return change


W, T = "weights.safetensors", "training.safetensors"
MANIFESTS = [
    (("format", "other"), "is no manifest of a kasmina checkpoint"),
    (("version", 99), "(?s)another version.*saved: *99, by kasmina '0.1.0'.*readable: *1, 3.*Update kasmina"),
    (("files", {}), "names other files"),
    (("files", "../../etc/passwd", 5), "names other files than a checkpoint has"),
    (("files", W, 5), "(?s)is not as it was written.*written: 5 bytes"),
    (("kept_seeds", None), "kept_seeds cannot be None"),
    (("kept_seeds", "nowhere", {}), "'nowhere', and this model has no such slot"),
    (
        ("kept_seeds", FIRST, {"seed_id": "x"}),
        f"(?s)put aside in slot '{FIRST}' cannot be read.*missing: blueprint_id",
    ),
    (("crc32", W, 5), "(?s)weights.safetensors is not as it was written.*crc32 written: 5"),
    (("crc32", {}), "crc32 cannot be {}"),
    (("id", "x"), "(?s)does not belong to this checkpoint.*'x'"),
    (("id", [1]), r"id cannot be \[1\]"),
    (("shared", None), "shared cannot be None"),
    (("shared", W, {"a": "b"}), "'a' cannot be the same as 'b'"),
    (("topology", "slots", FIRST, "record", "state", "stage", 77), "stage must be a SeedStage .*, not 77"),
    (
        ("topology", "slots", FIRST, "record", "state", "metrics", "alpha", {"$float": "nan"}),
        "slot '2' cannot be read: state.metrics.alpha must be .*, not nan",
    ),
    (
        ("topology", "slots", FIRST, "record", "schedule", "total_steps", 10**30),
        "schedule|cannot be read|total_steps",
    ),
    (("topology", "epoch", 10**20), "epoch must be a whole number of at least 0, not 1000"),
    (("topology", "slots", FIRST, "point", "dim", 8), "(?s)another point than in the saved model.*'dim': 8"),
    (("optimizers", []), "(?s)another number of optimisers.*saved: 0"),
    (("optimizers", 0, "class", "SGD"), "another kind of optimiser"),
    (("optimizers", 0, "groups", 0, "lr", "fast"), "The saved lr"),
    (("schedulers", []), "(?s)other schedulers.*saved: none.*here: *LambdaLR"),
    (("schedulers", 0, "state", "step", 1), "has 'step', which it does not know"),
    (("schedulers", 0, "state", "base_lrs", ["much"]), r"base_lrs cannot be \['much'\]"),
    (("policy", {}), "The saved policy cannot be loaded"),
    (("policy", None), "saved without a policy"),
    (("generators", {}), "has no generator 'loader'; it has: none"),
    (("generators", "loader", "x"), "The saved generator 'loader' cannot be restored"),
    (("rng", "python", [3, [1], None]), "random number states cannot be restored"),
    (("rng", "torch", {"$tensor": "rng['python']"}), r"\$tensor cannot hold"),
    (("rng", "moon", 1), "unknown source 'moon'"),
    (("host", 3), "host cannot be 3"),
]


@pytest.mark.parametrize(("change", "says"), MANIFESTS, ids=[str(change)[:60] for change, _ in MANIFESTS])
def test_a_manifest_that_does_not_fit_is_refused_and_nothing_is_changed(change, says, damaged, target):
    refused(damaged(*change), target, says)


TEXTS = [
    (b"", "damaged or something else"),
    (b"\xff\xfe", "damaged or something else: 'utf-8'"),
    (b"[" * 300_000, "nested too deep"),
    (b'{"format": "kasmina checkpoint", "format": 1}', "names 'format' twice"),
    (b'{"a": ' + b"1" * 6000 + b"}", "too many digits"),
    (b"[]", "is no manifest"),
]


@pytest.mark.parametrize(("text", "says"), TEXTS, ids=[says for _, says in TEXTS])
def test_a_foreign_manifest_is_refused(text, says, saved, target, tmp_path):
    shutil.copytree(saved, tmp_path / "point")
    (tmp_path / "point" / "manifest.json").write_bytes(text)
    refused(tmp_path / "point", target, says)


@pytest.mark.parametrize("file", [W, T, "manifest.json"])
def test_a_file_that_is_missing_cut_off_or_a_link_is_refused(file, saved, target, tmp_path):
    whole = (saved / file).read_bytes()
    shutil.copytree(saved, tmp_path / "point")
    (tmp_path / "point" / file).write_bytes(whole[: len(whole) // 2])
    says = refused(tmp_path / "point", target, r"cut off|damaged or something else")
    if file != "manifest.json":
        assert f"written: {len(whole)} bytes" in says
        assert f"found:   {len(whole) // 2} bytes" in says
    (tmp_path / "point" / file).unlink()
    refused(tmp_path / "point", target, f"lacks {file}|has no {file}")
    (tmp_path / "point" / file).symlink_to(saved / file)
    refused(tmp_path / "point", target, "is no regular file")


def test_no_checkpoint_at_all_is_said(target, tmp_path):
    refused(tmp_path / "nothing", target, "There is no checkpoint at")
    (tmp_path / "model.pt").write_text("weights")
    refused(tmp_path / "model.pt", target, "model.pt is a file")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", target, r"is no checkpoint: it has no manifest\.json")


def with_tensors(folder, file, change):
    """Rewrite a file of tensors, and its size and checksum in the manifest, as somebody with bad intentions would."""
    tensors = load_file(folder / file)
    manifest = json.loads((folder / "manifest.json").read_text())
    change(tensors)
    save_file(tensors, folder / file, {"checkpoint": manifest["id"]})
    manifest["files"][file] = (folder / file).stat().st_size
    manifest["crc32"][file] = zlib.crc32((folder / file).read_bytes())
    rewrite(folder / "manifest.json", manifest)


@pytest.mark.parametrize("file", [W, T])
def test_a_bit_that_turned_is_noticed_and_nothing_is_changed(file, saved, target, tmp_path):
    shutil.copytree(saved, tmp_path / "point")
    content = bytearray((tmp_path / "point" / file).read_bytes())
    content[-5] ^= 4  # in the last tensor
    (tmp_path / "point" / file).write_bytes(content)
    refused(tmp_path / "point", target, f"(?s){file} is not as it was written: its bytes have changed")


MOMENT = "optimizers[0]['state']['host.0.weight']['exp_avg']"
TENSORS = [
    (W, lambda t: t.pop("0.weight"), r"(?s)do not fit this model.*Missing key.*0\.weight"),
    (W, lambda t: t.update({"more": torch.ones(1)}), "(?s)do not fit.*Unexpected key.*more"),
    (W, lambda t: t.update({"7.bias": torch.ones(9)}), "(?s)do not fit.*size mismatch"),
    (
        W,
        lambda t: t.update({"7.bias": torch.ones(3, dtype=torch.int64)}),
        "(?s)values of another kind.*torch.int64",
    ),
    (
        W,
        lambda t: t.update({f"kasmina_slots.{FIRST}.seed.weight": torch.ones(4)}),
        "(?s)do not fit.*size mismatch",
    ),
    (W, lambda t: t.pop(f"kasmina_slots.{SECOND}.seed.norm.running_mean"), "(?s)do not fit.*Missing"),
    (T, lambda t: t.pop(MOMENT), "(?s)damaged.*tensor cannot hold"),
    (
        T,
        lambda t: t.update({MOMENT: torch.ones(3)}),
        r"(?s)saved exp_avg.*another shape.*\(3,\).*\(4, 1, 3, 3\)",
    ),
    (
        T,
        lambda t: t.update({"rng['torch']": torch.ones(9, dtype=torch.uint8)}),
        "random number states cannot be restored",
    ),
    (T, lambda t: t.update({"rng['torch']": torch.ones(9)}), "random number states cannot be restored"),
]


@pytest.mark.parametrize(("file", "change", "says"), TENSORS, ids=[says for *_, says in TENSORS])
def test_tensors_that_do_not_fit_are_refused_and_nothing_is_changed(
    file, change, says, saved, target, tmp_path
):
    shutil.copytree(saved, tmp_path / "point")
    with_tensors(tmp_path / "point", file, change)
    refused(tmp_path / "point", target, says)


def test_an_optimiser_that_was_not_saved_is_asked_for_in_vain(target, tmp_path):
    save_checkpoint(tmp_path / "point", grown()[0])
    refused(tmp_path / "point", target, "another number of optimisers")


def test_another_host_is_refused(saved):
    class Other(nn.Sequential):
        pass

    host = Other(*list(make_host())[:5], nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 7))
    model = MorphogeneticModel(
        host, (FIRST, SECOND), example=torch.zeros(2, 1, 5, 5), registry=make_registry(), config=open_config()
    )
    before = picture(model)
    with pytest.raises(CheckpointError, match=r"(?s)do not fit.*size mismatch for 7\.weight"):
        load_checkpoint(saved, model)
    assert same_picture(before, picture(model))


# -- fuzzing ----------------------------------------------------------------------------------------------------------

VALUES = [
    None,
    True,
    0,
    -1,
    10**15,
    1.5,
    "",
    "x",
    [],
    {},
    [[1, 2]],
    {"$float": "nan"},
    {"$float": "-inf"},
    {"$tuple": [1]},
]


def places_in(data, way=()):
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        yield (*way, key)
        if len(way) < 7:
            yield from places_in(value, (*way, key))


def works(whole):
    """Whether a run goes on from here."""
    train_once(whole[0], whole[1])
    whole[0].step_epoch(1.0)
    whole[2].step()


def test_any_damage_of_the_manifest_is_refused_as_a_whole_or_harmless(saved, target, tmp_path):
    chance = random.Random(4)
    folder = tmp_path / "point"
    shutil.copytree(saved, folder)
    good = json.loads((saved / "manifest.json").read_text())
    places = sorted((p for p in places_in(good) if p[0] not in ("data_position", "extra")), key=str)
    whole, generator = target
    before, refusals = everything(whole, generator), 0
    for _ in range(250):
        manifest = copy.deepcopy(good)
        *way, last = chance.choice(places)
        inside = manifest
        for step in way:
            inside = inside[step]
        if chance.random() < 0.2:
            del inside[last]
        else:
            inside[last] = chance.choice(VALUES)
        rewrite(folder / "manifest.json", manifest)
        try:
            load(folder, whole, generators={"loader": generator})
        except CheckpointError:
            refusals += 1
            assert same_picture(before, everything(whole, generator)), (*way, last)
        else:
            try:
                works(whole)
            except Exception as error:
                raise AssertionError(f"{(*way, last)} was loaded but does not work") from error
            whole = parts()
            before = everything(whole, generator)
    assert refusals > 150


def test_a_changed_byte_of_a_manifest_never_loads(saved, target, tmp_path):
    chance = random.Random(6)
    folder = tmp_path / "point"
    shutil.copytree(saved, folder)
    content = (saved / "manifest.json").read_bytes()
    for _ in range(276):
        data = bytearray(content)
        data[chance.randrange(len(data))] ^= chance.randrange(1, 256)
        (folder / "manifest.json").write_bytes(data)
        with pytest.raises(CheckpointError):
            load_checkpoint(folder, target[0][0])


def test_any_damaged_byte_is_refused_as_a_whole_or_harmless(saved, target, tmp_path):
    chance = random.Random(5)
    folder = tmp_path / "point"
    shutil.copytree(saved, folder)
    whole, generator = target
    before = everything(whole, generator)
    for _ in range(150):
        file = chance.choice([W, T, "manifest.json"])
        data = bytearray((saved / file).read_bytes())
        head = min(len(data), 3000)
        for _ in range(chance.randint(1, 3)):
            data[chance.randrange(head)] = chance.randrange(256)
        (folder / file).write_bytes(data)
        try:
            load(folder, whole, generators={"loader": generator})
        except CheckpointError:
            assert same_picture(before, everything(whole, generator))
        else:
            whole = parts()
            before = everything(whole, generator)
        shutil.copy(saved / file, folder / file)


def test_a_place_that_cannot_be_written_is_said_by_the_name_that_was_given(tmp_path):
    model, _ = make_model()
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError) as caught:
        save_checkpoint(tmp_path / "file" / "point", model)
    assert f"The checkpoint {tmp_path / 'file' / 'point'} cannot be written: File exists." in str(
        caught.value
    )
    assert isinstance(caught.value.__cause__, OSError)


@pytest.mark.parametrize("file", ["weights.safetensors", "training.safetensors", "manifest.json"])
def test_a_full_disk_is_said_by_the_name_that_was_given(file, tmp_path, monkeypatch):
    model, optimizer, *_ = parts()
    train_once(model, optimizer)
    save_checkpoint(tmp_path / "point", model, optimizer=optimizer)
    before = sorted(path.name for path in tmp_path.iterdir())

    def full(path):
        if path.name == file:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr("kasmina_core.checkpoints.files.flush", full)
    with pytest.raises(CheckpointError) as caught:
        save_checkpoint(tmp_path / "point", model, optimizer=optimizer)
    assert (
        str(caught.value)
        == f"The checkpoint {tmp_path / 'point'} cannot be written: No space left on device."
    )
    assert isinstance(caught.value.__cause__, OSError)
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    monkeypatch.undo()
    load_checkpoint(tmp_path / "point", model, optimizer=optimizer)


def test_a_policy_of_another_class_is_refused_by_both_names(tmp_path):
    model, _, _, policy, _ = parts()
    save_checkpoint(tmp_path / "point", model, policy=policy)
    other = BanditPolicy({Topology.CNN: ["normed"]})
    with pytest.raises(CheckpointError, match=r"(?s)saved: PlateauPolicy.*here:  BanditPolicy.*draws"):
        load_checkpoint(tmp_path / "point", model, policy=other)


def test_a_policy_that_an_older_manifest_does_not_name_is_refused_by_its_own_class(tmp_path):
    class Other:
        def state_dict(self):
            return {}

        def load_state_dict(self, state):
            state["draws"]

    model, _, _, policy, _ = parts()
    save_checkpoint(tmp_path / "point", model, policy=policy)
    manifest = tmp_path / "point" / "manifest.json"
    data = json.loads(manifest.read_text())
    del data["policy_class"]
    rewrite(manifest, data)
    with pytest.raises(
        CheckpointError, match="cannot be loaded into this Other: its saved state does not fit"
    ) as no:
        load_checkpoint(tmp_path / "point", model, policy=Other())
    assert "saved:" not in str(no.value)


def test_a_policy_without_memory_cannot_go_on_for_one_that_has_one(tmp_path):
    class Forgets:
        def decide(self, observation):
            return []

    model, _, _, policy, _ = parts()
    save_checkpoint(tmp_path / "point", model, policy=policy)
    with pytest.raises(
        CheckpointError, match=r"(?s)Forgets cannot load.*Give the policy with which the run began"
    ):
        load_checkpoint(tmp_path / "point", model, policy=Forgets())
