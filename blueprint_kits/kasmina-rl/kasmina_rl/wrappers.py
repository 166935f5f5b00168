"""Wrappers: one vector of numbers, and rewards of gates that leave the best policy as it is."""

from __future__ import annotations

from typing import Any, final

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.utils import RecordConstructorArgs

from kasmina_rl.encoding import BOUND, Numbers, flatten


@final
class flat(gymnasium.ObservationWrapper[Numbers, Any, dict[str, Numbers]], RecordConstructorArgs):
    """Observations as one float32 vector in [-5, 5], as controllers take them; `action_masks` is handed on.

    >>> import gymnasium, kasmina_rl
    >>> env = kasmina_rl.flat(gymnasium.make("Kasmina/Toy-v0"))
    >>> env.observation_space.shape, int(env.action_space.n)
    ((89,), 13)
    """

    def __init__(self, env: gymnasium.Env[dict[str, Numbers], Any]) -> None:
        RecordConstructorArgs.__init__(self)
        gymnasium.ObservationWrapper.__init__(self, env)
        size = sum(int(np.prod(box.shape)) for box in env.observation_space.values())  # type: ignore[attr-defined]
        self.observation_space = spaces.Box(-BOUND, BOUND, (size,), np.float32)

    def observation(self, observation: dict[str, Numbers]) -> Numbers:
        """Return the vector."""
        return flatten(observation)

    def action_masks(self) -> Any:
        """Return which actions are legal now."""
        return self.unwrapped.action_masks()  # type: ignore[attr-defined]


@final
class GateShaping(gymnasium.Wrapper[Any, Any, Any, Any], RecordConstructorArgs):
    """Adds ``gamma * potential(after) - potential(before)`` to each reward: the report's rewards on the way.

    The potential is ``scale`` times the mean over slots of the stage that a seed has reached and the score of its next
    gate, in [0, 1]; 0 in an empty slot, and 0 after the last step. Which policy is best does not change (Ng et al.,
    1999, https://people.eecs.berkeley.edu/~pabbeel/cs287-fa09/readings/NgHaradaRussell-shaping-ICML1999.pdf).

    Args:
        env: A `GrowEnv`, wrapped or not.
        gamma: The discount that the learner uses; another one makes the shaping matter.
        scale: Size of the potential, in units of the reward.
    """

    def __init__(self, env: gymnasium.Env[Any, Any], gamma: float = 1.0, scale: float = 0.05) -> None:
        RecordConstructorArgs.__init__(self, gamma=gamma, scale=scale)
        gymnasium.Wrapper.__init__(self, env)
        self.gamma, self.scale = gamma, scale
        self._before = 0.0

    def potential(self) -> float:
        """Return the potential of the state that was last seen."""
        seen = self.unwrapped.seen  # type: ignore[attr-defined]
        shares = [_progress(slot) for slot in seen.slots]
        return self.scale * sum(shares) / len(shares)

    def reset(self, **arguments: Any) -> tuple[Any, dict[str, Any]]:
        """Begin an episode."""
        found = self.env.reset(**arguments)
        self._before = self.potential()
        return found

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Step, and add the difference of potentials."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        after = 0.0 if terminated else self.potential()
        shaped = float(reward) + self.gamma * after - self._before
        self._before = after
        return observation, shaped, terminated, truncated, info | {"reward": reward}

    def action_masks(self) -> Any:
        """Return which actions are legal now."""
        return self.unwrapped.action_masks()  # type: ignore[attr-defined]


def _progress(slot: Any) -> float:
    from kasmina_core import SeedStage

    first, last = SeedStage.GERMINATED, SeedStage.FOSSILIZED
    if not first <= slot.stage <= last:
        return 0.0
    if slot.stage is last:
        return 1.0
    return (slot.stage - first + (slot.gate_score or 0.0)) / (last - first)
