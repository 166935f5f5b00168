"""Seeds that mix positions, in models whose calls say which tokens are padding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from kasmina_core import HostError, SeedStage
from kasmina_core.testing.lives import bring_to, open_config, shake
from timm_cases import timm
from torch import Tensor, nn

from kasmina_timm import GrowingModel, grow

PATCHES = 6
STAGES = [SeedStage.TRAINING, SeedStage.BLENDING, SeedStage.FOSSILIZED]


def naflexvit(class_token: bool, pool: str) -> nn.Module:
    torch.manual_seed(3)
    return timm.models.NaFlexVit(  # type: ignore[no-any-return]
        timm.models.naflexvit.NaFlexVitCfg(
            patch_size=4,
            embed_dim=16,
            depth=2,
            num_heads=2,
            class_token=class_token,
            reg_tokens=1,
            global_pool=pool,
            pos_embed_grid_size=(4, 4),
        ),
        num_classes=3,
    ).eval()


def patches(padding: int = 0) -> dict[str, Tensor]:
    """Two images of 2x3 patches, with padding behind them that is not zero."""
    drawn = torch.randn(2, PATCHES + 4, 3 * 4 * 4, generator=torch.Generator().manual_seed(5))
    there = [(y, x) for y in range(2) for x in range(3)] + [(0, 0)] * padding
    return {
        "patches": drawn[:, : PATCHES + padding],
        "patch_coord": torch.tensor(there).expand(2, -1, -1),
        "patch_valid": (torch.arange(PATCHES + padding) < PATCHES).expand(2, -1),
    }


def grown(stage: SeedStage, host: nn.Module, **options: Any) -> GrowingModel:
    model = grow(host, example=(patches(),), config=open_config(), **options)
    model.evaluate_with(lambda: F.cross_entropy(model(patches()), torch.tensor([0, 1]), reduction="none"))
    bring_to(model, stage, "blocks_0", "transformer:attention")
    shake(model)
    return model.eval()


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(("class_token", "pool"), [(True, "token"), (False, "avg")])
def test_padded_images_give_what_they_give_without_padding(
    stage: SeedStage, class_token: bool, pool: str
) -> None:
    host = naflexvit(class_token, pool)
    bare = host(patches())
    model = grown(stage, host)
    seen = model(patches())
    torch.testing.assert_close(model(patches(4)), seen)
    padded = patches(4)
    torch.testing.assert_close(model(padded.pop("patches"), **padded), seen)
    if stage is not SeedStage.TRAINING:
        assert not torch.allclose(seen, bare, atol=1e-3)


def test_what_such_a_seed_cannot_follow_is_refused() -> None:
    host = naflexvit(True, "token")
    model = grown(SeedStage.FOSSILIZED, host)
    with pytest.raises(HostError, match=r"'attn_mask' says which tokens[\s\S]*patch_valid"):
        model({**patches(), "attn_mask": torch.zeros(2, 1, 8, 8)})
    with pytest.raises(HostError, match="'src_key_padding_mask' hides positions"):
        model({**patches(), "patch_valid": None, "src_key_padding_mask": torch.ones(2, 8, dtype=torch.bool)})


def test_a_call_that_is_causal_makes_seeds_causal() -> None:
    torch.manual_seed(3)
    tokens: dict[str, Any] = {"global_pool": "", "num_classes": 0}
    host = timm.models.VisionTransformer(8, 4, embed_dim=16, depth=2, num_heads=2, **tokens).eval()
    model = grow(host, config=open_config())
    model.evaluate_with(lambda: model(images()).square().mean((1, 2)))
    bring_to(model, SeedStage.FOSSILIZED, "blocks_0", "transformer:attention")
    shake(model)
    changed = images()
    changed[..., 4:, 4:] += 1.0  # the last patch
    for causal in (True, False):
        before, after = (model.eval()(x, is_causal=causal) for x in (images(), changed))
        first_moves = not torch.equal(before[:, 0], after[:, 0])
        assert first_moves is not causal


def images() -> Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(6))
