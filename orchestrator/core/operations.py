"""What is asked of a deployment: one operation at a time, the newest wins. Pure."""

from __future__ import annotations

from dataclasses import replace

from ...errors import OperatorError
from .layout import Layout
from .state import Leaving, Operation, OperationKind, Outcome, Stage, State

_KEPT = 50


def request(
    state: State,
    kind: OperationKind,
    text: str,
    route: tuple[Layout, ...],
    now_s: float,
    leaving: Leaving | None = None,
    subject: str = "",
) -> State:
    """Ask for a layout.

    If the operation under way goes there, or has the same kind and ``subject`` (see `Operation`), it is that one.
    Otherwise it is superseded: before commit its generation is withdrawn; after that, the new one follows it. Being
    there already is a new operation that is done at once.
    """
    cordons = ""
    if leaving is not None:
        cordons = leaving.node if leaving.node not in state.cordoned else ""
        deadlines, cordoned = {**state.deadlines, **leaving.deadlines}, state.cordoned | ({cordons} - {""})
        state = replace(state, deadlines=deadlines, cordoned=cordoned)
    current = state.operation
    again = subject and current is not None and (current.kind, current.subject) == (kind, subject)
    if current is not None and (again or current.goal == route[-1]):
        if cordons and not current.cordons:  # whoever cancels it lifts that, too
            current = replace(current, cordons=cordons)
            return replace(state, operations=(*state.operations[:-1], current))
        return state
    if current is not None:
        state = _drop(state, "superseded", f"by {kind} {text}", now_s)
    operation = Operation(f"op-{state.next_operation}", kind, text, route, now_s, cordons=cordons, subject=subject)
    at_rest = state.pending is None and not state.broken and not (leaving is not None and leaving.begun)
    if at_rest and state.serving is not None and state.serving.layout == route[-1]:
        operation = replace(
            operation, outcome="done", reason="nothing to do", committed_s=now_s, ended_s=now_s, route=()
        )
        state = replace(state, deadlines=_of_leavers(state))
    operations = (*state.operations, operation)[-_KEPT:]
    attempts = state.attempts if state.broken else 0  # those that recover what serves go on
    return replace(state, operations=operations, next_operation=state.next_operation + 1, attempts=attempts)


def cancel(state: State, operation_id: str, now_s: float) -> State:
    """Give an operation up.

    Raises
    ------
    OperatorError
        There is no such operation, it has ended, or one of its generations has been, or is being, committed.
    """
    current = state.operation
    if current is None or current.id != operation_id:
        found = next((o for o in state.operations if o.id == operation_id), None)
        if found is None:
            known = ", ".join(o.id for o in state.operations[-5:]) or "none"
            raise OperatorError(f"operation: {operation_id!r} is unknown; the latest are: {known}")
        raise OperatorError(f"operation: {operation_id} has ended already ({found.outcome})")
    begun = state.serving is not None and state.serving.layout in current.route
    pending = state.pending
    if pending is not None and pending.stage is Stage.COMMIT:  # not of a recovery, or of the operation before
        begun = begun or (not pending.recovery and pending.record.layout in current.route)
    if current.committed_s or begun:
        raise OperatorError(f"operation: {operation_id} is being committed; ask for another size instead")
    state = replace(state, cordoned=state.cordoned - {current.cordons})
    return _drop(state, "canceled", "as asked", now_s)


def end(state: State, outcome: Outcome, reason: str, now_s: float) -> State:
    """Note what became of the operation under way, if there is one; where it went is not kept."""
    if state.operation is None:
        return state
    ended = replace(state.operation, outcome=outcome, reason=reason, ended_s=now_s, route=())
    # Devices that have left may be handing over still: of one that is superseded after its commit, or of earlier ones.
    deadlines = state.deadlines
    if outcome == "done":
        deadlines = {}
    elif outcome != "superseded":
        deadlines = _of_leavers(state)
    return replace(state, operations=(*state.operations[:-1], ended), deadlines=deadlines)


def _of_leavers(state: State) -> dict[str, float]:
    """Deadlines of devices that no longer serve."""
    here = () if state.serving is None else state.serving.layout.devices
    return {device: until_s for device, until_s in state.deadlines.items() if device not in here}


def committed(state: State, now_s: float) -> State:
    """Note that the operation's goal serves."""
    operation, serving = state.operation, state.serving
    if operation is None or operation.committed_s or serving is None or serving.layout != operation.goal:
        return state
    return replace(state, operations=(*state.operations[:-1], replace(operation, committed_s=now_s)))


def ahead(state: State) -> tuple[Layout, ...]:
    """Where the operation under way has still to go, in turn; empty if there is none, or its goal serves."""
    operation, serving = state.operation, state.serving
    if operation is None or (serving is not None and serving.layout == operation.goal):
        return ()
    if serving is None or serving.layout not in operation.route:
        return operation.route
    return operation.route[operation.route.index(serving.layout) + 1 :]


def next_layout(state: State) -> Layout | None:
    """Where the operation under way goes next; None if there is none, or its goal serves."""
    return next(iter(ahead(state)), None)


def _drop(state: State, outcome: Outcome, reason: str, now_s: float) -> State:
    state = end(state, outcome, reason, now_s)
    pending = state.pending
    if pending is None or pending.recovery or pending.stage is Stage.COMMIT:
        return state
    return replace(state, pending=replace(pending, doomed=f"{outcome} {reason}"))
