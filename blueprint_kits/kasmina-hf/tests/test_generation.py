"""Generating text with seeds in the model, with and without a cache of keys and values."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
from hf_cases import CASES, Case
from kasmina_core import HostError, MorphogeneticModel, SeedStage, default_registry
from kasmina_core.slots.forward import ForwardMode
from kasmina_core.testing.lives import bring_to, open_config
from torch import Tensor, nn

from kasmina_hf import GrowingModel, example_inputs, points
from kasmina_hf.positions import HOST_FEATURES_MODES, IDLE_MODE, mixes_positions

NEW_TOKENS = 6
ATTENTION, MLP = "transformer:attention", "transformer:mlp"
QUIET = [SeedStage.DORMANT, SeedStage.GERMINATED, SeedStage.TRAINING]
LOUD = [SeedStage.BLENDING, SeedStage.SHADOWING, SeedStage.FOSSILIZED]


def prompt(case: Case) -> Tensor:
    return case.inputs()["input_ids"][:2]


def greedy(model: nn.Module, ids: Tensor) -> Tensor:
    """Greedy decoding by whole forwards, without a cache."""
    for _ in range(NEW_TOKENS):
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits
        ids = torch.cat([ids, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    return ids


def with_cache(host: nn.Module, cache: Any) -> dict[str, Any]:
    """Return the keyword that gives a host its cache; transformers 5.24 has renamed it."""
    known = inspect.signature(host.forward).parameters
    return {"cache" if "cache" in known else "past_key_values": cache}


def generated(model: Any, ids: Tensor, **options: Any) -> Any:
    return model.generate(ids, do_sample=False, max_new_tokens=NEW_TOKENS, **options)


@pytest.mark.parametrize("stage", QUIET)
@pytest.mark.parametrize("training", [False, True])
def test_before_blending_the_host_generates_with_its_cache_what_the_bare_model_does(
    speaker: Case, stage: SeedStage, training: bool
) -> None:
    model, bare, ids = speaker.grown(stage).train(training), speaker.host().train(training), prompt(speaker)
    results = []
    for host in (model.host, bare, model):
        torch.manual_seed(3)  # dropout draws the same
        results.append(generated(host, ids, output_logits=True, return_dict_in_generate=True))
    for result in results[1:]:
        assert torch.equal(result.sequences, results[0].sequences)
        assert all(map(torch.equal, result.logits, results[0].logits))
    assert results[0].past_key_values.get_seq_length() == ids.shape[1] + NEW_TOKENS - 1


@pytest.mark.parametrize("blueprint", [ATTENTION, MLP])
@pytest.mark.parametrize("stage", [*QUIET, *LOUD])
def test_generated_tokens_are_those_of_greedy_decoding_by_whole_forwards(
    speaker: Case, stage: SeedStage, blueprint: str
) -> None:
    model, ids = speaker.grown(stage, blueprint), prompt(speaker)
    assert torch.equal(generated(model, ids), greedy(model, ids))


@pytest.mark.parametrize("blueprint", [MLP, "transformer:lora", "transformer:norm"])
@pytest.mark.parametrize("stage", LOUD)
def test_seeds_that_treat_each_position_by_itself_keep_the_cache(
    speaker: Case, stage: SeedStage, blueprint: str
) -> None:
    model, ids = speaker.grown(stage, blueprint), prompt(speaker)
    for owner in (model, model.host):
        result = generated(owner, ids, return_dict_in_generate=True)
        assert result.past_key_values.get_seq_length() == ids.shape[1] + NEW_TOKENS - 1
        assert torch.equal(result.sequences, greedy(model, ids))


@pytest.mark.parametrize("stage", LOUD)
def test_seeds_that_mix_positions_refuse_a_filled_cache_and_say_what_to_do(
    speaker: Case, stage: SeedStage
) -> None:
    model, ids = speaker.grown(stage, ATTENTION), prompt(speaker)
    message = (
        rf"Seed '{ATTENTION}' in slot '{speaker.slot}' mixes positions.*model\.generate.*use_cache=False"
    )
    with pytest.raises(HostError, match=f"(?s){message}"):
        generated(model.host, ids)
    with pytest.raises(HostError, match="mixes positions"):
        generated(model, ids, use_cache=True)
    assert torch.equal(generated(model.host, ids, use_cache=False), greedy(model, ids))
    with model.bypassed(speaker.slot):
        assert torch.equal(generated(model.host, ids), greedy(speaker.host(), ids))
    cache = model(input_ids=ids[:, :-1]).past_key_values  # an empty cache is filled: nothing was missed
    with pytest.raises(HostError, match="mixes positions"):
        model(input_ids=ids[:, -1:], **with_cache(model.host, cache))


def test_a_filled_cache_is_found_among_positional_arguments_too() -> None:
    case = CASES["gpt2"]
    model, ids = case.grown(SeedStage.FOSSILIZED), prompt(case)
    cache = model(ids[:, :-1]).past_key_values
    with pytest.raises(HostError, match="mixes positions"):
        model.host(ids[:, -1:], cache)


def test_without_the_refusal_a_cache_would_change_what_the_seed_computes(speaker: Case) -> None:
    host = speaker.host()
    model = MorphogeneticModel(host, points(host), example=example_inputs(host), config=open_config())
    model.evaluate_with(lambda: speaker.losses(model))
    model.germinate(speaker.slot, ATTENTION)
    while model.slots[speaker.slot].stage is not SeedStage.SHADOWING:
        model.step_epoch(1.0)
    with torch.no_grad():
        for parameter in model.seed_parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    ids = prompt(speaker)
    whole = model(input_ids=ids).logits[:, -1]
    cache = model(input_ids=ids[:, :-1]).past_key_values
    assert not torch.allclose(
        model(input_ids=ids[:, -1:], **with_cache(model.host, cache)).logits[:, -1], whole, atol=1e-3
    )


def test_a_seed_that_is_measured_refuses_a_filled_cache_as_well() -> None:
    case = CASES["llama"]
    model, ids = case.grown(SeedStage.TRAINING, ATTENTION), prompt(case)

    def evaluator() -> Tensor:
        cache = model(input_ids=ids[:, :-1]).past_key_values
        return model(input_ids=ids[:, -1:], **with_cache(model.host, cache)).logits.flatten()

    with pytest.raises(HostError, match="mixes positions"):
        model.measure(case.slot, evaluator)


def test_a_copy_refuses_for_its_own_seeds() -> None:
    case = CASES["llama"]
    model, ids = case.grown(SeedStage.SHADOWING, ATTENTION), prompt(case)
    twin = copy.deepcopy(model)
    twin.cull(case.slot)
    assert torch.equal(generated(twin.host, ids), greedy(case.host(), ids))
    with pytest.raises(HostError, match="mixes positions"):
        generated(model.host, ids)
    twin = copy.deepcopy(model)
    model.cull(case.slot)
    with pytest.raises(HostError, match="mixes positions"):
        generated(twin.host, ids)


def test_a_host_of_the_pack_refuses_a_filled_cache_also_without_grow() -> None:
    host = default_registry().hosts.create("hf:llama-tiny", vocab_size=48).eval()
    model = MorphogeneticModel(host, config=open_config())
    case = CASES["llama"]
    model.evaluate_with(lambda: case.losses(model))
    model.germinate("layer1", ATTENTION)
    for _ in range(30):
        model.step_epoch(1.0)
    assert model.slots["layer1"].alpha == 1.0
    with pytest.raises(HostError, match="mixes positions"):
        generated(model.host, prompt(case))
    model.detach_slots()
    assert not host._forward_pre_hooks
    generated(host, prompt(case))


@pytest.mark.parametrize("options", [{"num_beams": 2}, {"num_return_sequences": 2, "num_beams": 2}])
def test_beams_are_those_of_the_search_without_a_cache(speaker: Case, options: dict[str, int]) -> None:
    ids = prompt(speaker)
    for blueprint in (ATTENTION, MLP):
        model = speaker.grown(SeedStage.FOSSILIZED, blueprint)
        assert torch.equal(
            generated(model, ids, **options), generated(model.host, ids, use_cache=False, **options)
        )


def test_a_model_without_a_language_modelling_head_does_not_generate() -> None:
    model = CASES["bert"].grown()
    with pytest.raises(HostError, match="BertForSequenceClassification does not generate"):
        model.generate(CASES["bert"].inputs()["input_ids"])


# -- which seeds mix positions -------------------------------------------------------------------------------------


class LooksBack(nn.Module):
    """A causal convolution along the sequence, silent at birth."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(dim, dim, 3)
        self.gate = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gate * self.conv(nn.functional.pad(x.transpose(1, 2), (2, 0))).transpose(1, 2)


