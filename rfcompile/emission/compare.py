"""What differs between two reports on kernels: of two formats, or of two versions."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rfcompile.errors import OptionError
from rfcompile.report.table import TableReport, table


@dataclass(frozen=True)
class Change:
    """A total of one graph in both reports; None where a report has no such graph."""

    graph: str
    total: str
    before: float | None
    after: float | None


@dataclass(frozen=True)
class KernelComparison(TableReport):
    """Totals of two reports, graph by graph; printing it gives a table."""

    before: str
    after: str
    changes: tuple[Change, ...]

    def lines(self) -> Iterator[str]:
        yield f"before: {self.before}"
        yield f"after:  {self.after}"
        rows = [["graph", "", "before", "after", "change"]]
        for change in self.changes:
            rows.append([change.graph, change.total, *map(_number, _pair(change)), _change(change)])
        yield from table(rows)


def compare(before: Mapping[str, Any], after: Mapping[str, Any]) -> KernelComparison:
    """What differs between two reports, each ``KernelReport.to_dict()``.

    Graphs are compared in their order, forward with forward and backward with backward.
    """
    old, new = _totals(before), _totals(after)
    changes = [
        Change(graph, total, old.get(graph, {}).get(total), new.get(graph, {}).get(total))
        for graph in dict.fromkeys((*old, *new))
        for total in (old.get(graph) or new[graph])
    ]
    return KernelComparison(_title(before), _title(after), tuple(changes))


def read_report(file: Path) -> dict[str, Any]:
    """A report that was stored as JSON.

    Raises:
        OptionError: the file holds none.
    """
    try:
        report = json.loads(file.read_text(encoding="utf-8"))
        _totals(report), _title(report)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        rule = "it holds no report of `rfcompile kernels --json`."
        raise OptionError("diff", str(file), rule) from error
    return dict(report)


def _totals(report: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for graph in report["graphs"]:
        same = sum(name.startswith(graph["direction"]) for name in found)
        name = graph["direction"] + (f" {same + 1}" if same else "")
        found[name] = dict(graph["totals"])
    return found


def _title(report: Mapping[str, Any]) -> str:
    return f"{report['gpu']} ({report['target']}), {report['policy']}"


def _pair(change: Change) -> tuple[float | None, float | None]:
    return change.before, change.after


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.2f}"


def _change(change: Change) -> str:
    if change.before == change.after or not change.before or change.after is None:
        return ""
    return f"{change.after / change.before:.2f}x"
