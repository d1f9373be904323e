"""Report and Site: which tensors are quantized, why others are not, the bytes saved.

Data first (frozen dataclasses), text and JSON second.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from rfcompile.codec.formats import dtype_text
from rfcompile.errors import PolicyError, UnquantizedSiteError
from rfcompile.graph.line_facts import LineFacts
from rfcompile.graph.outline import Called
from rfcompile.graph.pipeline import Record
from rfcompile.report.page.document import Page
from rfcompile.report.page.of_report import report_page
from rfcompile.report.page.paged import PagedReport
from rfcompile.report.page.sites import ShownSite
from rfcompile.report.table import table
from rfcompile.wire.policy import Decision, Policy, Why

AT_REST = "at rest"


@dataclass(frozen=True)
class Site:
    """One place where a tensor crosses the wire.

    Args:
        collective: all_reduce, reduce_scatter, all_gather, all_to_all, broadcast, send or boundary,
            or the operator's own name where it is none of these.
        direction: "forward", "backward", or :data:`AT_REST` for what is kept and not sent; or
            "unknown", where a joint graph does not say.
        kind: the kind of traffic, as in :class:`~rfcompile.Policy`, or "unknown".
        module: dotted path of the module it belongs to, "" where unknown.
        source: "file.py:123", the user's line, "" where unknown.
        shape: of the input; symbolic sizes are texts.
        dtype: of the input.
        group: name of the process group.
        world_size: its ranks.
        format: text of the format, None where the site stays exact.
        reason: why it stays exact; "" for a quantized site, unless each call decides.
        why: the rule behind ``reason``, for programs (see
            :class:`~rfcompile.wire.policy.Decision`).
        eligible: it could be quantized and nobody asked by name to leave it.
        bytes_before, bytes_after: bytes one rank sends in one run, None where a size is symbolic.
        sqnr_db, kurtosis: measured on the tensor, where a report measures.
        runs: how often it sends them in what the report covers: for each module that shares its
            graph, or in a step that :func:`~rfcompile.measure_step` counted.
    """

    collective: str
    direction: str
    kind: str
    module: str
    source: str
    shape: tuple[int | str, ...]
    dtype: str
    group: str
    world_size: int
    format: str | None
    reason: str
    eligible: bool
    bytes_before: int | None
    bytes_after: int | None
    sqnr_db: float | None = None
    kurtosis: float | None = None
    runs: int = 1
    why: Why = ""

    @classmethod
    def of(
        cls,
        decision: Decision,
        shape: Iterable[Any],
        dtype: torch.dtype | str,
        sent: tuple[int | None, int | None],
        *,
        collective: str,
        direction: str,
        kind: str,
        module: str,
        source: str = "",
        group: str = "",
        world_size: int = 2,
        sqnr_db: float | None = None,
        kurtosis: float | None = None,
    ) -> Site:
        """The place of a tensor of ``shape`` and ``dtype``; ``sent``: bytes before and after."""
        return cls(
            collective=collective,
            direction=direction,
            kind=kind,
            module=module,
            source=source,
            shape=tuple(size if isinstance(size, int) else str(size) for size in shape),
            dtype=dtype if isinstance(dtype, str) else dtype_text(dtype),
            group=group,
            world_size=world_size,
            format=decision.spec,
            reason=decision.reason,
            eligible=decision.eligible,
            bytes_before=sent[0],
            bytes_after=sent[1],
            why=decision.why,
            sqnr_db=sqnr_db,
            kurtosis=kurtosis,
        )

    @property
    def merged(self) -> bool:
        """It is gone, another site carries its traffic."""
        return self.why == "merged"

    @property
    def place(self) -> str:
        return " ".join(part for part in (self.module, self.source) if part) or "(unknown place)"


@dataclass(frozen=True)
class Traffic:
    """The sites of one kind, added up.

    Args:
        kind: of traffic, as in :class:`~rfcompile.Policy`.
        is_kept: their bytes are stored, not sent.
        num_sites: without those merged into others.
        num_quantized: how many have a format.
        bytes_before, bytes_after: of all runs; sites of symbolic size are left out.
    """

    kind: str
    is_kept: bool
    num_sites: int
    num_quantized: int
    bytes_before: int
    bytes_after: int

    @property
    def ratio(self) -> float:
        """Bytes before / bytes after; 1.0 when there are none."""
        return self.bytes_before / self.bytes_after if self.bytes_after else 1.0


@dataclass(frozen=True)
class GraphChange:
    """A graph before and after the passes, as :func:`~rfcompile.graph.text.graph_text`, and what
    is known of the lines of both.
    """

    direction: str
    before: str
    after: str
    facts_before: LineFacts = field(default=LineFacts(), compare=False, repr=False)
    facts_after: LineFacts = field(default=LineFacts(), compare=False, repr=False)

    @classmethod
    def of(cls, direction: str, record: Record) -> GraphChange:
        """The change that a record of the pass runner with a step or more made."""
        first, last = record.steps[0].before, record.steps[-1].after
        return cls(direction, first, last, record.facts_before, record.facts_after)


@dataclass(frozen=True)
class Report(PagedReport):
    """All sites of a compiled graph, a hook, an optimizer, or of several such: ``print`` it, or
    read its fields; :func:`~rfcompile.merge_reports` makes one of several.

    Args:
        sites: in the order of the graphs or of the model.
        policy: what decided, as a text.
        notes: what else to know, such as what is left out and why.
        graphs: before and after the rewrite, of a compiled model.
        patterns: those of :attr:`Policy.sites <rfcompile.Policy>`, and whether one applies to
            anything here. A misspelt one does not, and ``notes`` say so.
        calls: the modules that ran, where a report ran the model itself.
    """

    sites: tuple[Site, ...]
    policy: str = ""
    notes: tuple[str, ...] = ()
    graphs: tuple[GraphChange, ...] = field(default=(), repr=False)
    patterns: Mapping[str, bool] = field(default_factory=dict)
    calls: tuple[Called, ...] = field(default=(), repr=False)

    IN_JSON: ClassVar = ("kinds", "num_sites", "num_quantized", "bytes_before", "bytes_after")

    @classmethod
    def of(
        cls,
        policy: Policy,
        sites: Iterable[Site],
        *,
        names: Iterable[str] | None = None,
        options: str = "",
        notes: Iterable[str] = (),
        graphs: Iterable[GraphChange] = (),
        calls: Iterable[Called] = (),
    ) -> Report:
        """The report on what ``policy`` decided.

        Args:
            names: what its patterns were compared with; left out, the modules of the sites.
            options: what it was used with, for the line on the policy.
        """
        sites = tuple(sites)
        compared = (site.module for site in sites) if names is None else names
        patterns = policy.patterns_in_use(compared)
        idle = (idle_note(pattern) for pattern, is_used in patterns.items() if not is_used)
        text = policy.describe() + options
        return cls(sites, text, (*notes, *idle), tuple(graphs), patterns, tuple(calls))

    @property
    def num_sites(self) -> int:
        """Sites that send something. Those merged into others are not counted."""
        return sum(not site.merged for site in self.sites)

    @property
    def num_merged(self) -> int:
        return sum(site.merged for site in self.sites)

    @property
    def num_quantized(self) -> int:
        """Sites that have a format."""
        return sum(site.format is not None for site in self.sites)

    @property
    def skipped(self) -> tuple[Site, ...]:
        """The sites that stay exact; each has its ``reason``."""
        return tuple(site for site in self.sites if site.format is None and not site.merged)

    @property
    def kinds(self) -> tuple[Traffic, ...]:
        """A line for each kind of traffic, then for what is kept, in order of the sites."""
        found: dict[tuple[bool, str], list[Site]] = {}
        for site in self.sites:
            found.setdefault((site.direction == AT_REST, site.kind), []).append(site)
        ordered = sorted(found.items(), key=lambda item: item[0][0])
        return tuple(_traffic(kind, is_kept, sites) for (is_kept, kind), sites in ordered)

    @property
    def bytes_before(self) -> int:
        """Bytes one rank sends without quantization; sites of symbolic size are left out."""
        return sum(line.bytes_before for line in self.kinds if not line.is_kept)

    @property
    def bytes_after(self) -> int:
        """The same with quantization."""
        return sum(line.bytes_after for line in self.kinds if not line.is_kept)

    @property
    def ratio(self) -> float:
        """Bytes before / bytes after; 1.0 when nothing is sent."""
        return self.bytes_before / self.bytes_after if self.bytes_after else 1.0

    def summary(self) -> str:
        """One line: N of M sites quantized, bytes before and after in all runs."""
        merged = f", {self.num_merged} merged into others" if self.num_merged else ""
        text = f"{self.num_quantized} of {self.num_sites} sites quantized{merged}"
        kept = [line for line in self.kinds if line.is_kept]
        if len(kept) < len(self.kinds) or not kept:
            text += _change(self.bytes_before, self.bytes_after, "sent by each rank")
        for line in kept:
            text += _change(line.bytes_before, line.bytes_after, f"of {line.kind} kept")
        symbolic = sum(site.bytes_before is None for site in self.sites)
        return text + (f"; {symbolic} sites of symbolic size not counted" if symbolic else "")

    def lines(self) -> Iterator[str]:
        """The summary, the policy, a table with a line a kind, and one with a line a site."""
        measured = any(site.sqnr_db is not None for site in self.sites)
        header = ["", "site", "place", "tensor", "format", "bytes before", "after"]
        counted = any(site.runs != 1 for site in self.sites)
        header += ["runs"] if counted else []
        rows = [header + (["SQNR dB", "kurtosis"] if measured else [])]
        for i, site in enumerate(self.sites):
            row = [
                str(i),
                f"{site.direction} {site.collective}",
                site.place,
                f"{site.dtype}[{', '.join(map(str, site.shape))}]",
                _format_of(site),
                _count(site.bytes_before, site.runs),
                _count(site.bytes_after, site.runs),
            ]
            row += [f"{site.runs}x"] if counted else []
            rows.append(row + ([_number(site.sqnr_db), _number(site.kurtosis)] if measured else []))
        yield self.summary()
        if self.policy:
            yield f"policy: {self.policy}"
        if len(self.kinds) > 1:
            yield from [*table([*_rows(self.kinds)]), ""]
        yield from table(rows) if self.sites else []
        yield from (f"note: {note}" for note in self.notes)

    def as_page(self) -> Page:
        """The model as boxes, the sites as a table, plots."""
        tiles = [
            ("sites quantized", f"{self.num_quantized} of {self.num_sites}"),
            ("sent by each rank", _arrow(self.bytes_before, self.bytes_after)),
        ]
        tiles += [
            (f"{line.kind} kept", _arrow(line.bytes_before, line.bytes_after))
            for line in self.kinds
            if line.is_kept
        ]
        return report_page(
            "Sites of traffic",
            [self.summary(), *([f"policy: {self.policy}"] if self.policy else [])],
            tiles,
            self.notes,
            [_shown(site) for site in self.sites],
            graphs=[(g.direction, g.after, g.facts_after) for g in self.graphs],
            calls=self.calls,
        )

    def require_all(self) -> None:
        """Raise UnquantizedSiteError if an eligible site stayed exact (``strict=True``)."""
        left = [
            (f"{s.direction} {s.collective} at {s.place}", s.reason)
            for s in self.skipped
            if s.eligible
        ]
        if left:
            raise UnquantizedSiteError(left)

    @property
    def idle_patterns(self) -> tuple[str, ...]:
        """Patterns of ``sites`` that apply to nothing here."""
        return tuple(pattern for pattern, is_used in self.patterns.items() if not is_used)

    def require_patterns(self) -> None:
        """Raise PolicyError if a pattern of ``sites`` applies to nothing here."""
        for pattern in self.idle_patterns:
            rule = f"{idle_note(pattern)}. Correct it, or report on all that share the policy."
            raise PolicyError("sites", pattern, rule)


def idle_note(pattern: str) -> str:
    """What a report says of a pattern that it has no use for."""
    return f"sites[{pattern!r}] applies to nothing here: no name matches that none before it takes"


# ---- text --------------------------------------------------------------------------------------


def format_bytes(count: int) -> str:
    """Bytes for people: "1.23 MB", in powers of 1000."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count} bytes"


