"""Who answers at an address, without waiting for those who do not."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Awaitable, Callable

import pytest
from concertina.orchestrator import knocking
from concertina.orchestrator.knocking import Address, Knocking


async def until(holds: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(5.0):
        while not await holds():
            await asyncio.sleep(0.01)


def address_of(listener: socket.socket) -> Address:
    host, port = listener.getsockname()[:2]
    return host, port


def test_who_listens_answers_and_who_is_gone_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knocking, "_FRESH_S", 100.0)

    async def go() -> None:
        here, gone = socket.create_server(("127.0.0.1", 0)), socket.create_server(("127.0.0.1", 0))
        both = [address_of(here), address_of(gone)]
        gone.close()
        door = Knocking()
        await until(lambda: only(door, both, both[0]))
        here.close()
        assert await door.answering(both[:1]) == {both[0]}  # an answer of just now is taken
        door.doubt()
        await until(lambda: only(door, both))

    asyncio.run(go())


async def only(door: Knocking, asked: list[Address], *expected: Address) -> bool:
    return await door.answering(asked) == set(expected)


def test_answers_are_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knocking, "_FRESH_S", 0.0)

    async def go() -> None:
        door, listener = Knocking(), socket.create_server(("127.0.0.1", 0))
        address = address_of(listener)
        assert await door.answering([address]) == {address}
        listener.close()
        await until(lambda: only(door, [address]))
        with socket.create_server(address):
            await until(lambda: only(door, [address], address))

    asyncio.run(go())


def test_who_is_silent_counts_for_two_tries_and_nobody_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knocking, "_ANSWER_S", 0.1)

    async def go() -> None:
        with socket.create_server(("127.0.0.1", 0), backlog=0) as full:
            address = address_of(full)
            held = [await asyncio.open_connection(*address)]  # what else comes now is not answered
            door = Knocking()
            begin_s = time.monotonic()
            assert await door.answering([address]) == {address}
            assert time.monotonic() - begin_s < 0.09
            await until(lambda: only(door, [address]))
            assert time.monotonic() - begin_s >= 0.2
            held[0][1].close()

    asyncio.run(go())


def test_a_look_takes_no_time() -> None:
    async def go() -> float:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            door, address = Knocking(), address_of(listener)
            begin_s = time.monotonic()
            for _ in range(200):
                await door.answering([address])
            return (time.monotonic() - begin_s) / 200

    assert asyncio.run(go()) < 0.002
