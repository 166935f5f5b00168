"""What saving and loading a run costs, over torch and safetensors with the same bytes: ``python -m benchmarks.checkpoints``.

A Transformer of twelve layers with a fossil in three of them, and AdamW's moments. `save_checkpoint` also writes a
manifest, flushes everything to the disk, renames, and keeps the checkpoint before: each is compared with and without
the flush. It is the wall clock's time: a disk is waited for. Where other programs keep every core busy, a load waits for
the thread that computes its checksum: a row of its own leaves that thread out.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from benchmarks.timing import Clock, Row, Step, arguments_of, command_line, device_of, report
from benchmarks.workloads import SIZES, Size, Workload
from kasmina_core import MorphogeneticModel, SeedStage, load_checkpoint, save_checkpoint, tie_optimizer

GOAL: Final = 1.1
MIB: Final = 2**20
WIDE: Final = Size(width=16, image=8, images=2, dim=256, length=16, sequences=2)


class Saving:
    """A grown model with its optimiser, and ways to write both down and read them.

    Args:
        size: Of the host.
        device: Where it is.
        folder: Where to write.
    """

    def __init__(self, size: Size, device: torch.device, folder: Path) -> None:
        self.folder = folder
        self.work = Workload("transformer", size, device)
        self.model, self.optimizer = self.new()

    def new(self) -> tuple[MorphogeneticModel, torch.optim.Optimizer]:
        """Return the grown model after a step of its optimiser."""
        model = self.work.grown(3, SeedStage.FOSSILIZED)
        optimizer = tie_optimizer(model, torch.optim.AdamW(model.host_parameters(), 1e-4))
        self.work.loss(model).backward()
        optimizer.step()
        optimizer.zero_grad()
        return model, optimizer

    @property
    def size(self) -> int:
        """Bytes of all tensors of the run."""
        state = self.optimizer.state.values()
        tensors = [*self.model.state_dict().values(), *(t for of in state for t in of.values())]
        return sum(t.nbytes for t in tensors if isinstance(t, Tensor))

    def kasmina(self) -> None:
        """Save with `save_checkpoint`."""
        save_checkpoint(self.folder / "kasmina", self.model, optimizer=self.optimizer)

    def torch(self) -> None:
        """Save with ``torch.save``."""
        torch.save((self.model.state_dict(), self.optimizer.state_dict()), self.folder / "torch.pt")

    def safetensors(self) -> None:
        """Save with ``safetensors.torch.save_file``: the model's tensors, and the optimiser's by number."""
        from safetensors.torch import save_file

        whole = {name: t for name, t in self.model.state_dict().items() if isinstance(t, Tensor)}
        held = {t.data_ptr(): name for name, t in whole.items()}  # what is shared can be written once
        save_file(
            {name: t for name, t in whole.items() if held[t.data_ptr()] == name},
            self.folder / "w.safetensors",
        )
        state = self.optimizer.state_dict()["state"]
        save_file(
            {f"{number}.{name}": t for number, of in state.items() for name, t in of.items()},
            self.folder / "o.safetensors",
        )

    def flushed(self, save: Step, *names: str) -> Step:
        """Return ``save`` followed by a flush to the disk."""

        def both() -> None:
            save()
            for name in names:
                with open(self.folder / name, "rb") as file:
                    os.fsync(file.fileno())

        return both

    def kasmina_load(self) -> None:
        """Load with `load_checkpoint`."""
        load_checkpoint(self.folder / "kasmina", self.model, optimizer=self.optimizer)

    def empty(self) -> tuple[MorphogeneticModel, torch.optim.Optimizer]:
        """Return a model of the same host and slots without seeds, and its optimiser."""
        model = self.work.model(3)
        return model, tie_optimizer(model, torch.optim.AdamW(model.host_parameters(), 1e-4))

    def resume(self) -> None:
        """Load with `load_checkpoint` into a model without seeds, as a new process does."""
        model, optimizer = self.empty()
        load_checkpoint(self.folder / "kasmina", model, optimizer=optimizer)

    def torch_load(self) -> None:
        """Load with ``torch.load`` and ``load_state_dict``, of the model and of the optimiser."""
        weights, moments = torch.load(
            self.folder / "torch.pt", weights_only=True, map_location=self.work.device
        )
        self.model.load_state_dict(weights)
        self.optimizer.load_state_dict(moments)

    def host_load(self, into: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Step:
        """Return a load with ``torch.load`` of a plain module with as many bytes, and of its optimiser."""
        path = self.folder / "plain.pt"
        torch.save((into.state_dict(), optimizer.state_dict()), path)

        def load() -> None:
            weights, moments = torch.load(path, weights_only=True, map_location=self.work.device)
            into.load_state_dict(weights)
            optimizer.load_state_dict(moments)

        return load

    def by_hand(self) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        """Return a plain module with the same tensors, and its optimiser after a step."""
        seeds = [slot.seed for slot in self.model.slots.values() if slot.seed is not None]
        twin = self.work.by_hand(seeds, SeedStage.FOSSILIZED)
        optimizer = torch.optim.AdamW(twin.parameters(), 1e-4)
        self.work.loss(twin).backward()
        optimizer.step()
        optimizer.zero_grad()
        return twin, optimizer


def measure(saving: Saving, clock: Clock, own: Clock) -> list[Row]:
    """Return the rows; ``own`` counts the calling thread alone."""
    saving.kasmina()
    saving.torch()
    saving.safetensors()
    of = f"{saving.size / MIB:.0f} MiB"
    saves: dict[str, Step] = {
        "torch.save and flush": saving.flushed(saving.torch, "torch.pt"),
        "safetensors and flush": saving.flushed(saving.safetensors, "w.safetensors", "o.safetensors"),
        "torch.save": saving.torch,
        "safetensors": saving.safetensors,
    }
    rows = [
        clock.row("saving", "save_checkpoint", over, saving.kasmina, [save], GOAL, of)
        for over, save in saves.items()
    ]
    by_hand = saving.host_load(*saving.by_hand())
    over = "torch.load of the same by hand"
    case = "load_checkpoint into a model without seeds"
    return [
        *rows,
        clock.row(
            "loading",
            "load_checkpoint",
            "torch.load of the grown model",
            saving.kasmina_load,
            [saving.torch_load],
            GOAL,
            of,
        ),
        clock.row("loading", "load_checkpoint", over, saving.kasmina_load, [by_hand], GOAL, of),
        own.row("loading", "load_checkpoint, its own thread", over, saving.kasmina_load, [by_hand], GOAL, of),
        own.row(
            "loading",
            f"{case}, its own thread",
            f"{over}, and making the model",
            saving.resume,
            [by_hand, saving.empty],
            GOAL,
            of,
        ),
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = arguments_of(__doc__, rounds=7)
    parser.add_argument("--folder", help="where to write (default: the folder of temporary files)")
    options = parser.parse_args(arguments)
    device = device_of(options)
    if options.fast:
        options.rounds = 2
    folder = Path(tempfile.mkdtemp(dir=options.folder))
    try:
        saving = Saving(SIZES["tiny"] if options.fast else WIDE, device, folder)
        clock = Clock(device, options.rounds, options.budget, waits=True)
        own = Clock(device, options.rounds, options.budget, thread=True)
        rows = measure(saving, clock, own)
    finally:
        shutil.rmtree(folder)
    report(command_line("benchmarks.checkpoints", arguments), device, options, rows)


if __name__ == "__main__":
    main()
