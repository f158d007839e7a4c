"""One worker's loop: agree with the peers, run a forward pass, sample, emit."""

from __future__ import annotations

import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from typing import Literal, TypeVar

import torch
from torch import Tensor

from ...errors import InternalError, PeerLost
from ..kv.ledger import BlockRecord
from ..protocol import EngineLoad, EngineOutput, EngineRequest
from .blocks import BlockManager
from .core import EngineConfig, EngineCore, StepWork
from .lockstep import Change, Offer, Retire, Row, Swap, gather
from .notes import Notes
from .requests import check_request
from .sampler import Sampled, sample
from .seams import KV, Decoder, StepExchange
from .stats import EngineStats
from .turns import Turns

T = TypeVar("T")
Emit = Callable[[list[EngineOutput]], None]
RunEnd = Literal["stopped", "retired"]
_STEPS_KEPT = 8192
_LOOK_S = 0.0005
_EMULATED_LOOK_S = 1 / 64


@dataclass(slots=True)
class _Turn:
    """What came out of one round of the loop. ``idle``: nobody has work and nothing changed."""

    outputs: list[EngineOutput] = field(default_factory=list)
    idle: bool = False
    end: RunEnd | None = None


class Engine:
    """Continues sequences, in lock-step with the engines of its peers.

    `run` or `step` are called from one thread, everything else from any. When `run` raises, no sequence is lost: it may
    be called again, as a rule after `recover`. An engine that has retired only waits for `hand_over`.

    Parameters
    ----------
    decoder, exchange
        Model and the way to the peers, of one generation.
    kv : KV
        The device's cache, for all generations. What its ledger says of its blocks can be found from the start.
    config : EngineConfig
    clock, sleep : callable
        Seconds, for the step times; and what lets them pass, with the interpreter released.
    draw_seed : callable
        Seeds for sequences that ask for none.

    Attributes
    ----------
    generation : int
        The last one swapped to; 0 before.
    on_boundary : callable or None
        Gets everyone's rows at each step boundary, after a change was committed; runs in the loop's thread.
    step_ends_s : deque of float
        When the latest forward passes ended, by ``clock``.
    submitted, submitted_before : int
        Requests that were queued so far, and when this engine last said its row: nobody can have left since then and
        sent its sequences here.
    """

    def __init__(
        self,
        decoder: Decoder,
        kv: KV,
        exchange: StepExchange,
        config: EngineConfig,
        clock: Callable[[], float] = time.perf_counter,
        draw_seed: Callable[[], int] = lambda: secrets.randbits(63),
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.config = config
        self.generation = 0
        self.step_ends_s: deque[float] = deque(maxlen=_STEPS_KEPT)
        self.on_boundary: Callable[[Sequence[Row]], None] | None = None
        self.submitted = self.submitted_before = 0
        self._decoder, self._kv, self._exchange = decoder, kv, exchange
        self._clock, self._draw_seed, self._sleep = clock, draw_seed, sleep
        notes = Notes(kv.ledger, kv.page_of)
        self._core = EngineCore(config, BlockManager(kv.block_ids, kv.block_tokens, config.prefix_caching, notes))
        self._offer = Offer()
        self._stop = False
        self._retired = False
        self._moved_to: str | None = None  # where later requests are sent; None: not handed over
        self._keeps_finders = False  # those stay that would find here what no sequence used
        self._emit: Emit = _nobody_listens
        self._lock = threading.Lock()  # guards the core and the exchange's identity; never held while waiting
        self._turns = Turns()

    @property
    def load(self) -> EngineLoad:
        with self._lock:
            return self._core.scheduler.load

    @property
    def stats(self) -> EngineStats:
        """A copy of the counters."""
        with self._lock:
            return self._core.stats

    @property
    def step_s(self) -> float:
        """From the end of the last forward pass but one to that of the last; 0 before there are two."""
        ends_s = self.step_ends_s
        return ends_s[-1] - ends_s[-2] if len(ends_s) > 1 else 0.0

    def submit(self, request: EngineRequest) -> None:
        """Queue a request. After `hand_over` it is reported as moved at once, through the ``emit`` of `run`.

        Raises
        ------
        InvalidRequest, NeverFits, QueueFull
            It is refused, and nothing has changed.
        """
        with self._lock:  # the loop looks for work under the same lock, so ringing first loses nothing
            if self._keeps_finders:
                check_request(request, self.config.vocab_size)
            stays = self._keeps_finders and self._core.scheduler.blocks.finds_unused(request.prompt)
            moved_to = None if stays else self._moved_to
            if moved_to is None:
                self._ring()
                self._core.submit(request, self._draw_seed)
                self.submitted += 1
        if moved_to is not None:
            self._emit([EngineOutput(request.id, (), "moved", moved_to=moved_to)])

    def abort(self, request_id: str) -> None:
        """End a request and free its blocks now; it is reported with the next outputs. Unknown ids are ignored."""
        with self._lock:
            if self._core.abort(request_id):
                self._ring()

    def offer(self, change: Change) -> None:
        """Declare readiness for a change; it comes at the boundary at which all members have declared it."""
        self._offer.make(change)
        self._wake()

    def withdraw(self, generation: int) -> bool:
        """Take an offer back; False if it is too late. Waits for a boundary in progress."""
        return self._offer.withdraw(generation)

    def stop(self) -> None:
        """End the loops of all members at the next boundary."""
        self._stop = True
        self._wake()

    def call(self, fn: Callable[[], T]) -> T:
        """Run ``fn`` in the loop's thread at its next step boundary, or at once where no loop runs; its result.

        No forward pass runs meanwhile, so ``fn`` may change what is mapped. Within it, `resize` and `give_up` act
        at once.
        """
        return self._turns.call(fn, self._wake)

    def resize(self, fresh: Iterable[int], target: int) -> list[int]:
        """`EngineCore.resize` at the next boundary: other blocks and another number of them; those parted with."""
        return self._call_core(lambda: self._core.resize(fresh, target))

    def take_in(self, records: Collection[tuple[int, BlockRecord | None]]) -> None:
        """`EngineCore.take_in`, at once: blocks that are mapped now, and what their ledger says of them."""
        with self._lock:
            self._core.take_in(records)

    def give_up(self, target: int) -> list[int]:
        """`EngineCore.give_up` at the next boundary; those parted with."""
        return self._call_core(lambda: self._core.give_up(target))

    def reserve(self, count: int) -> list[int]:
        """`EngineCore.reserve`: up to ``count`` blocks to fill and `give_back`.

        At once: steps may be long. At the next boundary only where what a step in flight may write has been freed.
        """
        with self._lock:
            if not self._core.freed_in_step:
                return self._core.reserve(count)
        return self._call_core(lambda: self._core.reserve(count))

    def give_back(self, records: Collection[tuple[int, BlockRecord | None]]) -> None:
        """`EngineCore.give_back`, at once: blocks that were reserved, with what they hold now."""
        with self._lock:
            self._core.give_back(records)

    def worth_adopting(self, used: int, unused: int, target: int) -> int:
        """`EngineCore.worth_adopting`, at once."""
        with self._lock:
            return self._core.worth_adopting(used, unused, target)

    def unused_besides(self, blocks: Iterable[int]) -> int:
        """`BlockManager.unused_besides`, at once."""
        with self._lock:
            return self._core.scheduler.blocks.unused_besides(blocks)

    def keep_awaited(self) -> None:
        """Until `keep_no_more`, what sequences that wait now would find is evicted last, and not reserved."""
        with self._lock:
            waiting = self._core.scheduler.waiting
        blocks, found = self._core.scheduler.blocks, dict[int, None]()
        for seq in waiting:
            with self._lock:  # for a moment: steps go on
                found.update(dict.fromkeys(blocks.found(seq.tokens)))
        with self._lock:
            blocks.keep(found)

    def keep_no_more(self) -> None:
        """What was kept counts as used just now."""
        with self._lock:
            self._core.scheduler.blocks.keep(())

    def touch(self, blocks: Iterable[int]) -> None:
        """Have blocks that are cached count as used just now, the last one most recently."""
        with self._lock:
            self._core.scheduler.blocks.touch(blocks)

    def await_submissions(self, count: int, limit_s: float) -> None:
        """In the loop's thread: return once ``count`` requests were queued in all, or after ``limit_s``."""
        end_s = self._clock() + limit_s
        while self.submitted < count and self._clock() < end_s:
            self._sleep(_LOOK_S)

    def recover(self, swap: Swap) -> None:
        """Take new parts without asking the peers, after `run` has ended or raised. All sequences are kept.

        Raises
        ------
        InternalError
            The loop is running, or the engine has retired.
        """
        with self._looping():
            self._offer.drop()
            self._apply(swap)

    def retire(self) -> None:
        """Have no part in what comes, after `run` has raised; as if it had returned "retired"."""
        with self._turns.loop():
            self._offer.drop()
            self._retire()

    def hand_over(self, moved_to: str, *, running: bool = False) -> list[EngineOutput]:
        """End every sequence of an engine that has retired as moved to that device; all outputs not yet emitted.

        With ``running`` those stay for another call, now and later, that wait and would find here what no sequence
        uses: it is not there yet, and would be computed again.

        Raises
        ------
        InternalError
            The engine has not retired.
        """
        with self._turns.loop(), self._lock:
            if not self._retired:
                raise InternalError("an engine that has not retired cannot hand its sequences over")
            self._moved_to, self._keeps_finders = moved_to, running
            return self._core.hand_over(moved_to, running=running)

    def run(self, emit: Emit) -> RunEnd:
        """Turn until stopped or retired; ``emit`` gets each step's outputs, in this thread.

        Retiring ends the loop only: the sequences stay until `hand_over`.

        Raises
        ------
        PeerLost
            A member is gone. All sequences are kept, as with any other error of the model.
        """
        with self._looping():
            self._emit = emit
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
        with self._looping():
            return self._turn(self._exchange).outputs

    def _turn(self, exchange: StepExchange) -> _Turn:
        self._turns.serve()
        with self._offer.boundary:
            rows = gather(exchange, self._row())
            change = self._offer.judge(rows)
            if isinstance(change, Swap):
                self._apply(change)
        if self.on_boundary is not None:
            self.on_boundary(rows)
        busy = any(row.work for row in rows)
        if isinstance(change, Retire):
            self._retire()
            return _Turn(self._drain(), end="retired")
        if any(row.stop for row in rows):
            self._stop = False
            return _Turn(self._drain(), end="stopped")
        if change is not None:  # the new members agree on their first step among themselves
            return _Turn(self._drain())
        outputs = self._forward() if busy else []
        return _Turn(self._drain() + outputs, idle=not busy)  # drained last: what fails before loses none of them

    def _row(self) -> Row:
        with self._lock:
            self.submitted_before = self.submitted
            work, step_us = self._core.scheduler.has_work, round(self.step_s * 1e6)
            return Row(int(work), int(self._stop), self._offer.generation, step_us)

    def _forward(self) -> list[EngineOutput]:
        began_s = self._clock()
        with self._lock:
            work = self._core.begin()
        sampled = self._compute(work)
        self._emulate(began_s)
        ended_s = self._clock()
        self.step_ends_s.append(ended_s)
        with self._lock:
            return self._core.finish(work, sampled, ended_s - began_s)

    def _emulate(self, began_s: float) -> None:
        """Leave the host's cores alone until an accelerator would have been done; it, too, would miss a lost peer."""
        ends_s = began_s + self.config.emulated_step_ms / 1e3
        while (missing_s := ends_s - self._clock()) > 0:
            self._sleep(min(missing_s, _EMULATED_LOOK_S))
            self._exchange.check()

    @torch.inference_mode()
    def _compute(self, work: StepWork) -> list[Sampled]:
        logits_RV: Tensor = self._decoder.forward(work.batch, self._kv.cache)
        expected = (len(work.rows), self.config.vocab_size)
        if tuple(logits_RV.shape) != expected:
            raise InternalError(f"the model's logits have shape {tuple(logits_RV.shape)}; expected {expected}")
        return sample(logits_RV, work.rows)

    def _drain(self) -> list[EngineOutput]:
        with self._lock:
            return self._core.drain()

    def _apply(self, swap: Swap) -> None:
        with self._lock:
            self._decoder, self._exchange = swap.decoder, swap.exchange
            self.generation = swap.generation

    def _retire(self) -> None:
        with self._lock:
            self._retired = True
            self._core.retire()

    def _call_core(self, fn: Callable[[], T]) -> T:
        def locked() -> T:
            with self._lock:
                return fn()

        return self.call(locked)

    def _wake(self) -> None:
        with self._lock:
            self._ring()

    def _ring(self) -> None:
        # A broken exchange wakes nobody; the loop meets the same error, and what was asked waits for `recover`.
        with suppress(PeerLost):
            self._exchange.ring()

    def _looping(self) -> AbstractContextManager[None]:
        if self._retired:
            raise InternalError("the engine has retired")
        return self._turns.loop()


def _nobody_listens(outputs: list[EngineOutput]) -> None:
    raise InternalError(f"request {outputs[0].id!r} has moved, and this engine never ran")
