"""Files that are written whole or not at all, and that whoever may read other files may read."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from state_helpers import FIRST, bring_to, make_model

from kasmina_core import SeedStage, save_checkpoint, save_seeds
from kasmina_core.checkpoints.atomic import replacing, write_atomically


def ordinary_mode(folder: Path) -> int:
    (folder / "ordinary").touch()
    return (folder / "ordinary").stat().st_mode


def test_files_have_the_permissions_of_ordinary_ones(tmp_path: Path) -> None:
    model, _ = make_model()
    bring_to(model, SeedStage.TRAINING)
    optimizer = torch.optim.Adam(model.host_parameters(), 1e-2)
    save_checkpoint(tmp_path / "point", model, optimizer=optimizer)
    save_seeds(tmp_path / "seeds.safetensors", model, FIRST)
    write_atomically(tmp_path / "text", "x")
    written = [*(tmp_path / "point").iterdir(), tmp_path / "seeds.safetensors", tmp_path / "text"]
    assert {file.name: file.stat().st_mode for file in written} == {
        file.name: ordinary_mode(tmp_path) for file in written
    }


@pytest.mark.parametrize("failing", ["replace", "fsync"])
def test_a_failed_write_leaves_the_previous_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    path = tmp_path / "file"
    write_atomically(path, "before")

    def fail(*arguments: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, failing, fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, b"after")
    assert path.read_text() == "before"
    assert os.listdir(tmp_path) == ["file"]


def test_a_block_that_fails_leaves_the_previous_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomically(path, "before")

    def write_half() -> None:
        with replacing(path) as beside:
            beside.write_text("half")
            raise KeyError

    with pytest.raises(KeyError):
        write_half()
    assert path.read_text() == "before"
    assert os.listdir(tmp_path) == ["file"]
