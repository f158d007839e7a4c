"""From an HTTP request to a checked JSON object: key, size, syntax."""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Sequence
from typing import Any

from starlette.requests import Request

from .api_errors import ApiError, invalid
from .fields import Fields


class ApiKeys:
    """The accepted keys, as digests only; comparing takes the same time whatever was sent.

    Parameters
    ----------
    keys : sequence of str
        Empty: no key is asked for.
    """

    def __init__(self, keys: Sequence[str]) -> None:
        self._digests = [_digest(key) for key in keys]

    def check(self, authorization: str | None) -> None:
        """Accept an ``Authorization`` header.

        Raises
        ------
        ApiError
            401: there is none, or it is not ``Bearer`` with an accepted key.
        """
        if not self._digests:
            return
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise _unauthorized("You did not provide an API key. Send 'Authorization: Bearer YOUR_KEY'.")
        given = _digest(key.strip())
        if sum(hmac.compare_digest(given, digest) for digest in self._digests) == 0:  # looks at all of them
            raise _unauthorized("Incorrect API key provided.")


async def read_json(request: Request, most_bytes: int) -> Fields:
    """The body as a JSON object.

    Raises
    ------
    ApiError
        413: larger than ``most_bytes``; 400: not JSON, not an object, or not Unicode.
    ClientDisconnect
        The client left before the end of the body.
    """
    raw = await _read(request, most_bytes)
    try:
        data: Any = json.loads(raw.decode("utf-8-sig"))  # by itself it would take halves of characters for text
        if b"\\u" in raw:
            json.dumps(data, ensure_ascii=False).encode()  # a lone surrogate is no text
    except (ValueError, RecursionError) as e:
        raise invalid(f"The body is not valid JSON: {e}", code="invalid_json") from e
    if not isinstance(data, dict):
        raise invalid(f"The body must be a JSON object, not {type(data).__name__}", code="invalid_json")
    return Fields(data)


async def _read(request: Request, most_bytes: int) -> bytes:
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > most_bytes:
        raise _too_large(most_bytes)
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > most_bytes:
            raise _too_large(most_bytes)
        parts.append(part)
    return b"".join(parts)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode(errors="surrogatepass")).digest()


def _unauthorized(message: str) -> ApiError:
    return ApiError(401, message, code="invalid_api_key")


def _too_large(most_bytes: int) -> ApiError:
    return ApiError(413, f"The body is larger than {most_bytes} bytes", code="request_too_large")
