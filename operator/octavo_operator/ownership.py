"""Which fields of an object are whose: reading `managedFields`, by which server-side apply keeps its books. Pure.

Used by decide.py, to see what others have changed, and by reconcile.py, to see what we have applied. The format:
https://kubernetes.io/docs/reference/using-api/server-side-apply/#field-management
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from octavo_operator import names
from octavo_operator.resources import Json

Fields = Mapping[str, Any]  # a node of fieldsV1; one without members is owned as a whole


def our_fields(metadata: Json) -> Fields | None:
    """What we own of an object by our server-side apply; None where we have never applied it."""
    ours = names.FIELD_MANAGER, "Apply", None
    for entry in metadata.get("managedFields", ()):
        if (entry.get("manager"), entry.get("operation"), entry.get("subresource")) == ours:
            fields: Fields = entry.get("fieldsV1", {})
            return fields
    return None


def owns(owned: Fields | None, value: Any) -> bool:
    """Whether a node of fieldsV1 covers a value.

    A node without members is owned as a whole: a scalar, an empty or an atomic value. Members of a map are called
    f:NAME; those of a list k:{KEYS}, by the fields that tell its items apart, or v:VALUE in a list that is a set.
    """
    if owned is None:
        return False
    if not owned:
        return True
    if isinstance(value, Mapping):
        return all(owns(owned.get(f"f:{name}"), member) for name, member in value.items())
    if isinstance(value, list):
        return all(owns(_node_of_item(owned, item), item) for item in value)
    return False


def owned_part(owned: Fields, value: Any) -> Any:
    """The part of a live value that a node of fieldsV1 covers: what was applied, as the server has normalised it."""
    if not owned:
        return value
    if isinstance(value, Mapping):
        return {name: owned_part(owned[f"f:{name}"], value[name]) for name in value if f"f:{name}" in owned}
    if isinstance(value, list):
        return list(_owned_items(owned, value))
    return value


def _owned_items(owned: Fields, items: list[Any]) -> Iterator[Any]:
    for item in items:
        node = _node_of_item(owned, item)
        if node is not None:
            yield owned_part(node, item)


def _node_of_item(owned: Fields, item: Any) -> Fields | None:
    if not isinstance(item, Mapping):
        return owned.get(f"v:{json.dumps(item)}")
    for name, node in owned.items():
        if name.startswith("k:"):
            keys = json.loads(name[2:])
            # A key that the item leaves out (such as a port's protocol) has been defaulted by the server.
            if all(item.get(key, value) == value for key, value in keys.items()):
                found: Fields = node
                return found
    return None
