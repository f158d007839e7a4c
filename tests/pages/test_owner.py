"""The memory owner within one process; `test_processes` has what needs several."""

from __future__ import annotations

import errno
import os
import pickle
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from concertina.errors import InternalError, OperatorError
from concertina.workers.checkpoint import Checkpoint
from concertina.workers.loading import Piece
from concertina.workers.owner import MemoryOwner
from concertina.workers.owner_roles import OwnerConfig
from concertina.workers.pages.holds import PagesHeld
from concertina.workers.pages.huge import HugePages
from concertina.workers.pages.memfd import map_pages
from concertina.workers.pages.ranges import HUGE_BYTES, MemfdRange
from concertina.workers.pages.sharing import fetch_pool
from concertina.workers.pages.table import Extent, ExtentRequest
from concertina.workers.pages.views import view
from concertina.workers.tensor_file import FileIdentity

from .tensor_files import write_checkpoint

PAGE = 4096
CONFIG = OwnerConfig(f"owner-test-{os.getpid()}", 128, PAGE, "secret", huge_pages=False)


@pytest.fixture
def owner() -> Iterator[MemoryOwner]:
    owner = MemoryOwner(CONFIG)
    yield owner
    owner.close()


def as_tensor(owner: MemoryOwner, key: str, dtype: torch.dtype, shape: tuple[int, ...], at: int = 0) -> torch.Tensor:
    return view(map_pages(owner.pool, owner.extent(key).pages), dtype, shape, byte_offset=at).clone()


def fragment(owner: MemoryOwner) -> None:
    """Leave only every second page free, and then a rest, so that extents are made of many runs."""
    for n in range(40):
        owner.allocate(f"exchange/{n}", "exchange", 1)
    owner.free(*(f"exchange/{n}" for n in range(0, 40, 2)))
    owner.allocate("kv/rest", "kv", owner.usage()["free"] - 20)


def test_accounting_adds_up_and_values_pickle(owner: MemoryOwner) -> None:
    owner.allocate_all([ExtentRequest("trunk", "trunk", 5), ExtentRequest("expert/0/0", "experts", 3)])
    owner.allocate("kv/w0", "kv", 7)
    stats = pickle.loads(pickle.dumps(owner.stats()))
    assert sum(stats.pages.values()) == 128
    assert stats.pages == owner.usage()
    assert (stats.pages["trunk"], stats.pages["experts"], stats.pages["kv"]) == (5, 3, 7)
    assert (stats.name, stats.address, stats.page_bytes) == (CONFIG.name, f"@concertina/{CONFIG.name}", PAGE)
    assert [e.key for e in pickle.loads(pickle.dumps(owner.extents("expert/")))] == ["expert/0/0"]
    assert "secret" not in repr(CONFIG)


def test_a_name_may_be_longer_than_an_address() -> None:
    config = replace(CONFIG, name="x" * 300)
    owner = MemoryOwner(config)
    try:
        pool = fetch_pool(owner.address, "secret")
        assert pool.geometry.name == config.name
        pool.close()
        with pytest.raises(OperatorError, match="in use"):
            MemoryOwner(config)
    finally:
        owner.close()


def test_several_extents_are_allocated_all_or_none(owner: MemoryOwner) -> None:
    with pytest.raises(OperatorError, match="out of pages: kv extent 'b' wants 500"):
        owner.allocate_all([ExtentRequest("a", "kv", 5), ExtentRequest("b", "kv", 500)])
    assert [e.key for e in owner.extents()] == ["table"]


