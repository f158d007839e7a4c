"""One layer's re-plan as an integer program over chosen columns, from a given solution.

Columns are the replicas that may come or go: on the devices under study everything that is there now, was kept
there, or is one of the ``wanted`` experts; elsewhere replicas stay as they are and only tokens move. With all devices
under study it is the restricted program for the whole layer. With x (replica), y (tokens), z (tokens too many):

    minimise  P sum_d z[d] + sum_{e,d new} bytes[e] x[e,d]
    sum_d y[e,d] = tokens[e],   y[e,d] <= tokens[e] x[e,d]
    sum_e y[e,d] + read[e,d] x[e,d] <= capacity[d] + z[d],   sum_e width[e] x[e,d] <= slots[d]
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection
from typing import Any

import pulp as _pulp

from .milp import MilpOptions, solve_milp
from .replan_task import LayerTask
from .routing import Routing

pulp: Any = _pulp


class _Program:
    """Variables of the program; replicas and tokens of experts outside the columns are constants."""

    def __init__(self, task: LayerTask, state: Routing, columns: set[tuple[int, int]]) -> None:
        self.task, self.state, self.columns = task, state, columns
        self.model = pulp.LpProblem("replan", pulp.LpMinimize)
        self.places_E: dict[int, set[int]] = defaultdict(set)
        for e, d in columns:
            self.places_E[e].add(d)
        for e, flow in enumerate(state.flow_E):
            if e in self.places_E or len(flow) > 1:
                self.places_E[e].update(flow)
        self.x: dict[tuple[int, int], Any] = {}
        self.y: dict[tuple[int, int], Any] = {}
        self.z_D = [pulp.LpVariable(f"z_{d}", 0) for d in range(task.devices)]
        self._variables()
        self._expert_rules()
        self._device_rules()
        self._objective()

    def _variables(self) -> None:
        for e in sorted(self.places_E):
            flow = self.state.flow_E[e]
            for d in sorted(self.places_E[e]):
                self.y[e, d] = pulp.LpVariable(f"y_{e}_{d}", 0, 1)
                self.y[e, d].setInitialValue(min(1.0, flow.get(d, 0.0) / self._scale(e)))
                if (e, d) in self.columns:
                    self.x[e, d] = pulp.LpVariable(f"x_{e}_{d}", cat="Binary")
                    self.x[e, d].setInitialValue(1.0 if d in flow else 0.0)
        for d, z in enumerate(self.z_D):
            z.setInitialValue(max(0.0, -self.state.slack(d)))

    def _scale(self, expert: int) -> float:
        return self.task.tokens_E[expert] or 1.0

    def _expert_rules(self) -> None:
        task, model = self.task, self.model
        for e, places in self.places_E.items():
            total = 1.0 if task.tokens_E[e] > 0 else 0.0
            model += pulp.lpSum(self.y[e, d] for d in sorted(places)) == total
            here = {d: self.x.get((e, d), 1) for d in sorted(places)}
            for d, x in here.items():
                if (e, d) in self.x:
                    model += self.y[e, d] <= x
            model += pulp.lpSum(here.values()) >= 1
            if task.min_nodes > 1:
                self._node_rule(e, here)

    def _node_rule(self, expert: int, here: dict[int, Any]) -> None:
        by_node: dict[int, list[Any]] = defaultdict(list)
        for d, x in here.items():
            by_node[self.task.node_D[d]].append(x)
        used = []
        for node, xs in by_node.items():
            u = pulp.LpVariable(f"u_{expert}_{node}", 0, 1)
            u.setInitialValue(min(1.0, float(sum(getattr(x, "varValue", x) for x in xs))))
            self.model += u <= pulp.lpSum(xs)
            used.append(u)
        self.model += pulp.lpSum(used) >= self.task.min_nodes

    def _device_rules(self) -> None:
        task, state = self.task, self.state
        at_D: list[list[int]] = [[] for _ in range(task.devices)]
        for e, d in self.y:
            at_D[d].append(e)
        for d in range(task.devices):
            self._device_rule(d, at_D[d], [e for e in state.held_D[d] if (e, d) not in self.y])

    def _device_rule(self, d: int, free: list[int], fixed: list[int]) -> None:
        task, model = self.task, self.model
        room = task.capacity_D[d] - sum(task.tokens_E[e] + task.read_ED[e][d] for e in fixed)
        x_E = {e: self.x.get((e, d), 1) for e in free}
        terms = [task.tokens_E[e] * self.y[e, d] for e in free]
        terms += [task.read_ED[e][d] * x for e, x in x_E.items() if task.read_ED[e][d]]
        model += pulp.lpSum(terms) <= room + self.z_D[d]
        if any((e, d) in self.x for e in free):
            taken = sum(task.width_E[e] for e in fixed)
            model += pulp.lpSum(task.width_E[e] * x for e, x in x_E.items()) + taken <= task.slots_D[d]
            if task.budget_D is not None:
                held = pulp.lpSum(task.bytes_E[e] * x for e, x in x_E.items())
                model += held + sum(task.bytes_E[e] for e in fixed) <= task.budget_D[d]

    def _objective(self) -> None:
        task = self.task
        typical = max(sum(task.bytes_E) / task.experts, 1e-12)
        penalty = 1000.0 * task.devices / max(sum(task.tokens_E), 1e-12)
        copied = (task.cost_bytes(e, d) / typical * x for (e, d), x in self.x.items())
        self.model.setObjective(penalty * pulp.lpSum(self.z_D) + pulp.lpSum(copied))

    def read(self) -> Routing:
        """The solution as a routing; tokens are those of the program, corrected for its tolerances."""
        after = Routing.empty(self.task.tokens_E, self.task.read_ED, self.task.capacity_D)
        for e, flow in enumerate(self.state.flow_E):
            places = self.places_E.get(e, set(flow))
            kept = [d for d in sorted(places) if (e, d) not in self.x or self.x[e, d].varValue > 0.5]
            for d in kept:
                after.add(e, d)
            if (e, kept[0]) in self.y:
                shares = {d: max(0.0, self.y[e, d].varValue) for d in kept}
                after.set_shares(e, shares)
        return after


def improve_exactly(
    task: LayerTask, state: Routing, devices: Collection[int], wanted: Collection[int], options: MilpOptions
) -> Routing | None:
    """The best re-arrangement on ``devices``, with replicas of ``wanted`` experts as new columns there.

    Returns None where the program finds nothing in its time. The answer is relieved (`Routing.relieve`).
    """
    columns = set()
    for d in devices:
        here = set(wanted) | state.held_D[d] | {e for e in range(task.experts) if d in task.kept_E[e]}
        for e in here:
            pinned_here = d in task.pinned_E[e]
            sole = e not in wanted and state.flow_E[e].keys() == {d} and task.kept_E[e] <= {d}
            if not pinned_here and not sole and d not in task.forbidden_E[e]:
                columns.add((e, d))
    program = _Program(task, state, columns)
    result = solve_milp(program.model, options)
    if not result.found:
        return None
    after = program.read()
    after.relieve()
    return after
