"""Inputs for one forward of a transformers model, from its config and the arguments of its forward."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final, cast

import torch
from kasmina_core import HostError
from torch import Tensor, nn
from transformers import PreTrainedModel

from kasmina_hf.makers import MAKERS, RARE, ramp, tensors_for

MOST_TRIALS: Final = 64
"""How many combinations of tensors are tried for some names of inputs."""


def example_inputs(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return inputs for one forward of a model, always the same ones, on its device: two samples.

    The model's main input is tried alone, with tokens for its decoder if it has one; then with whatever else its
    forward takes. Shapes come from the config; features of another width than a module wants are tried once more with
    that width. The first inputs that run are returned.

    Raises:
        HostError: If none runs.

    >>> from transformers import GPT2Config, GPT2Model
    >>> inputs = example_inputs(GPT2Model(GPT2Config(vocab_size=8, n_embd=4, n_layer=1, n_head=1)))
    >>> {name: tuple(tensor.shape) for name, tensor in inputs.items()}
    {'input_ids': (2, 8)}
    """
    failures: list[str] = []
    for inputs in _candidates(model):
        given: dict[str, Tensor] | None = inputs
        for _ in range(len(inputs) + 1):  # each may be made wider once
            if given is None:
                break
            error, other = _trial(model, given)
            if error is None:
                return given
            shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in given.items())
            failures.append(f"  {shapes}: {type(error).__name__}: {error!s:.200}")
            given = other
    tried = "\n".join(failures) or "  nothing"
    raise HostError(
        f"{type(model).__name__} takes '{model.main_input_name}', and its config does not say what that looks like: "
        f"pass example={{'input name': tensor, ...}} with inputs for one forward. Tried:\n{tried}"
    )


def call(model: PreTrainedModel, example: Any) -> Any:
    """Call a model with keywords, a tuple of arguments or one tensor."""
    if isinstance(example, Mapping):
        return model(**example)
    return model(*example) if isinstance(example, tuple) else model(example)


@contextmanager
def quiet(model: PreTrainedModel) -> Iterator[None]:
    """Run the block in evaluation, without gradients, with random numbers that start alike; leave no trace."""
    modes = {module: module.training for module in model.modules()}
    device = model.device
    devices = [device] if device.type not in ("cpu", "meta") else []
    try:
        with torch.no_grad(), torch.random.fork_rng(devices, device_type=device.type):
            torch.manual_seed(0)
            model.train(False)
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _trial(
    model: PreTrainedModel, inputs: dict[str, Tensor]
) -> tuple[Exception | None, dict[str, Tensor] | None]:
    """Run a model; return why it fails, and inputs of the width that the module wants in which it fails."""
    entered: list[tuple[nn.Module, Tensor]] = []

    def note(module: nn.Module, args: Any) -> None:
        if args and isinstance(args[0], Tensor):
            entered.append((module, args[0]))

    handles = [
        module.register_forward_pre_hook(note)
        for module in model.modules()
        if isinstance(module, (nn.Linear, nn.Conv1d, nn.LayerNorm))
    ]
    try:
        with quiet(model):
            model(**inputs)
    except Exception as error:
        return error, _wider(model, inputs, *entered[-1]) if entered else None
    finally:
        for handle in handles:
            handle.remove()
    return None, None


def _wider(
    model: PreTrainedModel, inputs: dict[str, Tensor], module: nn.Module, features: Tensor
) -> dict[str, Tensor] | None:
    """Return inputs of which the one with as many features as a module got has as many as it takes."""
    axis = 1 if isinstance(module, nn.Conv1d) else features.dim() - 1
    wanted = getattr(module, "in_channels", getattr(module, "in_features", None))
    if wanted is None:
        wanted = cast("nn.LayerNorm", module).normalized_shape[-1]
    if features.dim() != 3 or features.shape[axis] == wanted:
        return None
    for name, tensor in inputs.items():
        if tensor.is_floating_point() and tensor.shape[1:] == features.shape[1:]:
            shape = list(tensor.shape)
            shape[axis] = wanted
            return {**inputs, name: ramp(model, *shape)}
    return None


def _candidates(model: PreTrainedModel) -> Iterator[dict[str, Tensor]]:
    taken = inspect.signature(model.forward).parameters
    given = model.main_input_name  # some models have several
    main = [given] if isinstance(given, str) else list(given)
    known = [name for name in MAKERS if name in taken]
    rare = [name for name in RARE if name in taken]
    decoder = [name for name in ("decoder_input_ids",) if name in taken and name not in main]
    required = [
        name
        for name, parameter in taken.items()
        if parameter.default is inspect.Parameter.empty
        and parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    ]
    tried: list[set[str]] = []
    likely = ([*main, *decoder], main, [*required, *decoder], required, ["input_ids", *decoder], known)
    for names in (*likely, *([*main, name] for name in known), [*main, *rare], [*known, *rare]):
        chosen = list(dict.fromkeys([*names, *required]))
        if set(chosen) in tried or not chosen or not all(name in taken for name in chosen):
            continue
        tried.append(set(chosen))
        tensors = [tensors_for(model, name) for name in chosen]
        for combination in itertools.islice(itertools.product(*tensors), MOST_TRIALS):
            yield dict(zip(chosen, combination, strict=True))