class KnowsWhereItIs(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.where = nn.Parameter(torch.zeros(128, dim))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.where[: x.shape[1]]


class OfEightTokens(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.view(-1, 8, x.shape[-1]).view_as(x)


@pytest.mark.parametrize("dim", [2, 16, 130])
@pytest.mark.parametrize(
    ("blueprint", "mixes"), [("attention", True), ("lora", False), ("mlp", False), ("norm", False)]
)
@pytest.mark.parametrize("causal", [False, True])
def test_bundled_seeds_mix_positions_or_do_not_already_at_birth(
    blueprint: str, mixes: bool, dim: int, causal: bool
) -> None:
    seed = default_registry().blueprints.create(f"transformer:{blueprint}", dim, causal=causal)
    assert mixes_positions(seed, dim) is mixes


@pytest.mark.parametrize(
    ("seed", "mixes"),
    [
        (LooksBack(4), True),
        (KnowsWhereItIs(4), True),
        (OfEightTokens(), True),
        (nn.LSTM(4, 4, batch_first=True), True),
        (nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)), False),
        (nn.Identity(), False),
        (nn.Linear(4, 4, dtype=torch.bfloat16), False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_other_seeds_are_judged_by_what_they_do(seed: nn.Module, mixes: bool) -> None:
    before = [p.clone() for p in seed.parameters()], torch.get_rng_state()
    with torch.autocast("cpu", torch.bfloat16):
        assert mixes_positions(seed, 4) is mixes
    assert all(map(torch.equal, before[0], seed.parameters()))
    assert torch.equal(before[1], torch.get_rng_state())


def test_modes_in_which_the_seed_does_not_contribute_are_the_slot_s() -> None:
    assert HOST_FEATURES_MODES == (ForwardMode.PASS, ForwardMode.STRAIGHT_THROUGH)
    assert ForwardMode.PASS == IDLE_MODE


def test_a_seed_in_training_is_not_tried_while_nobody_asks() -> None:
    case = CASES["llama"]
    model = case.open()
    bring_to(model, SeedStage.TRAINING, case.slot, ATTENTION)
    assert isinstance(model, GrowingModel)
    model.eval()(**case.inputs(), **with_cache(model.host, None))