def test_freeing_is_refused_while_an_extent_is_mapped(owner: MemoryOwner) -> None:
    """P5."""
    owner.allocate("expert/0/0", "experts", 2)
    extent = owner.allocate("expert/0/1", "experts", 2)
    worker_pool = fetch_pool(owner.address, "secret")
    tensor = view(map_pages(worker_pool, extent.pages), torch.uint8, (2 * PAGE,))
    worker_pool.close()
    tensor.fill_(7)
    assert owner.held("expert/0/0", "expert/0/1") == ["expert/0/1"]
    with pytest.raises(PagesHeld, match="expert/0/1") as caught:
        owner.free("expert/0/0", "expert/0/1")
    assert pickle.loads(pickle.dumps(caught.value)).what == ("expert/0/1",)
    assert owner.usage()["experts"] == 4
    assert int(tensor.min()) == 7
    del tensor
    assert owner.held("expert/0/0", "expert/0/1") == []
    owner.free("expert/0/0", "expert/0/1")
    assert owner.usage()["experts"] == 0


def test_freed_pages_give_memory_back_and_are_zero_when_allocated_again(owner: MemoryOwner) -> None:
    extent = owner.allocate("expert/0/0", "experts", 8)
    empty = owner.stats().resident_bytes
    map_pages(owner.pool, extent.pages).memory()[:] = b"x" * (8 * PAGE)
    assert owner.stats().resident_bytes == empty + 8 * PAGE
    owner.free("expert/0/0")
    assert owner.stats().resident_bytes == empty
    again = owner.allocate("kv/w0", "kv", 8)
    assert again.pages == extent.pages
    assert not as_tensor(owner, "kv/w0", torch.uint8, (8 * PAGE,)).any()


def test_renamed_and_moved_pages_keep_their_contents(owner: MemoryOwner) -> None:
    extent = owner.allocate("kv/w0", "kv", 4)
    map_pages(owner.pool, extent.pages).memory()[:] = b"".join(bytes([n]) * PAGE for n in range(4))
    owner.move_pages("kv/w0", [extent.pages[2]], "kv/w1", "kv")
    owner.rename_all({"kv/w0": "kv/w2", "kv/w1": "kv/w3"})
    owner.rename("kv/w2", "expert/0/0", "experts")
    assert as_tensor(owner, "expert/0/0", torch.uint8, (3, PAGE))[:, 0].tolist() == [0, 1, 3]
    assert as_tensor(owner, "kv/w3", torch.uint8, (PAGE,))[0] == 2
    before = owner.extents()
    with pytest.raises(InternalError, match="exists already"):
        owner.rename_all({"kv/w3": "kv/w4", "expert/0/0": "kv/w4"})
    assert owner.extents() == before


def test_pieces_land_where_they_belong_in_any_dtype(owner: MemoryOwner, tmp_path: Path) -> None:
    """Stacked experts, one run per page, pieces that straddle pages, and a tensor larger than one conversion step."""
    fragment(owner)
    generator = torch.Generator().manual_seed(3)
    stacked = torch.randn(3, 37, 31, generator=generator)
    large = torch.randn(2 * ((1 << 18) + 5), generator=generator).to(torch.float16)[:30_001]
    folder = write_checkpoint(
        tmp_path / "toy", {"x-1.safetensors": {"stacked": stacked}, "x-2.safetensors": {"large": large}}
    )
    checkpoint = Checkpoint.open(folder)
    owner.allocate("expert/0/1", "experts", 3)
    owner.allocate("trunk", "trunk", 15)
    seen: list[tuple[int, int]] = []
    source = checkpoint.tensor("stacked")
    pieces = [
        Piece(checkpoint.tensor("large"), "trunk", 64, "F16"),
        Piece(source.at(1), "expert/0/1", 192, "F32"),
        Piece(source.at(2).rows(5, 20), "expert/0/1", 192 + 37 * 31 * 4, "BF16"),
    ]
    owner.load(pieces, lambda done, total: seen.append((done, total)))
    total = large.nbytes + 37 * 31 * 4 + 15 * 31 * 4
    assert seen[-1] == (total, total)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert torch.equal(as_tensor(owner, "trunk", torch.float16, (30_001,), 64), large)
    assert torch.equal(as_tensor(owner, "expert/0/1", torch.float32, (37, 31), 192), stacked[1])
    found = as_tensor(owner, "expert/0/1", torch.bfloat16, (15, 31), 192 + 37 * 31 * 4)
    assert torch.equal(found, stacked[2, 5:20].to(torch.bfloat16))
    assert owner.held("trunk", "expert/0/1") == []


