"""Modelfiles: text that makes a model of another one by a system message, parameters, a template, messages.

Called by the command line and by server/ollama/. Reads and writes text; what FROM names is the store's business.
Source: Ollama's Modelfile reference. Instructions may come in any order and case; values are the rest of the line, or
text between quotes (") or triple quotes, which may have several lines.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final

from octavo_engine import parameters
from octavo_engine.errors import ModelfileInvalid, RequestInvalid
from octavo_engine.text.go_template import GoTemplate

if TYPE_CHECKING:
    from octavo_engine.parameters import Parameters, ParameterValue

_ROLES: Final = ("system", "user", "assistant")
_ONCE: Final = ("FROM", "ADAPTER", "TEMPLATE", "SYSTEM", "REQUIRES")  # a second one would silently replace the first
_LACKING: Final = {
    "DRAFT": "guesses are set for a whole server: octavo serve --speculative-config",
    "RENDERER": "only TEMPLATE says how messages become a prompt",
    "PARSER": "only TEMPLATE says how messages become a prompt",
}
_INSTRUCTION: Final = re.compile(r"[ \t]*(?P<name>[A-Za-z]+)[ \t]+")
_NAME: Final = re.compile(r"(?P<name>\S+)[ \t]+")
_BLANK: Final = re.compile(r"[ \t\r]*(#[^\n]*)?(\n|\Z)")
_LINE: Final = re.compile(r"[^\n]*")
_VALUES: Final = {  # by how they begin; a text between quotes may have quotes in it, but not where a line ends
    '"""': re.compile(r'"""(?P<text>.*?)"""[ \t\r]*(?=\n|\Z)', re.DOTALL),
    '"': re.compile(r'"(?P<text>.*?)"[ \t\r]*(?=\n|\Z)', re.DOTALL),
    "": re.compile(r"(?P<text>[^\n]*)"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Modelfile:
    """What a Modelfile says. Empty: nothing, so that the model's own holds."""

    source: str  # FROM: a name, or a path
    adapter: str = ""  # path of a LoRA adapter: a folder as PEFT writes it, or a GGUF file
    parameters: Parameters = field(default_factory=dict)
    template: str = ""  # Go's text/template, as Ollama's models have it
    system: str = ""
    messages: tuple[tuple[str, str], ...] = ()  # (role, content): how a conversation begins
    licenses: tuple[str, ...] = ()
    requires: str = ""  # the release of Ollama that it was written for; of no effect here

    def render(self) -> str:
        """Return it as text, which `parse_modelfile` reads as the same.

        Raises:
            ModelfileInvalid: a text has both kinds of quotes in places where no Modelfile can have them.
        """
        lines = [f"FROM {_quoted(self.source)}"]
        lines += [f"ADAPTER {_quoted(self.adapter)}"] if self.adapter else []
        lines += [f"REQUIRES {_quoted(self.requires)}"] if self.requires else []
        lines += [f"TEMPLATE {_quoted(self.template)}"] if self.template else []
        lines += [f"SYSTEM {_quoted(self.system)}"] if self.system else []
        lines += [f"PARAMETER {name} {value}" for name, value in self.parameter_lines()]
        lines += [f"MESSAGE {role} {_quoted(content)}" for role, content in self.messages]
        lines += [f"LICENSE {_quoted(text)}" for text in self.licenses]
        return "\n".join(lines) + "\n"

    def parameter_lines(self) -> list[tuple[str, str]]:
        """Return name and value of each parameter as text; a list has a line for each of its strings."""
        return [
            (name, _quoted(str(one)))
            for name, value in self.parameters.items()
            for one in (value if isinstance(value, tuple) else (value,))
        ]

    def over(self, base: Modelfile) -> Modelfile:
        """Return what this one makes of a model that `base` made: what it does not say stays.

        Raises:
            ModelfileInvalid: both have an adapter.
        """
        if self.adapter and base.adapter:
            raise ModelfileInvalid(
                f"ADAPTER {self.adapter}: the model that FROM names has one already ({base.adapter}), and only one is "
                "computed"
            )
        return replace(
            self,
            source=base.source,
            adapter=self.adapter or base.adapter,
            parameters=base.parameters | self.parameters,
            template=self.template or base.template,
            system=self.system or base.system,
            messages=self.messages or base.messages,
            licenses=self.licenses or base.licenses,
        )


def parse_modelfile(text: str) -> Modelfile:
    """Read a Modelfile.

    Raises:
        ModelfileInvalid: something is wrong, or not supported; the message names the line.
    """
    reader = _Reader(text.removeprefix("\ufeff"))
    while reader.instruction():
        pass
    return reader.modelfile()


class _Reader:
    """Goes through the text once, instruction by instruction."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._position = 0
        self._line = 1  # of the instruction
        self._single: dict[str, str] = {}
        self._parameters: dict[str, ParameterValue] = {}
        self._messages: list[tuple[str, str]] = []
        self._licenses: list[str] = []

    def modelfile(self) -> Modelfile:
        if "FROM" not in self._single:
            raise ModelfileInvalid("there is no FROM: say which model this one is made of")
        return Modelfile(
            source=self._single["FROM"],
            adapter=self._single.get("ADAPTER", ""),
            parameters=self._parameters,
            template=self._single.get("TEMPLATE", ""),
            system=self._single.get("SYSTEM", ""),
            messages=tuple(self._messages),
            licenses=tuple(self._licenses),
            requires=self._single.get("REQUIRES", ""),
        )

    def instruction(self) -> bool:
        """Read one; False at the end of the text."""
        while match := _BLANK.match(self._text, self._position):
            self._position = match.end()
            if self._position == len(self._text):
                return False
        self._line = self._text.count("\n", 0, self._position) + 1
        match = _INSTRUCTION.match(self._text, self._position)
        if match is None:
            line = _LINE.match(self._text, self._position)
            raise self._error(f"{(line[0] if line else '')[:80]!r} is not an instruction with a value")
        self._position = match.end()
        self._take(match["name"].upper())
        return True

    def _take(self, name: str) -> None:
        if name in _LACKING:
            raise self._error(f"{name} is not supported: {_LACKING[name]}")
        match name:
            case "PARAMETER":
                self._take_parameter(self._word("a parameter's name"), self._value())
            case "MESSAGE":
                role = self._word("a role").lower()
                if role not in _ROLES:
                    raise self._error(f"MESSAGE: {role[:50]!r} is not a role; roles: {', '.join(_ROLES)}")
                self._messages.append((role, self._value()))
            case "LICENSE":
                self._licenses.append(self._value())
            case "FROM" | "ADAPTER" | "TEMPLATE" | "SYSTEM" | "REQUIRES":
                if name in self._single:
                    raise self._error(f"a second {name}")
                self._single[name] = self._value()
                if name in {"FROM", "ADAPTER"} and not self._single[name]:
                    raise self._error(f"{name} names no {'model' if name == 'FROM' else 'adapter'}")
                if name == "TEMPLATE":
                    self._check_template(self._single[name])
            case _:
                known = ", ".join((*_ONCE, "PARAMETER", "MESSAGE", "LICENSE", *_LACKING))
                raise self._error(f"{name[:50]} is not an instruction; there are {known}")

    def _take_parameter(self, name: str, text: str) -> None:
        try:
            added = parameters.check(name, parameters.from_text(name, text))
            if name == "stop":
                stop = (*parameters.stop_strings(self._parameters), *parameters.stop_strings(added))
                added = parameters.check(name, stop)
            self._parameters |= added
        except RequestInvalid as error:
            raise self._error(f"PARAMETER {error}") from None

    def _check_template(self, template: str) -> None:
        try:
            GoTemplate(template)
        except ModelfileInvalid as error:  # whose lines count from the template's first
            raise self._error(f"TEMPLATE {error}") from None

    def _word(self, what: str) -> str:
        match = _NAME.match(self._text, self._position)
        if match is None:
            raise self._error(f"{what} and a value are missing")
        self._position = match.end()
        return match["name"]

    def _value(self) -> str:
        found = _read_value(self._text, self._position)
        if found is None:
            raise self._error("a text that begins with a quote does not end with one, at the end of a line")
        value, self._position = found
        return value

    def _error(self, problem: str) -> ModelfileInvalid:
        return ModelfileInvalid(f"line {self._line}: {problem}")


def _read_value(text: str, position: int) -> tuple[str, int] | None:
    """Return the value that begins at `position`, and where it ends; None: its quotes are not closed."""
    quote = next(quote for quote in _VALUES if text.startswith(quote, position))
    match = _VALUES[quote].match(text, position)
    if match is None:
        return None
    return match["text"] if quote else match["text"].strip(), match.end()


def _quoted(text: str) -> str:
    """Return the text as a value that is read as the same."""
    for written in (text, f'"{text}"', f'"""{text}"""'):
        if written and _read_value(written, 0) == (text, len(written)):
            return written
    raise ModelfileInvalid(f"a text with both kinds of quotes at the ends of lines cannot be written: {text[:50]!r}")
