"""One engine's life: it starts, goes from generation to generation, parks, recovers, retires, and hands over."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..errors import InternalError, PeerLost
from .adoption import await_sequences
from .engine.core import EngineConfig
from .engine.engine import Engine
from .engine.lockstep import Retire, Row, Swap
from .frontend import Frontend
from .mapping import Part
from .roles import WorkerConfig

_log = logging.getLogger(__name__)
_JOIN_S = 5.0


@dataclass(frozen=True, slots=True)
class Running:
    """The engine's loop turns."""


@dataclass(frozen=True, slots=True)
class Parked:
    """The loop has stopped with all sequences, and waits for another generation. Clients may go on submitting."""

    reason: str


@dataclass(frozen=True, slots=True)
class Retired:
    """It has no part in the generation that came. All sequences are there; they wait to be handed over."""

    generation: int


@dataclass(frozen=True, slots=True)
class Failed:
    """The engine has ended for good."""

    reason: str


ServiceState = Running | Parked | Retired | Failed


class Service:
    """An engine in its thread, and the door for its clients, from the first generation on.

    `commit`, `withdraw`, `release` and `stop` are called one at a time, everything else at any time.

    Parameters
    ----------
    config : WorkerConfig
    first : Part
        The generation to begin with.
    parts : dict
        Prepared generations; one is taken out when it is switched to. Guarded by ``changed``.
    changed : Condition
        Guards the state, and is notified of its changes.

    Attributes
    ----------
    part : Part
        The generation that runs, or ran last.
    state : ServiceState
    """

    def __init__(self, config: WorkerConfig, first: Part, parts: dict[int, Part], changed: threading.Condition) -> None:
        self.part = first
        self.state: ServiceState = Running()
        self._config, self._parts, self._changed = config, parts, changed
        self._threads = config.threads
        self._left: Part | None = None
        self._offered = 0
        self._heir = ""  # the device that running sequences go on at, if it takes them over as this one leaves
        model = first.assignment.generation.model
        engine_config = EngineConfig(
            config.scheduler,
            model.vocab_size,
            model.eos_ids,
            prefix_caching=config.prefix_caching,
            emulated_step_ms=config.emulated_step_ms,
        )
        self._due = first.kv.running  # of `Engine.submitted`, once sequences whose KV is here have come
        self.engine = Engine(first.decoder, first.kv, first.exchange, engine_config)
        self.engine.generation = first.generation
        self.engine.on_boundary = self._at_boundary
        self.frontend = Frontend(self.engine, config.host, 0, config.token)
        self._loop = self._turn()

    @property
    def generation(self) -> int:
        """The generation that runs, or ran last; 0 for none: it retired."""
        return 0 if isinstance(self.state, Retired) else self.part.generation

    @property
    def stuck(self) -> str:
        """Why the engine counts as hung though its process lives; empty if it does not.

        It does once its thread has not been seen to move for as long as others would wait for it.
        """
        part = self.part
        limit_s = part.assignment.generation.exchange.timeout_s
        if isinstance(self.state, Running) and time.monotonic() - part.exchange.alive_s > limit_s:
            return f"its engine has made no progress for {limit_s:g} s"
        return ""

    def commit(self, generation: int, heir: str) -> None:
        """Go to a prepared generation, or retire if it was not prepared; see `Worker.commit`.

        Raises
        ------
        InternalError
            The engine has failed.
        """
        with self._changed:
            state, part = self.state, self._parts.get(generation)
        if isinstance(state, Failed):
            raise InternalError(f"worker {self._config.name}: {state.reason}")
        if generation <= self.part.generation or state == Retired(generation):
            return
        if isinstance(state, Running):
            self._offer(generation, part, heir)
        elif part is not None:
            self._recover(part)
        elif isinstance(state, Parked):
            self._join()
            self.engine.retire()
            self._end(Retired(generation))

    def runs(self, generation: int) -> bool:
        """Whether it makes steps in that generation, or waits to."""
        return generation == self.part.generation and isinstance(self.state, Running)

    def give_up(self, generation: int) -> None:
        """Have the engine stop, if it runs that generation, as after the loss of a peer."""
        part = self.part
        if part.generation == generation:
            part.exchange.give_up("the controller knows that a member is lost")

    def offers(self, generation: int) -> bool:
        """Whether it runs and is ready for a generation that has not come."""
        return generation == self._offered and isinstance(self.state, Running)

    def withdraw(self, generation: int) -> bool:
        """Take back what was offered for a generation, if anything; False if it has been switched to."""
        if generation == self._offered and not self.engine.withdraw(generation):
            return False
        if generation == self._offered:
            self._offered = 0
        return generation != self.part.generation

    def release(self, moved_to: str) -> None:
        """End a retired engine's sequences, tell their clients where they go on, and close everything.

        Raises
        ------
        InternalError
            The engine has not retired.
        """
        if not isinstance(self.state, Retired):
            raise InternalError(f"worker {self._config.name}: it has not retired and cannot be released")
        self._join()
        self.frontend.emit(self.engine.hand_over(moved_to))
        self._close()

    def stop(self) -> None:
        """End the loop, and with it those of all members, and close everything."""
        if isinstance(self.state, Running):
            self.engine.stop()
        self.frontend.close()
        self._join()
        self._close()

    def check(self) -> None:
        """Raise InternalError if the engine has failed."""
        if isinstance(self.state, Failed):
            raise InternalError(f"worker {self._config.name}: {self.state.reason}")

    def _offer(self, generation: int, part: Part | None, heir: str) -> None:
        if generation == self._offered:
            return
        if part is not None and part.inheritance is not None:
            part.inheritance.catch_up(self.engine)
        before, self._offered, self._heir = self._offered, generation, heir
        self.engine.withdraw(before)  # an offer that led nowhere gives way to a newer one
        try:
            self.engine.offer(Retire(generation) if part is None else Swap(generation, part.decoder, part.exchange))
        except InternalError:
            self._offered = before
            raise

    def _recover(self, part: Part) -> None:
        """From a standstill the members meet again in the new generation, without a word in the old one."""
        self._join()
        if part.inheritance is not None:
            part.inheritance.close()  # there was no common boundary to take it at
        self.engine.recover(Swap(part.generation, part.decoder, part.exchange))
        with self._changed:
            self._offered = 0
            self.part = self._parts.pop(part.generation)
            self._become(Running())
        self._loop = self._turn()

    def _turn(self) -> threading.Thread:
        self._begin_to_move()
        thread = threading.Thread(target=self._run, name="engine", daemon=True)
        thread.start()
        return thread

    def _run(self) -> None:
        self._set_threads()
        try:
            end = self.engine.run(self.frontend.emit)
        except PeerLost as e:
            _forget_frames(e)  # else what is left here stays mapped as long as the exchange remembers its error
            self._end(Parked(str(e)))
        except Exception as e:  # noqa: BLE001 - whatever ends the engine is reported, and ends what clients wait for
            _log.exception("worker %s: its engine failed", self._config.name)
            self._end(Failed(f"{type(e).__name__}: {e}"))
        else:
            if end == "retired" and self._heir:
                self._part_with_running()
            self._end(Retired(self._offered) if end == "retired" else Parked("a member stopped the generation"))

    def _part_with_running(self) -> None:
        """The heir has what running sequences have: they go on there, and nothing of the KV is held here any more."""
        try:
            self.frontend.emit(self.engine.hand_over(self._heir, running=True))
            self.part.kv.close()
        except Exception:  # noqa: BLE001 - `release` hands over whatever is left
            _log.exception("worker %s: its running sequences wait to be released", self._config.name)

    def _end(self, state: Parked | Retired | Failed) -> None:
        """The loop has ended; peers shall notice unless they have agreed to it."""
        _log.info("worker %s: %s", self._config.name, state)
        part = self.part
        with self._changed:
            self._become(state)
        self._leave()
        if not isinstance(state, Retired):
            part.close()
        if isinstance(state, Failed):
            self.frontend.close()

    def _become(self, state: ServiceState) -> None:
        self.state = state
        self._changed.notify_all()

    def _at_boundary(self, rows: Sequence[Row]) -> None:
        """In the engine's thread: note that a swap has happened, and leave the generation before.

        It is left only at the boundary after: then every member has come, and nobody still reads what was sent there.
        """
        self._leave()
        patience = 0.5  # of a step: after a failure all have stood still for longer
        if self.engine.generation != self.part.generation:
            patience = 0.25
            with self._changed:
                coming = self._parts[self.engine.generation]
            if coming.inheritance is not None:  # before anybody hears of it: then pages of leavers may be freed
                coming.inheritance.take(self.engine)
                self._due = coming.inheritance.due
            with self._changed:
                self._left, self.part = self.part, self._parts.pop(self.engine.generation)
                self._offered = 0
                self._begin_to_move()
                self._changed.notify_all()
            self._set_threads()
        if self._due > self.engine.submitted:
            await_sequences(self.engine, self._due, rows, patience)
        self._due = 0

    def _begin_to_move(self) -> None:
        """From now on the engine's thread is to be seen in the exchange of its part."""
        self.part.exchange.alive_s = time.monotonic()

    def _close(self) -> None:
        self.frontend.close()
        self._leave()
        self.part.close()
        self.engine.on_boundary = None  # or all that is mapped here waits for the garbage collector

    def _leave(self) -> None:
        left, self._left = self._left, None
        if left is not None:
            left.close()

    def _set_threads(self) -> None:
        """Each thread has a number of its own."""
        self._threads = self.part.assignment.threads or self._threads
        torch.set_num_threads(self._threads)

    def _join(self) -> None:
        if self._loop is not threading.current_thread():
            self._loop.join(_JOIN_S)


def _forget_frames(error: BaseException | None) -> None:
    """Drop what an error and its causes remember of where they were raised."""
    while error is not None:
        error.__traceback__ = None
        error = error.__cause__ or error.__context__
