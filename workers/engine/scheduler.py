"""Which tokens run in the next step: continuous batching over paged KV. Pure; no tensors, clock or randomness.

Sequences run in the order of arrival, but for those that another worker had begun: they come before all that have
never run. Each step takes, within a budget of tokens, first one token of every sequence that decodes, then the rest of
prompts already begun, then new sequences. When blocks run out, who was admitted last gives its blocks back and waits
again; it keeps its tokens. Who was admitted first can therefore always go on, it fits the pool alone (others are
refused on arrival), and so every sequence ends.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from ...errors import OperatorError
from ..protocol import EngineLoad
from .blocks import BlockManager
from .errors import CacheTooSmall, InvalidRequest, NeverFits, QueueFull
from .sequence import Finished, Running, Sequence, Waiting


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """Limits, in tokens and sequences. ``max_waiting`` is how many are accepted beyond ``max_running``.

    With ``chunked_prefill`` off a prompt runs in one step, so the budget is then at least ``max_model_len``.

    Raises
    ------
    OperatorError
        A limit is below 1 (``max_waiting``: below 0).
    """

    max_model_len: int
    max_batched_tokens: int = 512
    max_running: int = 64
    max_waiting: int = 256
    chunked_prefill: bool = True

    def __post_init__(self) -> None:
        least = {"max_model_len": 1, "max_batched_tokens": 1, "max_running": 1, "max_waiting": 0}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise OperatorError(f"engine: {name}: {getattr(self, name)}; expected at least {low}")

    @property
    def step_budget(self) -> int:
        """Most tokens of one step."""
        return self.max_batched_tokens if self.chunked_prefill else max(self.max_batched_tokens, self.max_model_len)


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens ``start`` to ``start + count`` of a sequence, to run in this step."""

    seq: Sequence
    start: int
    count: int

    @property
    def samples(self) -> bool:
        """Whether it reaches the sequence's end, so that the next token can be chosen."""
        return self.start + self.count == len(self.seq.tokens)


