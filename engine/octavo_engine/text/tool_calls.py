"""Calls of tools in what a model writes, in the formats of the supported families, told apart from the text around.

Called by message.py. tools.py says which format a model has. Sources: the models' chat templates and cards (Hermes 2
Pro and Qwen 2.5; Llama 3.1 and 3.2; Mistral 7B v0.3 and, with [ARGS], Ministral and Mistral Small 3).

A call is begun once its name is known, and its arguments are then passed on as the model writes them, valid or not.
What is no call is text, also where it began like one: nothing that the model wrote is lost but the format's own marks.
White space at the end of the text, and between calls and its beginning, is none of it.
"""

from __future__ import annotations

import ast
import json
import secrets
import string
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from octavo_engine.text.scan import json_string, json_value, literal, space

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from octavo_engine.text.scan import Reading

HERMES_OPEN: Final = "<tool_call>"
HERMES_CLOSE: Final = "</tool_call>"
LLAMA_TAG: Final = "<|python_tag|>"
MISTRAL_CALLS: Final = "[TOOL_CALLS]"
MISTRAL_ID: Final = "[CALL_ID]"
MISTRAL_ARGUMENTS: Final = "[ARGS]"

_ALPHANUMERIC: Final = string.ascii_letters + string.digits
_ID_LENGTH: Final = 9  # Mistral's templates take no other ids, and nobody else minds
_MAX_NAME: Final = 256  # characters that a name and what stands before it may have
_MAX_PYTHON_DEPTH: Final = 50


@dataclass(frozen=True, slots=True)
class CallPiece:
    """A call that begins, or more of the arguments of one that has begun."""

    index: int  # of the call in its message
    arguments: str  # JSON; together with those of the same index
    call_id: str = ""  # with the first piece
    name: str = ""  # with the first piece


class ToolCalls:
    """Finds the calls in one answer.

    Args:
        read: the format.
        names: of the tools that there are. Where no mark comes before a call, nothing else is one.
    """

    def __init__(self, read: Callable[[ToolCalls], Reading[None]], names: Collection[str]) -> None:
        self.names = names
        self.num_calls = 0
        self._text: list[str] = []
        self._has_text = False  # other than white space
        self._space = ""  # at the end of the text
        self._calls: list[CallPiece] = []
        self._held: list[str] | None = None  # what may be a call or not, the character in hand included
        self._reading = read(self)
        next(self._reading)

    def push(self, text: str) -> tuple[str, tuple[CallPiece, ...]]:
        """Take the next piece and return what is certain of text and calls."""
        for char in text:
            if self._held is not None:
                self._held.append(char)
            self._reading.send(char)
        return self._taken()

    def finish(self) -> tuple[str, tuple[CallPiece, ...]]:
        """Return what was held back; no more text comes."""
        self._reading.send("")
        if not self.num_calls:
            self._text.append(self._space)
        return self._taken()

    # For the formats

    def text(self, characters: str) -> None:
        """These are no part of a call."""
        for char in characters:
            if char.isspace():
                self._space += char
            elif self.num_calls and not self._has_text:
                self._has_text, self._space = True, ""
                self._text.append(char)
            else:
                self._has_text = True
                self._text.append(self._space + char)
                self._space = ""

    def hold(self, characters: str) -> None:
        """These, and what comes, may be a call."""
        self._held = [characters]

    def release(self, char: str) -> None:
        """It was none; `char`, in hand, is still to be read."""
        held = "".join(self._held or ())
        self._held = None
        self.text(held[: len(held) - len(char)])

    def drop(self) -> None:
        """It was the format's own."""
        self._held = None

    def begin(self, name: str) -> None:
        """A call begins."""
        self._held = None
        call_id = "".join(secrets.choice(_ALPHANUMERIC) for _ in range(_ID_LENGTH))
        self._calls.append(CallPiece(self.num_calls, "", call_id, name))
        self.num_calls += 1

    def add(self, arguments: str) -> None:
        """More of its arguments."""
        last = self._calls[-1] if self._calls else None
        if last is not None and last.index == self.num_calls - 1:
            self._calls[-1] = CallPiece(last.index, last.arguments + arguments, last.call_id, last.name)
        else:
            self._calls.append(CallPiece(self.num_calls - 1, arguments))

    def _taken(self) -> tuple[str, tuple[CallPiece, ...]]:
        text, calls = "".join(self._text), tuple(self._calls)
        self._text.clear()
        self._calls.clear()
        return text, calls


