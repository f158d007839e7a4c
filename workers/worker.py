"""The worker of one device: takes roles in generations, runs the engine, answers the ingress. Knows no Ray."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Sequence
from dataclasses import replace

import torch

from ..errors import InternalError
from .engine.core import EngineConfig
from .engine.engine import Engine
from .engine.lockstep import Retire, Row, Swap
from .frontend import Frontend
from .generation import Assignment
from .mapping import Part, join
from .roles import WorkerConfig, WorkerReport

_log = logging.getLogger(__name__)


class Worker:
    """One worker. Methods may be called from any thread; `prepare` runs beside a generation that serves.

    Parameters
    ----------
    config : WorkerConfig
    """

    def __init__(self, config: WorkerConfig) -> None:
        torch.set_num_threads(config.threads)
        self.config = config
        self._prepared: dict[int, Part] = {}
        self._part: Part | None = None
        self._engine: Engine | None = None
        self._frontend: Frontend | None = None
        self._loop: threading.Thread | None = None
        self._left: Part | None = None
        self._offered = 0
        self._failed = ""
        self._lock = threading.Lock()

    def prepare(self, assignment: Assignment) -> None:
        """Map a generation's pages and join its exchange; returns when all members have joined.

        Raises
        ------
        ConcertinaError
            It cannot be done; whatever runs here goes on.
        """
        with self._lock:
            if assignment.generation.id in self._prepared:
                return
        part = join(assignment)
        with self._lock:
            self._prepared[part.generation] = part

    def abandon(self, generation: int) -> None:
        """Let go of a generation that was prepared and will not come."""
        with self._lock:
            part = self._prepared.pop(generation, None)
        if part is not None:
            part.close()

    def commit(self, generation: int) -> None:
        """Go to a prepared generation at the next boundary at which all members do.

        Without a generation that runs, this starts the engine. A generation that was not prepared here is one that
        this worker has no part in: it retires at that boundary.
        """
        with self._lock:
            if generation in (self._serving(), self._offered):
                return
            part = self._prepared.get(generation)
            if self._engine is None:
                if part is None:
                    raise InternalError(f"worker {self.config.name}: generation {generation} was not prepared")
                self._start(part)
                return
            if part is None:
                self._engine.offer(Retire(generation))
            else:
                self._engine.offer(Swap(generation, part.decoder, part.kv, part.exchange))
            self._offered = generation

    def address(self) -> tuple[str, int]:
        """Where the ingress connects.

        Raises
        ------
        InternalError
            There is no engine yet.
        """
        if self._frontend is None:
            raise InternalError(f"worker {self.config.name} serves no generation yet")
        return self.config.host, self._frontend.port

    def report(self) -> WorkerReport:
        """State and counters now."""
        with self._lock:
            engine, part = self._engine, self._part
            report = WorkerReport(
                self.config.name, os.getpid(), frozenset(self._prepared), self._serving(), self._failed
            )
        if engine is None or part is None:
            return report
        counts = tuple(map(tuple, part.experts.counts_LE.tolist()))
        return replace(report, load=engine.load, stats=engine.stats, counts_LE=counts)

    def stop(self) -> None:
        """End the engine and close what is open."""
        engine, frontend = self._engine, self._frontend
        if engine is not None:
            engine.stop()
        if frontend is not None:
            frontend.close()
        if self._loop is not None and self._loop is not threading.current_thread():
            self._loop.join(timeout=5)
        self._leave()

    def _serving(self) -> int:
        return self._part.generation if self._part is not None else 0

    def _start(self, part: Part) -> None:
        """The first generation: engine, its loop and the door for the ingress."""
        model = part.assignment.generation.model
        config = EngineConfig(
            self.config.scheduler, model.vocab_size, model.eos_ids, prefix_caching=self.config.prefix_caching
        )
        self._engine = engine = Engine(part.decoder, part.kv, part.exchange, config)
        engine.generation = part.generation
        engine.on_boundary = self._at_boundary
        self._frontend = Frontend(engine, self.config.host, 0, self.config.token)
        self._prepared.pop(part.generation)
        self._part = part
        self._loop = threading.Thread(target=self._run, args=(engine,), name="engine", daemon=True)
        self._loop.start()

    def _run(self, engine: Engine) -> None:
        assert self._frontend is not None
        try:
            end = engine.run(self._frontend.emit)
            _log.info("worker %s: its engine %s", self.config.name, end)
            if end == "retired":
                self._leave()
        except Exception as e:  # noqa: BLE001 - whatever ends the engine is reported, and ends what clients wait for
            _log.exception("worker %s: its engine failed", self.config.name)
            self._failed = f"{type(e).__name__}: {e}"
            self._frontend.close()

    def _at_boundary(self, rows: Sequence[Row]) -> None:
        """In the engine's thread: note that a swap has happened, and leave the generation before.

        It is left only at the boundary after: then every member has come, and nobody still reads what was sent there.
        """
        assert self._engine is not None
        if self._left is not None:
            self._left.close()
            self._left = None
        if self._engine.generation != self._serving():
            with self._lock:
                self._left, self._part = self._part, self._prepared.pop(self._engine.generation)

    def _leave(self) -> None:
        """Let go of the generation that ran here, and of one that was left before."""
        with self._lock:
            parts = [self._left, self._part]
            self._left = self._part = self._engine = None
        for part in parts:
            if part is not None:
                part.close()
