"""Checks of arguments: a wrong one is a `TypeError` that names what to give instead."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor

from kasmina_core.policies.protocol import Command, Observation, Policy

if TYPE_CHECKING:
    from kasmina_core.growth.context import EventTarget
    from kasmina_core.growth.model import MorphogeneticModel


def require_model(model: object, what: str) -> MorphogeneticModel:
    """Return the model, which may be wrapped.

    Raises:
        TypeError: If it is none; ``what`` asked for it.
    """
    if isinstance(model, type) or not hasattr(model, "seed_parameters"):
        given = model.__name__ if isinstance(model, type) else type(model).__name__
        raise TypeError(
            f"{what} takes a MorphogeneticModel, not {'the class' if isinstance(model, type) else 'a'} {given}: "
            "MorphogeneticModel(host, slots=[...], example=inputs) makes one of any host."
        )
    return cast("MorphogeneticModel", model)


def require_policy(policy: object) -> None:
    """Check that something is a policy.

    Raises:
        TypeError: If it is none.
    """
    if isinstance(policy, type) or not callable(getattr(policy, "decide", None)):
        hint = f" Make one of the class: {policy.__name__}(...)." if isinstance(policy, type) else ""
        raise TypeError(f"follow takes a policy, with decide(observation), not {policy!r:.200}.{hint}")


def decided(policy: Policy, observation: Observation) -> Sequence[Command]:
    """Return what a policy decides.

    Raises:
        TypeError: If that is something else than a list of commands.
    """
    chosen: object = policy.decide(observation)
    if isinstance(chosen, str) or not isinstance(chosen, Iterable):
        raise TypeError(
            f"{type(policy).__name__}.decide must return a list of commands, empty for none, not {chosen!r:.200}."
        )
    commands: list[Any] = list(chosen)
    for command in commands:
        if not isinstance(command, Command):
            raise TypeError(
                f"{type(policy).__name__}.decide must return a list of commands: {command!r:.200} is not a command. "
                "None of the list was carried out."
            )
    return commands


def one_number(metric: object) -> float:
    """Return a metric as a number.

    Raises:
        TypeError: If it is none.
        ValueError: If it is a tensor of several.
    """
    if isinstance(metric, Tensor) and metric.numel() != 1:
        raise ValueError(
            "step_epoch takes one number, the metric of the whole model.\n"
            f"  given: a tensor of shape {tuple(metric.shape)}\n"
            "Give its mean: metric.mean()."
        )
    try:
        if isinstance(metric, str | bytes):
            raise TypeError("text is no number")
        return float(cast("Any", metric.detach() if isinstance(metric, Tensor) else metric))
    except (TypeError, ValueError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(
            f"step_epoch takes one number, the metric of the whole model, not {metric!r:.200}."
        ) from error


def event_target(telemetry: EventTarget | None) -> EventTarget | None:
    """Return what takes events.

    Raises:
        TypeError: If it takes none.
    """
    if telemetry is not None and not callable(getattr(telemetry, "emit", None)):
        raise TypeError(f"{telemetry!r} takes no events. Give a Telemetry, such as Telemetry([sink]).")
    return telemetry
