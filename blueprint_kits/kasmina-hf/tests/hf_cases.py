"""Tiny models of six kinds with batches and losses, and the public moves that reach each stage."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from kasmina_core import GateThresholds, GrowthConfig, QualityGates, SeedStage, tie_optimizer
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

from kasmina_hf import GrowingModel, grow

DIM = 16
VOCAB = 48
BATCH = 4
_ATTENTION = {"hidden_size": DIM, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
_NO_TOKENS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}


def gpt2() -> GPT2LMHeadModel:
    config = GPT2Config(vocab_size=VOCAB, n_positions=32, n_embd=DIM, n_layer=2, n_head=2, **_NO_TOKENS)
    return GPT2LMHeadModel(config)


def llama() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCAB, num_key_value_heads=1, max_position_embeddings=32, **_ATTENTION, **_NO_TOKENS
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
class Case:
    """One kind of model: how to make it, what it takes and where it grows."""

    name: str
    build: Callable[[], PreTrainedModel]
    blueprint: str
    slot: str

    def host(self) -> PreTrainedModel:
        """Always the same weights, in evaluation mode; the global random numbers are left as they were."""
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

    def losses(self, model: Any) -> Tensor:
        """The loss of every held-out sample."""
        labels, logits = self.batch(12)["labels"], model(**self.inputs(12)).logits
        if self.speaks:
            return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="none")
        return F.cross_entropy(logits, labels, reduction="none")

    def grown(
        self, stage: SeedStage = SeedStage.DORMANT, blueprint: str | None = None, **options: Any
    ) -> GrowingModel:
        """A model with one seed at that stage whose parameters are far from those at birth."""
        model = grow(self.host(), config=open_config(), **options)
        model.evaluate_with(lambda: self.losses(model))
        bring_to(model, stage, self.slot, blueprint or self.blueprint)
        shake(model)
        return model


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


def open_config(**changes: Any) -> GrowthConfig:
    """Gates that every finite measurement passes, after short dwells."""
    thresholds = GateThresholds(
        min_training_epochs=2,
        min_probation_epochs=2,
        min_samples=2,
        min_gain=-1e9,
        min_t=-1e9,
        max_harm_t=1e9,
        max_output_deviation=1e9,
    )
    return GrowthConfig(ramp_steps=4, embargo_epochs=2, gates=QualityGates(thresholds=thresholds), **changes)


def bring_to(
    model: GrowingModel, stage: SeedStage, slot: str, blueprint: str, step: Callable[[], Any] = int
) -> None:
    """Walk a dormant slot to a stage by public moves; ``step`` runs before each epoch ends."""
    if stage is SeedStage.DORMANT:
        return
    model.germinate(slot, blueprint)
    for _ in range(40):
        place = model.slots[slot]
        # In BLENDING at alpha 0 nothing shows yet.
        if place.stage is stage and (stage is not SeedStage.BLENDING or place.alpha > 0.0):
            return
        step()
        model.step_epoch(1.0)
        if stage is SeedStage.FOSSILIZED and place.stage is SeedStage.PROBATIONARY:
            model.advance_stage(slot)
    raise AssertionError(f"{stage.name} was not reached: {model.slots[slot].last_gate}")


def shake(model: GrowingModel, size: float = 0.3) -> None:
    """Change seeds by what training could do, so that they are not near the identity."""
    draw = torch.Generator().manual_seed(13)
    with torch.no_grad():
        for parameter in model.seed_parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=draw))


def trainer(model: GrowingModel, case: Case, lr: float = 1e-2) -> Callable[[], Tensor]:
    """A function that takes one training step and returns its loss."""
    optimizer = tie_optimizer(model, torch.optim.AdamW(model.host_parameters(), lr=lr))

    def step() -> Tensor:
        model.train()
        optimizer.zero_grad()
        loss: Tensor = model(**case.batch()).loss
        loss.backward()  # type: ignore[no-untyped-call]
        model.step()
        optimizer.step()
        return loss.detach()

    return step
