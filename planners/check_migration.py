"""Walks a migration move by move and says what is wrong with it; shares nothing with the code that plans one."""

from __future__ import annotations

from .migration import Migration, MigrationProblem


def check_migration(problem: MigrationProblem, migration: Migration) -> list[str]:
    """Every broken rule, empty when the migration is sound.

    After every single move and free: no device above its memory (or what it held at the start, if that was more),
    every expert that was ever served is served by a complete replica on a live device, sources hold complete
    replicas; and the end is exactly the new placement. Within a phase moves may end in any order, so memory is
    counted for all of them and sources must have been complete when the phase began.
    """
    held = {name: set(keys) for name, keys in problem.start.items()}
    limit = {name: max(problem.limit_bytes[name], problem.weights(keys)) for name, keys in held.items()}
    served = {key for keys in held.values() for key in keys}
    wrong: list[str] = []
    peak = {name: problem.weights(keys) for name, keys in held.items()}
    for number, phase in enumerate(migration.phases):
        where = f"phase {number}"
        complete = {name: frozenset(keys) for name, keys in held.items()}
        for move in phase.moves:
            key = (move.layer, move.expert)
            label = f"{where}: layer {move.layer} expert {move.expert} to {move.target}"
            if move.target not in held:
                wrong.append(f"{label}: the target is not in the cluster")
                continue
            if key in held[move.target]:
                wrong.append(f"{label}: it is there already")
            if move.source is not None and key not in complete.get(move.source, frozenset()):
                wrong.append(f"{label}: {move.source} has no complete replica")
            if move.bytes != problem.weight(key):
                wrong.append(f"{label}: {move.bytes} bytes, the expert has {problem.weight(key)}")
            held[move.target].add(key)
            now = problem.weights(held[move.target])
            peak[move.target] = max(peak[move.target], now)
            if now > limit[move.target] * (1 + 1e-12):
                wrong.append(f"{label}: {now:g} bytes, the limit is {limit[move.target]:g}")
        served |= {(m.layer, m.expert) for m in phase.moves}
        for free in phase.frees:
            key = (free.layer, free.expert)
            label = f"{where}: freeing layer {free.layer} expert {free.expert} on {free.device}"
            if key not in held.get(free.device, set()):
                wrong.append(f"{label}: it is not there")
                continue
            held[free.device].remove(key)
            if not any(key in keys for keys in held.values()):
                wrong.append(f"{label}: nobody else serves it")
    for name, keys in held.items():
        if keys != problem.goal[name]:
            wrong.append(f"end: {name} holds {sorted(keys)}, the new placement asks for {sorted(problem.goal[name])}")
        if abs(peak[name] - migration.peak_bytes[name]) > 1e-6 * max(1.0, peak[name]):
            wrong.append(f"peak: {name}: {peak[name]:g} bytes, reported {migration.peak_bytes[name]:g}")
    unserved = served - {key for keys in held.values() for key in keys}
    if unserved:
        wrong.append(f"end: nobody serves {sorted(unserved)}")
    return wrong
