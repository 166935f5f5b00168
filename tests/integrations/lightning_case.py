"""A Lightning run on the small task; as a program, one that goes on from a checkpoint in a process of its own."""

from __future__ import annotations

import logging
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from growth_cases import EpochSampler, Script, growing, image_host, images, labels
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from kasmina_core import MorphogeneticModel
from kasmina_core.integrations.lightning import GrowthCallback

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
QUIET = {
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "accelerator": "cpu",
    "log_every_n_steps": 1,
}
HELD_OUT = [(images(8, seed=11), labels(8, seed=12))]
PLAN = {1: ("norm", "conv"), 3: ("norm2", "conv")}


class Classifier(pl.LightningModule):
    """The small task, with a learning-rate schedule; ``net`` is the bare host or a growing model around it."""

    def __init__(self, grow: bool = True, dropout: float = 0.0, **config: Any) -> None:
        super().__init__()
        host = image_host(dropout)
        self.net = growing(host, ("norm", "norm2"), images(2), **config) if grow else host
        self.losses: list[Tensor] = []
        self.validated: list[Tensor] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.log("train_loss", loss)
        self.losses.append(loss.detach())
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        if not self.trainer.sanity_checking:
            self.validated.append(loss)
        self.log("val_loss", loss)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=1e-2)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.97**step)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(TensorDataset(images(), labels()), batch_size=8, sampler=EpochSampler())

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(TensorDataset(images(8, seed=21), labels(8, seed=22)), batch_size=8)


def losses(module: Any, batch: Any) -> Tensor:
    return F.cross_entropy(module.net(batch[0]), batch[1], reduction="none")


def grower(policy: Any = None, **options: Any) -> GrowthCallback:
    return GrowthCallback(policy or Script(PLAN), **{"held_out": HELD_OUT, "losses": losses} | options)


def fit(
    module: pl.LightningModule,
    callbacks: list[Any],
    folder: Path,
    epochs: int,
    ckpt: Path | None = None,
    **options: Any,
) -> pl.Trainer:
    settings = {
        "logger": False,
        "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks),
    }
    trainer = pl.Trainer(
        callbacks=callbacks, max_epochs=epochs, default_root_dir=folder, **QUIET | settings | options
    )
    trainer.fit(module, ckpt_path=ckpt, weights_only=True)
    return trainer


def everything(module: Classifier, trainer: pl.Trainer) -> dict[str, Any]:
    """What a run leaves behind."""
    found = {
        "losses": module.losses,
        "validated": module.validated,
        "weights": module.state_dict(),
        "optimizer": trainer.optimizers[0].state_dict(),
        "scheduler": {
            key: value
            for key, value in trainer.lr_scheduler_configs[0].scheduler.state_dict().items()
            if key != "lr_lambdas"
        },
    }
    if isinstance(module.net, MorphogeneticModel):
        found["growth"] = [module.net.epoch, module.net.growth.sequence, module.net.growth.last_metric]
        found["germinations"] = [slot.germinations for slot in module.net.slots.values()]
    return found


def every_epoch(folder: Path) -> ModelCheckpoint:
    return ModelCheckpoint(
        folder, filename="{epoch}", save_top_k=-1, monitor="val_loss", auto_insert_metric_name=False
    )


def main(folder: Path, checkpoint: Path, epochs: int) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    module = Classifier(incubation="counterfactual")
    trainer = fit(module, [grower()], folder, epochs, checkpoint)
    torch.save(everything(module, trainer), folder / "resumed.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
