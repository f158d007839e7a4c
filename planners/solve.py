"""One door to every method."""

from __future__ import annotations

from .baselines import BASELINES
from .fields import choice
from .ilp import solve_ilp
from .joint import products, solve_joint
from .lacks import lacks
from .params import Params
from .placement import Placement
from .problem import PlacementProblem
from .scalable import Report, solve_scalable
from .solution import Infeasible, Solution, StoppingRule
from .units import layer_problems

EXACT_CELLS = 1500
"""Units times devices times cases up to which ``auto`` runs integer programs after the search."""
AUTO_PRODUCTS = 5_000
"""Size of joint programs that ``auto`` takes on."""
METHODS = ("auto", "scalable", "ilp", "joint", *BASELINES)


def choose(problem: PlacementProblem, stop: StoppingRule) -> str:
    """Joint where affinity is given and it is small; exact where layers are small and there is a second for each."""
    if (
        problem.loads.pairs_PEE is not None
        and problem.objective.split == "fixed"
        and products(problem) <= AUTO_PRODUCTS
    ):
        return "joint"
    cases = len(problem.objective.regimes) * len(problem.loads.tokens_SLE)
    small = problem.experts * problem.devices * cases <= EXACT_CELLS
    return "ilp" if small and stop.time_limit_s >= problem.layers else "scalable"


def solve(
    problem: PlacementProblem,
    method: str = "auto",
    params: Params | None = None,
    stop: StoppingRule | None = None,
    progress: Report | None = None,
    warm_start: Placement | None = None,
) -> Solution | Infeasible:
    """Place the experts.

    Parameters
    ----------
    problem : PlacementProblem
    method : str
        One of `METHODS`; ``auto`` chooses by size and time limit.
    params, stop : optional
        How to search, and when to stop.
    progress : callable, optional
        Called with a `Progress` after every piece of work.
    warm_start : Placement, optional
        A placement to begin from; replicas on unknown devices are dropped.

    Returns
    -------
    Solution or Infeasible

    Raises
    ------
    OperatorError
        An unknown method.
    """
    choice("method", method, METHODS)
    params, stop = params or Params(), stop or StoppingRule()
    missing = [lack for layer in layer_problems(problem) for lack in lacks(layer)]
    if missing:
        return Infeasible(tuple(missing))
    if method == "auto":
        method = choose(problem, stop)
    if method in BASELINES:
        return BASELINES[method](problem)
    run = {"scalable": solve_scalable, "joint": solve_joint, "ilp": solve_ilp}[method]
    return run(problem, params, stop, progress, warm_start)
