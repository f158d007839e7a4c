"""I1: text never depends on grouping; I2: no half characters; I3: choices do not depend on grouping either."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from concertina.orchestrator.ingress.choice import Choice, Entry
from concertina.orchestrator.ingress.text import StopMatcher
from concertina.orchestrator.ingress.tokenizer import Tokenizer
from concertina.workers.protocol import EngineOutput, TokenLogprob
from hypothesis import given, settings
from hypothesis import strategies as st

PROMPT = (5, 6)
GROUPS = st.lists(st.integers(1, 5), min_size=1)
WORDS = st.text("abc", min_size=1, max_size=4)


@pytest.fixture(scope="module")
def byte_level(checkpoint: Path) -> Tokenizer:
    return Tokenizer.load(str(checkpoint))


@pytest.fixture(scope="module")
def pieces(piece_checkpoint: Path) -> Tokenizer:
    return Tokenizer.load(str(piece_checkpoint))


def grouped(items: Sequence[int], sizes: Sequence[int]) -> list[tuple[int, ...]]:
    """``items`` cut into groups of these sizes, which repeat."""
    groups, at = [], 0
    while at < len(items):
        size = sizes[len(groups) % len(sizes)]
        groups.append(tuple(items[at : at + size]))
        at += size
    return groups


def first_stop(text: str, stops: Sequence[str]) -> int | None:
    """Where text ends, found character by character: the oracle of `StopMatcher`."""
    for end in range(len(text) + 1):
        ending = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if ending:
            return min(ending)
    return None


def streamed(tokenizer: Tokenizer, ids: Sequence[int], prompt: Sequence[int] = PROMPT) -> list[str]:
    detokenizer = tokenizer.detokenizer(prompt)
    return [*(detokenizer.push(i) for i in ids), detokenizer.flush()]


@given(ids=st.lists(st.integers(0, 330), max_size=40))
def test_byte_level_stream_is_the_whole_decode(byte_level: Tokenizer, ids: list[int]) -> None:
    """I1, for any ids: special, added, invalid UTF-8, beyond the vocabulary."""
    assert "".join(streamed(byte_level, ids)) == byte_level.decode(ids)


@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=30))
def test_no_half_characters(byte_level: Tokenizer, text: str) -> None:
    """I2: U+FFFD appears only where the text has it."""
    parts = streamed(byte_level, byte_level._encode(text, False))
    assert "".join(parts) == text
    assert "".join(parts).count("\ufffd") == text.count("\ufffd")


@given(text=st.text(st.sampled_from("the ed中文é🎉 ."), max_size=30))
def test_pieces_stream_is_the_whole_decode(pieces: Tokenizer, text: str) -> None:
    """I1 and I2 with byte fall-back; behind a prompt, so that a leading space is kept."""
    prompt = pieces._encode("the ", True)
    ids = pieces._encode(f"a{text}", False)
    whole = pieces.decode([*prompt, *ids])[len(pieces.decode(prompt)) :]
    parts = streamed(pieces, ids, prompt)
    assert "".join(parts) == whole
    assert all("\ufffd" not in part for part in parts)


@given(ids=st.lists(st.integers(3, 270), max_size=40))
def test_pieces_recover_from_invalid_bytes(pieces: Tokenizer, ids: list[int]) -> None:
    """Broken bytes spoil no later character."""
    tail = pieces._encode("中文 the end", False)
    text = "".join(streamed(pieces, [*ids, *pieces._encode(".", False), *tail]))
    assert text.endswith(pieces.decode(tail))


def test_a_completion_keeps_its_leading_space(pieces: Tokenizer) -> None:
    the = pieces._encode("the", False)
    assert "".join(streamed(pieces, the, pieces._encode("a", True))) == " the"


@given(text=st.text("abc", max_size=30), stops=st.lists(WORDS, max_size=4), sizes=GROUPS)
def test_stop_matcher_equals_its_oracle(text: str, stops: list[str], sizes: list[int]) -> None:
    """I1: the same text whatever the chunks, and nothing of a stop string comes out."""
    matcher = StopMatcher(stops)
    out, at = "", 0
    for i in range(len(text)):
        if at >= len(text) or matcher.matched is not None:
            break
        size = sizes[i % len(sizes)]
        out += matcher.push(text[at : at + size])
        at += size
        assert text.startswith(out)
    end = first_stop(text, stops)
    if matcher.matched is None:
        out += matcher.flush()
    assert (matcher.matched is not None) == (end is not None)
    assert out == text[:end]


def test_holds_back_no_more_than_it_must() -> None:
    matcher = StopMatcher(["abab!", "xyz"])
    assert matcher.push("..abab") == ".."
    assert matcher.push("ab") == "ab"
    assert matcher.push("?xy") == "abab?"
    assert matcher.flush() == "xy"


def played(
    tokenizer: Tokenizer, ids: Sequence[int], sizes: Sequence[int], stops: Sequence[str], min_tokens: int = 0
) -> tuple[str, list[Entry], int, str | None, str]:
    """Text, entries, tokens and finish of a choice, and its text as it was before the last output."""
    choice = Choice(0, tokenizer.detokenizer(PROMPT), StopMatcher(stops), {1}, min_tokens)
    text, entries, before = "", [], ""
    groups = grouped(ids, sizes) or [()]
    for i, group in enumerate(groups):
        finish = "length" if i == len(groups) - 1 else None
        logprobs = tuple(TokenLogprob(-float(t)) for t in group)
        before = text
        complete = choice.push(EngineOutput("x", group, finish, logprobs))  # type: ignore[arg-type]
        piece = choice.take()
        text += piece.text
        entries += piece.entries
        if complete:
            break
    return text, entries, choice.tokens, choice.finish, before


@settings(max_examples=150)
@given(
    ids=st.lists(st.integers(3, 310), max_size=25),
    stops=st.lists(st.text("e tho", min_size=1, max_size=3), max_size=3),
    sizes=GROUPS,
    min_tokens=st.integers(0, 4),
)
def test_choices_do_not_depend_on_grouping(
    byte_level: Tokenizer, ids: list[int], stops: list[str], sizes: list[int], min_tokens: int
) -> None:
    """I3, against one output with everything."""
    got = played(byte_level, ids, sizes, stops, min_tokens)
    assert got[:4] == played(byte_level, ids, [len(ids) or 1], stops, min_tokens)[:4]
    if min_tokens == 0:
        whole = byte_level.decode(ids)
        assert got[0] == whole[: first_stop(whole, stops)]
    assert all(e.offset <= len(got[0]) for e in got[1])
    if got[3] == "length":
        assert [e.token_id for e in got[1]] == ids


def test_min_tokens_hides_early_stops(byte_level: Tokenizer) -> None:
    ids = byte_level._encode("x. y. z. end", False)
    dot = byte_level._encode(".", False)[0]
    after_first = ids.index(dot) + 1
    assert played(byte_level, ids, [1], ["."])[0] == "x"
    assert played(byte_level, ids, [1], ["."], after_first)[0] == "x. y"


def test_bytes_of_tokens(byte_level: Tokenizer, pieces: Tokenizer) -> None:
    for tokenizer in (byte_level, pieces):
        ids = tokenizer._encode("the é中🎉", False)
        raw = b"".join(tokenizer.vocabulary.bytes_of(i) for i in ids)
        assert raw.decode().strip() == "the é中🎉"
        assert tokenizer.vocabulary.bytes_of(1) == b"</s>"
        assert tokenizer.vocabulary.text_bytes_of(1) == b""
        assert tokenizer.vocabulary.bytes_of(10**6) == b""
