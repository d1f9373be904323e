"""The page of a report: the model that it is about, its sites, and what was measured."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rfcompile.graph.line_facts import LineFacts
from rfcompile.graph.outline import Called
from rfcompile.graph.wire_bytes import tensor_bytes
from rfcompile.report.page.blocks import MODULE, Block, model_of
from rfcompile.report.page.document import Fact, Page, Texts
from rfcompile.report.page.of_diff import ARROWS, Side, model_rows
from rfcompile.report.page.rows import Row, connect_in_order, rows_of
from rfcompile.report.page.sites import (
    ShownSite,
    boxes_of,
    bytes_plot,
    facts_of,
    kurtosis_plot,
    sqnr_plot,
    table_of,
    unknown_of,
)

IN_ORDER = "Arrows follow the order of the calls."
AS_HELD = "Arrows follow the order in which the model holds its modules."
HINTS = {
    "SQNR": "rf.explain on one machine measures it",
    "kurtosis": "rf.explain on one machine measures it",
    "predicted loss": "rf.score and rf.plan predict it",
    "shape": "scores keep the number of elements",
    "line of code": "only graphs tell it",
}


def report_page(
    title: str,
    summary: Sequence[str],
    tiles: Sequence[tuple[str, str]],
    notes: Sequence[str],
    sites: Sequence[ShownSite],
    *,
    graphs: Sequence[tuple[str, str, LineFacts]] = (),
    calls: Sequence[Called] = (),
    plots: Sequence[str] | None = None,
) -> Page:
    """A page about sites.

    Args:
        graphs: (name, text, facts) of each graph; the model is drawn from them.
        calls: without graphs, the modules of the model. Without these too, those of the sites.
        plots: in the place of those that the sites have.
    """
    texts: tuple[Texts, ...] = ()
    root: Row | None = None
    arrows = ""
    if graphs:
        names, each, facts = zip(*graphs, strict=True)
        side = Side(names, each, LineFacts.joined(facts))
        root, arrows = model_rows([side]), ARROWS
        texts = (side.shown("\n\n".join(each).splitlines()),)
    elif calls:
        root = _outlined(model_of(calls, calls[0].cls), sites)
        arrows = IN_ORDER if any(call.output for call in calls) else AS_HELD
    elif any(site.module for site in sites):
        paths = dict.fromkeys(site.module for site in sites if site.module)
        root = rows_of([model_of((Called(path, "") for path in paths), "")])
    boxes = boxes_of(root, sites) if root is not None else [None] * len(sites)
    rows = [row for row in root.walk() if row.block.line is None] if root is not None else []
    columns, lines = table_of(sites, boxes)
    outputs = {call.module: call.output for call in calls}
    return Page(
        title=title,
        summary=tuple(summary),
        tiles=tuple(tiles),
        model=root,
        arrows=arrows,
        facts={row.number: [*facts_of(row, sites), *_output(row, outputs)] for row in rows},
        unknown={row.number: unknown_of(row, sites, HINTS) for row in rows},
        texts=texts,
        columns=columns if sites else (),
        lines=lines,
        plots=tuple(_plots(sites) if plots is None else plots),
        notes=tuple(notes),
    )


def _outlined(model: Block, sites: Sequence[ShownSite]) -> Row:
    root = rows_of([model])
    forward = [site for site in sites if site.kind == "activations"]
    connect_in_order(root, {site.module: int(site.bytes_after or 0) for site in forward})
    return root


def _output(row: Row, outputs: dict[str, str]) -> Iterator[Fact]:
    output = outputs.get(row.block.key, "") if row.block.kind == MODULE else ""
    if output:
        size = tensor_bytes(output)
        yield Fact("output", (output + (f", {size:,} bytes" if size is not None else ""),))


def _plots(sites: Sequence[ShownSite]) -> Iterator[str]:
    yield from bytes_plot(sites)
    yield from kurtosis_plot(sites)
    measured = [
        (site.bits, site.sqnr_db, f"site {i} {site.module}: {site.format}, {site.sqnr_db:.1f} dB")
        for i, site in enumerate(sites)
        if site.bits is not None and site.sqnr_db is not None
    ]
    yield from sqnr_plot(measured)
