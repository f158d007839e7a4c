"""A worker's part of a generation: pages mapped, model built over them, exchange joined."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..errors import InternalError
from ..kernels.moe import select_moe_kernel
from .adoption import Inheritance
from .background import unthrottled
from .batch_split import BatchSplit
from .device_kv import DeviceKV
from .exchange.base import Exchange
from .exchange.liveness import MemberLocks
from .exchange.parallel import LocalKernel, ParallelExperts
from .exchange.shared import SharedMemoryExchange
from .exchange.solo import SoloExchange
from .families.layout import expert_layout
from .generation import TRUNK_KEY, Assignment, expert_key
from .model.batch import Batch, Chunk
from .model.decoder import Decoder
from .model.kv import KVCache
from .model.views import DTYPES, expert_views, trunk_views
from .pages.memfd import MemfdPool, map_pages
from .pages.sharing import fetch_pool
from .pages.views import view

# Members' locks lie far behind the pages, whose bytes carry the locks of those who map them.
_LOCKS_BASE = 1 << 60


@dataclass(frozen=True, slots=True)
class Part:
    """What one worker runs of a generation. Its weights stay mapped as long as this object or its decoder lives.

    ``kv`` is the worker's, not the generation's: it was there before and stays. ``pools`` are by the names that the
    assignment has for them. ``inheritance`` is what it takes over as the generation comes, if it serves then.
    """

    assignment: Assignment
    decoder: Decoder
    kv: DeviceKV
    exchange: Exchange
    experts: ParallelExperts
    pools: Mapping[str, MemfdPool]
    inheritance: Inheritance | None = None

    @property
    def generation(self) -> int:
        return self.assignment.generation.id

    def close(self) -> None:
        """Leave the exchange; pages are let go with the last view of them."""
        self.exchange.close()
        if self.inheritance is not None:
            self.inheritance.close()


KVOf = Callable[[Assignment, MemfdPool], DeviceKV]


def join(
    assignment: Assignment,
    pools: Mapping[str, MemfdPool],
    kv_of: KVOf,
    abandoned: Callable[[], bool] = lambda: False,
    throttle: Callable[[], None] = unthrottled,
    *,
    cold: bool = True,
) -> Part:
    """Map pages and join the exchange, while another generation may be running in this process.

    Parameters
    ----------
    assignment : Assignment
    pools : mapping
        The assignment's, by the names that it has for them.
    kv_of : callable
        The worker's KV of the assignment's device, given the device's pool.
    abandoned : callable
        Whether the generation will not come; ends the wait for its other members.
    throttle : callable
        Called between pieces of the work: a model may be running that it shall not hold up.
    cold : bool
        Whether no model has run in this process: then a token goes through it, beside whoever else has joined.

    Raises
    ------
    InternalError, OperatorError
        The exchange cannot be joined.
    """
    generation = assignment.generation
    node, device = pools[assignment.node.name], pools[assignment.device.name]
    kernel = _local_kernel(assignment, device, throttle)
    trunk_u8 = _bytes(node, assignment.node.pages[TRUNK_KEY], writable=False)
    trunk = trunk_views(trunk_u8, generation.model, generation.dtype)
    kv = kv_of(assignment, device)
    if cold:
        _warm_up(assignment, trunk, kernel)
    throttle()
    exchange = _exchange(assignment, node, abandoned)  # last, because others wait for whoever has joined
    throttle()
    experts = ParallelExperts(exchange, generation.placement, kernel, BatchSplit(generation.placement))
    throttle()
    decoder = Decoder(generation.model, trunk, experts)
    return Part(assignment, decoder, kv, exchange, experts, pools)


def fetch_pools(assignment: Assignment) -> dict[str, MemfdPool]:
    """The pools of an assignment, by the names that it has for them; raises as `fetch_pool`."""
    extents = {part.name: part for part in (assignment.node, assignment.device)}
    return {name: fetch_pool(part.address, part.token) for name, part in extents.items()}


def _bytes(pool: MemfdPool, pages: tuple[int, ...], *, writable: bool) -> Tensor:
    """Pages as one uint8 tensor, which keeps them mapped."""
    mapped = map_pages(pool, pages, writable=writable)
    if not writable:  # weights: their first use shall not be slower than the second
        mapped.populate()
    return view(mapped, torch.uint8, (mapped.nbytes,))


def _local_kernel(assignment: Assignment, pool: MemfdPool, throttle: Callable[[], None]) -> LocalKernel:
    """The MoE kernel over this worker's physical experts, each a view of its pages."""
    generation, rank = assignment.generation, assignment.rank
    model, dtype = generation.model, generation.dtype
    nbytes = expert_layout(model, dtype).nbytes
    layers: list[tuple[list[Tensor], list[Tensor]]] = []
    for layer, experts_D in enumerate(generation.placement.experts_LD):
        keys = [expert_key(layer, expert) for expert in experts_D[rank]]
        extents = [assignment.device.pages[key] for key in keys]
        flat = _bytes(pool, tuple(p for pages in extents for p in pages), writable=False) if keys else None
        w13, w2 = [], []
        start = 0
        for pages in extents:
            throttle()
            assert flat is not None
            gate_up, down = expert_views(flat[start : start + nbytes], model, dtype)
            w13.append(gate_up)
            w2.append(down)
            start += len(pages) * generation.page_bytes
        layers.append((w13, w2))
        throttle()
    kernel = select_moe_kernel("cpu", DTYPES[dtype])

    def run(layer: int, x_NH: Tensor, slots_NK: Tensor, weights_NK: Tensor) -> Tensor:
        w13, w2 = layers[layer]
        return kernel(x_NH, slots_NK.long(), weights_NK, w13, w2)

    return run


