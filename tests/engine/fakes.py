"""A toy model that reads its prefix back through the paged KV, and exchanges between threads."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from concertina.errors import PeerLost
from concertina.workers.engine.core import EngineConfig
from concertina.workers.engine.engine import Engine
from concertina.workers.engine.scheduler import SchedulerConfig
from concertina.workers.kv.ledger import Ledger, record_bytes
from concertina.workers.model.batch import Batch
from concertina.workers.protocol import EngineOutput, EngineRequest, SamplingParams
from torch import Tensor

VOCAB = 11
EOS = 10


@dataclass
class FakeKV:
    """One int per token place, written by the fake decoder.

    Blocks are numbered as they please; block b's pages begin at ``2 * b``. ``mapped`` is what may be touched.
    """

    num_blocks: int
    block_tokens: int = 2
    cells: dict[tuple[int, int], int] = field(default_factory=dict)
    ledger: Ledger | None = None
    mapped: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.mapped = self.mapped or set(range(self.num_blocks))

    @property
    def block_ids(self) -> Sequence[int]:
        return sorted(self.mapped)

    @property
    def cache(self) -> FakeKV:
        return self

    def page_of(self, block: int) -> int:
        assert block in self.mapped, "a block that is not mapped is noted"
        return 2 * block


@dataclass
class WholeKV:
    """A real cache, all of whose blocks are there from the start."""

    cache: Any
    ledger: Ledger | None = None

    @property
    def block_tokens(self) -> int:
        tokens: int = self.cache.block_tokens
        return tokens

    @property
    def block_ids(self) -> Sequence[int]:
        return range(self.cache.num_blocks)

    def page_of(self, block: int) -> int:
        return block


def favourite(prefix: Sequence[int]) -> int:
    """What the toy model says after these tokens; never EOS."""
    return sum((i + 3) * (token + 1) for i, token in enumerate(prefix)) % EOS


class Killed(BaseException):
    """The process is gone at this store; nothing it does from here on reaches anyone."""


class Stores:
    """Counts the stores of a ledger, reports each, and stops them all after ``kill_at``."""

    def __init__(self, pages: int, block_tokens: int, kill_at: int = -1) -> None:
        self.memory = bytearray(pages * record_bytes(block_tokens))
        self.block_tokens = block_tokens
        self.kill_at = kill_at
        self.count = 0
        self.after_each: Callable[[], None] = lambda: None

    def ledger(self, *, watched: bool = True) -> Ledger:
        ledger = Ledger(memoryview(self.memory), record_bytes(self.block_tokens), self.block_tokens)
        for name in ("_bytes", "_words", "_longs", "_ints"):
            if watched:
                setattr(ledger, name, _WatchedView(getattr(ledger, name), self))
        return ledger

    def note(self) -> None:
        if self.count == self.kill_at:
            raise Killed
        self.count += 1

    @property
    def dead(self) -> bool:
        return self.count == self.kill_at


class _WatchedView:
    """Stores several values one after the other, so that a kill finds them half-written."""

    def __init__(self, view: memoryview, stores: Stores) -> None:
        self._view, self._stores = view, stores

    def __getitem__(self, at: int | slice) -> Any:
        return self._view[at]

    def __setitem__(self, at: int | slice, value: Any) -> None:
        places = range(*at.indices(len(self._view))) if isinstance(at, slice) else [at]
        values = value if isinstance(at, slice) else [value]
        for place, one in zip(places, values, strict=True):
            self._stores.note()
            self._view[place] = one
            self._stores.after_each()


@dataclass
class FakeDecoder:
    """Writes each token into the KV, reads the whole prefix back, and favours `favourite` of what it read.

    ``hook`` runs at the start of every pass and may raise.
    """

    hook: Callable[[Batch], None] = lambda batch: None
    poison: int | None = None  # a last token whose logits are not finite
    passes: int = 0

    def forward(self, batch: Batch, kv: FakeKV) -> Tensor:
        self.hook(batch)
        self.passes += 1
        tokens, positions = batch.token_ids_T.tolist(), batch.positions_T.tolist()
        logits_TV = torch.zeros(len(tokens), VOCAB)
        for s, table in enumerate(batch.block_tables):
            for row in range(batch.query_start[s], batch.query_start[s + 1]):
                kv.cells[self._place(table, positions[row], kv)] = tokens[row]
            for row in range(batch.query_start[s], batch.query_start[s + 1]):
                prefix = [kv.cells[self._place(table, p, kv)] for p in range(positions[row] + 1)]
                logits_TV[row] = torch.arange(VOCAB) / 7  # other tokens are possible too
                logits_TV[row, favourite(prefix)] = 4.0
                if tokens[row] == self.poison:
                    logits_TV[row, 0] = float("nan")
        return logits_TV[list(batch.logits_rows)]

    @staticmethod
    def _place(table: Sequence[int], position: int, kv: FakeKV) -> tuple[int, int]:
        assert table[position // kv.block_tokens] in kv.mapped
        return table[position // kv.block_tokens], position % kv.block_tokens


class Hub:
    """What the `ThreadExchange`s of one generation share."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.rows: list[list[int] | None] = [None] * size
        self.barrier = threading.Barrier(size)
        self.changed = threading.Condition()
        self.rings = 0

    def members(self) -> list[ThreadExchange]:
        return [ThreadExchange(self, rank) for rank in range(self.size)]


