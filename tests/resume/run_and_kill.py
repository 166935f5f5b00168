"""A training run that checkpoints and resumes, and a driver that has it killed by the system until it is done.

``python run_and_kill.py FOLDER VARIANT KILLS SEED``. The run is made twice: whole, without a checkpoint, logging to
``whole.log``; and killed at random moments and before chosen calls of a save, logging to ``killed.log``. Each run is a
fork of this process, which has imported everything and computed nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from kasmina_core import (
    Advance,
    BlueprintRegistry,
    BlueprintSpec,
    Cull,
    GateThresholds,
    Germinate,
    GrowthConfig,
    InterruptedSave,
    MorphogeneticModel,
    Pause,
    QualityGates,
    Resume,
    SeedStage,
    Topology,
    growth_of,
    load_checkpoint,
    save_checkpoint,
    tie_optimizer,
)
from kasmina_core.checkpoints import checkpoint as checkpoint_module
from kasmina_core.checkpoints import files as checkpoint_files

EPOCHS, BATCH, SAMPLES, SAVE_EVERY = 20, 8, 30, 3


class Seed(nn.Module):
    """Has buffers that move; draws random numbers where ``p`` is not 0."""

    def __init__(self, dim: int, p: float = 0.0) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(dim)
        self.conv = nn.Conv2d(dim, dim, 1)
        self.p = p

    def forward(self, x):
        y = self.conv(self.norm(x))
        return x + 0.1 * (F.dropout(y, self.p, self.training) if self.p else y)


class Script:
    """Takes seeds through everything that can happen to them; what it did is its memory."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.options = options
        self.culls = 0
        self.paused = False

    def decide(self, observation):
        commands = []
        for slot in observation.slots:
            if slot.stage is SeedStage.DORMANT and observation.epoch >= (1 if slot.slot == "a" else 2):
                commands.append(Germinate(slot.slot, "seed", self.options))
            elif (
                slot.slot == "a" and slot.stage is SeedStage.BLENDING and self.culls == 0 and slot.alpha > 0.3
            ):
                self.culls += 1
                commands.append(Cull(slot.slot, f"at alpha {slot.alpha}", revert=slot.can_revert))
            elif slot.slot == "b" and slot.stage is SeedStage.TRAINING and slot.is_paused:
                commands.append(Resume(slot.slot))
            elif slot.slot == "b" and slot.stage is SeedStage.TRAINING and not self.paused:
                self.paused = True
                commands.append(Pause(slot.slot))
            elif slot.stage is SeedStage.PROBATIONARY and slot.gate_passed:
                commands.append(Advance(slot.slot))
        return commands

    def state_dict(self):
        return {"culls": self.culls, "paused": self.paused}

    def load_state_dict(self, state):
        self.culls, self.paused = state["culls"], state["paused"]


VARIANTS: dict[str, dict[str, Any]] = {
    "straight-through, ramp by step": {
        "incubation": "straight-through",
        "ramp_unit": "step",
        "ramp_steps": 9,
    },
    "counterfactual, ramp by epoch, put back": {
        "incubation": "counterfactual",
        "ramp_unit": "epoch",
        "ramp_steps": 4,
        "keep_snapshot": True,
    },
}


class Log:
    """One line of JSON a record, written at once; a kill cannot leave half of one."""

    def __init__(self, file: Path) -> None:
        self._file = os.open(file, os.O_CREAT | os.O_APPEND | os.O_WRONLY)

    def __call__(self, *key_and_value: Any) -> None:
        os.write(self._file, f"{json.dumps(key_and_value)}\n".encode())

    def emit(self, event: Any) -> None:
        said = event.to_dict()
        self("event", said["sequence"], said)


