"""What a step of an environment of kasmina-rl costs: ``python -m benchmarks environment``.

A step is one action and one epoch. It is compared with an epoch of the host alone, and with the training that is in it,
of the model with its seeds. Each round plays an episode of its own: at random, while the host alone is trained beside
it; at random again, and by the plateau policy, when that is known. It needs the package kasmina-rl.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator, Sequence
from importlib import import_module
from typing import Any, Final

from benchmarks.timing import Row, arguments_of, command_line, device_of, progress, quartiles, report
from kasmina_core import Arm

GOAL: Final = 1.6
GOAL_STEPS: Final = 40
"""Steps per CPU second, of Toy."""

EPOCHS: Final = 20
"""Epochs of the host alone that are timed in a round."""


class Training:
    """Time that arms spend in training while it is entered."""

    def __enter__(self) -> Training:
        self.seconds, self._train = 0.0, Arm.train_epoch

        def timed(arm: Arm, *rest: Any) -> float | None:
            began = time.process_time()
            loss = self._train(arm, *rest)
            self.seconds += time.process_time() - began
            return loss

        Arm.train_epoch = timed  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: object) -> None:
        Arm.train_epoch = self._train  # type: ignore[method-assign]


def rows(name: str, rounds: int, *, fast: bool, whole_heap: bool) -> Iterator[Row]:
    """Measure the rows of one environment."""
    playing = import_module("kasmina_rl.playing")
    env = import_module("kasmina_rl").GrowEnv(preset=name, epochs=4 if fast else None)
    plays = {
        "random play, hosts alone trained with it": lambda: playing.RandomPlayer(0),
        "random play, hosts alone known": lambda: playing.RandomPlayer(0),
        "the plateau policy, hosts alone known": playing.plateau,
    }
    found: dict[str, list[tuple[float, float, float]]] = {case: [] for case in plays}
    for episode in range(-1, rounds):
        if episode == 0 and not whole_heap:
            gc.freeze()
        progress(f"{name}: round {episode + 1} of {rounds}")
        bare = env.start(max(episode, 0))
        bare.train_epoch()
        for case, player in plays.items():
            with Training() as training:
                began = time.process_time()
                steps = playing.play(env, player(), 1_000_000 + episode).steps
                seconds = (time.process_time() - began) / steps
            began = time.process_time()
            for _ in range(EPOCHS):
                bare.train_epoch()
            epoch = (time.process_time() - began) / EPOCHS
            if episode >= 0:  # the one before is for what is done once in a process
                found[case].append((seconds, epoch, training.seconds / steps))
    for case, times in found.items():
        each = quartiles([seconds for seconds, _, _ in times])[0]
        note = f"{1 / each:.0f} steps per CPU second"
        if name == "toy":
            note += f" (goal {GOAL_STEPS}: {'yes' if 1 / each >= GOAL_STEPS else 'no'})"
        ratio = quartiles([seconds / epoch for seconds, epoch, _ in times])
        unit = f"{quartiles([epoch for _, epoch, _ in times])[0] * 1e3:.3g} ms"
        yield Row(f"a step of {name}", case, "an epoch of the host alone", ratio, GOAL, unit, note)
        if all(trained for _, _, trained in times):
            ratio = quartiles([seconds / trained for seconds, _, trained in times])
            unit = f"{quartiles([trained for _, _, trained in times])[0] * 1e3:.3g} ms"
            yield Row(f"a step of {name}", case, "the training in it", ratio, None, unit)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = arguments_of(__doc__, rounds=7)
    parser.add_argument("--env", action="append", choices=("toy", "digits", "chars"), help="default: toy")
    parser.add_argument(
        "--whole-heap",
        action="store_true",
        help="let germinations look for schedulers among all objects, as in a program that does not call gc.freeze()",
    )
    options = parser.parse_args(arguments)
    device = device_of(options)
    if device.type != "cpu":
        raise SystemExit("The environments compute on the CPU; leave out --device.")
    try:
        import_module("kasmina_rl.playing")
    except ImportError as error:
        raise SystemExit(f"This benchmark needs kasmina-rl: {error}") from error
    if options.fast:
        options.rounds = 2
    made = (
        row
        for name in options.env or ["toy"]
        for row in rows(name, options.rounds, fast=options.fast, whole_heap=options.whole_heap)
    )
    report(command_line("benchmarks environment", arguments), device, options, made)


if __name__ == "__main__":
    main()