def test_conversion_goes_step_by_step(tmp_path: Path) -> None:
    owner = MemoryOwner(OwnerConfig(CONFIG.name + "-steps", 64, 64 << 10, "secret", huge_pages=False))
    values = torch.randn((1 << 18) * 2 + 77, generator=torch.Generator().manual_seed(4))
    folder = write_checkpoint(tmp_path / "toy", {"model.safetensors": {"w": values}})
    owner.allocate("trunk", "trunk", 20)
    owner.load([Piece(Checkpoint.open(folder).tensor("w"), "trunk", 2, "BF16")])
    assert torch.equal(as_tensor(owner, "trunk", torch.bfloat16, (len(values),), 2), values.to(torch.bfloat16))
    owner.close()


def test_pieces_that_do_not_fit_are_refused_before_anything_is_read(owner: MemoryOwner, tmp_path: Path) -> None:
    tensors = {"w": torch.ones(2048), "i": torch.ones(4, dtype=torch.int64)}
    checkpoint = Checkpoint.open(write_checkpoint(tmp_path / "toy", {"model.safetensors": tensors}))
    w = checkpoint.tensor("w")
    good = Piece(w, "trunk", 0, "F32")
    owner.allocate("trunk", "trunk", 2)
    for piece, error, message in (
        (Piece(w, "nothing", 0, "F32"), InternalError, "no extent 'nothing'"),
        (Piece(w, "trunk", 4, "F32"), InternalError, r"'w': bytes 4\.\.8196 lie outside extent 'trunk' of 8192"),
        (Piece(w, "trunk", -4, "F32"), InternalError, "lie outside"),
        (Piece(w, "trunk", 3, "BF16"), InternalError, "dest_offset 3 is no multiple of 2"),
        (Piece(w, "trunk", 0, "F8_E4M3"), OperatorError, "'w': cannot convert F32 to F8_E4M3"),
        (Piece(checkpoint.tensor("i"), "trunk", 0, "F32"), OperatorError, "'i': cannot convert I64 to F32"),
        (Piece(w, "trunk", 0, "X"), OperatorError, "cannot convert F32 to X"),
    ):
        with pytest.raises(error, match=message):
            owner.load([good, piece])
    assert not as_tensor(owner, "trunk", torch.float32, (2048,)).any()


def test_a_file_that_shrank_or_went_after_opening_is_named(owner: MemoryOwner, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "toy", {"model.safetensors": {"w": torch.ones(2048)}})
    piece = Piece(Checkpoint.open(folder).tensor("w"), "trunk", 0, "F32")
    owner.allocate("trunk", "trunk", 2)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(OperatorError, match=r"model.safetensors: not the file that is served any more"):
        owner.load([piece])
    file.unlink()
    with pytest.raises(OperatorError, match=r"model.safetensors: cannot be read: No such file"):
        owner.load([piece])
    file.mkdir()
    with pytest.raises(OperatorError, match=r"model.safetensors: cannot be read: Is a directory"):
        owner.load([piece])
    owner.free("trunk")  # a failed load holds nothing


