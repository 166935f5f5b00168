"""Small configs of any architecture of transformers, by rules for the names of config fields."""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Iterator
from typing import Any, Final, final

from transformers import PreTrainedConfig

LAYERS: Final = 4  # hybrids attend in every third or fourth
VOCABULARY: Final = 64

_LAYERS: Final = r"^(?!num_feat_extract)(.*_)?(num_)?(hidden_)?(layers?|depth)$|^num_blocks$"
_COUNTS: Final = (
    (r"vocab_size|codebook_size|num_embeddings$", VOCABULARY),
    (r"^attn_layer_period$", 2),
    (r"^attn_layer_offset$", 1),
    (r"^max_window_layers$|^first_k_dense_replace$", 1),
    (r"(^|_)(num|n|moe)_(.*_)?experts$", 4),
    (r"^index_topk$", 16),
    (r"expert.*_per_tok(en)?$|(^|_)(moe_)?(top_?k|k)$", 2),
    (r"^(n_group|topk_group)$", 1),
    (r"^(num_(queries|query_tokens|denoising)|latent_query_num)$", 8),
    (r"^(max_position_embeddings|n_positions|max_seq_len|block_size|max_target_positions|context_size)$", 64),
    (r"^max_source_positions$", 16),
    (r"(^|_)image_size$|^resolution$", 64),
    (r"^(patch_size|patch_stride)$", 8),
    (r"^window_size$", 2),
    (r"^rotary_dim$", 8),
)
_MISSING: Final = (
    (r"^prediction_length$", 8),
    (r"sliding_window$", 4),
    (r"top_?k", 2),
    (r"^n_(routed|shared)_experts$", 4),
)
"""What numbers are that are ``None`` by default, beside the rules for those that are not."""
_HEADS: Final = r"(^|_)heads$"
_HEAD_WIDTH: Final = r"head_dim$|^d_head$|^dim_head$|^d_kv$|^kv_channels$"
_RANK: Final = r"_rank$|state_size$|d_state$"
_INNER: Final = r"intermediate_size|ffn_dim$|^d_ff$|^(mlp|ffn|feedforward)_.*|dim_feedforward|feedforward_dim$|^d_inner$|linear_units$|^n_inner$"
_WIDTH: Final = r"hidden_size|^d_(model|latents)$|adapter_input_size$|^n_embd$|(^|_)dim$|_size_global$|embedding_size$|pooler_output_size|projection_size|proj_size$|_units$|channels$|_num_filters$|feature_size$"
_WIDTHS: Final = r"channels|hidden_sizes$|^embed_dims?$|dim_per_stage|_dims$|_channels_list$|heads"


