"""Tries grammars out in a process of their own, before the engine hears of them. Used by the API process.

Some texts make llguidance compute for minutes in code that cannot be interrupted (an intersection of 60 patterns), so
they are compiled, and a few answers drawn at random, where that harms nobody: in a process that is killed when it does
not answer in time, and that may take only so much memory. What passes is cheap enough for the engine, and remembered,
so that a schema in use costs nothing.

    python -m octavo_engine.structured.checker TOKENIZER        reads and writes JSON, one line each
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import resource
import sys
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from octavo_engine.errors import GenerationFailed, RequestInvalid
from octavo_engine.process import bind_to_parent

MAX_CHARACTERS: Final = 200_000  # of a grammar, or of a schema as JSON
_CHECK_SECONDS: Final = 0.75  # what one may take; a usual one takes 2 ms
_START_SECONDS: Final = 60.0  # what the process may take to read the vocabulary
_MAX_BYTES: Final = 2 * 2**30  # its address space
_MAX_KNOWN: Final = 256  # grammars that are remembered

Kind = Literal["json_schema", "regex", "choice", "grammar", "lark"]  # as llguidance's grammar_from calls it


@dataclass(frozen=True, slots=True)
class Wanted:
    """What an answer shall keep to."""

    kind: Kind
    text: str  # JSON for json_schema and choice; Lark or GBNF for grammar
    param: str  # the request's field, for what is said about it
    before: str = ""  # a grammar in Lark for what may come before it, which calls this one `answer`; empty: nothing may

    @classmethod
    def json(cls, schema: dict[str, Any] | None, param: str) -> Wanted:
        """JSON that keeps to a schema; None: any object.

        Raises:
            RequestInvalid: the schema is nested too deeply to be written.
        """
        try:
            return cls("json_schema", json.dumps({"type": "object"} if schema is None else schema), param)
        except RecursionError:
            raise RequestInvalid("the schema is nested too deeply", param=param) from None


class GrammarChecker:
    """One for each vocabulary; starts its process when it is first asked.

    Args:
        path: the model's file or folder.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._process: asyncio.subprocess.Process | None = None
        self._known: OrderedDict[tuple[str, str, str], tuple[str, str]] = OrderedDict()  # (grammar, error)
        self._turn = asyncio.Lock()

    async def check(self, wanted: Wanted) -> str:
        """Return the grammar for the engine.

        Raises:
            RequestInvalid: it is none, or too complex; names the field.
        """
        if len(wanted.text) > MAX_CHARACTERS:
            raise RequestInvalid(
                f"{wanted.param} has {len(wanted.text)} characters, and at most {MAX_CHARACTERS} are taken",
                param=wanted.param,
            )
        key = (wanted.kind, wanted.text, wanted.before)
        if key not in self._known:
            async with self._turn:
                if key not in self._known:  # by who had the turn before
                    self._known[key] = await self._try_out(wanted)
                    if len(self._known) > _MAX_KNOWN:
                        self._known.popitem(last=False)
        self._known.move_to_end(key)
        grammar, error = self._known[key]
        if error:
            raise RequestInvalid(f"{wanted.param} cannot be used: {error}", param=wanted.param)
        return grammar

    async def close(self) -> None:
        """End the process."""
        if self._process is not None:
            await _end(self._process)

    async def _try_out(self, wanted: Wanted) -> tuple[str, str]:
        process = self._process or await self._start()
        self._process = None  # until it has answered: whatever else happens ends it
        try:
            async with asyncio.timeout(_CHECK_SECONDS):
                answer = await _ask(process, json.dumps([wanted.kind, wanted.text, wanted.before]))
        except TimeoutError:
            answer = ""
        except BaseException:
            await _end(process)
            raise
        if not answer:
            await _end(process)
            return "", f"it is too complex: it was not compiled in {_CHECK_SECONDS} s and {_MAX_BYTES // 2**30} GiB"
        self._process = process
        grammar, error = json.loads(answer)
        return grammar, error

    async def _start(self) -> asyncio.subprocess.Process:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "octavo_engine.structured.checker",
            str(self._path),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=16 * MAX_CHARACTERS,
        )
        try:
            async with asyncio.timeout(_START_SECONDS):
                begun = await _ask(process, "[]")
        except BaseException:
            await _end(process)
            raise
        if not begun:
            await _end(process)
            raise GenerationFailed("the process that checks grammars does not start; the log has the cause")
        return process


async def _ask(process: asyncio.subprocess.Process, line: str) -> str:
    """Return its answer; empty if it has ended."""
    assert process.stdin is not None
    assert process.stdout is not None
    with contextlib.suppress(ConnectionError):
        process.stdin.write(line.encode() + b"\n")
        await process.stdin.drain()
    return (await process.stdout.readline()).decode()


async def _end(process: asyncio.subprocess.Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.kill()
    await process.wait()


def _grammar_from(kind: Kind, text: str, before: str) -> str:
    grammar = _grammar_of_answer(kind, text)
    if not before:
        return grammar
    parts = json.loads(grammar)["grammars"] if grammar.startswith("{") else [{"lark_grammar": grammar}]
    first, *others = parts
    return json.dumps({"grammars": [{"lark_grammar": before}, first | {"name": "answer"}, *others]})


def _grammar_of_answer(kind: Kind, text: str) -> str:
    import llguidance  # noqa: PLC0415 - the API process, which imports this module, has no use for it

    if kind != "json_schema":
        return llguidance.grammar_from(kind, text)
    # White space between the parts of a value as models write it, and never without end, as small ones do.
    return llguidance.LLMatcher.grammar_from_json_schema(text, overrides={"whitespace_pattern": r"[ \n\r\t]{1,32}"})


def main(path: Path) -> None:
    """The process: answer every [kind, text, before] with [grammar, error]."""
    from octavo_engine.structured.compiler import Compiler  # noqa: PLC0415 - as for llguidance
    from octavo_engine.text.load import load_tokenizer  # noqa: PLC0415 - as for llguidance

    bind_to_parent(b"octavo-grammar")
    tokenizer = load_tokenizer(path)
    compiler = Compiler(tokenizer, [next(iter(tokenizer.control_ids), 0)])  # what ends an answer makes no difference
    resource.setrlimit(resource.RLIMIT_AS, (_MAX_BYTES, _MAX_BYTES))
    for line in sys.stdin:
        grammar = error = ""
        if asked := json.loads(line):
            try:
                grammar = _grammar_from(*asked)
                compiler.try_out(grammar)
            except (RecursionError, MemoryError):
                error = "it is too complex"
            except ValueError as refusal:  # RequestInvalid is one
                error = str(refusal)[:500]
        sys.stdout.write(json.dumps(["", error] if error else [grammar, ""]) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
