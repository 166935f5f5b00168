"""Kasmina: networks that grow while they train.

Everything public is here; ``__init__.pyi`` is the list. A name is imported when it is first used, so that listing
plugins needs no torch.
PYTEST_DONT_REWRITE: a program may import this and then start pytest, which finds our fixtures.
"""

import lazy_loader

from kasmina_core._version import __version__ as __version__

__getattr__, _names, __all__ = lazy_loader.attach_stub(__name__, __file__)


def __dir__() -> list[str]:
    return [*_names(), "__version__"]
