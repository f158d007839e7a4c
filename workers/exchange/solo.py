"""The exchange of a deployment with one worker: nothing travels."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from .base import BaseExchange, Pending


@dataclass(frozen=True, slots=True)
class _Arrived:
    x: Tensor
    splits: list[int]

    def wait(self) -> tuple[Tensor, list[int]]:
        return self.x, self.splits


class SoloExchange(BaseExchange):
    """Size 1. `dispatch` and `combine` hand back the tensor that they are given, not a copy."""

    def __init__(self) -> None:
        super().__init__(0, 1, 0.0)
        self._changed = threading.Condition()
        self._rings = 0

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _gather(self, row: Sequence[int]) -> list[list[int]]:
        return [list(row)]

    def _begin(self, x: Tensor, in_splits: Sequence[int]) -> Pending:
        return _Arrived(x, list(in_splits))

    def _combine(self, y: Tensor, in_splits: Sequence[int], out_splits: Sequence[int]) -> Tensor:
        return y

    def _rung(self) -> int:
        return self._rings

    def _sleep(self, seen: int, timeout_s: float) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._rings != seen or self._closed, timeout_s)

    def _ring(self) -> None:
        with self._changed:
            self._rings += 1
            self._changed.notify_all()
