"""Pages among processes that are really separate, and killed."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from concertina.workers.checkpoint import Checkpoint
from concertina.workers.loading import Piece
from concertina.workers.owner import MemoryOwner
from concertina.workers.owner_roles import OwnerConfig
from concertina.workers.pages.memfd import MemfdPool
from concertina.workers.pages.sharing import PoolServer, fetch_pool
from concertina.workers.pages.table import ExtentRequest
from concertina.workers.pages.transfer import CopyPlan, PageSource
from concertina.workers.services import OwnerService

from .tensor_files import raw, write_checkpoint

PAGE = 4096
CHILD = str(Path(__file__).with_name("child.py"))
pytestmark = pytest.mark.ray


class Child:
    """A `child.py`; `kill` is SIGKILL."""

    def __init__(self, *arguments: str, prefix: tuple[str, ...] = ()) -> None:
        command = [*prefix, sys.executable, CHILD, *arguments]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.answer()

    def line(self) -> str:
        assert self.process.stdout
        line = self.process.stdout.readline()
        assert line, f"child ended: {self.process.wait()}"
        return line

    def answer(self) -> Any:
        answer = json.loads(self.line())
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer["value"]

    def send(self, *call: Any) -> None:
        assert self.process.stdin
        self.process.stdin.write(json.dumps(call) + "\n")
        self.process.stdin.flush()

    def call(self, *call: Any) -> Any:
        self.send(*call)
        return self.answer()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe:
                pipe.close()


Start = Callable[..., Child]


@pytest.fixture
def start() -> Iterator[Start]:
    children: list[Child] = []

    def begin(*arguments: str, prefix: tuple[str, ...] = ()) -> Child:
        children.append(Child(*arguments, prefix=prefix))
        return children[-1]

    yield begin
    for child in children:
        child.kill()


@pytest.fixture
def config() -> dict[str, Any]:
    return {"name": f"processes-{os.getpid()}", "pages": 64, "page_bytes": PAGE, "token": "secret"}


def address(config: dict[str, Any]) -> str:
    return f"@concertina/{config['name']}"


def hold(start: Start, config: dict[str, Any], pages: list[int]) -> Child:
    holder = start("holder")
    holder.call("map", address(config), "secret", pages)
    return holder


def test_an_owner_imports_neither_torch_nor_ray(start: Start, config: dict[str, Any]) -> None:
    """P7."""
    assert start("owner", json.dumps(config)).call("modules") == []  # with the service, which its process imports too


def test_two_holders_share_the_owners_pages(start: Start, config: dict[str, Any]) -> None:
    owner = start("owner", json.dumps(config))
    owner.call("allocate", "kv/0", "kv", 1)
    pages = owner.call("allocate", "trunk", "trunk", 3)["pages"]
    first = hold(start, config, pages)
    second = hold(start, config, pages[::-1])
    first.call("write", 2 * PAGE + 10, b"shared".hex())
    assert bytes.fromhex(second.call("read", 10, 6)) == b"shared"
    assert second.call("read", PAGE, 2 * PAGE) == bytes(2 * PAGE).hex()


def test_a_killed_holder_lets_go(start: Start, config: dict[str, Any]) -> None:
    """P5: pages are held exactly while their holder lives."""
    owner = start("owner", json.dumps(config))
    holder = hold(start, config, owner.call("allocate", "trunk", "trunk", 3)["pages"])
    with pytest.raises(RuntimeError, match=r"PagesHeld: .*trunk"):
        owner.call("free", "trunk")
    holder.kill()
    owner.call("free", "trunk")
    assert owner.call("usage")["trunk"] == 0


def test_pages_outlive_a_killed_owner_and_are_adopted_with_table_and_data(start: Start, config: dict[str, Any]) -> None:
    """P4, P5: also the new owner knows what is mapped, though nobody told it."""
    owner = start("owner", json.dumps(config))
    for n in range(3):
        owner.call("allocate", f"expert/0/{n}", "experts", 2 + n)
    extents = owner.call("extents")
    holder = hold(start, config, owner.call("extent", "expert/0/1")["pages"])
    holder.call("write", PAGE, b"survives".hex())
    holder.call("serve", address(config) + "/holder", "secret")
    owner.kill()
    assert bytes.fromhex(holder.call("read", PAGE, 8)) == b"survives"

    adopted = start("owner", json.dumps(config), address(config) + "/holder")
    assert adopted.call("extents") == extents
    with pytest.raises(RuntimeError, match=r"PagesHeld: .*expert/0/1"):
        adopted.call("free", "expert/0/0", "expert/0/1")
    other = hold(start, config, adopted.call("extent", "expert/0/1")["pages"])
    assert bytes.fromhex(other.call("read", PAGE, 8)) == b"survives"
    other.call("write", PAGE, b"and more".hex())
    assert bytes.fromhex(holder.call("read", PAGE, 8)) == b"and more"
    for child in (holder, other):
        child.call("unmap")
    adopted.call("free", "expert/0/0", "expert/0/1")
    assert adopted.call("usage")["experts"] == 4


def test_an_owner_killed_at_any_moment_leaves_a_sound_pool(start: Start, config: dict[str, Any]) -> None:
    """P1, P2, P4."""
    for round_number in range(6):
        owner = start("owner", json.dumps(config))
        pool = fetch_pool(address(config), "secret")
        owner.send("churn")
        for _ in range(9 + 7 * round_number):
            owner.line()
        owner.kill()
        adopted = MemoryOwner.adopt(OwnerConfig(**config), pool.fd)
        pages = [page for extent in adopted.extents() for page in extent.pages]
        usage = adopted.usage()
        assert len(set(pages)) == len(pages) == config["pages"] - usage["free"]
        keys = sorted(int(e.key.split("/")[1]) for e in adopted.extents("kv/"))
        assert 8 <= len(keys) <= 9
        assert keys == list(range(keys[0], keys[0] + len(keys)))
        fresh = adopted.allocate("exchange/gen1", "exchange", usage["free"])
        assert not any(any(os.pread(pool.fd, PAGE, page * PAGE)) for page in fresh.pages)
        adopted.close()
        pool.close()


def lend(config: dict[str, Any]) -> tuple[MemfdPool, PoolServer]:
    """Hold a pool and lend it to the next owner, as a worker does."""
    pool = fetch_pool(address(config), "secret")
    return pool, PoolServer(pool, "secret", address(config) + "/lent")


def test_an_owner_killed_while_it_fills_leaves_whole_extents_only(
    start: Start, config: dict[str, Any], tmp_path: Path
) -> None:
    """P10: copying from a peer as well as reading files; a peer that is killed is no hindrance either."""
    values = torch.arange(32 * PAGE // 4, dtype=torch.float32).view(32, -1)
    whole = Checkpoint.open(write_checkpoint(tmp_path / "toy", {"model.safetensors": {"w": values}})).tensor("w")
    keys = [f"expert/0/{n}" for n in range(32)]
    pieces = [Piece(whole.at(n), key, 0, "F32") for n, key in enumerate(keys)]
    requests = [ExtentRequest(key, "experts", 1) for key in keys]
    peer = OwnerService(OwnerConfig(**config | {"name": config["name"] + "-peer"}))
    peer.fill(requests, pieces)
    for round_number in range(6):
        source = replace(peer.source(), address="") if round_number % 2 else peer.source()
        copies = [CopyPlan(key, source, peer.report().pages[key]) for key in keys[: round_number * 6]]
        child = start("service", json.dumps(config))
        pool, lent = lend(config)
        child.send("refill", *([pickle.dumps(item).hex() for item in items] for items in (pieces, copies)))
        for _ in range(1 + 2 * round_number):
            child.line()
        time.sleep(0.0005 * round_number)
        child.kill()
        owner = OwnerService(OwnerConfig(**config), lent.address)
        found = owner.report().pages
        assert owner.usage()["experts"] == len(found)
        for n, key in enumerate(keys):
            if key in found:
                assert os.pread(pool.fd, PAGE, found[key][0] * PAGE) == raw(values[n])
        owner.fill(requests, pieces, copies)
        assert all(
            os.pread(pool.fd, PAGE, owner.report().pages[key][0] * PAGE) == raw(values[n]) for n, key in enumerate(keys)
        )
        owner._owner.close()
        lent.close()
        pool.close()
    peer._owner.close()


def test_a_peer_killed_while_it_is_copied_from_is_replaced_by_the_checkpoint(
    start: Start, config: dict[str, Any], tmp_path: Path
) -> None:
    """P10."""
    size = 24 << 20
    values = torch.randint(0, 255, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    whole = Checkpoint.open(write_checkpoint(tmp_path / "toy", {"model.safetensors": {"w": values}})).tensor("w")
    large = config | {"pages": 16, "page_bytes": 2 << 20, "huge_pages": False}
    requests, pieces = [ExtentRequest("trunk", "trunk", 12)], [Piece(whole, "trunk", 0, "U8")]
    for n in range(3):
        peer = start("owner", json.dumps(large | {"name": f"{config['name']}-peer{n}"}))
        source = PageSource(**peer.call("source") | {"address": ""})
        pages = tuple(peer.call("allocate", "trunk", "trunk", 12)["pages"])
        owner = OwnerService(OwnerConfig(**large | {"name": f"{config['name']}-{n}"}))
        filling = threading.Thread(target=owner.fill, args=(requests, pieces, [CopyPlan("trunk", source, pages)]))
        filling.start()
        while not owner.report().copied_bytes:  # the first of two requests has been answered
            time.sleep(0)
        peer.kill()
        filling.join()
        data = b"".join(os.pread(owner._owner.pool.fd, 2 << 20, page << 21) for page in owner.report().pages["trunk"])
        # Either all of it had come, zeros as the peer had them, or all of it comes from the file.
        assert data in (bytes(size), raw(values)), n
        assert (data == raw(values)) == (owner.report().loaded_bytes == size)
        owner._owner.close()


def test_an_owner_killed_while_kv_changes_hands_leaves_empty_records(start: Start, config: dict[str, Any]) -> None:
    """P9, P1, P2, P4."""
    config |= {"ledger_record_bytes": 192}
    for round_number in range(5):
        child = start("service", json.dumps(config))
        pool, lent = lend(config)
        child.send("churn")
        for _ in range(5 + 9 * round_number):
            child.line()
        child.kill()
        owner = OwnerService(OwnerConfig(**config), lent.address)
        usage = owner.usage()
        assert sum(usage.values()) == config["pages"]
        owner.extend("kv/rest", "kv", usage["free"])
        ledger = b"".join(os.pread(pool.fd, PAGE, page * PAGE) for page in owner.report().pages["ledger"])
        for key in ("kv/fresh", "kv/fresh2", "kv/rest"):
            assert not any(any(ledger[page * 192 : (page + 1) * 192]) for page in owner.report().pages.get(key, ()))
        owner._owner.close()
        lent.close()
        pool.close()


def test_pages_are_shared_across_pid_namespaces(start: Start, config: dict[str, Any]) -> None:
    apart = ("unshare", "--pid", "--fork", "--kill-child")
    if subprocess.run([*apart, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this user may not make PID namespaces")
    owner = start("owner", json.dumps(config))
    pages = owner.call("allocate", "trunk", "trunk", 2)["pages"]
    holder = start("holder", prefix=apart)
    holder.call("map", address(config), "secret", pages)
    holder.call("write", 5, b"apart".hex())
    with pytest.raises(RuntimeError, match="PagesHeld"):
        owner.call("free", "trunk")
    near = hold(start, config, pages)
    assert bytes.fromhex(near.call("read", 5, 5)) == b"apart"
