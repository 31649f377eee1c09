from __future__ import annotations

import contextlib
import io
import os
import pty
import select
import subprocess
import sys
import time
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from octavo_engine.errors import EngineRefused, RequestInvalid
from octavo_engine.modelfile import Modelfile
from octavo_engine.terminal import Chat, converse, print_answer

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from tests.engine.serving.conftest import FakeEngine

    from octavo_engine.config import ServerConfig
    from octavo_engine.text.message import Parts


def new_chat(engine: FakeEngine, config: ServerConfig, system: str | None = None) -> Chat:
    # Without a prefix cache the fake engine sees every token of a prompt.
    options = replace(config.engine, enable_prefix_caching=False)
    modelfile = Modelfile(source="fake", system=system or "", parameters={"temperature": 0.0})
    return Chat(options, modelfile, spawn=engine.spawn)


def said(pieces: Iterable[Parts]) -> str:
    return "".join(piece.text for piece in pieces)


@pytest.fixture
def chat(engine: FakeEngine, config: ServerConfig) -> Iterator[Chat]:
    with new_chat(engine, config) as chat:
        yield chat


def test_an_answer_comes_in_pieces(chat: Chat) -> None:
    assert said(chat.ask("Hi")) == "The answer is 42."


def test_the_adapter_of_its_modelfile_answers(engine: FakeEngine, config: ServerConfig, tmp_path: Path) -> None:
    options = replace(config, engine=replace(config.engine, adapter=tmp_path / "poet"))
    with new_chat(engine, options) as chat:
        assert said(chat.ask("Hi")) == "I am poet, number 1."


def test_the_conversation_grows_by_question_and_answer(chat: Chat, engine: FakeEngine) -> None:
    engine.failing = "The answer is 42."  # fails as soon as a prompt has the first answer in it
    assert said(chat.ask("Hi")) == "The answer is 42."
    with pytest.raises(Exception, match="not a number"):
        list(chat.ask("And now?"))


def test_a_cleared_conversation_starts_with_its_system_message(engine: FakeEngine, config: ServerConfig) -> None:
    with new_chat(engine, config, system="POISON") as chat:
        assert list(chat.ask("Hi"))
        engine.failing = "The answer"
        chat.clear()
        assert said(chat.ask("Hi")) == "The answer is 42."
        engine.failing = "POISON"
        chat.clear()
        with pytest.raises(Exception, match="not a number"):
            list(chat.ask("Hi"))


def test_a_stopped_answer_stays_in_the_conversation_and_the_next_one_is_whole(chat: Chat, engine: FakeEngine) -> None:
    engine.answer = "a" * 300
    with contextlib.closing(chat.ask("Hi")) as pieces:
        assert next(piece for piece in pieces if piece.text)
    engine.answer = "Fine."
    assert said(chat.ask("And now?")) == "Fine."


def test_a_question_that_does_not_fit_is_taken_back(chat: Chat) -> None:
    with pytest.raises(RequestInvalid, match="context is 400 tokens"):
        list(chat.ask("a" * 400))
    assert said(chat.ask("Hi")) == "The answer is 42."


def test_an_engine_that_refuses_to_start_is_told(engine: FakeEngine, config: ServerConfig) -> None:
    engine.refusal = "no such architecture"
    with pytest.raises(EngineRefused, match="no such architecture"), new_chat(engine, config):
        pass


def test_the_terminal_takes_commands_and_questions_until_the_end_of_the_input(
    chat: Chat, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"Hi\n\n{'a' * 400}\n/clear\nHi\n"))
    converse(chat)
    out, err = capsys.readouterr()
    assert out.count("The answer is 42.\n") == 2
    assert "context is 400 tokens" in err
    assert "/clear starts anew" in err


def test_what_is_set_holds_for_the_next_answer(
    chat: Chat, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = ["/set parameter top_k 7", "/set system Be brief.", "/set parameter mirostat 1", "/set x", "/nothing", "Hi"]
    lines += ["/show", "/?"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    converse(chat)
    out, err = capsys.readouterr()
    assert engine.sampling is not None
    assert (engine.sampling.top_k, engine.sampling.temperature) == (7, 0.0)
    assert "SYSTEM Be brief.\n" in out
    assert "PARAMETER top_k 7\n" in out
    assert "mirostat 1 is not supported" in err
    assert "'/set x' is not a command" in err
    assert "'/nothing' is not a command" in err
    assert "/clear   " in err


def test_a_system_message_that_is_set_is_in_the_prompt(chat: Chat, engine: FakeEngine) -> None:
    chat.modelfile = replace(chat.modelfile, system="POISON")
    engine.failing = "POISON"
    with pytest.raises(Exception, match="not a number"):
        list(chat.ask("Hi"))


def test_a_message_between_triple_quotes_has_several_lines(
    chat: Chat, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO('"""one\ntwo"""\n'))
    converse(chat)
    assert b"one\ntwo" in engine.prompt


def test_a_system_message_between_triple_quotes_has_several_lines(
    chat: Chat, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO('/set system """one\ntwo"""\nHi\n'))
    converse(chat)
    assert b"system\none\ntwo<|im_end|>" in engine.prompt


@pytest.mark.parametrize(
    ("what", "expected"),
    [
        ("", "FROM fake\nTEMPLATE [{{ .Prompt }}]\nSYSTEM S\nPARAMETER top_k 7\nLICENSE one\nLICENSE two\n"),
        ("modelfile", "FROM fake\nTEMPLATE [{{ .Prompt }}]\nSYSTEM S\nPARAMETER top_k 7\nLICENSE one\nLICENSE two\n"),
        ("parameters", "top_k                 7\n"),
        ("system", "S\n"),
        ("template", "[{{ .Prompt }}]\n"),
        ("license", "one\n\ntwo\n"),
    ],
)
def test_what_is_set_is_shown_whole_or_in_part(
    chat: Chat, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], what: str, expected: str
) -> None:
    chat.modelfile = Modelfile(
        source="fake", system="S", template="[{{ .Prompt }}]", parameters={"top_k": 7}, licenses=("one", "two")
    )
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"/show {what}\n/exit\n"))
    converse(chat)
    assert capsys.readouterr().out.replace(">>> ", "") == expected


