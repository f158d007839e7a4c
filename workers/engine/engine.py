"""One worker's loop: agree with the peers, run a forward pass, sample, emit."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from ...errors import InternalError, PeerLost
from ..protocol import EngineLoad, EngineOutput, EngineRequest
from .core import EngineConfig, EngineCore, StepWork
from .lockstep import Change, Offer, Retire, Row, Swap, gather
from .sampler import Sampled, sample
from .seams import KV, Decoder, StepExchange
from .stats import EngineStats

RunEnd = Literal["stopped", "retired"]


@dataclass(slots=True)
class _Turn:
    """What came out of one round of the loop. ``idle``: nobody has work and nothing changed."""

    outputs: list[EngineOutput] = field(default_factory=list)
    idle: bool = False
    end: RunEnd | None = None


class Engine:
    """Continues sequences, in lock-step with the engines of its peers.

    `run` or `step` are called from one thread, everything else from any. When `run` raises, no sequence is lost: it may
    be called again, as a rule after `recover`.

    Parameters
    ----------
    decoder, kv, exchange
        Model, its KV cache and the way to the peers, of one generation.
    config : EngineConfig
    clock : callable
        Seconds, for the step times.
    draw_seed : callable
        Seeds for sequences that ask for none.

    Attributes
    ----------
    generation : int
        The last one swapped to; 0 before.
    on_boundary : callable or None
        Gets everyone's rows at each step boundary, after a change was committed; runs in the loop's thread.
    """

    def __init__(
        self,
        decoder: Decoder,
        kv: KV,
        exchange: StepExchange,
        config: EngineConfig,
        clock: Callable[[], float] = time.perf_counter,
        draw_seed: Callable[[], int] = lambda: secrets.randbits(63),
    ) -> None:
        self.config = config
        self.generation = 0
        self.on_boundary: Callable[[Sequence[Row]], None] | None = None
        self._decoder, self._kv, self._exchange = decoder, kv, exchange
        self._clock, self._draw_seed = clock, draw_seed
        self._core = EngineCore(config, kv.num_blocks, kv.block_tokens)
        self._offer = Offer()
        self._stop = False
        self._lock = threading.Lock()  # guards the core and the exchange's identity; never held while waiting
        self._loop = threading.Lock()  # held by whoever turns

    @property
    def load(self) -> EngineLoad:
        with self._lock:
            return self._core.scheduler.load

    @property
    def stats(self) -> EngineStats:
        """A copy of the counters."""
        with self._lock:
            return self._core.stats

    def submit(self, request: EngineRequest) -> None:
        """Queue a request.

        Raises
        ------
        InvalidRequest, NeverFits, QueueFull
            It is refused, and nothing has changed.
        """
        with self._lock:  # the loop looks for work under the same lock, so ringing first loses nothing
            self._ring()
            self._core.submit(request, self._draw_seed)

    def abort(self, request_id: str) -> None:
        """End a request and free its blocks now; it is reported with the next outputs. Unknown ids are ignored."""
        with self._lock:
            if self._core.abort(request_id):
                self._ring()

    def offer(self, change: Change) -> None:
        """Declare readiness for a change; it comes at the boundary at which all members have declared it."""
        self._offer.make(change)
        with self._lock:
            self._ring()

    def withdraw(self, generation: int) -> bool:
        """Take an offer back; False if it is too late. Waits for a boundary in progress."""
        return self._offer.withdraw(generation)

    def stop(self) -> None:
        """End the loops of all members at the next boundary."""
        with self._lock:
            self._stop = True
            self._ring()

    def recover(self, swap: Swap) -> None:
        """Take new parts without asking the peers, after `run` has ended or raised.

        Raises
        ------
        InternalError
            The loop is running.
        """
        with self._alone():
            self._offer.drop()
            self._apply(swap)

    def run(self, emit: Callable[[list[EngineOutput]], None]) -> RunEnd:
        """Turn until stopped or retired; ``emit`` gets each step's outputs, in this thread.

        Raises
        ------
        PeerLost
            A member is gone. All sequences are kept, as with any other error of the model.
        """
        with self._alone():
            while True:
                exchange = self._exchange
                seen = exchange.doorbell()
                turn = self._turn(exchange)
                if turn.outputs:
                    emit(turn.outputs)
                if turn.end is not None:
                    return turn.end
                if turn.idle:
                    exchange.wait(seen, self.config.idle_wait_s)

    def step(self) -> list[EngineOutput]:
        """One round of the loop, without sleeping."""
        with self._alone():
            return self._turn(self._exchange).outputs

    def _turn(self, exchange: StepExchange) -> _Turn:
        with self._offer.boundary:
            rows = gather(exchange, self._row())
            change = self._offer.judge(rows)
            if isinstance(change, Swap):
                self._apply(change)
        if self.on_boundary is not None:
            self.on_boundary(rows)
        busy = any(row.work for row in rows)
        if isinstance(change, Retire):
            return _Turn(self._drain(), end="retired")
        if any(row.stop for row in rows):
            self._stop = False
            return _Turn(self._drain(), end="stopped")
        if change is not None:  # the new members agree on their first step among themselves
            return _Turn(self._drain())
        return _Turn(self._drain() + (self._forward() if busy else []), idle=not busy)

    def _row(self) -> Row:
        with self._lock:
            return Row(int(self._core.scheduler.has_work), int(self._stop), self._offer.generation)

    def _forward(self) -> list[EngineOutput]:
        began_s = self._clock()
        with self._lock:
            work = self._core.begin()
        sampled = self._compute(work)
        with self._lock:
            return self._core.finish(work, sampled, self._clock() - began_s)

    @torch.inference_mode()
    def _compute(self, work: StepWork) -> list[Sampled]:
        logits_RV: Tensor = self._decoder.forward(work.batch, self._kv)
        expected = (len(work.rows), self.config.vocab_size)
        if tuple(logits_RV.shape) != expected:
            raise InternalError(f"the model's logits have shape {tuple(logits_RV.shape)}; expected {expected}")
        return sample(logits_RV, work.rows)

    def _drain(self) -> list[EngineOutput]:
        with self._lock:
            return self._core.drain()

    def _apply(self, swap: Swap) -> None:
        with self._lock:
            self._core.replace_kv(swap.kv.num_blocks, swap.kv.block_tokens, swap.keep_kv)
            self._decoder, self._kv, self._exchange = swap.decoder, swap.kv, swap.exchange
            self.generation = swap.generation

    def _ring(self) -> None:
        # A broken exchange wakes nobody; the loop meets the same error, and what was asked waits for `recover`.
        with suppress(PeerLost):
            self._exchange.ring()

    def _alone(self) -> _Exclusive:
        return _Exclusive(self._loop)


class _Exclusive:
    """Holds a lock that nobody waits for: being second is a mistake."""

    def __init__(self, lock: threading.Lock) -> None:
        self._lock = lock

    def __enter__(self) -> None:
        if not self._lock.acquire(blocking=False):
            raise InternalError("the engine's loop is running already")

    def __exit__(self, *_: object) -> None:
        self._lock.release()
