"""Generating text with seeds in the model, with and without a cache of keys and values."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
from hf_cases import CASES, NO_TOKENS, Case
from kasmina_core import EveryPosition, HostError, MorphogeneticModel, SeedStage
from kasmina_core.testing.lives import bring_to, open_config, shake
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    DynamicCache,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from kasmina_hf import GrowingModel, example_inputs, grow, points
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


def test_blocks_behind_a_fossil_keep_cached_positions_of_their_own(speaker: Case) -> None:
    model, ids = speaker.grown(SeedStage.FOSSILIZED, "transformer:block"), prompt(speaker)
    nested = model.open_slot(speaker.slot).name
    model.germinate(nested, "transformer:block", copies=2)
    while model.slots[nested].stage is not SeedStage.FOSSILIZED:
        model.step_epoch(1.0)
        if model.slots[nested].stage is SeedStage.PROBATIONARY:
            model.advance_stage(nested)
    shake(model)
    assert torch.equal(generated(model.eval(), ids, use_cache=True), greedy(model, ids))


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


def test_decoding_that_guesses_is_refused_with_the_way_out_where_a_seed_mixes_positions() -> None:
    case = CASES["llama"]
    model, ids = case.grown(SeedStage.FOSSILIZED, ATTENTION), prompt(case)[:1]
    options = {"prompt_lookup_num_tokens": 2}
    with pytest.raises(
        HostError, match=r"'layer2' cannot follow.\nGenerate without prompt_lookup_num_tokens"
    ):
        generated(model, ids, **options)
    with model.bypassed("layer2"):
        assert torch.equal(generated(model, ids, **options), generated(model, ids))


def test_a_host_that_keeps_states_generates_without_them_beside_a_seed_that_mixes() -> None:
    config = MambaConfig(vocab_size=48, hidden_size=16, state_size=4, num_hidden_layers=2, **NO_TOKENS)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, ids = grow(MambaForCausalLM(config).eval(), config=open_config()), torch.randint(48, (2, 5))
    model.evaluate_with(lambda: model(input_ids=ids).logits.square().mean((1, 2)))
    bring_to(model, SeedStage.FOSSILIZED, "layer1", ATTENTION)
    shake(model)
    assert torch.equal(generated(model.eval(), ids), greedy(model, ids))
    with pytest.raises(HostError, match=r"does not say how many positions it holds.*use_cache=False"):
        generated(model, ids, use_cache=True)


# -- encoder-decoders ----------------------------------------------------------------------------------------------

_SMALL = {
    "vocab_size": 48,
    "d_model": 16,
    "decoder_start_token_id": 2,
    "eos_token_id": None,
    "pad_token_id": 0,
}
_LAYERS = {
    f"{side}_{name}": number
    for side in ("encoder", "decoder")
    for name, number in (("layers", 2), ("attention_heads", 2), ("ffn_dim", 32))
}


def t5() -> PreTrainedModel:
    return T5ForConditionalGeneration(T5Config(d_kv=8, d_ff=32, num_layers=2, num_heads=2, **_SMALL))


def bart() -> PreTrainedModel:
    config = BartConfig(max_position_embeddings=32, forced_eos_token_id=None, **_LAYERS, **_SMALL)
    return BartForConditionalGeneration(config)


def whisper() -> PreTrainedModel:
    config = WhisperConfig(max_source_positions=8, num_mel_bins=8, **_LAYERS, **_SMALL)
    config.suppress_tokens = config.begin_suppress_tokens = None
    return WhisperForConditionalGeneration(config)


def translator(build: Any, side: str = "decoder") -> tuple[GrowingModel, dict[str, Tensor]]:
    """A model with a fossil that mixes positions in its decoder or encoder, and what its encoder takes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        host = build().eval()
        with torch.no_grad():
            for parameter in host.parameters():
                parameter.mul_(4.0 if parameter.dim() > 1 else 1.0)
        read = {"input_ids": torch.randint(3, 48, (2, 6)), "attention_mask": torch.ones(2, 6)}
        read["attention_mask"][1, 4:] = 0
        if build is whisper:
            read = {"input_features": torch.randn(2, 8, 16)}
        written = torch.randint(3, 48, (2, 5))
    model = grow(host, config=open_config())
    model.evaluate_with(lambda: model(**read, decoder_input_ids=written).logits.square().mean((1, 2)))
    bring_to(model, SeedStage.FOSSILIZED, f"{side}_layer1", ATTENTION)
    shake(model)
    return model.eval(), read


