"""Generating text with seeds in the model, with and without a cache of keys and values."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
from hf_cases import CASES, Case
from kasmina_core import EveryPosition, HostError, MorphogeneticModel, SeedStage
from kasmina_core.testing.lives import bring_to, open_config, shake
from torch import Tensor, nn
from transformers import DynamicCache

from kasmina_hf import example_inputs, points
from kasmina_hf.hosts import llama_tiny

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
def test_seeds_that_mix_positions_keep_their_part_of_the_cache(speaker: Case, stage: SeedStage) -> None:
    model, ids = speaker.grown(stage, ATTENTION), prompt(speaker)
    for owner in (model, model.host):
        cached, whole = (
            generated(owner, ids, use_cache=use, return_dict_in_generate=True, output_logits=True)
            for use in (True, False)
        )
        assert cached.past_key_values.get_seq_length() == ids.shape[1] + NEW_TOKENS - 1
        assert torch.equal(cached.sequences, whole.sequences)
        for one, other in zip(cached.logits, whole.logits, strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("given", [False, True])
def test_a_sequence_that_comes_in_pieces_is_as_in_one(speaker: Case, given: bool) -> None:
    model, ids = speaker.grown(SeedStage.FOSSILIZED, ATTENTION), prompt(speaker)
    cache, found = DynamicCache(config=model.host.config) if given else None, []
    for piece in ids.split([3, 1, 2], 1):
        output = model(input_ids=piece, **with_cache(model.host, cache))
        cache = output.past_key_values
        found.append(output.logits)
    torch.testing.assert_close(torch.cat(found, 1), model(input_ids=ids).logits, atol=1e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("change", ["reorder", "crop", "repeat", "other", "in place", "copy"])
def test_a_cache_that_was_changed_since_is_refused(speaker: Case, change: str) -> None:
    model, ids = speaker.grown(SeedStage.FOSSILIZED, ATTENTION), prompt(speaker)
    cache, pieces = model(input_ids=ids[:, :-1]).past_key_values, ids[:, -1:]
    if change == "reorder":
        cache.reorder_cache(torch.tensor([1, 0]))
    elif change == "crop":
        cache.crop(-1)
    elif change == "repeat":
        cache.batch_repeat_interleave(2)
        pieces = pieces.repeat_interleave(2, 0)
    elif change == "other":
        with model.bypassed(speaker.slot):
            model(input_ids=pieces, **with_cache(model.host, cache))
    elif change == "in place":
        cache.layers[0].keys.mul_(1.0)
    else:
        cache = copy.deepcopy(cache)
    with pytest.raises(HostError, match="use_cache=False"):
        model(input_ids=pieces, **with_cache(model.host, cache))


@pytest.mark.parametrize("by_name", [True, False])
def test_a_cache_that_a_seed_has_not_seen_is_refused(by_name: bool) -> None:
    case = CASES["gpt2"]
    model, ids = case.grown(SeedStage.FOSSILIZED, ATTENTION), prompt(case)
    with model.bypassed(case.slot):
        cache = model(ids[:, :-1]).past_key_values
    args, kwargs = ((), with_cache(model.host, cache)) if by_name else ((cache,), {})
    with pytest.raises(HostError, match="has not seen"):
        model.host(ids[:, -1:], *args, **kwargs)


def test_a_plain_model_whose_reader_states_every_position_refuses_caches_and_padding() -> None:
    case = CASES["llama"]
    host, ids = case.host(), prompt(case)
    model = MorphogeneticModel(
        host, points(host), example=example_inputs(host), config=open_config(), context=EveryPosition()
    )
    model.evaluate_with(lambda: case.losses(model))
    bring_to(model, SeedStage.FOSSILIZED, case.slot, ATTENTION)
    cache = model(input_ids=ids[:, :-1]).past_key_values
    with pytest.raises(HostError, match="is a cache that holds earlier positions"):
        model(input_ids=ids[:, -1:], **with_cache(model.host, cache))
    with pytest.raises(HostError, match="'attention_mask' hides positions"):
        model(input_ids=ids, attention_mask=torch.arange(ids.shape[1]).expand_as(ids))


def test_a_copy_keeps_its_own_part_of_a_cache() -> None:
    case = CASES["llama"]
    model, ids = case.grown(SeedStage.SHADOWING, ATTENTION), prompt(case)
    twin = copy.deepcopy(model)
    cache = model(input_ids=ids[:, :-1]).past_key_values
    with pytest.raises(HostError, match="has not seen"):
        twin(input_ids=ids[:, -1:], **with_cache(model.host, cache))
    twin.cull(case.slot)
    assert torch.equal(generated(twin, ids), greedy(case.host(), ids))


def test_a_host_of_the_pack_keeps_the_cache_also_without_grow() -> None:
    host = llama_tiny(vocab_size=48).eval()
    model = MorphogeneticModel(host, config=open_config())
    case = CASES["llama"]
    model.evaluate_with(lambda: case.losses(model))
    bring_to(model, SeedStage.FOSSILIZED, "layer1", ATTENTION)
    shake(model)
    assert torch.equal(generated(model.host, prompt(case)), greedy(model, prompt(case)))
    model.detach_slots()
    assert not host._forward_pre_hooks
    assert not host._forward_hooks
    generated(host, prompt(case))


@pytest.mark.parametrize("options", [{"num_beams": 2}, {"cache_implementation": "static"}])
def test_a_cache_that_a_seed_cannot_follow_is_refused_if_it_is_asked_for(options: dict[str, Any]) -> None:
    case = CASES["llama"]
    model, ids = case.grown(SeedStage.FOSSILIZED, ATTENTION), prompt(case)
    assert torch.equal(generated(model, ids, **options), generated(model, ids, use_cache=False, **options))
    with pytest.raises(HostError):
        generated(model, ids, use_cache=True, **options)


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
