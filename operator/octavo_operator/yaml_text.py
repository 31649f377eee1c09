"""YAML as people and `kubectl apply` read it: in the order given, no anchors, strings that stay strings.

Used by api/crd.py and cli.py for everything that is printed or committed, and for files in ConfigMaps.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import yaml

_BREAKS: Final = frozenset("\x85\u2028\u2029")  # line breaks of YAML 1.1, which PyYAML keeps only in double quotes


class Inline(list[Any]):
    """A list that is written between brackets, on one line where it fits."""


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002 - PyYAML's signature
        """Write a value that occurs twice twice."""
        return True


def _looks_like_more(text: str) -> bool:
    """Whether Go's YAML reader, unlike PyYAML, may take a plain `text` for a number or a boolean."""
    if text in {"y", "Y", "n", "N"}:
        return True
    for number in (float, lambda digits: int(digits, 0)):
        try:
            number(text)
        except ValueError:
            continue
        return True
    return False


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = "'" if _looks_like_more(text) else None
    if not _BREAKS.isdisjoint(text):
        style = '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


def _represent_inline(dumper: yaml.SafeDumper, items: Inline) -> yaml.SequenceNode:
    return dumper.represent_sequence("tag:yaml.org,2002:seq", items, flow_style=True)


_Dumper.add_representer(str, _represent_text)
_Dumper.add_representer(Inline, _represent_inline)


def dump(documents: Iterable[Mapping[str, Any] | Sequence[Mapping[str, Any]]]) -> str:
    """The documents as YAML, separated by `---`."""
    return yaml.dump_all(documents, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
