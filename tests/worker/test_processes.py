"""Workers in processes of their own, some of which are killed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
import torch.distributed as dist
from concertina.workers.engine.engine import Engine

from ..model.loaded import Loaded
from ..system.crew import Member
from .site import LocalWorker, Site, bring, until, worker_config
from .streams import Stream, clients

pytestmark = pytest.mark.ray

MakeSite = Callable[..., Site]
Hire = Callable[..., LocalWorker]
PROMPTS = [[11 * i + j for j in range(6 + 5 * i)] for i in range(4)]


@pytest.fixture(scope="module")
def crew() -> Iterator[list[Member]]:
    """Processes that are alive, as far as tests have left them."""
    with ExitStack() as stack:
        crew: list[Member] = []
        stack.callback(lambda: [member.end() for member in crew])
        yield crew


@pytest.fixture
def members(crew: list[Member]) -> Iterator[list[Member]]:
    """Three workers, each in a process of its own."""
    for member in [member for member in crew if member.process.poll() is not None]:
        member.end()
        crew.remove(member)
    crew.extend(Member() for _ in range(3 - len(crew)))
    for member in crew:
        member.call("hire", worker_config())
    yield list(crew)
    for member in crew:
        if member.process.poll() is None:
            member.call("stop")


def right(stream: Stream, loaded: Loaded, before: int = 0) -> bool:
    """Whether a stream that has ended has the true tokens; ``before`` of its prompt's are answers, too."""
    prompt = stream.prompt[: len(stream.prompt) - before]
    answer = [*stream.prompt[len(prompt) :], *stream.tokens]
    return stream.finished() == "length" and answer == loaded.greedy(prompt, len(answer))


@pytest.mark.parametrize("kind", ["shared", "gloo"])
def test_after_a_kill_a_standby_takes_the_device_and_nothing_is_computed_again(
    make_site: MakeSite, members: list[Member], loaded: Loaded, kind: str
) -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    site, (killed, survivor, standby) = make_site("a", "b"), members
    number = bring([killed, survivor], site.generation(["a", "b"], kind, store.port))
    with clients() as client:
        lost = [client.start(killed, prompt, 120) for prompt in PROMPTS]
        kept = [client.start(survivor, prompt, 90) for prompt in PROMPTS]
        for stream in (*lost, *kept):
            stream.wait_for(10)
        killed.kill()
        parked = until(survivor, lambda r: r.parked)
        assert parked.serving == number
        assert parked.load.running == len(kept)
        late = client.start(survivor, [5, 4, 3], 20)
        bring([standby, survivor], site.generation(["a", "b"], kind, store.port))
        for stream in lost:
            assert isinstance(stream.end.exception(20), Exception)
        again = [client.again(standby, stream) for stream in lost]
        assert all(right(new, loaded, len(old.tokens)) for new, old in zip(again, lost, strict=True))
        assert [new.cached_tokens for new in again] == [len(new.prompt) - 1 for new in again]
        stats = standby.call("report").stats
        assert stats.prompt_tokens - stats.cached_tokens == len(again)
        assert all(right(stream, loaded) for stream in (*kept, late))
    if kind == "shared":
        end_s = time.monotonic() + 5
        while site.node.held(f"exchange/{number}"):
            assert time.monotonic() < end_s, "the generation that was lost is still mapped"
            time.sleep(0.01)


@pytest.mark.parametrize(("peer", "step_s", "wait_s"), [(True, 100.0, 0.2), (True, 0.003, None), (False, 0.0, 0.2)])
def test_who_takes_over_from_a_killed_worker_lets_its_sequences_come_first(
    make_site: MakeSite,
    hire: Hire,
    members: list[Member],
    monkeypatch: pytest.MonkeyPatch,
    peer: bool,
    step_s: float,
    wait_s: float | None,
) -> None:
    """As many as ran there, once, and without holding up a peer whose steps are short."""
    waits: list[tuple[int, float]] = []

    def noted(engine: Engine, count: int, limit_s: float) -> None:
        waits.append((count - engine.submitted, limit_s))

    monkeypatch.setattr(Engine, "await_submissions", noted)
    devices = ["a", "b"] if peer else ["a"]
    site, killed, others = make_site(*devices, blocks=240), members[0], [hire()] if peer else []
    bring([killed, *others], site.generation(devices))
    with clients() as client:
        streams = [client.start(killed, list(range(i, 10 + 2 * i)), 120) for i in range(6)]
        for stream in streams:
            stream.wait_for(2)
        killed.kill()
        for other in others:
            until(other, lambda report: report.parked)
        monkeypatch.setattr(Engine, "step_s", property(lambda _: step_s))
        standby = hire()
        bring([standby, *others], site.generation(devices))
        standby.worker.resize_kv(standby.worker.report().kv_blocks, ())  # comes at its next boundary
        standby.worker.resize_kv(standby.worker.report().kv_blocks, ())
    if wait_s is None:
        assert waits == []
    else:
        ((due, limit_s),) = waits
        assert due == len(streams)
        assert limit_s == wait_s


@pytest.mark.parametrize("separate", [False, True])
def test_a_leaver_hands_over_while_its_heir_goes_on(
    make_site: MakeSite, members: list[Member], loaded: Loaded, separate: bool
) -> None:
    """Both have the same prompts: what a running sequence of the heir holds itself is adopted nevertheless."""
    site, (leaver, heir, other) = make_site("a", "b", "c", blocks=200, separate=separate), members
    bring([leaver, heir, other], site.generation(["a", "b", "c"]))
    with clients() as client:
        moved = [client.start(leaver, prompt, 80) for prompt in PROMPTS]
        kept = [client.start(heir, prompt, 80) for prompt in PROMPTS]
        for stream in (*moved, *kept):
            stream.wait_for(5)
        bring([heir, other], site.generation(["b", "c"]), leaver)
        heir.call("adopt_kv", site.source("a"), 300)
        leaver.call("release", "b")
        assert {(s.finished(), s.end.result().moved_to) for s in moved} == {("moved", "b")}
        again = [client.again(heir, stream) for stream in moved]
        assert all(right(new, loaded, len(old.tokens)) for new, old in zip(again, moved, strict=True))
        assert [new.cached_tokens for new in again] == [len(new.prompt) - 1 for new in again]
        assert all(right(stream, loaded) for stream in kept)