GIVEN: Final[dict[str, dict[str, Any]]] = {
    "hunyuan_vl": {
        "head_dim": 16,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 2, 2, 2]},
    },
    "lw_detr": {"projector_scale_factors": [1.0]},
    "pp_ocrv6_small_det": {
        "backbone_config": {
            "model_type": "pp_lcnet_v4",
            "block_configs": [[[3, 96, c, stride, False]] for c, stride in ((96, 1), (96, 2))]
            + [[[3, c // 2, c, 2, False]] for c in (192, 384)],
            "out_indices": [1, 2, 3, 4],
        },
        "layer_list_out_channels": [96, 96, 192, 384],
    },
    "reformer": {"axial_pos_shape": [2, 4]},
    "sam3_tracker": {
        "vision_config": {
            "model_type": "sam3_vision_model",
            "backbone_feature_sizes": [[32, 32], [16, 16], [8, 8]],
        }
    },
    "uvdoc": {"backbone_config": {"model_type": "uvdoc_backbone", "out_indices": [1, 2, 3, 4, 5, 6]}},
}
"""By model type, fields without which no model of its default config runs, or none of another size of images.

Checkpoints bring them in their configs.
"""


@final
@dataclasses.dataclass(frozen=True)
class Recipe:
    """What is made small.

    Attributes:
        name: What the recipe is called.
        counts: Whether layers, words, experts, positions and images are.
        width: Width of the features; ``None`` leaves all widths.
        head_width: Width of a head; ``None`` leaves it.
        divisor: By what widths and numbers of heads are divided, so that their ratios stay; with ``width=None``.
        fill: Whether numbers that are ``None`` by default, and lists with an item per layer, are given too.
        layers: Number of layers.
    """

    name: str
    counts: bool = True
    width: int | None = None
    head_width: int | None = None
    divisor: int = 1
    fill: bool = False
    layers: int = LAYERS


RECIPES: Final = (
    Recipe("width 32", width=32, head_width=16),
    Recipe("width 256", width=256),
    Recipe("width 128", width=128),
    Recipe("width 32, nothing missing", width=32, head_width=16, fill=True),
    Recipe("an eighth", divisor=8),
    Recipe("an eighth, nothing missing", divisor=8, fill=True),
    Recipe("width 32, twelve layers", width=32, head_width=16, fill=True, layers=12),
    Recipe("few layers"),
    Recipe("few layers, nothing missing", fill=True),
    Recipe("as it is", counts=False),
    Recipe("as it is, nothing missing", counts=False, fill=True),
)
"""In the order in which they are tried; the first that builds and runs is used."""


def shrunken(kind: type[PreTrainedConfig], recipe: Recipe = RECIPES[0]) -> PreTrainedConfig:
    """Return a small config, by the names of its fields.

    Fields that are ``None`` by default stay so, since configs derive them from others. Parts are shrunk too.
    """
    return _shrunken(kind(**copy.deepcopy(GIVEN.get(kind.model_type, {}))), recipe)


def _shrunken(config: PreTrainedConfig, recipe: Recipe) -> PreTrainedConfig:
    kind, given = type(config), vars(config)
    usual = vars(kind())
    fields: dict[str, Any] = {}
    layers = {given[name] for name in given if re.search(_LAYERS, name) and isinstance(given[name], int)}
    for field in dataclasses.fields(kind):
        name, value, default = field.name, given.get(field.name), _default(field)
        if isinstance(value, PreTrainedConfig):
            fields[name] = _shrunken(value, recipe)
            continue
        if name.startswith("_"):
            continue
        if value != usual.get(name):  # the config that this is a part of says so
            default = fields[name] = value
        if value is None and default is None and recipe.fill and "int" in str(field.type):
            fields[name] = _missing(name, recipe)
        elif default is not None and (small := _smaller(name, default, recipe)) is not None:
            fields[name] = small
        elif recipe.counts and (default is not None or recipe.fill):
            fields |= dict(_of_layers(name, value, layers, recipe.layers))
    stages = given.get("_out_indices")
    if stages != usual.get("_out_indices"):
        few = recipe.layers if recipe.counts and "num_hidden_layers" in given else max(stages)
        fields["out_indices"] = stages if max(stages) <= few else list(range(few + 1))[-len(stages) :]
    if "use_cache" in given:
        fields["use_cache"] = False
    if recipe.counts:
        last = VOCABULARY
        # Special tokens differ from each other and are words.
        for name, value in sorted({**given, **fields}.items()):
            if re.search(r"token_(id|index)$", name) and isinstance(value, int) and value >= VOCABULARY:
                last -= 1
                fields[name] = last
    return kind(**fields)


def _of_layers(name: str, value: Any, layers: set[int], few: int) -> Iterator[tuple[str, Any]]:
    """Yield what is left of a field with an item per layer, or with numbers of layers, if only few layers are."""
    if isinstance(value, dict) and value and all(isinstance(key, int) for key in value) and "layer" in name:
        yield name, {key: item for key, item in value.items() if key < few}
    if not isinstance(value, (list, tuple)) or not value:
        return
    if all(map(_repeated, value)):
        yield name, [[kinds, max(1, few // len(kinds))] for kinds, _ in value]
    elif len(value) in layers and len(value) > few:
        kinds = list(dict.fromkeys(map(str, value)))  # each kind of layer stays
        first = [value[[str(item) for item in value].index(kind)] for kind in kinds][:few]
        yield name, type(value)([*value[: few - len(first)], *first] if len(kinds) > 1 else value[:few])
    elif (
        re.search(r"layers?$|index(es)?$|indices$", name)
        and all(type(item) is int for item in value)
        and max(value) >= few
    ):
        yield name, type(value)(range(max(0, few - len(value)), few))


def _missing(name: str, recipe: Recipe) -> int | None:
    """Return a number for a field that is ``None`` by default."""
    if re.search(r"token_(id|index)$", name):
        return 0 if name.startswith("pad") else VOCABULARY  # of which the last word is chosen afterwards
    return next((most for rule, most in (*_MISSING, *_rules(recipe)) if re.search(rule, name)), None)


def _repeated(item: Any) -> bool:
    """Return whether an item says kinds of layers and how often they repeat."""
    return isinstance(item, list) and len(item) == 2 and isinstance(item[0], list) and type(item[1]) is int


def _default(field: Any) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else None


def _smaller(name: str, value: Any, recipe: Recipe) -> Any:
    """Return a smaller value for a field, ``None`` to leave it."""
    if isinstance(value, bool):
        return None
    if (
        recipe.divisor > 1
        and re.search(rf"{_HEADS}|{_INNER}|{_WIDTH}|{_WIDTHS}", name)
        and not re.search(_HEAD_WIDTH, name)
    ):
        return _divided(value, recipe.divisor)
    if isinstance(value, int):
        return next((min(value, most) for rule, most in _rules(recipe) if re.search(rule, name)), None)
    if isinstance(value, (list, tuple)) and value and all(type(item) is int for item in value):
        items = _smaller_list(name, len(value), recipe)
        return None if items is None else type(value)(items)
    return None


def _divided(value: Any, divisor: int) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(_divided(item, divisor) for item in value)
    return max(1, value // divisor) if type(value) is int and value >= divisor else value


def _rules(recipe: Recipe) -> list[tuple[str, int]]:
    rules = [(_LAYERS, recipe.layers), *_COUNTS] if recipe.counts else []
    if (w := recipe.width) is not None:
        rules.append((_HEADS, 2))
        if (d := recipe.head_width) is None:
            rules.append((_HEAD_WIDTH, 1 << 30))
        else:
            rules += [(r"^qk_(rope|nope)_head_dim$", d // 2), (_HEAD_WIDTH, d)]
        rules += [(r"n_groups$", 2), (r"^upsample_groups$", w)]
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
