"""Points of a transformers model, from its config and modules, and inputs to run it once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from kasmina_core import HostError, InjectionPoint, Topology
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

EXAMPLE_TOKENS = 8
DEFAULT_IMAGE_SIZE = 64  # for configs without one; a ResNet shrinks images 32 times


def points(model: PreTrainedModel, every: int = 1) -> list[InjectionPoint]:
    """Return the places in a model where a slot can be: after its layers, or its stages if it is convolutional.

    - Models of tokens or patches: the list of ``config.num_hidden_layers`` layers, each of width
      ``config.hidden_size``; points are named ``layer1``, ``layer2``, …
    - Convolutional models: the list of stages, of widths ``config.hidden_sizes``; points are named ``stage1``, …

    A point is causal if the model is: if its modules or its config say so, or two forwards show it.

    Args:
        model: The model, with or without a head.
        every: Distance between points: 2 gives every second layer or stage, ``layer2``, ``layer4``, …

    Raises:
        HostError: If the config and the modules do not say where the layers are; the message says how to name places
            by hand.
        ValueError: If ``every`` is not from 1 to the number of layers.

    >>> from transformers import LlamaConfig, LlamaModel
    >>> config = LlamaConfig(vocab_size=8, hidden_size=4, intermediate_size=4, num_hidden_layers=2,
    ...                      num_attention_heads=1)
    >>> [(point.name, point.path, point.dim, point.causal) for point in points(LlamaModel(config))]
    [('layer1', 'layers.0', 4, True), ('layer2', 'layers.1', 4, True)]
    """
    config = model.config
    if getattr(config, "is_encoder_decoder", False):
        raise _unsupported(model, "it is an encoder with a decoder, and their inputs and masks differ")
    if (widths := getattr(config, "hidden_sizes", None)) is not None:
        path, layers = _the_list(model, "stages", len(widths), "config.hidden_sizes")
        if any("Attention" in type(module).__name__ for module in layers.modules()):
            raise _unsupported(model, "its stages attend, and do not say how their features are laid out")
        kind, topology, causal = "stage", Topology.CNN, False
    else:
        if getattr(config, "depths", None) is not None:
            raise _unsupported(
                model, "its config gives no width for each of its stages (config.hidden_sizes)"
            )
        count, width = getattr(config, "num_hidden_layers", None), getattr(config, "hidden_size", None)
        if not (isinstance(count, int) and isinstance(width, int)):
            raise _unsupported(model, "its config has no num_hidden_layers and hidden_size")
        path, layers = _the_list(model, None, count, "config.num_hidden_layers")
        widths = [width] * count
        kind, topology, causal = "layer", Topology.TRANSFORMER, is_causal(model)
    if not 1 <= every <= len(widths):
        raise ValueError(f"every must be from 1 to {len(widths)}, the number of {kind}s, not {every!r}.")
    return [
        InjectionPoint(f"{kind}{i + 1}", f"{path}.{i}", widths[i], topology, causal)
        for i in range(every - 1, len(widths), every)
    ]


def is_causal(model: PreTrainedModel) -> bool:
    """Return whether a position of a model may not see those after it.

    Where an attention module says so (``is_causal``), or the config or kind of a model does, it is. Where none does, a
    model of tokens is asked itself: it is causal if another last token leaves the features before it as they were.
    """
    kind = model.config.model_type
    return (
        any(getattr(module, "is_causal", None) is True for module in model.modules())
        or getattr(model.config, "is_decoder", False) is True
        or (kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and kind not in MODEL_FOR_MASKED_LM_MAPPING_NAMES)
        or _behaves_causally(model)
    )


@torch.no_grad()
def _behaves_causally(model: PreTrainedModel) -> bool:
    modes = {module: module.training for module in model.modules()}
    try:
        ids = example_inputs(model)["input_ids"]
        changed = torch.cat([ids[:, :-1], (ids[:, -1:] + 1) % model.config.vocab_size], dim=1)
        model.train(False)
        before, after = (model.base_model(input_ids=tokens)[0][:, :-1] for tokens in (ids, changed))
        return torch.equal(before, after)
    except Exception:  # takes no tokens, or does not run like that: nothing speaks for it
        return False
    finally:
        for module, mode in modes.items():
            module.training = mode


def example_inputs(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return inputs for one forward of a model, always the same ones, on its device: two sequences or images.

    Raises:
        HostError: If the model takes something else than token indices or images.

    >>> from transformers import GPT2Config, GPT2Model
    >>> inputs = example_inputs(GPT2Model(GPT2Config(vocab_size=8, n_embd=4, n_layer=1, n_head=1)))
    >>> {name: tuple(tensor.shape) for name, tensor in inputs.items()}
    {'input_ids': (2, 8)}
    """
    config, name = model.config, model.main_input_name
    if name == "input_ids" and getattr(config, "vocab_size", None):
        t = min(EXAMPLE_TOKENS, getattr(config, "max_position_embeddings", None) or EXAMPLE_TOKENS)
        ids = (torch.arange(2 * t, device=model.device) + 1) % config.vocab_size  # 0 is often padding
        return {"input_ids": ids.view(2, t)}
    if name == "pixel_values" and getattr(config, "num_channels", None):
        size = getattr(config, "image_size", None) or DEFAULT_IMAGE_SIZE
        h, w = size if isinstance(size, Sequence) else (size, size)
        pixels = torch.linspace(-1.0, 1.0, 2 * config.num_channels * h * w, device=model.device)
        return {"pixel_values": pixels.view(2, config.num_channels, h, w).to(model.dtype)}
    raise HostError(
        f"{type(model).__name__} takes '{name}', and its config does not say what that looks like: "
        "pass example={'input name': tensor, ...} with inputs for one forward."
    )


def _the_list(
    model: PreTrainedModel, name: str | None, length: int, source: str
) -> tuple[str, nn.ModuleList]:
    """Return the one outermost list of modules of that length, and of that name if one is given."""
    found = [
        (path, modules)
        for path, modules in _outermost_lists(model)
        if len(modules) == length and name in (None, path.rpartition(".")[2])
    ]
    if len(found) != 1:
        what = f"module lists{f' named {name!r}' if name else ''} of length {length} ({source})"
        raise _unsupported(model, f"it has {len(found)} {what}, where one was expected")
    return found[0]


def _outermost_lists(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.ModuleList]]:
    for name, child in module.named_children():
        if isinstance(child, nn.ModuleList):
            yield prefix + name, child
        else:
            yield from _outermost_lists(child, f"{prefix}{name}.")


def _unsupported(model: PreTrainedModel, reason: str) -> HostError:
    lists = [f"{path}.*  ({len(modules)})" for path, modules in _outermost_lists(model) if len(modules)]
    there = "\n  ".join(lists) or "none"
    name = type(model).__name__
    example: Any = lists[0].partition(" ")[0] if lists else "path.of.a.layer"
    return HostError(
        f"The points of {name} cannot be derived: {reason}.\n"
        f"Name modules by hand whose output is (b, t, d) or (b, c, h, w), or begins with that; globs work:\n"
        f"  kasmina_hf.grow(model, [{example!r}], example={{'{model.main_input_name}': ...}})\n"
        f"Lists of modules that it has:\n  {there}"
    )
