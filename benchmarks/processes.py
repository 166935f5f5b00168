"""What growth costs two processes that train one model, per event: ``python -m benchmarks.processes``.

Two processes on this machine, gloo, DistributedDataParallel. An event is a command and the step after it, in which the
gradients' averaging is set up anew; its unit is a step of the bare host in plain DistributedDataParallel. It is the wall
clock's time of the first process: it waits for the other.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from benchmarks.timing import Row, arguments_of, command_line, device_of, progress, quartiles, report
from benchmarks.workloads import SIZES, Workload
from kasmina_core import SeedStage, distribute, tie_optimizer

PROCESSES = 2
PATIENCE = 300.0


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    dist.barrier()
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def measure_here(kind: str, size: str, rounds: int, device: torch.device) -> list[Row]:
    """Return the rows of one host; every process calls this, in a process group."""
    work = Workload(kind, SIZES[size], device)
    bare = DistributedDataParallel(work.host())
    plain = _trained(work, bare, torch.optim.AdamW(bare.parameters(), 1e-4))
    model = work.model(3, embargo_epochs=0)
    net = distribute(model)
    optimizer = tie_optimizer(model, torch.optim.AdamW(model.host_parameters(), 1e-4))
    grown = _trained(work, net, optimizer, model.step)
    name = next(iter(model.slots))

    def event(command: Callable[[], object]) -> Callable[[], None]:
        def run() -> None:
            command()
            grown()

        return run

    def walk(stage: SeedStage) -> Callable[[], None]:
        return lambda: work.walk(model, name, stage)

    def forget() -> None:
        model.cull(name)
        while model.slots[name].state is not None:
            model.step_epoch()

    model.evaluate_with(lambda: work.losses(model(work.inputs)))
    events: dict[str, Callable[[], None]] = {
        "a step with 3 dormant slots": grown,
        "germination and its step": event(walk(SeedStage.GERMINATED)),
        "into TRAINING and its step": event(walk(SeedStage.TRAINING)),
        "a step in straight-through TRAINING": grown,
        "into BLENDING and its step": event(walk(SeedStage.BLENDING)),
        "a step in BLENDING": grown,
        "cull and its step": event(forget),
    }
    for _ in range(3):
        plain()
        grown()
    ratios: dict[str, list[float]] = {what: [] for what in events}
    base: list[float] = []
    for _ in range(rounds):
        for what, run in events.items():
            unit = min(_seconds(plain, device) for _ in range(3))
            base.append(unit)
            ratios[what].append(_seconds(run, device) / unit)
    unit_text = f"{quartiles(base)[0] * 1e3:.3g} ms"
    part = f"{kind}, {PROCESSES} processes"
    over = "a step of the bare host in plain DDP"
    return [Row(part, what, over, quartiles(found), unit=unit_text) for what, found in ratios.items()]


def _trained(
    work: Workload,
    net: Callable[..., torch.Tensor],
    optimizer: torch.optim.Optimizer,
    after: Callable[[], object] = lambda: None,
) -> Callable[[], None]:
    def step() -> None:
        optimizer.zero_grad()
        work.loss(net).backward()
        after()
        optimizer.step()

    return step


def _child(rank: int, folder: Path, settings: dict[str, Any]) -> None:
    device = torch.device(settings["device"])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=PROCESSES)
    try:
        rows = [
            row
            for kind in settings["hosts"]
            for row in measure_here(kind, settings["size"], settings["rounds"], device)
        ]
        dist.barrier()
        if rank == 0:
            (folder / "rows.json").write_text(json.dumps([asdict(row) for row in rows]))
    finally:
        dist.destroy_process_group()


def measure(hosts: Sequence[str], size: str, rounds: int, device: torch.device) -> list[Row]:
    """Start the processes, and return what the first one measured.

    Raises:
        SystemExit: If one fails; its output is the message.
    """
    with tempfile.TemporaryDirectory() as name:
        settings = {"hosts": list(hosts), "size": size, "rounds": rounds, "device": str(device)}
        command = [sys.executable, "-m", "benchmarks.processes", "--child", json.dumps(settings), name]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
        running = [
            subprocess.Popen(
                [*command, str(rank)],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank in range(PROCESSES)
        ]
        try:
            said = [process.communicate(timeout=PATIENCE)[0] for process in running]
        finally:
            for process in running:
                process.kill()
        # Written when all had measured; gloo's threads can abort a process that is done, while it ends.
        if not (Path(name) / "rows.json").exists():
            raise SystemExit("A measuring process failed:\n" + "\n".join(said))
        return [
            Row(**row | {"ratio": tuple(row["ratio"])})
            for row in json.loads((Path(name) / "rows.json").read_text())
        ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    if given[:1] == ["--child"]:
        _child(int(given[3]), Path(given[2]), json.loads(given[1]))
        return
    parser = arguments_of(__doc__, rounds=11)
    parser.add_argument("--hosts", default="cnn,transformer", help="which hosts (default: %(default)s)")
    options = parser.parse_args(arguments)
    device = device_of(options)
    if options.fast:
        options.rounds, options.hosts = 2, "cnn"
    progress(f"{PROCESSES} processes")
    rows = measure(options.hosts.split(","), "tiny" if options.fast else "small", options.rounds, device)
    report(command_line("benchmarks.processes", arguments), device, options, rows)


if __name__ == "__main__":
    main()