# Formats: each reads an answer from its first character on


def read_hermes(calls: ToolCalls) -> Reading[None]:
    """Objects between tags, anywhere: <tool_call>{"name": "f", "arguments": {}}</tool_call>."""
    char = yield
    is_open = False
    while True:
        tag, char = yield from literal(char, HERMES_OPEN, *([HERMES_CLOSE] if is_open else []))
        if tag == HERMES_OPEN:
            calls.hold(tag + char)
            char = yield from space(char)
            is_open, char = yield from _object(calls, char, any_name=True)
            if is_open:
                char = yield from space(char)
        elif tag == HERMES_CLOSE:
            is_open = False
        else:
            calls.text(tag or char)
            char = char if tag else (yield)


def read_llama_json(calls: ToolCalls) -> Reading[None]:
    """Objects that are the whole answer: {"name": "f", "parameters": {}}; {...}. A tag may come before."""
    char = yield
    calls.hold(char)
    char = yield from space(char)
    tag, char = yield from literal(char, LLAMA_TAG)
    if not tag or tag == LLAMA_TAG:
        char = yield from space(char)
        is_call = True
        while is_call:
            is_call, char = yield from _object(calls, char)
            if is_call:
                calls.hold(char)
                char = yield from space(char)
                if char == ";":
                    char = yield from space((yield))
    yield from _rest(calls, char)


def read_mistral(calls: ToolCalls) -> Reading[None]:
    """After a token of its own a list of objects, [TOOL_CALLS][{"name": ...}], or a name: [TOOL_CALLS]f[ARGS]{}."""
    char = yield
    while True:
        tag, char = yield from literal(char, MISTRAL_CALLS)
        if tag != MISTRAL_CALLS:
            calls.text(tag or char)
            char = char if tag else (yield)
            continue
        calls.hold(tag + char)
        char = yield from space(char)
        if char in ("[", "{"):
            char = yield from _objects(calls, char)
        else:
            char = yield from _named(calls, char)


def read_pythonic(calls: ToolCalls) -> Reading[None]:
    """A list of Python's calls that is the whole answer: [f(a=1), g()]. Each is passed on when it is whole."""
    char = yield
    calls.hold(char)
    char = yield from space(char)
    tag, char = yield from literal(char, LLAMA_TAG)
    char = yield from space(char)
    if char == "[" and (not tag or tag == LLAMA_TAG):
        is_call = True
        while is_call:
            char = yield from space((yield))
            source: list[str] = []
            char = yield from _python_call(char, source.append)
            name, arguments = _evaluated("".join(source))
            if is_call := name in calls.names:
                calls.begin(name)
                calls.add(arguments)
                calls.hold(char)
                char = yield from space(char)
                if char != ",":
                    break
        if is_call and char == "]":
            calls.drop()
            char = yield
    yield from _rest(calls, char)


# Parts of formats


def _rest(calls: ToolCalls, char: str) -> Reading[None]:
    """There are no more calls."""
    calls.release(char)
    while True:
        calls.text(char)
        char = yield


def _objects(calls: ToolCalls, char: str) -> Reading[str]:
    """Read Mistral's list, or one object of it."""
    if char == "[":
        char = yield from space((yield))
    is_call = True
    while is_call:
        is_call, char = yield from _object(calls, char, any_name=True)
        if is_call:
            calls.hold(char)
            char = yield from space(char)
            if char == ",":
                char = yield from space((yield))
            elif char == "]":
                calls.drop()
                return (yield)
            else:
                break
    calls.release(char)
    return char


def _named(calls: ToolCalls, char: str) -> Reading[str]:
    """Read a name and, after it, arguments."""
    name = ""
    while char and char not in "[{" and len(name) < _MAX_NAME:
        name += char
        char = yield
    while char == "[":
        mark, char = yield from literal(char, MISTRAL_ARGUMENTS, MISTRAL_ID)
        if mark == MISTRAL_ID:
            while char and char != "[":
                char = yield
        elif mark != MISTRAL_ARGUMENTS:
            break
    name = name.strip()
    if char != "{" or not name:
        calls.release(char)
        return char
    calls.begin(name)
    _, char = yield from json_value(char, calls.add)
    return char


