"""From the text of an answer to the parts of a message: what the model thinks, what it says, which tools it calls.

Called by whoever shows messages (server/openai, server/ollama), a MessageParser for each answer. However the text is
cut into pieces, the parts are the same in sum: tests/engine/test_message.py holds that.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from octavo_engine.text.thoughts import CLOSE, OPEN, Thoughts
from octavo_engine.text.tool_calls import CallPiece, ToolCalls

if TYPE_CHECKING:
    from octavo_engine.text.tools import ToolChoice, ToolFormat


@dataclass(frozen=True, slots=True)
class Parts:
    """Of a message, or of the next piece of it."""

    thought: str = ""
    text: str = ""
    calls: tuple[CallPiece, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.thought or self.text or self.calls)


@dataclass(frozen=True, slots=True)
class MessageFormat:
    """What to look for in the answers to one prompt; a format without anything finds text only."""

    thinks: bool = False  # the model thinks between tags
    thought_begun: bool = False  # the prompt ends in the opening tag
    tools: ToolFormat | None = None  # how it writes calls; None: it calls nothing
    names: frozenset[str] = field(default_factory=frozenset)  # of the tools that it may call
    tells_thoughts: bool = True  # False: what the model thinks is left out

    @property
    def marks(self) -> tuple[str, ...]:
        """What the parts are told by, some of it control tokens in some vocabularies."""
        tools = tuple(self.tools.marks) if self.tools is not None else ()
        return (OPEN, CLOSE, *tools) if self.thinks else tools

    def parser(self) -> MessageParser:
        """Return a parser for one answer."""
        return MessageParser(self)

    def with_tools(self, tools: ToolFormat, choice: ToolChoice) -> MessageFormat:
        """Return the same with calls of these tools."""
        names = frozenset(tool.name for tool in choice.tools)
        return replace(self, tools=tools, names=names)


class MessageParser:
    """One answer."""

    def __init__(self, message_format: MessageFormat) -> None:
        begun = message_format.thought_begun
        self._thoughts = Thoughts(begun=begun) if message_format.thinks else None
        self._tells_thoughts = message_format.tells_thoughts
        tools = message_format.tools
        self._calls = ToolCalls(tools.read, message_format.names) if tools is not None else None

    @property
    def num_calls(self) -> int:
        """How many calls have begun."""
        return self._calls.num_calls if self._calls is not None else 0

    def push(self, text: str, *, is_last: bool = False) -> Parts:
        """Take the next piece, and return what is certain; with the last one everything."""
        thought = ""
        if self._thoughts is not None:
            thought, text = self._thoughts.push(text)
            if is_last:
                more_thought, more_text = self._thoughts.finish()
                thought, text = thought + more_thought, text + more_text
            thought = thought if self._tells_thoughts else ""
        if self._calls is None:
            return Parts(thought, text)
        text, calls = self._calls.push(text)
        if is_last:
            more_text, more_calls = self._calls.finish()
            text, calls = text + more_text, calls + more_calls
        return Parts(thought, text, calls)
