"""Play: policies and controllers in an environment, and tables that compare them in pairs."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from statistics import fmean, stdev
from typing import Any, Final, Protocol, final

import numpy as np
import torch
from kasmina_core import BanditPolicy, FixedTimesPolicy, NoGrowthPolicy, PlateauPolicy, Policy

from kasmina_rl.environment import GrowEnv

SHARES: Final = (0.05, 0.15, 0.3, 0.45, 0.6)
"""The five fixed times, as shares of the budget in epochs of the host alone."""

TUNED: Final = tuple((patience, delta) for patience in (1, 2, 3, 5, 8) for delta in (0.003, 0.01, 0.03))
"""The settings among which the plateau policy is tuned: epochs of patience, least improvement."""


class Player(Protocol):
    """Chooses actions in an environment."""

    def begin(self, env: GrowEnv) -> None:
        """Begin an episode."""
        ...

    def act(self, env: GrowEnv, mask: Any) -> int:
        """Return the number of an action."""
        ...


@final
class PolicyPlayer:
    """Plays a policy of the library: of its commands each epoch, the first that is legal.

    Args:
        make: Makes the policy of an episode.
    """

    def __init__(self, make: Callable[[GrowEnv], Policy]) -> None:
        self.make = make

    def begin(self, env: GrowEnv) -> None:
        """Make the policy."""
        self.policy = self.make(env)

    def act(self, env: GrowEnv, mask: Any) -> int:
        """Ask the policy once."""
        if env.epoch == 0:
            return 0
        legal = (env.actions.number(command) for command in self.policy.decide(env.seen))
        return next((number for number in legal if mask[number]), 0)


@final
class RandomPlayer:
    """Draws among the legal actions, and waits with probability ``wait``; in an episode always the same."""

    def __init__(self, seed: int, wait: float = 0.5) -> None:
        self.seed, self.wait = seed, wait

    def begin(self, env: GrowEnv) -> None:
        """Begin to draw."""
        self.dice = np.random.default_rng([self.seed, env.episode])

    def act(self, env: GrowEnv, mask: Any) -> int:
        """Draw."""
        legal = np.flatnonzero(mask)
        return 0 if self.dice.random() < self.wait else int(self.dice.choice(legal))


@dataclass(frozen=True, slots=True)
class Played:
    """How an episode ended.

    Attributes:
        value: Loss of the host alone less that of the model, on the reward's samples.
        report: The same on the samples of reports; ``None`` if not asked for.
        seeds_kept: Fossils.
        steps: Steps.
    """

    value: float
    report: float | None
    seeds_kept: int
    steps: int


def play(env: GrowEnv, player: Player, episode: int, *, report: bool = False) -> Played:
    """Play one episode and return how it ended."""
    _, info = env.reset(options={"episode": episode})
    player.begin(env)
    total, done = 0.0, False
    while not done:
        _, reward, done, _, info = env.step(player.act(env, info["action_mask"]))
        total += reward
    losses = env.report() if report else {}
    gained = losses["alone"] - losses["kept"] if losses else None
    return Played(total, gained, info["seeds_kept"], env.epoch)


def _blueprints(env: GrowEnv) -> Callable[[Any], Sequence[str]]:
    return env.actions.fitting


def fixed_times(share: float) -> PolicyPlayer:
    """Return a player that grows a first seed at a share of the budget, and others when that one is decided."""
    return PolicyPlayer(partial(_fixed_times, share))


def _fixed_times(share: float, env: GrowEnv) -> Policy:
    first = max(1, round(share * env.epochs))
    return FixedTimesPolicy(_blueprints(env), epochs=range(first, env.epochs + 1))


def plateau(patience: int = 3, min_delta: float = 0.01) -> PolicyPlayer:
    """Return a player that grows on plateaus."""
    return PolicyPlayer(partial(_plateau, patience, min_delta))


def _plateau(patience: int, min_delta: float, env: GrowEnv) -> Policy:
    return PlateauPolicy(_blueprints(env), patience=patience, min_delta=min_delta)


def waiting() -> PolicyPlayer:
    """Return a player that never grows."""
    return PolicyPlayer(_waiting)


def _waiting(env: GrowEnv) -> Policy:
    return NoGrowthPolicy()


def bandit() -> PolicyPlayer:
    """Return a player that draws what to grow by what was gained."""
    return PolicyPlayer(_bandit)


def _bandit(env: GrowEnv) -> Policy:
    return BanditPolicy(_blueprints(env), seed=env.episode)


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a table: mean value, its 95 % interval over episodes, spread, seeds kept."""

    name: str
    mean: float
    half_width: float
    spread: float
    seeds_kept: float
    episodes: int

    @classmethod
    def of(cls, name: str, values: Sequence[float], kept: Sequence[float] = ()) -> Row:
        """Summarise values of episodes."""
        spread = stdev(values) if len(values) > 1 else math.nan
        return cls(
            name,
            fmean(values),
            _student(len(values)) * spread / math.sqrt(len(values)),
            spread,
            fmean(kept) if kept else math.nan,
            len(values),
        )

    def __str__(self) -> str:
        kept = "" if math.isnan(self.seeds_kept) else f"{self.seeds_kept:.2f}"
        low, high = self.mean - self.half_width, self.mean + self.half_width
        return f"{self.name:<34} {self.mean:+.4f}  [{low:+.4f}, {high:+.4f}]  {self.spread:.4f}  {kept:>5}"


