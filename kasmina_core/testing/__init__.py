"""The conformance kit: what authors of packs and hosts import in their tests.

>>> from kasmina_core.testing import check_host
>>> import torch
>>> host = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
>>> report = check_host(host, torch.randn(2, 3, 4), slots=["0"])
>>> report.raise_if_failed()
>>> print(report.verdict)
passed

The fixtures ``kasmina_registry``, ``kasmina_fake_distribution``, ``kasmina_device`` and ``kasmina_repeatable`` come with
the installed library: pytest finds them by itself.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kasmina_core.packs.checking import PackReport as PackReport
    from kasmina_core.testing.blueprints import check_blueprint as check_blueprint
    from kasmina_core.testing.blueprints import parametrize_blueprints as parametrize_blueprints
    from kasmina_core.testing.documents import parametrize_examples as parametrize_examples
    from kasmina_core.testing.hosts import check_host as check_host
    from kasmina_core.testing.lives import LifeCase as LifeCase
    from kasmina_core.testing.lives import LifeCases as LifeCases
    from kasmina_core.testing.packs import check_pack as check_pack
    from kasmina_core.testing.reports import HOST_CHECKS as HOST_CHECKS
    from kasmina_core.testing.reports import PACK_CHECKS as PACK_CHECKS
    from kasmina_core.testing.reports import HostReport as HostReport
    from kasmina_core.testing.seeds import SeedCases as SeedCases

_HOME = {
    "HOST_CHECKS": "reports",
    "HostReport": "reports",
    "PACK_CHECKS": "reports",
    "LifeCase": "lives",
    "LifeCases": "lives",
    "PackReport": "packs",
    "SeedCases": "seeds",
    "check_blueprint": "blueprints",
    "check_host": "hosts",
    "check_pack": "packs",
    "parametrize_blueprints": "blueprints",
    "parametrize_examples": "documents",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module 'kasmina_core.testing' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"kasmina_core.testing.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
