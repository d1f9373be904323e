"""Prints the page of the reference on JSON, from the reports themselves: see ``make schema``."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from rfcompile.analyze import Analysis
from rfcompile.emission.compare import KernelComparison
from rfcompile.emission.report import KernelReport
from rfcompile.planning.check import PlanCheck
from rfcompile.planning.cost import Cost
from rfcompile.planning.crossover import Crossover
from rfcompile.planning.frontier import Frontier
from rfcompile.planning.measured_link import MeasuredLinks
from rfcompile.planning.plan import Plan
from rfcompile.planning.scores import Scores
from rfcompile.report.diff import GraphDiff
from rfcompile.report.report import Report
from rfcompile.report.schema import schema_page
from rfcompile.report.table import TableReport
from rfcompile.rewrites.adapters.quantize import QuantizedReport
from rfcompile.rewrites.adapters.rewrite import AdapterReport
from rfcompile.rewrites.attention.rewrite import PolynomialReport
from rfcompile.rewrites.graying.rewrite import GrayingReport
from rfcompile.rewrites.low_rank.rewrite import LowRankReport
from rfcompile.rewrites.residual.report import ResidualReport

REPORTS: tuple[type[TableReport], ...] = (
    Report,
    GraphDiff,
    Scores,
    Plan,
    PlanCheck,
    Frontier,
    Cost,
    MeasuredLinks,
    Crossover,
    Analysis,
    KernelReport,
    KernelComparison,
    ResidualReport,
    LowRankReport,
    AdapterReport,
    QuantizedReport,
    PolynomialReport,
    GrayingReport,
)
HEAD = """\
# JSON

`to_dict()` and `json()` of a report, and `--json` of the command line, give what this page says.
The key `schema` has the name of the report and a version. The version grows when a reader of the
old JSON would misread the new one, so a program should compare the whole text and refuse others.

`rfcompile.report.schema.json_schema(Report)` gives the same as a JSON Schema (draft 2020-12), for
any validator. A number that is NaN or infinite in Python is null. Keys that a table does not name
do not occur.

```{eval-rst}
.. autofunction:: rfcompile.report.schema.json_schema
```"""


def page() -> Iterator[str]:
    yield from HEAD.splitlines()
    yield from schema_page(REPORTS)


if __name__ == "__main__":
    sys.stdout.write("\n".join(page()) + "\n")
