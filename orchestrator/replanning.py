"""Plans what is asked of a deployment that serves: from where it is, or is just going. Knows no Ray."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import inf

from ..planners.model import Loads
from ..workers.generation import kv_key
from ..workers.model_files import ModelFiles
from .core.layout import Layout
from .core.state import Leaving, Stage
from .planning import Context
from .registry import Registry
from .resize import named_devices, named_node, route


@dataclass(frozen=True, slots=True)
class Replanner:
    """One deployment that serves.

    Parameters
    ----------
    registry : Registry
    model : ModelFiles
    loads : callable
        Those that were measured, if there are enough of them.
    """

    registry: Registry
    model: ModelFiles
    loads: Callable[[], Loads | None]

    @property
    def base(self) -> Layout:
        """What serves, or is just being switched to."""
        state = self.registry.state()
        pending = state.pending
        if pending is not None and pending.stage is Stage.COMMIT and not pending.doomed:
            return pending.record.layout
        return self.registry.serving().layout

    async def look(self) -> Layout:
        """The base, and a look at the nodes: one may have joined just now."""
        await self.registry.cluster.look_at_nodes(anew=True)
        return self.base

    async def plan(self, plan: Callable[[Layout, Context], Layout]) -> tuple[Layout, tuple[Layout, ...]]:
        """The base, and the way from there to the planned layout; raises what ``plan`` and `route` raise."""
        while True:
            base = await self.look()
            context = self.context()
            target = await asyncio.to_thread(plan, base, context)
            way = await asyncio.to_thread(route, base, target, context)
            if (base, context.cordoned) == (self.base, self.registry.state().cordoned):  # nothing has come between
                return base, way

    def context(self) -> Context:
        """What layouts are planned for now."""
        registry = self.registry
        nodes, now_s = list(registry.cluster.nodes.values()), registry.cluster.hands.now_s
        context = Context.of(registry.config, self.model, nodes, now_s, self.loads())
        return replace(context, cordoned=registry.state().cordoned, leavers=self._leavers())

    def leaving(self, base: Layout, name: str, until_s: float | None) -> Leaving:
        """What a drain of a device or node by that time asks for; `OperatorError` if there is none of that name."""
        context = self.context()
        devices = named_devices(base, name, context)
        deadlines = {} if until_s is None else dict.fromkeys(devices, until_s)
        return Leaving(deadlines, named_node(base, name, context), begun=not devices <= set(base.devices))

    def has_left(self, base: Layout, name: str) -> bool:
        """Whether no device of that name, or on that node, is in use or will be; raises as `leaving` does."""
        context, operation = self.context(), self.registry.state().operation
        devices, node = named_devices(base, name, context), named_node(base, name, context)
        seats = (*base.seats, *(operation.goal.seats if operation is not None else ()))
        return not any(seat.device in devices or seat.node == node for seat in seats)

    def standbys(self) -> Counter[str]:
        """Workers that stand by, by node."""
        workers = self.registry.cluster.workers.values()
        return Counter(member.node for member in workers if member.fact(0.0, inf).idle)

    def _leavers(self) -> dict[str, str]:
        """Devices that are leaving already, and their nodes as far as they have something there."""
        state, cluster = self.registry.state(), self.registry.cluster
        operation, pending = state.operation, state.pending
        left: dict[str, str] = {}
        if operation is not None and operation.kind == "drain" and operation.subject not in cluster.nodes:
            left[operation.subject] = ""
        for pool in cluster.pools.values():
            kept = (key.removeprefix(kv_key("")) for key in pool.pages if key.startswith(kv_key("")))
            left.update(dict.fromkeys(kept, pool.node))
        stay = {*self.base.devices, *(pending.record.layout.devices if pending is not None else ())}
        return {device: node for device, node in left.items() if device not in stay}
