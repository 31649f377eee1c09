"""A model seen as text: messages in, a prompt of tokens out, and what its answers may hold. No engine, no HTTP.

Called by generation.py, which puts an engine to it, and by routes and terminal before they generate. What a user did
wrong leaves here as RequestInvalid.
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final

from octavo_engine.errors import ConfigError, RequestInvalid
from octavo_engine.parameters import max_tokens_of
from octavo_engine.structured.checker import Wanted
from octavo_engine.text import thoughts
from octavo_engine.text.load import load_tokenizer
from octavo_engine.text.message import MessageFormat
from octavo_engine.text.template import ChatTemplate, Message
from octavo_engine.text.tokenizer import Segment
from octavo_engine.text.tools import FORMATS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path
    from typing import Any

    from octavo_engine.modelfile import Modelfile
    from octavo_engine.parameters import Parameters
    from octavo_engine.text.tokenizer import Tokenizer
    from octavo_engine.text.tools import Tool, ToolChoice, ToolFormat

_INLINE_CHARACTERS: Final = 10_000  # longer texts are tokenised in a thread, so that other requests are answered
_TAG_TOKENS: Final = 16  # in so many tokens at its end a prompt has the tag that begins a thought, if it has one


@dataclass(frozen=True, slots=True)
class TextModel:
    """What of a model concerns text."""

    tokenizer: Tokenizer
    template: ChatTemplate | None  # None: the model brings none, and cannot chat
    system: str = ""  # of conversations that bring no system message; empty: none
    opening: tuple[Message, ...] = ()  # how every conversation begins
    parameters: Parameters = field(default_factory=dict)  # for what a request does not say
    max_model_len: int = 0  # tokens of the longest prompt and its answer; 0: no engine has told yet

    @classmethod
    def load(cls, path: Path, modelfile: Modelfile | None = None, chat_template: Path | None = None) -> TextModel:
        """Build it from a GGUF file or a folder with a tokenizer.json, without the weights.

        Args:
            path: of the file or folder.
            modelfile: what the model was made by.
            chat_template: a file with a jinja2 template that takes the place of the model's and the Modelfile's.

        Raises:
            ConfigError: `chat_template` cannot be read.
            ModelNotFound, ModelInvalid, ModelUnsupported: the files are not what they should be.
            ModelfileInvalid: the template of `modelfile` is wrong.
        """
        tokenizer = load_tokenizer(path)
        source = tokenizer.chat_template if chat_template is None else _read_template(chat_template)
        text = cls(tokenizer, ChatTemplate(source, tokenizer) if source else None)
        if modelfile is None:
            return text
        return text.with_modelfile(modelfile if chat_template is None else replace(modelfile, template=""))

    def with_modelfile(self, modelfile: Modelfile) -> TextModel:
        """Return what a Modelfile makes of it: what that does not say stays.

        Raises:
            ModelfileInvalid: its template is wrong.
        """
        opening = tuple({"role": role, "content": content} for role, content in modelfile.messages)
        return replace(
            self,
            template=self.compile_template(modelfile.template) if modelfile.template else self.template,
            system=modelfile.system or self.system,
            opening=opening or self.opening,
            parameters=self.parameters | modelfile.parameters,
        )

    def compile_template(self, source: str) -> ChatTemplate:
        """Return a template in Go's language for `encode_chat`.

        Raises:
            ModelfileInvalid: it is wrong, or not supported.
        """
        return ChatTemplate(source, self.tokenizer, "go")

    async def encode_chat(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Tool] = (),
        arguments: Mapping[str, Any] | None = None,
        template: ChatTemplate | None = None,
        must_fit: bool = True,
    ) -> list[int]:
        """Return the prompt for the next assistant message. Control tokens in messages are ordinary text.

        Before them comes what the model's Modelfile has: its messages and, unless they bring one, its system message.

        Args:
            messages: of the conversation.
            tools: that the model is told of.
            arguments: for the template (vLLM's chat_template_kwargs).
            template: takes the place of the model's.
            must_fit: refuse a prompt that is too long, and not only one that is far too long, as can be told without
                reading it.

        Raises:
            RequestInvalid: the template refuses the messages, has no use for tools or arguments, or the prompt is too
                long.
        """
        template = template or self.template
        if template is None:
            raise RequestInvalid(
                "this model has no chat template; use /v1/completions", param="messages", code="no_chat_template"
            )
        if tools:
            self.tool_format(template)
        _check_arguments(template, arguments or {})
        brings_system = bool(messages) and messages[0]["role"] == "system"
        system: list[Message] = [{"role": "system", "content": self.system}] if self.system else []
        told = [*([] if brings_system else system), *self.opening, *messages]
        segments = template.render(told, [tool.described for tool in tools], arguments)
        return await self._encode(segments, "messages", must_fit=must_fit)

    def tool_format(self, template: ChatTemplate | None = None) -> ToolFormat:
        """Return how the model calls tools.

        Raises:
            RequestInvalid: its chat template has no place for tools, or calls that are not known.
        """
        template = template or self.template
        if template is None or not template.takes_tools:
            problem = "this model does not support tools: its chat template does not tell it of them"
        elif template.tool_format is None:
            known = ", ".join(one.name for one in FORMATS)
            problem = f"how this model's chat template writes calls of tools is not known (known are {known})"
        else:
            return template.tool_format
        raise RequestInvalid(
            f"{problem}; serve a model whose template does, or another template by --chat-template, or leave out tools",
            param="tools",
        )

    def thinking(self, wanted: bool | str | None, template: ChatTemplate | None = None) -> dict[str, Any]:  # noqa: FBT001 - Ollama's `think` is whether to think, or how much
        """Return the arguments for `encode_chat` that have the model think; None: it does if it can.

        Raises:
            RequestInvalid: it is wanted, and the model cannot.
        """
        template = template or self.template
        if template is not None and template.thinks:
            return template.thinking(True if wanted is None else wanted)
        if wanted:
            raise RequestInvalid(
                f"this model does not support thinking: its chat template has no {thoughts.OPEN}; leave out think",
                param="think",
            )
        return {}

    def message_format(
        self, prompt: Sequence[int], choice: ToolChoice | None = None, *, template: ChatTemplate | None = None
    ) -> MessageFormat:
        """Return what the answers to the prompt of a chat may hold.

        Args:
            prompt: of the chat.
            choice: of the tools that it tells of.
            template: that wrote it, if it was not the model's.
        """
        template = template or self.template
        thinks = template is not None and template.thinks
        begun = thinks and self.text_of(prompt[-_TAG_TOKENS:]).rstrip().endswith(thoughts.OPEN)
        message_format = MessageFormat(thinks, begun)
        return message_format if choice is None else message_format.with_tools(self.tool_format(), choice)

    def shown_ids(self, message_format: MessageFormat) -> frozenset[int]:
        """Return the control tokens by which a parser of messages tells their parts."""
        return frozenset(self.tokenizer.control_ids_of(message_format.marks).values())

    def wanted_of_chat(
        self, wanted: Wanted | None, choice: ToolChoice | None, message_format: MessageFormat
    ) -> Wanted | None:
        """Return what the answers of a chat keep to once the model has thought: calls, what is `wanted`, or either.

        Args:
            wanted: by the request; with `choice` a JSON schema.
            choice: of tools.
            message_format: of the answers.
        """
        if choice is not None and (choice.needs_grammar or wanted is not None):
            form = self.tool_format()
            schema = json.loads(wanted.text) if wanted is not None else None
            mark_ids = self.tokenizer.control_ids_of(form.marks)
            wanted = Wanted("lark", form.grammar(choice, mark_ids, schema), "tools")
        if wanted is None or not message_format.thinks:
            return wanted
        mark_ids = self.tokenizer.control_ids_of((thoughts.OPEN, thoughts.CLOSE))
        before = thoughts.grammar_before_answer(mark_ids, begun=message_format.thought_begun)
        return replace(wanted, before=before)

    async def encode_prompt(
        self, prompt: str | Sequence[int], *, adds_special: bool = True, must_fit: bool = True, param: str = "prompt"
    ) -> list[int]:
        """Return the token ids of a raw prompt, in which control tokens count.

        Args:
            prompt: text or token ids.
            adds_special: put before and after a text what the model wants there.
            must_fit: as for `encode_chat`.
            param: the request's field, for what is said about it.

        Raises:
            RequestInvalid: it is empty, too long, or has ids outside the vocabulary.
        """
        if isinstance(prompt, str):
            ids = await self._encode([Segment(prompt, True)], param, must_fit=must_fit)
            if adds_special:
                ids = [*self.tokenizer.prompt_prefix_ids, *ids, *self.tokenizer.prompt_suffix_ids]
        else:
            ids = list(prompt)
            self.check_token_ids(ids, param)
        if must_fit:
            if not ids:
                raise RequestInvalid(f"{param} is empty; it must hold at least one token", param=param)
            self._refuse_overlong(len(ids), param)
        return ids

    def text_of(self, token_ids: Sequence[int]) -> str:
        """Return the text of tokens, in which control tokens are written out."""
        return b"".join(self.tokenizer.token_bytes[token_id] for token_id in token_ids).decode(errors="replace")

    def check_token_ids(self, token_ids: Sequence[int], param: str) -> None:
        """Refuse ids outside the vocabulary."""
        size = self.tokenizer.vocab_size
        wrong = next((token_id for token_id in token_ids if not 0 <= token_id < size), None)
        if wrong is not None:
            raise RequestInvalid(f"{param}: token id {str(wrong)[:20]} is not in 0..{size - 1}", param=param)

    def resolve_max_tokens(self, num_prompt_tokens: int, max_tokens: int | None, param: str) -> int:
        """Return how many tokens may be generated; None means what the Modelfile says, or the context leaves.

        Raises:
            RequestInvalid: prompt and `max_tokens` together exceed the context.
        """
        room = self.max_model_len - num_prompt_tokens
        if max_tokens is None:
            return max_tokens_of(self.parameters, num_prompt_tokens, self.max_model_len)
        if max_tokens > room:
            raise RequestInvalid(
                f"this model's context is {self.max_model_len} tokens; the prompt has {num_prompt_tokens} and "
                f"{param} asks for {str(max_tokens)[:20]} more. Lower {param} to {room} or shorten the prompt",
                param=param,
                code="context_length_exceeded",
            )
        return max_tokens

    async def _encode(self, segments: Sequence[Segment], param: str, *, must_fit: bool) -> list[int]:
        num_characters = sum(len(segment.text) for segment in segments)
        try:
            num_bytes = sum(len(segment.text.encode()) for segment in segments)
        except UnicodeEncodeError:  # out of JSON that was a part of a message, such as a call's arguments
            raise RequestInvalid("the text has a lone surrogate, which is not a character", param=param) from None
        # No token stands for more than so many bytes, so that a flood of text is refused without tokenising it.
        fewest = num_bytes // self.tokenizer.max_token_bytes
        self._refuse_overlong(fewest, param, at_least=True)
        if num_characters > _INLINE_CHARACTERS:
            ids = await asyncio.to_thread(self.tokenizer.encode, segments)
        else:
            ids = self.tokenizer.encode(segments)
        if must_fit:
            self._refuse_overlong(len(ids), param)
        return ids

    def _refuse_overlong(self, num_tokens: int, param: str, *, at_least: bool = False) -> None:
        if num_tokens >= self.max_model_len:
            raise RequestInvalid(
                f"this model's context is {self.max_model_len} tokens, of which the answer needs at least one; "
                f"the prompt has {'at least ' if at_least else ''}{num_tokens}",
                param=param,
                code="context_length_exceeded",
            )


def _read_template(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(f"--chat-template {path}: {error}") from error


def _check_arguments(template: ChatTemplate, arguments: Mapping[str, Any]) -> None:
    for name, value in arguments.items():
        if name not in template.arguments and value:  # what is off asks for nothing
            known = ", ".join(sorted(template.arguments)) or "nothing"
            raise RequestInvalid(
                f"this model's chat template has no use for {name[:50]!r}; besides messages and tools it reads {known}",
                param=f"chat_template_kwargs.{name[:50]}",
            )
