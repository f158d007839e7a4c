"""What ties a process to its deployment: a note of who it is, and a thread that ends it with its controller.

Imports Ray.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import ray

from .config import NAMESPACE
from .durable import Durable

_log = logging.getLogger(__name__)
_NOTE = "process/"
_POLL_S = 0.01


@dataclass(frozen=True, slots=True)
class Identity:
    """A process of the cluster, told from a later one with its number by its start (in ticks since the node's boot)."""

    node: str
    pid: int
    started: int

    @classmethod
    def of_this_process(cls) -> Identity:
        pid = os.getpid()
        _, started = _stat(pid)
        return cls(ray.get_runtime_context().get_node_id(), pid, started)

    def note(self, deployment: str, actor: str) -> None:
        """Write down that this is the process of ``actor``."""
        Durable(deployment).put(_NOTE + actor, json.dumps(asdict(self)).encode())

    @classmethod
    def noted(cls, deployment: str, actor: str) -> Identity | None:
        """The process of ``actor``, or None while it has not begun."""
        note = Durable(deployment).get(_NOTE + actor)
        return None if note is None else cls(**json.loads(note))

    @staticmethod
    def strike(deployment: str, actor: str) -> None:
        """Forget the process of ``actor``."""
        Durable(deployment).remove(_NOTE + actor)

    def runs_here(self) -> bool:
        """Whether it lives; on its own node only."""
        state, started = _stat(self.pid)
        return started == self.started and state not in ("Z", "X")

    def end_here(self, grace_s: float, limit_s: float) -> bool:
        """Wait ``grace_s`` for its end, then kill it; whether it is gone after ``limit_s``. On its own node only."""
        if not self._gone_within(grace_s):
            os.kill(self.pid, signal.SIGKILL)
        return self._gone_within(limit_s)

    def _gone_within(self, seconds: float) -> bool:
        end_s = time.monotonic() + seconds
        while self.runs_here():
            if time.monotonic() > end_s:
                return False
            time.sleep(_POLL_S)
        return True


def _stat(pid: int) -> tuple[str, int]:
    """State and start of a process (proc(5), fields 3 and 22); none has an empty state."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "", -1
    return fields[0], int(fields[19])


@dataclass(frozen=True, slots=True)
class Lifeline:
    """Holds a detached actor's process for as long as the controller that made it, or a restart of it, is there.

    Parameters
    ----------
    deployment, actor : str
        Whose process it holds.
    controller, controller_id : str
        Name and Ray's id of the controller's actor: both stay when Ray restarts it, and a later controller of the same
        name is another one.
    """

    deployment: str
    actor: str
    controller: str
    controller_id: str
    every_s: float = 2.0

    def hold(self) -> None:
        """Note who this process is, and end it when nothing holds it any more."""
        Identity.of_this_process().note(self.deployment, self.actor)
        threading.Thread(target=self._watch, name="lifeline", daemon=True).start()

    def _watch(self) -> None:
        raylet = os.getppid()
        while os.getppid() == raylet and (self._held() or self._held_later()):
            time.sleep(self.every_s)
        _log.warning("%s: nobody holds this process any more (%s): it ends", self.actor, self.controller)
        os._exit(1)  # other threads may hang; what it has on the machine goes with it

    def _held_later(self) -> bool:
        """Asked a second time: one answer may be wrong."""
        time.sleep(self.every_s)
        return self._held()

    def _held(self) -> bool:
        try:
            controller = ray.get_actor(self.controller, NAMESPACE)
        except ValueError:
            return False
        except ray.exceptions.RayError as e:  # no answer is not a no; without its raylet Ray ends this process itself
            _log.warning("%s: cannot tell whether %s is there: %s", self.actor, self.controller, e)
            return True
        return bool(controller._actor_id.hex() == self.controller_id)
