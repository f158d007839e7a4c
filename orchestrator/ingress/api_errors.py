"""Errors as the OpenAI API shapes them: ``{"error": {"message", "type", "param", "code"}}``."""

from __future__ import annotations

from typing import Any

from ...errors import ConcertinaError


class ApiError(ConcertinaError):
    """An answer other than success.

    Parameters
    ----------
    status : int
        HTTP status.
    message : str
        For people.
    kind, param, code : str
        The OpenAI error's ``type``, the path of the offending field and the machine-readable code.
    retry_after_s : int or None
        When to come back, sent as ``Retry-After``.
    """

    def __init__(
        self,
        status: int,
        message: str,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(status, message, kind, param, code, retry_after_s)
        self.status = status
        self.message = message
        self.kind = kind
        self.param = param
        self.code = code
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        return self.message

    @property
    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        headers = {} if self.retry_after_s is None else {"Retry-After": str(self.retry_after_s)}
        return headers | ({"WWW-Authenticate": "Bearer"} if self.status == 401 else {})


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """400: the request must be changed."""
    return ApiError(400, message, param=param, code=code)


def unsupported(param: str, hint: str = "") -> ApiError:
    """400: a field whose meaning we could not honour; ignoring it would give a wrong answer."""
    return invalid(f"{param} is not supported{': ' + hint if hint else ''}", param, "unsupported_parameter")


def context_exceeded(limit: int, prompt: int, completion: int, param: str) -> ApiError:
    """400: prompt and completion do not fit into the context together."""
    return invalid(
        f"This model's maximum context length is {limit} tokens. However, you requested {prompt + completion} "
        f"tokens ({prompt} in the prompt, {completion} in the completion). Please reduce the length of either.",
        param,
        "context_length_exceeded",
    )


def server_error(status: int, message: str, code: str, retry_after_s: int | None = None) -> ApiError:
    """5xx: nothing is wrong with the request."""
    return ApiError(status, message, "server_error", None, code, retry_after_s)