class Scheduler:
    """Waiting and running sequences, and their blocks.

    A sequence that ends or is pre-empted leaves what it has computed to be found: by itself, too.

    A step is ``schedule()``, the forward pass, ``complete(chunks)``. If the pass fails, nothing is lost: the next
    ``schedule()`` gives the same tokens again.
    """

    def __init__(self, config: SchedulerConfig, blocks: BlockManager) -> None:
        self.config = config
        self.blocks = blocks
        self.preemptions = 0
        self._by_id: dict[str, Sequence] = {}
        self._waiting: deque[Sequence] = deque()  # by arrival, but those that have begun come first
        self._running: list[Sequence] = []
        self._arrivals = 0

    @property
    def has_work(self) -> bool:
        return bool(self._by_id)

    @property
    def load(self) -> EngineLoad:
        return EngineLoad(len(self._waiting), len(self._running), self.blocks.used_blocks, self.blocks.capacity)

    @property
    def waiting(self) -> tuple[Sequence, ...]:
        """Those that wait, in the order in which they will be admitted."""
        return tuple(self._waiting)

    @property
    def sequences(self) -> tuple[Sequence, ...]:
        """All sequences that have not ended, in the order in which they are served."""
        return (*self._running, *self._waiting)

    def add(self, seq: Sequence) -> None:
        """Queue a sequence.

        Raises
        ------
        InvalidRequest
            The id is in use.
        NeverFits
            It is longer than the context, or than the whole pool (`CacheTooSmall`).
        QueueFull
            ``max_running + max_waiting`` sequences are here already, and it is neither resumed nor admitted.
        """
        if seq.id in self._by_id:
            raise InvalidRequest(f"id: {seq.id!r} belongs to a request that has not ended")
        self._check_fits(seq)
        full = len(self._by_id) >= self.config.max_running + self.config.max_waiting
        if full and not (seq.resumed or seq.admitted):
            raise QueueFull(f"{len(self._by_id)} requests are here already; try again later")
        seq.arrival = self._arrivals
        self._arrivals += 1
        self._by_id[seq.id] = seq
        begun = sum(other.begun for other in self._waiting) if seq.resumed else len(self._waiting)
        self._waiting.insert(begun, seq)

    def schedule(self) -> list[Chunk]:
        """Choose the next step's tokens and give them blocks."""
        preemptions = self.preemptions
        chunks = self._decodes()
        budget = self.config.step_budget - len(chunks)
        budget = self._begun_prompts(chunks, budget)
        if self.preemptions == preemptions:  # else the newcomer would take what was just given up
            self._admit(chunks, budget)
        return chunks

    def complete(self, chunks: list[Chunk]) -> None:
        """Note that the chunks' KV is written, and logits where they end are finite. Ended sequences are skipped.

        Only KV that has led to finite logits enters the prefix cache.
        """
        for chunk in chunks:
            state = chunk.seq.state
            if isinstance(state, Running):
                state.computed = chunk.start + chunk.count
                self.blocks.record(chunk.seq.id, chunk.seq.tokens, state.computed)

    def finish(self, seq: Sequence, end: Finished, spoiled: bool = False) -> None:
        """End a sequence and take its blocks back at once; ``spoiled``: what it has written is not to be found."""
        was = seq.state
        seq.to(end)
        del self._by_id[seq.id]
        if isinstance(was, Running):
            self._running.remove(seq)
            self.blocks.release(seq.id, spoiled)
        else:
            self._waiting.remove(seq)

    def abort(self, seq_id: str) -> Sequence | None:
        """End a sequence; None if there is no such sequence (any more)."""
        seq = self._by_id.get(seq_id)
        if seq is not None:
            self.finish(seq, Finished("abort"))
        return seq

    def preempt(self, seq: Sequence) -> None:
        """Take a running sequence's blocks; it waits, keeps its tokens and is computed again later.

        Only the latest of the running ones may be chosen, which keeps both queues in order.
        """
        seq.to(Waiting(preempted=True))
        self._running.remove(seq)
        self.blocks.release(seq.id)
        self._waiting.appendleft(seq)
        self.preemptions += 1

    def preempt_until(self, available: int) -> None:
        """Send those admitted last back to wait until so many blocks can be had, or nobody runs."""
        while self._running and self.blocks.available < available:
            self.preempt(self._running[-1])

    def misfits(self, capacity: int) -> list[Sequence]:
        """Sequences that a pool of so many blocks could not hold even alone."""
        return [seq for seq in self.sequences if self.blocks.blocks_for(seq.kv_tokens_at_most) > capacity]

    def _check_fits(self, seq: Sequence) -> None:
        asked = f"{seq.prompt_len} prompt tokens and max_tokens {seq.sampling.max_tokens}"
        if seq.prompt_len + seq.sampling.max_tokens > self.config.max_model_len:
            raise NeverFits(f"{asked} exceed the context of {self.config.max_model_len} tokens")
        needed = self.blocks.blocks_for(seq.kv_tokens_at_most)
        if needed > self.blocks.capacity:
            size = self.blocks.block_tokens
            raise CacheTooSmall(
                f"{asked} need {needed} KV blocks of {size} tokens; the whole cache has {self.blocks.capacity}"
            )

    def _decodes(self) -> list[Chunk]:
        chunks: list[Chunk] = []
        for seq in list(self._running):
            state = seq.state
            if len(chunks) == self.config.step_budget:
                break
            if not isinstance(state, Running) or len(seq.tokens) - state.computed > 1:
                continue  # pre-empted by an earlier one just now, or a prompt
            if self._ensure_blocks(seq):
                chunks.append(Chunk(seq, state.computed, 1))
        return chunks

    def _ensure_blocks(self, seq: Sequence) -> bool:
        while not self.blocks.extend(seq.id, len(seq.tokens)):
            victim = self._running[-1]
            self.preempt(victim)
            if victim is seq:
                return False
        return True

    def _begun_prompts(self, chunks: list[Chunk], budget: int) -> int:
        for seq in self._running:
            rest = len(seq.tokens) - seq.computed
            if rest > 1 and budget > 0:
                budget = self._take_chunk(chunks, seq, budget)
        return budget

    def _admit(self, chunks: list[Chunk], budget: int) -> None:
        while self._waiting and budget > 0 and len(self._running) < self.config.max_running:
            seq = self._waiting[0]
            # One spare block for each running sequence, so that the next few steps need not pre-empt again.
            cached = self.blocks.allocate(seq.id, seq.tokens, headroom=len(self._running))
            if cached is None:
                return
            if not self.config.chunked_prefill and len(seq.tokens) - cached > budget:
                self.blocks.release(seq.id)
                return
            if seq.cached_tokens < 0:
                seq.cached_tokens = cached
            self._waiting.popleft()
            self._running.append(seq)
            seq.to(Running(cached))
            budget = self._take_chunk(chunks, seq, budget)

    def _take_chunk(self, chunks: list[Chunk], seq: Sequence, budget: int) -> int:
        """Append the sequence's next tokens and return the budget left; 0 where an unchunked prompt must wait."""
        rest = len(seq.tokens) - seq.computed
        count = min(rest, budget)
        if count < rest and not self.config.chunked_prefill:
            return 0
        chunks.append(Chunk(seq, seq.computed, count))
        return budget - count
