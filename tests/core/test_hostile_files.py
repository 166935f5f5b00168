"""A file cannot make us build, read or print more than it holds."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from state_helpers import rewrite, rewrite_seeds
from torch import nn

from kasmina_core import (
    BlueprintRegistry,
    BlueprintSpec,
    CheckpointError,
    MorphogeneticModel,
    Topology,
    graft_seeds,
    load_checkpoint,
    load_distributed,
    save_checkpoint,
    save_distributed,
    save_seeds,
)
from kasmina_core.checkpoints.files import plain_refusals
from kasmina_core.growth.plain_data import LARGEST_RECORD, from_bytes, from_json, to_bytes

HUGE = 10**7
built: list[int] = []


class Wide(nn.Module):
    """``x + down(up(x))``, which notes how wide it was built with values."""

    def __init__(self, dim: int, width: int = 2) -> None:
        super().__init__()
        self.up, self.down = nn.Conv2d(dim, width, 1), nn.Conv2d(width, dim, 1)
        if self.up.weight.device.type != "meta":
            built.append(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.up(x))


def make(germinate: bool = False) -> MorphogeneticModel:
    registry = BlueprintRegistry()
    spec = BlueprintSpec("wide", Topology.CNN, Wide, lambda d: 4 * d + d + 2, options={"width": 2})
    registry.register(spec, pack="mine")
    host = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 1, 3))
    model = MorphogeneticModel(host, ["1"], example=torch.zeros(2, 1, 5, 5), registry=registry)
    if germinate:
        model.germinate("1", "wide")
    return model


def inflate(record: dict[str, Any]) -> dict[str, Any]:
    return record | {"options": {"width": HUGE}}


def by_folder(path: Any) -> None:
    save_checkpoint(path, make(True))
    manifest = json.loads((path / "manifest.json").read_text())
    slot = manifest["topology"]["slots"]["1"]
    slot["record"] = inflate(slot["record"])
    slot["tensors"] = {"up.weight": [HUGE, 4, 1, 1]}
    rewrite(path / "manifest.json", manifest)
    load_checkpoint(path, make())


def by_distributed(path: Any) -> None:
    save_distributed(path, make(True))
    manifest = json.loads((path / "manifest.json").read_text())
    slot = manifest["topology"]["slots"]["1"]
    slot["record"] = inflate(slot["record"])
    rewrite(path / "manifest.json", manifest)
    load_distributed(path, make())


def by_seeds(path: Any) -> None:
    from safetensors import safe_open
    from safetensors.torch import load_file

    save_seeds(path, make(True))
    with safe_open(path, "pt") as opened:
        data = json.loads(opened.metadata()["kasmina_seeds"])
    data["slots"]["1"]["record"] = inflate(data["slots"]["1"]["record"])
    rewrite_seeds(path, load_file(path), data)
    graft_seeds(path, make())


def by_state_dict(path: Any) -> None:
    state = make(True).state_dict()
    key = "kasmina_slots.1._extra_state"
    state[key] = to_bytes(inflate(from_bytes(state[key], "record")), "record")
    for name in [name for name in state if ".seed." in name]:
        del state[name]
    make().load_state_dict(state, strict=False)


@pytest.mark.parametrize("way", [by_folder, by_distributed, by_seeds, by_state_dict])
def test_a_seed_larger_than_what_was_saved_of_it_is_refused_before_it_is_built(way, tmp_path):
    built.clear()
    with pytest.raises(CheckpointError, match=r"(?s)larger than what was saved of it.*90,000,004 values"):
        way(tmp_path / "file")
    assert set(built) == {2}


def test_a_description_of_more_than_the_files_hold_is_refused(tmp_path):
    import pickle

    save_distributed(tmp_path / "point", make(True))
    metadata = pickle.loads((tmp_path / "point" / ".metadata").read_bytes())
    name = next(name for name in metadata.state_dict_metadata if name.endswith("up.weight"))
    metadata.state_dict_metadata[name].size = torch.Size([HUGE, 4, 1, 1])
    (tmp_path / "point" / ".metadata").write_bytes(content := pickle.dumps(metadata))
    manifest = json.loads((tmp_path / "point" / "manifest.json").read_text())
    manifest["files"][".metadata"] = len(content)
    rewrite(tmp_path / "point" / "manifest.json", manifest)
    with pytest.raises(CheckpointError, match=r"(?s)describes more than its files hold.*160,000,000 bytes"):
        load_distributed(tmp_path / "point", make())


def test_a_text_with_a_key_many_times_is_refused_at_its_first_repetition():
    text = "{" + ",".join(f'"{i}": 1' for i in range(200_000)) + ',"199999": 2}'
    with pytest.raises(CheckpointError, match="names '199999' twice"):
        from_json(text, "The text")


def test_a_record_of_absurd_size_is_refused_unread():
    with pytest.raises(CheckpointError, match=r"at most 33,554,432 are read"):
        from_bytes(torch.zeros(LARGEST_RECORD + 1, dtype=torch.uint8), "The record")
    with pytest.raises(CheckpointError, match=r"at most 33,554,432 are written"):
        to_bytes("x" * LARGEST_RECORD, "The record")


def test_a_refusal_quotes_little_and_no_control_characters(tmp_path):
    evil = "\x1b[2J\x07‮" + "x" * 10_000
    model = make(True)
    save_checkpoint(tmp_path / "point", model)
    manifest = json.loads((tmp_path / "point" / "manifest.json").read_text())
    for change in (
        {"kept_seeds": {evil: {}}},
        {"snapshots": {evil: {}}},
        {"topology": manifest["topology"] | {"slots": {evil: manifest["topology"]["slots"]["1"]}}},
        {"rng": {evil: 1}},
        {"shared": {"weights.safetensors": {evil: evil}}},
        {"version": evil},
        {"files": manifest["files"] | {evil: 1}},
    ):
        rewrite(tmp_path / "point" / "manifest.json", manifest | change)
        with pytest.raises(CheckpointError) as refusal:
            load_checkpoint(tmp_path / "point", model)
        text = str(refusal.value)
        assert all(line.isprintable() for line in text.split("\n"))
        assert text.count("x") < 400
    with pytest.raises(CheckpointError) as refusal, plain_refusals():
        raise CheckpointError("line\n" * 100)
    assert len(str(refusal.value).split("\n")) == 41
