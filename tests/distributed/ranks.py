"""Runs the checks of a test module in several processes at once.

Each check has a process group of its own, so that one that hangs harms no other. A module of checks that shard sets
``ONE_GROUP = True``: torch keeps what it knows of a mesh, and takes a later one that looks like it for the same.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PATIENCE = 20.0
"""Seconds after which torch gives up waiting for a process; a check that hangs fails."""

Check = Callable[[int], None]


def on_each_rank(check: Check) -> Check:
    """Mark a function of a test module as one that every process runs, with its rank."""
    check.on_each_rank = True  # type: ignore[attr-defined]
    return check


def folder_of_checks() -> Path:
    """Return the folder that the processes and the test share."""
    return Path(os.environ["KASMINA_CHECKS"])


def checks_in(names: dict[str, Any]) -> dict[str, Check]:
    return {name: value for name, value in names.items() if getattr(value, "on_each_rank", False)}


class Outcomes:
    """What the checks of a module said, by rank."""

    def __init__(self, by_rank: list[dict[str, str]], output: str) -> None:
        self._by_rank = by_rank
        self._output = output

    def require(self, check: str) -> None:
        faults = [
            f"rank {rank}:\n{said.get(check, 'did not get here: ' + self._output[-3000:])}"
            for rank, said in enumerate(self._by_rank)
            if said.get(check, "missing")
        ]
        assert not faults, "\n".join(faults)


def environment() -> dict[str, str]:
    paths = [str(HERE), str(HERE.parent / "core"), os.environ.get("PYTHONPATH", "")]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(paths),
        "OMP_NUM_THREADS": "1",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
    }


def run_checks(
    module: str, folder: Path, *, size: int = 2, backend: str = "gloo", limit: float = 400.0
) -> Outcomes:
    """Run every check of the test module at path ``module`` on ``size`` ranks, and return what they said."""
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, module, str(folder), str(rank), str(size), backend],
            env=environment() | {"KASMINA_CHECKS": str(folder)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(size)
    ]
    output = ""
    try:
        for process in processes:
            output += process.communicate(timeout=limit)[0]
    finally:
        for process in processes:
            process.kill()
    files = [folder / f"rank{rank}.json" for rank in range(size)]
    return Outcomes([json.loads(f.read_text()) if f.exists() else {} for f in files], output)


@contextlib.contextmanager
def process_group(store: Path, rank: int, size: int = 2, backend: str = "gloo") -> Iterator[None]:
    import torch.distributed as dist

    dist.init_process_group(
        backend,
        store=dist.FileStore(str(store), size),
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=PATIENCE),
    )
    try:
        yield
    finally:
        dist.destroy_process_group()


def shard(module: Any, **options: Any) -> Any:
    """Apply FSDP2 over all processes on the CPU, whatever else the machine has."""
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    return fully_shard(module, mesh=dist.init_device_mesh("cpu", (dist.get_world_size(),)), **options)


def everywhere(value: Any) -> list[Any]:
    """Return the value of each rank."""
    import torch.distributed as dist

    heard: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(heard, value)
    return heard


def main(module: str, folder: Path, rank: int, size: int, backend: str) -> None:
    import torch

    torch.set_num_threads(1)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    spec = importlib.util.spec_from_file_location(Path(module).stem, module)
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = loaded
    spec.loader.exec_module(loaded)
    said: dict[str, str] = {}
    warnings.simplefilter("error")
    # Said of any host whose last layer is a Linear on (b, t, d).
    warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module .* returned a view tensor")
    # Most cases measure the same few samples on every rank, so that runs of one and of two processes compare.
    warnings.filterwarnings("ignore", message=r"Ranks .* return the same held-out losses")
    is_one = getattr(loaded, "ONE_GROUP", False)
    with process_group(folder / "store", rank, size, backend) if is_one else contextlib.nullcontext():
        for number, (name, check) in enumerate(checks_in(vars(loaded)).items()):
            own = process_group(folder / f"store{number}", rank, size, backend)
            try:
                with contextlib.nullcontext() if is_one else own:
                    torch.manual_seed(rank)
                    check(rank)
                said[name] = ""
            except BaseException:
                said[name] = traceback.format_exc()
            (folder / f"rank{rank}.json").write_text(json.dumps(said))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), sys.argv[5])
