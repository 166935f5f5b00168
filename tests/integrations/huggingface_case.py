"""Runs of a Hugging Face Trainer on small tasks; as a program, one that goes on from a checkpoint in its own process."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from growth_cases import Script, growing, image_host, images, labels
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, PrinterCallback, Trainer, TrainingArguments

from kasmina_core import MorphogeneticModel
from kasmina_core.integrations.huggingface import GrowthCallback

VOCABULARY = 17
BLOCKS = ("transformer.h.0", "transformer.h.1")
SLOTS = ("transformer_h_0", "transformer_h_1")
PLAN = {1: (SLOTS[0], "mlp"), 3: (SLOTS[1], "mlp")}


def texts(n: int, seed: int) -> list[dict[str, Tensor]]:
    ids = torch.randint(0, VOCABULARY, (n, 6), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": row, "labels": row} for row in ids]


def gpt2(dropout: float = 0.0) -> GPT2LMHeadModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return GPT2LMHeadModel(
            GPT2Config(
                vocab_size=VOCABULARY,
                n_positions=8,
                n_embd=8,
                n_layer=2,
                n_head=2,
                embd_pdrop=dropout,
                resid_pdrop=dropout,
                attn_pdrop=dropout,
                bos_token_id=0,
                eos_token_id=0,
            )
        )


def growing_gpt2(dropout: float = 0.0, **config: Any) -> MorphogeneticModel:
    return growing(gpt2(dropout), BLOCKS, torch.zeros(2, 4, dtype=torch.long), causal=True, **config)


class Images(nn.Module):
    """A host that is no transformers model: it returns a mapping with a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.net = image_host()

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.net(x)
        return (
            {"logits": logits}
            if labels is None
            else {"loss": F.cross_entropy(logits, labels), "logits": logits}
        )


def pictures(n: int, seed: int) -> list[dict[str, Tensor]]:
    return [{"x": x, "labels": y} for x, y in zip(images(n, seed), labels(n, seed + 1), strict=True)]


def make_trainer(
    model: nn.Module | None, folder: Path, epochs: float, data: Any = texts, **options: Any
) -> Trainer:
    names = ("eval_dataset", "optimizers", "compute_loss_func", "compute_metrics", "model_init")
    given = {name: options.pop(name) for name in names if name in options}
    settings = {
        "eval_strategy": "epoch",
        "save_strategy": "no",
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 4,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    args = TrainingArguments(str(folder), num_train_epochs=epochs, **settings | options)
    trainer = Trainer(model, args, train_dataset=data(24, 1), **{"eval_dataset": data(8, 21)} | given)
    trainer.remove_callback(PrinterCallback)
    return trainer


def grower(policy: Any = None, data: Any = texts, **options: Any) -> GrowthCallback:
    return GrowthCallback(policy or Script(PLAN), **{"held_out": data(8, 11)} | options)


def everything(trainer: Trainer) -> dict[str, Any]:
    """What a run leaves behind; of the log, what training and evaluation gave."""
    names = ("loss", "grad_norm", "eval_loss", "learning_rate")
    found = {
        "log": [
            {name: row[name] for name in names if name in row}
            for row in trainer.state.log_history
            if "loss" in row or "eval_loss" in row
        ],
        "weights": trainer.model.state_dict(),
        "optimizer": trainer.optimizer.state_dict(),
        "scheduler": {k: v for k, v in trainer.lr_scheduler.state_dict().items() if k != "lr_lambdas"},
    }
    if isinstance(trainer.model, MorphogeneticModel):
        model = trainer.model
        found["growth"] = [model.epoch, model.growth.sequence, model.growth.last_metric]
        found["germinations"] = [slot.germinations for slot in model.slots.values()]
    return found


def resume(checkpoint: str | Path, folder: Path, epochs: float) -> Trainer:
    trainer = grower().attach(make_trainer(growing_gpt2(0.1, incubation="counterfactual"), folder, epochs))
    trainer.train(resume_from_checkpoint=str(checkpoint))
    return trainer


def main(checkpoint: Path, folder: Path, epochs: float) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.save(everything(resume(checkpoint, folder, epochs)), folder / "resumed.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3]))
