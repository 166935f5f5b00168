"""Batches with padding, and packed documents."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hf_cases import CASES, Case
from kasmina_core import GerminationError, HostError, InjectionPoint, SeedContext, SeedStage, Topology
from kasmina_core.testing.lives import bring_to, open_config, shake
from torch import Tensor
from transformers import (
    CLIPConfig,
    CLIPModel,
    LongformerConfig,
    LongformerModel,
    T5Config,
    T5ForConditionalGeneration,
    Wav2Vec2Config,
    Wav2Vec2Model,
)

from kasmina_hf import TransformersCall, grow

ATTENTION, MLP = "transformer:attention", "transformer:mlp"
LENGTHS = (6, 3)
ACTIVE = [SeedStage.TRAINING, SeedStage.BLENDING, SeedStage.FOSSILIZED]


def padded(case: Case, side: str) -> tuple[Tensor, Tensor]:
    """Two sequences of different lengths in one batch, and their mask."""
    ids = case.inputs()["input_ids"][:2].clone()
    t = ids.shape[1]
    mask = torch.ones_like(ids)
    for row, length in enumerate(LENGTHS):
        hidden = slice(length, t) if side == "right" else slice(0, t - length)
        ids[row, hidden], mask[row, hidden] = 0, 0
    return ids, mask


def real_positions(mask: Tensor) -> Tensor:
    return (mask.cumsum(-1) - 1).clamp(min=0)


@pytest.mark.parametrize("blueprint", [MLP, ATTENTION])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("stage", ACTIVE)
def test_padding_changes_nothing_for_the_tokens_of_a_decoder(
    speaker: Case, blueprint: str, side: str, stage: SeedStage
) -> None:
    model, (ids, mask) = speaker.grown(stage, blueprint), padded(speaker, side)
    together = model(input_ids=ids, attention_mask=mask, position_ids=real_positions(mask)).logits
    for row in range(2):
        real = mask[row] == 1
        alone = model(input_ids=ids[row : row + 1, real]).logits
        torch.testing.assert_close(together[row : row + 1, real], alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("blueprint", [MLP, ATTENTION])
@pytest.mark.parametrize("stage", ACTIVE)
def test_padding_changes_nothing_for_an_encoder(stage: SeedStage, blueprint: str) -> None:
    case = CASES["bert"]
    model, (ids, mask) = case.grown(stage, blueprint), padded(case, "right")
    together = model(input_ids=ids, attention_mask=mask).logits
    for row in range(2):
        alone = model(input_ids=ids[row : row + 1, mask[row] == 1]).logits
        torch.testing.assert_close(together[row : row + 1], alone, atol=1e-4, rtol=1e-4)


def test_an_attention_seed_learns_from_a_padded_batch_what_it_does_from_each_sequence_alone() -> None:
    case, gradients = CASES["bert"], []
    ids, mask = padded(case, "right")
    for is_together in (True, False):
        model = case.grown(SeedStage.BLENDING, ATTENTION)
        if is_together:
            model(input_ids=ids, attention_mask=mask).logits.square().sum().backward()
        else:
            for row in range(2):
                model(input_ids=ids[row : row + 1, mask[row] == 1]).logits.square().sum().backward()
        gradients.append([p.grad for p in model.seed_parameters()])
    for one, other in zip(*gradients, strict=True):
        assert one is not None
        assert bool(one.any())
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)


# -- packed documents, and masks of other forms --------------------------------------------------------------------


def packed(case: Case) -> tuple[Tensor, list[Tensor]]:
    """Documents of 6, 3 and 1 tokens in one row, and each by itself."""
    ids = case.inputs()["input_ids"]
    alone = [ids[:1], ids[1:2, :3], ids[2:3, :1]]
    return torch.cat(alone, 1), alone


def packed_call(kind: str) -> dict[str, Any]:
    positions = torch.cat([torch.arange(n) for n in (6, 3, 1)])[None]
    if kind == "position_ids":
        return {"position_ids": positions, "use_cache": False}
    if kind == "cu_seq_lens":
        ends = torch.tensor([0, 6, 9, 10], dtype=torch.int32)
        lengths = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 6, "max_length_k": 6}
        return {"position_ids": positions, "use_cache": False, **lengths}
    allowed = torch.block_diag(*(torch.ones(n, n) for n in (6, 3, 1))).tril().bool()[None, None]
    mask = allowed if kind == "bool" else torch.zeros(1, 1, 10, 10).masked_fill(~allowed, -torch.inf)
    return {"position_ids": positions, "attention_mask": mask}


@pytest.mark.parametrize("kind", ["position_ids", "cu_seq_lens", "bool", "added"])
@pytest.mark.parametrize("stage", ACTIVE)
def test_documents_in_a_row_do_not_know_of_each_other(speaker: Case, kind: str, stage: SeedStage) -> None:
    model, (ids, alone) = speaker.grown(stage, ATTENTION), packed(speaker)
    together = model(input_ids=ids, **packed_call(kind)).logits
    for part, one in zip(together.split([6, 3, 1], 1), alone, strict=True):
        torch.testing.assert_close(part, model(input_ids=one).logits, atol=1e-4, rtol=1e-4)


def test_positions_that_a_model_of_text_and_images_shares_are_one_document() -> None:
    read = TransformersCall()
    positions = torch.tensor([0, 1, 1, 1, 2, 0, 1]).expand(3, 1, -1)
    host, ids = CASES["llama"].host(), torch.zeros(1, 7, dtype=torch.long)
    context = read(host, (ids,), {"position_ids": positions, "use_cache": False})
    assert isinstance(context, SeedContext)
    assert context.documents is not None
    assert context.documents.tolist() == [[0, 0, 0, 0, 0, 1, 1]]


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (torch.ones(6, 6).tril().triu(-2).bool().expand(2, 1, 6, 6), "no combination of padding, documents"),
        (torch.full((2, 1, 6, 6), -0.5), "weighs positions"),
        (torch.zeros(2, 2, 6, 6), r"shape \(2, 2, 6, 6\) cannot be followed"),
    ],
)
def test_a_mask_that_a_seed_cannot_follow_is_refused(mask: Tensor, words: str) -> None:
    case = CASES["llama"]
    model, ids = case.grown(SeedStage.FOSSILIZED, ATTENTION), case.inputs()["input_ids"][:2]
    with pytest.raises(HostError, match=words):
        model(input_ids=ids, attention_mask=mask)


def test_encoder_and_decoder_have_masks_of_their_own() -> None:
    config = T5Config(
        vocab_size=48, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        host = T5ForConditionalGeneration(config).eval()
    ids = torch.arange(1, 13).view(2, 6)
    example = {"input_ids": ids, "decoder_input_ids": ids, "use_cache": False}
    wanted = [
        InjectionPoint("reads", "encoder.block.0", 16, Topology.TRANSFORMER),
        InjectionPoint("writes", "decoder.block.0", 16, Topology.TRANSFORMER, causal=True),
    ]
    model = grow(host, wanted, example=example, config=open_config())
    model.evaluate_with(lambda: model(**example).logits.square().mean((1, 2)))
    for slot in model.slots:
        bring_to(model, SeedStage.FOSSILIZED, slot, ATTENTION)
    shake(model)
    read, written = torch.ones(2, 6), torch.ones(2, 6)
    read[1, 4:], written[1, 3:] = 0, 0
    together = model.eval()(
        input_ids=ids, decoder_input_ids=ids, attention_mask=read, decoder_attention_mask=written
    ).logits
    alone = model(input_ids=ids[1:, :4], decoder_input_ids=ids[1:, :3]).logits
    torch.testing.assert_close(together[1:, :3], alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("blueprint", [MLP, ATTENTION])
@pytest.mark.parametrize("stage", ACTIVE)
def test_prompts_padded_on_the_left_continue_as_if_alone(
    speaker: Case, stage: SeedStage, blueprint: str
) -> None:
    model, (ids, mask) = speaker.grown(stage, blueprint), padded(speaker, "left")
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    together = model.generate(ids, attention_mask=mask, **options)
    for row, length in enumerate(LENGTHS):
        alone = model.generate(ids[row : row + 1, -length:], **options)
        assert torch.equal(together[row, -length - 5 :], alone[0])


_ATTENTION = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def born(make: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make().eval()


def fossil(model: Any, slot: str, example: dict[str, Tensor]) -> Any:
    model.evaluate_with(lambda: next(iter(model(**example).values())).square().flatten(1).mean(1))
    bring_to(model, SeedStage.FOSSILIZED, slot, ATTENTION)
    shake(model)
    return model.eval()


def test_a_seed_mixes_the_patches_of_images_beside_text_that_is_padded() -> None:
    text = {"vocab_size": 48, "max_position_embeddings": 16, "eos_token_id": 2, **_ATTENTION}
    vision = {"image_size": 8, "patch_size": 4, **_ATTENTION}
    host = born(lambda: CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)))
    ids, images = torch.arange(3, 15).view(2, 6), torch.linspace(-1, 1, 384).view(2, 3, 8, 8)
    mask = torch.ones_like(ids)
    mask[1, 3:] = 0
    example = {"input_ids": ids, "pixel_values": images, "attention_mask": mask}
    model = grow(host, example=example, config=open_config())
    before = model(**example).image_embeds
    fossil(model, "vision_model_layer1", example)
    together = model(**example).image_embeds
    assert not torch.allclose(together, before, atol=1e-4)
    alone = model(input_ids=ids[1:, :3], pixel_values=images[1:]).image_embeds
    torch.testing.assert_close(together[1:], alone, atol=1e-4, rtol=1e-4)


def test_a_mask_of_the_samples_of_sound_is_followed_by_steps() -> None:
    config = Wav2Vec2Config(
        conv_dim=(8, 8),
        conv_stride=(4, 2),
        conv_kernel=(4, 2),
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        feat_extract_norm="layer",
        **_ATTENTION,
    )
    host = born(lambda: Wav2Vec2Model(config))
    sound = torch.linspace(-3, 3, 320).sin().view(2, 160)
    model = grow(host, ["encoder.layers.0"], example={"input_values": sound}, config=open_config())
    fossil(model, "encoder_layers_0", {"input_values": sound})
    mask = torch.ones(2, 160, dtype=torch.long)
    mask[1, 80:] = 0
    slot, seen = model.slots["encoder_layers_0"], []
    slot.register_forward_hook(lambda _m, args, out: seen.append((args[0], out)))
    model(input_values=sound * mask, attention_mask=mask)
    features, grown = seen[0]
    torch.testing.assert_close(grown[1:, 10:], features[1:, 10:])
    assert slot.seed is not None
    torch.testing.assert_close(grown[1:, :10], slot.seed(features[1:, :10]), atol=1e-4, rtol=1e-4)


def test_a_model_that_pads_sequences_itself_is_refused_where_it_does() -> None:
    config = LongformerConfig(vocab_size=48, attention_window=4, max_position_embeddings=40, **_ATTENTION)
    host, ids = born(lambda: LongformerModel(config)), torch.arange(3, 19).view(2, 8)
    model = fossil(grow(host, example={"input_ids": ids}, config=open_config()), "layer1", {"input_ids": ids})
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    together = model(ids, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(together[1:, :4], model(ids[1:, :4]).last_hidden_state, atol=1e-4, rtol=1e-4)
    with pytest.raises(
        HostError, match=r"real: \(2, 6\)\n.*features: \(2, 8, 16\)(?s:.*)length that it keeps"
    ):
        model(ids[:, :6])
    short = grow(born(lambda: LongformerModel(config)), example={"input_ids": ids[:, :6]})
    with pytest.raises(GerminationError, match=r"it mixes positions(?s:.*)real: \(2, 6\)"):
        short.germinate("layer1", ATTENTION)