def _arrow(before: int, after: int) -> str:
    less = f" ({before / after:.2f}x less)" if after else ""
    return f"{format_bytes(before)} -> {format_bytes(after)}{less}"


def _shown(site: Site) -> ShownSite:
    before, after = site.bytes_before, site.bytes_after
    numel = math.prod(size for size in site.shape if isinstance(size, int))
    is_measured = site.sqnr_db is not None and numel > 0  # where it is, the payload is what is sent
    return ShownSite(
        what=f"{site.direction} {site.collective}",
        kind=site.kind + (" (kept)" if site.direction == AT_REST else ""),
        module=site.module,
        graph=site.direction,
        source=site.source,
        tensor=f"{site.dtype}[{', '.join(map(str, site.shape))}]",
        format=site.format or "",
        reason=site.reason,
        bits=8 * after / numel if is_measured and after is not None else None,
        bytes_before=None if before is None else before * site.runs,
        bytes_after=None if after is None else after * site.runs,
        runs=site.runs,
        sqnr_db=site.sqnr_db,
        kurtosis=site.kurtosis,
    )


def _format_of(site: Site) -> str:
    if site.format:
        return site.format + (f" ({site.reason})" if site.reason else "")
    return ("" if site.merged else "exact: ") + site.reason


def _count(value: int | None, runs: int) -> str:
    return "symbolic" if value is None else f"{value * runs:,}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def _traffic(kind: str, is_kept: bool, sites: Sequence[Site]) -> Traffic:
    return Traffic(
        kind,
        is_kept,
        sum(not site.merged for site in sites),
        sum(site.format is not None for site in sites),
        sum((site.bytes_before or 0) * site.runs for site in sites),
        sum((site.bytes_after or 0) * site.runs for site in sites),
    )


def _change(before: int, after: int, what: str) -> str:
    ratio = before / after if after else 1.0
    return f", {format_bytes(before)} -> {format_bytes(after)} {what} ({ratio:.2f}x less)"


def _rows(kinds: Iterable[Traffic]) -> Iterator[list[str]]:
    yield ["kind", "quantized", "bytes before", "after", "ratio"]
    for line in kinds:
        yield [
            line.kind + (" (kept)" if line.is_kept else ""),
            f"{line.num_quantized} of {line.num_sites}",
            f"{line.bytes_before:,}",
            f"{line.bytes_after:,}",
            f"{line.ratio:.2f}x",
        ]
