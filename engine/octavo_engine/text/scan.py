"""Reading text that comes in pieces: coroutines that are sent one character after the other, and "" at the end.

Called by tool_calls.py and thoughts.py. Where a coroutine reads one character at a time and asks for nothing else, what
it finds cannot depend on where the pieces were cut. The parts here read what many formats share; each is given the
character in hand and returns the first one that it does not take.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Final, TypeVar

T = TypeVar("T")
Reading = Generator[None, str, T]  # what it found

_CLOSERS: Final = {"{": "}", "[": "]"}
_SCALAR: Final = frozenset("+-.0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")
_BETWEEN: Final = _SCALAR | frozenset(" \t\r\n,:")  # what stands between strings and brackets


def space(char: str) -> Reading[str]:
    """Read white space."""
    while char.isspace():
        char = yield
    return char


def literal(char: str, *texts: str) -> Reading[tuple[str, str]]:
    """Read one of these texts, which begin alike and go on without their first character.

    Returns:
        What was read: the text, or as much as began like one; and the next character.
    """
    read = ""
    while char and any(text.startswith(read + char) for text in texts):
        read += char
        char = yield
        if read in texts:
            break
    return read, char


def json_string(char: str, take: Callable[[str], object]) -> Reading[tuple[bool, str]]:
    """Read a string of JSON, from its quotation mark on; `take` gets every character.

    Returns:
        Whether it is whole, and the next character.
    """
    while True:
        take(char)
        escaped = char == "\\"
        char = yield
        if escaped and char:
            take(char)
            char = yield
        if not char:
            return False, char
        if char == '"':
            take(char)
            return True, (yield)


def json_value(char: str, take: Callable[[str], object]) -> Reading[tuple[bool, str]]:
    """Read a value of JSON up to where it ends, or cannot go on; `take` gets every character.

    Strings and brackets are told apart from what is between them; numbers and words are not looked at.

    Returns:
        Whether it is whole, and the next character.
    """
    if char == '"':
        return (yield from json_string(char, take))
    if char not in _CLOSERS:
        is_scalar = char in _SCALAR
        while char in _SCALAR:
            take(char)
            char = yield
        return is_scalar, char
    return (yield from _bracketed(char, take))


def _bracketed(char: str, take: Callable[[str], object]) -> Reading[tuple[bool, str]]:
    """Read a list or an object."""
    closers: list[str] = []
    while True:
        if char == '"':
            is_whole, char = yield from json_string(char, take)
            if not is_whole:
                return False, char
            continue
        if char in _CLOSERS:
            closers.append(_CLOSERS[char])
        elif char == closers[-1]:
            closers.pop()
        elif char not in _BETWEEN:  # the end of the text is not
            return False, char
        take(char)
        char = yield
        if not closers:
            return True, char
