"""What happens to sequences around a forward pass. No threads, peers or model here; see `engine` for those."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ...errors import InternalError, OperatorError
from ..model.batch import Batch
from ..model.batch import Chunk as BatchChunk
from ..protocol import EngineOutput, EngineRequest
from .blocks import BlockManager
from .requests import check_request
from .sampler import Sampled, SampleRow
from .scheduler import Chunk, Scheduler, SchedulerConfig
from .sequence import Finished, Running, Sequence
from .stats import EngineStats


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
    """

    scheduler: SchedulerConfig
    vocab_size: int
    eos_ids: tuple[int, ...] = ()
    prefix_caching: bool = True
    idle_wait_s: float = 1.0

    def __post_init__(self) -> None:
        if any(not 0 <= token < self.vocab_size for token in self.eos_ids):
            raise OperatorError(f"engine: eos_ids: {self.eos_ids}; expected ids from 0 to {self.vocab_size - 1}")
        if self.idle_wait_s <= 0:
            raise OperatorError(f"engine: idle_wait_s: {self.idle_wait_s}; expected more than 0 seconds")


@dataclass(frozen=True, slots=True)
class StepWork:
    """One step's tokens, the model's view of them, and the sequences to sample, a row of logits each."""

    chunks: list[Chunk]
    batch: Batch
    sampling: list[Sequence]
    rows: list[SampleRow]


class EngineCore:
    """Sequences from submission to their last output.

    A step is `begin`, the forward pass and sampling, `finish`. Aborts may come between the two; blocks freed then are
    not handed out again before the next `begin`.
    """

    def __init__(self, config: EngineConfig, capacity: int, block_tokens: int) -> None:
        self.config = config
        self.scheduler = Scheduler(config.scheduler, BlockManager(capacity, block_tokens, config.prefix_caching))
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
            self._end_outside_step(seq, Finished("abort"))
        return seq is not None

    def begin(self) -> StepWork:
        """Choose the tokens of a step; there may be none."""
        chunks = self.scheduler.schedule()
        table = self.scheduler.blocks.table
        batch = Batch.of(
            [BatchChunk(c.seq.tokens[c.start : c.start + c.count], c.start, table(c.seq.id), c.samples) for c in chunks]
        )
        sampling = [chunk.seq for chunk in chunks if chunk.samples]
        return StepWork(chunks, batch, sampling, [_sample_row(seq) for seq in sampling])

    def finish(self, work: StepWork, sampled: list[Sampled], seconds: float) -> list[EngineOutput]:
        """Append the new tokens; outputs in the order of the rows, failed sequences first."""
        live = [
            (seq, result) for seq, result in zip(work.sampling, sampled, strict=True) if isinstance(seq.state, Running)
        ]
        # Before `complete`, so that the KV of a failed sequence does not enter the prefix cache.
        outputs = [self._fail(seq) for seq, result in live if result.token is None]
        self.scheduler.complete(work.chunks)
        outputs += [self._append(seq, result.token, result) for seq, result in live if result.token is not None]
        self._stats.count_step(seconds)
        return outputs

    def drain(self) -> list[EngineOutput]:
        """Outputs of sequences that ended outside a step since the last call."""
        ended, self._ended = self._ended, []
        return ended

    def replace_kv(self, capacity: int, block_tokens: int, keep: bool) -> None:
        """Go over to another KV cache.

        With ``keep`` the blocks hold what they held and there may only be more of them. Otherwise everything is
        computed again. Sequences that can never fit the new cache end with an error.

        Raises
        ------
        InternalError
            ``keep`` with fewer or other blocks; nothing has changed.
        """
        blocks = self.scheduler.blocks
        if keep:
            if capacity < blocks.capacity or block_tokens != blocks.block_tokens:
                raise InternalError(
                    f"KV cannot be kept: {capacity} blocks of {block_tokens} tokens instead of "
                    f"{blocks.capacity} of {blocks.block_tokens}"
                )
            blocks.grow(capacity)
            return
        self.scheduler.preempt_all()
        self.scheduler.blocks = BlockManager(capacity, block_tokens, self.config.prefix_caching)
        for seq in self.scheduler.misfits():
            end = Finished("error", f"its KV no longer fits: the cache has shrunk to {capacity} blocks")
            self.scheduler.finish(seq, end)
            self._end_outside_step(seq, end)

    def _end_outside_step(self, seq: Sequence, end: Finished) -> None:
        self._stats.ended += 1
        self._ended.append(EngineOutput(seq.id, (), end.reason, error=end.error))

    def _fail(self, seq: Sequence) -> EngineOutput:
        error = f"the model returned logits that are not finite at position {len(seq.tokens)}"
        self.scheduler.finish(seq, Finished("error", error))
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


def _sample_row(seq: Sequence) -> SampleRow:
    return SampleRow(seq.sampling, seq.seed, len(seq.tokens), seq.generated, seq.stop_ids)
