"""Small transformers models with random weights that declare their own points.

Each factory takes fields of the model's config as options, and the words that ``kasmina grow`` gives every host:
``num_classes``, ``in_channels`` and ``max_len`` stand for the config's own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any, TypeVar, cast

from kasmina_core import ContextReader, HookedHost, InjectionPoint
from torch import Tensor
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    ConvNextConfig,
    ConvNextForImageClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from kasmina_hf.inputs import example_inputs
from kasmina_hf.positions import TransformersCall
from kasmina_hf.structure import points

M = TypeVar("M", bound=PreTrainedModel)


class DeclaresPoints(HookedHost):
    """Makes a transformers model a host: mixed into its class, before it."""

    def injection_points(self) -> Sequence[InjectionPoint]:
        """Return the model's points, one a layer or stage."""
        if "_points" not in self.__dict__:  # found by forwards, which must not go through slots
            self.__dict__["_points"] = points(cast("PreTrainedModel", self))
        return cast("Sequence[InjectionPoint]", self.__dict__["_points"])

    def example_inputs(self) -> dict[str, Tensor]:
        """Return two sequences or images, always the same ones."""
        return example_inputs(cast("PreTrainedModel", self))

    def context_reader(self) -> ContextReader:
        """Return what reads padding, packed documents and the cache off each call."""
        return TransformersCall()


# transformers reads the kind of loss off a class's name: these contain those of their bases.


class BertForSequenceClassificationHost(DeclaresPoints, BertForSequenceClassification):  # type: ignore[no-untyped-call]  # transformers
    """BERT as a host."""


class ConvNextForImageClassificationHost(DeclaresPoints, ConvNextForImageClassification):  # type: ignore[no-untyped-call]  # transformers
    """ConvNeXt as a host."""


class GPT2LMHeadModelHost(DeclaresPoints, GPT2LMHeadModel):  # type: ignore[no-untyped-call]  # transformers
    """GPT-2 as a host."""


class LlamaForCausalLMHost(DeclaresPoints, LlamaForCausalLM):  # type: ignore[no-untyped-call]  # transformers
    """Llama as a host."""


class ResNetForImageClassificationHost(DeclaresPoints, ResNetForImageClassification):  # type: ignore[no-untyped-call]  # transformers
    """ResNet as a host."""


class ViTForImageClassificationHost(DeclaresPoints, ViTForImageClassification):  # type: ignore[no-untyped-call]  # transformers
    """A vision transformer as a host."""


_NO_TOKENS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
_ATTENTION = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}


_WORDS = {
    "num_classes": ("num_labels",),
    "in_channels": ("num_channels",),
    "max_len": ("n_positions", "max_position_embeddings"),
}


def bert_tiny(**options: Any) -> BertForSequenceClassificationHost:
    """Return a BERT classifier of byte sequences: 2 layers of width 32. Options: fields of ``BertConfig``."""
    defaults = {**_ATTENTION, "vocab_size": 256, "max_position_embeddings": 128}
    return _build(BertForSequenceClassificationHost, BertConfig, defaults, options)


def convnext_tiny(**options: Any) -> ConvNextForImageClassificationHost:
    """Return a ConvNeXt classifier: 2 stages, widths 16 and 32. Options: fields of ``ConvNextConfig``."""
    defaults = {
        "num_channels": 3,
        "image_size": 32,
        "patch_size": 2,
        "num_stages": 2,
        "hidden_sizes": [16, 32],
        "depths": [1, 1],
    }
    return _build(ConvNextForImageClassificationHost, ConvNextConfig, defaults, options)


def gpt2_tiny(**options: Any) -> GPT2LMHeadModelHost:
    """Return a GPT-2 of bytes: 2 layers of width 32. Options: fields of ``GPT2Config``."""
    defaults = {"vocab_size": 256, "n_positions": 128, "n_embd": 32, "n_layer": 2, "n_head": 4, **_NO_TOKENS}
    return _build(GPT2LMHeadModelHost, GPT2Config, defaults, options)


def llama_tiny(**options: Any) -> LlamaForCausalLMHost:
    """Return a Llama of bytes: 2 layers of width 32. Options: fields of ``LlamaConfig``."""
    defaults = {
        **_ATTENTION,
        "vocab_size": 256,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        **_NO_TOKENS,
    }
    return _build(LlamaForCausalLMHost, LlamaConfig, defaults, options)


def resnet_tiny(**options: Any) -> ResNetForImageClassificationHost:
    """Return a ResNet classifier: 2 stages, widths 16 and 32. Options: fields of ``ResNetConfig``."""
    defaults = {
        "num_channels": 3,
        "embedding_size": 8,
        "hidden_sizes": [16, 32],
        "depths": [1, 1],
        "layer_type": "basic",
    }
    return _build(ResNetForImageClassificationHost, ResNetConfig, defaults, options)


def vit_tiny(**options: Any) -> ViTForImageClassificationHost:
    """Return a vision transformer: 2 layers of width 32, 4x4 patches. Options: fields of ``ViTConfig``."""
    defaults = {**_ATTENTION, "image_size": 16, "patch_size": 4, "num_channels": 3}
    return _build(ViTForImageClassificationHost, ViTConfig, defaults, options)


def _build(model: type[M], config: Any, defaults: Mapping[str, Any], options: Mapping[str, Any]) -> M:
    """Build a model. A config takes any name without a word, so unknown ones are refused here."""
    known = config()
    options = {
        next((own for own in _WORDS.get(name, ()) if hasattr(known, own)), name): value
        for name, value in options.items()
    }
    for name in options:
        if not hasattr(known, name):
            near = get_close_matches(name, vars(known), n=1)
            hint = f" Did you mean '{near[0]}'?" if near else ""
            raise TypeError(f"{config.__name__} has no field '{name}'.{hint}")
    return model(config(**{**defaults, **options}))
