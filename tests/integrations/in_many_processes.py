"""Trainers in two processes, started by torchrun: each rank writes what it came to into a folder."""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from growth_cases import images, labels, same

from kasmina_core.growth.plain_data import from_bytes

warnings.simplefilter("ignore")
torch.set_num_threads(1)


def held_out_in_batches() -> list[Any]:
    return [(images(4, seed=11), labels(4, seed=12)), (images(4, seed=13), labels(4, seed=14))]


def differing(a: Any, b: Any, where: str = "") -> list[str]:
    """Return where two nests differ."""
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return [found for key in a for found in differing(a[key], b[key], f"{where}/{key}")]
    if where.endswith("_extra_state") and torch.is_tensor(a) and torch.is_tensor(b):
        return differing(from_bytes(a, "a"), from_bytes(b, "b"), where)
    return [] if same(a, b) else [where]


def lightning(folder: Path, rank: int) -> dict[str, Any]:
    import lightning.pytorch as pl
    from lightning.pytorch.loggers import CSVLogger
    from lightning_case import Classifier, every_epoch, everything, fit, grower

    many = {"strategy": "ddp", "devices": 2}

    def run(name: str, epochs: int, checkpoint: Path | None = None) -> tuple[Any, Any]:
        pl.seed_everything(3, verbose=False)
        module = Classifier(dropout=0.2, incubation="counterfactual")
        callbacks = [grower(held_out=held_out_in_batches()), every_epoch(folder / name)]
        torch.manual_seed(5 + rank)
        logger = CSVLogger(folder, name=f"{name}-log")
        return module, fit(module, callbacks, folder, epochs, checkpoint, logger=logger, **many)

    module, trainer = run("whole", 10)
    evidence = {name: slot.last_evidence for name, slot in module.net.slots.items()}
    whole = everything(module, trainer)
    resumed = everything(*run("resumed", 10, folder / "whole" / "4.ckpt"))
    for found in (whole, resumed):
        found.pop("validated")
        found["losses"] = found["losses"][-6:]
    return {
        "whole": whole,
        "differs": differing(whole, resumed),
        "samples": {name: found.samples if found else None for name, found in evidence.items()},
        "stages": {name: slot.stage.name for name, slot in module.net.slots.items()},
        "is alone again": type(module.net.growth.agreement).__name__ == "Agreement",
    }


def huggingface(folder: Path, rank: int) -> dict[str, Any]:
    from huggingface_case import everything, grower, growing_gpt2, make_trainer

    many = {"save_strategy": "epoch", "per_device_train_batch_size": 4, "ddp_backend": "gloo"}

    def run(name: str, epochs: int, checkpoint: Path | None = None) -> Any:
        model = growing_gpt2(0.1, incubation="counterfactual")
        trainer = grower().attach(make_trainer(model, folder / name, epochs, **many))
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        return trainer

    trainer = run("whole", 10)
    model = trainer.model
    evidence = {name: slot.last_evidence for name, slot in model.slots.items()}
    whole = everything(trainer)
    resumed = everything(run("resumed", 10, folder / "whole" / "checkpoint-15"))
    for found in (whole, resumed):
        found["log"] = [row.get("eval_loss") for row in found["log"] if "eval_loss" in row][-2:]
    return {
        "whole": whole,
        "differs": differing(whole, resumed),
        "samples": {name: found.samples if found else None for name, found in evidence.items()},
        "stages": {name: slot.stage.name for name, slot in model.slots.items()},
        "is alone again": type(model.growth.agreement).__name__ == "Agreement",
    }


def by_hand(folder: Path, rank: int) -> dict[str, Any]:
    """A `DistributedDataParallel` without `distribute`."""
    from growth_cases import growing, image_host

    dist.init_process_group("gloo")
    model = growing(image_host(), ("norm",), images(2))
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    try:
        model.germinate("norm", "conv")
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    else:
        said = "germinated"
    return {"said": said, "stage": model.slots["norm"].stage.name, "wrapped": type(wrapped).__name__}


def sharded(folder: Path, rank: int) -> dict[str, Any]:
    """``wrap="outside"`` around what FSDP2 shards."""
    from growth_cases import growing, image_host
    from torch.distributed.fsdp import fully_shard

    from kasmina_core import distribute

    dist.init_process_group("gloo")
    model = growing(image_host(), ("norm",), images(2))
    distribute(model, wrap="outside")
    fully_shard(model.host, mesh=dist.init_device_mesh("cpu", (2,)))
    try:
        model.germinate("norm", "conv")
    except Exception as error:
        return {"said": f"{type(error).__name__}: {error}", "stage": model.slots["norm"].stage.name}
    return {"said": "germinated"}


def main(what: str, folder: Path) -> None:
    rank = int(os.environ["RANK"])
    found = globals()[what](folder, rank)
    whole = found.pop("whole", None)
    if whole is not None:
        torch.save({name: whole[name] for name in ("weights", "optimizer")}, folder / f"rank{rank}.pt")
    (folder / f"rank{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
