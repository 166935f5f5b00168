"""Plain data as JSON text and as tensors of bytes, read back with every doubt."""

from __future__ import annotations

import json
import math
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor

from kasmina_core.errors import CheckpointError

FORMAT_VERSION: Final = 3
"""Version of everything that is written: checkpoints, files of seeds, ``state_dict`` records.

Raise it when older code would misread what is written now, and add the step to ``checkpoints/migrations.py``.
"""

DEEPEST: Final = 64
"""Nesting beyond which data is refused: reading it would exhaust the stack."""

LARGEST_TEXT: Final = 1 << 28
"""Bytes beyond which a text is refused."""

LARGEST_RECORD: Final = 1 << 25
"""Bytes beyond which a text in a tensor is refused."""

_LARGEST_NUMBER: Final = 1 << 128
_NOT_FINITE: Final = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
_MARKS: Final = ("$float", "$tuple", "$map", "$counter", "$tensor")

Keep = Callable[[str, Tensor], None]
"""Stores a tensor elsewhere under a name: where it stands in the data."""

Fetch = Callable[[str], Tensor]
"""Returns the tensor that is stored under a name."""


def to_json(data: object, what: str, keep: Keep | None = None) -> str:
    """Return data as JSON text from which `from_json` makes the same data again, bit for bit.

    ``None``, booleans, whole numbers, floats, text, lists, tuples, mappings (a `Counter` too) and NumPy's scalars can be
    written, and tensors where ``keep`` is given. What JSON does not know is an object with one marked key:
    ``{"$float": "nan"}``, ``{"$tuple": […]}``, ``{"$map": [[key, value], …]}``, ``{"$counter": …}``, ``{"$tensor": name}``.

    Args:
        data: What to write.
        what: What it is, for messages.
        keep: Stores a tensor elsewhere.

    Raises:
        CheckpointError: If something in it cannot be written; the message says where it is.
    """
    try:
        return json.dumps(_marked(data, what, keep, 0), allow_nan=False, separators=(",", ":"))
    except ValueError as error:  # a number of thousands of digits
        raise CheckpointError(f"{what} cannot be written: {error}") from error


def from_json(text: str | bytes, what: str, fetch: Fetch | None = None) -> Any:
    """Return the data that `to_json` wrote.

    Args:
        text: JSON, UTF-8.
        what: What it is, for messages.
        fetch: Returns a tensor that is stored elsewhere.

    Raises:
        CheckpointError: As `parse` and `meaning`.
    """
    return meaning(parse(text, what), what, fetch)


def parse(text: str | bytes, what: str) -> Any:
    """Return JSON as Python reads it, marks and all.

    Raises:
        CheckpointError: If the text is too long or too deep, is no JSON, names a key twice, or holds numbers of absurd
            size.
    """
    if len(text) > LARGEST_TEXT:
        raise CheckpointError(
            f"{what} is {len(text):,} bytes long; at most {LARGEST_TEXT:,} are read. Is it another file?"
        )
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8")
        return json.loads(text, object_pairs_hook=_once, parse_constant=_no_constant, parse_int=_number)
    except RecursionError as error:
        raise CheckpointError(f"{what} is nested too deep to be read.") from error
    except ValueError as error:  # bytes that are no UTF-8, text that is no JSON
        raise CheckpointError(f"{what} is damaged or something else: {error}") from error


def meaning(data: Any, what: str, fetch: Fetch | None = None) -> Any:
    """Return what parsed JSON stands for, its marks resolved.

    Raises:
        CheckpointError: If it is nested too deep, or holds marks that `to_json` does not write.
    """
    return _unmarked(data, what, fetch, 0)


