"""The base class of all reports: rows that print as a table and convert to JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any


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

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain data, for JSON: NaN and infinity become None."""
        fields: dict[str, Any] = plain(asdict(self))  # type: ignore[call-overload]
        return fields

    def json(self) -> str:
        """:meth:`to_dict` as a JSON object."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False)


def plain(value: Any) -> Any:
    """Of dicts, lists and scalars those that JSON has; NaN and infinity become None."""
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
