"""Ledger of the floating-point operations of a run."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TypeVar, final

from kasmina_core.checks.flops import flop_counter as flop_counter

T = TypeVar("T")


@final
class FlopLedger:
    """Adds up the operations of a run.

    Only the first call of each kind of work runs under the counter; later ones are charged the same. Matrix products,
    convolutions and attention count; element-wise operations do not.

    The counter makes torch compute some operations from simpler ones, which rounds otherwise. A run that goes on must
    therefore know what was counted before.

    Attributes:
        total: Operations so far.
        known: Operations of each kind of work that was counted, by its ``repr``.
    """

    def __init__(self) -> None:
        self.total = 0
        self.known: dict[str, int] = {}

    def charge(self, kind: Hashable, work: Callable[[], T]) -> T:
        """Do the work and add its operations.

        Args:
            kind: Equal for calls that do the same operations on the same shapes.
            work: What to do.
        """
        name = repr(kind)
        if name in self.known:
            result = work()
        else:
            with flop_counter() as counter:
                result = work()
            self.known[name] = counter.get_total_flops()
        self.total += self.known[name]
        return result
