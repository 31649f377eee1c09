"""Tools that a model may call: which format its calls have, and grammars for answers that must have some.

Used by template.py (which format), generation.py and the routes (grammars). How calls are found in an answer is
tool_calls.py's. The format follows from the model's chat template, as that is where the model is told of it.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from octavo_engine.errors import RequestInvalid
from octavo_engine.text.tool_calls import (
    HERMES_CLOSE,
    HERMES_OPEN,
    LLAMA_TAG,
    MISTRAL_ARGUMENTS,
    MISTRAL_CALLS,
    MISTRAL_ID,
    read_hermes,
    read_llama_json,
    read_mistral,
    read_pythonic,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from octavo_engine.text.scan import Reading
    from octavo_engine.text.tool_calls import ToolCalls

# What stands between the parts of a value: little, or a small model writes nothing else.
_SPACE: Final = {"whitespace_pattern": r"[ \n\r\t]{0,32}"}


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that a model may call."""

    name: str
    parameters: Mapping[str, Any]  # JSON schema of its arguments, which are an object
    strict: bool  # calls keep to the schema whoever decided on them, and a schema that cannot be kept to is refused
    described: Mapping[str, Any]  # as templates know it: {"type": "function", "function": {...}}


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """Which tools an answer may call."""

    tools: Sequence[Tool]  # at least one
    required: bool = False  # the answer is calls and nothing else
    parallel: bool = True  # it may have several

    @property
    def needs_grammar(self) -> bool:
        """Whether the model cannot be left to itself."""
        return self.required or not self.parallel or any(tool.strict for tool in self.tools)


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """How the models of a family write calls: opening, begin, head, arguments, tail, again, head ... tail, end."""

    name: str
    signs: Sequence[str]  # chat templates with any of these are of this format
    read: Callable[[ToolCalls], Reading[None]]
    head: Callable[[str], str]  # of a call to the tool of this name
    tail: str
    again: str  # between two calls
    end: str
    begin: str
    opening: str = ""  # where it is empty, the calls are the whole answer
    marks: Sequence[str] = ()  # parts that are control tokens in some vocabularies
    arguments: Callable[[Tool, str], Sequence[str]] = lambda tool, rule: [f"{rule}: {_json_of(tool)}"]

    def grammar(self, choice: ToolChoice, mark_ids: Mapping[str, int], schema: Mapping[str, Any] | None = None) -> str:
        """Return a grammar in llguidance's Lark for an answer.

        Args:
            choice: the tools, which the answer may call or must.
            mark_ids: the ids of those of `marks` that are control tokens.
            schema: what an answer without calls keeps to; None: nothing.

        Raises:
            RequestInvalid: the calls of some tool cannot be written in this format.
        """

        def lark(text: str) -> str:
            parts = re.split("(" + "|".join(map(re.escape, mark_ids)) + ")", text) if mark_ids else [text]
            return " ".join(f"<[{mark_ids[part]}]>" if part in mark_ids else json.dumps(part) for part in parts if part)

        more = f"({lark(self.again)} call)*" if choice.parallel else ""
        rules = [f"calls: {lark(self.begin)} call {more} {lark(self.end)}"]
        rules.append("call: " + " | ".join(f"call_{place}" for place in range(len(choice.tools))))
        for place, tool in enumerate(choice.tools):
            rules.append(f"call_{place}: {lark(self.head(tool.name))} arguments_{place} {lark(self.tail)}")
            rules += self.arguments(tool, f"arguments_{place}")
        opened = f"{lark(self.opening)} calls"
        if choice.required:
            start = [f"start: {opened}"]
        elif schema is not None:
            start = [f"start: {opened} | answer", f"answer: %json {json.dumps({**schema, 'x-guidance': _SPACE})}"]
        elif not self.opening:
            first = (self.begin + self.head(choice.tools[0].name))[0]
            start = ["start: calls | OTHER?", f"OTHER: /[^\\{first} \\t\\r\\n](.|\\n)*/"]
        else:
            lazy = "" if self.opening in mark_ids else "[lazy]"
            start = ["start: before calls | TEXT", f"before{lazy}: TEXT {lark(self.opening)}", "TEXT: /(.|\\n)*/"]
        return "\n".join([*start, *rules])


