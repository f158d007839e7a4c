"""How often, and how soon, what has failed is tried again. Pure.

The first time at once: most often something has died, and what comes next does not need it. Then after pauses that
double, in which whatever makes everything fail may pass. A recovery's are short, since clients wait for it; an
operation's is longer, since nobody does. Standbys are tried without end, at last once a minute: whatever ends them
(a full disk, memory that is short) must not have a core for itself, beside those who serve.
"""

from __future__ import annotations

from dataclasses import replace

from .state import State

ATTEMPTS = 3  # of an operation: it has failed after 0 + 1 s of pauses
RECOVERIES = 8  # in a row, or generations that broke as soon as they served: 0, 0.1, 0.2, ... 3.2 s, 6.3 s in all
_SHORT_LIFE_S = 1.0
_OPERATION_PAUSE_S = 1.0  # after two failures
_RECOVERY_PAUSE_S = 0.1
_STANDBY_PAUSE_S = 1.0  # between the second and the third start in a row
_LONGEST_STANDBY_PAUSE_S = 60.0
_LASTING_STANDBY_S = 120.0  # one that has lived so long is replaced at once


def opens_s(state: State) -> float:
    """When the next generation may come; in the past if nothing has failed."""
    failures = max(state.attempts, state.short_lives) if state.broken else state.attempts
    first_s = _RECOVERY_PAUSE_S if state.broken else _OPERATION_PAUSE_S
    return state.failed_s + (first_s * 2 ** (failures - 2) if failures > 1 else 0.0)


def failed(state: State, now_s: float) -> State:
    """The coming generation was withdrawn."""
    return replace(state, attempts=state.attempts + 1, failed_s=now_s)


def broke(state: State, now_s: float) -> State:
    """The generation that serves does so no more; noted once."""
    if state.broken:
        return state
    short = state.short_lives + 1 if now_s - state.served_since_s < _SHORT_LIFE_S else 0
    return replace(state, broken=True, short_lives=short, failed_s=now_s)


def mended(state: State) -> State:
    """The generation that serves does so, though it was found broken: a node was silent, and is back."""
    return replace(state, broken=False, attempts=0) if state.broken else state


def standbys_open_s(state: State) -> float:
    """When the next standbys may be started; in the past if none has been since a generation was switched to."""
    starts = state.standby_starts
    pause_s = _STANDBY_PAUSE_S * 2.0 ** min(starts - 2, 10) if starts > 1 else 0.0
    return state.standby_started_s + min(pause_s, _LONGEST_STANDBY_PAUSE_S)


def standbys_started(state: State, now_s: float) -> State:
    """Standbys are started, on whichever nodes lack them."""
    lasted = now_s - state.standby_started_s > _LASTING_STANDBY_S
    return replace(state, standby_starts=1 if lasted else state.standby_starts + 1, standby_started_s=now_s)