def test_an_error_of_the_disk_may_pass(owner: MemoryOwner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that it is no mistake of the operator's, which would not be tried again."""
    folder = write_checkpoint(tmp_path / "toy", {"model.safetensors": {"w": torch.ones(2048)}})
    piece = Piece(Checkpoint.open(folder).tensor("w"), "trunk", 0, "F32")
    owner.allocate("trunk", "trunk", 2)

    def broken(*_: object) -> int:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", broken)
        with pytest.raises(InternalError, match=r"model.safetensors: cannot be read: Input/output error"):
            owner.load([piece])
    owner.load([piece])
    assert as_tensor(owner, "trunk", torch.float32, (2048,)).all()


def test_a_file_that_is_written_over_while_it_is_read_is_named(owner: MemoryOwner, tmp_path: Path) -> None:
    whole = {"v": torch.ones(1024), "w": torch.ones(1024)}
    folder = write_checkpoint(tmp_path / "toy", {"model.safetensors": whole})
    file, checkpoint = folder / "model.safetensors", Checkpoint.open(folder)
    pieces = [Piece(checkpoint.tensor(name), "trunk", n * 4096, "F32") for n, name in enumerate(whole)]
    owner.allocate("trunk", "trunk", 2)

    def shrink(done: int, total: int) -> None:
        if done < total:
            os.truncate(file, pieces[1].source.offset)

    with pytest.raises(OperatorError, match=r"model.safetensors: tensor 'w': the file ends at byte"):
        owner.load(pieces, shrink)

    def write_over(_done: int, _total: int) -> None:
        write_checkpoint(folder, {"model.safetensors": {"v": torch.ones(1024), "w": torch.zeros(1024)}})

    write_checkpoint(folder, {"model.safetensors": whole})
    with pytest.raises(OperatorError, match=r"model.safetensors: not the file that is served any more"):
        owner.load(pieces, write_over)
    write_checkpoint(folder, {"model.safetensors": whole})
    owner.load(pieces)
    assert torch.equal(as_tensor(owner, "trunk", torch.float32, (2048,)), torch.ones(2048))
    owner.free("trunk")


def test_files_are_looked_at_once_a_load_however_many_pieces(
    owner: MemoryOwner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = {f"x-{n}.safetensors": {f"w{n}": torch.full((64, 16), float(n))} for n in range(3)}
    checkpoint = Checkpoint.open(write_checkpoint(tmp_path / "toy", shards))
    sources = [checkpoint.tensor(f"w{n}").at(row) for row in range(64) for n in range(3)]
    pieces = [Piece(source, "trunk", 64 * at, "F32") for at, source in enumerate(sources)]
    looks, of = [0], FileIdentity.of

    def counted(fd: int, data_start: int) -> FileIdentity:
        looks[0] += 1
        return of(fd, data_start)

    monkeypatch.setattr(FileIdentity, "of", counted)
    owner.allocate("trunk", "trunk", 3)
    owner.load(pieces)
    assert looks == [2 * 3]  # before its first piece and after its last one
    assert as_tensor(owner, "trunk", torch.float32, (192, 16))[:, 0].tolist() == [0.0, 1.0, 2.0] * 64


def test_an_extent_being_loaded_is_held(owner: MemoryOwner, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "toy", {"model.safetensors": {"w": torch.ones(8)}})
    owner.allocate("trunk", "trunk", 1)
    held: list[str] = []
    owner.load(
        [Piece(Checkpoint.open(folder).tensor("w"), "trunk", 0, "F32")], lambda _d, _t: held.extend(owner.held("trunk"))
    )
    assert held == ["trunk"]


def test_impossible_configurations_are_refused() -> None:
    for change, message in (
        ({"pages": 3}, "its table alone needs"),
        ({"page_bytes": 5000}, "page_bytes: expected a power of two"),
        ({"token": ""}, "token: expected a non-empty secret"),
    ):
        config = OwnerConfig(**{"name": "bad", "pages": 128, "page_bytes": PAGE, "token": "t"} | change)  # type: ignore[arg-type]
        with pytest.raises(OperatorError, match=message):
            MemoryOwner(config)


def test_only_one_owner_serves_a_name(owner: MemoryOwner) -> None:
    with pytest.raises(OperatorError, match="cannot listen"):
        MemoryOwner(CONFIG)
    with pytest.raises(OperatorError, match="cannot listen"):
        MemoryOwner.adopt(CONFIG, owner.pool.fd)


def test_a_closed_owner_gives_its_memory_back() -> None:
    owner = MemoryOwner(CONFIG)
    extent = owner.allocate("trunk", "trunk", 3)
    pool = fetch_pool(owner.address, "secret")
    tensor = view(map_pages(pool, extent.pages), torch.uint8, (PAGE,))
    tensor.fill_(5)
    owner.close()
    with pytest.raises(InternalError, match="no answer"):
        fetch_pool(owner.address, "secret")
    assert int(tensor.max()) == 5
    adopted = MemoryOwner.adopt(CONFIG, pool.fd)
    assert adopted.extent("trunk") == extent
    assert adopted.held("trunk") == ["trunk"]
    adopted.close()
    pool.close()


def test_adoption_checks_that_it_is_the_right_pool() -> None:
    owner = MemoryOwner(CONFIG)
    fd = os.dup(owner.pool.fd)
    owner.close()
    for config, message in (
        (OwnerConfig("other", 128, PAGE, "secret"), "expected .*'other'.* found .*owner-test"),
        (OwnerConfig(CONFIG.name, 64, PAGE, "secret"), "expected .*pages=64.* found .*pages=128"),
    ):
        with pytest.raises(OperatorError, match=message):
            MemoryOwner.adopt(config, fd)
    os.pwrite(fd, b"\xff" * 8192, 4096)
    os.pwrite(fd, b"\xff" * 65536, 8192)
    for _ in range(2):  # a refused adoption leaves the address free
        with pytest.raises(OperatorError, match="both copies of its page table are damaged"):
            MemoryOwner.adopt(CONFIG, fd)
    os.close(fd)


def test_adoption_empties_pages_that_the_old_owner_noted_as_free_but_did_not_empty() -> None:
    owner = MemoryOwner(CONFIG)
    free = owner.allocate("probe", "kv", 1).pages[0]
    owner.free("probe")
    os.pwrite(owner.pool.fd, b"stale", free * PAGE)
    fd = os.dup(owner.pool.fd)
    owner.close()
    adopted = MemoryOwner.adopt(CONFIG, fd)
    os.close(fd)
    assert adopted.allocate("kv/w0", "kv", 1).pages == (free,)
    assert not as_tensor(adopted, "kv/w0", torch.uint8, (PAGE,)).any()
    adopted.close()


def test_weights_get_huge_pages_where_the_kernel_has_some_and_small_ones_elsewhere() -> None:
    pages = 8 * HUGE_BYTES // (64 << 10)
    owner = MemoryOwner(OwnerConfig(CONFIG.name + "-huge", pages, 64 << 10, "secret"))
    extent = owner.allocate("trunk", "trunk", 3 * HUGE_BYTES // (64 << 10))
    assert 0 <= owner.stats().huge_regions <= 4
    mapped = map_pages(owner.pool, extent.pages)
    mapped.memory()[:] = bytes(range(256)) * (mapped.nbytes // 256)
    del mapped
    owner.allocate("kv/w0", "kv", 64)
    regions = owner.stats().huge_regions
    owner.allocate("expert/0/0", "experts", 64)
    assert owner.stats().huge_regions >= regions
    assert as_tensor(owner, "trunk", torch.uint8, (3 * HUGE_BYTES,)).view(-1, 256).float().std(0).max() == 0
    owner.free("trunk", "expert/0/0")
    assert owner.stats().huge_regions <= 1  # the table's region may be one
    assert owner.stats().resident_bytes <= 2 * HUGE_BYTES
    owner.close()


def test_collapsing_goes_on_after_refusals_and_spares_regions_with_free_pages(owner: MemoryOwner) -> None:
    size = HUGE_BYTES // 2
    big = MemoryOwner(OwnerConfig(CONFIG.name + "-regions", 12, size, "secret", huge_pages=False))
    window = MemfdRange(12, size, hold=False)
    window.map(0, big.pool, range(12))
    asked: list[int] = []

    def every_second(address: int, nbytes: int) -> bool:
        if nbytes > HUGE_BYTES:  # adjoining ones are tried together first
            return False
        asked.append((address - window.address) // HUGE_BYTES)
        return asked[-1] % 2 == 0

    huge = HugePages(window, every_second)
    assert huge.collapse([(1, 9)], [(5, 1), (11, 1)]) == 2
    assert asked == [0, 1, 3, 4]
    assert huge.regions == 2
    assert huge.collapse([(0, 12)], []) == 1  # those won are not asked for again; refused ones are
    assert asked[4:] == [1, 2, 3, 5]
    huge.forget([(0, 1)])
    assert huge.regions == 2
    big.close()


@pytest.mark.parametrize("huge_pages", [False, True])
def test_a_pool_that_reserves_its_memory_keeps_it(huge_pages: bool) -> None:
    """P12."""
    size = 64 << 10
    pages = 4 * HUGE_BYTES // size + 3  # the last region is not whole
    config = OwnerConfig(f"{CONFIG.name}-kept-{huge_pages}", pages, size, "secret", huge_pages, reserve=True)
    owner = MemoryOwner(config)
    extents = owner.allocate_all([ExtentRequest("trunk", "trunk", 7), ExtentRequest("exchange/1", "exchange", 40)])
    mapped = [map_pages(owner.pool, extent.pages) for extent in extents]
    for memory in mapped:
        memory.memory()[:] = b"x" * memory.nbytes
    assert owner._reserved
    owner._reserved.wait()
    assert owner.stats().resident_bytes == pages * size
    assert all(bytes(memory.memory()) == b"x" * memory.nbytes for memory in mapped)
    del mapped, memory
    regions = owner.stats().huge_regions
    owner.free("trunk")
    owner.trim("exchange/1", extents[1].pages[::2])
    assert (owner.stats().resident_bytes, owner.stats().huge_regions) == (pages * size, regions)

    fd = os.dup(owner.pool.fd)
    owner.close()
    adopted = MemoryOwner.adopt(config, fd)
    os.close(fd)
    assert adopted.stats().resident_bytes == pages * size
    free = adopted.usage()["free"]
    assert adopted.allocate("exchange/2", "exchange", free).pages
    whole = as_tensor(adopted, "exchange/2", torch.uint8, (free * size,))
    assert not whole.any(), "only weights and KV may begin with what was there"
    assert as_tensor(adopted, "exchange/1", torch.uint8, (20 * size,)).eq(ord("x")).all()
    adopted.close()


def test_a_pool_keeps_freed_memory_until_nothing_is_left_in_it() -> None:
    """P12."""
    config = replace(CONFIG, name=CONFIG.name + "-keeps", huge_pages=False, ledger_record_bytes=64, keep=True)
    owner = MemoryOwner(config)
    empty = owner.stats().resident_bytes
    extents = owner.allocate_all([ExtentRequest("expert/0/0", "experts", 9), ExtentRequest("kv/w0", "kv", 20)])
    for extent in extents:
        map_pages(owner.pool, extent.pages).memory()[:] = b"x" * (len(extent.pages) * PAGE)
    full = owner.stats().resident_bytes
    assert full == empty + 29 * PAGE
    owner.trim("kv/w0", extents[1].pages[5:])
    owner.free("expert/0/0")
    assert owner.stats().resident_bytes == full
    again = owner.allocate_all([ExtentRequest("expert/0/1", "experts", 6), ExtentRequest("exchange/1", "exchange", 6)])
    assert owner.stats().resident_bytes == full
    assert not as_tensor(owner, "exchange/1", torch.uint8, (6 * PAGE,)).any(), "only weights and KV begin with it"
    assert {page for extent in again for page in extent.pages} <= {page for extent in extents for page in extent.pages}
    fd = os.dup(owner.pool.fd)
    owner.close()
    adopted = MemoryOwner.adopt(config, fd)
    os.close(fd)
    assert adopted.stats().resident_bytes == full
    adopted.free("exchange/1", "kv/w0")
    assert adopted.stats().resident_bytes == full
    adopted.free("expert/0/1")
    assert adopted.stats().resident_bytes == empty
    adopted.close()


def test_what_an_owner_that_died_did_not_give_back_goes_when_its_empty_pool_is_adopted() -> None:
    config = replace(CONFIG, name=CONFIG.name + "-late", huge_pages=False, keep=True)
    owner = MemoryOwner(config)
    empty, fd = owner.stats().resident_bytes, os.dup(owner.pool.fd)
    map_pages(owner.pool, range(100, 110)).memory()[:] = b"x" * (10 * PAGE)
    owner.close()
    adopted = MemoryOwner.adopt(config, fd)
    os.close(fd)
    assert adopted.stats().resident_bytes == empty
    adopted.close()


def test_a_pool_serves_on_where_not_all_of_its_memory_can_be_reserved(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refused(_fd: int, _offset: int, _nbytes: int) -> None:
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(os, "posix_fallocate", refused)
    owner = MemoryOwner(replace(CONFIG, name=CONFIG.name + "-poor", reserve=True))
    assert owner._reserved
    owner._reserved.wait()
    there = owner.stats().resident_bytes  # its table
    assert f"-poor': only {there} of {128 * PAGE} bytes reserved: [Errno 28] no space" in caplog.text
    map_pages(owner.pool, owner.allocate("kv/w0", "kv", 3).pages).memory()[:] = b"x" * (3 * PAGE)
    assert as_tensor(owner, "kv/w0", torch.uint8, (3 * PAGE,)).eq(ord("x")).all()
    owner.close()


def test_an_owner_that_ends_does_not_wait_until_all_is_reserved(monkeypatch: pytest.MonkeyPatch) -> None:
    begun, go_on, asked = threading.Event(), threading.Event(), []

    def slow(_fd: int, offset: int, _nbytes: int) -> None:
        asked.append(offset)
        begun.set()
        go_on.wait()

    monkeypatch.setattr(os, "posix_fallocate", slow)
    owner = MemoryOwner(OwnerConfig(CONFIG.name + "-brief", 4096, 2 << 20, "secret", huge_pages=False, reserve=True))
    begun.wait()
    with ThreadPoolExecutor(1) as threads:
        closing = threads.submit(owner.close)
        assert owner._reserved
        while not owner._reserved._stopped.is_set():
            pass
        go_on.set()
        closing.result()
    assert asked == [0]


def test_many_threads_leave_the_accounting_right(owner: MemoryOwner) -> None:
    """P1, P2."""
    whole = owner.usage()

    def churn(which: int) -> None:
        for n in range(25):
            owner.allocate(f"kv/{which}", "kv", 1 + (n + which) % 4)
            assert sum(owner.usage().values()) == CONFIG.pages
            owner.rename(f"kv/{which}", f"expert/{which}", "experts")
            owner.free(f"expert/{which}")

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(churn, range(4)))
    assert owner.usage() == whole


def test_an_extent_is_a_value() -> None:
    extent = Extent("kv/w0", "kv", (3, 4))
    assert pickle.loads(pickle.dumps(extent)) == extent


def test_a_pool_of_a_whole_nodes_addresses_costs_next_to_nothing() -> None:
    pages = (64 << 30) // (64 << 10)
    owner = MemoryOwner(OwnerConfig(CONFIG.name + "-vast", pages, 64 << 10, "secret", ledger_record_bytes=128))
    owner.allocate("expert/0/0", "experts", 3)
    owner.extend("kv/w0", "kv", 500)
    owner.trim("kv/w0", owner.extent("kv/w0").pages[::2])
    assert len(owner._window._mapped) == 1
    assert owner.stats().resident_bytes <= 1 << 20
    assert len(owner._huge._touched([(0, 64)])) == 2
    assert sum(owner.usage().values()) == pages
    owner.close()
