"""The pack that makes models of Hugging Face's ``transformers`` hosts of Kasmina.

This module is the pack's entry point and its door. It imports neither torch nor transformers: hosts are named as text,
and what else is here is imported when it is first used.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from kasmina_core import HostSpec, Topology, hookimpl

if TYPE_CHECKING:
    from kasmina_hf.growing import GrowingModel as GrowingModel
    from kasmina_hf.growing import grow as grow
    from kasmina_hf.inputs import example_inputs as example_inputs
    from kasmina_hf.positions import TransformersCall as TransformersCall
    from kasmina_hf.structure import points as points

_HOME = {
    "GrowingModel": "growing",
    "TransformersCall": "positions",
    "example_inputs": "inputs",
    "grow": "growing",
    "points": "structure",
}

__all__ = ["GrowingModel", "TransformersCall", "example_inputs", "grow", "kasmina_hosts", "points"]


@hookimpl
def kasmina_hosts() -> Iterable[HostSpec]:
    """Return the pack's hosts: small models with random weights. Their options are fields of the model's config."""
    tokens, images = Topology.TRANSFORMER, Topology.CNN
    return [
        HostSpec("bert-tiny", "kasmina_hf.hosts:bert_tiny", tokens, "BERT that classifies sequences"),
        HostSpec(
            "convnext-tiny", "kasmina_hf.hosts:convnext_tiny", images, "ConvNeXt that classifies images"
        ),
        HostSpec("gpt2-tiny", "kasmina_hf.hosts:gpt2_tiny", tokens, "GPT-2 language model"),
        HostSpec("llama-tiny", "kasmina_hf.hosts:llama_tiny", tokens, "Llama language model"),
        HostSpec("resnet-tiny", "kasmina_hf.hosts:resnet_tiny", images, "ResNet that classifies images"),
        HostSpec(
            "vit-tiny", "kasmina_hf.hosts:vit_tiny", tokens, "Vision transformer that classifies images"
        ),
    ]


# No __dir__: pluggy before 1.7 reads every name that dir() lists, and reading these imports torch.
def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"kasmina_hf.{_HOME[name]}"), name)
    globals()[name] = value
    return value
