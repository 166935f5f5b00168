"""What slots and seeds cost in a training step, in time and memory, as ratios: ``python -m benchmarks.costs``.

Two hosts of twelve blocks, a residual CNN and the bundled Transformer, with 1, 3 and 12 slots, eager and compiled:

- dormant slots, over the bare host; 0 slots is a second bare host, so its ratio is the noise;
- seeds in TRAINING, over the host's step and the seeds' alone, each timed apart;
- seeds in BLENDING and FOSSILIZED, over the same seeds written into the host by hand;
- one seed among empty slots, over the same model with its slot alone.

A step is forward, backward and AdamW; in a grown model ``incubate`` and ``step`` too. Each ratio is of neighbours in one
round, the fastest of three turns each.
"""

from __future__ import annotations

import argparse
import gc
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Final

import torch
from torch import nn

from benchmarks.timing import (
    Clock,
    Row,
    Step,
    arguments_of,
    command_line,
    device_of,
    peak_allocated,
    peak_bytes,
    progress,
    report,
)
from benchmarks.workloads import SIZES, Size, Workload, seeds_of
from kasmina_core import GradientIsolationMonitor, Incubation, MorphogeneticModel, SeedStage

GOAL_DORMANT: Final = {"eager": 1.01, "compiled": 1.00}
GOAL_TRAINING: Final = 1.05
GOAL_BY_HAND: Final = 1.02
GOAL_ONE_ACTIVE: Final = 1.02
GOAL_STRAIGHT: Final = 1.10
GOAL_JOINT: Final = {3: 1.5, 12: 1.4}
STAGES: Final = (SeedStage.FOSSILIZED, SeedStage.BLENDING)
MIB: Final = 2**20
MILLIONS: Final = Size(width=16, image=8, images=2, dim=832, length=32, sequences=2)
"""A Transformer of 100 million parameters."""


def _many(count: int, what: str) -> str:
    return f"{count} {what}{'s' if count != 1 else ''}"


