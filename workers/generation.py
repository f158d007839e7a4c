"""A generation: one complete running configuration, and what a single worker must know to join it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from ..planners.placement import Placement
from .families.base import ModelConfig
from .pages.transfer import PageSource

ExchangeKind = Literal["solo", "shared", "gloo", "nccl"]


@dataclass(frozen=True, slots=True)
class PoolExtents:
    """A pool and the pages in it that a worker maps, by extent key.

    ``name`` is the pool's; ``address`` and ``token`` lead to the memory owner that hands out its descriptor.
    """

    name: str
    address: str
    token: str
    pages: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ExchangeSpec:
    """How the members of a generation reach each other.

    ``shared`` uses the node pool's extent ``exchange_key``, with mailboxes of ``capacity_bytes``; ``gloo`` and
    ``nccl`` meet at the store. A peer that does not answer for ``timeout_s`` seconds counts as hung, and so does an
    engine that has computed for so long without a call to them, or without the end of a layer if it has no peers.
    """

    kind: ExchangeKind
    timeout_s: float = 60.0
    capacity_bytes: int = 0
    store_host: str = ""
    store_port: int = 0


@dataclass(frozen=True, slots=True)
class Generation:
    """The part of the configuration that all members share. Rank ``r`` runs on ``placement.devices[r]``."""

    id: int
    model: ModelConfig
    dtype: str
    placement: Placement
    exchange: ExchangeSpec
    page_bytes: int
    block_tokens: int

    @property
    def exchange_key(self) -> str:
        return f"exchange/{self.id}"


@dataclass(frozen=True, slots=True)
class KVSource:
    """Another device's KV, for who takes it over.

    Parameters
    ----------
    pool : PoolExtents
        Its pool, with the ledger's pages.
    source : PageSource
        Where the pool's pages can be read by who cannot map them.
    pages : tuple of int
        The device's KV extent.
    limit_s : float or None
        For so long it may be copied ahead of the switch; None: until all is there.
    """

    pool: PoolExtents
    source: PageSource
    pages: tuple[int, ...]
    limit_s: float | None = None


@dataclass(frozen=True, slots=True)
class Assignment:
    """A worker's role in a generation: its rank, and the pages of its device and of its node that it maps.

    The two pools are one where the devices of a node share its memory. The KV pages and the ledger of ``device`` count
    only for a worker that has not mapped this device's KV yet; one that has keeps what it has.

    Parameters
    ----------
    generation : Generation
    rank : int
    device, node : PoolExtents
    threads : int
        Compute threads from the commit of this generation on; 0 leaves them as they are.
    host : str
        This worker's address, at which members on other nodes reach it; empty: any.
    inherits : tuple of KVSource
        KV of devices that have no part in this generation any more, whose sequences go on here.
    """

    generation: Generation
    rank: int
    device: PoolExtents
    node: PoolExtents
    threads: int = 0
    host: str = ""
    inherits: tuple[KVSource, ...] = ()

    @property
    def device_name(self) -> str:
        return self.generation.placement.devices[self.rank]


def expert_key(layer: int, expert: int) -> str:
    """Extent key of one expert; layers count MoE layers only."""
    return f"expert/{layer}/{expert}"


def parse_expert_key(key: str) -> tuple[int, int]:
    """(MoE layer, expert) of what `expert_key` made."""
    _, layer, expert = key.split("/")
    return int(layer), int(expert)


def kv_key(device: str) -> str:
    """Extent key of a device's KV cache."""
    return f"kv/{device}"


AT_SWITCH_BLOCKS = 4096
"""KV blocks that running sequences may have for a worker to hand them over as it leaves, while nobody makes a step. If
they have more, it does so afterwards."""

TRUNK_KEY = "trunk"
LEDGER_KEY = "ledger"
