"""Points read off configs and modules."""

from __future__ import annotations

import copy

import pytest
import torch
from hf_cases import CASES, DIM, NO_TOKENS, VOCAB, Case, bert
from kasmina_core import HostError, InjectionPoint, SeedStage, Topology
from kasmina_core.testing.lives import bring_to, open_config, shake
from torch import nn
from transformers import (
    AlbertConfig,
    AlbertModel,
    BertModel,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    GPT2Model,
    LlamaModel,
    LlavaConfig,
    LlavaModel,
    ProphetNetConfig,
    ProphetNetModel,
    SwinConfig,
    SwinModel,
    T5Config,
    T5ForConditionalGeneration,
    Wav2Vec2Config,
    Wav2Vec2Model,
    WhisperConfig,
    WhisperModel,
)

from kasmina_hf import GrowingModel, example_inputs, grow, points

TOKENS, IMAGES = Topology.TRANSFORMER, Topology.CNN

EXPECTED = {
    "gpt2": [
        ("layer1", "transformer.h.0", DIM, TOKENS, True),
        ("layer2", "transformer.h.1", DIM, TOKENS, True),
    ],
    "llama": [
        ("layer1", "model.layers.0", DIM, TOKENS, True),
        ("layer2", "model.layers.1", DIM, TOKENS, True),
    ],
    "resnet": [
        ("stage1", "resnet.encoder.stages.0", 8, IMAGES, False),
        ("stage2", "resnet.encoder.stages.1", 12, IMAGES, False),
    ],
    "convnext": [
        ("stage1", "convnext.encoder.stages.0", 8, IMAGES, False),
        ("stage2", "convnext.encoder.stages.1", 12, IMAGES, False),
    ],
}


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_points_have_the_path_width_layout_and_causality_of_the_model(name: str) -> None:
    assert points(CASES[name].host()) == [InjectionPoint(*values) for values in EXPECTED[name]]


@pytest.mark.parametrize("name", ["bert", "vit"])
def test_points_of_encoders_are_not_causal(name: str) -> None:
    host = CASES[name].host()
    found = points(host)
    assert [(p.name, p.dim, p.topology, p.causal) for p in found] == [
        ("layer1", DIM, TOKENS, False),
        ("layer2", DIM, TOKENS, False),
    ]
    layer = {"bert": "BertLayer", "vit": "ViTLayer"}[name]
    assert [type(host.get_submodule(p.path)).__name__ for p in found] == [layer, layer]


def test_points_are_proved_by_a_forward_when_a_model_is_grown(case: Case) -> None:
    host = case.host()
    model = grow(host)
    assert [slot.point for slot in model.slots.values()] == points(host)


def test_an_encoder_that_is_set_up_as_a_decoder_is_causal() -> None:
    assert [point.causal for point in points(bert(is_decoder=True))] == [True, True]


def test_a_model_that_looks_ahead_and_says_that_it_is_causal_is_causal() -> None:
    model = bert()
    assert [point.causal for point in points(model)] == [False, False]
    model.bert.encoder.layer[
        1
    ].attention.self.is_causal = True  # as of models that look ahead in a prompt alone
    assert [point.causal for point in points(model)] == [True, True]


def clip_text() -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=VOCAB, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=1
        )
    )


@pytest.mark.parametrize(("build", "causal"), [(clip_text, True), (bert, False)])
@pytest.mark.parametrize("training", [False, True])
def test_a_model_that_does_not_say_whether_it_is_causal_is_asked(
    build: object, causal: bool, training: bool
) -> None:
    model = build().train(training)  # type: ignore[operator]
    numbers = torch.get_rng_state()
    assert [point.causal for point in points(model)] == [causal] * 2
    assert torch.equal(torch.get_rng_state(), numbers)
    assert {module.training for module in model.modules()} == {training}


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert"])
def test_causality_is_what_the_model_does(name: str) -> None:
    case = CASES[name]
    model = grow(case.host())
    seen: list[torch.Tensor] = []
    slot = model.slots["layer2"]
    slot.register_forward_hook(lambda _m, _a, out: seen.append(out))
    ids = case.inputs()["input_ids"]
    changed = torch.cat([ids[:, :-1], (ids[:, -1:] + 1) % 40], dim=1)
    model(input_ids=ids)
    model(input_ids=changed)
    assert torch.equal(seen[0][:, :-1], seen[1][:, :-1]) is slot.point.causal


