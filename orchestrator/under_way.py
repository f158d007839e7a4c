"""The effects that are under way: each runs once at a time, and one that fails is tried again after a while."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from ..errors import ConcertinaError, OperatorError
from .core.facts import Effect, Fault

_log = logging.getLogger(__name__)
_BACK_OFF_S = 0.3  # before an effect that failed is tried again; twice as long each time where no generation waits
_LONGEST_BACK_OFF_S = 10.0


@dataclass(slots=True)
class UnderWay:
    """Starts effects, and remembers what failed.

    Parameters
    ----------
    do : callable
        Carries an effect out.
    ended : callable
        Called with an effect that has ended, and whether it failed; and once more before one that failed may be tried
        again.
    """

    do: Callable[[Effect], Awaitable[None]]
    ended: Callable[[Effect, bool], None]
    tasks: dict[Effect, asyncio.Task[None]] = field(default_factory=dict)
    _errors: dict[Effect, Fault] = field(default_factory=dict)
    _vain: dict[Effect, tuple[int, str]] = field(default_factory=dict)  # failures in a row, and the last one's reason
    _resting: set[Effect] = field(default_factory=set)

    @property
    def busy(self) -> frozenset[Effect]:
        """Effects that are under way, or have failed a moment ago; nobody waits for those that rest for longer."""
        return frozenset(self.tasks.keys() - self._resting)

    @property
    def trouble(self) -> str:
        """What has failed several times in a row, and is tried again; empty if nothing has."""
        failures, why = max(self._vain.values(), default=(0, ""))
        return f"tried {failures} times so far: {why}" if failures > 1 else ""

    def take_errors(self) -> dict[Effect, Fault]:
        """What has failed since this was last asked."""
        errors, self._errors = self._errors, {}
        return errors

    def start(self, effects: Sequence[Effect], *, alone: bool) -> None:
        """Start those that are not under way; ``alone``: none of them is for a generation, which has its own pauses.

        One that rests, and that a generation needs, rests no more: it is started at the next call.
        """
        self._vain = {effect: told for effect, told in self._vain.items() if effect in {*effects, *self.tasks}}
        for effect in effects:
            if effect in self._resting and not alone:
                self.tasks[effect].cancel()
            elif effect not in self.tasks:
                self.tasks[effect] = asyncio.create_task(self._run(effect, alone))

    def cancel(self) -> None:
        for task in self.tasks.values():
            task.cancel()

    async def _run(self, effect: Effect, alone: bool) -> None:
        try:
            await self.do(effect)
            self._vain.pop(effect, None)
        except Exception as e:  # noqa: BLE001 - one that is not noted would be asked for again, for ever
            _log.error("%s: %s", effect, e, exc_info=not isinstance(e, ConcertinaError))
            self._errors[effect] = Fault(error_text(e), isinstance(e, OperatorError))
            self.ended(effect, True)
            await self._rest(effect, error_text(e), alone)
        finally:
            del self.tasks[effect]
            self._resting.discard(effect)
            self.ended(effect, False)

    async def _rest(self, effect: Effect, why: str, alone: bool) -> None:
        failures = self._vain.get(effect, (0, ""))[0] + 1
        self._vain[effect] = failures, why
        await asyncio.sleep(_BACK_OFF_S)
        if alone and failures > 1:
            self._resting.add(effect)
            self.ended(effect, False)
            await asyncio.sleep(min(_BACK_OFF_S * 2.0 ** min(failures - 1, 10), _LONGEST_BACK_OFF_S) - _BACK_OFF_S)


def error_text(error: Exception) -> str:
    """Our own errors speak for themselves; others need their type."""
    return str(error) if isinstance(error, ConcertinaError) else f"{type(error).__name__}: {error}"
