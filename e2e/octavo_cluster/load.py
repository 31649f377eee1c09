"""Clients that ask a service again and again, beside what a test does to it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Event
from typing import TYPE_CHECKING, Final

import openai

if TYPE_CHECKING:
    from collections.abc import Iterator

PATIENCE_SECONDS: Final = 300.0  # with one answer, on two busy cores


@dataclass
class Load:
    """Clients that stream answers, each on a connection that it keeps as long as the server lets it."""

    base_url: str  # as in OPENAI_BASE_URL
    model: str
    num_tokens: int  # of each answer
    failures: list[str] = field(default_factory=list)
    answers: int = 0
    begun: Event = field(default_factory=Event)  # a first token is there

    @contextmanager
    def of(self, count: int) -> Iterator[None]:
        """So many clients, until the end of the block; each finishes its last request."""
        over = Event()
        with ThreadPoolExecutor(count) as pool:
            asking = [pool.submit(self._ask_until, over) for _ in range(count)]
            try:
                yield
            finally:
                over.set()
            for each in asking:
                each.result(PATIENCE_SECONDS)

    def _ask_until(self, over: Event) -> None:
        with openai.OpenAI(base_url=self.base_url, api_key="none", max_retries=0, timeout=PATIENCE_SECONDS) as client:
            while not over.is_set():
                try:
                    reasons = self._ask(client)
                except openai.OpenAIError as error:
                    self.failures.append(f"{type(error).__name__}: {error}")
                    continue
                self.answers += 1
                if reasons != ["length"]:
                    self.failures.append(f"an answer ended with {reasons}")

    def _ask(self, client: openai.OpenAI) -> list[str]:
        stream = client.completions.create(
            model=self.model,
            prompt="The octopus is",
            max_tokens=self.num_tokens,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        reasons: list[str] = []
        for chunk in stream:
            self.begun.set()
            reasons += [each.finish_reason for each in chunk.choices if each.finish_reason]
        return reasons
