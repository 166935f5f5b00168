"""An optimiser's state under the names of its parameters, so that no order of groups can mix them up."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

from torch import Tensor, nn
from torch.optim import Optimizer

from kasmina_core.checkpoints.migrations import part
from kasmina_core.errors import CheckpointError, did_you_mean
from kasmina_core.growth.undo import undo_of_optimizer
from kasmina_core.state_keys import plain_name

_LIKE_THE_PARAMETER: Final = frozenset(
    {
        "acc_delta",
        "ax",
        "exp_avg",
        "exp_avg_sq",
        "exp_inf",
        "grad_avg",
        "max_exp_avg_sq",
        "momentum_buffer",
        "prev",
        "square_avg",
        "step_size",
        "sum",
    }
)
"""What torch's optimisers keep in the shape of the parameter."""

_PART_OF_FLAG: Final = {"amsgrad": "max_exp_avg_sq", "centered": "grad_avg"}
"""What torch's optimisers keep only where a flag is set; from the first step on."""

_WHAT: Final = "The saved optimiser"
_NOT_SETTINGS: Final = ("params", "param_names")

_HOW: Final = ("capturable", "differentiable", "foreach", "fused")
"""Settings of how a step is computed, not what: they depend on the device, so the optimiser keeps its own."""


def named_optimizer_state(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """Return an optimiser's state and groups with names in the place of positions.

    Args:
        model: Holds the parameters; names are those of ``model.named_parameters()``, without the prefix of
            ``torch.compile``. A parameter that is not in it is named by its place in the optimiser, ``#<number>``.
        optimizer: Any of torch's, with groups of any kind.

    Returns:
        ``{"class": …, "groups": [{"params": [name, …], **settings}, …], "state": {name: {…}}}``, with the optimiser's
        own tensors in it.
    """
    names = _names(model, optimizer)
    groups = [
        {"params": [names[id(p)] for p in group["params"]]}
        | {key: value for key, value in group.items() if key not in _NOT_SETTINGS}
        for group in optimizer.param_groups
    ]
    written = optimizer.state_dict()  # calls the optimiser's own hooks
    order = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
    numbers = [i for group in written["param_groups"] for i in group["params"]]
    named = dict(zip(numbers, order, strict=True))
    state = {named[key]: dict(value) for key, value in written["state"].items() if key in named}
    return {"class": type(optimizer).__name__, "groups": groups, "state": state}


def load_named_optimizer_state(
    model: nn.Module, optimizer: Optimizer, data: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Give an optimiser the state that `named_optimizer_state` returned, wherever its parameters now stand.

    A group gets the settings of the saved group with the same parameters, except those of how a step is computed
    (``fused``, ``foreach``, ``capturable``, ``differentiable``): another device may need others. Tensors go to the
    parameters' devices and dtypes, as in ``Optimizer.load_state_dict``.

    Returns:
        The optimiser's groups in the order of the saved ones, in which a scheduler's saved lists are.

    Raises:
        CheckpointError: If it is another kind of optimiser, holds other parameters or other groups of them, or the
            state is damaged; nothing is changed.
    """
    classes = (part(data, "class", str, _WHAT), type(optimizer).__name__)
    if classes[0] != classes[1]:
        raise CheckpointError(
            f"The state was saved from another kind of optimiser.\n  saved: {classes[0]:.80}\n  here:  {classes[1]}"
        )
    names = _names(model, optimizer)
    saved = _saved_groups(data)
    state = part(data, "state", Mapping, _WHAT)
    numbers: dict[str, tuple[int, nn.Parameter]] = {}
    groups, waiting, places = [], list(saved), []
    for group in optimizer.param_groups:
        own = [names[id(p)] for p in group["params"]]
        found = next((one for one in waiting if set(one["params"]) == set(own)), None)
        if found is None:
            raise CheckpointError(_other_groups(own, saved))
        waiting = [one for one in waiting if one is not found]
        places.append(next(i for i, one in enumerate(saved) if one is found))
        settings = {key: value for key, value in group.items() if key not in _NOT_SETTINGS}
        for key, value in found.items():
            if key in settings and not _same_kind(settings[key], value):
                raise CheckpointError(
                    f"The saved {key} of the group of '{next(iter(own), '')}' cannot be {value!r:.80}; "
                    f"here it is {settings[key]!r:.80}."
                )
            if key not in (*_NOT_SETTINGS, *_HOW):
                settings[key] = value
        numbers |= {
            name: (len(numbers) + i, p) for i, (name, p) in enumerate(zip(own, group["params"], strict=True))
        }
        groups.append(settings | {"params": [numbers[name][0] for name in own]})
        if "param_names" in group:
            groups[-1]["param_names"] = list(group["param_names"])
    if waiting:
        lost = waiting[0]["params"]
        raise CheckpointError(
            f"The saved optimiser has a group that this one lacks: {len(lost)} parameters, such as '{next(iter(lost), '')}'."
            "\nMake the optimiser as it was, and tie it to the model (tie_optimizer) before loading."
        )
    numbered = {}
    for name, values in state.items():
        if name not in numbers or not isinstance(values, Mapping):
            raise CheckpointError(
                f"The saved optimiser has state for {name!r:.80}, which is none of its parameters."
                f"{did_you_mean(str(name), list(numbers)[:200])}"
            )
        number, parameter = numbers[name]
        for key, value in values.items():
            if key == "step" and not (_is_number(value) and 0 <= float(value) < math.inf):
                raise CheckpointError(f"The saved step of '{name}' cannot be {value!r:.80}.")
            if key in _LIKE_THE_PARAMETER and (value is None or _shape(value) != tuple(parameter.shape)):
                if value is None and key == "momentum_buffer":
                    continue  # SGD's, before its first step
                raise CheckpointError(
                    f"The saved {key} of '{name}' has another shape than its parameter.\n"
                    f"  saved:     {_shape(value)!r:.80}\n  parameter: {tuple(parameter.shape)}"
                )
        numbered[number] = dict(values)
    _same_state_in_a_group(saved, state)
    put_back = undo_of_optimizer(optimizer)
    try:
        optimizer.load_state_dict({"state": numbered, "param_groups": groups})
    except Exception as error:
        put_back()
        raise CheckpointError(f"The saved optimiser state cannot be loaded: {error}") from error
    in_saved_order = dict(zip(places, optimizer.param_groups, strict=True))
    return [in_saved_order[place] for place in sorted(places)]


def _names(model: nn.Module, optimizer: Optimizer) -> dict[int, str]:
    known = {id(p): plain_name(name) for name, p in model.named_parameters()}
    held = [p for group in optimizer.param_groups for p in group["params"]]
    return {id(p): known.get(id(p), f"#{i}") for i, p in enumerate(held)}


def _shape(value: Any) -> Any:
    return tuple(value.shape) if isinstance(value, Tensor) else value


def _same_state_in_a_group(groups: list[Mapping[str, Any]], state: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse state with lost tensors: what one parameter of a group has, all that were stepped have."""
    for group in groups:
        known = {n: {*state[n]} & {*_LIKE_THE_PARAMETER, "step"} for n in group["params"] if n in state}
        for name, keys in known.items():
            if lost := sorted(set.union(*known.values()) - keys):
                raise CheckpointError(f"The saved optimiser state of '{name}' lacks: {', '.join(lost)}.")
            needed = [tensor for flag, tensor in _PART_OF_FLAG.items() if group.get(flag)]
            if missing := [tensor for tensor in needed if tensor not in keys]:
                raise CheckpointError(
                    f"The saved optimiser state of '{name}' lacks {missing[0]}, which the saved settings of its group need."
                )


def _is_number(value: Any) -> bool:
    return (isinstance(value, Tensor) and value.numel() == 1) or type(value) in (int, float)


def _same_kind(here: Any, saved: Any) -> bool:
    """Whether a setting may take a saved value: numbers for numbers, flags for flags, and so on inside."""
    if _is_number(here):
        return _is_number(saved)
    if here is None or isinstance(here, bool):
        return saved is None or type(saved) in (bool, int, float)
    if isinstance(here, (list, tuple)):
        return (
            isinstance(saved, (list, tuple)) and len(here) == len(saved) and all(map(_same_kind, here, saved))
        )
    return isinstance(saved, type(here))


def _saved_groups(data: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    groups: list[Mapping[str, Any]] = part(data, "groups", list, _WHAT)
    seen: set[str] = set()
    for group in groups:
        names = part(group, "params", list, _WHAT)
        for name in names:
            if not isinstance(name, str) or name in seen:
                raise CheckpointError(
                    f"The saved optimiser is damaged: it holds {name!r:.80} twice, or as no name."
                )
            seen.add(name)
    return groups


def _other_groups(own: list[str], saved: list[Mapping[str, Any]]) -> str:
    known = {name for group in saved for name in group["params"]}
    if missing := [name for name in own if name not in known]:
        why = f"  not in the saved one: {', '.join(missing[:5])}{', …' if len(missing) > 5 else ''}\n"
    else:
        why = f"  this group: {len(own)} parameters, from '{own[0] if own else ''}', which were in other groups\n"
    return (
        "The saved optimiser has other groups of parameters than this one.\n"
        f"{why}"
        "Make the optimiser with the same groups as when it was saved, and tie it to the model (tie_optimizer)."
    )
