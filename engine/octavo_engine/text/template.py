"""The chat template of a model: messages in, text segments for the tokenizer out.

Called by generation.py. The template is jinja2 source out of the model file, hence not trusted: it runs in jinja2's
immutable sandbox. The environment is the one that transformers documents for template authors ("Writing a chat
template"): trimmed blocks, loop controls, `raise_exception`, `strftime_now`, `tojson`, the `generation` tag.
"""

from __future__ import annotations

import json
from datetime import datetime
from typing import TYPE_CHECKING, Any, Literal

import jinja2
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

from octavo_engine.errors import ModelInvalid, RequestInvalid
from octavo_engine.text.go_template import GoTemplate
from octavo_engine.text.tokenizer import Segment

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from jinja2.nodes import Node
    from jinja2.parser import Parser

    from octavo_engine.text.tokenizer import Tokenizer

Message = dict[str, str]  # role, content and whatever else the template may read


class ChatTemplate:
    """A compiled template.

    Args:
        source: in `language`.
        tokenizer: gives the control tokens that user text must not forge.
        language: jinja2 is that of model files, Go's that of Ollama's Modelfiles.

    Raises:
        ModelInvalid: the source does not compile.
        ModelfileInvalid: the same of one in Go's language.
    """

    def __init__(self, source: str, tokenizer: Tokenizer, language: Literal["jinja2", "go"] = "jinja2") -> None:
        self._tokenizer = tokenizer
        self._write: Callable[[list[Message]], str] = self._go(source) if language == "go" else self._jinja2(source)

    def _go(self, source: str) -> Callable[[list[Message]], str]:
        template, tokenizer = GoTemplate(source), self._tokenizer

        def write(messages: list[Message]) -> str:
            text = template.render(messages)
            # Templates of Ollama's models leave to the tokenizer what comes before every prompt.
            first = tokenizer.bos_token if tokenizer.prompt_prefix_ids else ""
            return text if text.startswith(first) else first + text

        return write

    def _jinja2(self, source: str) -> Callable[[list[Message]], str]:
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
        bos_token, eos_token = self._tokenizer.bos_token, self._tokenizer.eos_token
        return lambda messages: template.render(
            messages=messages, add_generation_prompt=True, bos_token=bos_token, eos_token=eos_token
        )

    def render(self, messages: Sequence[Message]) -> list[Segment]:
        """Return the prompt for the next assistant message.

        Control tokens count where the template wrote them. Where they stand in a message they are ordinary text: there
        they are taken apart before rendering, by a character that is in no message, and put together again after.

        Raises:
            RequestInvalid: the template refuses these messages.
        """
        mark = _unused_character(messages)
        try:
            text = self._write(
                [{key: self._take_apart(value, mark) for key, value in message.items()} for message in messages]
            )
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

    def _take_apart(self, text: str, mark: str) -> str:
        pattern = self._tokenizer.control_pattern
        return pattern.sub(lambda match: mark.join(match.group()), text) if pattern else text


def _unused_character(messages: Sequence[Message]) -> str:
    """Return a private-use character that no message contains."""
    used = {char for message in messages for value in message.values() for char in value if char >= "\U000f0000"}
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