def tool_format(template: str) -> ToolFormat | None:
    """Return the format of the calls in a chat template; None: it is not known."""
    return next((one for one in FORMATS if any(sign in template for sign in one.signs)), None)


def _json_of(tool: Tool) -> str:
    # What llguidance does not know in a schema it may ignore, unless calls are to keep to all of it.
    return "%json " + json.dumps({**tool.parameters, "x-guidance": _SPACE | {"lenient": not tool.strict}})


def _keywords(tool: Tool, rule: str) -> list[str]:
    """Rules for arguments as Python's keywords: the required ones first, others may be left out."""
    properties = tool.parameters.get("properties", {})
    required = tool.parameters.get("required", [])
    names = sorted(properties, key=lambda name: name not in required)
    shared = {name: tool.parameters[name] for name in ("$defs", "definitions") if name in tool.parameters}
    rules = []
    for place, name in enumerate(names):
        if not name.isidentifier():
            raise RequestInvalid(
                f"this model writes calls as Python does, where {name[:50]!r} cannot be an argument; rename it",
                param="tools",
            )
        schema = properties[name] if isinstance(properties[name], dict) else {}
        value = Tool(tool.name, shared | schema, tool.strict, {})
        rules.append(f"{rule}_{place}: {json.dumps(name + '=')} {_json_of(value)}")

    def following(place: int) -> str:
        rest = (f'", " {rule}_{later}' for later in range(place + 1, len(names)))
        parts = (part if names[later] in required else f"({part})?" for later, part in enumerate(rest, place + 1))
        return " ".join([f"{rule}_{place}", *parts])

    if names and names[0] in required:
        return [f"{rule}: {following(0)}", *rules]
    some = " | ".join(following(place) for place in range(len(names)))
    return [f"{rule}: ({some})?" if some else f'{rule}: ""', *rules]


def _named_arguments(key: str) -> Callable[[str], str]:
    return lambda name: f'{{"name": {json.dumps(name)}, "{key}": '


# The first whose sign is in a template counts. The names are those of vLLM's parsers.
FORMATS: Final = (
    ToolFormat(
        name="hermes",
        signs=(HERMES_OPEN,),
        read=read_hermes,
        opening=HERMES_OPEN,
        begin="\n",
        head=_named_arguments("arguments"),
        tail="}",
        again=f"\n{HERMES_CLOSE}\n{HERMES_OPEN}\n",
        end=f"\n{HERMES_CLOSE}",
        marks=(HERMES_OPEN, HERMES_CLOSE),
    ),
    ToolFormat(
        name="mistral with [ARGS]",
        signs=(MISTRAL_ARGUMENTS,),
        read=read_mistral,
        opening=MISTRAL_CALLS,
        begin="",
        head=lambda name: name + MISTRAL_ARGUMENTS,
        tail="",
        again=MISTRAL_CALLS,
        end="",
        marks=(MISTRAL_CALLS, MISTRAL_ARGUMENTS, MISTRAL_ID),
    ),
    ToolFormat(
        name="mistral",
        signs=(MISTRAL_CALLS,),
        read=read_mistral,
        opening=MISTRAL_CALLS,
        begin=" [",
        head=_named_arguments("arguments"),
        tail="}",
        again=", ",
        end="]",
        marks=(MISTRAL_CALLS, MISTRAL_ARGUMENTS, MISTRAL_ID),
    ),
    ToolFormat(
        name="pythonic",
        signs=("[func_name1(", "[func1("),
        read=read_pythonic,
        begin="[",
        head=lambda name: name + "(",
        tail=")",
        again=", ",
        end="]",
        marks=(LLAMA_TAG,),
        arguments=_keywords,
    ),
    ToolFormat(
        name="llama3_json",
        signs=(LLAMA_TAG, '"parameters": '),
        read=read_llama_json,
        begin="",
        head=_named_arguments("parameters"),
        tail="}",
        again="; ",
        end="",
        marks=(LLAMA_TAG,),
    ),
)
