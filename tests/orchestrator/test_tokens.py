"""The deployment's token: where it is kept and where it is found."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from concertina.errors import OperatorError
from concertina.orchestrator.tokens import VARIABLE, find_token, kept_token, token_file

TOKEN, OTHER = "a" * 32, "b" * 32


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv(VARIABLE, raising=False)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_serve_keeps_it_for_this_user_and_takes_it_away() -> None:
    before = os.umask(0)
    try:
        path = token_file("mine")
        with kept_token("mine", TOKEN):
            assert path == token_file("mine")
            assert (mode(path), mode(path.parent)) == (0o600, 0o700)
            assert find_token("mine") == TOKEN
            assert [p.name for p in path.parent.iterdir()] == ["mine"]
    finally:
        os.umask(before)
    assert not path.exists()


def test_given_comes_before_the_environment_before_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    with kept_token("mine", TOKEN):
        monkeypatch.setenv(VARIABLE, OTHER)
        assert find_token("mine") == OTHER
        assert find_token("mine", "c" * 32) == "c" * 32
        monkeypatch.setenv(VARIABLE, "")
        assert find_token("mine") == TOKEN


def test_without_any_it_says_where_it_looked() -> None:
    with pytest.raises(OperatorError, match="token: none for deployment 'mine'; give --token or CONCERTINA_TOKEN"):
        find_token("mine")


@pytest.mark.parametrize("bad", ["short", "with a space in the middle", "ünïcödé-ünïcödé-ünïcödé", "a" * 20 + "\n"])
def test_what_cannot_be_a_token_is_not_shown(bad: str) -> None:
    with pytest.raises(OperatorError, match="token: expected at least 16") as refused:
        find_token("mine", bad)
    assert bad not in str(refused.value)


def test_a_damaged_file_is_named() -> None:
    path = token_file("mine")
    path.parent.mkdir(parents=True)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(OperatorError, match="tokens/mine cannot be read"):
        find_token("mine")


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / ".concertina").write_text("a file where the directory should be")
    with pytest.raises(OperatorError, match="tokens/mine cannot be written"), kept_token("mine", TOKEN):
        pytest.fail("not reached")


@pytest.mark.parametrize("homeless", [False, True])
def test_a_token_that_was_given_needs_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, homeless: bool
) -> None:
    """A container may have no place for it."""
    if homeless:
        monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home directory")))
    else:
        (tmp_path / ".concertina").write_text("a file where the directory should be")
    with kept_token("mine", TOKEN, needed=False):
        assert "token: " in caplog.text
    with pytest.raises(OperatorError, match="token: "), kept_token("mine", TOKEN):
        pytest.fail("not reached")


def test_the_file_of_another_deployment_of_that_name_stays() -> None:
    path = token_file("mine")
    with kept_token("mine", TOKEN):
        path.write_text(OTHER)
    assert path.read_text() == OTHER


def test_a_write_that_fails_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(source: str, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", broken)
    with pytest.raises(OperatorError, match="No space left"), kept_token("mine", TOKEN):
        pytest.fail("not reached")
    assert list(token_file("mine").parent.iterdir()) == []
