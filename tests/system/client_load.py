"""What users do meanwhile: completions stream through the real client, one after the other, and must not change."""

from __future__ import annotations

import threading
import time

import openai

from .command import wait_for

PROMPTS = ("def f(x):", "import os\n" * 4, "class A:\n    pass\n" * 3)
TOKENS = 300


class ClientLoad:
    """Greedy streams of every prompt again and again, each by a thread of its own, until `stop`.

    Attributes
    ----------
    silent_s : float
        The longest that a stream was without news.
    errors : list of str
        What clients saw beside their text.
    """

    def __init__(self, client: openai.OpenAI, model: str) -> None:
        self._client, self._model = client, model
        self.silent_s = 0.0
        self.errors: list[str] = []
        self._finished = 0
        self._streaming = True
        expected = [self.answer(prompt) for prompt in PROMPTS]
        pairs = zip(PROMPTS, expected, strict=True)
        self._threads = [threading.Thread(target=self._repeat, args=pair, daemon=True) for pair in pairs]
        for thread in self._threads:
            thread.start()

    def more(self, answers: int = 2 * len(PROMPTS)) -> None:
        """Wait for so many more answers; those that stream now are among them."""
        until = self._finished + answers
        wait_for(lambda: self._finished >= until or bool(self.errors), lambda: f"{self._finished} answers, not {until}")
        assert not self.errors, self.errors[0]

    def stop(self) -> None:
        """Let streams come to their end."""
        self._streaming = False
        for thread in self._threads:
            thread.join()
        assert not self.errors, self.errors[0]

    def answer(self, prompt: str) -> str:
        """One completion, as it streams in."""
        text, last_s = "", time.monotonic()
        for event in self._client.completions.create(
            model=self._model,
            prompt=prompt,
            max_tokens=TOKENS,
            temperature=0,
            stream=True,
            extra_body={"ignore_eos": True},
        ):
            text += event.choices[0].text
            self.silent_s, last_s = max(self.silent_s, time.monotonic() - last_s), time.monotonic()
        return text

    def _repeat(self, prompt: str, expected: str) -> None:
        while self._streaming and not self.errors:
            try:
                text = self.answer(prompt)
            except openai.OpenAIError as e:
                self.errors.append(f"{prompt!r}: {type(e).__name__}: {e}")
                return
            if text != expected:
                self.errors.append(f"{prompt!r}: {text!r} instead of {expected!r}")
            self._finished += 1
