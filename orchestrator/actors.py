"""Memory owners and workers as detached Ray actors: they outlive a controller that restarts, and no other."""

from __future__ import annotations

from ..workers.background import stay_in_background
from ..workers.owner_roles import OwnerConfig
from ..workers.roles import WorkerConfig
from ..workers.services import OwnerService, WorkerService
from .lifeline import Lifeline


class OwnerActor(OwnerService):
    """A memory owner that its lifeline holds."""

    def __init__(self, lifeline: Lifeline, config: OwnerConfig, adopt_from: str | None = None) -> None:
        stay_in_background()
        lifeline.hold()
        super().__init__(config, adopt_from)


class WorkerActor(WorkerService):
    """A worker that its lifeline holds."""

    def __init__(self, lifeline: Lifeline, config: WorkerConfig) -> None:
        lifeline.hold()
        super().__init__(config)
