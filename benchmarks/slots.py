"""What many slots, seeds and host tensors cost outside of a step: ``python -m benchmarks.slots``.

The host is a row of small linear blocks with a slot behind each, and 20,000 further parameters where the case says so.
Four times the slots may take four times as long, and five times the seeds five times. Tensors of the host are walked over
once, for the size of the host and for whose parameters are whose: 5 ms for 20,000, and 10 in an epoch, are good enough.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Final

import torch
from torch import Tensor, nn

from benchmarks.timing import Clock, Row, Step, arguments_of, command_line, device_of, report
from kasmina_core import InjectionPoint, MorphogeneticModel, SeedStage, Topology

GOAL: Final = 1.1
DIM: Final = 4


class Blocks(nn.Module):
    """Linear blocks in a row, and parameters that take no part in what it computes."""

    def __init__(self, blocks: int, beside: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(nn.Linear(DIM, DIM) for _ in range(blocks)))
        self.beside = nn.ParameterList(torch.zeros(1) for _ in range(beside))

    def forward(self, x: Tensor) -> Tensor:
        """Return the last block's features, ``(b, d)``."""
        out: Tensor = self.blocks(x)
        return out


def model_of(slots: int, seeds: int = 0, beside: int = 0) -> MorphogeneticModel:
    """Return a model with so many slots, seeds that incubate, and further parameters of the host."""
    points = [InjectionPoint(f"slot{i}", f"blocks.{i}", DIM, Topology.VECTOR) for i in range(slots)]
    model = MorphogeneticModel(Blocks(slots, beside), points, example=torch.randn(3, DIM))
    for name in list(model.slots)[:seeds]:
        model.germinate(name, "norm")
        while model.slots[name].stage is not SeedStage.TRAINING:
            if not (result := model.advance_stage(name)):
                raise RuntimeError(f"'{name}' stays where it is: {result}")
    return model


def measure(clock: Clock, few: int, tensors: int) -> list[Row]:
    """Return the rows: of ``few`` and four times as many slots, and of a host with so many further parameters."""
    many, part = 4 * few, "outside of a step"

    def row(case: str, over: str, step: Step, by: Step, times: int = 1) -> Row:
        goal = GOAL if times > 1 else None
        return clock.row(part, case, over, step, [lambda: [by() for _ in range(times)]], goal)

    rows = [
        row(
            f"MorphogeneticModel(...), {many} slots",
            f"4 times {few} slots",
            partial(model_of, many),
            partial(model_of, few),
            4,
        )
    ]
    more = f"{tensors:,} tensors of the host more"
    small, large, wide = model_of(few), model_of(many), model_of(many, beside=tensors)
    calls = {"observe()": MorphogeneticModel.observe, "summary_table()": MorphogeneticModel.summary_table}
    for name, call in calls.items():
        on = partial(call, large)
        rows += [
            row(f"{name}, {many} slots", f"4 times {few} slots", on, partial(call, small), 4),
            row(f"{name}, {many} slots, {more}", "without those tensors", partial(call, wide), on),
        ]
    fifth = few // 5
    epochs = [
        partial(model.step_epoch, 1.0)
        for model in (
            model_of(few, few),
            model_of(few, fifth),
            model_of(few, 1, tensors),
            model_of(few, 1),
        )
    ]
    return [
        *rows,
        row(f"step_epoch(), {few} seeds", f"5 times {fifth} seeds", epochs[0], epochs[1], 5),
        row(f"step_epoch(), 1 seed, {more}", "without those tensors", epochs[2], epochs[3]),
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = arguments_of(__doc__, rounds=5)
    options = parser.parse_args(arguments)
    device = device_of(options)
    few, tensors = (5, 20) if options.fast else (50, 20_000)
    options.rounds = 2 if options.fast else options.rounds
    clock = Clock(device, options.rounds, options.budget)
    report(command_line("benchmarks.slots", arguments), device, options, measure(clock, few, tensors))


if __name__ == "__main__":
    main()
