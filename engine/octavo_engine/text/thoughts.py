"""What a model thinks before it answers, told apart from the answer: <think>...</think>, as Qwen 3 and DeepSeek write.

Called by message.py and, for the grammar, by generation.py. A prompt may end in the opening tag, so that the answer
begins in the middle of a thought.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Final

from octavo_engine.text.scan import literal, space

if TYPE_CHECKING:
    from collections.abc import Mapping

    from octavo_engine.text.scan import Reading

OPEN: Final = "<think>"
CLOSE: Final = "</think>"


def grammar_before_answer(mark_ids: Mapping[str, int], *, begun: bool) -> str:
    """Return a grammar in llguidance's Lark for a thought, if there is one, and after it a grammar called `answer`.

    Args:
        mark_ids: the ids of those of the tags that are control tokens.
        begun: the prompt ends in the opening tag.
    """
    opening, closing = (f"<[{mark_ids[tag]}]>" if tag in mark_ids else json.dumps(tag) for tag in (OPEN, CLOSE))
    thought = "thought SPACE" if begun else f"({opening} thought SPACE)?"
    lazy = "" if CLOSE in mark_ids else "[lazy]"
    rules = ["TEXT: /(.|\\n)*/", f"thought{lazy}: TEXT {closing}", "SPACE: /[ \\t\\r\\n]*/"]
    return "\n".join([f"start: {thought} @answer", *rules])


class Thoughts:
    """Splits one answer.

    Args:
        begun: the prompt ends in the opening tag.
    """

    def __init__(self, *, begun: bool) -> None:
        self._thought: list[str] = []
        self._answer: list[str] = []
        self._reading = self._read(begun=begun)
        next(self._reading)

    def push(self, text: str) -> tuple[str, str]:
        """Take the next piece and return what is certain of thought and answer.

        White space around a thought is part of neither.
        """
        for char in text:
            self._reading.send(char)
        return self._taken()

    def finish(self) -> tuple[str, str]:
        """Return what was held back; no more text comes."""
        self._reading.send("")
        return self._taken()

    def _taken(self) -> tuple[str, str]:
        thought, answer = "".join(self._thought), "".join(self._answer)
        self._thought.clear()
        self._answer.clear()
        return thought, answer

    def _read(self, *, begun: bool) -> Reading[None]:
        char = yield
        before: list[str] = []
        while char.isspace():
            before.append(char)
            char = yield
        tag, char = yield from literal(char, OPEN, *([CLOSE] if begun else []))
        if tag == OPEN or (begun and tag != CLOSE):
            char = yield from self._read_thought("" if tag == OPEN else tag, char)
        elif not begun:
            self._answer += [*before, tag]
        if tag == OPEN or begun:
            char = yield from space(char)
        while True:
            self._answer.append(char)
            char = yield

    def _read_thought(self, begun: str, char: str) -> Reading[str]:
        """Read up to the closing tag, and hold white space back until something follows it."""
        self._thought.append(begun)
        held = ""
        if not begun:
            char = yield from space(char)
        while char:
            if char.isspace():
                held += char
                char = yield
                continue
            tag, char = yield from literal(char, CLOSE)
            if tag == CLOSE:
                return char
            if not tag:
                tag, char = char, (yield)
            self._thought.append(held + tag)
            held = ""
        return char
