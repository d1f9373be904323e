"""Report: counts, bytes, reasons, and the strict check."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

import rfcompile as rf
from rfcompile.errors import ReportError, UnquantizedSiteError
from rfcompile.report.report import (
    AT_REST,
    GraphChange,
    Report,
    Site,
    Traffic,
    format_bytes,
)
from rfcompile.report.step import merge_reports

QUANTIZED = Site(
    collective="all_reduce",
    direction="forward",
    kind="activations",
    module="blocks.0.mlp",
    source="model.py:12",
    shape=(8, 64),
    dtype="f32",
    group="0",
    world_size=2,
    format="4b:g128:rise",
    reason="",
    eligible=True,
    bytes_before=2048,
    bytes_after=264,
)
SMALL = replace(
    QUANTIZED,
    module="norm",
    format=None,
    reason="64 bytes < min_bytes=100",
    bytes_after=2048,
    why="min_bytes",
)
INTEGER = replace(
    SMALL, module="count", reason="i64 data is not quantized", eligible=False, why="dtype"
)
SYMBOLIC = replace(QUANTIZED, shape=("s0", 64), bytes_before=None, bytes_after=None)
MERGED = replace(
    SMALL, module="up", reason="merged: added to a later site's tensor", eligible=False,
    bytes_after=0, why="merged",
)  # fmt: skip

GRADIENT = replace(QUANTIZED, direction="backward", kind="gradients", bytes_after=512)
STATE = replace(
    QUANTIZED, collective="exp_avg", direction=AT_REST, kind="optimizer_state", group="",
    world_size=1, bytes_before=1000, bytes_after=500,
)  # fmt: skip


def test_counts_and_bytes() -> None:
    report = Report((QUANTIZED, SMALL, INTEGER, MERGED))
    assert (report.num_quantized, report.num_sites, report.num_merged) == (1, 3, 1)
    assert report.skipped == (SMALL, INTEGER)
    assert (report.bytes_before, report.bytes_after) == (4 * 2048, 264 + 2 * 2048)
    assert report.ratio == 8192 / 4360


def test_an_empty_report_is_a_fact_and_not_an_error() -> None:
    report = Report(())
    report.require_all()
    assert report.summary() == "0 of 0 sites quantized, 0 bytes -> 0 bytes sent by each rank " + (
        "(1.00x less)"
    )


def test_the_text_names_every_site_its_place_and_the_reason() -> None:
    text = str(Report((QUANTIZED, SMALL, SYMBOLIC, MERGED), policy="all=4b"))
    lines = text.splitlines()
    assert lines[0].startswith("2 of 3 sites quantized, 1 merged into others, 6.14 kB -> 2.31 kB")
    assert lines[0].endswith("1 sites of symbolic size not counted")
    assert lines[1] == "policy: all=4b"
    assert len(lines) == 3 + 4
    assert "blocks.0.mlp model.py:12" in lines[3]
    assert "4b:g128:rise" in lines[3]
    assert "exact: 64 bytes < min_bytes=100" in lines[4]
    assert "f32[s0, 64]" in lines[5]
    assert "symbolic" in lines[5]
    assert "  merged: added" in lines[6]


def test_json_holds_the_same_facts() -> None:
    data = json.loads(Report((QUANTIZED, SMALL)).json())
    assert data["num_sites"] == 2
    assert data["bytes_after"] == 264 + 2048
    assert data["sites"][0]["shape"] == [8, 64]
    assert data["sites"][1]["reason"] == SMALL.reason


def test_strict_names_eligible_sites_only() -> None:
    Report((QUANTIZED, INTEGER, MERGED)).require_all()
    with pytest.raises(UnquantizedSiteError, match=r"1 eligible site would stay exact") as caught:
        Report((QUANTIZED, SMALL, INTEGER)).require_all()
    assert caught.value.sites == (("forward all_reduce at norm model.py:12", SMALL.reason),)


def test_kinds_are_added_up_and_what_is_kept_is_not_sent() -> None:
    report = Report((QUANTIZED, STATE, SMALL, GRADIENT))
    assert report.kinds == (
        Traffic("activations", False, 2, 1, 2 * 2048, 264 + 2048),
        Traffic("gradients", False, 1, 1, 2048, 512),
        Traffic("optimizer_state", True, 1, 1, 1000, 500),
    )
    assert (report.bytes_before, report.bytes_after) == (3 * 2048, 264 + 2048 + 512)
    summary, header, *lines = report.text().splitlines()
    assert summary == (
        "3 of 4 sites quantized, 6.14 kB -> 2.82 kB sent by each rank (2.18x less), "
        "1.00 kB -> 500 bytes of optimizer_state kept (2.00x less)"
    )
    assert header.split() == ["kind", "quantized", "bytes", "before", "after", "ratio"]
    assert lines[1].split() == ["gradients", "1", "of", "1", "2,048", "512", "4.00x"]
    assert lines[2].split()[:2] == ["optimizer_state", "(kept)"]
    assert json.loads(report.json())["kinds"][1]["bytes_after"] == 512
    assert Report((STATE,)).summary() == (
        "1 of 1 sites quantized, 1.00 kB -> 500 bytes of optimizer_state kept (2.00x less)"
    )


class Handle:
    def report(self) -> Report:
        return Report((GRADIENT,), "gradients=4b", notes=("n",))


def test_merging_keeps_sites_graphs_and_each_note_and_policy_once() -> None:
    graph = GraphChange("forward", "a", "b")
    one = Report((QUANTIZED,), "p", notes=("n",), graphs=(graph,))
    both = merge_reports([one, replace(one, sites=(SMALL,))])
    assert both == Report((QUANTIZED, SMALL), "p", notes=("n",), graphs=(graph, graph))
    step = rf.merge_reports(iter([one]), Handle(), [[Report((STATE,))]])
    assert step == Report((QUANTIZED, GRADIENT, STATE), "p; gradients=4b", ("n",), (graph,))
    assert merge_reports() == merge_reports([]) == Report(())


def idle(pattern: str) -> str:
    return f"sites[{pattern!r}] applies to nothing here: no name matches that none before it takes"


def test_a_pattern_that_decides_nothing_is_noted_until_another_report_has_a_use_for_it() -> None:
    mlp = replace(SMALL, module="blocks.0.mlp")
    policy = rf.Policy(sites={"blocks.*": None, "blocks.0.*": 4, "haed": 8, "head": 4})
    graph = Report.of(policy, [QUANTIZED, mlp], notes=["n"])
    assert graph.notes == ("n", idle("blocks.0.*"), idle("haed"), idle("head"))
    assert f"note: {idle('haed')}" in graph.text()
    hook = Report.of(rf.Policy(sites={"head": 4, "tail": 8}), [], names=["head"], options=" x")
    assert hook.notes == (idle("tail"),)
    assert hook.policy.endswith(" x")
    both = merge_reports(graph, hook)
    assert both.notes == ("n", idle("blocks.0.*"), idle("haed"), idle("tail"))
    assert merge_reports(both, hook).patterns == both.patterns


@pytest.mark.parametrize("source", ["report", 3, None, [3]])
def test_what_has_no_report_is_an_error(source: object) -> None:
    with pytest.raises(ReportError, match=r"has no report: give reports, or what quantize_ddp"):
        merge_reports(source)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (1000, "1.00 kB"), (2_163_000, "2.16 MB"),
     (7 * 10**9, "7.00 GB")],
)  # fmt: skip
def test_bytes_for_people(count: int, text: str) -> None:
    assert format_bytes(count) == text
