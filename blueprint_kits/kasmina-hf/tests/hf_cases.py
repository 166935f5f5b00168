"""Tiny models of six kinds with batches and losses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from kasmina_core.testing import LifeCase
from torch import Tensor, nn
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

from kasmina_hf import GrowingModel, grow

DIM = 16
VOCAB = 48
BATCH = 4
_ATTENTION = {"hidden_size": DIM, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
NO_TOKENS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}


def gpt2() -> GPT2LMHeadModel:
    config = GPT2Config(vocab_size=VOCAB, n_positions=32, n_embd=DIM, n_layer=2, n_head=2, **NO_TOKENS)
    return GPT2LMHeadModel(config)


def llama() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCAB, num_key_value_heads=1, max_position_embeddings=32, **_ATTENTION, **NO_TOKENS
    )
    return LlamaForCausalLM(config)


def bert(**options: Any) -> BertForSequenceClassification:
    return BertForSequenceClassification(
        BertConfig(vocab_size=VOCAB, max_position_embeddings=32, **_ATTENTION, **options)
    )


def vit() -> ViTForImageClassification:
    return ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, num_labels=3, **_ATTENTION))


def resnet() -> ResNetForImageClassification:
    config = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic", num_labels=3
    )
    return ResNetForImageClassification(config)


def convnext() -> ConvNextForImageClassification:
    config = ConvNextConfig(
        image_size=16, patch_size=2, num_stages=2, hidden_sizes=[8, 12], depths=[1, 1], num_labels=3
    )
    return ConvNextForImageClassification(config)


@dataclass(frozen=True)
class Case(LifeCase):
    """One kind of model: how to make it, what it takes and where it grows."""

    name: str
    build: Callable[[], PreTrainedModel]
    blueprint: str
    slot: str
    lr: float = 1e-2

    def host(self) -> PreTrainedModel:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            model = self.build()
            # Logits of a model at birth hardly depend on anything: let them.
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.dim() > 1:
                        parameter.mul_(4.0)
        return model.eval()

    @property
    def speaks(self) -> bool:
        return self.name in ("gpt2", "llama")

    def batch(self, seed: int = 11) -> dict[str, Tensor]:
        """Inputs with labels."""
        draw = torch.Generator().manual_seed(seed)
        if self.speaks:
            ids = torch.randint(1, VOCAB, (BATCH, 6), generator=draw)
            return {"input_ids": ids, "labels": ids}
        labels = torch.randint(0, 2, (BATCH,), generator=draw)
        if self.name == "bert":
            return {"input_ids": torch.randint(1, VOCAB, (BATCH, 6), generator=draw), "labels": labels}
        size = 8 if self.name == "vit" else 16
        return {"pixel_values": torch.randn(BATCH, 3, size, size, generator=draw), "labels": labels}

    def inputs(self, seed: int = 11) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in self.batch(seed).items() if name != "labels"}

    def grow(self, host: nn.Module, **options: Any) -> GrowingModel:
        return grow(host, **options)  # type: ignore[arg-type]

    def run(self, model: nn.Module) -> tuple[Tensor, Tensor]:
        output = model(**self.batch())
        return output.loss, output.logits

    def losses(self, model: nn.Module) -> Tensor:
        labels, logits = self.batch(12)["labels"], model(**self.inputs(12)).logits
        if self.speaks:
            return F.cross_entropy(logits[:, :-1].mT, labels[:, 1:], reduction="none").mean(1)
        return F.cross_entropy(logits, labels, reduction="none")


CASES = {
    case.name: case
    for case in (
        Case("gpt2", gpt2, "transformer:attention", "layer1"),
        Case("llama", llama, "transformer:attention", "layer2"),
        Case("bert", bert, "transformer:attention", "layer1"),
        Case("vit", vit, "transformer:mlp", "layer2"),
        Case("resnet", resnet, "cnn:conv_light", "stage1"),
        Case("convnext", convnext, "cnn:conv_light", "stage2"),
    )
}