class Costs:
    """The rows of one host, eager or compiled.

    Args:
        work: The host and its batch.
        clock: Takes the time.
        compiled: Whether hosts, models and seeds on their own are compiled.
        counts: Numbers of slots.
        only: Measure the cases with this in their names.
    """

    def __init__(
        self, work: Workload, clock: Clock, compiled: bool, counts: Sequence[int], only: str = ""
    ) -> None:
        self.work, self.clock, self.counts, self.only = work, clock, counts, only
        self.mode = "compiled" if compiled else "eager"
        self.part = f"{work.kind}, {self.mode}"

    def rows(self) -> Iterator[Row]:
        """Measure one row after another."""
        for row in self._all():
            if row is not None:
                yield row

    def _all(self) -> Iterator[Row | None]:
        yield from self.dormant()
        for stage in STAGES:
            yield from self.by_hand(stage)
        yield from self.one_active()
        yield from self.straight_through()
        if self.mode == "eager":
            yield from self.counterfactual()
            yield self.isolation()

    def dormant(self) -> Iterator[Row | None]:
        """Yield the rows of slots without seeds."""
        for count in (0, *self.counts):

            def build(count: int = count) -> tuple[Step, ...]:
                module = self.work.model(count) if count else self.work.host()
                return self._step(module), self._step(self.work.host())

            yield self._row(
                f"{_many(count, 'slot')}, dormant",
                "bare host",
                build,
                GOAL_DORMANT[self.mode] if count else None,
            )

    def by_hand(self, stage: SeedStage) -> Iterator[Row | None]:
        """Yield the rows of seeds that contribute, over the same by hand."""
        for count in self.counts:

            def build(count: int = count) -> tuple[Step, ...]:
                model = self.work.grown(count, stage)
                return self._step(model), self._step(self.work.by_hand(seeds_of(model), stage))

            yield self._row(
                f"{_many(count, 'seed')} in {stage.name}", "the same by hand", build, GOAL_BY_HAND
            )

    def one_active(self) -> Iterator[Row | None]:
        """Yield the rows of one seed where all other slots are empty, over the same model with its slot alone."""
        most = max(self.counts)
        if most == 1:
            return
        for stage in (*STAGES, SeedStage.TRAINING):

            def build(stage: SeedStage = stage) -> tuple[Step, ...]:
                models = self.work.model(most), self.work.model(1)
                for model in models:
                    model.evaluate_with(lambda model=model: self.work.losses(model(self.work.inputs)))
                    self.work.walk(model, list(model.slots)[-1], stage)
                return tuple(self._step(model) for model in models)

            case = f"{_many(most, 'slot')}, one in {stage.name}"
            yield self._row(case, "1 slot", build, GOAL_ONE_ACTIVE)

    def straight_through(self) -> Iterator[Row | None]:
        """Yield the rows of seeds that learn in the host's own pass."""
        for count in self.counts:

            def build(count: int = count) -> tuple[Step, ...]:
                model = self.work.grown(count, SeedStage.TRAINING)
                return self._step(model), self._step(self.work.host()), self._alone(model)

            case = f"{_many(count, 'seed')} in straight-through TRAINING"
            yield self._row(case, "host + seeds alone", build, GOAL_TRAINING)

            def beside(count: int = count) -> tuple[Step, ...]:
                model = self.work.grown(count, SeedStage.TRAINING)
                twin = self.work.by_hand(seeds_of(model), SeedStage.TRAINING, straight=True)
                return self._step(model), self._step(twin)

            yield self._row(case, "the same by hand, without a bound", beside, GOAL_STRAIGHT)

    def counterfactual(self) -> Iterator[Row | None]:
        """Yield the rows of seeds that learn in a pass of their own: it is one more of the host for each of them."""
        for count in self.counts:
            for over in ("host + the passes by hand", "host + seeds alone"):

                def build(count: int = count, over: str = over) -> tuple[Step, ...]:
                    model = self.work.grown(count, SeedStage.TRAINING, Incubation.COUNTERFACTUAL)
                    by_hand = over == "host + the passes by hand"
                    beside = (
                        self.work.counterfactual_by_hand(seeds_of(model)) if by_hand else self._alone(model)
                    )
                    return self._step(model), self._step(self.work.host()), beside

                case = f"{_many(count, 'seed')} in counterfactual TRAINING"
                yield self._row(case, over, build, GOAL_TRAINING)
            if count > 1:

                def joint(count: int = count) -> tuple[Step, ...]:
                    model = self.work.grown(count, SeedStage.TRAINING, Incubation.COUNTERFACTUAL, joint=True)
                    return self._step(model), self._step(self.work.host()), self._alone(model)

                case = f"{_many(count, 'seed')} in joint counterfactual TRAINING"
                yield self._row(case, "host + seeds alone", joint, GOAL_JOINT.get(count))

    def isolation(self) -> Row | None:
        """Return the row of one measurement of isolation, of which there is one in a hundred steps."""

        def build() -> tuple[Step, ...]:
            model = self.work.grown(1, SeedStage.TRAINING)
            slot = next(iter(model.slots.values()))
            monitor = GradientIsolationMonitor(model.host.named_parameters())
            return lambda: monitor.measure(slot), self._step(self.work.host())

        return self._row("one measurement of isolation", "bare host", build)

    def _row(
        self, case: str, over: str, build: Callable[[], tuple[Step, ...]], goal: float | None = None
    ) -> Row | None:
        if self.only not in case:
            return None
        if self.clock.is_over:
            return Row(self.part, case, over, None, goal)
        progress(f"{self.part}: {case}")
        numerator, *denominators = build()
        return self.clock.row(self.part, case, over, numerator, denominators, goal)

    def _step(self, module: nn.Module) -> Step:
        return self.work.step(module, self._compiled(module))

    def _alone(self, model: MorphogeneticModel) -> Step:
        return self.work.seeds_alone(seeds_of(model), self._compiled)

    def _compiled(self, module: nn.Module) -> Callable[..., torch.Tensor]:
        return torch.compile(module, fullgraph=True) if self.mode == "compiled" else module