@pytest.mark.parametrize("build", [t5, bart, whisper])
def test_an_encoder_decoder_generates_with_its_cache_what_it_does_without(build: Any) -> None:
    model, read = translator(build)
    options = {
        "max_new_tokens": 5,
        "return_dict_in_generate": True,
        "output_scores": True,
        "do_sample": False,
    }
    for owner in (model, model.host):
        cached, whole = (owner.generate(**read, use_cache=use, **options) for use in (True, False))
        assert cached.past_key_values.self_attention_cache.get_seq_length() > 0
        assert torch.equal(cached.sequences, whole.sequences)
        for one, other in zip(cached.scores, whole.scores, strict=True):
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
    with model.bypassed("decoder_layer1"):
        assert not torch.equal(model.generate(**read, **options).scores[-1], whole.scores[-1])
    beams = {"num_beams": 2, "max_new_tokens": 5}
    assert torch.equal(model.generate(**read, **beams), model.generate(**read, use_cache=False, **beams))


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("build", [t5, bart, whisper])
def test_an_encoder_whose_seed_mixes_positions_generates_what_each_sample_gives_alone(
    build: Any, beams: int
) -> None:
    model, read = translator(build, "encoder")
    options = {
        "max_new_tokens": 4,
        "num_beams": beams,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_scores": True,
    }
    for owner in (model, model.host):
        options["use_cache"] = (
            beams == 1
        )  # else model.generate leaves it out, and model.host's is to be told so
        together = owner.generate(**read, **options)
        for i, tokens in enumerate(together.sequences):
            alone = {name: tensor[i : i + 1] for name, tensor in read.items()}
            if "attention_mask" in alone:
                n = int(alone.pop("attention_mask").sum())
                alone = {name: tensor[:, :n] for name, tensor in alone.items()}
            found = owner.generate(**alone, **options)
            assert torch.equal(found.sequences[0], tokens)
            if build is not whisper:  # which gives scores of the best beam
                scores = together.scores[0][i * beams : (i + 1) * beams]
                torch.testing.assert_close(found.scores[0], scores, atol=1e-4, rtol=1e-4)
    with model.bypassed("encoder_layer1"):
        bare = model.generate(**read, **options)
    assert not torch.allclose(bare.scores[0], together.scores[0], atol=1e-3)


def test_a_call_of_the_encoder_alone_is_read_and_the_next_of_the_model_too() -> None:
    model, read = translator(bart, "encoder")
    encoder, written = model.host.get_encoder(), torch.tensor([[2, 7, 9], [2, 8, 4]])
    whole = model(**read, decoder_input_ids=written)
    inside = encoder(**read).last_hidden_state
    torch.testing.assert_close(inside[0], whole.encoder_last_hidden_state[0])
    torch.testing.assert_close(inside[1, :4], whole.encoder_last_hidden_state[1, :4])
    with pytest.raises(HostError, match="of shape"):
        encoder(input_ids=read["input_ids"], attention_mask=torch.ones(2, 2, 6, 6))
    torch.testing.assert_close(model(**read, decoder_input_ids=written).logits, whole.logits)


def test_a_cache_of_a_decoder_that_was_reordered_or_that_a_seed_has_not_seen_is_refused() -> None:
    model, read = translator(bart)
    written = torch.tensor([[2, 7, 9], [2, 8, 4]])
    whole = model(**read, decoder_input_ids=written).logits
    cache = model(**read, decoder_input_ids=written[:, :2]).past_key_values
    last = model(**read, decoder_input_ids=written[:, 2:], **with_cache(model.host, cache)).logits
    torch.testing.assert_close(last, whole[:, 2:], atol=1e-4, rtol=1e-4)
    cache.reorder_cache(torch.tensor([1, 0]))
    with pytest.raises(HostError, match="was reordered"):
        model(**read, decoder_input_ids=written[:, 2:], **with_cache(model.host, cache))
    with model.bypassed("decoder_layer1"):
        cache = model(**read, decoder_input_ids=written[:, :2]).past_key_values
    with pytest.raises(HostError, match="has not seen"):
        model(**read, decoder_input_ids=written[:, 2:], **with_cache(model.host, cache))
