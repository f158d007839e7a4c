"""Why a request is refused. Each kind has a name of its own on the wire."""

from __future__ import annotations

from typing import ClassVar

from ...errors import CallerError


class RequestRefused(CallerError):
    """Base of all refusals; ``kind`` is its name on the wire."""

    kind: ClassVar[str] = "refused"


class InvalidRequest(RequestRefused):
    """A field is malformed or out of range."""

    kind: ClassVar[str] = "invalid"


class NeverFits(RequestRefused):
    """The request is longer than the model's context or than the whole KV cache."""

    kind: ClassVar[str] = "never_fits"


class CacheTooSmall(NeverFits):
    """The request is longer than this device's whole KV cache; another device may have more."""

    kind: ClassVar[str] = "cache_too_small"


class QueueFull(RequestRefused):
    """Too many sequences wait already; the same request may be sent again later."""

    kind: ClassVar[str] = "queue_full"


def refusal(kind: str, message: str) -> RequestRefused:
    """The error that a worker named on the wire; an unknown kind becomes the base class."""
    for cls in (InvalidRequest, NeverFits, CacheTooSmall, QueueFull):
        if cls.kind == kind:
            return cls(message)
    return RequestRefused(message)
