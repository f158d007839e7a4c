"""Finding a migration's order: what fits comes first, what blocks is freed, and cycles go by way of a spare place."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

from .assignment import match_slots
from .migration import Free, Key, LinkLoads, Migration, MigrationProblem, Move, Phase
from .solution import Infeasible, Lack

Arrival = tuple[Key, str]  # what, where


@dataclass(slots=True)
class _State:
    """Where every replica is between two phases, and what is still to come."""

    problem: MigrationProblem
    held: dict[str, set[Key]]
    used: dict[str, float]
    holders: dict[Key, set[str]]
    pending: list[Arrival]
    restore: list[Arrival] = field(default_factory=list)
    peak: dict[str, float] = field(default_factory=dict)
    detoured: set[Arrival] = field(default_factory=set)
    detour_bytes: float = 0.0
    phases: list[Phase] = field(default_factory=list)

    def room(self, device: str) -> float:
        return self.problem.limit_bytes[device] - self.used[device]

    def fits(self, key: Key, device: str) -> bool:
        return self.problem.weight(key) <= self.room(device)

    def obsolete(self, device: str) -> list[Key]:
        return sorted(self.held[device] - self.problem.goal[device])

    def put(self, key: Key, device: str) -> None:
        self.used[device] += self.problem.weight(key)
        self.peak[device] = max(self.peak[device], self.used[device])
        self.held[device].add(key)

    def drop(self, key: Key, device: str) -> Free:
        size = self.problem.weight(key)
        self.held[device].remove(key)
        self.holders[key].discard(device)
        self.used[device] -= size
        return Free(*key, device, size)


def plan_migration(problem: MigrationProblem) -> Migration | Infeasible:
    """An order of moves and frees from ``problem.old`` to ``problem.new``, in as few phases as memory allows.

    Returns
    -------
    Migration or Infeasible
        Infeasible names each device that lacks memory, and how much: at the end, or for the first move that nothing can
        make room for (then ``proven`` is False: the search is a heuristic).
    """
    lacks = tuple(
        Lack(
            f"device {name!r}: experts of the new placement", problem.weights(keys), problem.limit_bytes[name], "bytes"
        )
        for name, keys in problem.goal.items()
        if problem.weights(keys) > problem.limit_bytes[name]
    )
    if lacks:
        return Infeasible(lacks)
    state = _initial(problem)
    while state.pending or state.restore:
        if not state.pending:
            state.pending, state.restore = state.restore, []
        arrivals = _startable(state)
        if not arrivals and not _free_blockers(state) and not _detour(state):
            return Infeasible(_blocked(state), proven=False)
        if arrivals:
            _run_phase(state, arrivals)
    _free_rest(state)
    placement = match_slots(problem.old, problem.new)
    return Migration(placement, tuple(_merged(state.phases)), state.peak, state.detour_bytes)


def _initial(problem: MigrationProblem) -> _State:
    held = {name: set(keys) for name, keys in problem.start.items()}
    used = {name: problem.weights(sorted(keys)) for name, keys in held.items()}
    holders: dict[Key, set[str]] = defaultdict(set)
    for name, keys in held.items():
        for key in keys:
            holders[key].add(name)
    pending = [(key, name) for name, keys in problem.goal.items() for key in sorted(keys - held[name])]
    return _State(problem, held, used, holders, pending, peak=dict(used))


def _startable(state: _State) -> list[Arrival]:
    """Arrivals that fit now: lost experts first, then those that let a crowded device free something."""
    crowded = {name for key, name in state.pending if not state.fits(key, name)}

    def urgency(arrival: Arrival) -> tuple[bool, bool, float, Key, str]:
        key, name = arrival
        unblocks = any(d in crowded and key not in state.problem.goal[d] for d in state.holders[key])
        return bool(state.holders[key]), not unblocks, -state.problem.weight(key), key, name

    room = {name: state.room(name) for name in state.held}
    chosen = []
    for key, name in sorted(state.pending, key=urgency):
        size = state.problem.weight(key)
        if size <= room[name]:
            room[name] -= size
            chosen.append((key, name))
    return chosen


def _run_phase(state: _State, arrivals: list[Arrival]) -> None:
    """Copy the arrivals together, then free what blocks the next ones."""
    loads = LinkLoads(state.problem)
    moves = []
    for key, name in sorted(arrivals, key=lambda a: (len(state.holders[a[0]]), -state.problem.weight(a[0]), a)):
        size = state.problem.weight(key)
        sources: list[str | None] = sorted(state.holders[key]) if state.holders[key] else [None]  # type: ignore[assignment]
        source = min(sources, key=lambda s: (*loads.after(s, name, size), s or ""))
        loads.add(source, name, size)
        moves.append(Move(*key, source, name, size))
    done = set(arrivals)
    state.pending = [a for a in state.pending if a not in done]
    for key, name in arrivals:
        state.put(key, name)
    for key, name in arrivals:
        state.holders[key].add(name)
    state.phases.append(Phase(tuple(moves), (), loads.seconds() + state.problem.transport.phase_s))
    _free_blockers(state)


def _free_blockers(state: _State) -> bool:
    """Free replicas that others serve too, where an arrival still lacks room; True if any was freed."""
    frees = []
    for key, name in list(state.pending):
        for old in state.obsolete(name):
            if state.fits(key, name):
                break
            if len(state.holders[old]) > 1:
                frees.append(state.drop(old, name))
    return _record(state, frees)


def _free_rest(state: _State) -> None:
    _record(state, [state.drop(old, name) for name in state.held for old in state.obsolete(name)])


def _record(state: _State, frees: list[Free]) -> bool:
    for device in {f.device for f in frees}:  # added up afresh, so that rounding does not gather
        state.used[device] = state.problem.weights(sorted(state.held[device]))
    if frees:
        state.phases.append(Phase((), tuple(frees), 0.0))
    return bool(frees)


def _detour(state: _State) -> bool:
    """Make room where nothing moves: park a replica in a spare place, or drop a doubled one for a while."""
    return _park(state) or _drop_double(state)


def _park(state: _State) -> bool:
    """Copy a blocking replica to any device with room, so that its own place can be freed."""
    blocked = sorted(state.pending, key=lambda a: (state.problem.weight(a[0]) - state.room(a[1]), a))
    for _, name in blocked:
        for old in state.obsolete(name):
            places = [d for d in state.held if d != name and old not in state.held[d] and state.fits(old, d)]
            if places and (old, name) not in state.detoured:
                loads = LinkLoads(state.problem)
                size = state.problem.weight(old)
                place = min(places, key=lambda d: (loads.after(name, d, size), -state.room(d), d))
                state.detoured.add((old, name))
                state.detour_bytes += size
                _run_phase(state, [(old, place)])
                return True
    return False


def _drop_double(state: _State) -> bool:
    """Free a replica that stays but that another serves too; it is copied back at the end."""
    needs = min(state.problem.weight(key) for key, _ in state.pending)
    doubles = [
        (state.problem.weight(key), key, name)
        for name, keys in state.held.items()
        for key in keys & state.problem.goal[name]
        if len(state.holders[key]) > 1 and (key, name) not in state.detoured
    ]
    enough = [d for d in doubles if d[0] + state.room(d[2]) >= needs]
    if not enough:
        return False
    size, key, name = min(enough)
    state.detoured.add((key, name))
    state.detour_bytes += size
    state.restore.append((key, name))
    return _record(state, [state.drop(key, name)])


def _blocked(state: _State) -> tuple[Lack, ...]:
    """The arrival nearest to fitting on each device that has one."""
    nearest: dict[str, tuple[float, Key]] = {}
    for key, name in state.pending:
        nearest[name] = min(nearest.get(name, (float("inf"), key)), (state.problem.weight(key), key))
    return tuple(
        Lack(
            f"device {name!r}: room for layer {key[0]} expert {key[1]} beside what it must go on serving "
            "(relieving any one of these devices is enough to go on)",
            size,
            state.room(name),
            "bytes",
        )
        for name, (size, key) in sorted(nearest.items())
    )


def _merged(phases: list[Phase]) -> list[Phase]:
    """Frees join the phase before them, after which they run anyway."""
    merged: list[Phase] = []
    for phase in phases:
        if merged and not phase.moves:
            last = merged[-1]
            merged[-1] = Phase(last.moves, last.frees + phase.frees, last.seconds)
        else:
            merged.append(phase)
    return merged
