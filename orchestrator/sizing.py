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
    """Pages of each pool. ``expert_pages`` and ``kv_block_pages`` are per expert and per block.

    ``device_pages`` are those of a device of the largest kind.
    """

    page_bytes: int
    expert_pages: int
    kv_block_pages: int
    trunk_pages: int
    device_pages: int

    def kv_blocks(self, experts: int, pages: int) -> int:
        """KV blocks that fit so many pages beside so many experts (summed over layers)."""
        return max(0, pages - experts * self.expert_pages) // self.kv_block_pages


@dataclass(frozen=True, slots=True)
class MemoryLimits:
    """What the operator or the machine allows.

    Parameters
    ----------
    device_bytes : int or None
        Bytes of a device of the largest kind; None sizes automatically.
    available_bytes : int
        Memory available on the smallest node.
    devices_per_node : int
        Most devices on one node.
    kv_blocks_wanted : int
        Blocks with which every running sequence reaches its full length.
    kv_blocks_needed : int
        Blocks that one sequence of full length takes: fewer cannot serve.
    reserved_experts, memory_parts : tuple
        By device: experts, summed over layers, for which it keeps room whatever it holds now; and its memory as a part
        of that of the largest kind.
    """

    device_bytes: int | None
    available_bytes: int
    devices_per_node: int
    kv_blocks_wanted: int
    kv_blocks_needed: int
    reserved_experts: tuple[int, ...]
    memory_parts: tuple[float, ...]


def pages_of(nbytes: int, page_bytes: int) -> int:
    """Whole pages that hold so many bytes."""
    return -(-nbytes // page_bytes)


def plan_memory(sizes: ModelSizes, page_bytes: int, placement: Placement, limits: MemoryLimits) -> MemoryPlan:
    """Size every device's pool by its kind: room for all experts and the wanted KV, within what the node has.

    A page costs memory only once it is used, so room for all experts is free until a device must take them.

    Raises
    ------
    OperatorError
        A device's experts and the KV of one full-length sequence do not fit; the message gives the bytes.
    """
    expert_pages = pages_of(sizes.expert_bytes, page_bytes)
    block_pages = pages_of(sizes.kv_block_bytes, page_bytes)
    held_D = [
        max(reserved, sum(len(layer[d]) for layer in placement.experts_LD))
        for d, reserved in enumerate(limits.reserved_experts)
    ]
    everything = placement.layers * placement.experts
    device_bytes = limits.device_bytes
    if device_bytes is None:
        wanted = max(everything, *held_D) * expert_pages + limits.kv_blocks_wanted * block_pages
        share = int(limits.available_bytes * AUTO_SHARE) // limits.devices_per_node
        device_bytes = min(wanted * page_bytes, share)
    plan = MemoryPlan(
        page_bytes, expert_pages, block_pages, pages_of(sizes.trunk_bytes, page_bytes), device_bytes // page_bytes
    )
    kv_pages = limits.kv_blocks_needed * block_pages
    for device, held, part in zip(placement.devices, held_D, limits.memory_parts, strict=True):
        if int(plan.device_pages * part) < held * expert_pages + kv_pages:
            raise OperatorError(
                f"device-memory: {device_bytes * part / _MIB:.1f} MiB of {device} do not hold {held} experts "
                f"({held * expert_pages * page_bytes / _MIB:.1f} MiB) and the KV cache of one sequence of full length "
                f"({kv_pages * page_bytes / _MIB:.1f} MiB); "
                "use more workers, more memory per device or a smaller --max-model-len"
            )
    return plan
