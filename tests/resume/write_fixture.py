"""Writes ``tests/fixtures/format_<version>``; run it once when the format's version is raised, and keep what it wrote."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from older_files import Run

from kasmina_core import growth_of, save_checkpoint, save_distributed, save_seeds
from kasmina_core.growth.plain_data import FORMAT_VERSION


def main() -> None:
    folder = Path(__file__).parents[1] / "fixtures" / f"format_{FORMAT_VERSION}"
    folder.mkdir()
    run = Run()
    run.grow()
    parts = {"optimizer": run.optimizer, "schedulers": run.scheduler, "policy": run.policy}
    parts["generators"] = {"data": run.generator}
    save_checkpoint(folder / "checkpoint", run.model, **parts, data_position={"batch": 3}, extra="more")
    save_distributed(folder / "distributed", run.model, **parts, extra={"epoch": 7})
    save_seeds(folder / "seeds.safetensors", run.model)
    states = {"model": run.model.state_dict(), "optimizer": run.optimizer.state_dict()}
    torch.save(states, folder / "state_dict.pt")
    growth = json.dumps({"topology": growth_of(run.model)}, allow_nan=False)
    (folder / "growth.json").write_text(growth)
    seen, losses = run.seen(), run.go_on()
    first = [parameter.detach().flatten()[:4].tolist() for parameter in run.model.host_parameters()]
    expected = json.dumps({"seen": seen, "losses": losses, "first": first}, indent=1)
    (folder / "expected.json").write_text(expected + "\n")


if __name__ == "__main__":
    main()
