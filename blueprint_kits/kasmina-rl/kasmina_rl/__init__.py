"""Growth as a Gymnasium environment: one action and one epoch per step, one number that growth is worth.

Importing this module registers ``Kasmina/Toy-v0``, ``Kasmina/Digits-v0``, ``Kasmina/Chars-v0`` and ``Kasmina/Grow-v0``.
It imports gymnasium and no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

from gymnasium.envs.registration import register
from kasmina_core import hookimpl

if TYPE_CHECKING:
    from kasmina_rl.encoding import RUN_FIELDS as RUN_FIELDS
    from kasmina_rl.encoding import SLOT_FIELDS as SLOT_FIELDS
    from kasmina_rl.encoding import Encoder as Encoder
    from kasmina_rl.environment import GrowEnv as GrowEnv
    from kasmina_rl.learned import ControllerError as ControllerError
    from kasmina_rl.learned import LearnedPolicy as LearnedPolicy
    from kasmina_rl.wrappers import GateShaping as GateShaping
    from kasmina_rl.wrappers import flat as flat

_HOMES = {
    "ControllerError": "learned",
    "Encoder": "encoding",
    "GateShaping": "wrappers",
    "GrowEnv": "environment",
    "LearnedPolicy": "learned",
    "RUN_FIELDS": "encoding",
    "SLOT_FIELDS": "encoding",
    "flat": "wrappers",
}

__all__ = sorted([*_HOMES, "kasmina_policies", "kasmina_tasks"])

register("Kasmina/Grow-v0", "kasmina_rl.environment:GrowEnv")
register("Kasmina/Toy-v0", "kasmina_rl.environment:GrowEnv", kwargs={"preset": "toy"})
register("Kasmina/Digits-v0", "kasmina_rl.environment:GrowEnv", kwargs={"preset": "digits"})
register("Kasmina/Chars-v0", "kasmina_rl.environment:GrowEnv", kwargs={"preset": "chars"})


@hookimpl
def kasmina_policies() -> Mapping[str, Callable[..., Any]]:
    """Return the policy that a trained controller decides for: ``kasmina grow --policy rl:learned``."""
    from kasmina_rl.learned import LearnedPolicy

    return {"learned": LearnedPolicy}


@hookimpl
def kasmina_tasks() -> Mapping[str, Callable[..., Any]]:
    """Return the small task of ``Kasmina/Toy-v0``."""

    def toy(seed: int = 0) -> Any:
        from kasmina_rl.episodes import toy_task

        return toy_task(seed)

    return {"toy": toy}


# No __dir__: pluggy before 1.7 reads every name that dir() lists, and some import torch.
def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"kasmina_rl.{_HOMES[name]}"), name)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
