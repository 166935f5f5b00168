"""Inputs for one forward of a transformers model, from its config and the arguments of its forward."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final

import torch
from kasmina_core import HostError
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

TOKENS: Final = 8
IMAGE_SIZE: Final = 64  # for configs without one; a ResNet shrinks images 32 times
SAMPLES: Final = 6400  # of sound: 19 steps of wav2vec 2, which masks ten in training
FRAMES: Final = 72  # of a spectrogram, for configs that do not say how many


def example_inputs(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return inputs for one forward of a model, always the same ones, on its device: two samples.

    The model's main input is tried alone, with tokens for its decoder if it has one; then with whatever else its
    forward takes. The first inputs that run are returned.

    Raises:
        HostError: If none runs.

    >>> from transformers import GPT2Config, GPT2Model
    >>> inputs = example_inputs(GPT2Model(GPT2Config(vocab_size=8, n_embd=4, n_layer=1, n_head=1)))
    >>> {name: tuple(tensor.shape) for name, tensor in inputs.items()}
    {'input_ids': (2, 8)}
    """
    failures: list[str] = []
    for inputs in _candidates(model):
        with quiet(model):
            try:
                model(**inputs)
            except Exception as error:
                shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in inputs.items())
                failures.append(f"  {shapes}: {type(error).__name__}: {error!s:.200}")
            else:
                return inputs
    tried = "\n".join(failures) or "  nothing"
    raise HostError(
        f"{type(model).__name__} takes '{model.main_input_name}', and its config does not say what that looks like: "
        f"pass example={{'input name': tensor, ...}} with inputs for one forward. Tried:\n{tried}"
    )


def call(model: PreTrainedModel, example: Any) -> Any:
    """Call a model with keywords, a tuple of arguments or one tensor."""
    if isinstance(example, Mapping):
        return model(**example)
    return model(*example) if isinstance(example, tuple) else model(example)


@contextmanager
def quiet(model: PreTrainedModel) -> Iterator[None]:
    """Run the block in evaluation, without gradients, with random numbers that start alike; leave no trace."""
    modes = {module: module.training for module in model.modules()}
    device = model.device
    devices = [device] if device.type not in ("cpu", "meta") else []
    try:
        with torch.no_grad(), torch.random.fork_rng(devices, device_type=device.type):
            torch.manual_seed(0)
            model.train(False)
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


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


def _candidates(model: PreTrainedModel) -> Iterator[dict[str, Tensor]]:
    taken = inspect.signature(model.forward).parameters
    given = model.main_input_name  # some models have several
    main = [given] if isinstance(given, str) else list(given)
    known = [name for name in _MAKERS if name in taken]
    decoder = [name for name in ("decoder_input_ids",) if name in taken and name not in main]
    required = [
        name
        for name, parameter in taken.items()
        if parameter.default is inspect.Parameter.empty
        and parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    ]
    tried: list[set[str]] = []
    for names in ([*main, *decoder], main, [*required, *decoder], required, ["input_ids", *decoder], known):
        chosen = list(dict.fromkeys([*names, *required]))
        if set(chosen) in tried or not chosen or not all(name in known for name in chosen):
            continue
        tried.append(set(chosen))
        for tensors in itertools.product(*(_MAKERS[name](model) for name in chosen)):
            yield dict(zip(chosen, tensors, strict=True))


def _tokens(model: PreTrainedModel) -> list[Tensor]:
    """Return two sequences of words that are not special."""
    vocabulary = config_field(model.config, "vocab_size")
    if not isinstance(vocabulary, int):  # of characters
        vocabulary = 4 * TOKENS
    special = {
        value
        for part in parts_of(model.config)
        for name, value in vars(part).items()
        if name.endswith(("token_id", "token_index")) and isinstance(value, int)
    }
    words = [word for word in range(min(vocabulary, 4 * TOKENS)) if word not in special] or [0]
    most = config_field(model.config, "max_position_embeddings")
    t = min(TOKENS, most) if isinstance(most, int) and most > 0 else TOKENS
    ids = torch.tensor([words[(i + 1) % len(words)] for i in range(2 * t)], device=model.device)
    return [ids.view(2, t)]


def _ramp(model: PreTrainedModel, *shape: int) -> Tensor:
    size = 1
    for n in shape:
        size *= n
    return torch.linspace(-1.0, 1.0, size, device=model.device).view(shape).to(model.dtype)


def _images(model: PreTrainedModel) -> list[Tensor]:
    config = model.config
    c = config_field(config, "num_channels", "in_channels", "in_chans")
    c = c if isinstance(c, int) else 3
    sizes: list[tuple[int, int]] = []
    given = config_field(config, "image_size", "input_size", "img_size")
    for size in (given, IMAGE_SIZE):
        pair = tuple(size[-2:]) if isinstance(size, Sequence) else (size, size)
        if all(isinstance(n, int) for n in pair) and pair not in sizes:
            sizes.append(pair)
    images = [_ramp(model, 2, c, h, w) for h, w in sizes]
    frames = config_field(config, "num_frames", "frames_per_clip")
    if isinstance(frames, int):
        images = [_ramp(model, 2, frames, c, h, w) for h, w in sizes] + images
    return images + [_ramp(model, 2, n, c, h, w) for n in (1, 2) for h, w in sizes[:1]]


def _videos(model: PreTrainedModel) -> list[Tensor]:
    return [video for video in _images(model) if video.dim() == 5]


def _sounds(model: PreTrainedModel) -> list[Tensor]:
    bands = config_field(model.config, "num_mel_bins")
    frames = config_field(model.config, "max_length")
    sounds = [_ramp(model, 2, SAMPLES), _ramp(model, 2, 1, SAMPLES)]
    if isinstance(bands, int):
        sounds.insert(0, _ramp(model, 2, frames if isinstance(frames, int) else FRAMES, bands))
    return sounds


def _spectrograms(model: PreTrainedModel) -> list[Tensor]:
    config = model.config
    bands = config_field(
        config, "num_mel_bins", "feature_size", "input_feat_size", "input_feat_per_channel",
        "feature_projection_input_dim", "input_dim", "mel_bins", "n_mels", "input_size",
    )  # fmt: skip
    if not isinstance(bands, int):
        return []
    places = config_field(config, "max_source_positions")
    lengths = [FRAMES, 2 * places] if isinstance(places, int) and places <= 4096 else [FRAMES]
    return [
        _ramp(model, 2, *shape)
        for frames in lengths
        for shape in ((bands, frames), (frames, bands), (1, frames, bands))
    ]


def _series(model: PreTrainedModel) -> list[Tensor]:
    config = model.config
    length = config_field(config, "context_length")
    channels = config_field(config, "num_input_channels", "input_size")
    t = length if isinstance(length, int) else FRAMES
    return [_ramp(model, 2, t, channels if isinstance(channels, int) else 1), _ramp(model, 2, t)]


_MAKERS: Final[dict[str, Callable[[PreTrainedModel], list[Tensor]]]] = {
    "input_ids": _tokens,
    "pixel_values": _images,
    "input_values": _sounds,
    "input_features": _spectrograms,
    "past_values": _series,
    "decoder_input_ids": _tokens,
    "pixel_values_videos": _videos,
    "input_features_mask": lambda model: [torch.ones(2, FRAMES, dtype=torch.long, device=model.device)],
    "bbox": lambda model: [torch.zeros(2, TOKENS, 4, dtype=torch.long, device=model.device)],
}
