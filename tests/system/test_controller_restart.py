"""The controller dies or hangs while the deployment serves: nobody notices, and all still ends with the driver."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import openai
import pytest

from ..checkpoints import make_checkpoint
from .command import GONE_S, Process, Server, concertina, descendants, wait_for

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def controllers(server: Server) -> list[Process]:
    return [p for p in descendants(server.process.pid) if p.name.startswith("ray::ControllerService") and p.runs]


def strike_controller(server: Server, number: signal.Signals) -> None:
    (before,) = controllers(server)
    os.kill(before.pid, number)
    wait_for(lambda: bool(controllers(server)) and not before.runs, lambda: "the controller is not started again")


def status(server: Server) -> dict[str, Any]:
    done = concertina("status", "--json", "--name", server.name, env=server.env)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.timeout(400)
def test_a_killed_or_hung_controller_goes_on_where_it_was(tmp_path: Path) -> None:
    checkpoint = make_checkpoint("olmoe", tmp_path / "tiny")
    with (
        Server.start(checkpoint, "--workers", "2", "--max-model-len", "200", "--hang-timeout", "3") as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60) as client,
    ):
        server.wait_until_healthy()
        before = status(server)
        asked: dict[str, Any] = {"model": "tiny", "prompt": "def f(x):", "temperature": 0}
        whole = client.completions.create(**asked, max_tokens=150)
        stream = iter(client.completions.create(**asked, max_tokens=150, stream=True))
        text = next(stream).choices[0].text
        strike_controller(server, signal.SIGKILL)
        text += "".join(event.choices[0].text for event in stream)
        assert text == whole.choices[0].text
        for how in (signal.SIGKILL, signal.SIGSTOP):
            status(server)  # one that has only just been started is not known well enough to be killed
            strike_controller(server, how)
            after = status(server)
            for key in ("generation", "phase", "pools"):
                assert after[key] == before[key]
            assert [w["pid"] for w in after["workers"]] == [w["pid"] for w in before["workers"]]
            assert client.completions.create(**asked, max_tokens=150).choices[0].text == whole.choices[0].text
        traces = server.traces()
        server.process.send_signal(signal.SIGTERM)  # as a supervisor ends it
        assert server.process.wait(GONE_S) == 0, server.stderr
        assert "concertina: stopped" in server.stderr
        assert "Traceback" not in server.stderr
        wait_for(lambda: not traces.left(), lambda: f"left behind: {traces.left()}")
