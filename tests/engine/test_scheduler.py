"""Scheduler: every accepted request ends, budgets hold, schedules do not change results (invariants G4 to G6)."""

from __future__ import annotations

import pytest
from concertina.errors import InternalError, OperatorError
from concertina.workers.engine.blocks import BlockManager
from concertina.workers.engine.errors import CacheTooSmall, InvalidRequest, NeverFits, QueueFull, RequestRefused
from concertina.workers.engine.scheduler import Chunk, Scheduler, SchedulerConfig
from concertina.workers.engine.sequence import Finished, Running, Sequence, Waiting
from concertina.workers.protocol import SamplingParams
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

SIZE = 2


def sequence(name: str, prompt: list[int], max_tokens: int) -> Sequence:
    return Sequence(name, list(prompt), len(prompt), SamplingParams(max_tokens=max_tokens))


def follow(prefix: tuple[int, ...]) -> int:
    """The toy model: the next token is a function of all tokens before it."""
    return sum((i + 1) * t for i, t in enumerate(prefix)) % 3


class Machine(RuleBasedStateMachine):
    """Submissions, aborts and steps in any order, on a toy model that reads its prefix from the blocks."""

    @initialize(
        capacity=st.integers(1, 10),
        budget=st.integers(1, 8),
        running=st.integers(1, 4),
        waiting=st.integers(0, 4),
        chunked=st.booleans(),
        caching=st.booleans(),
    )
    def start(self, capacity: int, budget: int, running: int, waiting: int, chunked: bool, caching: bool) -> None:
        self.config = SchedulerConfig(16, budget, running, waiting, chunked)
        self.scheduler = Scheduler(self.config, BlockManager(range(capacity), SIZE, caching))
        self.memory: dict[tuple[int, int], int] = {}
        self.live: dict[str, Sequence] = {}
        self.count = 0
        self.finished: list[Sequence] = []

    @rule(
        prompt=st.lists(st.integers(0, 2), min_size=1, max_size=18),
        max_tokens=st.integers(1, 8),
        resumed=st.booleans(),
        admitted=st.booleans(),
    )
    def submit(self, prompt: list[int], max_tokens: int, resumed: bool, admitted: bool) -> None:
        seq = sequence(f"r{self.count}", prompt, max_tokens)
        seq.resumed, seq.admitted = resumed, admitted
        self.count += 1
        total = len(prompt) + max_tokens
        try:
            self.scheduler.add(seq)
        except NeverFits:
            assert total > 16 or -(-(total - 1) // SIZE) > self.scheduler.blocks.capacity
        except QueueFull:
            assert not resumed
            assert not admitted
            assert len(self.live) >= self.config.max_running + self.config.max_waiting
        else:
            assert total <= 16
            self.live[seq.id] = seq

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.live)))
        assert self.scheduler.abort(name) is self.live[name]
        assert self.live.pop(name).state == Finished("abort")
        assert name not in self.scheduler.blocks.tables()
        assert self.scheduler.abort(name) is None

    @rule()
    def failed_step(self) -> None:
        """A forward pass that raises: scheduled, never completed."""
        self.scheduler.schedule()

    @rule(data=st.data())
    def step_with_abort(self, data: st.DataObject) -> None:
        """A client that leaves during the forward pass."""
        self.step(abort=data.draw(st.sampled_from([*sorted(self.live), ""])))

    @rule()
    def step(self, abort: str = "") -> None:
        chunks = self.scheduler.schedule()
        self.check(chunks)
        sampled = [(chunk.seq, self.run(chunk)) for chunk in chunks if chunk.samples]
        written = [chunk for chunk in chunks if not chunk.samples]
        for chunk in written:
            self.run(chunk)
        if abort:
            self.scheduler.abort(abort)
            del self.live[abort]
        self.scheduler.complete(chunks)
        for seq, token in sampled:
            if isinstance(seq.state, Running):
                seq.tokens.append(token)
                if seq.generated == seq.sampling.max_tokens:
                    self.scheduler.finish(seq, Finished("length"))
                    del self.live[seq.id]
                    self.finished.append(seq)

    def check(self, chunks: list[Chunk]) -> None:
        assert sum(chunk.count for chunk in chunks) <= self.config.step_budget
        assert all(chunk.count >= 1 for chunk in chunks)
        assert len({chunk.seq.id for chunk in chunks}) == len(chunks)
        assert bool(chunks) == bool(self.live), "somebody must go on in every step"
        assert not chunks or self.scheduler.sequences[0] in [chunk.seq for chunk in chunks]
        if not self.config.chunked_prefill:
            assert all(chunk.samples for chunk in chunks)

    def run(self, chunk: Chunk) -> int:
        table = self.scheduler.blocks.table(chunk.seq.id)
        end = chunk.start + chunk.count
        for position in range(chunk.start, end):
            self.memory[table[position // SIZE], position % SIZE] = chunk.seq.tokens[position]
        prefix = tuple(self.memory[table[p // SIZE], p % SIZE] for p in range(end))
        assert list(prefix) == chunk.seq.tokens[:end]
        return follow(prefix)

    @invariant()
    def consistent(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        assert {seq.id for seq in self.scheduler.sequences} == set(self.live)
        waiting = [seq for seq in self.scheduler.sequences if isinstance(seq.state, Waiting)]
        assert [seq.begun for seq in waiting] == sorted((seq.begun for seq in waiting), reverse=True)
        fresh = [seq.arrival for seq in waiting if not seq.begun]
        assert fresh == sorted(fresh)
        load = self.scheduler.load
        assert load.running <= self.config.max_running
        assert load.waiting + load.running == len(self.live)
        holding = {seq.id for seq in self.live.values() if isinstance(seq.state, Running)}
        assert set(self.scheduler.blocks.tables()) == holding
        assert load.kv_blocks_used <= load.kv_blocks
        assert self.scheduler.has_work == bool(self.live)

    def teardown(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        steps = 0
        while self.live:
            self.step()
            steps += 1
            assert steps < 1000, "a request does not end"
        assert self.scheduler.blocks.used_blocks == 0
        for seq in self.finished:  # as if it had run alone
            tokens = seq.tokens[: seq.prompt_len]
            while len(tokens) < len(seq.tokens):
                tokens.append(follow(tuple(tokens)))
            assert seq.tokens == tokens


Machine.TestCase.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
TestScheduler = Machine.TestCase


def scheduler(capacity: int = 8, caching: bool = False, **limits: int | bool) -> Scheduler:
    config = SchedulerConfig(**{"max_model_len": 100, **limits})  # type: ignore[arg-type]
    return Scheduler(config, BlockManager(range(capacity), SIZE, caching))


def advance(s: Scheduler) -> list[tuple[str, int, int]]:
    """One step in which every sequence that reaches its end gets a 0; the chunks as (id, start, count)."""
    chunks = s.schedule()
    s.complete(chunks)
    ran = [(c.seq.id, c.start, c.count) for c in chunks]
    for chunk in chunks:
        if chunk.samples:
            chunk.seq.tokens.append(0)
    return ran


def test_decodes_come_first_and_prompts_share_the_rest_of_the_budget() -> None:
    s = scheduler(20, max_batched_tokens=4)
    s.add(sequence("a", [1, 1], 5))
    assert advance(s) == [("a", 0, 2)]
    s.add(sequence("b", [1] * 5, 5))
    s.add(sequence("c", [1] * 3, 5))
    assert advance(s) == [("a", 2, 1), ("b", 0, 3)]
    assert advance(s) == [("a", 3, 1), ("b", 3, 2), ("c", 0, 1)]


def test_without_chunks_a_prompt_waits_until_it_fits() -> None:
    s = scheduler(20, max_model_len=6, max_batched_tokens=4, chunked_prefill=False)
    assert s.config.step_budget == 6
    s.add(sequence("a", [1, 1], 4))
    assert advance(s) == [("a", 0, 2)]
    s.add(sequence("b", [1] * 5, 1))
    s.add(sequence("c", [1] * 3, 1))
    assert advance(s) == [("a", 2, 1), ("b", 0, 5)]
    s.abort("b")
    assert advance(s) == [("a", 3, 1), ("c", 0, 3)]


def test_the_latest_arrival_is_preempted_and_keeps_its_tokens() -> None:
    s = scheduler(4, max_batched_tokens=16)
    a, b = sequence("a", [1, 1, 1], 5), sequence("b", [2, 2, 2], 5)
    s.add(a)
    s.add(b)
    assert advance(s) == [("a", 0, 3)]  # no spare block for "a" beside "b" yet
    s = scheduler(5, max_batched_tokens=16)
    a, b = sequence("a", [1, 1, 1], 6), sequence("b", [2, 2, 2], 6)
    s.add(a)
    s.add(b)
    assert advance(s) == [("a", 0, 3), ("b", 0, 3)]
    assert advance(s) == [("a", 3, 1), ("b", 3, 1)]
    assert advance(s) == [("a", 4, 1)]
    assert b.state == Waiting(preempted=True)
    assert b.tokens == [2, 2, 2, 0, 0]
    assert s.preemptions == 1
    assert advance(s) == [("a", 5, 1)]
    s.abort("a")
    assert advance(s) == [("b", 0, 5)]


def test_a_preempted_sequence_finds_its_own_blocks_again() -> None:
    s = scheduler(9, caching=True, max_batched_tokens=16)
    a = sequence("a", [1, 2, 3, 4, 5], 5)
    s.add(a)
    advance(s)
    s.preempt_until(9)
    assert advance(s) == [("a", 5, 1)]
    assert a.cached_tokens == 0, "the prompt was not cached when the request came"


def test_a_prompt_preempted_between_its_chunks_goes_on_where_it_was() -> None:
    s = scheduler(9, caching=True, max_batched_tokens=4)
    s.add(sequence("a", list(range(10)), 3))
    assert [advance(s), advance(s)] == [[("a", 0, 4)], [("a", 4, 4)]]
    s.preempt_until(9)
    assert advance(s) == [("a", 8, 2)]


def test_what_another_worker_had_begun_is_not_refused_and_comes_before_newcomers() -> None:
    s = scheduler(20, max_running=1, max_waiting=1)
    s.add(sequence("a", [1], 2))
    advance(s)
    s.add(sequence("b", [1], 2))
    for name in "cd":
        seq = sequence(name, [1], 2)
        seq.resumed = True
        s.add(seq)
    assert [seq.id for seq in s.sequences] == ["a", "c", "d", "b"]
    s.preempt_until(20)
    assert [seq.id for seq in s.sequences] == ["a", "c", "d", "b"]


def test_refusals_name_the_limit() -> None:
    s = scheduler(3, max_model_len=10, max_running=1, max_waiting=1)
    with pytest.raises(NeverFits, match="8 prompt tokens and max_tokens 3 exceed the context of 10"):
        s.add(sequence("a", [1] * 8, 3))
    with pytest.raises(CacheTooSmall, match="need 4 KV blocks of 2 tokens; the whole cache has 3"):
        s.add(sequence("a", [1] * 5, 3))
    s.add(sequence("a", [1] * 5, 2))
    with pytest.raises(InvalidRequest, match="'a' belongs to a request that has not ended"):
        s.add(sequence("a", [1], 1))
    s.add(sequence("b", [1], 1))
    with pytest.raises(QueueFull, match="2 requests are here"):
        s.add(sequence("c", [1], 1))
    assert issubclass(QueueFull, RequestRefused)
    assert [seq.id for seq in s.sequences] == ["a", "b"]


@pytest.mark.parametrize("field", ["max_model_len", "max_batched_tokens", "max_running"])
def test_limits_below_one_are_refused(field: str) -> None:
    with pytest.raises(OperatorError, match=f"{field}: 0; expected at least 1"):
        SchedulerConfig(**{"max_model_len": 8, field: 0})


def test_an_illegal_transition_changes_nothing() -> None:
    seq = sequence("a", [1], 1)
    seq.to(Running(0))
    with pytest.raises(InternalError, match="cannot become"):
        seq.to(Running(1))
    assert seq.state == Running(0)
    seq.to(Finished("stop"))
    for state in (Waiting(), Running(0), Finished("length")):
        with pytest.raises(InternalError):
            seq.to(state)
