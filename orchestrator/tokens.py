"""Where commands of this user find a deployment's token: given, in the environment, or in a file that serve keeps."""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ..errors import OperatorError
from .config import check_token

_log = logging.getLogger(__name__)
VARIABLE = "CONCERTINA_TOKEN"


class WrongToken(OperatorError):
    """Another deployment's, or nobody's."""


def token_file(deployment: str) -> Path:
    """The file of a deployment's token.

    Raises
    ------
    OperatorError
        This user has no home directory.
    """
    try:
        return Path.home() / ".concertina" / "tokens" / deployment
    except RuntimeError as e:
        raise OperatorError(f"token: this user has no home directory where it could be kept; give {VARIABLE}") from e


def find_token(deployment: str, given: str | None = None) -> str:
    """The token of a deployment: ``given``, else ``CONCERTINA_TOKEN``, else what serve on this machine wrote.

    Raises
    ------
    OperatorError
        There is none, or it can be none.
    """
    token = given or os.environ.get(VARIABLE)
    return check_token(token if token else _read(deployment))


def where_found(deployment: str, given: str | None = None) -> str:
    """Where `find_token` finds a token, in words."""
    if given:
        return "the one given"
    return f"the one in {VARIABLE}" if os.environ.get(VARIABLE) else f"the one in {token_file(deployment)}"


def _read(deployment: str) -> str:
    path = token_file(deployment)
    try:
        return path.read_text(encoding="ascii").strip()
    except FileNotFoundError:
        raise OperatorError(
            f"token: none for deployment {deployment!r}; give --token or {VARIABLE} "
            f"(concertina serve writes {path} for the user and machine that it runs on)"
        ) from None
    except (OSError, UnicodeDecodeError) as e:
        raise OperatorError(f"token: {path} cannot be read: {e}") from e


@contextlib.contextmanager
def kept_token(deployment: str, token: str, *, needed: bool = True) -> Iterator[None]:
    """Keep the token in its file, readable by this user only, until the end of the block.

    Raises
    ------
    OperatorError
        The file cannot be written, and is ``needed``: nobody was given the token.
    """
    path: Path | None = None
    try:
        path = token_file(deployment)
        _write(path, token)
    except (OSError, OperatorError) as e:
        error = e if isinstance(e, OperatorError) else OperatorError(f"token: {path} cannot be written: {e.strerror}")
        if needed:
            raise error from e
        _log.warning("%s; commands here must be given it", error)
    try:
        yield
    finally:
        if path is not None:
            _remove(path, token)


def _write(path: Path, token: str) -> None:
    """The whole file or none; never one that others can read, however short a time."""
    path.parent.mkdir(parents=True, mode=0o700, exist_ok=True)
    path.parent.chmod(0o700)
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)  # made with mode 0600
    try:
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            file.write(token)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _remove(path: Path, token: str) -> None:
    """Another deployment of that name, in another cluster, may have put its own there since."""
    with contextlib.suppress(OSError):
        if path.read_text(encoding="utf-8", errors="replace") == token:
            path.unlink()
