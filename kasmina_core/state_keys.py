"""Names in a ``state_dict`` that do not depend on who compiled what."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from torch import nn

WRAPPER: Final = "_orig_mod"
"""The name under which ``torch.compile(module)`` holds the module."""


def plain_name(name: str) -> str:
    """Return a dotted name without the parts that ``torch.compile`` puts into it.

    >>> plain_name("_orig_mod.blocks._orig_mod.0.weight")
    'blocks.0.weight'
    """
    return ".".join(part for part in name.split(".") if part != WRAPPER) if WRAPPER in name else name


class NamesOf:
    """Translates plain names into those of one module, some of whose submodules may be compiled.

    Args:
        module: The module whose own names are wanted.
    """

    def __init__(self, module: nn.Module) -> None:
        wrapped = [
            name for name, _ in module.named_modules(remove_duplicate=False) if WRAPPER in name.split(".")
        ]
        self._wrappers = {plain_name(name.rpartition(WRAPPER)[0].removesuffix(".")) for name in wrapped}

    def __call__(self, name: str) -> str:
        """Return the module's own name for ``name``, which may be plain or another module's."""
        if not self._wrappers:
            return plain_name(name)
        own, plain = [], ""
        for part in plain_name(name).split("."):
            if plain in self._wrappers:
                own.append(WRAPPER)
            own.append(part)
            plain = f"{plain}.{part}" if plain else part
        return ".".join(own)


def without_wrapper(state_dict: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a ``state_dict`` as the module inside of ``torch.compile(module)`` gives it, metadata too."""
    if not _all_wrapped(state_dict):
        return state_dict
    plain = OrderedDict((key.removeprefix(f"{WRAPPER}."), value) for key, value in state_dict.items())
    if (metadata := getattr(state_dict, "_metadata", None)) is not None:
        plain._metadata = OrderedDict(  # type: ignore[attr-defined]  # torch keeps it there
            (key.removeprefix(WRAPPER).removeprefix("."), value)
            for key, value in metadata.items()
            if key.startswith(WRAPPER)
        )
    return plain


def _all_wrapped(keys: Iterable[str]) -> bool:
    return bool(keys) and all(key.startswith(f"{WRAPPER}.") for key in keys)
