"""The command that tries every architecture."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import (
    CLIPConfig,
    EsmConfig,
    GPTNeoConfig,
    Mamba2Config,
    MixtralConfig,
    RTDetrConfig,
    Zamba2Config,
)

from kasmina_hf import sweep
from kasmina_hf.shrinking import RECIPES, shrunken


def test_a_config_is_shrunken_with_its_parts() -> None:
    small = shrunken(CLIPConfig)
    for part in (small.text_config, small.vision_config):
        assert (part.hidden_size, part.num_hidden_layers, part.num_attention_heads) == (32, 4, 2)
    assert small.text_config.vocab_size == 64
    assert all(0 <= token < 64 for token in (small.text_config.eos_token_id, small.text_config.bos_token_id))


def test_a_part_keeps_what_the_whole_says_of_it() -> None:
    small = shrunken(RTDetrConfig)
    assert small.backbone_config.out_features == RTDetrConfig().backbone_config.out_features
    assert small.backbone_config.depths == (1, 1, 1, 1)


def test_a_list_with_an_item_per_layer_is_as_long_as_there_are_layers() -> None:
    filled = next(recipe for recipe in RECIPES if recipe.fill and recipe.width == 32)
    small = shrunken(GPTNeoConfig, filled)
    assert (small.num_layers, small.attention_layers) == (4, ["global", "local", "global", "local"])
    few = shrunken(Zamba2Config, filled)
    assert (few.num_hidden_layers, set(few.layers_block_type)) == (4, set(Zamba2Config().layers_block_type))


def test_numbers_that_a_config_leaves_open_are_given_by_a_recipe_that_fills() -> None:
    filled = next(recipe for recipe in RECIPES if recipe.fill and recipe.width == 32)
    small = shrunken(EsmConfig, filled)
    assert (small.vocab_size, small.pad_token_id, EsmConfig().vocab_size) == (64, 0, None)


def test_a_divisor_keeps_the_ratios_of_widths() -> None:
    eighth = next(recipe for recipe in RECIPES if recipe.divisor == 8)
    whole, small = Mamba2Config(), shrunken(Mamba2Config, eighth)
    assert small.hidden_size == whole.hidden_size // 8
    assert small.hidden_size * small.expand == small.num_heads * small.head_dim


def test_a_recipe_that_leaves_widths_shrinks_counts_alone() -> None:
    few = next(recipe for recipe in RECIPES if recipe.name == "few layers")
    small = shrunken(MixtralConfig, few)
    assert (small.num_hidden_layers, small.num_local_experts) == (4, 4)
    assert small.hidden_size == MixtralConfig().hidden_size


@pytest.mark.parametrize(
    ("name", "towers"),
    [
        ("marian", ["encoder.layers.* 4 btd", "decoder.layers.* 4 btd causal"]),
        ("xlnet", ["layer.* 4 tbd"]),
        ("sam_vision_model", ["vision_encoder.layers.* 4 bhwc"]),
        ("segformer", ["stages.* 4 bchw"]),
        ("openai-gpt", ["h.*:0 4 btd causal"]),  # layers return lists
        ("deepseek_v4", ["layers.*.self_attn 4 btd causal"]),  # layers hand on several streams
        ("decision_transformer", ["encoder.h.* 3 btd causal"]),  # takes states, actions, rewards
        ("siglip2", ["text_model.encoder.layers.* 4 btd", "vision_model.encoder.layers.* 4 btd"]),
    ],
)
def test_an_architecture_offers_points_and_a_seed_lives_there(name: str, towers: list[str]) -> None:
    row = sweep.Row(name)
    sweep.examine(row)
    assert (row.towers, row.life, row.glob) == (towers, "whole", f"{towers[0].split()[0]}"), row.reason


def test_an_architecture_that_offers_no_points_says_why() -> None:
    row = sweep.Row("albert")
    sweep.examine(row)
    assert (row.points, row.life) == (0, "")
    assert "do not run once each" in row.reason


@pytest.mark.parametrize("name", ["uvdoc", "lw_detr"])
def test_fields_that_a_default_config_lacks_are_given(name: str) -> None:
    row = sweep.Row(name)
    sweep.examine(row)
    assert (row.recipe, row.life) == ("width 32", "whole"), row.reason


def test_a_point_that_must_be_declared_is_named() -> None:
    """Rows of samples and positions in one axis: the refusal says the declaration under which a slot holds."""
    row = sweep.Row("qwen3_asr_encoder")
    sweep.examine(row)
    assert (row.points, row.glob, row.stated) == (0, "", "layers.0")
    assert "| `layers.0`, declared |" in sweep.table([row])


def test_an_architecture_that_takes_too_long_is_given_up() -> None:
    (row,) = sweep.sweep([sweep.Row("bert")], seconds=0.01)
    assert row.reason == "not done after 0 s"


@pytest.fixture(autouse=True)
def few_architectures(monkeypatch: pytest.MonkeyPatch) -> None:
    """All configs take long to import."""
    few = (
        "albert", "clip", "clip_text_model", "decision_transformer", "deepseek_v4", "llama", "lw_detr", "marian", "openai-gpt",
        "qwen3_asr_encoder", "sam_vision_model", "segformer", "siglip2", "uvdoc", "xlnet",
    )  # fmt: skip
    monkeypatch.setattr(sweep, "MODEL_MAPPING_NAMES", {name: sweep.MODEL_MAPPING_NAMES[name] for name in few})


def test_parts_of_other_architectures_are_known() -> None:
    found = sweep.architectures()
    assert found["clip_text_model"] == ["clip"]
    assert found["llama"] == []


def test_the_command_prints_a_table_and_writes_what_it_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def found(rows: list[sweep.Row], jobs: int, seconds: float) -> list[sweep.Row]:
        for row in rows:
            row.recipe, row.inputs, row.points, row.towers = (
                "width 32",
                {"input_ids": [2, 8]},
                4,
                ["layers.* 4 btd"],
            )
            row.glob, row.life, row.blueprint = "layers.*", "whole", "transformer:mlp"
        return rows

    monkeypatch.setattr(sweep, "sweep", found)
    assert sweep.main(["--only", "^llama$", "--json", str(tmp_path / "rows.json")]) == 0
    printed = capsys.readouterr().out
    assert "| llama | 4 | `layers.* 4 btd` | `layers.*` | whole (transformer:mlp) |" in printed
    assert "offer points by themselves 1 (100.0%)" in printed
    assert [row["name"] for row in json.loads((tmp_path / "rows.json").read_text())] == ["llama"]
