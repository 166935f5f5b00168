"""Features in the output of a module: which element they are, and the same output around other features."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any, cast

from kasmina_core.errors import HostError

if TYPE_CHECKING:
    from torch import Tensor


def split_path(path: str) -> tuple[str, tuple[str, ...]]:
    """Return the path of a point's module, and the indices and keys that lead to the features in its output.

    >>> split_path("encoder.layers.3:1:hidden")
    ('encoder.layers.3', ('1', 'hidden'))
    """
    module, *keys = path.split(":")
    return module, tuple(keys)


def name_for(path: str) -> str:
    """Return the name of a slot whose point is given by its path alone.

    >>> name_for("encoder.layers.3:1"), name_for(":logits")
    ('encoder_layers_3_1', 'output_logits')
    """
    module, keys = split_path(path)
    return "_".join([module.replace(".", "_") or "output", *(key.replace(".", "_") for key in keys)])


def features_in(output: Any, path: str = "") -> Any:
    """Return what a slot takes of a module's output.

    Args:
        output: What the module returned.
        path: The point's path. What follows a colon in it leads to the features; otherwise they are all of the output,
            a tuple's first element, or a dataclass's first field that is not ``None``.

    Raises:
        HostError: If the output holds nothing at that index or key.
    """
    for key in split_path(path)[1] or _first_keys(output):
        output = _element(output, key)
    return output


def keys_in(output: Any, path: str) -> tuple[str, ...]:
    """Return what leads to the features in an output, also where the path leaves it open."""
    return split_path(path)[1] or _first_keys(output)


def passed_through(slot: Callable[[Any], Any], output: Any, keys: tuple[str, ...] = ()) -> Any:
    """Return an output of the same kind around what ``slot`` makes of its features; the one given stays as it is.

    Raises:
        HostError: If the output holds nothing at the index or key.
    """
    return _built(slot, output, keys or _first_keys(output))


def passed_unchanged(output: Any, path: str, slot: Callable[[Any], Any]) -> Any:
    """Pass an output through a stand-in slot that returns its input, by the code that a seed's output takes.

    Raises:
        HostError: If an output of this kind cannot be built again around other features.
    """
    keys = keys_in(output, path)
    try:
        built = _built(slot, output, keys)
    except HostError:
        raise
    except Exception as error:
        raise HostError(
            f"returns a {type(output).__name__} that cannot be built again around a seed's features: {error!r:.200}\n"
            "    Name a submodule that returns a tensor, a tuple, a list, a mapping or a dataclass."
        ) from error
    if lost := _lost(output, built, keys):
        raise HostError(
            f"returns a {type(output).__name__} that loses {lost} when it is built again around a seed's features.\n"
            "    Name a submodule that returns a tensor, a tuple, a list, a mapping or a dataclass of what it was given."
        )
    return built


def demand_plain(output: Any, path: str) -> None:
    """Demand that the features are a plain tensor in which samples and positions lie on axes of their own.

    Raises:
        HostError: If they are packed, nested or sparse.
    """
    from torch import Tensor, strided  # what only handles paths needs none
    from torch.nn.utils.rnn import PackedSequence

    place = output
    for key in (*keys_in(output, path), None):
        if isinstance(place, PackedSequence):
            raise HostError(
                "returns a PackedSequence, in which the positions of all samples are mixed: a seed could not tell "
                "samples apart.\n"
                "    Name a submodule before pack_padded_sequence or after pad_packed_sequence, or do not pack."
            )
        if key is not None:
            place = _element(place, key)
    if isinstance(place, Tensor) and place.is_nested:
        raise HostError(
            "returns a nested tensor, whose samples have different lengths; seeds take padded ones.\n"
            "    Pad before this module. nn.TransformerEncoder(..., enable_nested_tensor=False) does not nest, nor does one with "
            "encoder.use_nested_tensor = False."
        )
    if isinstance(place, Tensor) and place.layout is not strided:
        raise HostError(
            f"returns a tensor of layout {place.layout}; name a submodule that returns a dense one"
        )


def what_it_holds(output: Any, path: str) -> str:
    """Return the lines of a message that list the paths of floating-point tensors in an output that may be features."""
    found = [(place, t) for place, t in tensors_in(output, split_path(path)[0]) if t.dim() > 1]
    if not found:
        return "it holds no floating-point tensor with a batch and a width; name a submodule that returns the features"
    width = max(len(place) for place, _ in found) + 2
    lines = [f"      {place!r:<{width}}  {tuple(t.shape)}, {t.dtype}" for place, t in found[:12]]
    lines += [f"      and {len(found) - 12} more"] if len(found) > 12 else []
    return "\n".join(
        ["it holds floating-point tensors at", *lines, f'    Say which: slots=["{found[0][0]}"]']
    )


def tensors_in(output: Any, path: str = "", depth: int = 0) -> Iterator[tuple[str, Tensor]]:
    """Yield the floating-point tensors in an output, each with its path, down to four containers deep."""
    from torch import Tensor  # what only handles paths needs none

    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield path, output
        return
    if depth == 4:
        return
    for key, value in _elements(output):
        yield from tensors_in(value, f"{path}:{key}", depth + 1)


def _elements(output: Any) -> list[tuple[str, Any]]:
    """Return what an output holds, by key."""
    if _is_record(output):
        return [(field.name, getattr(output, field.name, None)) for field in fields(output)]
    if isinstance(output, Mapping):
        return [(str(key), value) for key, value in output.items()]
    if isinstance(output, (tuple, list)):
        return list(zip(getattr(output, "_fields", map(str, range(len(output)))), output, strict=False))
    return []


def _is_record(output: Any) -> bool:
    return is_dataclass(output) and not isinstance(output, type)


def _first_keys(output: Any) -> tuple[str, ...]:
    if isinstance(output, tuple):
        return ("0",) if output else ()
    if _is_record(output):
        for field in fields(output):
            if getattr(output, field.name) is not None:
                return (field.name,)
    return ()


def _element(output: Any, key: str) -> Any:
    found: Any = None
    if _is_record(output) or key in getattr(output, "_fields", ()):
        found = getattr(output, key, None)
    elif isinstance(output, Mapping):
        found = output.get(own_key(output, key))
    elif isinstance(output, (tuple, list)) and _is_index(key) and -len(output) <= int(key) < len(output):
        found = output[int(key)]
    if found is None:
        held = ", ".join(f"':{name}'" for name, _ in _elements(output)[:12]) or "nothing"
        raise HostError(
            f"returns {type(output).__name__} with nothing at ':{key}'; it has {held}. If a host returns the features in "
            "some modes alone, name a submodule that always does."
        )
    return found


def _is_index(key: str) -> bool:
    return key.removeprefix("-").isdecimal()


def own_key(output: Mapping[Any, Any], key: str) -> Any:
    """Return the key itself: one that is no text is named by its text."""
    if key in output:
        return key
    for own in output:
        if str(own) == key:
            return own
    return key


def _built(slot: Callable[[Any], Any], output: Any, keys: tuple[str, ...]) -> Any:
    if not keys:
        return slot(output)
    return _with(output, keys[0], _built(slot, _element(output, keys[0]), keys[1:]))


def _with(output: Any, key: str, value: Any) -> Any:
    """Return an output of the same kind that holds ``value`` at ``key``; the one given stays as it is."""
    if _is_record(output):
        return replace(output, **{key: value})
    if isinstance(output, Mapping):
        # torch.compile knows the methods, and not copy.copy.
        copied: Any = cast("Any", output).copy() if type(output) in (dict, OrderedDict) else copy.copy(output)
        copied[own_key(output, key)] = value
        return copied
    names = getattr(output, "_fields", None)
    if names is not None:  # a named tuple; its class takes one argument per field
        return output._replace(**{key if key in names else names[int(key)]: value})
    at = int(key)
    if type(output) is tuple:
        return (*output[:at], value, *output[at:][1:])
    if isinstance(output, list):
        copied = output[:] if type(output) is list else copy.copy(output)
        copied[at] = value
        return copied
    items = list(output)
    items[at] = value
    return type(output)(items)


def _lost(before: Any, after: Any, keys: tuple[str, ...]) -> str:
    """Return what an output lost when it was built again, apart from what the keys lead to; empty if nothing."""
    if type(before) is not type(after):
        return f"its class (it becomes a {type(after).__name__})"
    if not keys:
        return ""
    kept, found = dict(_elements(before)), dict(_elements(after))
    names = getattr(before, "_fields", None)
    own = names[int(keys[0])] if names is not None and keys[0] not in names else keys[0]
    own = str(int(own) % len(kept)) if _is_index(own) and own not in kept else own
    for name, value in kept.items():
        if name != own and (name not in found or not _is_same(value, found[name])):
            return f"'{name}'"
    attributes = vars(after) if hasattr(after, "__dict__") else {}
    for name in vars(before) if hasattr(before, "__dict__") else ():
        if name not in attributes:
            return f"the attribute '{name}'"
    return _lost(_element(before, keys[0]), _element(after, keys[0]), keys[1:])


def _is_same(a: Any, b: Any) -> bool:
    if a is b:
        return True
    from torch import Tensor, equal  # what only handles paths needs none

    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.shape == b.shape and equal(a.nan_to_num(), b.nan_to_num())
    return type(a) is type(b)
