"""One layer's placement with few new replicas: greedy purchases on the minimum cut, then pruning.

Starting from the replicas that are still there, experts without any are placed largest first; while tokens are left
over, the search looks at the tight side of the minimum cut (see `routing`) and adds, re-places or swaps the replica
that relieves it most per byte.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from .replan_task import Change, LayerTask, Pair, with_room
from .routing import Routing

_DEVICES_TRIED = 10
_EXPERTS_TRIED = 16
_ADDITIONS_TRIED = 20
_SWAPS_TRIED = 40


@dataclass(slots=True)
class ReplanSearch:
    """A layer's replicas while they are searched.

    ``excess`` tokens do not fit below the target (0.0: reached); ``tight`` devices are those it can reach;
    ``unplaced`` experts found no room at all.
    """

    task: LayerTask
    state: Routing
    tight: set[int] = field(default_factory=set)
    excess: float = 0.0
    unplaced: tuple[int, ...] = ()

    def relieve(self) -> None:
        self.excess, self.tight = self.state.relieve()

    @property
    def score(self) -> tuple[int, float, float]:
        """Smaller is better: unplaced experts, tokens too many, new bytes."""
        return len(self.unplaced), self.excess, self.task.new_bytes(self.state)


def plan_greedy(task: LayerTask, flexibility: float = 0.65, rounds: int = 400) -> ReplanSearch:
    """Replicas within the task's capacities with few new bytes.

    Parameters
    ----------
    flexibility : float
        How much a device's last replicas of experts that others serve too are worth, in mean capacities: without
        them a device cannot pass tokens on.
    rounds : int
        Most changes after every expert has a place.
    """
    search = ReplanSearch(task, _kept_state(task))
    search.unplaced = tuple(_place_missing(search, flexibility))
    search.relieve()
    for _ in range(rounds):
        if search.excess <= 0 or not _improve(search):
            break
    if search.excess <= 0:
        prune(search)
    return search


def _kept_state(task: LayerTask) -> Routing:
    """Replicas that stay; a device beyond its slots gives up spare replicas first, then the lightest."""
    state = Routing.empty(task.tokens_E, task.read_ED, task.capacity_D)
    for e in range(task.experts):
        for d in sorted(task.kept_E[e]):
            state.add(e, d)
    state.relieve()
    for d in range(task.devices):
        while not task.fits(state, d):
            state.remove(task.least_useful(state, d) if task.spare(state, d) else _lightest(task, state, d), d)
    return state


def _lightest(task: LayerTask, state: Routing, device: int) -> int:
    free = [e for e in state.held_D[device] if device not in task.pinned_E[e]] or list(state.held_D[device])
    return min(free, key=lambda e: (task.tokens_E[e], e))


def _place_missing(search: ReplanSearch, flexibility: float) -> list[int]:
    """Give every expert its pinned replicas and enough nodes, largest first; returns experts that found no room."""
    task, unplaced = search.task, []
    for e in sorted(range(task.experts), key=lambda e: (-task.tokens_E[e], e)):
        for d in sorted(task.pinned_E[e] - search.state.flow_E[e].keys()):
            if not _put(search, e, d):
                unplaced.append(e)
        while len({task.node_D[d] for d in search.state.flow_E[e]}) < task.min_nodes:
            if not _put_anywhere(search, e, flexibility):
                unplaced.append(e)
                break
    return unplaced


def _put_anywhere(search: ReplanSearch, expert: int, flexibility: float) -> bool:
    task, state = search.task, search.state
    nodes = {task.node_D[d] for d in state.flow_E[expert]}
    open_D = [d for d in range(task.devices) if d not in task.forbidden_E[expert] and task.node_D[d] not in nodes]
    value_D = {d: _value(task, state, expert, d, flexibility) for d in open_D}
    order = sorted(open_D, key=lambda d: (-value_D[d], task.cost_bytes(expert, d), d))
    return any(_put(search, expert, d) for d in order)


def _value(task: LayerTask, state: Routing, expert: int, device: int, flexibility: float) -> float:
    """Slack for ``expert``, less the price of a device that would be left with few ways to pass tokens on."""
    left = len(task.spare(state, device)) + _free_slots(task, state, device) - task.width_E[expert]
    if left < 0:
        return float("-inf")
    stiff = {0: 1.0, 1: 0.5}.get(left, 0.0)
    return state.slack(device) - task.read_ED[expert][device] - stiff * flexibility * task.mean_capacity


def _put(search: ReplanSearch, expert: int, device: int) -> bool:
    change = with_room(search.task, search.state, expert, device)
    if change is None:
        return False
    search.state = change.applied(search.state)
    search.relieve()
    return True


def _improve(search: ReplanSearch) -> bool:
    """Apply the change that relieves most per byte (free ones first); False when none helps."""
    best = None
    before = search.task.new_bytes(search.state)
    for change in _changes(search):
        after = change.applied(search.state)
        excess, tight = after.relieve()
        gain = search.excess - excess
        if gain <= 10 * after.eps:
            continue
        cost = search.task.new_bytes(after) - before
        worth = (excess <= 0 and cost <= 0, gain if cost <= 0 else 0.0, gain / max(cost, 1e-12))
        if best is None or worth > best[0]:
            best = (worth, after, excess, tight)
    if best is None:
        return False
    _, search.state, search.excess, search.tight = best
    return True


def _changes(search: ReplanSearch) -> Iterator[Change]:
    yield from _swaps(search)
    yield from _additions(search)


def tokens_inside(search: ReplanSearch) -> list[float]:
    """Tokens of every expert that the tight devices serve."""
    return [sum(t for d, t in flow.items() if d in search.tight) for flow in search.state.flow_E]


def _additions(search: ReplanSearch) -> list[Change]:
    """New replicas that lead out of the tight side, the most promising first."""
    task, state = search.task, search.state
    inside_E = tokens_inside(search)
    movable = sorted((e for e, t in enumerate(inside_E) if t > state.eps), key=lambda e: (-inside_E[e], e))
    room = state.relays()
    direct = sorted((d for d in room if state.slack(d) > state.eps), key=lambda d: (-room[d], d))
    passing = sorted((d for d in room if state.slack(d) <= state.eps), key=lambda d: (-_free_slots(task, state, d), d))
    pairs = [(e, d) for e in movable for d in room if d in task.kept_E[e]]
    targets = direct[:_DEVICES_TRIED] + passing[:_DEVICES_TRIED]
    pairs += [(e, d) for e in movable[:_EXPERTS_TRIED] for d in targets]
    changes = []
    for e, d in dict.fromkeys(pairs):
        change = with_room(task, state, e, d)
        if change:
            gain = min(inside_E[e], room[d] - task.read_ED[e][d], search.excess)
            changes.append(Change(change.add, change.remove, gain))
    changes.sort(key=lambda c: (-c.gain, len(c.remove)))
    return changes[:_ADDITIONS_TRIED]


def _free_slots(task: LayerTask, state: Routing, device: int) -> int:
    return task.slots_D[device] - task.slots_used(state, device)


def _swaps(search: ReplanSearch) -> list[Change]:
    """New replicas on the tight side exchanged for lighter new ones outside, or moved there: not a byte more."""
    task, state, tight = search.task, search.state, search.tight
    new = task.new_replicas(state)
    room = state.relays()
    changes = []
    for e, d in new:
        if d not in tight:
            continue
        for f, g in new:
            gain = state.flow_E[e][d] - state.flow_E[f][g]
            if g in room and gain > 0 and _may_swap(task, state, (e, d), (f, g)):
                changes.append(Change(((e, g), (f, d)), ((e, d), (f, g)), min(gain, room[g])))
        for g in room:
            if _may_move(task, state, (e, d), g):
                changes.append(Change(((e, g),), ((e, d),), min(state.flow_E[e][d], room[g])))
    changes.sort(key=lambda c: -c.gain)
    return changes[:_SWAPS_TRIED]


def _may_swap(task: LayerTask, state: Routing, one: Pair, two: Pair) -> bool:
    (e, d), (f, g) = one, two
    if g in state.flow_E[e] or d in state.flow_E[f] or g in task.forbidden_E[e] or d in task.forbidden_E[f]:
        return False
    if d in task.pinned_E[e] or g in task.pinned_E[f]:
        return False
    same_nodes = task.min_nodes == 1 or task.node_D[d] == task.node_D[g]
    same_bytes = task.budget_D is None or task.bytes_E[e] == task.bytes_E[f]
    return same_nodes and same_bytes


def _may_move(task: LayerTask, state: Routing, pair: Pair, target: int) -> bool:
    expert, source = pair
    if target in state.flow_E[expert] or target in task.forbidden_E[expert] or source in task.pinned_E[expert]:
        return False
    if task.min_nodes > 1 and task.node_D[source] != task.node_D[target]:
        return False
    return task.fits(state, target, (expert,))


def prune(search: ReplanSearch) -> None:
    """Take back new replicas that turned out not to be needed, the heaviest first."""
    task = search.task
    new = task.new_replicas(search.state)
    for e, d in sorted(new, key=lambda pair: (-task.bytes_E[pair[0]], search.state.flow_E[pair[0]][pair[1]], pair)):
        if task.may_drop(search.state, e, d):
            after = Change(remove=((e, d),)).applied(search.state)
            excess, tight = after.relieve()
            if excess <= 0:
                search.state, search.excess, search.tight = after, excess, tight