@pytest.mark.parametrize(("kind", "name"), [(GPT2Model, "gpt2"), (LlamaModel, "llama"), (BertModel, "bert")])
def test_a_model_without_a_head_has_the_same_points(kind: type, name: str) -> None:
    with_head = points(CASES[name].host())
    without = points(kind(CASES[name].host().config))
    assert [(p.name, p.dim, p.causal) for p in without] == [(p.name, p.dim, p.causal) for p in with_head]


def test_every_takes_each_so_many_layers_and_keeps_their_numbers() -> None:
    host = CASES["llama"].host()
    assert [point.name for point in points(host, every=2)] == ["layer2"]
    assert list(grow(host, every=2).slots) == ["layer2"]
    with pytest.raises(ValueError, match="every must be from 1 to 2, the number of layers, not 3"):
        points(host, every=3)
    with pytest.raises(ValueError, match="not 0"):
        points(host, every=0)


def test_places_may_be_named_by_point_or_by_path() -> None:
    assert list(grow(CASES["llama"].host(), ["layer2"]).slots) == ["layer2"]
    model = grow(CASES["llama"].host(), "model.layers.*.mlp")
    assert {name: slot.point.causal for name, slot in model.slots.items()} == {
        "model_layers_0_mlp": True,
        "model_layers_1_mlp": True,
    }


def test_a_place_whose_output_is_a_model_output_can_hold_a_slot() -> None:
    host = CASES["bert"].host()
    model = grow(host, ["bert.encoder"])
    assert model.slots["bert.encoder"].point.dim == DIM
    assert torch.equal(
        model(**CASES["bert"].inputs()).logits, CASES["bert"].host()(**CASES["bert"].inputs()).logits
    )


def albert() -> AlbertModel:
    return AlbertModel(
        AlbertConfig(
            vocab_size=8, embedding_size=8, hidden_size=8, intermediate_size=8, num_attention_heads=1
        )
    )


def test_a_model_whose_layers_are_shared_is_refused_with_what_can_be_done() -> None:
    with pytest.raises(HostError, match=r"(?s)cannot be derived.*albert_layer_groups.*do not run once each"):
        points(albert())


def prophetnet() -> ProphetNetModel:
    return ProphetNetModel(
        ProphetNetConfig(
            vocab_size=VOCAB,
            hidden_size=8,
            num_encoder_layers=2,
            num_decoder_layers=2,
            num_encoder_attention_heads=2,
            num_decoder_attention_heads=2,
            encoder_ffn_dim=8,
            decoder_ffn_dim=8,
        )
    )


def test_a_decoder_whose_positions_are_those_of_the_tokens_several_times_over_has_no_points() -> None:
    assert [point.name for point in points(prophetnet())] == ["encoder_layer1", "encoder_layer2"]


def t5() -> T5ForConditionalGeneration:
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=VOCAB, d_model=8, d_kv=4, d_ff=8, num_layers=2, num_heads=2, decoder_start_token_id=0
        )
    )


def whisper() -> WhisperModel:
    return WhisperModel(
        WhisperConfig(
            vocab_size=VOCAB,
            d_model=8,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=8,
            decoder_ffn_dim=8,
            num_mel_bins=4,
            max_source_positions=8,
            **{**NO_TOKENS, "pad_token_id": 0},
        )
    )


def swin() -> SwinModel:
    return SwinModel(
        SwinConfig(image_size=16, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=2)
    )


def clip() -> CLIPModel:
    part = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    text = {**part, "vocab_size": VOCAB, **NO_TOKENS, "eos_token_id": 2}
    return CLIPModel(CLIPConfig(text_config=text, vision_config={**part, "image_size": 8, "patch_size": 4}))


def llava() -> LlavaModel:
    part = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlavaModel(
        LlavaConfig(
            text_config={"model_type": "llama", "vocab_size": VOCAB, **part},
            vision_config={"model_type": "clip_vision_model", **part, "image_size": 8, "patch_size": 4},
            image_token_id=VOCAB - 1,
        )
    )


def wav2vec2() -> Wav2Vec2Model:
    return Wav2Vec2Model(
        Wav2Vec2Config(
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=2,
            num_attention_heads=2,
            conv_dim=[8, 8],
            conv_kernel=[10, 8],
            conv_stride=[20, 16],
            num_conv_pos_embedding_groups=2,
        )
    )


