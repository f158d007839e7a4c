"""An engine that is killed at any moment goes on in another one from the ledger (G6, G9, G10, G12)."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field

import pytest
from concertina.workers.engine.engine import Engine
from concertina.workers.kv.ledger import BlockRecord
from hypothesis import given, settings
from hypothesis import strategies as st

from .fakes import (
    EOS,
    Collected,
    FakeDecoder,
    FakeKV,
    Killed,
    Stores,
    config,
    drain,
    expected_greedy,
    request,
    solo,
)

BLOCKS = {3, 4, 7, *range(10, 60)}
LENGTH = 8
prompts = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=6), min_size=1, max_size=3)


@dataclass
class Device:
    """KV and ledger, which outlive the engines on them."""

    stores: Stores = field(default_factory=lambda: Stores(2 * 60, 2))
    cells: dict[tuple[int, int], int] = field(default_factory=dict)
    sizes: list[int] = field(default_factory=list)  # tokens of each forward pass

    def kv(self) -> FakeKV:
        return FakeKV(0, 2, self.cells, self.stores.ledger(), set(BLOCKS))

    def engine(self, **limits: int) -> Engine:
        decoder = FakeDecoder(hook=lambda batch: self.sizes.append(batch.tokens))
        return solo(self.kv(), decoder, config(**limits))


def serve(engine: Engine, collected: Collected, prompts: list[list[int]], temperature: float) -> None:
    """Submit what is missing of each answer, and step until all are there or the engine is killed."""
    for i, prompt in enumerate(prompts):
        so_far = collected.tokens.get(str(i), [])
        if str(i) not in collected.ends:
            sampling = {"temperature": temperature, "seed": 7 + i, "ignore_eos": True}
            engine.submit(request(str(i), [*prompt, *so_far], max_tokens=LENGTH - len(so_far), **sampling))
    with suppress(Killed):
        drain(engine, collected)


def answers(prompts: list[list[int]], temperature: float) -> dict[str, list[int]]:
    collected = Collected()
    serve(solo(200), collected, prompts, temperature)
    return collected.tokens


@settings(max_examples=50, deadline=None)
@given(prompts=prompts, kills=st.lists(st.integers(0, 300), max_size=3), temperature=st.sampled_from([0.0, 2.0]))
def test_whenever_it_is_killed_the_answers_are_the_same(
    prompts: list[list[int]], kills: list[int], temperature: float
) -> None:
    device, collected = Device(), Collected()
    for kill in [*kills, -1]:
        device.stores.count, device.stores.kill_at = 0, kill
        try:
            engine = device.engine(max_batched_tokens=7)
        except Killed:
            continue  # while it read the ledger
        serve(engine, collected, prompts, temperature)
    assert collected.tokens == answers(prompts, temperature)


@settings(max_examples=50, deadline=None)
@given(prompts=prompts, kill=st.integers(100, 400), temperature=st.sampled_from([0.0, 2.0]))
def test_what_was_computed_is_not_computed_again(prompts: list[list[int]], kill: int, temperature: float) -> None:
    """Of every answer under way only the last token is computed, even if the ledger was being written."""
    prompts = [[i + 4, *prompt] for i, prompt in enumerate(prompts)]  # they have nothing in common
    device, collected = Device(), Collected()
    engine = device.engine()
    device.stores.count, device.stores.kill_at = 0, kill
    serve(engine, collected, prompts, temperature)
    under_way = collected.tokens.keys() - collected.ends
    device.stores.kill_at = -1
    device.sizes.clear()
    serve(device.engine(), collected, prompts, temperature)
    assert len(under_way) < len(prompts) or device.sizes[0] == len(prompts)
    assert collected.tokens == answers(prompts, temperature)


def test_values_that_are_not_finite_are_not_in_the_ledger() -> None:
    device = Device()
    engine = solo(device.kv(), FakeDecoder(poison=7))
    engine.submit(request("bad", [1, 2, 3, 4, 5, 6, 7]))
    collected = drain(engine, Collected())
    assert collected.ends["bad"].finish_reason == "error"
    ledger = device.stores.ledger()
    assert all(ledger.read(page) is None for page in range(ledger.pages))
    answer = expected_greedy([1, 2, 3], 6)
    assert answer[4] not in [1, 2, 3, *answer[:4]]
    engine = solo(device.kv(), FakeDecoder(poison=answer[4]))
    engine.submit(request("worse", [1, 2, 3], max_tokens=20))
    assert len(drain(engine, Collected()).tokens["worse"]) == 5
    assert all(ledger.read(page) is None for page in range(ledger.pages)), "nor is what came before them"


@pytest.mark.parametrize("end", ["finished", "aborted", "preempted"])
def test_what_a_sequence_leaves_is_found_by_a_successor(end: str) -> None:
    device, collected = Device(), Collected()
    engine = device.engine()
    engine.submit(request("a", [1, 2, 3], max_tokens=20 if end != "finished" else 4))
    for _ in range(4):
        collected.emit(engine.step())
    if end == "aborted":
        engine.abort("a")
    elif end == "preempted":
        engine.call(lambda: engine._core.scheduler.preempt_until(len(BLOCKS)))
    assert engine.load.kv_blocks_used == 0
    assert collected.tokens["a"] == expected_greedy([1, 2, 3], 4)
    successor = device.engine()
    successor.submit(request("b", [1, 2, 3, *collected.tokens["a"]], max_tokens=5))
    found = drain(successor, Collected())
    assert found.ends["b"].cached_tokens == 6
    assert found.tokens["b"] == expected_greedy([1, 2, 3, *collected.tokens["a"]], 5)


def test_one_that_retires_leaves_the_ledger_to_others() -> None:
    device = Device()
    engine = device.engine()
    engine.submit(request("a", [1, 2, 3], max_tokens=20))
    for _ in range(4):
        engine.step()
    engine.retire()
    before = bytes(device.stores.memory)
    assert [output.id for output in engine.hand_over("")] == ["a"]
    assert engine.load.kv_blocks_used == 0
    assert device.stores.memory == before


def test_another_device_takes_over_by_copying_into_reserved_blocks() -> None:
    """The heir serves meanwhile, and afterwards has what the leaver had."""
    leaver, heir, collected = Device(), Device(), Collected()
    old = leaver.engine()
    old.submit(request("a", [1, 2, 3], max_tokens=30))
    for _ in range(9):
        collected.emit(old.step())
    new = heir.engine()
    new.submit(request("b", [5, 5], max_tokens=8))
    theirs = Collected()
    theirs.emit(new.step())

    ledger = leaver.stores.ledger()
    records = {b: record for b in leaver.kv().block_ids if (record := ledger.read(2 * b)) is not None}
    copies: list[tuple[int, BlockRecord | None]] = []
    for block, source in zip(new.reserve(len(records)), records, strict=True):
        heir.cells.update({(block, place): leaver.cells[source, place] for place in range(len(records[source].tokens))})
        theirs.emit(new.step())
        copies.append((block, records[source]))
    new.give_back(copies)
    old.retire()
    (moved,) = old.hand_over("the heir")
    assert (moved.finish_reason, moved.moved_to) == ("moved", "the heir")
    new.submit(request("a", [1, 2, 3, *collected.tokens["a"]], max_tokens=21))
    rest = drain(new, theirs)
    assert rest.ends["a"].cached_tokens == 11
    assert collected.tokens["a"] + rest.tokens["a"] == expected_greedy([1, 2, 3], 30)
    assert rest.tokens["b"] == expected_greedy([5, 5], 8)
    assert EOS not in rest.tokens["a"]
