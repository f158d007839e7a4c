"""What a deployment keeps where it outlives its processes: Ray's key-value store, in the cluster's head. Imports Ray.

Ray Serve keeps its own checkpoints there. It lasts as long as the cluster; its calls block, so an event loop makes them
in a thread.
"""

from __future__ import annotations

from dataclasses import dataclass

from ray.experimental import internal_kv

from .config import NAMESPACE


@dataclass(frozen=True, slots=True)
class Durable:
    """The values of one deployment, by key."""

    deployment: str

    def put(self, key: str, value: bytes) -> None:
        internal_kv._internal_kv_put(self._key(key), value, overwrite=True, namespace=NAMESPACE)

    def get(self, key: str) -> bytes | None:
        value: bytes | None = internal_kv._internal_kv_get(self._key(key), namespace=NAMESPACE)
        return value

    def remove(self, key: str) -> None:
        internal_kv._internal_kv_del(self._key(key), namespace=NAMESPACE)

    def clear(self) -> None:
        """Remove everything of this deployment."""
        internal_kv._internal_kv_del(self._key(""), del_by_prefix=True, namespace=NAMESPACE)

    def _key(self, key: str) -> bytes:
        return f"{self.deployment}/{key}".encode()  # a deployment's name has no slash