FAMILIES = {
    "encoder-decoder": (t5, {"encoder_layer": (2, 8, False), "decoder_layer": (2, 8, True)}),
    "speech": (whisper, {"encoder_layer": (1, 8, False), "decoder_layer": (1, 8, True)}),
    "sound": (wav2vec2, {"encoder_layer": (2, 8, False)}),
    "two towers": (clip, {"text_model_layer": (1, 8, True), "vision_model_layer": (1, 8, False)}),
    "language model with a vision part": (llava, {"language_model_layer": (2, 8, True)}),
}


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_each_tower_has_points_of_its_own_with_its_own_causality(family: str) -> None:
    build, expected = FAMILIES[family]
    found = [(point.name, point.dim, point.causal) for point in points(build())]
    assert [point for point in found if "conv" not in point[0] and "feature" not in point[0]] == [
        (f"{prefix}{i + 1}", dim, causal) for prefix, (n, dim, causal) in expected.items() for i in range(n)
    ]


def test_stages_of_tokens_have_the_width_that_each_returns() -> None:
    found = points(swin())
    assert [(p.name, p.path, p.dim, p.topology) for p in found] == [
        ("stage1", "encoder.layers.0", 16, TOKENS),
        ("stage2", "encoder.layers.1", 16, TOKENS),
    ]


def test_a_tower_that_the_example_runs_has_points_too() -> None:
    model = llava()
    ids = torch.tensor([[VOCAB - 1] * 4 + [1, 2], [VOCAB - 1] * 4 + [3, 4]])
    example = {"input_ids": ids, "pixel_values": torch.randn(2, 3, 8, 8)}
    names = [point.name for point in points(model, example=example)]
    assert "vision_tower_layer1" in names
    assert "language_model_layer2" in names
    assert "vision_tower_layer1" in grow(model, example=example).slots


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_seed_of_each_family_is_isolated_fossilises_and_loads(family: str) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        host = FAMILIES[family][0]().eval()
    example = example_inputs(host)
    bare = host(**example)[0]
    twin = copy.deepcopy(host)
    model = grow(host, config=open_config())
    model.evaluate_with(lambda: model(**example)[0].detach().flatten(1).square().mean(1))
    slot = next(name for name in model.slots if name.endswith("layer1"))
    bring_to(model, SeedStage.TRAINING, slot, "transformer:mlp")
    assert torch.equal(model(**example)[0], bare)
    bring_on(model, SeedStage.FOSSILIZED, slot)
    shake(model)
    assert not torch.equal(model.eval()(**example)[0], bare)
    other = grow(twin, config=open_config())
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.eval()(**example)[0], model(**example)[0])


def bring_on(model: GrowingModel, stage: SeedStage, slot: str) -> None:
    for _ in range(40):
        if model.slots[slot].stage is stage:
            return
        model.step_epoch(1.0)
        if model.slots[slot].stage is SeedStage.PROBATIONARY:
            model.advance_stage(slot)
    raise AssertionError(f"{stage.name} was not reached")


def test_an_encoder_decoder_generates_with_a_seed_that_treats_each_position_by_itself() -> None:
    model = grow(t5().eval(), config=open_config())
    ids = torch.arange(1, 9).view(2, 4)
    model.evaluate_with(lambda: model(input_ids=ids, labels=ids).loss.detach().expand(2))
    for slot in ("encoder_layer2", "decoder_layer1"):
        bring_to(model, SeedStage.FOSSILIZED, slot, "transformer:mlp")
    shake(model)
    options = {"max_new_tokens": 4, "do_sample": False}
    cached = model.eval().generate(ids, use_cache=True, **options)
    assert torch.equal(cached, model.generate(ids, use_cache=False, **options))


def test_places_that_are_named_by_path_are_causal_where_their_tower_is() -> None:
    model = grow(t5(), ["encoder.block.*", "decoder.block.*.layer.2"])
    assert {slot.point.path: slot.point.causal for slot in model.slots.values()} == {
        "encoder.block.0": False,
        "encoder.block.1": False,
        "decoder.block.0.layer.2": True,
        "decoder.block.1.layer.2": True,
    }


def test_a_module_that_is_no_transformers_model_is_refused() -> None:
    with pytest.raises(
        HostError, match=r"Sequential is not a transformers model\. kasmina_core\.MorphogeneticModel"
    ):
        grow(nn.Sequential(nn.Linear(2, 2)))  # type: ignore[arg-type]


def test_example_inputs_are_what_the_model_takes_and_always_the_same(case: Case) -> None:
    host = case.host()
    inputs = example_inputs(host)
    host(**inputs)
    again = example_inputs(host)
    assert list(inputs) == [host.main_input_name]
    assert torch.equal(inputs[host.main_input_name], again[host.main_input_name])


def test_example_images_have_the_dtype_of_the_model() -> None:
    host = CASES["vit"].host().to(torch.bfloat16)
    assert example_inputs(host)["pixel_values"].dtype is torch.bfloat16
    assert grow(host).slots["layer1"].alpha_buffer.dtype is torch.bfloat16