class ThreadExchange:
    """The engine's part of an exchange, between threads."""

    def __init__(self, hub: Hub, rank: int) -> None:
        self.hub, self.rank, self.size = hub, rank, hub.size
        self.gathers = 0
        self.waits = 0

    def all_gather(self, row: Sequence[int]) -> list[list[int]]:
        self.gathers += 1
        self.hub.rows[self.rank] = list(row)
        self._meet()
        rows = [list(other) for other in self.hub.rows if other is not None]
        self._meet()
        return rows

    def meet_in_layer(self) -> None:
        """What every member's forward pass does equally often."""
        self._meet()

    def doorbell(self) -> int:
        return self.hub.rings

    def wait(self, seen: int, timeout_s: float) -> None:
        self.waits += 1
        with self.hub.changed:
            self.hub.changed.wait_for(lambda: self.hub.rings != seen or self.hub.barrier.broken, timeout_s)

    def ring(self) -> None:
        with self.hub.changed:
            self.hub.rings += 1
            self.hub.changed.notify_all()

    def check(self) -> None:
        if self.hub.barrier.broken:
            raise PeerLost(-1, "a thread is gone")

    def die(self) -> None:
        self.hub.barrier.abort()
        self.ring()

    def _meet(self) -> None:
        try:
            self.hub.barrier.wait(20)
        except threading.BrokenBarrierError:
            raise PeerLost(-1, "a thread is gone") from None


def config(*, caching: bool = True, eos: bool = True, idle_wait_s: float = 0.2, **limits: int | bool) -> EngineConfig:
    scheduler = SchedulerConfig(**{"max_model_len": 64, **limits})  # type: ignore[arg-type]
    return EngineConfig(scheduler, VOCAB, (EOS,) if eos else (), caching, idle_wait_s)


def solo(blocks: int | FakeKV = 64, decoder: FakeDecoder | None = None, setting: EngineConfig | None = None) -> Engine:
    (exchange,) = Hub(1).members()
    kv = FakeKV(blocks) if isinstance(blocks, int) else blocks
    return Engine(decoder or FakeDecoder(), kv, exchange, setting or config())


def request(name: str, prompt: Sequence[int], **sampling: object) -> EngineRequest:
    defaults: dict[str, object] = {"temperature": 0.0, "max_tokens": 5}
    return EngineRequest(name, tuple(prompt), SamplingParams(**{**defaults, **sampling}))  # type: ignore[arg-type]


@dataclass
class Collected:
    """Outputs put together by request. ``emit`` may be called from several threads."""

    tokens: dict[str, list[int]] = field(default_factory=dict)
    ends: dict[str, EngineOutput] = field(default_factory=dict)
    changed: threading.Condition = field(default_factory=threading.Condition)

    def emit(self, outputs: list[EngineOutput]) -> None:
        with self.changed:
            for output in outputs:
                assert output.id not in self.ends, "an output after the last one"
                self.tokens.setdefault(output.id, []).extend(output.token_ids)
                if output.finish_reason is not None:
                    self.ends[output.id] = output
            self.changed.notify_all()

    def wait_for(self, done: Callable[[], bool]) -> None:
        with self.changed:
            assert self.changed.wait_for(done, 20), "the outputs did not come"


def drain(engine: Engine, collected: Collected, steps: int = 2000) -> Collected:
    """Step until no sequence is left."""
    for _ in range(steps):
        collected.emit(engine.step())
        if engine.load.waiting + engine.load.running == 0:
            collected.emit(engine.step())
            return collected
    raise AssertionError("requests do not end")


def expected_greedy(prompt: Sequence[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(favourite(tokens))
    return tokens[len(prompt) :]
