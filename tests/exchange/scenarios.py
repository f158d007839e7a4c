"""What members of an exchange do together in tests; each takes the exchange, returns something JSON can hold."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from concertina.errors import InternalError, PeerLost
from concertina.planners.placement import Placement, Replica
from concertina.workers.exchange.base import Exchange
from concertina.workers.exchange.parallel import ParallelExperts
from torch import Tensor

DTYPES = (
    torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2,
    torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool, torch.complex64,
)  # fmt: skip


def message(key: str, rows: int, width: int, dtype: torch.dtype) -> Tensor:
    """Rows that everybody can make again from ``key``."""
    rng = random.Random(key)
    if dtype == torch.bool:
        return torch.tensor([rng.random() < 0.5 for _ in range(rows * width)], dtype=dtype).view(rows, width)
    data = bytearray(rng.randbytes(rows * width * dtype.itemsize))
    return torch.frombuffer(data, dtype=dtype).view(rows, width) if data else torch.empty(rows, width, dtype=dtype)


def same(a: Tensor, b: Tensor) -> bool:
    """Equal bit for bit (NaN too)."""
    return a.shape == b.shape and a.dtype == b.dtype and (
        a.numel() == 0 or torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
    )  # fmt: skip


def check_round(ex: Exchange, key: str, splits_SS: Sequence[Sequence[int]], width: int, dtype: torch.dtype) -> None:
    """One dispatch and the way back, checked row by row. ``splits_SS[source][destination]`` rows travel."""
    mine = splits_SS[ex.rank]
    sent = torch.cat([message(f"{key}/{ex.rank}/{d}", n, width, dtype) for d, n in enumerate(mine)])
    got, out_splits = ex.dispatch(sent, mine)
    assert out_splits == [row[ex.rank] for row in splits_SS], (key, out_splits)
    expected = torch.cat([message(f"{key}/{s}/{ex.rank}", n, width, dtype) for s, n in enumerate(out_splits)])
    assert same(got, expected), (key, "dispatch", width, dtype)
    assert same(ex.combine(got, out_splits, mine), sent), (key, "combine", width, dtype)


def random_rounds(ex: Exchange, seed: int, rounds: int, max_rows: int = 6, max_width: int = 40) -> int:
    """Random splits, widths and types, many of them zero, with agreements between."""
    rng = random.Random(seed)
    for i in range(rounds):
        splits = [[rng.choice((0, rng.randint(0, max_rows))) for _ in range(ex.size)] for _ in range(ex.size)]
        check_round(ex, f"{seed}/{i}", splits, rng.randint(0, max_width), rng.choice(DTYPES))
        if rng.random() < 0.5:
            low, high = -(2**63), 2**63 - 1
            assert ex.all_gather([ex.rank, i, low, high]) == [[r, i, low, high] for r in range(ex.size)]
    return rounds


def every_dtype(ex: Exchange) -> int:
    for dtype in DTYPES:
        check_round(ex, str(dtype), [[s + d for d in range(ex.size)] for s in range(ex.size)], 5, dtype)
    return len(DTYPES)


def large(ex: Exchange, nbytes: int, rounds: int = 3) -> int:
    """Messages of ``nbytes`` from everyone to the next and of other sizes to others."""
    for i in range(rounds):
        splits = [
            [nbytes // 512 // (1 + (d - s - 1) % ex.size) for d in range(ex.size)] for s in range(ex.size)
        ]  # fmt: skip
        check_round(ex, f"large/{i}", splits, 512, torch.uint8)
        check_round(ex, f"small/{i}", [[1] * ex.size] * ex.size, 8, torch.uint8)
    return rounds


def overlapped(ex: Exchange, rounds: int = 20) -> int:
    """A dispatch in two halves; another call between them is refused."""
    for i in range(rounds):
        x = torch.full((ex.size, 3), float(10 * ex.rank + i))
        pending = ex.begin_dispatch(x, [1] * ex.size)
        ex.ring()  # allowed at any time, here as from another thread
        with pytest.raises(InternalError, match="pending"):
            ex.all_gather([1])
        rows, splits = pending.wait()
        assert splits == [1] * ex.size
        assert rows[:, 0].tolist() == [10.0 * r + i for r in range(ex.size)]
    return rounds


def doorbell_stress(ex: Exchange, seed: int, items: int) -> int:
    """The engine's loop: work comes from other threads at any moment, each piece is announced by a ring.

    A lost wake-up shows as a wait that lasts its whole time-out.
    """
    inbox: list[int] = []
    rng = random.Random(seed * 100 + ex.rank)
    pauses = [rng.choice((0.0, 0.0, 0.0002, 0.002)) for _ in range(items)]

    def feed() -> None:
        for n, pause in enumerate(pauses):
            time.sleep(pause)
            inbox.append(n)
            ex.ring()

    feeder = threading.Thread(target=feed)
    feeder.start()
    done, overslept = 0, 0
    while True:
        seen = ex.doorbell()
        mine = len(inbox)
        rows = ex.all_gather([mine, done])
        if sum(r[1] for r in rows) == items * ex.size:
            break
        if any(r[0] for r in rows):
            del inbox[:mine]
            done += mine
            continue
        began = time.monotonic()
        ex.wait(seen, 20.0)
        overslept += time.monotonic() - began >= 20.0
    feeder.join()
    assert not overslept, f"{overslept} wake-ups were lost"
    return done


def idle_cpu(ex: Exchange, idle_s: float) -> float:
    """CPU seconds that this process uses while it waits for a doorbell that nobody rings."""
    ex.all_gather([0])
    seen = ex.doorbell()
    ex.all_gather([0])
    began = time.process_time()
    ex.wait(seen, idle_s)
    used = time.process_time() - began
    ex.all_gather([0])
    return used


def until_lost(
    ex: Exchange, rows: int = 3, width: int = 64, nap_s: float = 0.0, told_s: float | None = None
) -> list[Any]:
    """Exchange until a peer is lost: its rank, the reason, and whether each later call says the same.

    After ``told_s`` somebody else says so.
    """
    x = torch.ones(rows * ex.size, width)
    if told_s is not None:
        threading.Timer(told_s, ex.give_up, ["so it was told"]).start()
    try:
        while True:
            got, splits = ex.dispatch(x, [rows] * ex.size)
            ex.combine(got, splits, [rows] * ex.size)
            time.sleep(nap_s)
    except PeerLost as lost:
        return [lost.rank, lost.reason, all(_raises(call, lost) for call in _calls(ex, x, rows))]


def idle_until_lost(ex: Exchange) -> list[Any]:
    """As `until_lost`, but asleep on the doorbell."""
    try:
        while True:
            ex.wait(ex.doorbell(), 30.0)
    except PeerLost as lost:
        return [lost.rank, lost.reason, True]


def look_until_lost(ex: Exchange) -> list[Any]:
    """As `until_lost`, but in no call: it looks now and then."""
    try:
        while True:
            ex.check()
            time.sleep(0.01)
    except PeerLost as lost:
        return [lost.rank, lost.reason, True]


def _calls(ex: Exchange, x: Tensor, rows: int) -> list[Callable[[], Any]]:
    splits = [rows] * ex.size
    return [
        lambda: ex.all_gather([1]),
        lambda: ex.dispatch(x, splits),
        lambda: ex.combine(x, splits, splits),
        lambda: ex.begin_dispatch(x, splits),
        ex.doorbell,
        lambda: ex.wait(0, 1.0),
        ex.ring,
        ex.check,
    ]


def _raises(call: Callable[[], Any], expected: PeerLost) -> bool:
    try:
        call()
    except PeerLost as lost:
        return (lost.rank, lost.reason) == (expected.rank, expected.reason)
    return False


def random_placement(rng: random.Random, devices: int, layers: int, experts: int) -> Placement:
    """Uneven: devices without experts, and experts with up to all devices as replicas."""
    plan = []
    for _ in range(layers):
        usable = rng.sample(range(devices), rng.randint(1, devices))
        slots = [0] * devices
        layer = []
        for _ in range(experts):
            on = rng.sample(usable, rng.choice((1, 1, rng.randint(1, len(usable)))))
            weights = [rng.uniform(0.1, 1.0) for _ in on]
            layer.append(tuple(Replica(d, slots[d], w / sum(weights)) for d, w in zip(on, weights, strict=True)))
            for d in on:
                slots[d] += 1
        plan.append(tuple(layer))
    return Placement(tuple(f"d{i}" for i in range(devices)), tuple(plan))


def reference_moe(x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor, w_EHH: Tensor) -> Tensor:
    """The definition of a weighted mixture, with one matrix and a ReLU per expert; float32."""
    y_TH = torch.zeros(x_TH.shape)
    for t, choices in enumerate(ids_TK.tolist()):
        for k, e in enumerate(choices):
            if e >= 0:
                y_TH[t] += weights_TK[t, k] * torch.relu(x_TH[t].float() @ w_EHH[e])
    return y_TH


def expert_parallel(ex: Exchange, seed: int, batches: int = 6, overlap_tokens: int = 256) -> list[int]:
    """`ParallelExperts` agrees with the reference over all experts; returns the pairs this member routed."""
    rng = random.Random(seed)
    layers, experts, hidden, k = rng.randint(1, 3), rng.randint(1, 9), rng.randint(1, 24), rng.randint(1, 3)
    dtype = rng.choice((torch.float32, torch.bfloat16, torch.float64))
    placement = random_placement(rng, ex.size, layers, experts)
    w_LEHH = torch.randn(layers, experts, hidden, hidden, generator=torch.Generator().manual_seed(seed))

    def local(layer: int, x_NH: Tensor, slots_NK: Tensor, weights_NK: Tensor) -> Tensor:
        assert x_NH.shape[0] > 0
        assert x_NH.is_contiguous()
        assert (slots_NK.dtype, weights_NK.dtype, x_NH.dtype) == (torch.int64, torch.float32, dtype)
        assert ex.size == 1 or (slots_NK >= 0).any(1).all(), "a row came that has nothing to do here"
        held = placement.experts_LD[layer][ex.rank]
        return reference_moe(x_NH, slots_NK, weights_NK, w_LEHH[layer, list(held)])

    parallel = ParallelExperts(ex, placement, local, overlap_tokens=overlap_tokens)
    own = random.Random(f"{seed}/{ex.rank}")
    routed = 0
    for batch in range(batches):
        tokens, layer = own.choice((0, own.randint(1, 7))), batch % layers
        x = torch.randn(tokens, hidden, generator=torch.Generator().manual_seed(own.getrandbits(30))).to(dtype)
        ids = torch.tensor([[own.randint(-1, experts - 1) for _ in range(k)] for _ in range(tokens)]).view(-1, k)
        weights = torch.tensor([[own.random() for _ in range(k)] for _ in range(tokens)]).view(-1, k)
        y = parallel(layer, x, ids.long(), weights)
        tolerance = 0.03 if dtype == torch.bfloat16 else 1e-4
        expected = reference_moe(x, ids.long(), weights, w_LEHH[layer])
        assert y.dtype == dtype
        torch.testing.assert_close(y.float(), expected, rtol=tolerance, atol=tolerance * 10)
        routed += int((ids >= 0).sum())
    assert int(parallel.counts_LE.sum()) == routed
    return parallel.counts_LE.sum(0).tolist()


ALL: dict[str, Callable[..., Any]] = {
    f.__name__: f
    for f in (
        random_rounds, every_dtype, large, overlapped, doorbell_stress, idle_cpu, until_lost, idle_until_lost,
        look_until_lost, expert_parallel,
    )
}  # fmt: skip
