"""Whether a host is causal is found by values where nobody says it, for each tower by itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kasmina_core import (
    CheckpointError,
    EveryPosition,
    GerminationError,
    HostError,
    InjectionPoint,
    MorphogeneticModel,
    Topology,
)

DIM, VALUES = 4, 7


class Attention(nn.Module):
    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.into, self.causal = nn.Linear(DIM, 3 * DIM), causal

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.into(x).chunk(3, -1)
        return x + F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)


class Language(nn.Module):
    """Ids to values of ids, causal or not; a point before it mixes, one after, and blocks."""

    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(VALUES, DIM)
        self.blocks = nn.ModuleList(Attention(causal) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(DIM), nn.Linear(DIM, VALUES)

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.embed(ids)
        if mask is not None:
            x = x * mask[..., None]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class Translator(nn.Module):
    """An encoder that looks ahead, and a causal decoder that looks at all of it."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = Language(causal=False), Language(causal=True)
        self.cross = nn.Linear(VALUES, VALUES)

    def forward(self, source: Tensor, target: Tensor) -> dict[str, Tensor]:
        encoded = self.encoder(source)
        return {
            "encoded": encoded,
            "logits": self.decoder(target) + self.cross(encoded).mean(1, keepdim=True),
        }


class Pictures(nn.Module):
    """Patches of an image see each other; the output has no positions."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.blocks = (
            nn.Conv2d(1, DIM, 2, 2),
            nn.Sequential(nn.Identity(), Attention(causal=False)),
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.blocks(self.patch(images).flatten(2).transpose(1, 2)).mean(1)


def seeded(make: Any) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        return make()


def ids(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(VALUES, shape, generator=torch.Generator().manual_seed(seed))


def causal_of(host: nn.Module, paths: Any, example: Any, **options: Any) -> dict[str, bool]:
    model = MorphogeneticModel(host, paths, example=example, **options)
    return {slot.point.path: slot.point.causal for slot in model.slots.values()}


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("length", [3, 6])
def test_all_points_of_a_host_are_as_causal_as_its_attention(causal: bool, length: int) -> None:
    paths = ["embed", "blocks.*", "norm"]
    found = causal_of(seeded(lambda: Language(causal)), paths, ids(2, length))
    assert set(found.values()) == {causal}
    assert len(found) == 4


def test_a_mask_beside_the_ids_does_not_hide_that_a_host_looks_ahead() -> None:
    example = {"ids": ids(2, 5), "mask": torch.ones(2, 5, dtype=torch.long)}
    assert causal_of(seeded(lambda: Language(False)), ["norm"], example) == {"norm": False}
    assert causal_of(seeded(lambda: Language(True)), ["norm"], example) == {"norm": True}


@pytest.mark.parametrize("lengths", [(5, 4), (5, 5)], ids=["other lengths", "equal lengths"])
def test_each_tower_has_its_own_causality(lengths: tuple[int, int]) -> None:
    example = (ids(2, lengths[0]), ids(2, lengths[1], seed=1))
    found = causal_of(seeded(Translator), ["encoder.blocks.*", "decoder.blocks.*", "decoder.norm"], example)
    assert found == {
        "encoder.blocks.0": False,
        "encoder.blocks.1": False,
        "decoder.blocks.0": True,
        "decoder.blocks.1": True,
        "decoder.norm": True,
    }


def test_where_no_input_has_the_positions_the_first_features_tell() -> None:
    found = causal_of(seeded(Pictures), ["blocks.*"], torch.randn(2, 1, 4, 6))
    assert found == {"blocks.0": False, "blocks.1": False}


class Streams(nn.Module):
    """Puts what it predicts from one, and from two positions before, behind the positions, and mixes each by itself."""

    def __init__(self, interleaved: bool) -> None:
        super().__init__()
        self.embed, self.block, self.head = (
            nn.Embedding(VALUES, DIM),
            Attention(causal=True),
            nn.Linear(DIM, VALUES),
        )
        self.tail, self.interleaved = nn.Identity(), interleaved

    def forward(self, ids: Tensor) -> Tensor:
        b, t = ids.shape
        streams = torch.stack(
            [self.block(self.embed(ids) + k) for k in range(3)], 2 if self.interleaved else 1
        )
        return self.head(self.tail(streams.reshape(b, 3 * t, DIM))).view(b, -1, t, VALUES).mean(1)


def test_streams_that_lie_one_behind_the_other_refuse_seeds_that_mix_positions() -> None:
    model = MorphogeneticModel(
        seeded(lambda: Streams(False)), ["tail"], example=ids(2, 5), causal=True, context=EveryPosition()
    )
    with pytest.raises(
        GerminationError, match="at 'tail' the positions of 3 streams lie one behind the other"
    ):
        model.germinate("tail", "transformer:attention")
    model.germinate("tail", "transformer:norm")
    longer = MorphogeneticModel(
        seeded(lambda: Streams(True)), ["tail"], example=ids(2, 5), causal=True, context=EveryPosition()
    )
    longer.germinate("tail", "transformer:attention")


def test_signals_are_causal_if_their_convolutions_look_back_alone() -> None:
    class Padded(nn.Conv1d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(F.pad(x, (2, 0)))

    x = torch.randn(2, DIM, 9)
    points = [
        InjectionPoint("first", "0", DIM, Topology.SIGNAL),
        InjectionPoint("second", "1", DIM, Topology.SIGNAL),
    ]
    both = seeded(lambda: nn.Sequential(nn.Conv1d(DIM, DIM, 3, padding=1), nn.Conv1d(DIM, DIM, 3, padding=1)))
    back = seeded(lambda: nn.Sequential(Padded(DIM, DIM, 3), Padded(DIM, DIM, 3)))
    assert not MorphogeneticModel(both, points, example=x).slots["first"].doubt
    assert "show the host the future" in MorphogeneticModel(back, points, example=x).slots["first"].doubt


def test_where_no_position_sees_another_a_point_is_causal_unless_somebody_says_it_is_not() -> None:
    host, x = seeded(lambda: nn.Sequential(nn.Linear(DIM, DIM), nn.Linear(DIM, DIM))), torch.randn(2, 3, DIM)
    assert causal_of(host, ["0"], x) == {"0": True}
    host = seeded(lambda: nn.Sequential(nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)))
    assert causal_of(host, ["0"], x, causal=False) == {"0": False}


def test_what_is_said_of_towers_counts_and_the_rest_is_found() -> None:
    example = (ids(2, 5), ids(2, 4, seed=1))
    paths = ["encoder.blocks.*", "decoder.blocks.*"]
    said = {"encoder": True, "encoder.blocks.1": False, "*.blocks.7": True}
    assert causal_of(seeded(Translator), paths, example, causal=said) == {
        "encoder.blocks.0": True,
        "encoder.blocks.1": False,
        "decoder.blocks.0": True,
        "decoder.blocks.1": True,
    }


def test_a_tower_that_does_not_exist_is_refused_with_a_near_one() -> None:
    with pytest.raises(HostError, match=r"no submodule 'decodr'\. Did you mean 'decoder'"):
        causal_of(seeded(Translator), ["decoder.norm"], (ids(2, 5), ids(2, 4)), causal={"decodr": True})
    with pytest.raises(TypeError, match="causal must be True, False, or either by tower"):
        causal_of(seeded(Translator), ["decoder.norm"], (ids(2, 5), ids(2, 4)), causal="yes")


def test_to_find_it_leaves_the_host_and_random_numbers_as_they_were() -> None:
    host = seeded(lambda: Language(True)).train()
    before, state = [p.clone() for p in host.parameters()], torch.get_rng_state()
    causal_of(host, ["blocks.*"], ids(2, 5))
    assert host.training
    assert torch.equal(state, torch.get_rng_state())
    assert all(map(torch.equal, before, host.parameters()))
    assert [len(m._forward_hooks) for m in host.modules()].count(1) == 2


@pytest.mark.parametrize("way", ["argument", "declaration"])
def test_a_causal_host_that_is_said_to_be_none_is_doubted_with_both_readings(way: str) -> None:
    host = seeded(lambda: Language(True))
    if way == "argument":
        model = MorphogeneticModel(host, ["blocks.0"], example=ids(2, 5), causal=False)
        line = 'causal=True, or causal={"blocks.0": True}'
    else:
        point = InjectionPoint("blocks_0", "blocks.0", DIM, Topology.TRANSFORMER)
        model = MorphogeneticModel(host, [point], example=ids(2, 5))
        line = 'InjectionPoint("blocks_0", "blocks.0", 4, ..., causal=True)'
    doubt = model.slots["blocks_0"].doubt
    assert "declared: causal=False at 'blocks.0'" in doubt
    assert "found:    a position of the host's output depends on no later position" in doubt
    assert doubt.endswith(f"Write: {line}")


def test_a_seed_that_would_show_the_future_is_refused_and_one_for_each_position_is_not() -> None:
    model = MorphogeneticModel(seeded(lambda: Language(True)), ["blocks.0"], example=ids(2, 5), causal=False)
    with pytest.raises(
        GerminationError, match=r"would show the host the future\n.*\n.*\n.*Write: causal=True"
    ):
        model.germinate("blocks_0", "transformer:attention")
    assert model.slots["blocks_0"].state is None
    model.germinate("blocks_0", "transformer:norm")
    said = MorphogeneticModel(seeded(lambda: Language(False)), ["blocks.0"], example=ids(2, 5), causal=False)
    assert not said.slots["blocks_0"].doubt


@pytest.mark.parametrize("saved", [True, False])
def test_a_state_saved_with_other_causality_is_refused_and_changes_nothing(saved: bool) -> None:
    def model(causal: bool) -> MorphogeneticModel:
        host = seeded(lambda: Language(False))
        return MorphogeneticModel(
            host, ["norm"], example=ids(2, 5), causal=causal, context=EveryPosition()
        ).eval()

    grown, other, same = model(saved), model(not saved), model(saved)
    grown.germinate("norm", "transformer:attention")
    before = {key: value.clone() for key, value in other.state_dict().items()}
    with pytest.raises(CheckpointError, match=rf"saved with causal={saved}, and has causal={not saved} here"):
        other.load_state_dict(grown.state_dict())
    with pytest.raises(CheckpointError, match=rf"MorphogeneticModel\(host, \.\.\., causal={saved}\)"):
        other.slots["norm"].set_extra_state(grown.slots["norm"].get_extra_state())
    after = other.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    same.load_state_dict(grown.state_dict())
    assert same.slots["norm"].seed is not None


def test_a_state_that_does_not_say_whether_its_point_is_causal_loads() -> None:
    host = seeded(lambda: Language(True))
    model = MorphogeneticModel(host, ["norm"], example=ids(2, 5), causal=True)
    model.germinate("norm", "transformer:norm")
    record = model.slots["norm"].get_extra_state()
    assert record.pop("causal") is True
    model.slots["norm"].set_extra_state(record)
    assert model.slots["norm"].seed is not None
