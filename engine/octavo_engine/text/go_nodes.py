"""What a Go template is made of, as functions of what an action sees: expressions give a value, statements write text.

Made by go_template.py, which parses. Values are strings, numbers, booleans, None, lists and dictionaries. Source: the
documentation of Go's package text/template.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, Final


class Cut(Exception):
    """The place of the answer is reached: the prompt ends here."""


class _Break(Exception):
    pass


class _Continue(Exception):
    pass


class Scope:
    """What an action sees: the dot, the variables, where text goes.

    Args:
        data: what the template is given.
        cut: end at the first .Response.
    """

    def __init__(self, data: Mapping[str, Any], *, cut: bool) -> None:
        self.data = data
        self.dot: Any = data
        self.cut = cut
        self.out: list[str] = []
        self._variables: list[tuple[str, Any]] = [("$", data)]

    def lookup(self, name: str) -> Any:
        """Return the value of a variable."""
        return self._variables[self._place(name)][1]

    def declare(self, name: str, value: Any) -> None:
        """Add a variable, which may hide one of the same name."""
        self._variables.append((name, value))

    def assign(self, name: str, value: Any) -> None:
        """Give a variable another value."""
        self._variables[self._place(name)] = (name, value)

    def run(self, statements: Sequence[Statement]) -> None:
        """Run them; the variables that they declare are gone after."""
        num_variables = len(self._variables)
        try:
            for statement in statements:
                statement(self)
        finally:
            del self._variables[num_variables:]

    def _place(self, name: str) -> int:
        return max(index for index, (known, _) in enumerate(self._variables) if known == name)


Expression = Callable[[Scope], Any]
Statement = Callable[[Scope], None]


# Expressions


def constant(value: Any) -> Expression:
    """A literal."""
    return lambda _scope: value


def dot(scope: Scope) -> Any:
    """The dot."""
    return scope.dot


def variable(name: str) -> Expression:
    """A variable."""
    return lambda scope: scope.lookup(name)


def member(value: Expression, name: str) -> Expression:
    """A field; of nothing, and where it is not there, it is nothing."""

    def evaluate(scope: Scope) -> Any:
        owner = value(scope)
        if scope.cut and name == "Response" and owner is scope.data:
            raise Cut
        if owner is None:
            return None
        if not isinstance(owner, Mapping):
            raise TypeError(f"{_printed(owner)[:50]!r} has no field .{name}")
        return owner.get(name)

    return evaluate


def call(name: str, arguments: Sequence[Expression]) -> Expression:
    """A function of FUNCTIONS. `and` and `or` look no further than they must."""

    def evaluate(scope: Scope) -> Any:
        if name not in {"and", "or"}:
            return FUNCTIONS[name][0](*(argument(scope) for argument in arguments))
        value = None
        for argument in arguments:
            value = argument(scope)
            if bool(value) == (name == "or"):
                break
        return value

    return evaluate


# Statements


def text(characters: str) -> Statement:
    """Text outside of actions."""
    return lambda scope: scope.out.append(characters)


def output(value: Expression) -> Statement:
    """A value, printed."""
    return lambda scope: scope.out.append(_printed(value(scope)))


def declaration(name: str, value: Expression, *, is_new: bool) -> Expression:
    """A variable that is declared or changed; it has the value."""

    def evaluate(scope: Scope) -> Any:
        (result := value(scope), (scope.declare if is_new else scope.assign)(name, result))
        return result

    return evaluate


def silent(value: Expression) -> Statement:
    """A value that is not printed."""

    def run(scope: Scope) -> None:
        value(scope)

    return run


def branch(condition: Expression, then: Sequence[Statement], otherwise: Sequence[Statement]) -> Statement:
    """If, else."""
    return lambda scope: scope.run([lambda scope: scope.run(then if condition(scope) else otherwise)])


def with_dot(value: Expression, then: Sequence[Statement], otherwise: Sequence[Statement]) -> Statement:
    """With, else: the value, if it is not empty, is the dot."""

    def inner(scope: Scope) -> None:
        result, outer = value(scope), scope.dot
        scope.dot = result or outer
        try:
            scope.run(then if result else otherwise)
        finally:
            scope.dot = outer

    return lambda scope: scope.run([inner])


def loop(
    items: Expression, names: Sequence[str], body: Sequence[Statement], otherwise: Sequence[Statement]
) -> Statement:
    """Range, else: each item is the dot and, where names are given, the last of them; the first is its place."""

    def run(scope: Scope) -> None:
        found, outer = items(scope), scope.dot
        pairs = sorted(found.items()) if isinstance(found, Mapping) else list(enumerate(_items(found)))
        if not pairs:
            scope.run(otherwise)
        try:
            for key, item in pairs:
                scope.dot = item
                declared = zip(names, (key, item) if len(names) > 1 else (item,), strict=True) if names else ()
                one = [_declare(name, value) for name, value in declared]
                try:
                    scope.run([*one, *body])
                except _Continue:
                    continue
                except _Break:
                    break
        finally:
            scope.dot = outer

    return run


def leave(scope: Scope) -> None:  # noqa: ARG001 - a statement
    """Break."""
    raise _Break


def go_on(scope: Scope) -> None:  # noqa: ARG001 - a statement
    """Continue."""
    raise _Continue


def _declare(name: str, value: Any) -> Statement:
    return lambda scope: scope.declare(name, value)


def _items(value: Any) -> list[Any]:
    if value is None:
        return []
    if not isinstance(value, list):
        raise TypeError(f"{_printed(value)[:50]!r} is not a list")
    return value


def _printed(value: Any) -> str:
    if isinstance(value, str):
        return value
    return "" if value is None else _json(value)


# Functions


def _json(value: Any) -> str:
    """JSON as Go writes it."""
    told = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        told = told.replace(character, f"\\u{ord(character):04x}")
    return told


def _equal(first: Any, *others: Any) -> bool:
    return any(first == other and isinstance(first, bool) == isinstance(other, bool) for other in others)


def _length(value: Any) -> int:
    return len(value.encode()) if isinstance(value, str) else len(value or ())


def _index(value: Any, *places: Any) -> Any:
    for place in places:
        if isinstance(value, list) and not 0 <= place < len(value):
            raise IndexError(f"there is no item {place} among {len(value)}")
        value = value.get(place) if isinstance(value, Mapping) else value[place]
    return value


def _slice(value: Any, begin: int = 0, end: int | None = None) -> Any:
    end = len(value) if end is None else end
    if not 0 <= begin <= end <= len(value):
        raise IndexError(f"there are no items {begin} to {end} among {len(value)}")
    return value[begin:end]


def _date(days: int) -> str:
    return (datetime.now().astimezone() + timedelta(days=days)).strftime("%Y-%m-%d")


_MANY: Final = 1000
# By name: the function, and how many arguments it takes.
FUNCTIONS: Final[Mapping[str, tuple[Callable[..., Any], range]]] = {
    "and": (bool, range(1, _MANY)),
    "or": (bool, range(1, _MANY)),
    "not": (lambda value: not value, range(1, 2)),
    "eq": (_equal, range(2, _MANY)),
    "ne": (lambda first, second: not _equal(first, second), range(2, 3)),
    "lt": (lambda first, second: first < second, range(2, 3)),
    "le": (lambda first, second: first <= second, range(2, 3)),
    "gt": (lambda first, second: first > second, range(2, 3)),
    "ge": (lambda first, second: first >= second, range(2, 3)),
    "len": (_length, range(1, 2)),
    "index": (_index, range(1, _MANY)),
    "slice": (_slice, range(1, 4)),
    "json": (_json, range(1, 2)),
    "currentDate": (lambda: _date(0), range(1)),
    "yesterdayDate": (lambda: _date(-1), range(1)),
}
