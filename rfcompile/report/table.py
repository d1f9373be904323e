"""The base class of all reports: rows that print as a table and convert to JSON."""

from __future__ import annotations

import inspect
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, ClassVar, get_type_hints


class TableReport:
    """The base of the reports, which are frozen dataclasses: ``print`` one, read its fields, or
    take :meth:`to_dict` or :meth:`json`.
    """

    def lines(self) -> Iterable[str]:
        """The text, line by line."""
        raise NotImplementedError

    def text(self) -> str:
        return "\n".join(self.lines())

    def __str__(self) -> str:
        return self.text()

    SCHEMA_VERSION: ClassVar[int] = 1
    """It grows when a reader of the old JSON would misread the new."""

    @classmethod
    def schema(cls) -> str:
        """The name and version of the JSON, such as "rfcompile.graph_diff/1"."""
        name = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", cls.__name__).lower()
        return f"rfcompile.{name}/{cls.SCHEMA_VERSION}"

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data, for JSON: ``schema``, then what the schema of that name says
        (``docs/reference/schema.md``). NaN and infinity become None.
        """
        return {"schema": self.schema(), **plain(self)}

    def json(self) -> str:
        """:meth:`to_dict` as a JSON object."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False)


def json_fields(cls: type) -> Iterator[tuple[str, Any]]:
    """Name and type of what a dataclass has in JSON.

    These are its fields, but for those that its ``repr`` leaves out (graphs, sources), and what the
    properties and methods compute that its ``IN_JSON`` names.
    """
    hints = get_type_hints(cls)
    for field in fields(cls):
        if field.repr:
            yield field.name, hints[field.name]
    for name in getattr(cls, "IN_JSON", ()):
        member = inspect.getattr_static(cls, name)
        function = member.fget if isinstance(member, property) else member
        yield name, get_type_hints(function)["return"]


def plain(value: Any) -> Any:
    """Of dataclasses, dicts, lists and scalars what JSON has; NaN and infinity become None."""
    if is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in fields(value) if field.repr]
        found = {name: getattr(value, name) for name in names}
        for name in getattr(value, "IN_JSON", ()):
            member = getattr(value, name)
            found[name] = member() if callable(member) else member
        return plain(found)
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, (str, int, bool, type(None))) else str(value)


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of cells as lines of aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
