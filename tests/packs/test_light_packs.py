"""Listing what the bundled packs offer imports no torch; their doors still have the hosts."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from pack_cases import PACKS

LISTING = """
import sys
import pluggy
from kasmina_core.packs import hookspecs
import {module}

manager = pluggy.PluginManager("kasmina")
manager.add_hookspecs(hookspecs)
manager.register({module})
manager.check_pending()
blueprints = [spec for specs in manager.hook.kasmina_blueprints() for spec in specs]
hosts = [spec for specs in manager.hook.kasmina_hosts() for spec in specs]
assert blueprints and hosts
for spec in blueprints:
    assert [spec.refusal(dim) for dim in range(1, 97)].count(None) >= 95
    assert spec.declared_params(64) > 0
for name in dir({module}):  # as older pluggy does in search of hooks
    getattr({module}, name)
assert "torch" not in sys.modules, "listing imported torch"

from {module} import {host}
assert "torch" in sys.modules
assert {host}.__name__ == "{host}"
"""


@pytest.mark.parametrize(
    ("module", "host"),
    [
        ("kasmina_cnn", "CNNHost"),
        ("kasmina_signal", "TCNHost"),
        ("kasmina_transformer", "TransformerHost"),
        ("kasmina_vector", "MLPHost"),
        ("kasmina_volume", "VolumeHost"),
    ],
)
def test_listing_a_pack_imports_no_torch(module: str, host: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LISTING.format(module=module, host=host)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("pack", list(PACKS))
def test_door_is_sorted_whole_and_says_what_it_lacks(pack: str) -> None:
    module = PACKS[pack]
    assert module.__all__ == sorted(module.__all__)
    assert all(getattr(module, name) is not None for name in module.__all__)
    with pytest.raises(AttributeError, match=f"'kasmina_{pack}' has no attribute 'Hosst'"):
        module.Hosst  # noqa: B018  # reading it is the test