def _object(calls: ToolCalls, char: str, *, any_name: bool = False) -> Reading[tuple[bool, str]]:
    """Read a call that is an object with a name and arguments.

    Returns:
        Whether it was one, and the next character. What was none has been released, with what was held before it.
    """
    is_call = char == "{"
    if is_call:
        name, arguments, char = yield from _members(calls, char, any_name=any_name)
        if is_call := name is not None:
            if arguments is not None:  # those that came before the name, or none
                calls.begin(name or "")
                calls.add(_as_object(arguments))
            return True, char
    calls.release(char)
    return False, char


def _members(calls: ToolCalls, char: str, *, any_name: bool) -> Reading[tuple[str | None, str | None, str]]:
    """Read an object; arguments that come after a name are passed on as they come.

    Returns:
        The name, None if there is no call; the arguments, None if they have been passed on; the next character.
    """
    name: str | None = None
    arguments: str | None = ""
    char = yield from space((yield))
    while char == '"':
        key: list[str] = []
        _, char = yield from json_string(char, key.append)
        char = yield from space(char)
        if char != ":":
            return (name if arguments is None else None), arguments, char
        char = yield from space((yield))
        value: list[str] = []
        is_arguments = key in _ARGUMENTS and arguments == ""
        is_streamed = is_arguments and name is not None and char == "{"
        if is_streamed:
            assert name is not None
            calls.begin(name)
            arguments = None
        is_whole, char = yield from json_value(char, calls.add if is_streamed else value.append)
        if not is_whole:
            return (name if arguments is None else None), arguments, char
        if is_arguments and not is_streamed:
            arguments = "".join(value)
        elif key == _NAME and name is None:
            name = _string("".join(value))
            if name is None or not (any_name or name in calls.names):
                return None, arguments, char
        char = yield from space(char)
        if char == ",":
            char = yield from space((yield))
    if char != "}":
        return (name if arguments is None else None), arguments, char
    return name, arguments, (yield)


_NAME: Final = list('"name"')
_ARGUMENTS: Final = (list('"arguments"'), list('"parameters"'))


def _string(source: str) -> str | None:
    """Read a string of JSON; None: it is none, or empty."""
    try:
        value = json.loads(source, strict=False)
        if not isinstance(value, str) or not value:
            return None
        value.encode()  # JSON can spell half of a character
    except ValueError:
        return None
    return value


def _as_object(arguments: str) -> str:
    """Arguments that are a string stand for what is in it, and no arguments for an object without members."""
    if arguments in ("", "null"):
        return "{}"
    return (_string(arguments) or "{}") if arguments.startswith('"') else arguments


def _python_call(char: str, take: Callable[[str], object]) -> Reading[str]:
    """Read a call of Python's up to its closing bracket; return the next character."""
    depth = 0
    quote = ""
    while char:
        take(char)
        if quote:
            if char == "\\":
                char = yield
                take(char)
            elif char == quote:
                quote = ""
        elif char in "'\"":
            quote = char
        elif char in "([{":
            depth += 1
        elif char in ")]}":
            depth -= 1
            if depth <= 0:
                return (yield)
        char = yield
    return char


def _evaluated(source: str) -> tuple[str, str]:
    """Return name and arguments of a call of Python's; an empty name: it is none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes in strings that Python will not take some day
            tree = ast.parse(source.strip(), mode="eval").body
        if not isinstance(tree, ast.Call) or tree.args:
            return "", ""
        arguments = {str(keyword.arg): _value(keyword.value) for keyword in tree.keywords}
        text = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
        # As in JSON, two escapes may be the halves of one character; half of one alone is an error.
        return ast.unparse(tree.func), text.encode("utf-16", "surrogatepass").decode("utf-16")
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return "", ""


def _value(node: ast.expr, depth: int = 0) -> Any:
    """The value of a literal; JSON's names are taken too."""
    if depth > _MAX_PYTHON_DEPTH:
        raise ValueError("it is nested too deeply")
    match node:
        case ast.Constant(value=str() | int() | float() | None as value):
            return value
        case ast.Name(id="true" | "false" | "null" as name):
            return {"true": True, "false": False, "null": None}[name]
        case ast.List(elts=items) | ast.Tuple(elts=items):
            return [_value(item, depth + 1) for item in items]
        case ast.Dict(keys=keys, values=values):
            pairs = zip(keys, values, strict=True)
            return {str(_value(key, depth + 1)): _value(value, depth + 1) for key, value in pairs if key is not None}
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as number)):
            return -number
        case _:
            raise ValueError("it is no literal")
