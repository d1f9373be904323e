"""The JSON Schema of a report, read from its dataclasses, and the page that lists all of them."""

from __future__ import annotations

import dataclasses
import inspect
import re
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from rfcompile.report.table import TableReport, json_fields

DIALECT = "https://json-schema.org/draft/2020-12/schema"
_NUMBERS = {bool: "boolean", int: "integer", str: "string"}


def json_schema(report: type[TableReport]) -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of ``report.to_dict()``.

    A float may be null: NaN and infinity have no JSON. Objects have no other keys than those named.
    """
    found: dict[str, Any] = {}
    _define(report, found)
    own = found.pop(report.__name__)
    own["properties"] = {"schema": {"const": report.schema()}, **own["properties"]}
    own["required"] = ["schema", *own["required"]]
    return {"$schema": DIALECT, "title": report.schema(), **own, "$defs": found}


def _define(cls: type, found: dict[str, Any]) -> None:
    if cls.__name__ in found:
        return
    found[cls.__name__] = {}  # it may hold itself
    said = _said_of(cls)
    properties = {}
    for name, kind in json_fields(cls):
        properties[name] = _schema_of(kind, found)
        if text := said.get(name) or _said_of_property(cls, name):
            properties[name] = {**properties[name], "description": text}
    found[cls.__name__] = {
        "description": _first_line(cls),
        "type": "object",
        "properties": properties,
        "required": [*properties],
        "additionalProperties": False,
    }


def _schema_of(kind: Any, found: dict[str, Any]) -> dict[str, Any]:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind in _NUMBERS:
        return {"type": _NUMBERS[kind]}
    if kind is float:
        return {"type": ["number", "null"]}
    if kind is type(None):
        return {"type": "null"}
    if origin is typing.Literal:
        return {"enum": [*arguments]}
    if origin in (typing.Union, types.UnionType):
        return {"anyOf": [_schema_of(argument, found) for argument in arguments]}
    if origin is tuple and arguments[-1:] != (...,):
        items = [_schema_of(argument, found) for argument in arguments]
        return {"type": "array", "prefixItems": items, "minItems": len(items), "items": False}
    if origin in (tuple, list) or (origin and issubclass(origin, Iterable) and len(arguments) == 1):
        return {"type": "array", "items": _schema_of(arguments[0], found)}
    if origin and issubclass(origin, Mapping):
        return {"type": "object", "additionalProperties": _schema_of(arguments[1], found)}
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        _define(kind, found)
        return {"$ref": f"#/$defs/{kind.__name__}"}
    if kind is Any:
        return {}
    raise TypeError(f"{kind} has no JSON schema: give the field a type that JSON has.")


# ---- what the docstrings say -------------------------------------------------------------------

_ENTRY = re.compile(r"^ {4}((?:\w+, )*\w+): (.*)$")


def _first_line(documented: object) -> str:
    text = inspect.getdoc(documented) or ""
    return _plain(" ".join(text.split("\n\n")[0].split()))


def _said_of(cls: type) -> dict[str, str]:
    """What the ``Args`` of a docstring say of each field; "a, b: ..." speaks of both."""
    _, _, entries = (inspect.getdoc(cls) or "").partition("Args:\n")
    found: dict[str, str] = {}
    names: list[str] = []
    for line in entries.splitlines():
        match = _ENTRY.match(line)
        if match:
            names = match[1].split(", ")
            found.update(dict.fromkeys(names, match[2]))
        elif line.startswith(" " * 8):
            found.update({name: f"{found[name]} {line.strip()}" for name in names})
        elif line.strip():
            break
    return {name: _plain(text) for name, text in found.items()}


def _said_of_property(cls: type, name: str) -> str:
    member = inspect.getattr_static(cls, name, None)
    is_computed = isinstance(member, (property, types.FunctionType))
    return _first_line(member) if is_computed else ""


def _plain(text: str) -> str:
    """Without the roles of reStructuredText."""
    text = re.sub(r":\w+:`(?:([^`<]+?) <[^`>]*>|~?([^`]+))`", lambda m: m[1] or m[2], text)
    return text.replace("``", "`").strip()


# ---- the page of the reference -----------------------------------------------------------------


def schema_page(reports: Iterable[type[TableReport]]) -> Iterator[str]:
    """The lines of a Markdown page with a table for each report."""
    for report in reports:
        schema = json_schema(report)
        yield from ("", f"## {schema['title']}", "", schema["description"], "")
        yield from _table(schema)
        for name, part in schema["$defs"].items():
            yield from ("", f"`{name}`: {part['description']}", "")
            yield from _table(part)


def _table(schema: Mapping[str, Any]) -> Iterator[str]:
    yield "| key | value | |"
    yield "|---|---|---|"
    for name, part in schema["properties"].items():
        text = part.get("description", "").replace("|", "\\|")
        yield f"| `{name}` | {_words(part)} | {text} |"


def _words(part: Mapping[str, Any]) -> str:
    """A schema in words: "array of `Site`"."""
    if "const" in part:
        return f'`"{part["const"]}"`'
    if "enum" in part:
        return ", ".join(f'`"{value}"`' for value in part["enum"])
    if "$ref" in part:
        return f"`{part['$ref'].rpartition('/')[2]}`"
    if "anyOf" in part:
        options = (word for option in part["anyOf"] for word in _words(option).split(" or "))
        return " or ".join(dict.fromkeys(options))
    kind = part.get("type", "anything")
    if isinstance(kind, list):
        return " or ".join(kind)
    if "prefixItems" in part:
        return "array of " + ", ".join(_words(item) for item in part["prefixItems"])
    if kind == "array":
        return f"array of {_words(part['items'])}"
    if isinstance(part.get("additionalProperties"), dict):
        return f"object of {_words(part['additionalProperties'])}"
    return str(kind)
