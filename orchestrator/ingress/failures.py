"""What the API answers to the failures of routers and engines."""

from __future__ import annotations

from ...workers.engine.errors import NeverFits, QueueFull, RequestRefused
from .api_errors import ApiError, invalid, server_error
from .members import NoWorker, StreamLost

CLIENT_GONE = 499  # nginx's number for a client that closed its connection; seen in logs and metrics only
FAILURES = (ApiError, NoWorker, StreamLost, RequestRefused)


def api_error(error: Exception, retry_after_s: int = 1) -> ApiError:
    """The answer to one of `FAILURES`."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QueueFull):
        return ApiError(429, f"Too busy: {error}", "rate_limit_error", None, "queue_full", retry_after_s)
    if isinstance(error, NeverFits):
        return invalid(str(error), code="context_length_exceeded")
    if isinstance(error, RequestRefused):
        return invalid(str(error))
    return server_error(503, f"Try again later: {error}", "unavailable", retry_after_s)
