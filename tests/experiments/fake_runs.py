"""Runs made up for the tests of the display and the report."""

from __future__ import annotations

import math

from kasmina_core.experiments.record import (
    GROWN,
    HOST_ALONE,
    ArmResult,
    EpochRecord,
    EpochSlot,
    RunRecord,
    SeedRecord,
)

# Stage of each slot at the end of epochs 1, 2, …; one letter an epoch.
_LETTERS = {
    "d": "DORMANT",
    "g": "GERMINATED",
    "t": "TRAINING",
    "b": "BLENDING",
    "s": "SHADOWING",
    "p": "PROBATIONARY",
    "f": "FOSSILIZED",
    "c": "CULLED",
    "e": "EMBARGOED",
    "r": "RESETTING",
}
_LIVES = {
    "block1": ("dddddddgttttbbbbbssppp" + "f" * 18, ["kasmina-cnn:conv_small"]),
    "block2": ("ddddddddddgttttttcerddgttttbbbbsspppffff", ["kasmina-cnn:norm", "kasmina-cnn:attention"]),
    "block3": ("d" * 30 + "gttttttbbb", ["kasmina-cnn:bottleneck"]),
}


def fake_run(epochs: int = 40) -> RunRecord:
    """Return a run of three slots: two seeds kept, one culled, one unfinished."""
    record = RunRecord(
        "digits",
        "accuracy",
        "kasmina-cnn:small",
        {"task": "digits", "seed": 0, "lr": 0.01, "slots": ["block1"]},
    )
    flops = 0.0
    loss = 2.3
    for epoch in range(1, epochs + 1):
        slots = []
        parameters, speed, floor = 338, 0.1, 0.52
        for name, (letters, blueprints) in _LIVES.items():
            letter = letters[epoch - 1]
            births = letters[:epoch].count("g")
            blueprint = blueprints[births - 1] if births and letter not in "dcer" else ""
            ramp = letters.find("b")
            alpha = 0.0
            if letter == "b":
                alpha = min(1.0, (epoch - ramp) / letters.count("b"))
            elif letter in "spf":
                alpha = 1.0
            floor -= 0.14 * alpha
            parameters += 588 if blueprint else 0
            gain = None if letter in "dg" or not blueprint else 0.02 + 0.1 * alpha
            slots.append(EpochSlot(name, _LETTERS[letter], blueprint, alpha, gain))
        loss += speed * (floor - loss) + 0.012 * math.sin(2.1 * epoch)
        flops += 4e8 * (1 + parameters / 1000)
        gate = "G2 block1: passed, gain +0.0312 above 0.02" if epoch == 12 else ""
        if epoch == 17:
            gate = "G2 block2: failed, gain -0.0040 is not above 0.02"
        record.epochs.append(
            EpochRecord(epoch, 0.95 * loss, loss, 1 - loss / 4, parameters, flops, tuple(slots), gate)
        )
    spent, loss, epoch = 0.0, 2.3, 0
    while spent < flops:
        epoch += 1
        loss += 0.1 * (0.52 - loss) + 0.01 * math.sin(1.7 * epoch)
        spent += 4e8 * 1.338
        record.baseline.append(EpochRecord(epoch, 0.97 * loss, loss, 1 - loss / 4, 338, spent))
    record.seeds = [
        SeedRecord(
            "seed-1",
            "block1",
            "kasmina-cnn:conv_small",
            "fossilized",
            8,
            23,
            [("GERMINATED", 8)],
            588,
            0.121,
            0.094,
            0.148,
            "G5 passed: gain +0.121 above 0.02 in three epochs",
        ),
        SeedRecord(
            "seed-2",
            "block2",
            "kasmina-cnn:norm",
            "culled",
            11,
            18,
            [("GERMINATED", 11)],
            588,
            -0.004,
            -0.011,
            0.003,
            "no gain after six epochs of training",
        ),
        SeedRecord(
            "seed-3",
            "block2",
            "kasmina-cnn:attention",
            "fossilized",
            23,
            37,
            [("GERMINATED", 23)],
            588,
            0.052,
            0.031,
            0.073,
            "G5 passed: gain +0.052 above 0.02 in three epochs",
        ),
        SeedRecord(
            "seed-4", "block3", "kasmina-cnn:bottleneck", "unfinished", 31, None, [("GERMINATED", 31)], 588
        ),
    ]
    record.arms = [
        ArmResult(GROWN, 2102, flops, epochs, 0.221, 0.2190, 0.935, 61.2),
        ArmResult(HOST_ALONE, 338, spent, epoch, 0.523, 0.5240, 0.841, 55.0),
    ]
    return record
