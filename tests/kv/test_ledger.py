"""The ledger: what was written is read back, garbage says nothing, half-written records say nothing (G9)."""

from __future__ import annotations

import pytest
from concertina.errors import InternalError
from concertina.workers.kv.ledger import PREFIX_BYTES, ROOT, BlockRecord, Ledger, chain, record_bytes
from hypothesis import given, settings
from hypothesis import strategies as st

from ..engine.fakes import Stores

SIZE = 5
PAGES = 4
STRIDE = record_bytes(SIZE)
records = st.builds(
    BlockRecord,
    prefix=st.binary(min_size=PREFIX_BYTES, max_size=PREFIX_BYTES),
    tokens=st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=SIZE).map(tuple),
    used=st.booleans(),
    stamp=st.integers(0, 2**64 - 1),
)


def ledger(memory: bytearray | None = None) -> Ledger:
    return Ledger(memoryview(bytearray(PAGES * STRIDE) if memory is None else memory), STRIDE, SIZE)


@given(st.dictionaries(st.integers(0, PAGES - 1), records))
def test_records_are_read_back_by_whoever_maps_the_memory(written: dict[int, BlockRecord]) -> None:
    memory = bytearray(PAGES * STRIDE)
    first = ledger(memory)
    for page, record in written.items():
        first.begin(page, record)
    first.close()
    second = ledger(memory)
    assert {page: second.read(page) for page in range(PAGES)} == {page: written.get(page) for page in range(PAGES)}


@given(records, st.integers(0, SIZE), st.integers(0, 2**64 - 1))
def test_a_record_grows_is_cut_marked_and_cleared(record: BlockRecord, at: int, stamp: int) -> None:
    notes = ledger()
    at = min(at, len(record.tokens))
    notes.begin(1, BlockRecord(record.prefix, record.tokens[:at]))
    if at < len(record.tokens):
        notes.append(1, at, record.tokens[at:])
    notes.mark(1, record.used, record.stamp)
    assert notes.read(1) == record
    notes.cut(1, 1)
    notes.mark(1, not record.used, stamp)
    assert notes.read(1) == BlockRecord(record.prefix, record.tokens[:1], not record.used, stamp)
    notes.clear(1)
    assert all(notes.read(page) is None for page in range(PAGES))


@settings(max_examples=300)
@given(st.binary(min_size=STRIDE, max_size=STRIDE), st.integers(0, 8))
def test_garbage_is_no_record_or_one_that_makes_sense(garbage: bytes, fill: int) -> None:
    """Also with a plausible fill, so that what is behind it is looked at."""
    for memory in (bytearray(garbage), bytearray(fill.to_bytes(4, "little") + garbage[4:])):
        record = Ledger(memoryview(memory), STRIDE, SIZE).read(0)
        if record is not None:
            assert 1 <= len(record.tokens) <= SIZE
            assert all(0 <= token < 2**31 for token in record.tokens)
            assert len(record.prefix) == PREFIX_BYTES


@given(records, records)
def test_a_kill_while_a_record_is_written_leaves_the_new_one_or_none(old: BlockRecord, new: BlockRecord) -> None:
    stores = Stores(1, SIZE)
    stores.ledger().begin(0, old)
    seen: list[BlockRecord | None] = []
    stores.after_each = lambda: seen.append(stores.ledger(watched=False).read(0))
    stores.ledger().begin(0, new)
    assert seen == [None] * (len(seen) - 1) + [new]


def test_the_format() -> None:
    memory = bytearray(2 * STRIDE)
    Ledger(memoryview(memory), STRIDE, SIZE).begin(1, BlockRecord(bytes(range(16)), (7, 258), True, 3))
    expected = bytes([2, 0, 0, 0, 1, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0, *range(16)]) + bytes([1]) + bytes(31)
    assert memory[STRIDE:] == (expected + bytes([7, 0, 0, 0, 2, 1, 0, 0])).ljust(STRIDE, b"\0")
    assert not any(memory[:STRIDE])
    assert (record_bytes(16), record_bytes(17), record_bytes(1)) == (128, 192, 128)


def test_whatever_makes_a_block_hold_something_else_changes_its_number() -> None:
    notes = ledger()
    record = BlockRecord(ROOT, (1, 2, 3))
    seen = {notes.changes(1)}
    for change in (
        lambda: notes.begin(1, record),
        lambda: notes.cut(1, 2),
        lambda: notes.clear(1),
        lambda: notes.begin(1, record),
    ):
        change()
        assert notes.changes(1) not in seen
        seen.add(notes.changes(1))
    notes.append(1, 3, [4])  # what it holds stays true
    notes.mark(1, True, 8)
    assert notes.changes(1) in seen
    assert notes.changes(0) == 0


def test_who_is_used_is_told_without_reading_the_record() -> None:
    notes = ledger()
    assert not notes.used(1)
    notes.mark(1, True, 0)
    assert not notes.used(1)  # nothing is in it yet
    notes.begin(1, BlockRecord(ROOT, (1,), True, 0))
    assert notes.used(1)
    notes.mark(1, False, 4)
    assert not notes.used(1)
    assert not notes.used(-1)
    assert not notes.used(PAGES)


def test_pages_outside_say_nothing_and_misuse_is_an_error() -> None:
    notes = ledger()
    assert notes.pages == PAGES
    assert notes.read(-1) is notes.read(PAGES) is None
    with pytest.raises(InternalError, match="6 tokens in a block of 5"):
        notes.append(0, 4, [1, 2])
    for stride, size in ((64, 1), (STRIDE + 4, SIZE), (STRIDE, 0)):
        with pytest.raises(InternalError, match="KV ledger: records of"):
            Ledger(memoryview(bytearray(1024)), stride, size)


def test_prefixes_stand_for_all_tokens_before() -> None:
    after = {chain(chain(ROOT, a), b) for a in ([1, 2], [2, 1], [-1, 2]) for b in ([1, 2], [2, 1])}
    assert len(after) == 6
    assert all(len(prefix) == PREFIX_BYTES for prefix in after)


def test_the_end_of_a_sequence_is_evicted_first_and_running_ones_last() -> None:
    old, new = BlockRecord(ROOT, (1,), False, 4), BlockRecord(ROOT, (1,), False, 9)
    begins, goes_on = BlockRecord(ROOT, (1,), True, 0), BlockRecord(ROOT, (1,), True, 1)
    assert sorted([begins, new, goes_on, old], key=lambda r: r.eviction_rank) == [old, new, goes_on, begins]
