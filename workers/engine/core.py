"""What happens to sequences around a forward pass. No threads, peers or model here; see `engine` for those."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from math import inf

from ...errors import InternalError, OperatorError
from ..kv.ledger import BlockRecord
from ..model.batch import Batch
from ..model.batch import Chunk as BatchChunk
from ..protocol import EngineOutput, EngineRequest, SamplingParams
from .blocks import BlockManager, ShrinkRefused
from .requests import check_request
from .sampler import Sampled, SampleRow
from .scheduler import Chunk, Scheduler, SchedulerConfig
from .sequence import Finished, Running, Sequence
from .stats import EngineStats

_GREEDY = SamplingParams(temperature=0.0)


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """What an engine is told.

    Parameters
    ----------
    scheduler : SchedulerConfig
    vocab_size : int
        Width of the logits; token ids are below it.
    eos_ids : tuple of int
        End-of-sequence ids.
    prefix_caching : bool
    idle_wait_s : float
        Longest sleep while nobody has work; then the members look whether all are still there.
    emulated_step_ms : float
        Least time of a forward pass, in milliseconds; what its computation does not take is slept. 0 emulates nothing.

    Raises
    ------
    OperatorError
        A value is out of its range.
    """

    scheduler: SchedulerConfig
    vocab_size: int
    eos_ids: tuple[int, ...] = ()
    prefix_caching: bool = True
    idle_wait_s: float = 1.0
    emulated_step_ms: float = 0.0

    def __post_init__(self) -> None:
        if any(not 0 <= token < self.vocab_size for token in self.eos_ids):
            raise OperatorError(f"engine: eos_ids: {self.eos_ids}; expected ids from 0 to {self.vocab_size - 1}")
        if self.idle_wait_s <= 0:
            raise OperatorError(f"engine: idle_wait_s: {self.idle_wait_s}; expected more than 0 seconds")
        if not 0 <= self.emulated_step_ms < inf:
            raise OperatorError(
                f"engine: emulated_step_ms: {self.emulated_step_ms}; expected a finite number of ms, 0 or more"
            )


@dataclass(frozen=True, slots=True)
class StepWork:
    """One step's tokens, the model's view of them, and what to sample, a row of logits for each chunk.

    That of a chunk that does not end its sequence only tells whether what was computed is finite.
    """

    chunks: list[Chunk]
    batch: Batch
    rows: list[SampleRow]


class EngineCore:
    """Sequences from submission to their last output.

    A step is `begin`, the forward pass and sampling, `finish`. Aborts and reservations may come between the two; blocks
    freed then are not handed out again before the step has ended, which may still write them.

    Attributes
    ----------
    freed_in_step : bool
        Whether a step has begun and not ended, and a sequence's blocks were freed since.
    """

    def __init__(self, config: EngineConfig, blocks: BlockManager) -> None:
        self.config = config
        self.freed_in_step = False
        self.scheduler = Scheduler(config.scheduler, blocks)
        self._in_step = False
        self._ended: list[EngineOutput] = []  # ended outside a step, not reported yet
        self._stats = EngineStats()

    @property
    def stats(self) -> EngineStats:
        """A copy of the counters."""
        self._stats.preemptions = self.scheduler.preemptions
        return self._stats.snapshot()

    def submit(self, request: EngineRequest, draw_seed: Callable[[], int]) -> None:
        """Check and queue a request; raises `RequestRefused`."""
        check_request(request, self.config.vocab_size)
        seed = draw_seed() if request.sampling.seed is None else request.sampling.seed
        self.scheduler.add(Sequence.from_request(request, seed, self.config.eos_ids))

    def abort(self, request_id: str) -> bool:
        """End a request and free its blocks now; False if there is none of that id."""
        seq = self.scheduler.abort(request_id)
        if seq is not None:
            self.freed_in_step = self._in_step
            self._note_end(seq, Finished("abort"))
        return seq is not None

    def begin(self) -> StepWork:
        """Choose the tokens of a step; there may be none."""
        self._in_step, self.freed_in_step = True, False
        chunks = self.scheduler.schedule()
        table = self.scheduler.blocks.table
        batch = Batch.of(
            [BatchChunk(c.seq.tokens[c.start : c.start + c.count], c.start, table(c.seq.id)) for c in chunks]
        )
        return StepWork(chunks, batch, [_sample_row(c.seq) if c.samples else _check_row(c.seq) for c in chunks])

    def finish(self, work: StepWork, sampled: list[Sampled], seconds: float) -> list[EngineOutput]:
        """Append the new tokens; outputs in the order of the rows, failed sequences first."""
        self._in_step = self.freed_in_step = False
        live = [
            (chunk, result)
            for chunk, result in zip(work.chunks, sampled, strict=True)
            if isinstance(chunk.seq.state, Running)
        ]
        # Before `complete`, so that the KV of a failed sequence does not enter the prefix cache.
        outputs = [self._fail(chunk) for chunk, result in live if result.token is None]
        self.scheduler.complete(work.chunks)
        for chunk, result in live:
            if result.token is not None and chunk.samples:
                outputs.append(self._append(chunk.seq, result.token, result))
        self._stats.count_step(seconds)
        return outputs

    def drain(self) -> list[EngineOutput]:
        """Outputs of sequences that ended outside a step since the last call."""
        ended, self._ended = self._ended, []
        return ended

    def resize(self, fresh: Iterable[int], target: int) -> list[int]:
        """Take in empty blocks, then part with blocks until ``target`` are left; those parted with.

        Free blocks go first, then cached ones, then those of the latest arrivals, who wait again. Sequences that could
        never fit are to go on at any other device. More than ``target`` are left only where that many are reserved.
        """
        blocks = self.scheduler.blocks
        blocks.add(fresh)
        self._end_misfits(target)
        self.scheduler.preempt_until(blocks.capacity - target)
        return self._part_with(target)

    def take_in(self, records: Collection[tuple[int, BlockRecord | None]]) -> None:
        """Take in blocks and what their ledger says: they are the last to go."""
        self.scheduler.blocks.adopt(records, noted=True)

    def give_up(self, target: int) -> list[int]:
        """Part with blocks that nobody uses until ``target`` are left, or all are in use; those parted with."""
        parted = self._part_with(target)
        self._end_misfits(self.scheduler.blocks.capacity)
        return parted

    def reserve(self, count: int) -> list[int]:
        """Up to ``count`` blocks that nobody uses, to be filled and given back; they are no one's till then.

        So many are left that every sequence here still fits. Not while `freed_in_step`.
        """
        blocks = self.scheduler.blocks
        longest = max((seq.kv_tokens_at_most for seq in self.scheduler.sequences), default=0)
        spare = blocks.capacity - blocks.reserved_blocks - blocks.blocks_for(longest)
        return blocks.reserve(max(0, min(count, spare)))

    def give_back(self, records: Collection[tuple[int, BlockRecord | None]]) -> None:
        """Take blocks of `reserve` in again, with what they hold now: they are the last to go."""
        self.scheduler.blocks.adopt(records)

    def worth_adopting(self, used: int, unused: int, target: int) -> int:
        """How many of another device's blocks to take into a cache of ``target``, those that sequences use first.

        Of the others all if there is room, else so many that of them and of what is cached here the same part stays.
        """
        blocks = self.scheduler.blocks
        room = max(0, target - blocks.used_blocks)
        taken = min(used, room)
        room -= taken
        both = unused + blocks.cached_blocks
        return taken + (unused if both <= room else room * unused // both)

    def retire(self) -> None:
        """Write nothing to the ledger from here on, since the KV passes to others; sequences stay."""
        self.scheduler.blocks.detach()

    def hand_over(self, moved_to: str, *, running: bool) -> list[EngineOutput]:
        """End sequences, to be continued elsewhere; all outputs that have not been reported.

        With ``running`` those stay that wait and would find here what no sequence uses.
        """
        for seq in self.scheduler.sequences:
            if running and not isinstance(seq.state, Running) and self.scheduler.blocks.finds_unused(seq.tokens):
                continue
            end = Finished("moved")
            self.scheduler.finish(seq, end)
            self._note_end(seq, end, moved_to)
        return self.drain()

    def _part_with(self, target: int) -> list[int]:
        blocks = self.scheduler.blocks
        parted = blocks.give_up(max(0, min(blocks.capacity - target, blocks.available)))
        if isinstance(parted, ShrinkRefused):
            raise InternalError(f"no {parted.asked} KV blocks can be left while {parted.used} are in use")
        return parted

    def _end_misfits(self, capacity: int) -> None:
        for seq in self.scheduler.misfits(capacity):
            end = Finished("moved")
            self.scheduler.finish(seq, end)
            self._note_end(seq, end)

    def _note_end(self, seq: Sequence, end: Finished, moved_to: str = "") -> None:
        """Report, with the next outputs, a sequence that has ended outside a step."""
        self._stats.ended += 1
        self._ended.append(EngineOutput(seq.id, (), end.reason, error=end.error, moved_to=moved_to))

    def _fail(self, chunk: Chunk) -> EngineOutput:
        seq = chunk.seq
        error = f"the model returned logits that are not finite at position {chunk.start + chunk.count}"
        self.scheduler.finish(seq, Finished("error", error), spoiled=True)
        self._stats.ended += 1
        return EngineOutput(seq.id, (), "error", error=error)

    def _append(self, seq: Sequence, token: int, result: Sampled) -> EngineOutput:
        if seq.generated == 0:
            self._stats.prompt_tokens += seq.prompt_len
            self._stats.cached_tokens += seq.cached_tokens
        seq.tokens.append(token)
        self._stats.generated_tokens += 1
        end = self._end_of(seq, token)
        if end is not None:
            self.scheduler.finish(seq, end)
            self._stats.ended += 1
        logprobs = () if result.logprob is None else (result.logprob,)
        reason = None if end is None else end.reason
        return EngineOutput(seq.id, (token,), reason, logprobs, seq.cached_tokens)

    def _end_of(self, seq: Sequence, token: int) -> Finished | None:
        if token in seq.stop_ids:
            return Finished("stop")
        if seq.generated >= seq.sampling.max_tokens or len(seq.tokens) >= self.config.scheduler.max_model_len:
            return Finished("length")
        return None


def _check_row(seq: Sequence) -> SampleRow:
    """Only whether the logits are finite."""
    return SampleRow(_GREEDY, seq.seed, len(seq.tokens), seq.generated)


def _sample_row(seq: Sequence) -> SampleRow:
    return SampleRow(seq.sampling, seq.seed, len(seq.tokens), seq.generated, seq.stop_ids)
