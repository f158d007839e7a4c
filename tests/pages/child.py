"""A process under test: an owner, or a holder of pages. One JSON call a line on stdin, one JSON answer on stdout.

Run as ``python child.py owner CONFIG [ADOPT_FROM]``, ``python child.py service CONFIG`` or ``python child.py holder``.
"""

from __future__ import annotations

import dataclasses
import json
import pickle
import sys
from typing import Any

from concertina.workers.loading import Piece
from concertina.workers.owner import MemoryOwner
from concertina.workers.owner_roles import OwnerConfig
from concertina.workers.pages.memfd import MemfdPool, map_pages
from concertina.workers.pages.ranges import MemfdRange
from concertina.workers.pages.sharing import PoolServer, fetch_pool
from concertina.workers.pages.table import ExtentRequest
from concertina.workers.pages.transfer import CopyPlan
from concertina.workers.services import OwnerService


class Owner:
    """A `MemoryOwner` with a few more calls."""

    def __init__(self, config: str, adopt_from: str | None = None) -> None:
        parsed = OwnerConfig(**json.loads(config))
        self.owner = MemoryOwner.adopt(parsed, adopt_from) if adopt_from else MemoryOwner(parsed)

    def modules(self) -> list[str]:
        return [name for name in ("torch", "ray", "transformers") if name in sys.modules]

    def churn(self) -> None:
        """Allocate and free for ever, printing a line each time; the owner is to be killed meanwhile."""
        n = 0
        while True:
            extent = self.owner.allocate(f"kv/{n}", "kv", 1 + n % 5)
            window = map_pages(self.owner.pool, extent.pages)
            window.memory()[:] = b"\xaa" * window.nbytes
            del window
            if n >= 8:
                self.owner.free(f"kv/{n - 8}")
            print(n, flush=True)
            n += 1

    def __getattr__(self, name: str) -> Any:
        return getattr(self.owner, name)


class Service:
    """An `OwnerService` with a few more calls, which go on until it is killed and print a line each time."""

    def __init__(self, config: str) -> None:
        self.service = OwnerService(OwnerConfig(**json.loads(config)))

    def refill(self, pieces: list[str], copies: list[str]) -> None:
        """Fill and free the extents of pickled pieces, one page each, from there and from peers."""
        parsed: list[Piece] = [pickle.loads(bytes.fromhex(piece)) for piece in pieces]
        plans: list[CopyPlan] = [pickle.loads(bytes.fromhex(plan)) for plan in copies]
        keys = list(dict.fromkeys(piece.key for piece in parsed))
        while True:
            print("filling", flush=True)
            self.service.fill([ExtentRequest(key, "experts", 1) for key in keys], parsed, plans)
            print("filled", flush=True)
            self.service.free(keys)

    def churn(self) -> None:
        """Note records for pages of kv/used, and never for those of kv/fresh."""
        owner, record_bytes = self.service._owner, self.service.config().ledger_record_bytes
        ledger = map_pages(owner.pool, owner.extent("ledger").pages)
        n = 0
        while True:
            used = self.service.extend("kv/used", "kv", 1 + n % 7)
            for page in used:
                ledger.memory(page * record_bytes, record_bytes)[:] = b"\xff" * record_bytes
            fresh = self.service.extend("kv/fresh", "kv", 1 + n % 5)
            self.service.trim("kv/used", used[n % 3 :: 2])
            self.service.relabel("kv/fresh", fresh[n % 2 :: 2], "kv/fresh2")
            self.service.trim("kv/fresh", [])
            if n % 4 == 0:
                self.service.free(["kv/fresh2", "kv/used"])
            print(n, flush=True)
            n += 1


class Holder:
    """Maps pages and reads and writes them."""

    def map(self, address: str, token: str, pages: list[int]) -> None:
        self.pool: MemfdPool = fetch_pool(address, token)
        self.mapped: MemfdRange = map_pages(self.pool, pages)

    def read(self, offset: int, nbytes: int) -> str:
        return bytes(self.mapped.memory(offset, nbytes)).hex()

    def write(self, offset: int, data: str) -> None:
        self.mapped.memory(offset, len(data) // 2)[:] = bytes.fromhex(data)

    def serve(self, address: str, token: str) -> None:
        self.server = PoolServer(self.pool, token, address)

    def unmap(self) -> None:
        del self.mapped


def plain(value: Any) -> Any:
    if isinstance(value, list):
        return [plain(item) for item in value]
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else value


def main() -> None:
    role: Any = {"owner": Owner, "service": Service, "holder": Holder}[sys.argv[1]](*sys.argv[2:])
    print(json.dumps({"value": "ready"}), flush=True)
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        try:
            answer = {"value": plain(getattr(role, name)(*arguments))}
        except Exception as e:  # noqa: BLE001  # whatever it is, the test wants to see it
            answer = {"error": f"{type(e).__name__}: {e}"}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
