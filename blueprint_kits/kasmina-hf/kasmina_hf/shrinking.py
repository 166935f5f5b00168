"""Small configs of any architecture of transformers, by rules for the names of config fields."""

from __future__ import annotations

import dataclasses
import re
from typing import Any, Final, final

from transformers import PreTrainedConfig

LAYERS: Final = 4  # hybrids attend in every third or fourth
VOCABULARY: Final = 64

_COUNTS: Final = (
    (r"vocab_size|codebook_size|num_embeddings$", VOCABULARY),
    (r"^(?!num_feat_extract)(.*_)?(num_)?(hidden_)?(layers?|depth)$|^num_blocks$", LAYERS),
    (r"^attn_layer_period$", 2),
    (r"^attn_layer_offset$", 1),
    (r"^max_window_layers$|^first_k_dense_replace$", 1),
    (r"(^|_)(num|n|moe)_(.*_)?experts$", 4),
    (r"expert.*_per_tok(en)?$|(^|_)(moe_)?(top_?k|k)$", 2),
    (r"^(n_group|topk_group)$", 1),
    (r"^num_(queries|query_tokens|denoising)$", 8),
    (r"^(max_position_embeddings|n_positions|max_seq_len|block_size|max_target_positions|context_size)$", 64),
    (r"^max_source_positions$", 16),
    (r"(^|_)image_size$|^resolution$", 64),
    (r"^(patch_size|patch_stride)$", 8),
    (r"^window_size$", 2),
    (r"^rotary_dim$", 8),
)
_HEADS: Final = r"(^|_)heads$"
_HEAD_WIDTH: Final = r"head_dim$|^d_head$|^dim_head$|^d_kv$|^kv_channels$"
_RANK: Final = r"_rank$|state_size$|d_state$"
_INNER: Final = r"intermediate_size|ffn_dim$|^d_ff$|^(mlp|ffn|feedforward)_.*|dim_feedforward|feedforward_dim$|^d_inner$|linear_units$|^n_inner$"
_WIDTH: Final = r"hidden_size|^d_model$|^n_embd$|(^|_)dim$|_size_global$|embedding_size$|pooler_output_size|projection_size|proj_size$|_units$|channels$|_num_filters$|feature_size$"


@final
@dataclasses.dataclass(frozen=True)
class Recipe:
    """What is made small.

    Attributes:
        name: What the recipe is called.
        counts: Whether layers, words, experts, positions and images are.
        width: Width of the features; ``None`` leaves all widths.
        head_width: Width of a head; ``None`` leaves it.
    """

    name: str
    counts: bool = True
    width: int | None = None
    head_width: int | None = None


RECIPES: Final = (
    Recipe("width 32", width=32, head_width=16),
    Recipe("width 256", width=256),
    Recipe("width 128", width=128),
    Recipe("few layers"),
    Recipe("as it is", counts=False),
)
"""In the order in which they are tried; the first that builds and runs is used."""


def shrunken(kind: type[PreTrainedConfig], recipe: Recipe = RECIPES[0]) -> PreTrainedConfig:
    """Return a small config, by the names of its fields.

    Fields that are ``None`` by default stay so, since configs derive them from others. Parts are shrunk too.
    """
    config = kind()
    fields: dict[str, Any] = {}
    for field in dataclasses.fields(kind):
        part, default = vars(config).get(field.name), _default(field)
        if isinstance(part, PreTrainedConfig):
            fields[field.name] = shrunken(type(part), recipe)
        elif default is not None and (small := _smaller(field.name, default, recipe)) is not None:
            fields[field.name] = small
    if "use_cache" in vars(config):
        fields["use_cache"] = False
    if recipe.counts:
        last = VOCABULARY
        for name, value in sorted(
            vars(config).items()
        ):  # special tokens differ from each other and are words
            if re.search(r"token_(id|index)$", name) and isinstance(value, int) and value >= VOCABULARY:
                last -= 1
                fields[name] = last
    return kind(**fields)


def _default(field: Any) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else None


def _smaller(name: str, value: Any, recipe: Recipe) -> Any:
    """Return a smaller value for a field, ``None`` to leave it."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int):
        return next((min(value, most) for rule, most in _rules(recipe) if re.search(rule, name)), None)
    if isinstance(value, (list, tuple)) and value and all(type(item) is int for item in value):
        items = _smaller_list(name, len(value), recipe)
        return None if items is None else type(value)(items)
    return None


def _rules(recipe: Recipe) -> list[tuple[str, int]]:
    rules = list(_COUNTS) if recipe.counts else []
    if (w := recipe.width) is not None:
        rules.append((_HEADS, 2))
        if (d := recipe.head_width) is None:
            rules.append((_HEAD_WIDTH, 1 << 30))
        else:
            rules += [(r"^qk_(rope|nope)_head_dim$", d // 2), (_HEAD_WIDTH, d)]
        rules += [(_INNER, 2 * w), (_RANK, max(8, w // 8)), (_WIDTH, w)]
    return rules


def _smaller_list(name: str, n: int, recipe: Recipe) -> list[int] | None:
    if recipe.counts and re.search(r"^depths?$|^layers$|blocks_per_stage", name):
        return [1] * n
    if recipe.width is None:
        return None
    if "heads" in name:
        return [2] * n
    if re.search(r"hidden_sizes$|^embed_dims?$|dim_per_stage", name):
        return [recipe.width * (i + 1) for i in range(n)]
    return [recipe.width] * n if name in ("conv_dim", "tdnn_dim") else None
