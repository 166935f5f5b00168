"""What it costs an optimiser that seeds come and go: ``python -m benchmarks.handover``.

One event is a germination and a cull in a host of twelve blocks. With ``tie_optimizer`` it is compared with the same
event and the parameter group added and taken out by hand; and with a training step, to know how much an event is. A
parameter group for each seed is compared with one group for all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

import torch

from benchmarks.timing import Clock, Row, Step, arguments_of, command_line, device_of, report
from benchmarks.workloads import SIZES, Workload
from kasmina_core import MorphogeneticModel, SeedStage, tie_optimizer

GOAL: Final = 1.1


class Handover:
    """The rows of one host.

    Args:
        work: The host and its batch.
        clock: Takes the time.
    """

    def __init__(self, work: Workload, clock: Clock) -> None:
        self.work, self.clock = work, clock

    def rows(self) -> Iterator[Row]:
        """Measure one row after another."""
        part = f"{self.work.kind}, optimiser"
        tied, by_hand = self.event(tied=True), self.event(tied=False)
        event = "germination and cull, optimiser tied"
        yield self.clock.row(part, event, "groups by hand", tied, [by_hand], GOAL)
        yield self.clock.row(part, event, "a training step", tied, [self.work.step(self.work.host())])
        grown = self.work.grown(12, SeedStage.FOSSILIZED)
        several = self.stepping(grown, tie_optimizer(grown, torch.optim.AdamW(grown.host_parameters(), 1e-4)))
        one = self.stepping(grown, torch.optim.AdamW(grown.parameters(), 1e-4))
        yield self.clock.row(part, "AdamW step, a group for each of 12 seeds", "one group", several, [one])

    def event(self, tied: bool) -> Step:
        """Return one germination and cull; the optimiser steps in between, so that there is state to drop."""
        model = self.work.model(12, embargo_epochs=0)
        name = next(iter(model.slots))
        optimizer = torch.optim.AdamW(model.host_parameters(), 1e-4)
        if tied:
            tie_optimizer(model, optimizer)

        def run() -> None:
            model.germinate(name, self.work.blueprint)
            seed = model.seed_parameters(name)
            if not tied:
                optimizer.add_param_group({"params": seed})
            for parameter in seed:
                parameter.grad = torch.zeros_like(parameter)
            optimizer.step()
            model.cull(name)
            if not tied:
                del optimizer.param_groups[-1]
                for parameter in seed:
                    del optimizer.state[parameter]
            while model.slots[name].state is not None:
                model.step_epoch()

        return run

    def stepping(self, model: MorphogeneticModel, optimizer: torch.optim.Optimizer) -> Step:
        """Return a step of an optimiser alone, with gradients that stay."""
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        return optimizer.step


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = arguments_of(__doc__, rounds=11)
    options = parser.parse_args(arguments)
    device = device_of(options)
    if options.fast:
        options.rounds = 2
    clock = Clock(device, options.rounds, options.budget)
    size = SIZES["tiny" if options.fast else "small"]
    rows = (
        row for kind in ("cnn", "transformer") for row in Handover(Workload(kind, size, device), clock).rows()
    )
    report(command_line("benchmarks.handover", arguments), device, options, rows)


if __name__ == "__main__":
    main()
