"""PPO in one file, on the linear controller: whole episodes, masked actions, a small network for values.

It needs no package for reinforcement learning. Schulman et al. 2017, https://arxiv.org/abs/1707.06347; masks as in
Huang and Ontañón 2020, https://arxiv.org/abs/2006.14171.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, final

import numpy as np
import torch
from torch import Tensor, nn

from kasmina_rl.encoding import Numbers, flatten, timing
from kasmina_rl.environment import GrowEnv
from kasmina_rl.learned import SCORES

EPISODES: Final = 8
"""Episodes between two updates; each is played to its end, so that no value has to be guessed there."""

LAMBDA: Final = 0.95
CLIP: Final = 0.2
EPOCHS: Final = 8
MINIBATCH: Final = 64
RATE: Final = 3e-3
ENTROPY: Final = 0.01
"""Of advantages with spread 1."""


class LinearActor(nn.Module):
    """The scores of a linear controller, for many observations at once.

    Args:
        weights: `SCORES` by name, from which to start.
    """

    def __init__(self, weights: Mapping[str, Numbers]) -> None:
        super().__init__()
        self.parts = nn.ParameterDict({name: torch.tensor(weights[name]) for name in SCORES})

    def forward(self, run: Tensor, slots: Tensor, candidates: Tensor) -> Tensor:
        """Return the scores ``(n, 1 + s * (k + 3))``.

        Args:
            run: ``(n, r)``.
            slots: ``(n, s, f)``.
            candidates: ``(n, k, m)``.
        """
        parts, times = self.parts, torch.stack(timing(run, slots), 2)
        about = torch.cat([run[:, None].expand(-1, slots.shape[1], -1), slots, times], 2)  # (n, s, r + f + t)
        width = about.shape[2]
        wait = run @ parts["wait"][:-1] + parts["wait"][-1]
        grow = parts["germinate"]
        germinate = (about @ grow[:width])[:, :, None] + (candidates @ grow[width:-1])[:, None] + grow[-1]
        rest = [about @ parts[name][:-1] + parts[name][-1] for name in ("advance", "cull", "revert")]
        of_slots = torch.cat([germinate, torch.stack(rest, 2)], 2)  # (n, s, k + 3)
        return torch.cat([wait[:, None], of_slots.flatten(1)], 1)

    def weights(self) -> dict[str, Numbers]:
        """Return the weights, as `Controller` takes them."""
        return {name: self.parts[name].detach().numpy().copy() for name in SCORES}


@final
class Ppo:
    """Actor, network for values, and one optimiser for both.

    Args:
        weights: The linear controller to start from.
        numbers: Length of an observation as one vector.
        seed: For the network's first weights.
    """

    def __init__(self, weights: Mapping[str, Numbers], numbers: int, seed: int) -> None:
        self.actor = LinearActor(weights)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.values = nn.Sequential(nn.Linear(numbers, 64), nn.Tanh(), nn.Linear(64, 1))
        parameters = [*self.actor.parameters(), *self.values.parameters()]
        self.optimizer = torch.optim.Adam(parameters, RATE, eps=1e-5)

    def state_dict(self) -> dict[str, Any]:
        """Return all that learning goes on from."""
        return {
            "actor": self.actor.state_dict(),
            "values": self.values.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned; torch's errors for what does not fit."""
        self.actor.load_state_dict(state["actor"])
        self.values.load_state_dict(state["values"])
        self.optimizer.load_state_dict(state["optimizer"])

    def play(self, env: GrowEnv, episode: int, dice: np.random.Generator) -> Episode:
        """Play an episode; each action is drawn among the legal ones by ``softmax(scores)``."""
        seen, info = env.reset(options={"episode": episode})
        played, done = Episode(), False
        while not done:
            mask = info["action_mask"].astype(bool)
            with torch.no_grad():
                scores = self.actor(*(torch.from_numpy(seen[name])[None] for name in seen))[0].numpy()
            odds = np.where(mask, scores, -np.inf).astype(np.float64)
            action = int((odds + dice.gumbel(size=len(odds))).argmax())
            played.seen.append(seen)
            played.masks.append(mask)
            played.actions.append(action)
            seen, reward, done, _, info = env.step(action)
            played.rewards.append(reward)
        return played

    def learn(self, episodes: list[Episode], dice: np.random.Generator) -> dict[str, float]:
        """Update by some episodes, and return what TensorBoard shows."""
        rows = [seen for played in episodes for seen in played.seen]
        seen = [torch.from_numpy(np.stack([row[name] for row in rows])) for name in rows[0]]
        flat = torch.from_numpy(np.stack([flatten(row) for row in rows]))
        masks = torch.from_numpy(np.stack([mask for played in episodes for mask in played.masks]))
        actions = torch.tensor([action for played in episodes for action in played.actions])
        with torch.no_grad():
            guessed = self.values(flat)[:, 0]
            before = self.logs(seen, masks).gather(1, actions[:, None])[:, 0]
        parts = torch.split(guessed, [len(played.rewards) for played in episodes])
        gains = torch.cat([advantages(p.rewards, part) for p, part in zip(episodes, parts, strict=True)])
        returns = gains + guessed
        gains = (gains - gains.mean()) / (gains.std() + 1e-8)
        entropy = torch.zeros(())
        for _ in range(EPOCHS):
            for at in torch.from_numpy(dice.permutation(len(rows))).split(MINIBATCH):
                logs = self.logs([part[at] for part in seen], masks[at])
                ratio = (logs.gather(1, actions[at, None])[:, 0] - before[at]).exp()
                clipped = ratio.clamp(1 - CLIP, 1 + CLIP)
                surrogate = torch.minimum(ratio * gains[at], clipped * gains[at]).mean()
                entropy = -(logs.exp() * logs.clamp(min=-1e3)).sum(1).mean()
                error = (self.values(flat[at])[:, 0] - returns[at]).square().mean()
                self.optimizer.zero_grad()
                (0.5 * error - surrogate - ENTROPY * entropy).backward()
                nn.utils.clip_grad_norm_([p for g in self.optimizer.param_groups for p in g["params"]], 0.5)
                self.optimizer.step()
        return {"entropy": float(entropy.detach()), "value_error": float((guessed - returns).square().mean())}

    def logs(self, seen: list[Tensor], masks: Tensor) -> Tensor:
        """Return the logarithms of the odds of all actions, ``-inf`` for those that are masked, ``(n, a)``."""
        scores: Tensor = self.actor(*seen)
        return scores.masked_fill(~masks, -torch.inf).log_softmax(1)


@dataclass
class Episode:
    """What was seen and done in an episode, step by step."""

    seen: list[dict[str, Numbers]] = field(default_factory=list)
    masks: list[Any] = field(default_factory=list)
    actions: list[int] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)


def advantages(rewards: list[float], values: Tensor) -> Tensor:
    """Return generalised advantages of an episode that was played to its end, with discount 1.

    ``advantage(t) = sum over k of LAMBDA**k * (reward(t + k) + value(t + k + 1) - value(t + k))``, and the value after the
    end is 0.

    Args:
        rewards: Of each step.
        values: What the network expects from each step on, ``(n,)``.

    Source: Schulman et al. 2016, https://arxiv.org/abs/1506.02438
    """
    found, total, after = torch.empty_like(values), 0.0, 0.0
    for t in reversed(range(len(rewards))):
        total = rewards[t] + after - float(values[t]) + LAMBDA * total
        found[t], after = total, float(values[t])
    return found