HEAD: Final = f"{'arm':<34} {'value':>7}  {'95 % interval':<18}  {'spread':<6}   kept"


def _student(n: int) -> float:
    """Return the 97.5 % quantile of Student's t with ``n - 1`` degrees of freedom."""
    z, f = 1.959964, max(n - 1, 1)
    # Cornish-Fisher expansion, within .3 % from 4 degrees of freedom on.
    return z + (z**3 + z) / (4 * f) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * f**2)


def play_all(
    make: Callable[[], GrowEnv],
    players: Mapping[str, Player],
    episodes: Sequence[int],
    say: Callable[[str], object] = lambda text: None,
    *,
    report: bool = False,
    workers: int = 1,
) -> dict[str, list[Played]]:
    """Play all players on the same episodes, episode by episode.

    Args:
        make: Makes the environment.
        players: By name.
        episodes: Their numbers.
        say: Called with the progress.
        report: Whether to play on samples of reports, too.
        workers: Processes that share the episodes; what is played does not depend on it. Above 1, ``make`` and the
            players are pickled.
    """
    found: dict[str, list[Played]] = {name: [] for name in players}
    with ExitStack() as stack:
        if workers > 1:
            pool = stack.enter_context(get_context("spawn").Pool(workers, _begin, (make, players, report)))
            rounds: Iterable[dict[str, Played]] = pool.imap(_play_episode, episodes)
        else:
            env = make()
            rounds = (_play_round(env, players, report, episode) for episode in episodes)
        for done, played in enumerate(rounds, 1):
            for name, one in played.items():
                found[name].append(one)
            say(f"episode {done} of {len(episodes)}")
    return found


def _play_round(env: GrowEnv, players: Mapping[str, Player], report: bool, episode: int) -> dict[str, Played]:
    return {name: play(env, player, episode, report=report) for name, player in players.items()}


_ROUND: list[Callable[[int], dict[str, Played]]] = []


def _begin(make: Callable[[], GrowEnv], players: Mapping[str, Player], report: bool) -> None:
    torch.set_num_threads(1)
    _ROUND[:] = [partial(_play_round, make(), players, report)]
    gc.freeze()  # the process plays these episodes, and ends


def _play_episode(episode: int) -> dict[str, Played]:
    return _ROUND[0](episode)


def headroom(found: Mapping[str, Sequence[Played]], wait: str = "wait") -> tuple[str, float]:
    """Return the best arm, and how many spreads over episodes it lies above waiting.

    Below 3 there is little to learn: what a controller could gain drowns in what differs from episode to episode.
    """
    rows = [Row.of(name, [p.value for p in played]) for name, played in found.items() if name != wait]
    best = max(rows, key=lambda row: row.mean)
    return best.name, best.mean / best.spread if best.spread > 0 else math.inf


def paired(one: Sequence[Played], other: Sequence[Played], name: str) -> Row:
    """Return the differences of two arms on the same episodes, as a row."""
    return Row.of(name, [a.value - b.value for a, b in zip(one, other, strict=True)])
