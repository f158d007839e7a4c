"""What the members of a generation tell each other before every step, and what they may agree on.

The same rows reach every member, so all of them draw the same conclusions at the same boundary. A *change* (to
another generation, or out of this one) is offered by each member when it is ready; it is committed at the first
boundary at which all offer the same generation. Until then it may be withdrawn.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from ...errors import InternalError
from .seams import Decoder, StepExchange

NOTHING = -1  # offered by who offers nothing


class Row(NamedTuple):
    """One member's word before a step: has it work, must all stop, which generation is it ready for, how long was its
    last step, or what came between (0: it has not made two)."""

    work: int
    stop: int
    offered: int
    step_us: int = 0


@dataclass(frozen=True, slots=True)
class Swap:
    """Go on in ``generation`` with these parts. The KV is the device's, and stays."""

    generation: int
    decoder: Decoder
    exchange: StepExchange


@dataclass(frozen=True, slots=True)
class Retire:
    """Have no part in ``generation``: the loop ends when the others go there."""

    generation: int


Change = Swap | Retire


class Offer:
    """The change that this member is ready for, if any. Thread-safe.

    The engine holds ``boundary`` from writing its row until the rows have been judged; so a withdrawal comes
    either before the offer is made or after it has been committed or not, never between.
    """

    def __init__(self) -> None:
        self.boundary = threading.Lock()
        self._change: Change | None = None

    @property
    def generation(self) -> int:
        change = self._change
        return NOTHING if change is None else change.generation

    def make(self, change: Change) -> None:
        """Offer a change from the next boundary on.

        Raises
        ------
        InternalError
            Another one is on offer, or the generation's number is negative.
        """
        if change.generation < 0:
            raise InternalError(f"generation {change.generation} is negative")
        with self.boundary:
            if self._change is not None:
                raise InternalError(
                    f"generation {change.generation} offered while {self._change.generation} is on offer"
                )
            self._change = change

    def withdraw(self, generation: int) -> bool:
        """Take an offer back; False if it is not on offer (any more), for instance because it was committed."""
        with self.boundary:
            if self.generation != generation:
                return False
            self._change = None
            return True

    def judge(self, rows: Iterable[Row]) -> Change | None:
        """The change to commit at this boundary, if all rows offer it. The caller holds ``boundary``."""
        if self._change is None or any(row.offered != self._change.generation for row in rows):
            return None
        change, self._change = self._change, None
        return change

    def drop(self) -> None:
        with self.boundary:
            self._change = None


def gather(exchange: StepExchange, row: Row) -> list[Row]:
    """Everyone's rows by rank."""
    return [Row(*other) for other in exchange.all_gather(row)]
