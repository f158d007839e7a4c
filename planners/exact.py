"""Kinds of layers that are solved exactly, or nearly, by other means than search and integer programs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from .components import best_division, fleet_of
from .layout import Layout
from .singles import applies, best_singles
from .units import LayerProblem

Exact = Callable[[float, float], tuple[float, Layout | None]]
"""From a bound and the time of a placement: a bound at least as good, and a better layout if one was found."""


def exact_method(layer: LayerProblem) -> Exact | None:
    """One slot per device (`singles`), or few units (`components`); None for other layers."""
    if applies(layer):
        return partial(best_singles, layer)
    fleet = fleet_of(layer)
    return None if fleet is None else partial(best_division, layer, fleet)
