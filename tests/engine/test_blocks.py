"""Blocks: each in exactly one place, prefixes never mixed up, and the ledger never lies (G1 to G3, G9, G10)."""

from __future__ import annotations

from functools import cache

import pytest
from concertina.errors import InternalError
from concertina.workers.engine.blocks import BlockManager, ShrinkRefused
from concertina.workers.engine.notes import Notes
from concertina.workers.kv.ledger import ROOT, BlockRecord, chain
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from .fakes import Stores

SIZE = 3
MOST = 16  # block numbers are below
tokens_lists = st.lists(st.integers(0, 1), min_size=1, max_size=20)
numbers = st.sets(st.integers(0, MOST - 1))
Tokens = tuple[int, ...]


@cache
def digest(prefix: Tokens) -> bytes:
    return ROOT if not prefix else chain(digest(prefix[:-SIZE]), prefix[-SIZE:])


def page_of(block: int) -> int:
    return MOST - 1 - block


class Blocks(RuleBasedStateMachine):
    """Sequences come, are computed, grow and go, while a model of the memory knows what each place holds.

    A place holds KV that depends on all tokens up to it. After every single store into the ledger, all its records are
    held against that.
    """

    @initialize(blocks=numbers, caching=st.booleans())
    def start(self, blocks: set[int], caching: bool) -> None:
        self.memory: dict[tuple[int, int], Tokens] = {}  # (block, place in it) -> all tokens up to there
        self.caching = caching
        self.stores = Stores(MOST, SIZE)
        self.stores.after_each = self.ledger_is_true
        self.begin(blocks)
        self.count = 0

    def begin(self, blocks: set[int]) -> None:
        self.blocks = BlockManager(blocks, SIZE, self.caching, Notes(self.stores.ledger(), page_of))
        self.here = set(blocks)
        self.reserved: set[int] = set()
        self.tokens: dict[str, list[int]] = {}
        self.written: dict[str, int] = {}

    def ledger_is_true(self) -> None:
        ledger = self.stores.ledger(watched=False)
        for block in range(MOST):
            record = ledger.read(page_of(block))
            for place, _ in enumerate(record.tokens if record else ()):
                assert record is not None
                held = self.memory[block, place]
                assert held[-1 - place :] == record.tokens[: place + 1]
                assert digest(held[: -1 - place]) == record.prefix

    def put(self, key: str, position: int, held: Tokens) -> None:
        self.memory[self.blocks.table(key)[position // SIZE], position % SIZE] = held
        self.ledger_is_true()

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
        table = self.blocks.table(key)
        assert len(table) == self.blocks.blocks_for(len(tokens))
        for i in range(cached):  # what a hit promises is really there
            assert self.memory[table[i // SIZE], i % SIZE] == tuple(tokens[: i + 1])
        others = {block for name, other in self.blocks.tables().items() if name != key for block in other}
        assert not others & set(table[cached // SIZE :]), "a block to be written is shared"
        self.tokens[key] = list(tokens)
        self.written[key] = cached

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
    @rule(data=st.data(), fails=st.booleans())
    def compute(self, data: st.DataObject, fails: bool) -> None:
        """A forward pass over some tokens; if it ``fails``, it leaves anything and is not recorded."""
        key = data.draw(st.sampled_from(sorted(self.tokens)))
        computed = data.draw(st.integers(self.written[key], len(self.tokens[key])))
        for i in range(self.written[key], computed):
            self.put(key, i, (-1,) if fails else tuple(self.tokens[key][: i + 1]))
        if not fails:
            self.blocks.record(key, self.tokens[key], computed)
            self.written[key] = computed

    @precondition(lambda self: self.tokens)
    @rule(data=st.data(), spoiled=st.booleans())
    def release(self, data: st.DataObject, spoiled: bool) -> None:
        """What was recorded is found again, unless it has been evicted or was spoiled."""
        key = data.draw(st.sampled_from(sorted(self.tokens)))
        self.blocks.release(key, spoiled)
        tokens, written = self.tokens.pop(key), self.written.pop(key)
        if self.caching and not spoiled and self.blocks.available >= self.blocks.blocks_for(len(tokens) + 1):
            found = self.blocks.allocate("again", [*tokens[:written], 2])
            assert found == written
            self.blocks.release("again")

    @rule(blocks=numbers)
    def add(self, blocks: set[int]) -> None:
        fresh = blocks - self.here
        for block in fresh:  # whatever its pages were before
            self.memory.update({(block, place): (-2,) for place in range(SIZE)})
        self.blocks.add(sorted(fresh))
        self.here |= fresh

    @rule(blocks=numbers, tokens=tokens_lists, noted=st.booleans())
    def adopt(self, blocks: set[int], tokens: list[int], noted: bool) -> None:
        """New blocks, and those reserved before, with what another device had of a sequence, and perhaps wrote down."""
        records: list[tuple[int, BlockRecord | None]] = []
        for i, block in enumerate(sorted(blocks - self.here | self.reserved)):
            held = tuple(tokens[i * SIZE : (i + 1) * SIZE])
            for place in range(len(held)):
                self.memory[block, place] = tuple(tokens[: i * SIZE + place + 1])
            records.append((block, BlockRecord(digest(tuple(tokens[: i * SIZE])), held, True, i) if held else None))
        for block, record in records:
            if noted and record is not None:
                self.stores.ledger().begin(page_of(block), record)
        self.blocks.adopt(records, noted=noted)
        self.here |= blocks
        self.reserved.clear()

    @rule(blocks=st.lists(st.integers(0, MOST - 1), unique=True))
    def keep(self, blocks: list[int]) -> None:
        before, cached = list(self.blocks._kept), {*self.blocks._idle, *self.blocks._kept}
        self.blocks.keep(blocks)
        assert list(self.blocks._kept) == [block for block in blocks if block in cached]
        again = [block for block in reversed(before) if block not in blocks]
        assert list(self.blocks._idle)[len(self.blocks._idle) - len(again) :] == again

    @rule(count=st.integers(0, 3))
    def reserve(self, count: int) -> None:
        kept, reservable = set(self.blocks._kept), self.blocks.unused_besides(())
        assert len(kept) + reservable == self.blocks.available
        got = self.blocks.reserve(count)
        assert len(got) == min(count, reservable)
        assert not kept & set(got)
        self.reserved |= set(got)
        self.memory.update({(block, 0): (-3,) for block in got})
        self.ledger_is_true()

    @rule(data=st.data())
    def give_up(self, data: st.DataObject) -> None:
        count = data.draw(st.integers(0, self.blocks.capacity))
        used, available, before = self.blocks.used_blocks, self.blocks.available, self.blocks.tables()
        kept = list(self.blocks._kept)
        given = self.blocks.give_up(count)
        assert before == self.blocks.tables()
        if isinstance(given, ShrinkRefused):
            assert count > available
            assert given == ShrinkRefused(len(self.here) - count, used)
            return
        assert len(set(given)) == len(given) == count
        assert set(given) <= self.here - self.reserved
        spare = available - len(kept)
        assert [block for block in given if block in kept] == kept[::-1][: max(0, count - spare)]
        self.here -= set(given)
        self.memory.update({(block, place): (-4,) for block in given for place in range(SIZE)})
        self.ledger_is_true()

    @rule()
    def restart(self) -> None:
        """The worker is killed; another one reads the ledger and finds what was recorded, and nothing else."""
        sequences = [(self.tokens[key], self.written[key]) for key in self.tokens]
        self.begin(self.here)
        if self.caching and sequences:
            tokens, written = sequences[0]
            if self.blocks.available >= self.blocks.blocks_for(written + 1):
                assert self.blocks.allocate("again", [*tokens[:written], 2]) == written
                self.blocks.release("again")

    @invariant()
    def adds_up(self) -> None:
        if not hasattr(self, "blocks"):
            return
        tables = self.blocks.tables().values()
        used = {block for table in tables for block in table} | self.reserved
        assert all(len(set(table)) == len(table) for table in tables)
        assert used <= self.here
        assert self.blocks.used_blocks == len(used)
        assert self.blocks.capacity == len(self.here)
        places = self.blocks.used_blocks + self.blocks.cached_blocks + self.blocks.free_blocks
        assert places == self.blocks.capacity

    @invariant()
    def the_ledger_says_who_is_used(self) -> None:
        """And every cached block is in it, and no free one."""
        if not hasattr(self, "blocks"):
            return
        self.ledger_is_true()
        ledger = self.stores.ledger(watched=False)
        records = {block: record for block in range(MOST) if (record := ledger.read(page_of(block)))}
        in_tables = {block for table in self.blocks.tables().values() for block in table}
        assert {block for block, record in records.items() if record.used} <= in_tables
        idle = {block for block, record in records.items() if not record.used}
        assert len(idle) == self.blocks.cached_blocks
        assert idle <= self.here - in_tables - self.reserved

    def teardown(self) -> None:
        if hasattr(self, "blocks"):
            for key in list(self.tokens):
                self.blocks.release(key)
            self.blocks.adopt([(block, None) for block in self.reserved])
            assert self.blocks.available == self.blocks.capacity


Blocks.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
TestBlocks = Blocks.TestCase


def computed(blocks: BlockManager, key: str, tokens: list[int]) -> None:
    assert blocks.allocate(key, tokens) is not None
    blocks.record(key, tokens, len(tokens))


def test_a_prefix_is_shared_and_one_token_is_left_to_compute() -> None:
    blocks = BlockManager(range(10), SIZE)
    computed(blocks, "a", [1, 2, 3, 4, 5, 6])
    assert blocks.allocate("b", [1, 2, 3, 4, 5, 6]) == 3
    assert blocks.allocate("c", [1, 2, 3, 4, 5, 6, 7]) == 6
    assert blocks.table("c")[:2] == blocks.table("a")


def test_equal_blocks_after_different_prefixes_are_not_mixed_up() -> None:
    blocks = BlockManager(range(10), SIZE)
    computed(blocks, "a", [1, 1, 1, 2, 2, 2])
    assert blocks.allocate("b", [2, 2, 2, 9]) == 0
    assert blocks.allocate("c", [3, 3, 3, 2, 2, 2, 9]) == 0


def test_colliding_hashes_do_not_mix_up_prefixes() -> None:
    # CPython: hash(-1) == hash(-2), hence also for the tuples that hold them.
    assert hash((-1, -1, -1)) == hash((-2, -2, -2))
    blocks = BlockManager(range(10), SIZE)
    computed(blocks, "a", [-1, -1, -1, 5])
    assert blocks.allocate("b", [-2, -2, -2, 5]) == 0


def test_the_least_recently_used_prefix_is_evicted_and_its_end_first() -> None:
    blocks = BlockManager(range(4), SIZE)
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


def test_a_half_filled_block_is_found_by_one_who_goes_on_with_it() -> None:
    blocks = BlockManager(range(10), SIZE)
    computed(blocks, "a", [1, 2, 3, 4, 5])
    assert blocks.allocate("b", [1, 2, 3, 4, 5, 6]) == 3, "it is in use"
    (_, tail) = blocks.table("a")
    blocks.release("a")
    blocks.release("b")
    assert blocks.allocate("c", [1, 2, 3, 4, 6]) == 3, "it goes on otherwise"
    assert blocks.allocate("d", [1, 2, 3, 4, 5, 6]) == 5
    assert blocks.table("d")[1] == tail
    assert blocks.allocate("e", [1, 2, 3, 4, 5, 6]) == 3, "it has been taken"
    blocks.release("d")
    assert blocks.allocate("f", [1, 2, 3, 4, 5]) == 4, "one token is computed again"
    blocks.release("f")
    assert blocks.allocate("g", [1, 2, 3, 4, 5, 6]) == 4, "only what is sure to be there"


def test_a_place_that_is_computed_again_is_no_longer_in_the_ledger() -> None:
    """The pass may fail and leave anything there."""
    stores = Stores(10, SIZE)
    blocks = BlockManager(range(10), SIZE, notes=Notes(stores.ledger()))
    computed(blocks, "a", [1, 2, 3, 4, 5])
    blocks.release("a")
    assert blocks.allocate("b", [1, 2, 3, 4, 5]) == 4
    record = stores.ledger().read(blocks.table("b")[1])
    assert record is not None
    assert (record.tokens, record.used) == ((4,), True)


def test_a_full_block_at_the_end_is_taken_if_nobody_has_it() -> None:
    blocks = BlockManager(range(10), SIZE)
    computed(blocks, "a", [1, 2, 3, 4, 5, 6])
    assert blocks.allocate("b", [1, 2, 3, 4, 5, 6]) == 3
    blocks.release("b")
    blocks.release("a")
    assert blocks.allocate("c", [1, 2, 3, 4, 5, 6]) == 5
    assert blocks.allocate("d", [1, 2, 3, 4, 5, 6]) == 3
    blocks.record("c", [1, 2, 3, 4, 5, 6], 6)
    assert blocks.allocate("e", [1, 2, 3, 4, 5, 6, 7]) == 6


def test_spoiled_blocks_are_not_found_but_what_was_before_them_is() -> None:
    stores = Stores(10, SIZE)
    blocks = BlockManager(range(10), SIZE, notes=Notes(stores.ledger()))
    computed(blocks, "a", [1, 2, 3, 4, 5])
    assert blocks.allocate("b", [1, 2, 3, 7, 7, 7, 7]) == 3
    blocks.record("b", [1, 2, 3, 7, 7, 7, 7], 7)
    blocks.release("b", spoiled=True)
    assert blocks.allocate("c", [1, 2, 3, 7, 7, 7, 7]) == 3
    records = [record for page in range(10) if (record := stores.ledger().read(page))]
    assert sorted(record.tokens for record in records) == [(1, 2, 3), (4, 5)]


def test_blocks_of_another_worker_go_last_and_begin_before_end() -> None:
    blocks = BlockManager(range(2), SIZE)
    computed(blocks, "mine", [8] * 6)
    blocks.release("mine")
    after = chain(ROOT, (1, 2, 3))
    blocks.adopt([(40, BlockRecord(ROOT, (1, 2, 3), True, 0)), (30, BlockRecord(after, (4,), True, 1)), (20, None)])
    assert blocks.give_up(1) == [20]
    assert blocks.give_up(2) == [1, 0]
    assert blocks.give_up(1) == [30]
    assert blocks.allocate("a", [1, 2, 3]) == 2
    assert blocks.give_up(1) == ShrinkRefused(0, 1)


def test_what_is_touched_goes_last() -> None:
    blocks = BlockManager([1], SIZE)
    blocks.adopt([(block, BlockRecord(ROOT, (block,) * 3)) for block in (7, 8, 9)])
    assert blocks.allocate("a", [9, 9, 9, 9]) == 3
    blocks.touch([8, 9, 7, 1])
    blocks.release("a")
    assert blocks.give_up(4) == [1, 8, 7, 9]


def test_what_is_here_already_is_adopted_as_free() -> None:
    blocks = BlockManager([5, 6], SIZE)
    computed(blocks, "a", [1, 2, 3])
    blocks.adopt([(9, BlockRecord(ROOT, (1, 2, 3))), (8, BlockRecord(ROOT, (1, 2)))])
    assert (blocks.used_blocks, blocks.cached_blocks, blocks.free_blocks) == (1, 1, 2)
    assert sorted(blocks.reserve(3)) == [6, 8, 9]
    blocks.adopt([(8, BlockRecord(ROOT, (7, 7, 7))), (9, None)])
    assert blocks.allocate("b", [7, 7, 7, 7]) == 3


def test_nothing_is_written_after_detaching() -> None:
    stores = Stores(4, SIZE)
    blocks = BlockManager(range(4), SIZE, notes=Notes(stores.ledger()))
    computed(blocks, "a", [1, 2, 3, 4])
    before = bytes(stores.memory)
    blocks.detach()
    blocks.release("a")
    computed(blocks, "b", [2] * 12)
    assert bytes(stores.memory) == before


def test_misuse_is_an_internal_error() -> None:
    blocks = BlockManager(range(2), SIZE)
    blocks.allocate("a", [1])
    with pytest.raises(InternalError, match="already has KV blocks"):
        blocks.allocate("a", [1])
    with pytest.raises(InternalError, match="KV block 1 is here already"):
        blocks.add([7, 1])
    assert blocks.capacity == 2
    with pytest.raises(InternalError, match="of 0 tokens"):
        BlockManager(range(1), 0)
