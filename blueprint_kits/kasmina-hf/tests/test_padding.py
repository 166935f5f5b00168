"""Batches with padding."""

from __future__ import annotations

import pytest
import torch
from hf_cases import CASES, Case
from kasmina_core import HostError, SeedStage
from torch import Tensor

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


@pytest.mark.parametrize(("blueprint", "side"), [(MLP, "right"), (MLP, "left"), (ATTENTION, "right")])
@pytest.mark.parametrize("stage", ACTIVE)
def test_padding_changes_nothing_for_the_tokens_of_a_decoder(
    speaker: Case, blueprint: str, side: str, stage: SeedStage
) -> None:
    model, (ids, mask) = speaker.grown(stage, blueprint), padded(speaker, side)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    together = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    for row in range(2):
        real = mask[row] == 1
        alone = model(input_ids=ids[row : row + 1, real]).logits
        torch.testing.assert_close(together[row : row + 1, real], alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("stage", ACTIVE)
def test_padding_changes_nothing_for_an_encoder_with_a_seed_that_does_not_mix_positions(
    stage: SeedStage,
) -> None:
    case = CASES["bert"]
    model, (ids, mask) = case.grown(stage, MLP), padded(case, "right")
    together = model(input_ids=ids, attention_mask=mask).logits
    for row in range(2):
        alone = model(input_ids=ids[row : row + 1, mask[row] == 1]).logits
        torch.testing.assert_close(together[row : row + 1], alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("stage", [SeedStage.BLENDING, SeedStage.FOSSILIZED])
def test_an_attention_seed_in_an_encoder_refuses_padding_and_takes_full_batches(stage: SeedStage) -> None:
    case = CASES["bert"]
    model, (ids, mask) = case.grown(stage, ATTENTION), padded(case, "right")
    with pytest.raises(
        HostError, match=r"'layer1' mixes positions and would look at padding:.*\n.*'transformer:mlp'"
    ):
        model(input_ids=ids, attention_mask=mask)
    full = model(input_ids=ids, attention_mask=torch.ones_like(mask)).logits
    assert torch.equal(full, model(input_ids=ids).logits)


@pytest.mark.parametrize("stage", [SeedStage.BLENDING, SeedStage.FOSSILIZED])
def test_an_attention_seed_in_a_decoder_refuses_padding_before_a_token(
    speaker: Case, stage: SeedStage
) -> None:
    model, (ids, mask) = speaker.grown(stage, ATTENTION), padded(speaker, "left")
    with pytest.raises(HostError, match=r"would look at padding before a token:.*\nPad on the right"):
        model(input_ids=ids, attention_mask=mask)
    with pytest.raises(HostError, match="padding before a token"):
        model.generate(ids, attention_mask=mask, max_new_tokens=2, do_sample=False, pad_token_id=0)


def test_an_attention_seed_learns_from_no_batch_in_which_it_would_look_at_padding() -> None:
    case = CASES["bert"]
    model, (ids, mask) = case.grown(SeedStage.TRAINING, ATTENTION), padded(case, "right")
    with pytest.raises(HostError, match="would look at padding"):
        model.train()(input_ids=ids, attention_mask=mask)
    # In evaluation a seed in TRAINING does not run.
    assert torch.equal(
        model.eval()(input_ids=ids, attention_mask=mask).logits,
        case.host()(input_ids=ids, attention_mask=mask).logits,
    )


def test_a_mask_of_another_form_is_refused_by_a_seed_that_cannot_follow_it() -> None:
    case = CASES["llama"]
    model, ids = case.grown(SeedStage.FOSSILIZED, ATTENTION), case.inputs()["input_ids"]
    mask = torch.zeros(len(ids), 1, ids.shape[1], ids.shape[1])
    with pytest.raises(HostError, match="would look at padding"):
        model(input_ids=ids, attention_mask=mask)


@pytest.mark.parametrize("stage", ACTIVE)
def test_prompts_padded_on_the_left_continue_as_if_alone(speaker: Case, stage: SeedStage) -> None:
    model, (ids, mask) = speaker.grown(stage, MLP), padded(speaker, "left")
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    together = model.generate(ids, attention_mask=mask, **options)
    for row, length in enumerate(LENGTHS):
        alone = model.generate(ids[row : row + 1, -length:], **options)
        assert torch.equal(together[row, -length - 5 :], alone[0])
