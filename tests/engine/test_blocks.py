"""Blocks: each in exactly one place, prefixes never mixed up, sizes change at run time (invariants G1 to G3)."""

from __future__ import annotations

from collections import Counter

import pytest
from concertina.errors import InternalError
from concertina.workers.engine.blocks import BlockManager, ShrinkRefused
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

SIZE = 3
tokens_lists = st.lists(st.integers(0, 1), min_size=1, max_size=20)


class Blocks(RuleBasedStateMachine):
    """Sequences come, are computed, grow and go, while a model of the memory records what each block holds."""

    @initialize(capacity=st.integers(1, 12), caching=st.booleans())
    def start(self, capacity: int, caching: bool) -> None:
        self.blocks = BlockManager(capacity, SIZE, caching)
        self.caching = caching
        self.tokens: dict[str, list[int]] = {}
        self.memory: dict[int, tuple[int, ...]] = {}  # block -> the whole prefix up to its end
        self.count = 0
        self.recorded: dict[str, int] = {}  # leading blocks of a sequence that may be hit

    def write(self, key: str, computed: int) -> None:
        tokens = self.tokens[key]
        for i, block in enumerate(self.blocks.table(key)):
            if (i + 1) * SIZE <= computed:
                self.memory[block] = tuple(tokens[: (i + 1) * SIZE])
        self.blocks.record(key, tokens, computed)
        if self.caching:
            self.recorded[key] = max(self.recorded[key], computed // SIZE)

    @rule(tokens=tokens_lists, headroom=st.integers(0, 2))
    def allocate(self, tokens: list[int], headroom: int) -> None:
        key = f"s{self.count}"
        self.count += 1
        before = (self.blocks.used_blocks, self.blocks.cached_blocks, self.blocks.free_blocks)
        cached = self.blocks.allocate(key, tokens, headroom)
        if cached is None:
            assert key not in self.blocks.tables()
            assert before == (self.blocks.used_blocks, self.blocks.cached_blocks, self.blocks.free_blocks)
            assert self.blocks.blocks_for(len(tokens)) + headroom > before[1] + before[2]
            return
        assert cached < len(tokens)
        assert self.caching or cached == 0
        self.tokens[key] = list(tokens)
        table = self.blocks.table(key)
        assert len(table) == self.blocks.blocks_for(len(tokens))
        for i in range(cached // SIZE):  # what a hit promises is really there
            assert self.memory[table[i]] == tuple(tokens[: (i + 1) * SIZE])
        self.recorded[key] = cached // SIZE
        shared = Counter(block for other in self.blocks.tables().values() for block in other)
        assert all(shared[block] == 1 for block in table[cached // SIZE :]), "a block to be written is shared"

    @precondition(lambda self: self.tokens)
    @rule(data=st.data(), more=st.lists(st.integers(0, 1), max_size=5))
    def extend(self, data: st.DataObject, more: list[int]) -> None:
        key = data.draw(st.sampled_from(sorted(self.tokens)))
        length = len(self.tokens[key]) + len(more)
        table = list(self.blocks.table(key))
        if self.blocks.extend(key, length):
            self.tokens[key] += more
            assert self.blocks.table(key)[: len(table)] == table
            assert len(self.blocks.table(key)) == self.blocks.blocks_for(length)
        else:
            assert self.blocks.table(key) == table
            assert self.blocks.blocks_for(length) - len(table) > self.blocks.available

    @precondition(lambda self: self.tokens)
    @rule(data=st.data())
    def compute(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.tokens)))
        self.write(key, data.draw(st.integers(0, len(self.tokens[key]))))

    @precondition(lambda self: self.tokens)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.tokens)))
        table = list(self.blocks.table(key))
        self.blocks.release(key)
        del self.tokens[key]
        for block in table[self.recorded[key] :]:
            self.memory[block] = (-1,)  # never recorded: must not be hit

    @rule(extra=st.integers(0, 4))
    def grow(self, extra: int) -> None:
        self.blocks.grow(self.blocks.capacity + extra)

    @rule(data=st.data())
    def shrink(self, data: st.DataObject) -> None:
        capacity = data.draw(st.integers(0, self.blocks.capacity))
        used, before = self.blocks.used_blocks, self.blocks.tables()
        moves = self.blocks.shrink(capacity)
        if isinstance(moves, ShrinkRefused):
            assert used > capacity
            assert moves == ShrinkRefused(capacity, used)
            assert before == self.blocks.tables()
            return
        assert not {source for source, _ in moves} & {destination for _, destination in moves}
        for source, destination in moves:
            self.memory[destination] = self.memory.get(source, ())
        assert self.blocks.capacity == capacity

    @invariant()
    def adds_up(self) -> None:
        if not hasattr(self, "blocks"):
            return
        used = {block for table in self.blocks.tables().values() for block in table}
        assert all(len(set(table)) == len(table) for table in self.blocks.tables().values())
        assert used <= set(range(self.blocks.capacity))
        assert self.blocks.used_blocks == len(used)
        places = self.blocks.used_blocks + self.blocks.cached_blocks + self.blocks.free_blocks
        assert places == self.blocks.capacity

    def teardown(self) -> None:
        for key in list(self.tokens):
            self.blocks.release(key)
        assert self.blocks.available == self.blocks.capacity


