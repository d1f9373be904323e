"""Rows: what is folded, how two sides correspond, and where edges run."""

from __future__ import annotations

import pytest

from rfcompile.graph.line_facts import LineFacts
from rfcompile.graph.outline import Called
from rfcompile.report.page.blocks import graph_of, model_of
from rfcompile.report.page.boxes import _lanes
from rfcompile.report.page.rows import OPEN_BOXES, Edge, Row, connect_in_order, rows_of


def labels(row: Row) -> list[str]:
    return [child.block.label for child in row.children]


def outline(*paths: str, cls: str = "Block") -> list[Called]:
    return [Called("", "Net"), *(Called(path, cls) for path in paths)]


def test_alike_modules_with_a_number_are_one_row() -> None:
    calls = [*outline("embedding", cls="Embedding"), *outline(*(f"layers.{i}" for i in range(6)))]
    root = rows_of([model_of([*calls, Called("norm", "Norm")], "Net")])
    assert labels(root) == ["embedding", "layers", "norm"]
    layers = root.children[1]
    assert (layers.times, layers.block.note) == (6, "Block")
    assert labels(layers) == [f"layers.{i}" for i in range(6)]


def test_modules_without_a_number_are_no_run() -> None:
    root = rows_of([model_of(outline("q_proj", "k_proj", "v_proj", cls="Linear"), "Attention")])
    assert labels(root) == ["q_proj", "k_proj", "v_proj"]


def test_a_pattern_that_repeats_is_one_row() -> None:
    calls = [Called("", "Net"), Called("head", "Linear")]
    calls += [Called(f"h.{i}", "Local" if i % 3 else "Global") for i in range(12)]
    root = rows_of([model_of(calls, "Net")])
    assert labels(root) == ["head", "h"]
    assert root.children[1].times == 4
    assert len(root.children[1].children) == 12


@pytest.mark.parametrize("alike", [True, False])
def test_few_boxes_are_open(alike: bool) -> None:
    calls = [Called(f"h.{i}", "Block" if alike else f"Block{i}") for i in range(80)]
    calls += [Called(f"h.{i}.{part}", "Linear") for i in range(80) for part in ("up", "down")]
    root = rows_of([model_of([Called("", "Net"), *calls], "Net")])
    shown = [row for row in root.walk() if row is root or row.is_open]
    assert 0 < sum(row.num_boxes for row in shown) <= OPEN_BOXES
    assert sum(1 for row in root.walk() if not row.children) == 160


TEXT = """\
x: f32[4]
a: f32[4] = aten.relu.default(x)
b: f32[4] = aten.neg.default(a)
c: f32[4] = aten.exp.default(b)
d: f32[4] = aten.add.Tensor(c, a)
return (d,)"""
FACTS = LineFacts((0,) * 6, ("", "first", "second", "second", "", ""), ("",) * 6, {})


def test_values_flow_between_rows() -> None:
    graph = graph_of(TEXT, FACTS, "net")
    root = rows_of([graph.root], [graph.flows])
    assert labels(root) == ["first", "second", "add"]
    assert {(e.start, e.end) for e in root.edges} == {(0, 1), (0, 2), (1, 2), (2, 3)}
    second = root.children[1]
    assert {(e.start, e.end) for e in second.edges} == {(-1, 0), (0, 1), (1, 2)}


def test_sides_correspond_by_module_and_operator() -> None:
    old, new = graph_of(TEXT, FACTS, "net"), graph_of(TEXT.replace("exp", "sin"), FACTS, "net")
    root = rows_of([old.root, new.root], [old.flows, new.flows])
    assert [row.state for row in root.children] == ["same", "changed", "same"]
    second = root.children[1]
    assert labels(second) == ["neg", "exp", "sin"]
    assert [row.state for row in second.children] == ["same", "removed", "added"]
    assert {(e.side, e.start, e.end) for e in second.edges if e.end == 3} == {(0, 1, 3), (1, 2, 3)}


def test_plain_operators_in_a_row_are_folded() -> None:
    lines = ["x: f32[4]", "a0: f32[4] = aten.relu.default(x)"]
    lines += [f"a{i}: f32[4] = aten.relu.default(a{i - 1})" for i in range(1, 5)]
    lines += ["q: u8[6] = rfcompile.quantize.default(a4, '4b')", "return q"]
    graph = graph_of("\n".join(lines), LineFacts(), "net")
    root = rows_of([graph.root], [graph.flows])
    assert labels(root) == ["5 operators", "quantize"]


def test_calls_without_a_graph_follow_one_another() -> None:
    root = rows_of([model_of(outline("a", "b", "b.out"), "Net")])
    connect_in_order(root, {"b.out": 7})
    assert [(e.start, e.end, e.crossed) for e in root.edges] == [(-1, 0, 0), (0, 1, 0), (1, 2, 7)]
    [inner, last] = root.children[1].edges
    assert (inner.crossed, last.crossed) == (0, 7)


def test_lanes_do_not_overlap() -> None:
    edges = [Edge(0, 0, 4, 0), Edge(0, 1, 3, 0), Edge(0, 4, 6, 0), Edge(0, 0, 2, 0)]
    lanes = _lanes(edges)
    spans = {0: (0, 4), 1: (1, 3), 4: (4, 6)}
    for a, (first, last) in spans.items():
        for b, (start, end) in spans.items():
            assert a == b or lanes[a] != lanes[b] or last <= start or end <= first
