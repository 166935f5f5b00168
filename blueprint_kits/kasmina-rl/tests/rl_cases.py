"""What the tests of the kit share."""

from __future__ import annotations

from typing import Any

import numpy as np
from kasmina_core import Advance, Command, Cull, Germinate, SeedStage

from kasmina_rl import GrowEnv

MLP, NORM = "vector:mlp", "vector:norm"


def toy(**changes: Any) -> GrowEnv:
    """Return the small environment with a small budget."""
    return GrowEnv(preset="toy", **({"epochs": 16, "blueprints": (NORM, MLP)} | changes))


def play(
    env: GrowEnv, wanted: Any, episode: int = 0
) -> tuple[list[float], dict[str, Any], list[dict[str, Any]]]:
    """Play an episode; ``wanted(env, mask)`` returns a command or the number of an action."""
    _, info = env.reset(seed=0, options={"episode": episode})
    rewards, infos, done = [], [info], False
    while not done:
        choice = wanted(env, info["action_mask"])
        number = choice if isinstance(choice, int) else env.actions.number(choice)
        _, reward, done, _, info = env.step(number)
        rewards.append(reward)
        infos.append(info)
    return rewards, info, infos


def legal(env: GrowEnv, mask: Any, *commands: Command) -> int:
    """Return the first of the commands that is legal, else to wait."""
    numbers = [env.actions.number(command) for command in commands]
    return next((n for n in numbers if mask[n]), 0)


def grow(blueprint: str, slot: str = "first") -> Any:
    """Return a way to play: grow a blueprint, keep it when the gate allows."""

    def wanted(env: GrowEnv, mask: Any) -> int:
        return legal(env, mask, Advance(slot), Germinate(slot, blueprint))

    return wanted


def loop(env: GrowEnv, mask: Any) -> int:
    """Germinate, and cull before the host has learned with the seed, again and again."""
    slot = env.seen.slots[0]
    if slot.stage is SeedStage.BLENDING or slot.epochs_in_stage:
        return legal(env, mask, Cull("first", ""))
    return legal(env, mask, Germinate("first", MLP))


def at_random(seed: int) -> Any:
    """Return a way to play: any action, legal or not."""
    dice = np.random.default_rng(seed)
    return lambda env, mask: int(dice.integers(len(mask)))
