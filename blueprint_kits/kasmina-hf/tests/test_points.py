"""Points read off configs and modules."""

from __future__ import annotations

import pytest
import torch
from hf_cases import CASES, DIM, VOCAB, Case, bert
from kasmina_core import HostError, InjectionPoint, Topology
from torch import nn
from transformers import (
    BertModel,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    GPT2Model,
    LlamaModel,
    SwinConfig,
    SwinModel,
    T5Config,
    T5Model,
)

from kasmina_hf import example_inputs, grow, points

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


def t5() -> T5Model:
    return T5Model(T5Config(vocab_size=8, d_model=8, d_kv=4, d_ff=8, num_layers=2, num_heads=2))


def swin() -> SwinModel:
    return SwinModel(
        SwinConfig(image_size=16, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=2)
    )


def clip() -> CLIPModel:
    part = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    return CLIPModel(CLIPConfig(text_config=part, vision_config={**part, "image_size": 8, "patch_size": 4}))


@pytest.mark.parametrize(
    ("build", "reason", "lists"),
    [
        (t5, "it is an encoder with a decoder", r"encoder\.block\.\*  \(2\)\n  decoder\.block\.\*  \(2\)"),
        (swin, "its config gives no width for each of its stages", r"encoder\.layers\.\*  \(2\)"),
        (
            clip,
            "its config has no num_hidden_layers and hidden_size",
            r"text_model\.encoder\.layers\.\*  \(1\)",
        ),
    ],
)
def test_an_unsupported_model_is_refused_with_what_can_be_done(
    build: object, reason: str, lists: str
) -> None:
    model = build()  # type: ignore[operator]
    with pytest.raises(HostError, match=rf"(?s)cannot be derived: {reason}.*Name modules by hand.*{lists}"):
        points(model)


def test_an_unsupported_model_grows_where_places_are_named_by_hand() -> None:
    ids = torch.arange(8).view(2, 4)
    model = grow(t5(), ["encoder.block.*"], example={"input_ids": ids, "decoder_input_ids": ids})
    assert [slot.point.dim for slot in model.slots.values()] == [8, 8]


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
