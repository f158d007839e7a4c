"""One layer as an integer program (eq. 1 to 9): binary replicas, continuous shares, and the counting bound as a cut."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from .assemble import shares_R
from .bounds import case_bound
from .fields import BoolArray, FloatArray
from .layout import Layout, flow_of
from .milp import pulp
from .problem import Objective
from .units import LayerProblem

Cells = dict[tuple[int, int], Any]
"""Something for every (unit, device)."""


@dataclass(frozen=True, eq=False)
class LayerProgram:
    """Variables of one layer within a model.

    Parameters
    ----------
    layer : LayerProblem
    objective : Objective
    replica : dict
        Binary variable of every (unit, device) offered.
    share : list of dict
        Share variables: one table, or one per case where shares are re-split per batch.
    node : dict
        Whether a unit is on a node, by (unit, node); empty unless several nodes are asked for.
    time : list
        The layer's time in every case.
    level, over : variable, list of variable
        Value at risk, and each scenario's excess over it (eq. 8); unused at tail 0.
    cost : expression
        The layer's part of the objective.
    """

    layer: LayerProblem
    objective: Objective
    replica: Cells
    share: list[Cells]
    node: Cells
    time: list[Any]
    level: Any
    over: list[Any]
    cost: Any

    def layout(self) -> Layout:
        """The incumbent. Shares that are re-split per batch are balanced for the mean loads instead."""
        layer = self.layer
        chosen = sorted(k for k, x in self.replica.items() if x.varValue > 0.5)
        unit_R, device_R = np.array([u for u, _ in chosen]), np.array([d for _, d in chosen])
        if len(self.share) > 1 or len(self.time) == 1:
            flow = flow_of(layer, unit_R, device_R, layer.tokens_U, layer.base_D)
            flow.settle(range(layer.devices), 1e-9 * max(flow.time), most=400 * layer.units)
            return Layout(unit_R, device_R, np.array(flow.amount))
        share_R = np.array([max(0.0, self.share[0][k].varValue) for k in chosen])
        sum_U = np.bincount(unit_R, weights=share_R, minlength=layer.units)
        return Layout(unit_R, device_R, share_R / sum_U[unit_R] * layer.tokens_U[unit_R])

    def begin_from(self, layout: Layout, time_C: FloatArray) -> None:
        """Set every variable to this layout, whose times in every case are given."""
        at = zip(layout.unit_R.tolist(), layout.device_R.tolist(), shares_R(self.layer, layout), strict=True)
        share = {(u, d): s for u, d, s in at}
        for k, x in self.replica.items():
            x.setInitialValue(1 if k in share else 0)
            for table in self.share:
                table[k].setInitialValue(share.get(k, 0.0))
        present = {(u, int(self.layer.node_D[d])) for u, d in share}
        for k, variable in self.node.items():
            variable.setInitialValue(1 if k in present else 0)
        for variable, value in zip(self.time, time_C.tolist(), strict=True):
            variable.setInitialValue(value * (1 + 1e-9))
        if self.level is not None:
            self._begin_risk(time_C)

    def _begin_risk(self, time_C: FloatArray) -> None:
        layer = self.layer
        weight_S = np.bincount(layer.scenario_C, weights=layer.case_weight_C)
        cost_S = np.bincount(layer.scenario_C, weights=layer.case_weight_C * time_C) / weight_S * (1 + 1e-9)
        level = float(np.sort(cost_S)[int(self.objective.tail * len(cost_S))])
        self.level.setInitialValue(level)
        for variable, value in zip(self.over, cost_S.tolist(), strict=True):
            variable.setInitialValue(max(0.0, value - level))


def add_layer(model: Any, layer: LayerProblem, objective: Objective, offered_UD: BoolArray) -> LayerProgram:
    """Add the layer's variables and constraints; the caller sets the objective.

    Seconds enter the model as they are: pass a layer scaled to about 1 (`LayerProblem.scaled`).
    """
    name = f"l{layer.layer}"
    offered = offered_UD & layer.allowed_UD
    keys = [(int(u), int(d)) for u, d in zip(*np.nonzero(offered), strict=True)]
    replica = {k: pulp.LpVariable(f"x_{name}_{k[0]}_{k[1]}", cat="Binary") for k in keys}
    tables = len(layer.tokens_CU) if objective.split == "per_batch" else 1
    share = [{k: pulp.LpVariable(f"y_{name}_{t}_{k[0]}_{k[1]}", 0, 1) for k in keys} for t in range(tables)]
    time = [pulp.LpVariable(f"t_{name}_{c}", 0) for c in range(len(layer.tokens_CU))]
    node = _add_rules(model, layer, replica)
    for table in share:
        _add_shares(model, layer, replica, table)
    for c, variable in enumerate(time):
        _add_case(model, layer, c, (replica, share[c % tables]), variable)
    level, over, cost = _add_risk(model, layer, objective, time)
    held = layer.held_UD
    moves = pulp.lpSum(float(layer.moved_byte_s * layer.bytes_U[k[0]]) * x for k, x in replica.items() if not held[k])
    return LayerProgram(layer, objective, replica, share, node, time, level, over, cost + moves)


def _add_rules(model: Any, layer: LayerProblem, replica: Cells) -> Cells:
    """Eq. 2 and 3, pins and nodes; returns the node variables."""
    on: list[list[tuple[int, Any]]] = [[] for _ in range(layer.devices)]
    for (u, d), x in replica.items():
        on[d].append((u, x))
    for d, here in enumerate(on):
        model += pulp.lpSum(int(layer.width_U[u]) * x for u, x in here) <= int(layer.slots_D[d])
        room = float(layer.budget_D[d])
        if room > 0 and not layer.plain:
            model += pulp.lpSum(float(layer.bytes_U[u]) / room * x for u, x in here) <= 1
    for u, d in zip(*np.nonzero(layer.pinned_UD), strict=True):
        model += replica[int(u), int(d)] == 1
    return _add_nodes(model, layer, replica) if layer.min_nodes > 1 else {}


def _add_nodes(model: Any, layer: LayerProblem, replica: Cells) -> Cells:
    on_node: dict[tuple[int, int], list[Any]] = {}
    for (u, d), x in replica.items():
        on_node.setdefault((u, int(layer.node_D[d])), []).append(x)
    node = {k: pulp.LpVariable(f"n_l{layer.layer}_{k[0]}_{k[1]}", 0, 1) for k in on_node}
    for k, xs in on_node.items():
        model += node[k] <= pulp.lpSum(xs)
    for u in range(layer.units):
        model += pulp.lpSum(variable for k, variable in node.items() if k[0] == u) >= layer.min_nodes
    return node


def _add_shares(model: Any, layer: LayerProblem, replica: Cells, share: Cells) -> None:
    """Eq. 1: shares only where there is a replica, summing to 1."""
    of: list[list[Any]] = [[] for _ in range(layer.units)]
    for k, y in share.items():
        model += y <= replica[k]
        of[k[0]].append(y)
    for variables in of:
        model += pulp.lpSum(variables) == 1


def _add_case(model: Any, layer: LayerProblem, case: int, cells: tuple[Cells, Cells], time: Any) -> None:
    """Eq. 4 and 7 for one case, and the counting bound as a cut: relaxed, the rows alone give only the mean."""
    replica, share = cells
    terms: list[list[Any]] = [[] for _ in range(layer.devices)]
    for (u, d), x in replica.items():
        terms[d].append(float(layer.read_UD[u, d]) * x)
        terms[d].append(float(layer.token_s_D[d] * layer.tokens_CU[case, u]) * share[u, d])
    for d, here in enumerate(terms):
        model += time >= float(layer.base_CD[case, d]) + pulp.lpSum(here)
    model += time >= case_bound(layer, layer.tokens_CU[case], layer.base_CD[case]) * (1 - 1e-9)


def _add_risk(model: Any, layer: LayerProblem, objective: Objective, time: list[Any]) -> tuple[Any, list[Any], Any]:
    """Eq. 8: the tail mean as a linear program (Rockafellar and Uryasev 2000), or the plain mean."""
    if objective.tail == 0:
        return None, [], pulp.lpSum(float(w) * t for w, t in zip(layer.case_weight_C, time, strict=True))
    weight_S = np.bincount(layer.scenario_C, weights=layer.case_weight_C)
    level = pulp.LpVariable(f"v_l{layer.layer}", 0)
    over = []
    for s, weight in enumerate(weight_S):
        variable = pulp.LpVariable(f"o_l{layer.layer}_{s}", 0)
        cases = np.flatnonzero(layer.scenario_C == s)
        model += variable >= pulp.lpSum(float(layer.case_weight_C[c] / weight) * time[c] for c in cases) - level
        over.append(variable)
    parts = [float(w / (1 - objective.tail)) * o for w, o in zip(weight_S, over, strict=True)]
    return level, over, level + pulp.lpSum(parts)
