"""How many pages a deployment needs, and how many it gets. Pure arithmetic."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import OperatorError
from ..planners.placement import Placement

AUTO_SHARE = 0.4  # of the node's available memory that automatic sizing takes
_MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class ModelSizes:
    """Bytes of one expert of one layer, of the whole trunk, and of one KV block over all layers."""

    expert_bytes: int
    trunk_bytes: int
    kv_block_bytes: int


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Pages of each pool. ``expert_pages`` and ``kv_block_pages`` are per expert and per block."""

    page_bytes: int
    expert_pages: int
    kv_block_pages: int
    trunk_pages: int
    device_pages: int

    def kv_blocks(self, experts: int) -> int:
        """KV blocks that fit a device's pool beside so many experts (summed over layers)."""
        return max(0, self.device_pages - experts * self.expert_pages) // self.kv_block_pages


@dataclass(frozen=True, slots=True)
class MemoryLimits:
    """What the operator or the machine allows.

    Parameters
    ----------
    device_bytes : int or None
        Bytes per device; None sizes automatically.
    available_bytes : int
        Memory available on the smallest node.
    devices_per_node : int
        Most devices on one node.
    kv_blocks_wanted : int
        Blocks with which every running sequence reaches its full length.
    kv_blocks_needed : int
        Blocks that one sequence of full length takes: fewer cannot serve.
    reserved_experts : int
        Experts, summed over layers, for which every device keeps room whatever it holds now.
    """

    device_bytes: int | None
    available_bytes: int
    devices_per_node: int
    kv_blocks_wanted: int
    kv_blocks_needed: int
    reserved_experts: int = 0


def pages_of(nbytes: int, page_bytes: int) -> int:
    """Whole pages that hold so many bytes."""
    return -(-nbytes // page_bytes)


def plan_memory(sizes: ModelSizes, page_bytes: int, placement: Placement, limits: MemoryLimits) -> MemoryPlan:
    """Size every device's pool alike: room for all experts and the wanted KV, within what the node has.

    A page costs memory only once it is used, so room for all experts is free until a device must take them.

    Raises
    ------
    OperatorError
        A device's experts and the KV of one full-length sequence do not fit; the message gives the bytes.
    """
    expert_pages = pages_of(sizes.expert_bytes, page_bytes)
    block_pages = pages_of(sizes.kv_block_bytes, page_bytes)
    devices = range(len(placement.devices))
    held = max(limits.reserved_experts, *(sum(len(layer[d]) for layer in placement.experts_LD) for d in devices))
    everything = placement.layers * placement.experts
    needed = held * expert_pages + limits.kv_blocks_needed * block_pages
    device_bytes = limits.device_bytes
    if device_bytes is None:
        wanted = max(everything, held) * expert_pages + limits.kv_blocks_wanted * block_pages
        share = int(limits.available_bytes * AUTO_SHARE) // limits.devices_per_node
        device_bytes = min(wanted * page_bytes, share)
    plan = MemoryPlan(
        page_bytes, expert_pages, block_pages, pages_of(sizes.trunk_bytes, page_bytes), device_bytes // page_bytes
    )
    if plan.device_pages < needed:
        raise OperatorError(
            f"device-memory: {device_bytes / _MIB:.1f} MiB per device do not hold {held} experts "
            f"({held * expert_pages * page_bytes / _MIB:.1f} MiB) and the KV cache of one sequence of full length "
            f"({limits.kv_blocks_needed * block_pages * page_bytes / _MIB:.1f} MiB); "
            "use more workers, more memory per device or a smaller --max-model-len"
        )
    return plan
