"""The schemas of docs/schemas, and what differs from them; unlike a reader's, this check knows no further fields."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[1] / "docs" / "schemas"
TYPES = {"string": str, "boolean": bool, "integer": int, "object": dict, "array": list, "null": type(None)}
KEYWORDS = {
    "$schema",
    "title",
    "description",
    "type",
    "enum",
    "properties",
    "required",
    "items",
    "additionalProperties",
}


def faults(value: Any, name: str) -> list[str]:
    """Return where ``value`` is not as the schema ``name`` (``report``) says, or has a field that it does not know."""
    return list(_faults(value, json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8")), name))


def _faults(value: Any, schema: dict[str, Any], where: str) -> Iterator[str]:
    assert schema.keys() <= KEYWORDS, f"{where}: this check does not know {schema.keys() - KEYWORDS}"
    if "enum" in schema and value not in schema["enum"]:
        yield f"{where}: {value!r} is none of {schema['enum']}"
    types = schema.get("type", [])
    types = [types] if isinstance(types, str) else types
    if types and type(value) not in [TYPES[each] for each in types]:  # a bool is no integer here
        yield f"{where}: {value!r} is not of type {types}"
        return
    if isinstance(value, dict):
        known, others = schema.get("properties", {}), schema.get("additionalProperties")
        yield from (f"{where}: there is no {field!r}" for field in schema.get("required", []) if field not in value)
        for field, each in value.items():
            if field in known:
                yield from _faults(each, known[field], f"{where}.{field}")
            elif others is not None:
                yield from _faults(each, others, f"{where}.{field}")
            elif known:
                yield f"{where}: the schema does not know {field!r}"
    if isinstance(value, list):
        for number, each in enumerate(value):
            yield from _faults(each, schema.get("items", {}), f"{where}[{number}]")
