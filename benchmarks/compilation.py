"""How many graphs a whole life compiles, and how long that takes: ``python -m benchmarks.compilation``.

A seed goes from germination to fossil in a host of twelve blocks under ``torch.compile(fullgraph=True)`` with Inductor,
its caches off; the model is trained a few steps in each stage and at six values of alpha. A stage's seconds are those of
its first step less those of its second. The unit is the bare host's first step.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Sequence
from typing import Final

import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from benchmarks.timing import Row, Step, arguments_of, command_line, device_of, progress, report
from benchmarks.workloads import SIZES, Workload
from kasmina_core import SeedStage

ALPHAS: Final = (0.1, 0.3, 0.5, 0.7, 0.9, 1.0)


def first_step_seconds(step: Step) -> float:
    """Return what a step's first call takes more than its second."""
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return max(0.0, seconds[0] - seconds[1])


class Life:
    """What is compiled over a life, by stage.

    Args:
        work: The host and its batch.
        module: What is compiled.
        backend: What compiles the graphs.
    """

    def __init__(self, work: Workload, module: nn.Module, backend: str) -> None:
        self._counter = CompileCounterWithBackend(backend)
        self._step = work.step(module, torch.compile(module, fullgraph=True, backend=self._counter))
        self.seconds: dict[str, float] = {}
        self.graphs: dict[str, int] = {}

    def note(self, stage: str) -> None:
        """Train a few steps, and note what that compiled."""
        before = self._counter.frame_count
        self.seconds[stage] = self.seconds.get(stage, 0.0) + first_step_seconds(self._step)
        self.graphs[stage] = self.graphs.get(stage, 0) + self._counter.frame_count - before


def measure(work: Workload, slots: int, backend: str) -> Iterator[Row]:
    """Yield the rows of one host: a life in each of ``slots`` slots, one after the other."""
    part = f"{work.kind}, compiling"
    progress(f"{part}: bare host")
    torch._dynamo.reset()
    bare = Life(work, work.host(), backend)
    bare.note("bare")
    model = work.model(slots)
    # The gates' evaluator runs the model as it is, not compiled: what is counted is the training step.
    model.evaluate_with(lambda: work.losses(model(work.inputs)))
    life = Life(work, model, backend)
    life.note("DORMANT")
    for number, name in enumerate(model.slots):
        before = sum(life.graphs.values()), sum(life.seconds.values())
        for stage in (s for s in SeedStage if SeedStage.GERMINATED <= s <= SeedStage.FOSSILIZED):
            progress(f"{part}: slot {number + 1} of {slots}, {stage.name}")
            work.walk(model, name, stage)
            life.note(stage.name)
            if stage is SeedStage.BLENDING:
                for alpha in ALPHAS:
                    model.slots[name].set_alpha(alpha)
                    life.note("BLENDING")
        graphs, seconds = sum(life.graphs.values()) - before[0], sum(life.seconds.values()) - before[1]
        if number == 0:
            graphs, seconds = graphs + before[0], seconds + before[1]
        ratio = seconds / bare.seconds["bare"]
        by_stage = ", ".join(f"{stage} {n}" for stage, n in life.graphs.items() if n) if number == 0 else ""
        yield Row(
            part,
            f"life of a seed in slot {number + 1}: {graphs} graphs",
            "first step of the bare host",
            (ratio, ratio, ratio),
            unit=f"{bare.seconds['bare']:.1f} s",
            note=by_stage,
        )


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = arguments_of(__doc__, rounds=1)
    parser.add_argument("--hosts", default="cnn,transformer", help="which hosts (default: %(default)s)")
    parser.add_argument(
        "--slots", type=int, default=1, help="lives, one after the other (default: %(default)s)"
    )
    parser.add_argument(
        "--backend",
        default="inductor",
        help="what compiles; eager counts graphs alone (default: %(default)s)",
    )
    options = parser.parse_args(arguments)
    device = device_of(options)
    size = SIZES["tiny" if options.fast else "small"]
    end = time.monotonic() + options.budget
    rows = (
        row
        for kind in options.hosts.split(",")
        if time.monotonic() < end
        for row in measure(Workload(kind, size, device), options.slots, options.backend)
    )
    with (
        torch._dynamo.config.patch(recompile_limit=10**3, accumulated_recompile_limit=10**3),
        torch._inductor.config.patch(force_disable_caches=True),
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        report(command_line("benchmarks.compilation", arguments), device, options, rows)


if __name__ == "__main__":
    main()
