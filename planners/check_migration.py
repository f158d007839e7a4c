"""Walks a migration move by move and says what is wrong with it; shares nothing with the code that plans one."""

from __future__ import annotations

from .migration import Free, Key, Migration, MigrationProblem, Move, Phase


def check_migration(problem: MigrationProblem, migration: Migration) -> list[str]:
    """Every broken rule, empty when the migration is sound.

    After every single move and free: no device above its memory (or what it held at the start, if that was more),
    every expert that was ever served is served by a complete replica on a live device, sources hold complete
    replicas; and the end is exactly the new placement. Within a phase moves may end in any order, so memory is
    counted for all of them and sources must have been complete when the phase began.
    """
    walk = _Walk(problem)
    for number, phase in enumerate(migration.phases):
        walk.phase(f"phase {number}", phase)
    walk.end(migration)
    return walk.wrong


class _Walk:
    """What every device holds, step by step."""

    def __init__(self, problem: MigrationProblem) -> None:
        self.problem = problem
        self.held = {name: set(keys) for name, keys in problem.start.items()}
        self.peak = {name: problem.weights(keys) for name, keys in self.held.items()}
        self.limit = {name: max(problem.limit_bytes[name], self.peak[name]) for name in self.held}
        self.served = {key for keys in self.held.values() for key in keys}
        self.wrong: list[str] = []

    def phase(self, where: str, phase: Phase) -> None:
        complete = {name: frozenset(keys) for name, keys in self.held.items()}
        for move in phase.moves:
            self._move(where, move, complete)
        self.served |= {(m.layer, m.expert) for m in phase.moves}
        for free in phase.frees:
            self._free(where, free)

    def _move(self, where: str, move: Move, complete: dict[str, frozenset[Key]]) -> None:
        key, wrong = (move.layer, move.expert), self.wrong
        label = f"{where}: layer {move.layer} expert {move.expert} to {move.target}"
        if move.target not in self.held:
            wrong.append(f"{label}: the target is not in the cluster")
            return
        if key in self.held[move.target]:
            wrong.append(f"{label}: it is there already")
        if move.source is not None and key not in complete.get(move.source, frozenset()):
            wrong.append(f"{label}: {move.source} has no complete replica")
        if move.bytes != self.problem.weight(key):
            wrong.append(f"{label}: {move.bytes} bytes, the expert has {self.problem.weight(key)}")
        self.held[move.target].add(key)
        now = self.problem.weights(self.held[move.target])
        self.peak[move.target] = max(self.peak[move.target], now)
        if now > self.limit[move.target] * (1 + 1e-12):
            wrong.append(f"{label}: {now:g} bytes, the limit is {self.limit[move.target]:g}")

    def _free(self, where: str, free: Free) -> None:
        key = (free.layer, free.expert)
        label = f"{where}: freeing layer {free.layer} expert {free.expert} on {free.device}"
        if key not in self.held.get(free.device, set()):
            self.wrong.append(f"{label}: it is not there")
            return
        self.held[free.device].remove(key)
        if not any(key in keys for keys in self.held.values()):
            self.wrong.append(f"{label}: nobody else serves it")

    def end(self, migration: Migration) -> None:
        for name, keys in self.held.items():
            goal = self.problem.goal[name]
            if keys != goal:
                self.wrong.append(f"end: {name} holds {sorted(keys)}, the new placement asks for {sorted(goal)}")
            if abs(self.peak[name] - migration.peak_bytes[name]) > 1e-6 * max(1.0, self.peak[name]):
                reported = migration.peak_bytes[name]
                self.wrong.append(f"peak: {name}: {self.peak[name]:g} bytes, reported {reported:g}")
        unserved = self.served - {key for keys in self.held.values() for key in keys}
        if unserved:
            self.wrong.append(f"end: nobody serves {sorted(unserved)}")
