"""Control messages between processes, over gloo with a timeout: a missing rank is an error, never a hang."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from itertools import count
from typing import Any, Final, final

import torch.distributed as dist

from kasmina_core.errors import DistributedError

_DIAGNOSIS_SECONDS: Final = 5.0
_numbers = count()


@final
@dataclass(frozen=True, slots=True)
class Word:
    """The message of one process in an exchange.

    Attributes:
        number: How many exchanges there were before.
        step: What it is about to decide, the same everywhere.
        attempt: Name of an operation that fails everywhere if it fails anywhere. Empty for none.
        payload: What it contributes.
        failure: Why it cannot continue, or empty.
    """

    number: int
    step: str
    attempt: str
    payload: Any
    failure: str


@final
class FailedSomewhere(Exception):
    """A process, perhaps this one, reported in an exchange that it cannot continue.

    Attributes:
        failures: Why, by rank.
    """

    def __init__(self, failures: Mapping[int, str]) -> None:
        self.failures = dict(failures)
        super().__init__("\n".join(f"  rank {rank}: {why}" for rank, why in self.failures.items()))


@final
class ControlGroup:
    """Exchanges messages between all processes of a group over gloo, whatever backend the gradients use.

    After an error every exchange raises it again: the processes no longer stand at the same place.

    Args:
        group: The processes; ``None`` for all.
        timeout: Seconds to wait for the slowest one.

    Raises:
        DistributedError: If a process does not call this too.
    """

    def __init__(self, group: dist.ProcessGroup | None, timeout: float) -> None:
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        self.timeout = timeout
        self._broken: DistributedError | None = None
        self._number = 0
        limit = timedelta(seconds=timeout)
        try:
            # Only members of a smaller group come here, so that new_group must not wait for the others.
            members = dist.get_process_group_ranks(group) if group is not None else None
            self.process_group: dist.ProcessGroup = dist.new_group(
                members, backend="gloo", timeout=limit, use_local_synchronization=members is not None
            )
        except (RuntimeError, ValueError) as error:
            raise DistributedError(
                f"Rank {self.rank} came to distribute(), but not every rank did within {timeout:g} s.\n"
                f"  torch: {_one_line(error)}\n"
                "Every process of the group must call distribute() with its own copy of the model."
            ) from error
        self._store = _shared_store(f"kasmina/{'-'.join(map(str, members or ()))}/{next(_numbers)}")

    @property
    def number(self) -> int:
        """Exchanges so far."""
        return self._number

    def exchange(self, step: str, payload: Any = None, *, attempt: str = "", failure: str = "") -> list[Any]:
        """Send a message, receive those of all, and return their payloads by rank.

        Raises:
            DistributedError: If a process is missing, or is at another step.
            FailedSomewhere: If a process, this one included, reports a failure.
        """
        if self._broken is not None:
            raise self._broken
        self._number += 1
        word = Word(self._number, step, attempt, payload, failure)
        self._note(word)
        heard: list[Any] = [None] * self.size
        try:
            dist.all_gather_object(heard, word, group=self.process_group)
        except Exception as error:
            raise self.give_up(self._missing(word, error)) from error
        failures = {rank: said.failure for rank, said in enumerate(heard) if said.failure}
        if failures:
            failed = FailedSomewhere(failures)
            if len({said.attempt for said in heard}) > 1:
                told = by_rank([f"{said.step}: {said.failure or 'waits for the others'}" for said in heard])
                raise self.give_up(
                    DistributedError(f"A process failed while others did something else.\n{told}")
                )
            raise failed
        steps = [(said.number, said.step) for said in heard]
        if len(set(steps)) > 1:
            told = by_rank([f"{text} (number {number})" for number, text in steps])
            elsewhere = DistributedError(
                f"The processes are not at the same place.\n{told}\n"
                "Every rank must give the same commands in the same order; a condition that differs between them "
                "(time, a local loss, the rank) must not decide about growth."
            )
            raise self.give_up(elsewhere)
        return [said.payload for said in heard]

    def give_up(self, error: DistributedError) -> DistributedError:
        """Make every later exchange raise ``error``, and return it."""
        self._broken = self._broken or error
        return error

    def _note(self, word: Word) -> None:
        if self._store is not None:
            try:
                self._store.set(str(self.rank), f"{word.number} {word.step}")
            except (RuntimeError, OSError):
                self._store = None  # its process is gone; the exchange itself says so

    def _missing(self, word: Word, error: Exception) -> DistributedError:
        last = self._last_words()
        arrived = {rank for rank, (number, _) in last.items() if number >= word.number} | {self.rank}
        missing = [rank for rank in range(self.size) if rank not in arrived] if last else []
        lines = []
        for rank in missing:
            number, step = last.get(rank, (0, ""))
            seen = f"last at {step} (number {number})" if number else "never heard"
            lines.append(f"  missing: rank {rank}, {seen}")
        if not last:
            lines.append("  missing: unknown, the store of the process group cannot be read")
        elif not missing:
            others = " or ".join(str(rank) for rank in range(self.size) if rank != self.rank)
            lines.append(f"  missing: nobody; every rank came, and then rank {others} was lost")
        return DistributedError(
            f"Rank {self.rank} came to {word.step} (number {word.number}), but not every rank did.\n"
            + "\n".join(lines)
            + f"\n  gloo: {_one_line(error)}\n"
            "A process that died says why in its own log. One that is only slower needs a larger timeout "
            f"(now {self.timeout:g} s); one that skipped this step must not.",
            missing,
        )

    def _last_words(self) -> dict[int, tuple[int, str]]:
        """Return number and step of each rank's last message; empty if the store cannot be read."""
        found: dict[int, tuple[int, str]] = {}
        store = self._store
        if store is None:
            return found

        def read() -> None:
            try:
                for rank in range(self.size):
                    if store.check([str(rank)]):
                        number, _, step = store.get(str(rank)).decode().partition(" ")
                        found[rank] = (int(number), step)
            except Exception:
                found.clear()

        # The store may be in a process that hangs.
        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        reader.join(_DIAGNOSIS_SECONDS)
        return dict(found) if not reader.is_alive() else {}


def by_rank(values: Sequence[str]) -> str:
    """Return lines such as ``  ranks 0, 2: value``, one for each value.

    >>> print(by_rank(["a", "b", "a"]))
      ranks 0, 2: a
      rank 1: b
    """
    ranks: dict[str, list[int]] = {}
    for rank, value in enumerate(values):
        ranks.setdefault(value, []).append(rank)
    return "\n".join(
        f"  rank{'s' if len(who) > 1 else ''} {', '.join(map(str, who))}: {value}"
        for value, who in ranks.items()
    )


def _shared_store(prefix: str) -> Any:
    """Return the store of the default process group; ``None`` if this version of torch keeps it elsewhere."""
    from torch.distributed import PrefixStore  # type: ignore[attr-defined]  # torch exports it unseen by mypy

    find = getattr(dist.distributed_c10d, "_get_default_store", None)
    return PrefixStore(prefix, find()) if find is not None else None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