def _warm_up(assignment: Assignment, trunk: Mapping[str, Tensor], kernel: LocalKernel) -> None:
    """One token through everything that this worker holds, so that its first step is as quick as the next one."""
    generation = assignment.generation
    held = [len(devices[assignment.rank]) for devices in generation.placement.experts_LD]

    def first_expert(layer: int, x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        if not held[layer]:
            return torch.zeros_like(x_TH)
        return kernel(layer, x_TH, torch.zeros_like(ids_TK[:, :1]), weights_TK[:, :1])

    cache = KVCache.allocate(generation.model, generation.dtype, 1, generation.block_tokens)
    with torch.inference_mode():
        Decoder(generation.model, trunk, first_expert).forward(Batch.of([Chunk([0], 0, [0], True)]), cache)


def _exchange(assignment: Assignment, node: MemfdPool, abandoned: Callable[[], bool]) -> Exchange:
    kinds: dict[str, Callable[[], Exchange]] = {
        "solo": SoloExchange,
        "shared": lambda: _shared_exchange(assignment, node, abandoned),
        "gloo": lambda: _group_exchange(assignment, abandoned),
        "nccl": lambda: _group_exchange(assignment, abandoned),
    }
    kind = assignment.generation.exchange.kind
    if kind not in kinds:
        raise InternalError(f"exchange: kind: expected one of {', '.join(kinds)}, got {kind!r}")
    return kinds[kind]()


def _shared_exchange(assignment: Assignment, node: MemfdPool, abandoned: Callable[[], bool]) -> Exchange:
    generation = assignment.generation
    spec, pages = generation.exchange, assignment.node.pages[generation.exchange_key]
    region = _bytes(node, pages, writable=True)
    if abandoned():  # only now: nobody else may get the region while it is mapped, but may have before
        raise InternalError(f"generation {generation.id}: it was abandoned")
    locks = MemberLocks(node.fd, _LOCKS_BASE + pages[0] * generation.page_bytes)
    size = len(generation.placement.devices)
    return SharedMemoryExchange(region, assignment.rank, size, spec.capacity_bytes, spec.timeout_s, locks)


def _group_exchange(assignment: Assignment, abandoned: Callable[[], bool]) -> Exchange:
    from .exchange.group import GroupExchange, Rendezvous

    generation = assignment.generation
    spec = generation.exchange
    rendezvous = Rendezvous(spec.store_host, spec.store_port, f"generation-{generation.id}", abandoned)
    size = len(generation.placement.devices)
    backend: Literal["gloo", "nccl"] = "nccl" if spec.kind == "nccl" else "gloo"
    return GroupExchange(rendezvous, assignment.rank, size, spec.timeout_s, backend, assignment.host)
