"""The part of a host before a slot runs once a measurement, and never where that could change a figure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from numeric_helpers import (
    causal_host,
    cnn_host,
    cnn_model,
    grow_to,
    images,
    labels,
    registry,
    same_bits,
    scramble,
    snapshot,
    tokens,
)
from torch import Tensor, nn

from kasmina_core import GrowthConfig, MorphogeneticModel, SeedStage
from kasmina_core.evidence.replay import ReplayDiverged, ReplayTape
from kasmina_core.slots.forward import ForwardMode

X, Y = images(9, seed=21), labels(9, seed=22)


def losses(model: nn.Module, batch: int = 4) -> Tensor:
    """Per-sample losses, in batches."""
    parts = [
        F.cross_entropy(model(x).flatten(1), y, reduction="none")
        for x, y in zip(X.split(batch), Y.split(batch), strict=True)
    ]
    return torch.cat(parts)


def model_of(host: nn.Module, slot: str, example: object = None) -> MorphogeneticModel:
    model = MorphogeneticModel(
        host,
        [slot],
        example=example if example is not None else X[:2],
        registry=registry(),
        config=GrowthConfig(),
    )
    name = next(iter(model.slots))
    place = grow_to(model, name, SeedStage.TRAINING, "conv" if len(place_shape(model)) == 4 else "mlp")
    scramble(place.seed)
    return model


def place_shape(model: MorphogeneticModel) -> tuple[int, ...]:
    return next(iter(model.slots.values())).shape


def counting(model: MorphogeneticModel) -> Counter[str]:
    """Count how often each module of the host really computes."""
    ran: Counter[str] = Counter()
    for name, module in model.host.named_modules():
        original = type(module).forward

        def forward(
            *args: Any, name: str = name, module: nn.Module = module, original: Any = original, **kwargs: Any
        ):
            ran[name] += 1
            return original(module, *args, **kwargs)

        module.forward = forward  # type: ignore[method-assign]
    return ran


def in_full(model: MorphogeneticModel, evaluator: Callable[[], Tensor]):
    """Measure without a tape."""
    name = next(iter(model.slots))
    model.growth.examiner.measurer.faults[name] = "for a test"
    try:
        return model.measure(name, evaluator)
    finally:
        del model.growth.examiner.measurer.faults[name]


def test_what_comes_before_the_slot_runs_once_and_the_figures_are_those_of_full_passes() -> None:
    model = model_of(cnn_host(), "norm2")
    expected = in_full(model, lambda: losses(model))
    model.measure("norm2", lambda: losses(model))  # the first compares
    ran = counting(model)
    found = model.measure("norm2", lambda: losses(model))
    assert model.replay_faults == {}
    assert found == expected
    assert found.gain != 0.0
    batches, passes = 3, 3
    for before in ("stem", "norm", "act", "conv", "norm2"):
        assert ran[before] == batches, before
    for after in ("", "act2", "pool", "head"):
        assert ran[after] == batches * passes, after


def test_an_evaluator_can_tell_which_passes_cost_less() -> None:
    model, seen = model_of(cnn_host(), "norm2"), []

    def evaluate() -> Tensor:
        seen.append(model.is_replaying)
        return losses(model)

    model.measure("norm2", evaluate)
    assert seen == [False, False, True, True]
    seen.clear()
    model.measure("norm2", evaluate)
    assert seen == [False, True, True]
    assert not model.is_replaying


def test_a_transformer_is_measured_the_same_way() -> None:
    model = model_of(causal_host(), "blocks.1", tokens(1))
    held_out = tokens(5, seed=31)

    def evaluate() -> Tensor:
        return F.cross_entropy(model(held_out[:, :-1]).mT, held_out[:, 1:], reduction="none").mean(1)

    expected = in_full(model, evaluate)
    model.measure("blocks_1", evaluate)
    ran = counting(model)
    assert model.measure("blocks_1", evaluate) == expected
    assert (ran["embed"], ran["blocks.0"], ran["blocks.0.mlp"], ran["blocks.1"]) == (1, 1, 1, 1)
    assert ran["head"] == 3


def test_statistics_random_numbers_and_forwards_stay_as_they_were() -> None:
    model = cnn_model(cnn_host(dropout=0.3))
    scramble(grow_to(model, "norm2", SeedStage.TRAINING).seed)
    before, numbers = snapshot(model), torch.get_rng_state()
    for _ in range(2):
        model.measure("norm2", lambda: losses(model))
    assert all(same_bits(value, before[name]) for name, value in snapshot(model).items())
    assert torch.equal(numbers, torch.get_rng_state())
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_an_evaluator_that_raises_leaves_every_forward_in_place() -> None:
    model = model_of(cnn_host(), "norm2")
    model.measure("norm2", lambda: losses(model))

    def broken() -> Tensor:
        losses(model)
        raise RuntimeError("no more data")

    for _ in range(2):
        with pytest.raises(RuntimeError, match="no more data"):
            model.measure("norm2", broken)
        assert not any("forward" in module.__dict__ for module in model.modules())
    assert model.replay_faults == {}


def test_a_forward_that_somebody_replaced_is_put_back() -> None:
    model = model_of(cnn_host(), "norm2")
    stem = model.host.stem
    stem.forward = own = lambda x: nn.Conv2d.forward(stem, x) + 1.0
    expected = in_full(model, lambda: losses(model))
    assert model.measure("norm2", lambda: losses(model)) == expected
    assert model.measure("norm2", lambda: losses(model)) == expected
    assert stem.__dict__["forward"] is own


class Branches(nn.Module):
    """Runs one module before and after the slot, another only after, and changes features in place."""

    skips = False

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.shared = nn.Conv2d(4, 4, 1)
        self.point = nn.Identity()
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        first = self.stem(x)
        mixed = self.shared(first)
        mixed.add_(first)
        placed = mixed if self.skips else self.point(mixed)
        return self.head(self.shared(placed.relu_() + first).mean((2, 3)))


def test_modules_used_again_after_the_slot_and_changes_in_place_are_right() -> None:
    torch.manual_seed(0)
    model = model_of(Branches(), "point")
    expected = in_full(model, lambda: losses(model))
    for _ in range(3):
        assert model.measure("point", lambda: losses(model)) == expected
    ran = counting(model)
    assert model.measure("point", lambda: losses(model)) == expected
    assert model.replay_faults == {}
    assert (ran["stem"], ran["shared"]) == (3, 3 + 9)


class Nested(nn.Module):
    """Runs one module within a part before the slot, and by itself after it."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Conv2d(4, 4, 1)
        self.before = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), self.shared)
        self.point = nn.Identity()
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.shared(self.point(self.before(x))).relu().mean((2, 3)))


