"""The chat template of a model: messages in, text segments for the tokenizer out.

Called by generation.py. The template is jinja2 source out of the model file, hence not trusted: it runs in jinja2's
immutable sandbox. The environment is the one that transformers documents for template authors ("Writing a chat
template"): trimmed blocks, loop controls, `raise_exception`, `strftime_now`, `tojson`, the `generation` tag.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final, Literal

import jinja2
from jinja2 import meta
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

from octavo_engine.errors import ModelInvalid, RequestInvalid
from octavo_engine.text.go_template import GoTemplate
from octavo_engine.text.thoughts import CLOSE, OPEN
from octavo_engine.text.tokenizer import Segment
from octavo_engine.text.tools import tool_format

if TYPE_CHECKING:
    from jinja2.nodes import Node
    from jinja2.parser import Parser

    from octavo_engine.text.tokenizer import Tokenizer

Message = dict[str, Any]  # role, content and whatever else the template may read, as JSON
_Write = Callable[[list[Message], list[Any], Mapping[str, Any]], str]  # messages, tools, arguments

_OURS: Final = frozenset({"messages", "tools", "add_generation_prompt", "bos_token", "eos_token"})
_SWITCHES: Final = ("enable_thinking", "thinking")  # Qwen 3's; DeepSeek V3.1's and Granite's
_LEVEL: Final = "reasoning_effort"  # gpt-oss'


class ChatTemplate:
    """A compiled template.

    Args:
        source: in `language`.
        tokenizer: gives the control tokens that user text must not forge.
        language: jinja2 is that of model files, Go's that of Ollama's Modelfiles.

    Attributes:
        takes_tools: it tells the model of tools.
        tool_format: how the model calls them; None: it is not known.
        thinks: the model may think before it answers, between tags (text/thoughts.py).
        arguments: names of what else it reads, such as enable_thinking.

    Raises:
        ModelInvalid: the source does not compile.
        ModelfileInvalid: the same of one in Go's language.
    """

    def __init__(self, source: str, tokenizer: Tokenizer, language: Literal["jinja2", "go"] = "jinja2") -> None:
        self._tokenizer = tokenizer
        self.tool_format = tool_format(source)
        self.thinks = OPEN in source or CLOSE in source
        self._write, reads = self._go(source) if language == "go" else self._jinja2(source)
        self.takes_tools = "tools" in reads
        self.arguments = reads - _OURS

    def _go(self, source: str) -> tuple[_Write, frozenset[str]]:
        template, tokenizer = GoTemplate(source), self._tokenizer

        def write(messages: list[Message], tools: list[Any], arguments: Mapping[str, Any]) -> str:
            text = template.render(messages, tools, arguments)
            # Templates of Ollama's models leave to the tokenizer what comes before every prompt.
            first = tokenizer.bos_token if tokenizer.prompt_prefix_ids else ""
            return text if text.startswith(first) else first + text

        return write, template.arguments | ({"tools"} if template.takes_tools else set())

    def _jinja2(self, source: str) -> tuple[_Write, frozenset[str]]:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _GenerationTag]
        )
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        environment.filters["tojson"] = _tojson
        try:
            template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ModelInvalid(f"the model's chat template does not compile: {error}") from error
        reads = frozenset(meta.find_undeclared_variables(environment.parse(source))) - environment.globals.keys()
        tokens = {"bos_token": self._tokenizer.bos_token, "eos_token": self._tokenizer.eos_token}

        def write(messages: list[Message], tools: list[Any], arguments: Mapping[str, Any]) -> str:
            ours = tokens | {"messages": messages, "tools": tools or None, "add_generation_prompt": True}
            return template.render({**arguments, **ours})

        return write, reads

    def thinking(self, wanted: bool | str) -> dict[str, Any]:  # noqa: FBT001 - Ollama's: whether, or how much
        """Return the arguments by which it is told whether the model shall think; empty: it has no switch for that."""
        is_on = wanted is not False
        told: dict[str, Any] = {name: is_on for name in _SWITCHES if name in self.arguments}
        if isinstance(wanted, str) and _LEVEL in self.arguments:
            told[_LEVEL] = wanted
        return told

    def render(
        self, messages: Sequence[Message], tools: Sequence[Any] = (), arguments: Mapping[str, Any] | None = None
    ) -> list[Segment]:
        """Return the prompt for the next assistant message.

        Control tokens count where the template wrote them. Where they stand in a message they are ordinary text: there
        they are taken apart before rendering, by a character that is in no message, and put together again after.

        Args:
            messages: of the conversation.
            tools: as OpenAI describes them. `takes_tools` says whether there may be any.
            arguments: for `arguments`, what there is of it.

        Raises:
            RequestInvalid: the template refuses these messages.
        """
        told = [list(messages), list(tools), dict(arguments or {})]
        try:
            mark = _unused_character(told)
            text = self._write(*self._take_apart(told, mark))
        except RequestInvalid:
            raise
        except Exception as error:  # a template can fail in any way on messages it was not written for
            reason = f"the model's chat template refuses these messages: {str(error)[:200]}"
            raise RequestInvalid(reason, param="messages") from error
        pattern = self._tokenizer.control_pattern
        segments: list[Segment] = []
        position = 0
        for match in pattern.finditer(text) if pattern else ():
            segments.append(Segment(text[position : match.start()].replace(mark, ""), control_tokens=False))
            segments.append(Segment(match.group(), control_tokens=True))
            position = match.end()
        segments.append(Segment(text[position:].replace(mark, ""), control_tokens=False))
        return segments

    def _take_apart(self, value: Any, mark: str) -> Any:
        """Take control tokens apart in every text of a value of JSON."""
        pattern = self._tokenizer.control_pattern
        if isinstance(value, str):
            return pattern.sub(lambda match: mark.join(match.group()), value) if pattern else value
        if isinstance(value, Mapping):
            return {self._take_apart(key, mark): self._take_apart(item, mark) for key, item in value.items()}
        return [self._take_apart(item, mark) for item in value] if isinstance(value, list) else value


def _unused_character(told: Any) -> str:
    """Return a private-use character that is in no text of a value of JSON."""
    used: set[str] = set()
    values = [told]
    while values:
        value = values.pop()
        if isinstance(value, str):
            used.update(char for char in value if char >= "\U000f0000")
        elif isinstance(value, Mapping):
            values += [*value.keys(), *value.values()]
        elif isinstance(value, list):
            values += value
    free = (char for char in map(chr, range(0xF0000, 0xFFFFE)) if char not in used)
    try:
        return next(free)
    except StopIteration:
        raise RequestInvalid("the messages use every private-use character", param="messages") from None


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().astimezone().strftime(pattern)


def _tojson(
    value: Any, indent: int | None = None, separators: tuple[str, str] | None = None, *, sort_keys: bool = False
) -> str:
    """JSON as the model saw it in training: jinja2's own filter escapes it for HTML."""
    return json.dumps(value, ensure_ascii=False, indent=indent, separators=separators, sort_keys=sort_keys)


class _GenerationTag(Extension):
    """`{% generation %}...{% endgeneration %}` marks what training counts as the answer; for serving it is its body."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it as a plain set

    def parse(self, parser: Parser) -> list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)
