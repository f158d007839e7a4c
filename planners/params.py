"""Parameters of the methods; limits of a run are in `solution.StoppingRule`."""

from __future__ import annotations

from dataclasses import dataclass

from .fields import finite


@dataclass(frozen=True, slots=True)
class Params:
    """How a method searches.

    Parameters
    ----------
    seed : int
        Drives every random choice; equal seeds and iteration limits give equal plans.
    rounds : int
        Local-search rounds spent on one attempt before the next is tried.
    neighbourhood : int
        Devices that the large-neighbourhood search re-solves together.
    columns : int
        Devices that the integer program offers to each expert; 0 offers all.
    """

    seed: int = 0
    rounds: int = 200
    neighbourhood: int = 3
    columns: int = 0

    def __post_init__(self) -> None:
        for name in ("seed", "rounds", "neighbourhood", "columns"):
            finite(f"params: {name}", getattr(self, name))