def memory(work: Workload, clock: Clock, counts: Sequence[int]) -> Iterator[Row]:
    """Yield the rows of memory: the most that a step takes, weights and optimiser included, eager."""

    def row(case: str, over: str, goal: float, numerator: Callable[[], Step], by: Callable[[], Step]) -> Row:
        part = f"{work.kind}, memory"
        if clock.is_over:
            return Row(part, case, over, None, goal)
        progress(f"{part}: {case}")
        sizes = []
        for build in (numerator, by):
            gc.collect()
            sizes.append(peak_bytes(work.device, build))
        ratio = sizes[0] / sizes[1]
        return Row(part, case, over, (ratio, ratio, ratio), goal, f"{sizes[1] / MIB:.3g} MiB")

    def host() -> Step:
        return work.step(work.host())

    host()()  # libraries take their workspaces at first use
    for count in counts:
        dormant = f"{_many(count, 'slot')}, dormant"
        yield row(dormant, "bare host", GOAL_DORMANT["eager"], lambda c=count: work.step(work.model(c)), host)
    for stage in (*STAGES, SeedStage.TRAINING):
        for count in counts:
            seeds = seeds_of(work.grown(count, stage))
            twin_stage = SeedStage.FOSSILIZED if stage is SeedStage.TRAINING else stage

            def grown(count: int = count, stage: SeedStage = stage) -> Step:
                return work.step(work.grown(count, stage))

            def twin(seeds: list[nn.Module] = seeds, stage: SeedStage = twin_stage) -> Step:
                return work.step(work.by_hand(seeds, stage))

            over = "the same by hand" if stage is twin_stage else "fossils by hand"
            goal = GOAL_BY_HAND if stage is twin_stage else GOAL_TRAINING
            yield row(f"{_many(count, 'seed')} in {stage.name}", over, goal, grown, twin)


def memory_of_growing(work: Workload, clock: Clock) -> Iterator[Row]:
    """Yield the rows of what a germination and a gate hold beside the host, over the bytes of its parameters."""
    part = f"{work.kind}, memory of growing"
    if clock.is_over:
        yield Row(part, "germination", "the host's parameters", None)
        return
    model = work.model(1)
    model.evaluate_with(lambda: work.losses(model(work.inputs)))
    name = next(iter(model.slots))
    size = sum(p.nbytes for p in model.host.parameters())
    moves: dict[str, Step] = {
        "germination": lambda: model.germinate(name, work.blueprint),
        "gate into TRAINING": lambda: work.walk(model, name, SeedStage.TRAINING),
        "gate into BLENDING": lambda: work.walk(model, name, SeedStage.BLENDING),
        "gate into SHADOWING": lambda: work.walk(model, name, SeedStage.SHADOWING),
    }
    for case, move in moves.items():
        progress(f"{part}: {case}")
        ratio = peak_allocated(move) / size
        yield Row(part, case, "the host's parameters", (ratio, ratio, ratio), unit=f"{size / MIB:.3g} MiB")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = arguments_of(__doc__, rounds=15)
    parser.add_argument("--hosts", default="cnn,transformer", help="which hosts (default: %(default)s)")
    parser.add_argument(
        "--modes", default="eager,compiled,memory", help="what to measure (default: %(default)s)"
    )
    parser.add_argument("--counts", default="1,3,12", help="numbers of slots (default: %(default)s)")
    parser.add_argument("--only", default="", help="of steps, those with this in their name, such as dormant")
    parser.add_argument("--size", choices=SIZES, help="default: small on the CPU, large on CUDA")
    options = parser.parse_args(arguments)
    device = device_of(options)
    if options.fast:
        options.rounds, options.counts = 2, "1"
    size = options.size or ("tiny" if options.fast else "small" if options.device == "cpu" else "large")
    clock = Clock(device, options.rounds, options.budget)
    rows = measure(options, clock, SIZES[size])
    # Every model that is compiled is one more set of graphs for the same code.
    with (
        torch._dynamo.config.patch(recompile_limit=10**4, accumulated_recompile_limit=10**4),
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        report(command_line("benchmarks.costs", arguments), device, options, rows, size=size)


def measure(options: argparse.Namespace, clock: Clock, size: Size) -> Iterator[Row]:
    """Yield the rows that were asked for."""
    counts = [int(count) for count in options.counts.split(",")]
    for mode in options.modes.split(","):
        for kind in options.hosts.split(","):
            torch._dynamo.reset()
            work = Workload(kind, size, clock.device)
            if mode == "memory":
                yield from memory(work, clock, counts)
                if kind == "transformer" and clock.device.type == "cpu":
                    large = size if options.fast else MILLIONS
                    yield from memory_of_growing(Workload(kind, large, clock.device), clock)
            else:
                yield from Costs(work, clock, mode == "compiled", counts, options.only).rows()


if __name__ == "__main__":
    main()
