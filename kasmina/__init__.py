"""The names of ``kasmina_core`` under the name of the distribution: ``from kasmina import MorphogeneticModel``.

PYTEST_DONT_REWRITE: a program may import this and then start pytest, which finds our fixtures.
"""

from typing import Any

import kasmina_core
from kasmina_core import __all__ as __all__
from kasmina_core import __version__ as __version__


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(kasmina_core, name)
    raise AttributeError(f"No {__name__} attribute {name}")


def __dir__() -> list[str]:
    return dir(kasmina_core)
