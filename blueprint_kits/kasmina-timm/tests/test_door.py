"""The entry module, which works without timm and torchvision."""

from __future__ import annotations

import subprocess
import sys

import pytest
from kasmina_core import PackState, default_registry

import kasmina_timm

HOSTS = ["convnext-mini", "resnet-mini", "torchvision-mobilenet-mini", "torchvision-vit-mini", "vit-mini"]


def test_the_pack_is_active_with_its_hosts() -> None:
    record = next(record for record in default_registry().packs if record.name == "timm")
    assert record.state is PackState.ACTIVE, record.cause
    assert record.distribution == "kasmina-timm"
    assert list(record.hosts) == [f"timm:{name}" for name in HOSTS]


def test_the_pack_declares_its_hosts_without_torch_timm_or_torchvision() -> None:
    code = (
        "import sys, kasmina_timm; assert len(list(kasmina_timm.kasmina_hosts())) == 5; "
        "sys.exit(bool({'torch', 'timm', 'torchvision'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = kasmina_timm.nothing
