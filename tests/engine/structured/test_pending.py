"""Grammars are compiled beside the step loop: who has none does not wait, who has one is added once it is there."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import numpy as np
import pytest

from octavo_engine.errors import RequestInvalid
from octavo_engine.messages import AbortRequest, AddRequest, Shutdown
from octavo_engine.plan import SamplingParams
from octavo_engine.structured.pending import PendingGrammars

if TYPE_CHECKING:
    from collections.abc import Callable

    from octavo_engine.messages import ToEngine
    from octavo_engine.structured.compiler import Compiler

    WaitUntil = Callable[[Callable[[], bool]], None]


class EverythingAllowed:
    """A grammar."""

    def mask(self) -> np.ndarray:
        """As Grammar."""
        return np.full(1, 255, dtype=np.uint8)

    def accept(self, token_id: int) -> None:
        """As Grammar."""

    def fork(self) -> EverythingAllowed:
        """As Grammar."""
        return EverythingAllowed()


class SlowCompiler:
    """Compiles once it may."""

    def __init__(self) -> None:
        self.may_compile = threading.Event()

    def compile(self, grammar: str) -> EverythingAllowed:
        """As Compiler."""
        assert self.may_compile.wait(30)
        if grammar == "panic":
            raise KeyboardInterrupt  # as a panic of the library: no Exception
        if grammar == "bad":
            raise RequestInvalid("it is bad")
        return EverythingAllowed()


def request(request_id: str, grammar: str | None) -> AddRequest:
    return AddRequest(
        request_id=request_id, prompt_token_ids=(1,), sampling=SamplingParams(max_tokens=1, grammar=grammar)
    )


@pytest.fixture
def compiler() -> SlowCompiler:
    return SlowCompiler()


@pytest.fixture
def pending(compiler: SlowCompiler) -> PendingGrammars:
    def load() -> Compiler:
        return compiler  # type: ignore[return-value]  # it compiles too

    return PendingGrammars(load)


def test_only_requests_with_a_grammar_are_held_back(pending: PendingGrammars, compiler: SlowCompiler) -> None:
    messages: list[ToEngine] = [
        request("plain", None),
        request("slow", "good"),
        AbortRequest(request_id="plain"),
        Shutdown(),
    ]
    assert pending.hold_back(messages) == [messages[0], messages[2], messages[3]]
    assert pending
    assert pending.compiled() == []
    compiler.may_compile.set()


def test_each_comes_back_with_its_grammar_or_why_there_is_none(
    pending: PendingGrammars, compiler: SlowCompiler, wait_until: WaitUntil
) -> None:
    pending.hold_back([request(name, name) for name in ("good", "bad", "panic")])
    compiler.may_compile.set()
    got = {}

    def all_are_there() -> bool:
        got.update({added.request_id: grammar for added, grammar in pending.compiled()})
        return len(got) == 3

    wait_until(all_are_there)
    assert isinstance(got["good"], EverythingAllowed)
    assert str(got["bad"]) == "it is bad"
    assert isinstance(got["panic"], RequestInvalid)
    assert not pending


def test_a_request_that_is_aborted_meanwhile_is_never_added(pending: PendingGrammars, compiler: SlowCompiler) -> None:
    pending.hold_back([request("gone", "good")])
    assert pending.hold_back([AbortRequest(request_id="gone")]) == []
    compiler.may_compile.set()
    assert not pending
    assert pending.compiled() == []