def test_an_answer_that_fails_is_told_and_the_conversation_goes_on(
    chat: Chat, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    engine.failing = "POISON"
    monkeypatch.setattr(sys, "stdin", io.StringIO("POISON\n/clear\nHi\n"))
    converse(chat)
    out, err = capsys.readouterr()
    assert "not a number" in err
    assert out.count("The answer is 42.\n") == 1


THINKING = (
    "{{ range .Messages }}{{ if .Thinking }}({{ .Thinking }}){{ end }}[{{ .Content }}]{{ end }}"
    "{{ if .IsThinkSet }}{{ .Think }}{{ end }}{{ if false }}<think></think>{{ end }}"
)


def test_what_the_model_thinks_is_shown_on_a_terminal_alone(
    engine: FakeEngine, config: ServerConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    engine.answer = "<think>\nHm.\n</think>\n\nParis"
    options = replace(config.engine, enable_prefix_caching=False)
    with Chat(options, Modelfile(source="fake", template=THINKING), spawn=engine.spawn) as chat:
        print_answer(chat, "Hi")
        assert capsys.readouterr().out == "Paris\n"
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
        print_answer(chat, "Ho")
        assert engine.prompt == b"[Hi](Hm.)[Paris][Ho]"
        told = capsys.readouterr().out
        assert "Hm." in told
        assert told.endswith("\n\nParis\n")
        monkeypatch.setattr(sys, "stdin", io.StringIO("/set nothink\nHa\n/bye\n"))
        converse(chat)
        assert engine.prompt.endswith(b"[Ha]false")


def test_a_model_that_cannot_think_says_so_when_it_shall(
    chat: Chat, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("/set think\n/set nothink\nHi\n"))
    converse(chat)
    out, err = capsys.readouterr()
    assert err.count("does not support thinking") == 1
    assert "The answer is 42.\n" in out


def test_bye_leaves(chat: Chat, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("/bye\nHi\n"))
    converse(chat)
    assert "The answer" not in capsys.readouterr().out


def test_a_single_answer_is_printed_with_a_line_end(chat: Chat, capsys: pytest.CaptureFixture[str]) -> None:
    print_answer(chat, "Hi")
    assert capsys.readouterr().out == "The answer is 42.\n"


@pytest.mark.model
@pytest.mark.timeout(300)
def test_octavo_run_answers_a_prompt_from_its_arguments_and_a_pipe(smollm2_path: Path) -> None:
    command = [sys.executable, "-m", "octavo_engine", "run", str(smollm2_path), "--temperature", "0"]
    command += ["--max-model-len", "512", "What is the capital of this country?"]
    result = subprocess.run(command, input="France", capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "Paris" in result.stdout
    assert "Traceback" not in result.stderr


class Terminal:
    """A command on a terminal of its own, as a user has it: what is typed, and what is seen."""

    def __init__(self, command: list[str]) -> None:
        self._ours, theirs = pty.openpty()
        command = ["setsid", "--ctty", *command]  # so that Ctrl-C is a signal
        environment = os.environ | {"TERM": "dumb"}
        self.process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
        os.close(theirs)
        self._seen = ""

    def type(self, text: str) -> None:
        """Press these keys."""
        os.write(self._ours, text.encode())

    def until(self, text: str) -> str:
        """What is seen from what was waited for before up to this."""
        deadline = time.monotonic() + 120
        while text not in self._seen:
            ready, _, _ = select.select([self._ours], [], [], max(0, deadline - time.monotonic()))
            assert ready, f"{text!r} does not come: {self._seen}"
            self._seen += os.read(self._ours, 65536).decode(errors="replace").replace("\r", "")
        before, _, self._seen = self._seen.partition(text)
        return before

    def close(self) -> None:
        """End it, whatever it does."""
        self.process.kill()
        self.process.wait()
        os.close(self._ours)


@pytest.mark.model
@pytest.mark.timeout(300)
def test_ctrl_c_stops_an_answer_and_neither_the_engine_nor_the_conversation(smollm2_path: Path) -> None:
    command = [sys.executable, "-m", "octavo_engine", "run", str(smollm2_path), "--temperature", "0"]
    terminal = Terminal([*command, "--max-model-len", "2048"])
    try:
        terminal.until(">>> ")
        terminal.type("Write a very long story about a ferry.\n")
        terminal.until("story about a ferry.\n")
        terminal.until(" ")  # the answer has begun
        terminal.type("\x03")
        terminal.until(">>> ")
        terminal.type("\x03")  # at the prompt it takes back what was typed
        terminal.until(">>> ")
        terminal.type("/clear\n")
        terminal.until(">>> ")
        terminal.type("Where is the Eiffel Tower?\n")
        assert "Paris" in terminal.until(">>> ")
        terminal.type("/bye\n")
        assert terminal.process.wait(timeout=60) == 0
    finally:
        terminal.close()
