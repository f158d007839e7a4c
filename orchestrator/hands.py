"""What the controller can do to the cluster, as small protocols: Ray implements them, tests fake them.

Every method of a handle raises `InternalError` when the process behind it is gone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from ..workers.generation import Assignment
from ..workers.loading import Piece
from ..workers.owner import OwnerConfig
from ..workers.pages.table import ExtentRequest
from ..workers.roles import WorkerConfig, WorkerReport


@dataclass(frozen=True, slots=True)
class NodeInfo:
    """A machine of the cluster: its address, cores, and bytes of memory available when it was looked at."""

    id: str
    host: str
    cpus: int
    available_bytes: int


class OwnerHandle(Protocol):
    """A memory owner somewhere in the cluster."""

    async def address(self) -> str: ...
    async def fill(self, requests: Sequence[ExtentRequest], pieces: Sequence[Piece]) -> None: ...
    async def loaded_bytes(self) -> int: ...
    async def free(self, keys: Sequence[str]) -> None: ...
    async def pages(self) -> Mapping[str, tuple[int, ...]]: ...
    async def usage(self) -> Mapping[str, int]: ...


class WorkerHandle(Protocol):
    """A worker somewhere in the cluster."""

    async def prepare(self, assignment: Assignment) -> None: ...
    async def abandon(self, generation: int) -> None: ...
    async def commit(self, generation: int) -> None: ...
    async def address(self) -> tuple[str, int]: ...
    async def report(self) -> WorkerReport: ...
    async def stop(self) -> None: ...


class Hands(Protocol):
    """Everything with an effect outside the controller's process."""

    async def nodes(self) -> list[NodeInfo]: ...
    async def start_owner(self, node: str, config: OwnerConfig) -> OwnerHandle: ...
    async def start_worker(self, node: str, config: WorkerConfig) -> WorkerHandle: ...
    async def open_store(self) -> tuple[str, int]: ...
    def now_s(self) -> float: ...