def build(variant: str, log: Log):
    torch.manual_seed(0)
    host = nn.Sequential()
    host.add_module("first", nn.Conv2d(1, 4, 3, padding=1))
    host.add_module("norm", nn.BatchNorm2d(4))
    host.add_module("a", nn.ReLU())
    host.add_module("drop", nn.Dropout(0.2))
    host.add_module("b", nn.Conv2d(4, 4, 3, padding=1))
    host.add_module("pool", nn.AdaptiveAvgPool2d(1))
    host.add_module("flat", nn.Flatten())
    host.add_module("head", nn.Linear(4, 3))
    registry = BlueprintRegistry()
    spec = BlueprintSpec("seed", Topology.CNN, Seed, lambda d: d * d + 3 * d, options={"p": 0.0})
    registry.register(spec, pack="mine")
    thresholds = GateThresholds(
        min_training_epochs=2, min_probation_epochs=2, min_samples=2, min_gain=-1e9, min_t=-1e9,
        max_harm_t=1e9, max_output_deviation=1e9,
    )  # fmt: skip
    config = GrowthConfig(
        **VARIANTS[variant], embargo_epochs=2, isolation_every=5, gates=QualityGates(thresholds=thresholds)
    )
    model = MorphogeneticModel(
        host, ("a", "b"), config=config, example=torch.zeros(2, 1, 5, 5), registry=registry, telemetry=log
    )
    parameters = model.host_parameters()
    groups = [{"params": parameters[:2], "lr": 0.01}, {"params": parameters[2:], "weight_decay": 0.1}]
    optimizer = torch.optim.AdamW(groups, 5e-3)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.97**epoch)
    tie_optimizer(model, optimizer, lr_factor=0.5, schedulers=[scheduler])
    return model, optimizer, scheduler


def train(variant: str, log: Log, folder: Path | None) -> None:
    torch.set_num_threads(1)
    model, optimizer, scheduler = build(variant, log)
    counterfactual = VARIANTS[variant]["incubation"] == "counterfactual"
    policy = Script({"p": 0.3} if counterfactual else {})
    source = torch.Generator().manual_seed(1)
    x, y = torch.randn(SAMPLES, 1, 5, 5, generator=source), torch.randint(0, 3, (SAMPLES,), generator=source)
    held_x, held_y = torch.randn(16, 1, 5, 5, generator=source), torch.randint(0, 3, (16,), generator=source)
    shuffling = torch.Generator().manual_seed(2)
    loader = DataLoader(TensorDataset(x, y), BATCH, shuffle=True, generator=shuffling)
    model.evaluate_with(lambda: F.cross_entropy(model(held_x), held_y, reduction="none"))
    torch.manual_seed(3)

    first, skip, everything = 0, 0, {"optimizer": optimizer, "schedulers": scheduler, "policy": policy}
    if folder is not None and (folder.exists() or folder.with_name(f"{folder.name}.previous").exists()):
        position = load_checkpoint(folder, model, **everything).data_position
        first, skip = position["epoch"], position["batch"]
        shuffling.set_state(position["shuffling"])
        log("resumed", [first, skip], None)

    def save(epoch: int, batch: int, start: torch.Tensor) -> None:
        if folder is not None:
            at = {"epoch": epoch, "batch": batch, "shuffling": start}
            save_checkpoint(folder, model, **everything, data_position=at)

    for epoch in range(first, EPOCHS):
        start = shuffling.get_state()
        for batch, (inputs, targets) in enumerate(loader):
            if batch < skip:
                continue
            model.train()
            optimizer.zero_grad()
            loss = F.cross_entropy(model(inputs), targets)
            loss.backward()
            model.incubate(lambda inputs=inputs, targets=targets: F.cross_entropy(model(inputs), targets))
            model.step()
            optimizer.step()
            stages = [[slot.stage.name, slot.alpha] for slot in model.slots.values()]
            log(
                "step",
                [epoch, batch],
                [loss.item(), torch.rand(()).item(), stages, digest(growth_of(model))],
            )
            if (epoch * 4 + batch) % SAVE_EVERY == 0:
                save(epoch, batch + 1, start)
        skip = 0
        model.eval()
        with torch.no_grad():
            metric = F.cross_entropy(model(held_x), held_y).item()
        model.step_epoch(metric)
        done = [repr(command) for command in model.follow(policy)]
        scheduler.step()
        log("epoch", epoch, [metric, done, [group["lr"] for group in optimizer.param_groups]])
        if epoch % 2:
            save(epoch + 1, 0, shuffling.get_state())
    log(
        "end",
        None,
        [digest(model.state_dict()), digest(optimizer.state_dict()), digest(torch.get_rng_state())],
    )


