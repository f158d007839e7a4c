"""The per-batch split as a linear program: slow, exact, the reference for `split.split`."""

from __future__ import annotations

import numpy as np

from .fields import FloatArray, IntArray
from .milp import MilpOptions, pulp, solve_milp
from .split import SplitTable


def best_split_lp(table: SplitTable, tokens_E: IntArray) -> tuple[float, FloatArray]:
    """The least time of the slowest device over all fractional splits, and one such split (eq. 6)."""
    start_s = float(table.time_D(table.by_share(tokens_E)).max())
    if start_s == 0:
        return 0.0, np.zeros(len(table.expert_R))
    model = pulp.LpProblem("split", pulp.LpMinimize)
    longest = pulp.LpVariable("longest", 0)
    part = [pulp.LpVariable(f"y{r}", 0, 1) for r in range(len(table.expert_R))]
    model += longest
    for e in range(len(tokens_E)):
        model += pulp.lpSum(part[r] for r in np.flatnonzero(table.expert_R == e)) == 1
    tokens_R = tokens_E[table.expert_R]
    fixed_D = np.zeros(len(table.token_s_D)) if table.fixed_s_D is None else table.fixed_s_D
    for d, (rate, fixed) in enumerate(zip(table.token_s_D.tolist(), fixed_D.tolist(), strict=True)):
        here = np.flatnonzero(table.device_R == d)
        work = pulp.lpSum(float(rate * tokens_R[r] / start_s) * part[r] for r in here)
        model += longest >= work + fixed / start_s
    result = solve_milp(model, MilpOptions())
    assert result.objective is not None
    return result.objective * start_s, np.array([p.varValue for p in part]) * tokens_R
