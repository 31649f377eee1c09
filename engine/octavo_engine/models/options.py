"""Typed reading of a model's description: the hyperparameters in config.json or in a GGUF header. No torch here.

Called by the families. It names the file and the key in every refusal, and it remembers which keys were asked for, so
that hyperparameters nobody knows can be refused.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NoReturn

from octavo_engine.errors import ModelInvalid, ModelUnsupported

if TYPE_CHECKING:
    from collections.abc import Mapping


class Options:
    """The hyperparameters under one prefix. A key whose value is None (null in JSON) counts as absent."""

    def __init__(self, file: str, label: str, values: Mapping[str, object]) -> None:
        """Take the values by key.

        Args:
            file: the file's name, for messages.
            label: what stands before a key in messages, such as "metadata key llama.".
            values: as parsed.
        """
        self._file = file
        self._label = label
        self._values = values
        self._known: set[str] = set()

    def with_defaults(self, defaults: Mapping[str, object]) -> Options:
        """The same with values for keys that are left out; an explicit null stays absent."""
        return self._derived({**defaults, **self._values})

    def without(self, key: str) -> Options:
        """The same without one key."""
        return self._derived({name: value for name, value in self._values.items() if name != key})

    def __contains__(self, key: str) -> bool:
        """Whether there is a value."""
        return self.get(key) is not None

    def get(self, key: str) -> object:
        """The value as it was parsed, or None."""
        self._known.add(key)
        return self._values.get(key)

    def size(self, key: str, default: int | None = None) -> int:
        """A whole number above zero.

        Raises:
            ModelInvalid: it is none, or it is missing and there is no default.
        """
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, int):
            self.invalid(key, f"is {type(value).__name__}, not int")
        if value <= 0:
            self.invalid(key, f"is {value}, not positive")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A number above zero.

        Raises:
            ModelInvalid: it is none, or it is missing and there is no default.
        """
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            self.invalid(key, f"is {type(value).__name__}, not float")
        if not 0 < value < float("inf"):
            self.invalid(key, f"is {value}, not positive")
        return float(value)

    def optional_number(self, key: str) -> float | None:
        """A number above zero, or None where it is absent or zero: the usual ways to say that there is none.

        Raises:
            ModelInvalid: it is something else.
        """
        return None if self.get(key) in (None, 0) else self.number(key)

    def count(self, key: str) -> int:
        """A whole number, zero where it is absent.

        Raises:
            ModelInvalid: it is something else.
        """
        return 0 if self.get(key) in (None, 0) else self.size(key)

    def numbers(self, key: str, count: int) -> tuple[float, ...]:
        """That many numbers above zero.

        Raises:
            ModelInvalid: they are missing, others or more.
        """
        values = self._value(key, None)
        if not isinstance(values, list) or len(values) != count:
            self.invalid(key, f"is not a list of {count} numbers")
        return tuple(Options(self._file, f"{self._label}{key}.", {"item": value}).number("item") for value in values)

    def text(self, key: str, default: str | None = None) -> str:
        """A string.

        Raises:
            ModelInvalid: it is none, or it is missing and there is no default.
        """
        value = self._value(key, default)
        if not isinstance(value, str):
            self.invalid(key, f"is {type(value).__name__}, not str")
        return value

    def flag(self, key: str, *, default: bool) -> bool:
        """True or false.

        Raises:
            ModelInvalid: it is neither.
        """
        value = self._value(key, default)
        if not isinstance(value, bool):
            self.invalid(key, f"is {type(value).__name__}, not bool")
        return value

    def section(self, key: str) -> Options | None:
        """The hyperparameters inside `key`, or None where it is absent.

        Raises:
            ModelInvalid: it is something else.
        """
        value = self.get(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            self.invalid(key, f"is {type(value).__name__}, not an object")
        return Options(self._file, f"{self._label}{key}.", value)

    def require(self, key: str, *computed: object) -> None:
        """Refuse an option whose value is none of those that are computed (or absent).

        Raises:
            ModelUnsupported: names it.
        """
        if key in self and self.get(key) not in computed:
            self.unsupported(key, f"is {self.get(key)}; supported: {', '.join(str(value) for value in computed)}")

    def require_known(self) -> None:
        """Refuse what no one asked for: an option unknown here may change what the model computes.

        Raises:
            ModelUnsupported: names the first such key.
        """
        for key in self._values:
            if key not in self._known:
                self.unsupported(key, "is not known to this engine")

    def invalid(self, key: str, problem: str) -> NoReturn:
        """Refuse a value that no model can have."""
        raise ModelInvalid(f"{self._file}: {self._label}{key} {problem}")

    def unsupported(self, key: str, problem: str) -> NoReturn:
        """Refuse a value that this engine does not compute."""
        raise ModelUnsupported(f"{self._file}: {self._label}{key} {problem}")

    def _derived(self, values: Mapping[str, object]) -> Options:
        """Other values of the same file; what is asked of them counts as asked here."""
        options = Options(self._file, self._label, values)
        options._known = self._known
        return options

    def _value(self, key: str, default: object) -> object:
        value = self.get(key)
        if value is None:
            value = default
        if value is None:
            self.invalid(key, "is missing")
        return value
