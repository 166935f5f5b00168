"""The recompile limit is foreseen: said before it is hit, with what to do, and not said without need."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from numeric_helpers import cnn_model, images
from torch import Tensor

from kasmina_core import MorphogeneticModel, RecompileLimitWarning, SeedStage
from kasmina_core.growth.watching.graphs import graphs_made

# Dynamo makes an instance of an autograd.Function while it traces one.
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Run:
    """A life in one slot after the other of a compiled model; what was said, and whether the limit was hit."""

    def __init__(
        self, limit: int, how: str, slots: tuple[str, ...], *, evaluates: bool, measures: bool
    ) -> None:
        self.said: list[str] = []
        self.was_hit = False
        model = cnn_model()
        call = _compiled(model, how)
        seen_by_gates = call if measures else lambda x: MorphogeneticModel.forward(model, x)
        model.evaluate_with(lambda: self.guarded(lambda: seen_by_gates(images()).flatten(1).mean(1)))
        with (
            torch._dynamo.config.patch(recompile_limit=limit),
            warnings.catch_warnings(record=True) as record,
        ):
            warnings.simplefilter("always", RecompileLimitWarning)
            self._record = record
            try:
                for slot in slots:
                    self._live(model, slot, call, evaluates)
            except torch._dynamo.exc.FailOnRecompileLimitHit:
                pass
            self.graphs = graphs_made()
        self.said = [str(w.message) for w in record if w.category is RecompileLimitWarning]

    def guarded(self, call: Callable[[], Tensor]) -> Tensor:
        """Note whether the limit was hit, which a gate takes for missing evidence, and what had been said by then."""
        try:
            return call()
        except torch._dynamo.exc.FailOnRecompileLimitHit:
            self.was_hit = True
            self.was_warned = any(w.category is RecompileLimitWarning for w in self._record)
            raise

    def _live(
        self, model: MorphogeneticModel, slot: str, call: Callable[..., Tensor], evaluates: bool
    ) -> None:
        place = model.slots[slot]

        def go() -> None:
            self.guarded(lambda: call(images())).sum().backward()
            if evaluates:
                model.eval()
                with torch.no_grad():
                    self.guarded(lambda: call(images()))
                model.train()

        go()
        model.germinate(slot, "conv")
        go()
        while place.stage is not SeedStage.FOSSILIZED:
            if place.stage is SeedStage.PROBATIONARY:
                place.step_epoch()
            if not model.advance_stage(slot):
                assert self.was_hit, str(place.last_gate)
                return
            go()
            if place.stage is SeedStage.BLENDING:
                for alpha in (0.1, 0.5, 1.0):
                    place.set_alpha(alpha)
                    go()


def _compiled(model: MorphogeneticModel, how: str) -> Callable[..., Tensor]:
    if how == "model.compile()":
        model.compile(fullgraph=True, backend="eager")
        return model
    if how == "torch.compile(model)":
        return torch.compile(model, fullgraph=True, backend="eager")
    return torch.compile(lambda x: model(x), fullgraph=True, backend="eager")  # the frame is the user's


WAYS = ("model.compile()", "torch.compile(model)", "a function of one's own")


@pytest.mark.parametrize(
    ("limit", "how", "evaluates", "measures"),
    [
        (2, WAYS[0], False, False),
        (3, WAYS[1], True, False),
        (4, WAYS[2], True, False),
        (3, WAYS[0], False, True),
        (4, WAYS[2], True, True),
    ],
)
def test_it_is_said_once_before_the_limit_is_hit(
    limit: int, how: str, evaluates: bool, measures: bool
) -> None:
    run = Run(limit, how, ("norm",), evaluates=evaluates, measures=measures)
    assert run.was_hit
    assert run.was_warned
    assert len(run.said) == 1
    assert f"recompile_limit: {limit}\n" in run.said[0]


@pytest.mark.parametrize(("evaluates", "measures"), [(False, False), (True, True)])
def test_it_is_not_said_where_the_limit_is_enough(evaluates: bool, measures: bool) -> None:
    unlimited = Run(99, WAYS[0], ("norm",), evaluates=evaluates, measures=measures)
    torch._dynamo.reset()
    slack = 1 if measures else 0
    run = Run(unlimited.graphs + slack, WAYS[0], ("norm",), evaluates=evaluates, measures=measures)
    assert run.graphs == unlimited.graphs
    assert not run.was_hit
    assert run.said == unlimited.said == []


def test_who_does_what_it_says_goes_on_to_the_end() -> None:
    run = Run(3, WAYS[0], ("norm",), evaluates=True, measures=False)
    assert run.was_hit
    setting, value = run.said[0].splitlines()[-1].split(" = ")
    assert setting == "torch._dynamo.config.recompile_limit"
    torch._dynamo.reset()
    again = Run(int(value), WAYS[0], ("norm",), evaluates=True, measures=False)
    assert not again.was_hit
    assert again.said == []


def test_numbers_in_the_message_are_those_of_torch() -> None:
    model = cnn_model()
    model.compile(fullgraph=True, backend="eager")
    with torch._dynamo.config.patch(recompile_limit=1):
        model(images())
        model.germinate("norm", "conv")  # still the host's features: no new graph
        with pytest.warns(
            RecompileLimitWarning, match=r"made:     1\n  expected next:   1\n  recompile_limit: 1\n"
        ):
            model.advance_stage("norm")


def test_a_compiled_function_without_a_slot_counts_for_nothing() -> None:
    model = cnn_model()
    other = torch.compile(lambda x, n: x * n, backend="eager", dynamic=False)
    for n in range(8):
        other(images(), n)
    assert graphs_made() == 0
    with torch._dynamo.config.patch(recompile_limit=1):
        model.germinate("norm", "conv")
        model.advance_stage("norm")


def test_a_life_without_compiling_imports_no_compiler() -> None:
    script = (
        "import sys; sys.path.insert(0, 'tests/core')\n"
        "from numeric_helpers import *\n"
        "model = cnn_model()\n"
        "grow_to(model, 'norm', SeedStage.FOSSILIZED)\n"
        "model(images()).sum().backward(); model.step(); model.step_epoch(1.0)\n"
        "assert 'torch._dynamo' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
