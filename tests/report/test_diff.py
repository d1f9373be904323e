"""GraphDiff: what it accepts, what it says, and that its names stay put."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from textwrap import dedent
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

from rfcompile.errors import CaptureError, RFCompileError
from rfcompile.graph.pipeline import PassResult, run
from rfcompile.graph.text import graph_text
from rfcompile.report.diff import GraphDiff, diff, op_counts, with_names_of

aten = torch.ops.aten
X = torch.randn(8, 16)


def trace(f: Callable[..., object], *args: Tensor) -> fx.GraphModule:
    return make_fx(f, tracing_mode="fake")(*(args or (X,)))


def layers(x: Tensor, num_layers: int) -> Tensor:
    for _ in range(num_layers):
        x = x + torch.relu(x * 2)
    return x.sum()


def model(x: Tensor) -> Tensor:
    return layers(x, 3)


class Clamp:
    """Replace each relu by a clamp, with a neg in front of the first: one change a relu."""

    name, tier = "clamp", "model"

    def __call__(self, gm: fx.GraphModule) -> PassResult:
        nodes = gm.graph.find_nodes(op="call_function", target=aten.relu.default)
        for i, node in enumerate(nodes):
            node.target, node.args = aten.clamp.default, (*node.args, 0)
            if i == 0:
                with gm.graph.inserting_before(node):
                    neg = gm.graph.call_function(aten.neg.default, node.args[:1])
                neg.meta["val"] = node.meta["val"]
                node.args = (neg, 0)
        return PassResult(gm, len(nodes))


# ---- the text ------------------------------------------------------------------------------

BEFORE = """\
x_1: f32[8]
mul: f32[8] = aten.mul.Tensor(x_1, 2)
all_reduce: f32[8] = _c10d_functional.all_reduce.default(mul, 'sum', 'no such group')
wait_tensor: f32[8] = _c10d_functional.wait_tensor.default(all_reduce)
add: f32[8] = aten.add.Tensor(wait_tensor, 1)
add_1: f32[8] = aten.add.Tensor(add, x_1)
return (add_1,)"""

AFTER = """\
x_1: f32[8]
mul: f32[8] = aten.mul.Tensor(x_1, 2)
add: f32[8] = aten.add.Tensor(mul, mul)
all_gather_into_tensor: f32[16] = _c10d_functional.all_gather_into_tensor.default(add, 2, '0')
wait_tensor: f32[16] = _c10d_functional.wait_tensor.default(all_gather_into_tensor)
slice: f32[8] = aten.slice.Tensor(wait_tensor, 0, 8)
add_1: f32[8] = aten.add.Tensor(slice, 1)
add_2: f32[8] = aten.add.Tensor(add_1, x_1)
return (add_2,)"""


def test_text_has_the_diff_the_counts_and_the_bytes() -> None:
    d = diff(BEFORE, AFTER)
    assert str(d) == d.text()
    assert d.text() == dedent("""\
        --- before
        +++ after
        @@ -1,7 +1,9 @@
         x_1: f32[8]
         mul: f32[8] = aten.mul.Tensor(x_1, 2)
        -all_reduce: f32[8] = _c10d_functional.all_reduce.default(mul, 'sum', 'no such group')
        -wait_tensor: f32[8] = _c10d_functional.wait_tensor.default(all_reduce)
        -add: f32[8] = aten.add.Tensor(wait_tensor, 1)
        +add_2: f32[8] = aten.add.Tensor(mul, mul)
        +all_gather_into_tensor: f32[16] = _c10d_functional.all_gather_into_tensor.default(add_2, 2, '0')
        +wait_tensor: f32[16] = _c10d_functional.wait_tensor.default(all_gather_into_tensor)
        +slice: f32[8] = aten.slice.Tensor(wait_tensor, 0, 8)
        +add: f32[8] = aten.add.Tensor(slice, 1)
         add_1: f32[8] = aten.add.Tensor(add, x_1)
         return (add_1,)

        _c10d_functional.all_gather_into_tensor.default      0 -> 1     +1
        _c10d_functional.all_reduce.default                  1 -> 0     -1
        aten.add.Tensor                                      2 -> 3     +1
        aten.slice.Tensor                                    0 -> 1     +1

        bytes on the wire, sent by a rank: unknown -> 32""")  # noqa: E501
    assert d.removed == {"_c10d_functional.all_reduce.default": 1}
    assert d.added == {
        "_c10d_functional.all_gather_into_tensor.default": 1,
        "aten.add.Tensor": 1,
        "aten.slice.Tensor": 1,
    }
    assert (d.wire_bytes_before, d.wire_bytes_after) == (None, 32)


def test_equal_graphs_are_no_change() -> None:
    d = diff(trace(model), trace(model))
    assert not d.changed
    assert d.text() == "no change"
    assert d.lines() == []
    assert d.added == d.removed == {}


@pytest.mark.parametrize(
    ("before", "after", "text"),
    [
        (8192, 1088, "8,192 -> 1,088 (7.5x less)"),
        (100, 150, "100 -> 150 (1.5x more)"),
        (7, 7, "7 -> 7"),
        (0, 7, "0 -> 7"),
        (7, None, "7 -> unknown"),
    ],
)
def test_wire_text(before: int | None, after: int | None, text: str) -> None:
    assert GraphDiff("a", "b", {}, {}, before, after).wire_text() == text


def test_op_counts_count_calls_only() -> None:
    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin, self.w = nn.Linear(2, 2), nn.Parameter(torch.ones(2))

        def forward(self, x: Tensor) -> Tensor:
            return (self.lin(self.lin(x)) + self.w).view(-1)  # type: ignore[no-any-return]

    assert op_counts(graph_text(fx.symbolic_trace(Small()))) == {
        "self.lin": 2, "operator.add": 1, "Tensor.view": 1
    }  # fmt: skip


# ---- what can be compared --------------------------------------------------------------------


def test_a_record_stands_for_its_first_or_last_graph() -> None:
    gm = trace(model)
    start = graph_text(gm)
    record = run(gm, [Clamp(), Clamp()])  # type: ignore[list-item]  # its tier is a plain str
    d = diff(record, record)
    assert (d.before, d.after) == (start, graph_text(record.gm))
    assert d.changed
    assert diff(record.gm, record).text() == "no change"
    assert diff(run(gm, []), gm).text() == "no change"


def test_exported_programs_graphs_and_texts_compare() -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return model(x)

    exported = torch.export.export(Model(), (X,))
    text = graph_text(exported.graph_module)
    assert not diff(exported, exported.graph_module).changed
    assert not diff(exported, text + "\n").changed
    assert diff(exported, trace(lambda x: x + 1)).changed


@pytest.mark.parametrize("graph", [nn.Linear(2, 2), None, b"x"])
def test_what_holds_no_graph_is_refused(graph: Any) -> None:
    kind = type(graph).__name__
    with pytest.raises(CaptureError, match=f"diff got a {kind}, which .*torch.export.export"):
        diff("x", graph)
    with pytest.raises(RFCompileError):
        diff(graph, "x")


# ---- names stay put ----------------------------------------------------------------------------


def changed_lines(d: GraphDiff) -> tuple[int, int]:
    lines = d.lines()[2:]
    return sum(line[0] == "-" for line in lines), sum(line[0] == "+" for line in lines)


def test_a_new_statement_renames_no_later_one() -> None:
    def with_one_more(x: Tensor) -> Tensor:
        y = x * 3
        return model(x) + y.sum()

    before, after = trace(model), trace(with_one_more)
    old, new = (graph_text(gm).splitlines() for gm in (before, after))
    assert len(set(new) - set(old)) == 10  # by their own names, most statements would differ
    d = diff(before, after)
    assert changed_lines(d) == (1, 4)  # mul, sum, add are new, and the return
    assert "+mul_3: f32[8, 16] = aten.mul.Tensor(x_1, 3)" in d.lines()


def test_a_dtype_change_keeps_names_too() -> None:
    text = graph_text(trace(model))
    half = re.sub(r"^(relu_1: )f32", r"\1f16", text, flags=re.M)
    d = diff(text, half)
    assert changed_lines(d) == (1, 1)
    assert "+relu_1: f16[8, 16] = aten.relu.default(mul_1)" in d.lines()


def test_rewriting_repeated_layers_shows_only_what_was_rewritten() -> None:
    record = run(trace(lambda x: layers(x, 20)), [Clamp()])  # type: ignore[list-item]
    d = diff(record, record)
    # 20 relus become clamps, each with its one reader; one neg is new.
    assert changed_lines(d) == (40, 41)
    assert d.removed == {"aten.relu.default": 20}
    assert d.added == {"aten.clamp.default": 20, "aten.neg.default": 1}


def shuffled_names(text: str) -> str:
    """The same graph with all other names."""
    names = {s: f"n{i}" for i, s in enumerate(re.findall(r"^ *(\w+)(?=.* = )", text, flags=re.M))}
    return re.sub(r"(?<![\w.'])\w+(?![\w.=('])", lambda m: names.get(m[0], m[0]), text)


def test_with_names_of_a_renamed_graph_gives_the_graph() -> None:
    for gm in (trace(model), trace(lambda x: model(x * 3) + torch.relu(x).sum())):
        text = graph_text(gm)
        assert shuffled_names(text) != text
        assert with_names_of(text, shuffled_names(text)) == text


def test_with_names_of_another_graph_stays_the_same_graph() -> None:
    text = graph_text(trace(lambda x: (model(x * 3) - 1).relu()))
    renamed = with_names_of(graph_text(trace(model)), text)
    assert renamed != text
    assert with_names_of(text, renamed) == text  # a renaming, and nothing else


def test_names_in_quotes_keywords_and_dotted_words_are_left_alone() -> None:
    before = "torch: f32[8]\nadd = f.g(torch, 'add', add=torch.add, k={'add': 1})\nreturn add"
    after = "torch: f32[8]\nsub = f.g(torch, 'add', add=torch.add, k={'add': 1})\nreturn sub"
    assert with_names_of(before, after) == before
    assert with_names_of(after, before) == after


def test_every_small_change_of_a_text_is_seen() -> None:
    text = graph_text(trace(model))
    lines = text.splitlines()
    mutants = [
        "\n".join(lines[:i] + edited + lines[i + 1 :])
        for i, line in enumerate(lines)
        for edited in ([], [line, line.replace(":", "_new:", 1)], [line.replace("8", "9")])
    ]
    mutants = [mutant for mutant in mutants if mutant != text]
    assert len(mutants) > 25
    for mutant in mutants:
        d = diff(text, mutant)
        assert d.changed
        assert changed_lines(d) != (0, 0)


# ---- other forms -----------------------------------------------------------------------------


def test_json_holds_everything() -> None:
    d = diff(BEFORE, AFTER)
    data = json.loads(d.json())
    assert data.pop("schema") == "rfcompile.graph_diff/1"
    assert data.pop("changed") is True
    assert data.pop("lines") == d.lines()
    assert data.pop("graphs") == [*d.graphs]
    assert GraphDiff(**data) == d