def test_a_module_within_a_recorded_part_still_runs_elsewhere() -> None:
    torch.manual_seed(0)
    model = model_of(Nested(), "point")
    expected = in_full(model, lambda: losses(model))
    model.measure("point", lambda: losses(model))
    ran = counting(model)
    assert model.measure("point", lambda: losses(model)) == expected
    assert model.replay_faults == {}
    assert (ran["before"], ran["before.0"], ran["shared"]) == (3, 3, 3 + 9)


class Remembering(nn.Module):
    """Adds what its head saw in the last forward to its features: it depends on more than its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.memory = torch.zeros(())
        self.first = Adding(self)
        self.point = nn.Identity()
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        seen = self.point(self.first(self.stem(x))).mean((2, 3))
        self.memory = seen.mean()
        return self.head(seen)


class Adding(nn.Module):
    def __init__(self, owner: nn.Module) -> None:
        super().__init__()
        self.owner = [owner]

    def forward(self, x: Tensor) -> Tensor:
        return x + self.owner[0].memory


def test_a_host_with_a_memory_is_measured_in_full() -> None:
    torch.manual_seed(0)
    model = model_of(Remembering(), "point")

    def evaluate() -> Tensor:
        model.host.memory = torch.zeros(())
        return losses(model)

    expected = in_full(model, evaluate)
    assert model.measure("point", evaluate) == expected
    assert "differed from those of a full pass" in model.replay_faults["point"]
    assert model.measure("point", evaluate) == expected


class Filling(Remembering):
    """Fills a cache before the slot and reads it behind: a pass in which the former does not run finds it empty."""

    def __init__(self) -> None:
        super().__init__()
        self.cache: list[Tensor] = []
        self.keep = Keeping(self.cache)

    def forward(self, x: Tensor) -> Tensor:
        self.cache.clear()
        return self.head((self.point(self.keep(self.stem(x))) + self.cache[0]).mean((2, 3)))


class Keeping(nn.Module):
    def __init__(self, cache: list[Tensor]) -> None:
        super().__init__()
        self.cache = cache

    def forward(self, x: Tensor) -> Tensor:
        self.cache.append(x.detach())
        return 1.0 * x


def test_a_host_that_fails_where_a_cache_was_not_filled_is_measured_in_full() -> None:
    torch.manual_seed(0)
    model = model_of(Filling(), "point")
    expected = in_full(model, lambda: losses(model))
    for _ in range(2):
        assert model.measure("point", lambda: losses(model)) == expected
        assert "failed with IndexError" in model.replay_faults["point"]


def test_inputs_that_depend_on_the_slot_are_noticed() -> None:
    model = model_of(cnn_host(), "norm2")
    model.measure("norm2", lambda: losses(model))

    def fed_back() -> Tensor:
        x, out = X, []
        for _ in range(2):
            logits = model(x)
            out.append(F.cross_entropy(logits, Y, reduction="none"))
            x = X + logits.mean(1)[:, None, None, None]
        return torch.cat(out)

    expected = in_full(model, fed_back)
    assert model.measure("norm2", fed_back) == expected
    assert "other inputs" in model.replay_faults["norm2"]


class Cache:
    """A thing no tape can copy."""


class Cached(Branches):
    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:
        return super().forward(x)


def skipping(model: nn.Module) -> Tensor:
    """A forward that does not call the module at which the slot is."""
    model.host.skips = True
    try:
        return F.cross_entropy(model(X), Y, reduction="none")
    finally:
        model.host.skips = False


@pytest.mark.parametrize(
    ("host", "evaluate", "says"),
    [
        (Cached, lambda m: F.cross_entropy(m(X, cache=Cache()), Y, reduction="none"), "is given a Cache"),
        (
            Branches,
            lambda m: F.cross_entropy(m(X), Y, reduction="none") + skipping(m),
            "did not reach the slot",
        ),
        (
            Branches,
            lambda m: m.host.stem(X).mean((1, 2, 3)) + F.cross_entropy(m(X), Y, reduction="none"),
            "runs Conv2d outside of the host's forward",
        ),
    ],
)
def test_what_cannot_be_replayed_is_measured_in_full_and_says_why(
    host: type[nn.Module], evaluate: Callable[[nn.Module], Tensor], says: str
) -> None:
    torch.manual_seed(0)
    model = model_of(host(), "point")
    expected = in_full(model, lambda: evaluate(model))
    assert model.measure("point", lambda: evaluate(model)) == expected
    assert says in model.replay_faults["point"]
    assert model.measure("point", lambda: evaluate(model)) == expected


def test_a_pass_with_other_calls_is_not_believed() -> None:
    model = model_of(cnn_host(), "norm2")
    slot, tape = model.slots["norm2"], ReplayTape(model.host, model.slots["norm2"])
    model.eval()
    with torch.no_grad(), tape.recording():
        model(X)
    for other in (lambda: (model(X), model(X)), lambda: None, lambda: model(X + 1), lambda: model(X[:3])):
        again = ReplayTape(model.host, slot)
        with torch.no_grad():
            with again.recording():
                model(X)
            with pytest.raises(ReplayDiverged), again.replaying():
                other()


def test_memory_is_bounded_and_what_does_not_fit_runs_again() -> None:
    model = model_of(cnn_host(), "norm2")
    slot = model.slots["norm2"]
    model.eval()
    one = 4 * X.shape[0] * X.shape[2] * X.shape[3] * 4
    tape = ReplayTape(model.host, slot, max_bytes=2 * one)
    with torch.no_grad(), slot.forced(ForwardMode.PASS):
        expected = model(X)
        with tape.recording():
            model(X)
        ran = counting(model)
        with tape.replaying():
            assert torch.equal(model(X), expected)
    assert (ran["stem"], ran["norm"]) == (0, 0)
    assert ran["conv"] == ran["norm2"] == 1
    assert sum(call.nbytes for calls in tape._calls.values() for call in calls) <= 2 * one


def test_a_seed_that_changes_nothing_does_not_prove_the_tape() -> None:
    model = model_of(cnn_host(), "norm2")
    seed = model.slots["norm2"].seed
    with torch.no_grad():
        for parameter in seed.parameters():
            parameter.zero_()
    calls = []

    def evaluate() -> Tensor:
        calls.append(1)
        return losses(model)

    for _ in range(2):
        calls.clear()
        assert model.measure("norm2", evaluate).gain == 0.0
        assert len(calls) == 4  # compared anew
    scramble(seed)
    calls.clear()
    model.measure("norm2", evaluate)
    assert len(calls) == 4
    calls.clear()
    model.measure("norm2", evaluate)
    assert len(calls) == 3


def test_every_pass_sees_the_same_random_numbers() -> None:
    model = model_of(cnn_host(), "norm2")

    def noisy() -> Tensor:
        return F.cross_entropy(model(X + torch.randn(X.shape)), Y, reduction="none")

    torch.manual_seed(5)
    noise = torch.randn(X.shape)
    torch.manual_seed(5)
    found = model.measure("norm2", noisy)
    expected = in_full(model, lambda: F.cross_entropy(model(X + noise), Y, reduction="none"))
    assert found == expected


def test_a_compiled_model_is_measured_in_full() -> None:
    torch._dynamo.reset()
    model = model_of(causal_host(), "blocks.1", tokens(1))
    held_out = tokens(5, seed=31)
    compiled = torch.compile(model, backend="eager", fullgraph=True)

    def evaluate(call: Callable[..., Tensor]) -> Tensor:
        return F.cross_entropy(call(held_out[:, :-1]).mT, held_out[:, 1:], reduction="none").mean(1)

    expected = in_full(model, lambda: evaluate(model))
    found = model.measure("blocks_1", lambda: evaluate(compiled))
    assert found.gain == pytest.approx(expected.gain, rel=1e-4, abs=1e-7)
    assert found.deviation == pytest.approx(expected.deviation, rel=1e-4)
    assert "compiled" in model.replay_faults["blocks_1"]
    assert model.measure("blocks_1", lambda: evaluate(compiled)).gain == found.gain
    torch._dynamo.reset()


def test_a_metric_that_grows_with_quality_has_its_gain_turned_round() -> None:
    model = model_of(cnn_host(), "norm2")
    as_loss = model.measure("norm2", lambda: losses(model))
    as_metric = model.measure("norm2", lambda: -losses(model), higher_is_better=True)
    assert as_metric.gain == pytest.approx(as_loss.gain)
    assert as_metric.loss_with == pytest.approx(-as_loss.loss_with)
    assert [gain.gain for _, gain in as_metric.smaller] == pytest.approx([g.gain for _, g in as_loss.smaller])


def test_the_gain_at_a_smaller_alpha_is_that_of_the_model_blended_so() -> None:
    model = model_of(cnn_host(), "norm2")
    evidence = model.measure("norm2", lambda: losses(model))
    ((alpha, gain),) = evidence.smaller
    with torch.no_grad(), model.eval().slots["norm2"].forced(ForwardMode.PASS):
        without = losses(model)
    slot = model.slots["norm2"]
    with torch.no_grad(), slot.blend_weight(alpha), slot.forced(ForwardMode.BLEND):
        blended = losses(model)
    assert gain.gain == pytest.approx(float((without - blended).mean()), rel=1e-5)
    assert float(slot.alpha_buffer) == 0.0