def digest(value: Any) -> str:
    whole = hashlib.sha256()

    def add(part: Any) -> None:
        if isinstance(part, torch.Tensor):
            whole.update(bytes(part.detach().contiguous().flatten().view(torch.uint8).tolist()))
        elif isinstance(part, dict):
            for key in sorted(part, key=str):
                whole.update(str(key).encode())
                add(part[key])
        elif isinstance(part, (list, tuple)):
            for item in part:
                add(item)
        else:
            whole.update(repr(part).encode())

    add(value)
    return whole.hexdigest()


def die_before(call: int) -> None:
    """Let this process be killed before its ``call``-th call that touches the disk in a save."""
    left = [call]

    def dying(function: Any) -> Any:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1
            return function(*args, **kwargs)

        return wrapped

    for place, name in (
        (checkpoint_module, "write_tensors"),
        (checkpoint_module, "write_manifest"),
        (checkpoint_files, "flush"),
        (os, "rename"),
        (shutil, "rmtree"),
    ):
        setattr(place, name, dying(getattr(place, name)))


def fork(
    variant: str, log: Path, folder: Path | None, call: int | None = None, seconds: float | None = None
) -> int:
    """Start a run, which the system ends before its ``call``-th call in a save or after ``seconds`` of computing."""
    if (child := os.fork()) != 0:
        return child
    code = 1
    try:
        warnings.simplefilter("ignore", InterruptedSave)
        if call is not None:
            die_before(call)
        if (
            seconds is not None
        ):  # of computing, so that a busy machine gives no other moments; nothing handles SIGPROF
            signal.setitimer(signal.ITIMER_PROF, seconds)
        train(variant, Log(log), folder)
        code = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def warm_up(variant: str) -> None:
    """Import what torch and we import late, so that each fork starts at once; no backward, which may start threads."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        model, optimizer, scheduler = build(variant, Log(Path(place) / "log"))
        model.germinate("a", "seed")
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        for _ in range(2):
            save_checkpoint(Path(place) / "point", model, optimizer=optimizer, schedulers=scheduler)
            load_checkpoint(Path(place) / "point", model, optimizer=optimizer, schedulers=scheduler)


def main(folder: Path, variant: str, kills: int, seed: int) -> int:
    warm_up(variant)
    _, status = os.waitpid(fork(variant, folder / "whole.log", None), 0)
    if status:
        return 1
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    usual = used.ru_utime + used.ru_stime
    chance, calls, killed = random.Random(seed), 0, 0
    while True:
        # Every third dies inside of a save, before the next of the calls that make one up; the others at any time.
        inside = killed % 3 == 2 and killed < kills
        call = calls if inside else None
        seconds = None if inside or killed >= kills else chance.uniform(0.001, usual / 2)
        calls += inside
        _, status = os.waitpid(fork(variant, folder / "killed.log", folder / "point", call, seconds), 0)
        if os.WIFSIGNALED(status):
            killed += 1
            continue
        if os.waitstatus_to_exitcode(status):
            return 1
        if killed < kills:  # done too soon: once more from the start
            for left in folder.glob("point*"):
                shutil.rmtree(left)
            continue
        print(json.dumps({"killed": killed, "calls": calls, "seconds": usual}))
        return 0


if __name__ == "__main__":
    raise SystemExit(main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])))
