"""A process that disagrees, is missing or is killed ends all of them with the reason; nothing hangs."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from numeric_helpers import ConvSeed, cnn_host, cnn_model, grow_to, images, labels
from ranks import PATIENCE, Outcomes, checks_in, environment, everywhere, on_each_rank, run_checks

from kasmina_core import (
    BlueprintRegistry,
    BlueprintSpec,
    DistributedError,
    GateThresholds,
    GerminationError,
    KasminaError,
    QualityGates,
    SeedStage,
    Topology,
    TransitionError,
    distribute,
)

SECOND = 1.0


@on_each_rank
def other_command_is_named_on_both_ranks(rank: int) -> None:
    model = cnn_model()
    distribute(model)
    grow_to(model, "norm", SeedStage.TRAINING)
    with pytest.raises(DistributedError) as caught:
        model.cull("norm") if rank == 0 else model.step_epoch()
    assert re.search(
        r"not at the same place.\n  rank 0: cull\('norm'.*\n  rank 1: step_epoch \(number", str(caught.value)
    )
    assert model.slots["norm"].stage is SeedStage.TRAINING
    with pytest.raises(DistributedError, match="not at the same place"):
        model.step_epoch()


@on_each_rank
def other_argument_is_named_on_both_ranks(rank: int) -> None:
    model = cnn_model()
    distribute(model)
    grow_to(model, "norm", SeedStage.BLENDING)
    with pytest.raises(
        DistributedError, match=r"rank 0: set_alpha\('norm', 0.25\).*\n  rank 1: .*'norm', 0.5\)"
    ):
        model.slots["norm"].set_alpha([0.25, 0.5][rank])
    assert model.slots["norm"].alpha == 0.5


@on_each_rank
def stage_alpha_seed_and_count_that_differ_are_named(rank: int) -> None:
    saved = cnn_model()
    with pytest.warns(UserWarning, match="one of 2 processes"):
        grow_to(saved, "norm", SeedStage.BLENDING, alpha=0.25)
    with pytest.warns(UserWarning, match="one of 2 processes"):
        saved.germinate("norm2", "norm")
    model = cnn_model()
    distribute(model)
    if rank == 1:
        model.load_state_dict(saved.state_dict())
    with pytest.raises(DistributedError) as caught:
        model.step_epoch()
    text = str(caught.value)
    for line in (
        "slot 'norm', stage\n  rank 0: DORMANT\n  rank 1: BLENDING",
        "slot 'norm', alpha\n  rank 0: nothing\n  rank 1: 0.25",
        "slot 'norm', seed\n  rank 0: nothing\n  rank 1: norm-1 from tiny:conv",
        "slot 'norm', germinations\n  rank 0: 0\n  rank 1: 1",
    ):
        assert line in text
    assert model.epoch == 0


@on_each_rank
def hosts_slots_and_settings_that_differ_are_named(rank: int) -> None:
    strict = QualityGates(thresholds=GateThresholds(min_gain=0.5))
    for one, other, line in (
        (
            lambda: cnn_model(cnn_host(4)),
            lambda: cnn_model(cnn_host(6)),
            "slot 'norm', width\n  rank 0: 4\n  rank 1: 6",
        ),
        (cnn_model, lambda: cnn_model(slots=("norm",)), "  rank 1: norm (cnn)"),
        (cnn_model, lambda: cnn_model(seed=1), "config.seed\n  rank 0: 0\n  rank 1: 1"),
        (lambda: cnn_model(gates=QualityGates()), lambda: cnn_model(gates=strict), "min_gain=0.5"),
    ):
        with pytest.raises(DistributedError, match="disagree at distribute") as caught:
            distribute((other if rank else one)())
        assert line in str(caught.value)


@on_each_rank
def other_version_of_a_pack_refuses_the_germination(rank: int) -> None:
    registry = BlueprintRegistry()
    spec = BlueprintSpec("conv", Topology.CNN, ConvSeed, lambda d: 9 * d * d + d)
    registry.register(spec, pack="tiny", distribution="tiny-seeds", version=f"1.{rank}")
    model = cnn_model(seeds=registry)
    distribute(model)
    with pytest.raises(GerminationError) as caught:
        model.germinate("norm", "conv")
    assert "rank 0: tiny:conv of tiny-seeds 1.0\n  rank 1: tiny:conv of tiny-seeds 1.1" in str(caught.value)
    assert model.slots["norm"].stage is SeedStage.DORMANT


@on_each_rank
def seed_whose_weights_went_apart_is_named_with_what_to_do(rank: int) -> None:
    model = cnn_model()
    distribute(model)
    grow_to(model, "norm", SeedStage.TRAINING)
    with torch.no_grad():
        model.slots["norm"].seed.conv.bias[0] += 1e-3 * rank
    with pytest.raises(
        DistributedError, match=r"(?s)'norm', checksum of weights.*averaged in model.step\(\)"
    ):
        model.step_epoch()


@on_each_rank
def evaluator_on_one_rank_only_is_named(rank: int) -> None:
    model = cnn_model()
    distribute(model)
    if rank == 1:
        model.evaluate_with(None)
    with pytest.raises(DistributedError, match="evaluator\n  rank 0: True\n  rank 1: False"):
        model.germinate("norm", "conv")


@on_each_rank
def training_past_the_wrapper_is_an_error(rank: int) -> None:
    model = cnn_model()
    net = distribute(model)
    F.cross_entropy(net(images()), labels()).backward()
    model.step()
    F.cross_entropy(model(images()), labels()).backward()
    with pytest.raises(
        DistributedError, match=r"only the model was called.\nCall what distribute\(\) returned"
    ):
        model.step()


@on_each_rank
def command_that_no_rank_may_give_fails_as_in_one_process(rank: int) -> None:
    model = cnn_model()
    distribute(model)
    with pytest.raises(TransitionError, match="dormant"):
        model.cull("norm")
    with pytest.raises(KeyError, match="No blueprint"):
        model.germinate("norm", "nobody-offers-this")
    model.germinate("norm", "conv")
    with pytest.raises(GerminationError, match="not dormant"):
        model.germinate("norm", "conv")
    assert model.advance_stage("norm")


@on_each_rank
def wrong_argument_on_one_rank_is_refused_on_both_and_the_job_goes_on(rank: int) -> None:
    class Waiting:
        def decide(self, observation: object) -> list[object]:
            return []

    model = cnn_model()
    distribute(model)
    for right, wrong, error, kind in (
        (lambda: model.step_epoch(0.5), lambda: model.step_epoch("x"), TypeError, KasminaError),
        (
            lambda: model.germinate("norm", "conv"),
            lambda: model.germinate("no-such-slot", "conv"),
            KeyError,
            GerminationError,
        ),
        (
            lambda: model.germinate("norm", "conv"),
            lambda: model.germinate("norm"),
            TypeError,
            GerminationError,
        ),
        (lambda: model.follow(Waiting()), lambda: model.follow(Waiting), TypeError, KasminaError),
        (lambda: model.step_epoch(), lambda: model.cull("no-such-slot"), KeyError, KasminaError),
    ):
        for culprit in range(2):
            began = time.monotonic()
            with pytest.raises(error if rank == culprit else kind) as caught:
                (wrong if rank == culprit else right)()
            assert not isinstance(caught.value, DistributedError)
            if rank != culprit:
                assert re.search(
                    rf"refused on another rank; nothing was changed on any.\n  rank {culprit}: {error.__name__}",
                    str(caught.value).replace("UnknownNameError", "KeyError"),
                )
            assert time.monotonic() - began < PATIENCE / 2
            assert model.epoch == 0
            assert model.slots["norm"].stage is SeedStage.DORMANT
    model.germinate("norm", "conv")
    model.step_epoch(0.5)
    assert everywhere((model.epoch, model.slots["norm"].stage)) == [(1, SeedStage.TRAINING)] * 2


@on_each_rank
def wrong_argument_while_the_other_measures_ends_both_at_once(rank: int) -> None:
    model = cnn_model()
    distribute(model)
    grow_to(model, "norm", SeedStage.TRAINING)
    began = time.monotonic()
    with pytest.raises(KasminaError, match="no-such-slot"):
        model.measure("no-such-slot" if rank else "norm")
    assert time.monotonic() - began < PATIENCE / 2


@on_each_rank
def policy_that_raises_on_one_rank_ends_both(rank: int) -> None:
    class Fragile:
        def decide(self, observation: object) -> list[object]:
            if rank == 1:
                raise ZeroDivisionError("rank 1 divided by zero")
            return []

    model = cnn_model()
    distribute(model)
    with pytest.raises((DistributedError, ZeroDivisionError), match="rank 1 divided by zero"):
        model.follow(Fragile())
    if rank == 0:
        with pytest.raises(DistributedError):
            model.step_epoch()


@on_each_rank
def rank_that_comes_too_late_is_named_with_its_last_step(rank: int) -> None:
    model = cnn_model()
    distribute(model, timeout=SECOND)
    model.germinate("norm", "conv")
    dist.barrier()
    if rank == 1:
        time.sleep(3 * SECOND)
        with pytest.raises(DistributedError):
            model.step_epoch()
        return
    with pytest.raises(DistributedError) as caught:
        model.step_epoch()
    assert caught.value.missing == (1,)
    assert re.search(
        r"Rank 0 came to step_epoch \(number \d+\).*\n"
        r"  missing: rank 1, last at the end of germinate\('norm', 'conv', None[^)]*\) \(number",
        str(caught.value),
    ), str(caught.value)


@on_each_rank
def rank_that_never_calls_distribute_is_an_error(rank: int) -> None:
    if rank == 0:
        with pytest.raises(
            DistributedError, match=r"came to distribute\(\), but not every rank did within 1 s"
        ):
            distribute(cnn_model(), timeout=SECOND)
    everywhere(None)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    return run_checks(__file__, Path(tmp_path_factory.mktemp("disagreement")))


@pytest.mark.parametrize("check", checks_in(globals()))
def test_in_two_processes(outcomes: Outcomes, check: str) -> None:
    outcomes.require(check)


VICTIM = """
import os, sys, time, warnings
from pathlib import Path
import torch
from numeric_helpers import cnn_model, grow_to
from ranks import process_group
from kasmina_core import DistributedError, SeedStage, distribute
store, rank = Path(sys.argv[1]), int(sys.argv[2])
with process_group(store, rank):
    model = cnn_model()
    distribute(model, timeout=20.0)
    grow_to(model, "norm", SeedStage.TRAINING)
    print("pid", os.getpid(), flush=True)
    if rank == 1:
        time.sleep(60)
    sys.stdin.readline()
    try:
        model.step_epoch()
    except DistributedError as error:
        print("missing", error.missing, str(error).replace(chr(10), " "), flush=True)
        os._exit(7)
"""


def test_killed_process_ends_the_other_with_its_name(tmp_path: Path) -> None:
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", VICTIM, str(tmp_path / "store"), str(rank)],
            env=environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for process in ranks:
            seen: list[str] = []
            for line in process.stdout:
                seen.append(line)
                if line.startswith("pid"):
                    break
            else:
                raise AssertionError("".join(seen))
        os.kill(ranks[1].pid, signal.SIGKILL)
        ranks[1].wait()
        output, _ = ranks[0].communicate("go\n", timeout=60)
        assert ranks[0].returncode == 7, output
        assert "missing (1,) Rank 0 came to step_epoch" in output
        assert "missing: rank 1, last at" in output
    finally:
        for process in ranks:
            with process:  # closes its pipes
                process.kill()
