"""Tensors for the inputs of a transformers model, by their names and the fields of its config."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

TOKENS: Final = 8
IMAGE_SIZE: Final = 64  # for configs without one; a ResNet shrinks images 32 times
SAMPLES: Final = 6400  # of sound: 19 steps of wav2vec 2, which masks ten in training
PATCHES: Final = 4  # along each side of an image
FRAMES: Final = 72  # of a spectrogram, for configs that do not say how many


def takes(model: PreTrainedModel, name: str) -> bool:
    """Return whether the forward of a model has a parameter of a name."""
    return name in inspect.signature(model.forward).parameters


def config_field(config: PreTrainedConfig, *names: str) -> Any:
    """Return the first of some fields that a config has, or one of its parts; ``None`` if none has any."""
    for part in parts_of(config):
        for name in names:
            if (value := getattr(part, name, None)) is not None:
                return value
    return None


def parts_of(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    """Yield a config and, in their order, the configs in it."""
    yield config
    for value in list(vars(config).values()):
        if isinstance(value, PreTrainedConfig):
            yield from parts_of(value)


def tensors_for(model: PreTrainedModel, name: str) -> list[Tensor]:
    """Return tensors that an input of a forward may be, the likely ones first."""
    maker = MAKERS.get(name) or RARE.get(name)
    if maker is not None:
        return maker(model)
    if name.endswith("input_ids"):
        return _tokens(model)
    if name.endswith(("mask", "padding")):
        return [torch.full((2, TOKENS), int(name.endswith("mask")), dtype=torch.long, device=model.device)]
    if re.search(r"timesteps$|_ids$|^freq$", name):
        return [torch.zeros(2, t, dtype=torch.long, device=model.device) for t in (TOKENS, 1)]
    shapes: list[tuple[int, ...]] = [
        shape
        for width in _widths_of(model, name)
        for shape in ((2, TOKENS, width), (2, width, TOKENS), (2, width))
    ]
    shapes.append((2, 1, SAMPLES))
    return [ramp(model, *shape) for shape in dict.fromkeys(shapes)]


def _widths_of(model: PreTrainedModel, name: str) -> list[int]:
    """Return the widths that features of a name may have: of fields named like it, of the first module, of the model."""
    config, widths = model.config, []
    for part in parts_of(config):
        for field, value in vars(part).items():
            stem = field.removeprefix("max_").removesuffix("_dim").removesuffix("_size")
            if stem != field and name.startswith(stem) and type(value) is int:
                widths.append(value)
    first = next((m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv1d, nn.LayerNorm))), None)
    size = getattr(first, "in_features", getattr(first, "in_channels", None))
    for value in (size, config_field(config, "hidden_size", "d_model"), 1):
        if type(value) is int:
            widths.append(value)
    return list(dict.fromkeys(widths))


def _tokens(model: PreTrainedModel) -> list[Tensor]:
    """Return two sequences of words that are not special, then some with places for images or sound before the words."""
    config = model.config
    vocabulary = config_field(config, "vocab_size")
    if not isinstance(vocabulary, int):  # of characters
        vocabulary = 4 * TOKENS
    special, places = set(), []
    for part in parts_of(config):
        for name, value in vars(part).items():
            if name.endswith(("token_id", "token_index")) and isinstance(value, int):
                special.add(value)
                if re.search(r"^(image|audio|video)_token_(id|index)$", name) and value < vocabulary:
                    places.append(value)
    words = [word for word in range(min(vocabulary, 4 * TOKENS)) if word not in special] or [0]
    most = config_field(config, "max_position_embeddings")
    t = min(TOKENS, most) if isinstance(most, int) and most > 0 else TOKENS
    ids = torch.tensor([words[(i + 1) % len(words)] for i in range(2 * t)], device=model.device).view(2, t)
    books = config_field(config, "num_codebooks")
    found = [ids]
    if isinstance(books, int) and books > 1:  # words and the codes of sound at each position, or codes alone
        found += [ids[..., None].expand(-1, -1, n).contiguous() for n in (books + 1, books)]
        found.append(ids.repeat(1, books).view(2, books, t))
    if (n := config_field(config, "num_query_tokens", "image_seq_length", "mm_tokens_per_image")) is not None:
        found += [torch.cat([ids.new_full((2, n), place), ids], dim=1) for place in dict.fromkeys(places)]
    return found


def ramp(model: PreTrainedModel, *shape: int) -> Tensor:
    return torch.linspace(-1.0, 1.0, math.prod(shape), device=model.device).view(shape).to(model.dtype)


def _images(model: PreTrainedModel) -> list[Tensor]:
    config = model.config
    c = config_field(config, "num_channels", "in_channels", "in_chans")
    c = c if isinstance(c, int) else 3
    if takes(model, "spatial_shapes"):  # patches, in a row
        return [ramp(model, 2, PATCHES**2, c * config_field(config, "patch_size") ** 2)]
    sizes: list[tuple[int, int]] = []
    given = config_field(config, "image_size", "input_size", "img_size", "max_img_size")
    for size in (given, IMAGE_SIZE, 2 * IMAGE_SIZE):
        pair = tuple(size[-2:]) if isinstance(size, Sequence) else (size, size)
        if takes(model, "prompt_pixel_values") and isinstance(pair[0], int):  # which stands above the image
            pair = (pair[0] // 2, pair[1])
        if all(isinstance(n, int) for n in pair) and pair not in sizes:
            sizes.append(pair)
    images = [ramp(model, 2, c, h, w) for h, w in sizes]
    frames = config_field(config, "num_frames", "frames_per_clip")
    if isinstance(frames, int):
        images = [ramp(model, 2, frames, c, h, w) for h, w in sizes] + images
    return images + [ramp(model, 2, n, c, h, w) for n in (1, 2) for h, w in sizes[:1]]


def _videos(model: PreTrainedModel) -> list[Tensor]:
    return [video for video in _images(model) if video.dim() == 5]


def _image(model: PreTrainedModel) -> list[Tensor]:
    return _images(model)[:1]


def _sounds(model: PreTrainedModel) -> list[Tensor]:
    bands = config_field(model.config, "num_mel_bins")
    frames = config_field(model.config, "max_length")
    sounds = [ramp(model, 2, SAMPLES), ramp(model, 2, 1, SAMPLES)]
    if isinstance(bands, int):
        sounds.insert(0, ramp(model, 2, frames if isinstance(frames, int) else FRAMES, bands))
    return sounds


def _spectrograms(model: PreTrainedModel) -> list[Tensor]:
    names = (
        "num_mel_bins", "feature_size", "input_feat_size", "input_feat_per_channel",
        "feature_projection_input_dim", "input_dim", "mel_bins", "n_mels", "input_size",
    )  # fmt: skip
    bands = [config_field(model.config, name) for name in names]
    stacked = config_field(model.config, "num_stacked_frames")
    bands += [n * stacked for n in bands if type(n) is int and type(stacked) is int]
    return [
        ramp(model, 2, *shape)
        for n in dict.fromkeys(bands)
        if type(n) is int
        for frames in _frames(model)
        for shape in ((n, frames), (frames, n), (1, frames, n))
    ]


def _frames(model: PreTrainedModel) -> list[int]:
    """Return numbers of frames, by what encoders ask for: all places, whole windows, as many as words or steps of sound."""
    places, window = (config_field(model.config, name) for name in ("max_source_positions", "n_window"))
    frames = [FRAMES]
    if isinstance(places, int) and places <= 4096:
        frames.append(2 * places)
    if isinstance(window, int):
        frames.append(2 * window)
    return [*frames, 8 * TOKENS, SAMPLES // 320]


def _frames_mask(model: PreTrainedModel) -> list[Tensor]:
    return [torch.ones(2, n, dtype=torch.long, device=model.device) for n in _frames(model)]


def _series(model: PreTrainedModel) -> list[Tensor]:
    channels = config_field(model.config, "num_input_channels", "input_size")
    t = _past(model)
    return [ramp(model, 2, t, channels if isinstance(channels, int) else 1), ramp(model, 2, t)]


def _past(model: PreTrainedModel) -> int:
    """Return how many values of a series a model looks back."""
    length, lags = (config_field(model.config, name) for name in ("context_length", "lags_sequence"))
    return (length if isinstance(length, int) else FRAMES) + (max(lags) if lags else 0)


def _time_features(model: PreTrainedModel, steps: int) -> list[Tensor]:
    sizes = (config_field(model.config, name) for name in ("num_time_features", "num_dynamic_real_features"))
    return [ramp(model, 2, steps, sum(size for size in sizes if isinstance(size, int)))]


def _future(model: PreTrainedModel) -> int:
    steps = config_field(model.config, "prediction_length")
    return steps if isinstance(steps, int) else 1


def _regions(model: PreTrainedModel) -> list[Tensor]:
    width = config_field(model.config, "visual_feat_dim")
    return [ramp(model, 2, TOKENS, width)] if isinstance(width, int) else []


def _ones(*shape: int) -> Callable[[PreTrainedModel], list[Tensor]]:
    return lambda model: [torch.ones(shape, dtype=torch.long, device=model.device)]


def _places(model: PreTrainedModel) -> list[Tensor]:
    """Return a mask that says which of the words are places for parts of an image: as many as it has."""
    mask = torch.zeros(2, TOKENS, dtype=torch.long, device=model.device)
    n = config_field(model.config, "latent_query_num")
    if isinstance(n, int) and n <= TOKENS:
        mask[:, :n] = 1
    return [mask]


def _steps(model: PreTrainedModel, width: str) -> list[Tensor]:
    size = config_field(model.config, width) if width else 1
    return [ramp(model, 2, TOKENS, size)] if isinstance(size, int) else []


def _task(model: PreTrainedModel) -> list[Tensor]:
    n = config_field(model.config, "task_seq_len")
    return [torch.ones(2, n if isinstance(n, int) else TOKENS, dtype=torch.long, device=model.device)]


MAKERS: Final[dict[str, Callable[[PreTrainedModel], list[Tensor]]]] = {
    "input_ids": _tokens,
    "pixel_values": _images,
    "input_values": _sounds,
    "input_features": _spectrograms,
    "past_values": _series,
    "decoder_input_ids": _tokens,
    "decoder_input_values": lambda model: _sounds(model)[:1],
    "pixel_values_videos": _videos,
    "input_features_mask": _frames_mask,
    "bbox": lambda model: [torch.zeros(2, TOKENS, 4, dtype=torch.long, device=model.device)],
}
"""What models take most; inputs that a forward may do without are chosen from these first."""

RARE: Final[dict[str, Callable[[PreTrainedModel], list[Tensor]]]] = {
    "past_observed_mask": lambda model: [torch.ones_like(series) for series in _series(model)],
    "past_time_features": lambda model: _time_features(model, _past(model)),
    "past_values_padding": lambda model: [torch.zeros_like(_series(model)[-1])],
    "future_values": lambda model: [_series(model)[0][:, : _future(model)]],
    "future_time_features": lambda model: _time_features(model, _future(model)),
    "visual_feats": _regions,
    "visual_pos": lambda model: [ramp(model, 2, TOKENS, 4)],
    "pixel_attention_mask": _ones(2, PATCHES**2),
    "spatial_shapes": lambda model: [torch.full((2, 2), PATCHES, device=model.device)],
    "image_embeds_position_mask": _places,
    "image_attention_mask": _ones(2, TOKENS, 1),
    "actions": lambda model: _steps(model, "act_dim"),
    "rewards": lambda model: _steps(model, ""),
    "returns_to_go": lambda model: _steps(model, ""),
    "timesteps": _ones(2, TOKENS),
    "prompt_pixel_values": _image,
    "prompt_masks": _image,
    "task_inputs": _task,
    "lang_ids": lambda model: [torch.zeros(2, dtype=torch.long, device=model.device)],
}
"""What few models take, and these do not run without."""