def to_bytes(data: object, what: str) -> Tensor:
    """Return data as its JSON text in a 1-D uint8 tensor on the CPU.

    Raises:
        CheckpointError: As `to_json`.
    """
    text = to_json(data, what).encode()
    if len(text) > LARGEST_RECORD:
        raise CheckpointError(f"{what} has {len(text):,} bytes; at most {LARGEST_RECORD:,} are written.")
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def from_bytes(tensor: Tensor, what: str) -> Any:
    """Return the data that `to_bytes` wrote, from any device.

    Raises:
        CheckpointError: As `from_json`, and if the tensor cannot hold text.
    """
    if tensor.dtype is not torch.uint8 or tensor.dim() != 1 or tensor.device.type == "meta":
        raise CheckpointError(
            f"{what} is no text in a tensor.\n"
            f"  found:    {tensor.dtype}, shape {tuple(tensor.shape)}, on {tensor.device}\n"
            "  expected: torch.uint8, one dimension, on a device that holds values"
        )
    if tensor.numel() > LARGEST_RECORD:
        raise CheckpointError(f"{what} has {tensor.numel():,} bytes; at most {LARGEST_RECORD:,} are read.")
    return from_json(tensor.detach().cpu().numpy().tobytes(), what)


def _marked(value: Any, where: str, keep: Keep | None, depth: int) -> Any:
    if depth > DEEPEST:
        raise CheckpointError(f"{where} is nested deeper than {DEEPEST} levels and cannot be written.")
    if type(value).__module__ == "numpy" and hasattr(value, "ndim") and value.ndim == 0:
        value = value.item()
    kind = type(value)
    if value is None or kind in (bool, int, str):
        return value
    if kind is float:
        return value if math.isfinite(value) else {"$float": str(value)}
    if kind in (list, tuple):
        items = [_marked(item, f"{where}[{i}]", keep, depth + 1) for i, item in enumerate(value)]
        return items if kind is list else {"$tuple": items}
    if kind in (dict, OrderedDict, Counter):
        pairs = [
            [
                _marked(key, f"a key of {where}", keep, depth + 1),
                _marked(item, f"{where}[{key!r}]", keep, depth + 1),
            ]
            for key, item in value.items()
        ]
        if kind is Counter:
            return {"$counter": pairs}
        if all(type(key) is str for key in value) and not set(_MARKS) & set(value):
            return dict(pairs)
        return {"$map": pairs}
    if isinstance(value, Tensor) and keep is not None:
        keep(where, value)
        return {"$tensor": where}
    raise CheckpointError(
        f"{where} cannot be written: it is {value!r:.80}, a {kind.__module__}.{kind.__qualname__}.\n"
        "Plain data can: numbers, text, booleans, None, lists, tuples and mappings"
        + (" of them, and tensors." if keep is not None else " of them.")
    )


def _unmarked(value: Any, where: str, fetch: Fetch | None, depth: int) -> Any:
    if depth > 2 * DEEPEST + 2:  # a mark is one level more
        raise CheckpointError(f"{where} is nested deeper than {DEEPEST} levels.")
    if isinstance(value, list):
        return [_unmarked(item, where, fetch, depth + 1) for item in value]
    if not isinstance(value, dict):
        return value
    mark = next(iter(value), "")
    if mark not in _MARKS:
        return {key: _unmarked(item, where, fetch, depth + 1) for key, item in value.items()}
    inside = value[mark]
    try:
        if len(value) == 1:
            if mark == "$float" and isinstance(inside, str):
                return _NOT_FINITE[inside]
            if mark == "$tensor" and isinstance(inside, str) and fetch is not None:
                return fetch(inside)
            if mark == "$tuple" and isinstance(inside, list):
                return tuple(_unmarked(inside, where, fetch, depth + 1))
            if mark in ("$map", "$counter") and isinstance(inside, list):
                pairs = [(key, item) for key, item in _unmarked(inside, where, fetch, depth + 1)]
                made = dict(pairs) if mark == "$map" else Counter(dict(pairs))
                if len(made) == len(pairs):
                    return made
    except (KeyError, TypeError, ValueError) as error:  # no such number, a list as key, no pairs
        raise CheckpointError(f"{where} is damaged: {mark} cannot hold {inside!r:.80}.") from error
    raise CheckpointError(f"{where} is damaged: {mark} cannot hold {inside!r:.80}.")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for name, value in pairs:
        if name in made:
            raise ValueError(f"it names {name!r:.80} twice")
        made[name] = value
    return made


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON")


def _number(digits: str) -> int:
    if len(digits) > 40 or abs(value := int(digits)) >= _LARGEST_NUMBER:
        raise ValueError(f"the number {digits[:20]}… has too many digits")
    return value
