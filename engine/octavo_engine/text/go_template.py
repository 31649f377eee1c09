"""Templates of Ollama's models, in the part of Go's text/template that they use: messages in, a prompt out.

Called by template.py and modelfile.py; go_parser.py says what is supported. Source: Ollama's template reference for
what a template is given.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from octavo_engine.errors import ModelfileInvalid
from octavo_engine.text import go_nodes as nodes
from octavo_engine.text.go_parser import parse

if TYPE_CHECKING:
    from collections.abc import Sequence

# What templates call the parts of a message, where it is not the same in capitals.
_FIELDS: Final = {
    "name": "ToolName",
    "reasoning_content": "Thinking",
    "tool_call_id": "ToolCallID",
    "tool_calls": "ToolCalls",
}
# What chat templates in jinja2 call what these have under other names.
_ARGUMENTS: Final = {
    "enable_thinking": frozenset({"Think", "IsThinkSet"}),
    "reasoning_effort": frozenset({"ThinkLevel"}),
}


class GoTemplate:
    """A parsed template.

    Raises:
        ModelfileInvalid: it is not well formed, or uses what is not supported; the message names line and token.
    """

    def __init__(self, source: str) -> None:
        self._statements, self._fields = parse(source)

    @property
    def takes_tools(self) -> bool:
        """Whether it tells the model of tools."""
        return {"Messages", "Tools"} <= self._fields

    @property
    def arguments(self) -> frozenset[str]:
        """The names, as chat templates have them, of what `render` may be given besides messages and tools."""
        return frozenset(name for name, fields in _ARGUMENTS.items() if fields & self._fields)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Any] = (),
        arguments: Mapping[str, Any] | None = None,
    ) -> str:
        """Return the prompt for the next answer. Tools, and calls in messages, are as OpenAI's API has them.

        A template without .Messages is rendered once for each round of system message, prompt and answer, the last time
        up to where the answer belongs (Ollama's rule for its older templates).

        Raises:
            ModelfileInvalid: the template does not go with these messages (an index that is not there).
        """
        told = [{_FIELDS.get(key, key.title()): _object(value) for key, value in one.items()} for one in messages]
        try:
            if "Messages" in self._fields:
                return self._render_all(_collated(told), [_object(tool) for tool in tools], arguments or {})
            return self._render_rounds(told)
        except (LookupError, TypeError, ValueError, RecursionError) as error:
            raise ModelfileInvalid(f"the template does not go with these messages: {error}") from error

    def _render_all(self, messages: list[dict[str, Any]], tools: list[Any], arguments: Mapping[str, Any]) -> str:
        system = "\n\n".join(message["Content"] for message in messages if message["Role"] == "system")
        data = {"Messages": messages, "System": system, "Tools": tools, "Prompt": "", "Response": ""}
        thinking = {
            "Think": bool(arguments.get("enable_thinking")),
            "ThinkLevel": str(arguments.get("reasoning_effort") or ""),
            "IsThinkSet": "enable_thinking" in arguments,
        }
        return self._run(data | thinking, cut=False)

    def _render_rounds(self, messages: Sequence[Mapping[str, Any]]) -> str:
        text = ""
        begun: dict[str, Any] = {"System": "", "Prompt": "", "Response": ""}
        for message in messages:
            place = {"system": "System", "user": "Prompt", "assistant": "Response"}.get(message["Role"])
            if place is None:
                raise ValueError(f"it has no place for messages of role {message['Role']}")
            order = list(begun)
            if any(begun[later] for later in order[order.index(place) + (place != "System") :]):
                text += self._run(begun, cut=False)
                begun = dict.fromkeys(begun, "")
            begun[place] = f"{begun[place]}\n\n{message['Content']}" if begun[place] else message["Content"]
        return text + self._run(begun, cut=True)

    def _run(self, data: Mapping[str, Any], *, cut: bool) -> str:
        scope = nodes.Scope(data, cut=cut)
        try:
            scope.run(self._statements)
            if not cut and "Messages" not in self._fields and "Response" not in self._fields:
                scope.out.append(data["Response"])  # where it stands if a template does not say
        except nodes.Cut:
            pass
        return "".join(scope.out)


class _Object(dict[str, Any]):
    """An object of JSON whose members templates call as Go does: .Function.Name. It is printed as it is."""

    def get(self, key: str, default: Any = None) -> Any:
        return super().get(key, super().get(key.lower(), default))


def _object(value: Any) -> Any:
    """Make every object in a value of JSON an _Object."""
    if isinstance(value, Mapping):
        return _Object({key: _object(item) for key, item in value.items()})
    return [_object(item) for item in value] if isinstance(value, list) else value


def _collated(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Join neighbours of one role, as Ollama does; results of tools stay apart, and so do calls."""
    joined: list[dict[str, Any]] = []
    for message in messages:
        if joined and joined[-1]["Role"] == message["Role"] != "tool" and not message.get("ToolCalls"):
            joined[-1] = joined[-1] | {"Content": f"{joined[-1]['Content']}\n\n{message['Content']}"}
        else:
            joined.append(message)
    return joined