Blocks.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestBlocks = Blocks.TestCase


def computed(blocks: BlockManager, key: str, tokens: list[int]) -> None:
    assert blocks.allocate(key, tokens) is not None
    blocks.record(key, tokens, len(tokens))


def test_a_prefix_is_shared_and_one_token_is_left_to_compute() -> None:
    blocks = BlockManager(10, SIZE)
    computed(blocks, "a", [1, 2, 3, 4, 5, 6])
    assert blocks.allocate("b", [1, 2, 3, 4, 5, 6]) == 3
    assert blocks.allocate("c", [1, 2, 3, 4, 5, 6, 7]) == 6
    assert blocks.table("c")[:2] == blocks.table("a")


def test_equal_blocks_after_different_prefixes_are_not_mixed_up() -> None:
    blocks = BlockManager(10, SIZE)
    computed(blocks, "a", [1, 1, 1, 2, 2, 2])
    assert blocks.allocate("b", [2, 2, 2, 9]) == 0
    assert blocks.allocate("c", [3, 3, 3, 2, 2, 2, 9]) == 0


def test_colliding_hashes_do_not_mix_up_prefixes() -> None:
    # CPython: hash(-1) == hash(-2), hence also for the tuples that hold them.
    assert hash((-1, -1, -1)) == hash((-2, -2, -2))
    blocks = BlockManager(10, SIZE)
    computed(blocks, "a", [-1, -1, -1, 5])
    assert blocks.allocate("b", [-2, -2, -2, 5]) == 0


def test_the_least_recently_used_prefix_is_evicted_and_its_end_first() -> None:
    blocks = BlockManager(4, SIZE)
    computed(blocks, "old", [1] * 6)
    computed(blocks, "new", [2] * 6)
    blocks.release("old")
    blocks.release("new")
    assert blocks.allocate("x", [7, 7, 7]) == 0  # evicts the end of "old"
    assert blocks.allocate("n", [2] * 7) == 6  # evicts its beginning
    blocks.release("x")
    assert blocks.allocate("o", [1] * 4) is None  # "n" holds three of four
    blocks.release("n")
    assert blocks.allocate("o", [1] * 4) == 0


def test_shrinking_moves_used_blocks_and_keeps_hits() -> None:
    blocks = BlockManager(6, SIZE)
    computed(blocks, "first", [8] * 9)
    computed(blocks, "a", [1, 2, 3, 4])
    blocks.release("first")
    assert blocks.shrink(1) == ShrinkRefused(1, 2)
    moves = blocks.shrink(3)
    assert not isinstance(moves, ShrinkRefused)
    assert sorted(source for source, _ in moves) == [3, 4]
    assert set(blocks.table("a")) <= {0, 1, 2}
    assert blocks.allocate("b", [1, 2, 3, 5]) == 3
    assert blocks.table("b")[0] == blocks.table("a")[0]


def test_misuse_is_an_internal_error() -> None:
    blocks = BlockManager(2, SIZE)
    blocks.allocate("a", [1])
    with pytest.raises(InternalError, match="already has KV blocks"):
        blocks.allocate("a", [1])
    with pytest.raises(InternalError, match="grow to 1"):
        blocks.grow(1)
    with pytest.raises(InternalError, match="shrink to 3"):
        blocks.shrink(3)
    with pytest.raises(InternalError, match="of 0 tokens"):
        BlockManager(1, 0)
