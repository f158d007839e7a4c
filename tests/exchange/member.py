"""A member process: ``python -m tests.exchange.member``, one JSON command per line in, one answer per line out."""

from __future__ import annotations

import json
import mmap
import os
import sys
import traceback
from typing import Any

import torch
from concertina.errors import PeerLost
from concertina.workers.exchange.base import Exchange
from concertina.workers.exchange.group import GroupExchange, Rendezvous
from concertina.workers.exchange.liveness import MemberLocks
from concertina.workers.exchange.shared import SharedMemoryExchange

from .scenarios import ALL


def join(kind: str, rank: int, size: int, timeout_s: float, where: dict[str, Any]) -> Exchange:
    """Join an exchange that the parent has prepared."""
    if kind == "gloo":
        return GroupExchange(Rendezvous("127.0.0.1", where["port"], where["prefix"]), rank, size, timeout_s)
    fd = os.open(where["path"], os.O_RDWR)
    region, locks = mmap.mmap(fd, 0), MemberLocks(fd, where["base"])
    os.close(fd)
    return SharedMemoryExchange(region, rank, size, where["capacity"], timeout_s, locks)


def main() -> None:
    torch.set_num_threads(1)
    exchange: Exchange | None = None
    print(json.dumps({"ok": "ready"}), flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        try:
            result: Any = None
            if command["do"] == "join":
                exchange = join(**command["args"])
            elif command["do"] == "leave":
                if exchange is not None:
                    exchange.close()
                exchange = None
            else:
                result = ALL[command["do"]](exchange, **command["args"])
            answer = {"ok": result}
        except PeerLost as lost:
            answer = {"error": f"PeerLost: {lost}", "lost": [lost.rank, lost.reason]}
        except Exception:  # noqa: BLE001 - handed to the parent, which fails the test
            answer = {"error": traceback.format_exc()}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
