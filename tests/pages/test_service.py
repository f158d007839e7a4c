"""A memory owner as the controller sees it. P10: an extent that is there is whole, whoever died meanwhile."""

from __future__ import annotations

import os
import pickle
import shutil
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from concertina.errors import InternalError, OperatorError
from concertina.workers import filling
from concertina.workers.checkpoint import Checkpoint
from concertina.workers.loading import Piece
from concertina.workers.pages.backend import PageNumbers
from concertina.workers.pages.holds import PagesHeld
from concertina.workers.pages.memfd import map_pages
from concertina.workers.pages.page_server import PageServer
from concertina.workers.pages.sharing import PoolServer, fetch_pool
from concertina.workers.pages.table import ExtentRequest
from concertina.workers.pages.transfer import Copied, CopyPlan, LocalPages, PageReader, PageSource
from concertina.workers.services import OwnerService
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from .pools import PAGE, config, read, write
from .tensor_files import raw, write_checkpoint, write_tensors

EXPERTS = 4
PAGES = 2
TABLE_READS = 4  # two headers to find the newer copy; its header again and itself
KEYS = [f"expert/0/{n}" for n in range(EXPERTS)]
REQUESTS = [ExtentRequest(key, "experts", PAGES) for key in KEYS]
VALUES = torch.arange(EXPERTS * PAGES * PAGE // 4, dtype=torch.float32).view(EXPERTS, -1)


@pytest.fixture
def services() -> Iterator[list[OwnerService]]:
    """Three owners; whatever a test adds is closed too."""
    made = [OwnerService(config(128, 64)) for _ in range(3)]
    yield made
    for service in made:
        service._owner.close()


@pytest.fixture
def service(services: list[OwnerService]) -> OwnerService:
    return services[0]


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> list[Piece]:
    folder = write_checkpoint(tmp_path_factory.mktemp("m") / "toy", {"model.safetensors": {"w": VALUES}})
    whole = Checkpoint.open(folder).tensor("w")
    return [Piece(whole.at(n), key, 0, "F32") for n, key in enumerate(KEYS)]


def contents(service: OwnerService) -> dict[str, bytes]:
    return {key: read(service._owner, pages) for key, pages in service.report().pages.items() if key in KEYS}


EXPECTED = {key: raw(VALUES[n]) for n, key in enumerate(KEYS)}


def plans(peer: OwnerService, keys: Sequence[str] = KEYS, **changes: object) -> list[CopyPlan]:
    source = replace(peer.source(), **changes)  # type: ignore[arg-type]
    return [CopyPlan(key, source, peer.report().pages[key]) for key in keys]


def test_extents_come_from_peers_near_and_far_and_from_the_checkpoint(
    services: list[OwnerService], pieces: list[Piece]
) -> None:
    here, near, distant = services
    near.fill(REQUESTS[:1], pieces)
    distant.fill(REQUESTS[1:3], pieces)
    assert (near.report().loaded_bytes, near.report().copied_bytes) == (PAGES * PAGE, 0)
    here.fill(REQUESTS, pieces, [*plans(near, KEYS[:1]), *plans(distant, KEYS[1:3], address="")])
    assert contents(here) == EXPECTED
    assert (here.report().copied_bytes, here.report().loaded_bytes) == (3 * PAGES * PAGE, PAGES * PAGE)
    here.fill(REQUESTS, pieces, plans(near, KEYS[:1]))
    assert (here.report().copied_bytes, here.report().loaded_bytes) == (3 * PAGES * PAGE, PAGES * PAGE)
    near.free(KEYS)  # nothing stays held
    assert KEYS[0] not in near.report().pages


@pytest.mark.parametrize("address", [None, ""])
def test_pages_that_have_become_something_else_are_no_copy(
    services: list[OwnerService], pieces: list[Piece], address: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    """P10: a peer may have been told to free an extent, and have filled its pages anew, before its copy begins."""
    here, peer, _ = services
    peer.fill(REQUESTS[:2], pieces)
    copies = plans(peer, KEYS[:2], **({} if address is None else {"address": address}))
    peer.free(KEYS[:1])
    peer.fill([replace(REQUESTS[0], key=KEYS[3])], pieces)
    assert peer.report().pages[KEYS[3]] == copies[0].pages
    here.fill(REQUESTS, pieces, copies)
    assert contents(here) == EXPECTED
    assert here.report().loaded_bytes == 3 * PAGES * PAGE
    assert "1 of 2 extents come from the checkpoint instead: they were freed meanwhile" in caplog.text


def test_who_copies_from_a_peer_does_not_wait_for_huge_pages(services: list[OwnerService], pieces: list[Piece]) -> None:
    near, here = services[0], OwnerService(replace(config(), huge_pages=True))
    services.append(here)
    near.fill(REQUESTS[:2], pieces)
    asked: list[int] = []

    def refuse(wanted: Iterable[tuple[int, int]], free: object) -> int:
        asked.extend(count for _, count in wanted)
        return 0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(here._owner._huge, "collapse", refuse)
        here.fill(REQUESTS, pieces, plans(near, KEYS[:2]))
    assert sum(asked) == sum(request.pages for request in REQUESTS[2:]) > 0
    assert contents(here) == EXPECTED


def test_peers_of_this_host_are_copied_from_one_at_a_time(
    services: list[OwnerService], pieces: list[Piece], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel lets one write to a file at a time; others would spin meanwhile."""
    here, *peers = services
    for n, peer in enumerate(peers):
        peer.fill(REQUESTS[2 * n : 2 * n + 2], pieces)
    alone, times, copy_to = threading.Lock(), [0], LocalPages.copy_to

    def copied_alone(*args: object) -> None:
        assert alone.acquire(blocking=False), "two copies into one pool at a time"
        try:
            time.sleep(0.02)
            copy_to(*args)  # type: ignore[arg-type]
            times[0] += 1
        finally:
            alone.release()

    monkeypatch.setattr(LocalPages, "copy_to", copied_alone)
    here.fill(REQUESTS, [], plans(peers[0], KEYS[:2]) + plans(peers[1], KEYS[2:]))
    assert times == [EXPERTS]
    assert contents(here) == EXPECTED


class DyingPages:
    """A reader whose peer dies after so many extents, in the middle of the next."""

    left: dict[PageSource, int]

    def __init__(self, source: PageSource, reader: PageReader) -> None:
        self._source = source
        self._reader = reader
        self.geometry = reader.geometry

    def read_into(self, pages: Sequence[int], segments: Sequence[memoryview], copied: Copied | None = None) -> None:
        self.left[self._source] -= 1
        if self.left[self._source] < 0:
            segments[0][: PAGE // 2] = b"\xee" * (PAGE // 2)
            if copied:
                copied(PAGE // 2)
            raise InternalError("the peer died")
        self._reader.read_into(pages, segments, copied)

    def close(self) -> None:
        self._reader.close()

    def __enter__(self) -> DyingPages:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@given(st.lists(st.sampled_from([0, 1, 2]), min_size=EXPERTS, max_size=EXPERTS), st.integers(0, 8), st.integers(0, 8))
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whichever_peers_die_every_extent_is_whole(
    services: list[OwnerService], pieces: list[Piece], peer_of: list[int], first_lives: int, second_lives: int
) -> None:
    """P10: 0 stands for the checkpoint. What came from a peer that cannot be asked for its table does not count."""
    here, *peers = services
    here.free(KEYS)
    for peer in peers:
        peer.fill(REQUESTS, pieces)
    copies = [plan for n, key in enumerate(KEYS) if peer_of[n] for plan in plans(peers[peer_of[n] - 1], [key])]
    lives = dict(zip([peer.source() for peer in peers], (first_lives, second_lives), strict=True))
    DyingPages.left = dict(lives)
    before = here.report().copied_bytes, here.report().loaded_bytes
    opened = filling.open_pages
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(filling, "open_pages", lambda source: DyingPages(source, opened(source)))
        here.fill(REQUESTS, pieces, copies)
    assert contents(here) == EXPECTED
    wanted = {peer.source(): peer_of.count(n + 1) for n, peer in enumerate(peers)}
    copied = sum(min(wanted[source], lives[source]) for source in lives)
    torn = sum(wanted[source] > lives[source] for source in lives)
    whole = sum(wanted[source] for source in lives if wanted[source] + TABLE_READS <= lives[source])
    assert here.report().copied_bytes - before[0] == copied * PAGES * PAGE + torn * PAGE // 2
    assert here.report().loaded_bytes - before[1] == (EXPERTS - whole) * PAGES * PAGE


def test_a_peer_that_cannot_serve_is_done_without(
    services: list[OwnerService], pieces: list[Piece], caplog: pytest.LogCaptureFixture
) -> None:
    here, peer, _ = services
    peer.fill(REQUESTS, pieces)
    for changes in (
        {"token": "wrong"},
        {"address": "@concertina-nobody", "port": 0},
        {"address": "", "port": 0},
        {"address": "", "token": "wrong"},
    ):
        here.fill(REQUESTS, pieces, plans(peer, **changes))
        assert contents(here) == EXPECTED
        here.free(KEYS)
    here.fill(REQUESTS, pieces, [replace(plan, pages=plan.pages[:1]) for plan in plans(peer)])
    here.free(KEYS)
    here.fill(REQUESTS, pieces, [replace(plan, pages=(500, 501)) for plan in plans(peer)])
    assert contents(here) == EXPECTED
    assert here.report().copied_bytes == 0
    assert "4 of 4 extents come from the checkpoint instead" in caplog.text
    assert "secret" not in caplog.text


def test_what_neither_a_peer_nor_a_file_gives_is_an_error_and_leaves_nothing(
    services: list[OwnerService], pieces: list[Piece]
) -> None:
    here, peer, _ = services
    peer.fill(REQUESTS, pieces)
    before = here.usage()
    with pytest.raises(InternalError, match=r"extents expert/0/0, expert/0/1: their peer failed, and no file"):
        here.fill(REQUESTS, pieces[2:], plans(peer, token="wrong"))
    gone = [replace(piece, source=replace(piece.source, file="/gone")) for piece in pieces]
    with pytest.raises(OperatorError, match="/gone: cannot be read"):
        here.fill(REQUESTS, gone, plans(peer, KEYS[:2]))
    with pytest.raises(OperatorError, match="out of pages"):
        here.fill([*REQUESTS, ExtentRequest("kv/a", "kv", 200)], pieces)
    assert here.usage() == before
    here.fill(REQUESTS, pieces)
    assert contents(here) == EXPECTED


def replace_by(file: Path, tensors: dict[str, torch.Tensor]) -> None:
    """By renaming, as trainers and downloads do."""
    new = file.with_name("new")
    write_tensors(new, tensors)
    new.replace(file)


@pytest.mark.parametrize(
    "other",
    [{"w": VALUES + 1}, {"w": VALUES, "x": torch.ones(3)}, {"w": VALUES[:-1]}, {"y": VALUES}],
    ids=["other data", "longer header", "smaller", "other name"],
)
def test_a_checkpoint_that_was_replaced_is_refused_and_leaves_nothing(
    services: list[OwnerService], tmp_path: Path, other: dict[str, torch.Tensor]
) -> None:
    """P10: else some extents would be of one model and some of another."""
    here, peer, _ = services
    folder = write_checkpoint(tmp_path / "toy", {"model.safetensors": {"w": VALUES}})
    file, whole = folder / "model.safetensors", Checkpoint.open(folder).tensor("w")
    pieces = [Piece(whole.at(n), key, 0, "F32") for n, key in enumerate(KEYS)]
    here.fill(REQUESTS[:1], pieces)
    peer.fill(REQUESTS[:3], pieces)
    before = here.usage(), here.report().pages, here.report().loaded_bytes
    replace_by(file, other)
    for copies in ([], plans(peer, KEYS[:3])):  # of what comes from a peer, too, nothing stays
        with pytest.raises(OperatorError, match=rf"^{file}: not the file that is served any more: .*; expected the"):
            here.fill(REQUESTS, pieces, copies)
        assert (here.usage(), here.report().pages, here.report().loaded_bytes) == before
    here.fill(REQUESTS[:3], pieces, plans(peer, KEYS[:3]))  # what peers have needs no file
    replace_by(file, {"w": VALUES})
    here.fill(REQUESTS, pieces)
    assert contents(here) == EXPECTED


def test_a_checkpoint_that_was_copied_or_touched_is_the_same(service: OwnerService, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "toy", {"model.safetensors": {"w": VALUES}})
    file, whole = folder / "model.safetensors", Checkpoint.open(folder).tensor("w")
    pieces = [Piece(whole.at(n), key, 0, "F32") for n, key in enumerate(KEYS)]
    os.utime(file, (1, 1))
    service.fill(REQUESTS[:2], pieces)
    shutil.copy(file, tmp_path / "copy")
    (tmp_path / "copy").replace(file)
    service.fill(REQUESTS, pieces)
    assert contents(service) == EXPECTED


def test_two_fills_of_one_extent_read_it_once(service: OwnerService, pieces: list[Piece]) -> None:
    threads = [threading.Thread(target=service.fill, args=(REQUESTS[: n + 1], pieces)) for n in range(EXPERTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert contents(service) == EXPECTED
    assert service.report().loaded_bytes == EXPERTS * PAGES * PAGE


def test_extents_grow_shrink_and_change_hands_and_repeating_changes_nothing(service: OwnerService) -> None:
    first = service.extend("kv/a", "kv", 3)
    pages = service.extend("kv/a", "kv", 4, had=3)
    assert pages[:3] == first
    assert service.extend("kv/a", "kv", 4, had=3) == pages
    assert service.usage()["kv"] == 7
    kept = pages[1:5:2]
    for _ in range(2):
        assert service.trim("kv/a", kept) == kept
    assert service.usage()["kv"] == 2
    for _ in range(2):
        service.relabel("kv/a", kept[:1], "kv/b")
        assert (service.report().pages["kv/a"], service.report().pages["kv/b"]) == (kept[1:], kept[:1])
    for _ in range(2):
        service.relabel("kv/a", kept, "kv/b")
        assert service.report().pages.get("kv/b") == (kept[0], kept[1])
    for _ in range(2):
        assert service.trim("kv/b", []) == ()
        service.free(["kv/a", "kv/b", "kv/b"])
    assert service.usage()["kv"] == 0


def test_impossible_changes_are_refused_and_change_nothing(service: OwnerService) -> None:
    service.extend("kv/a", "kv", 3)
    service.extend("exchange/1", "exchange", 1)
    before = service.report().pages
    pages = before["kv/a"]
    for change, message in (
        (lambda: service.extend("kv/a", "experts", 1), "cannot be extended as experts"),
        (lambda: service.extend("ledger", "table", 1), "cannot be extended as table"),
        (lambda: service.extend("kv/c", "kv", 0, had=None) or service._owner.extend("kv/c", "kv", 0), "at least 1"),
        (lambda: service.trim("kv/a", [*pages, 127]), "extent 'kv/a' of 3 pages: 1 of those to keep are not in it"),
        (lambda: service.trim("kv/gone", [1]), "extent 'kv/gone' of 0 pages"),
        (lambda: service.trim("ledger", []), "cannot free"),
        (lambda: service.free(["ledger"]), "cannot be freed"),
        (lambda: service.relabel("kv/a", [127], "kv/b"), "cannot take pages"),
        (lambda: service.relabel("kv/a", pages, "exchange/1"), "cannot move"),
        (lambda: service.relabel("kv/gone", [1], "kv/b"), "no extent 'kv/gone'"),
    ):
        with pytest.raises(InternalError, match=message):
            change()
    with pytest.raises(OperatorError, match="out of pages: kv extent 'kv/a' wants 500"):
        service.extend("kv/a", "kv", 500)
    assert service.report().pages == before


def test_nothing_is_half_freed_while_somebody_maps(service: OwnerService) -> None:
    """P5."""
    pages = service.extend("kv/a", "kv", 6)
    service.extend("kv/b", "kv", 1)
    pool = fetch_pool(service.address(), "secret")
    data = write(service._owner, pages)
    mapped = map_pages(pool, pages[3:4])
    for change in (lambda: service.trim("kv/a", pages[:2]), lambda: service.free(["kv/b", "kv/a"])):
        with pytest.raises(PagesHeld, match="kv/a"):
            change()
        assert service.report().pages["kv/a"] == pages
        assert read(service._owner, pages) == data
    assert service.trim("kv/a", pages[3:]) == pages[3:]
    del mapped
    assert service.trim("kv/a", pages[4:]) == pages[4:]
    assert not any(read(service._owner, pages[:4]))
    pool.close()


def test_new_pages_read_as_zeros(service: OwnerService) -> None:
    pages = service.extend("kv/a", "kv", 20)
    write(service._owner, pages)
    service.trim("kv/a", pages[::2])
    assert not any(read(service._owner, service.extend("kv/b", "kv", 10)))


@pytest.mark.parametrize("moment", ["filled half", "renamed"])
def test_an_adopted_pool_has_what_was_whole_and_nothing_else(
    services: list[OwnerService], pieces: list[Piece], moment: str
) -> None:
    """P10: also when the owner died in the middle of filling."""
    old = services[0]
    old.fill(REQUESTS[:2], pieces)
    if moment == "filled half":
        old._owner.allocate_all([replace(r, key="loading:" + r.key) for r in REQUESTS[2:]])
    pool = fetch_pool(old.address(), "secret")
    lent = PoolServer(pool, "secret", old.address() + "/lent")
    before = old.report().pages
    old._owner.close()
    services[0] = new = OwnerService(old.config(), lent.address)
    assert new.report().pages == before
    assert new.usage()["experts"] == 2 * PAGES
    new.fill(REQUESTS, pieces)
    assert contents(new) == EXPECTED
    lent.close()
    pool.close()


def test_only_the_owners_own_pool_is_adopted(services: list[OwnerService]) -> None:
    one, other, _ = services
    lonely = replace(one.config(), name=one.config().name + "-new")
    with pytest.raises(OperatorError, match=r"pool at '@concertina/.*': expected .*-new.*, found"):
        OwnerService(lonely, one.address())
    with pytest.raises(OperatorError, match="cannot listen"):  # it lives
        OwnerService(one.config(), one.address())
    with pytest.raises(OperatorError, match="token: refused"):
        OwnerService(replace(lonely, token="another"), other.address())
    with pytest.raises(InternalError, match="no answer"):
        OwnerService(lonely, "@concertina-nobody")


def test_an_owner_says_who_it_is(service: OwnerService) -> None:
    assert service.alive() == os.getpid()
    assert service.config().ledger_record_bytes == 64
    source = pickle.loads(pickle.dumps(service.source()))
    assert (source.address, source.host) == (service.address(), "127.0.0.1")
    assert "secret" not in repr(source)
    assert len(service.report().pages["ledger"]) == 2
    assert "table" not in service.report().pages
    service.wait(0.001)


def test_pages_are_told_again_only_when_they_have_changed(service: OwnerService) -> None:
    told = service.report()
    assert service.report(told.version) == replace(told, pages=None)
    service.extend("kv/a", "kv", 2)
    changed = service.report(told.version)
    assert changed.version > told.version
    assert changed.pages is not None
    assert len(changed.pages["kv/a"]) == 2


def test_page_numbers_travel_as_runs() -> None:
    numbers = PageNumbers([*range(10, 100_000), 3, 4])
    packed = pickle.dumps(numbers)
    assert len(packed) < 200
    assert pickle.loads(packed) == numbers == tuple(numbers)
    assert type(pickle.loads(packed)) is PageNumbers
    assert pickle.loads(pickle.dumps(PageNumbers())) == ()


def test_a_server_that_cannot_listen_leaves_the_address_free() -> None:
    mine = config()
    with pytest.raises(OperatorError, match="cannot listen"):
        OwnerService(replace(mine, host="256.0.0.1"))
    OwnerService(mine)._owner.close()


def test_a_page_server_needs_a_token(service: OwnerService) -> None:
    with pytest.raises(OperatorError, match="token: expected a non-empty secret"):
        PageServer(service._owner.pool, "", "127.0.0.1")


def test_reading_near_is_no_mapping(service: OwnerService, tmp_path: Path) -> None:
    pages = service.extend("exchange/1", "exchange", 40)[::2]
    write(service._owner, pages)
    reader = LocalPages(fetch_pool(service.address(), "secret"))
    before = Path("/proc/self/maps").read_text().count(f"memfd:{service.config().name}")
    memory = bytearray(len(pages) * PAGE)
    reader.read_into(pages, [memoryview(memory)])
    assert Path("/proc/self/maps").read_text().count(f"memfd:{service.config().name}") == before
    assert bytes(memory) == read(service._owner, pages)
    reader.close()
