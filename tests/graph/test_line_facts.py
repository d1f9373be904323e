"""LineFacts: module, line of code and bytes of each line of a graph text."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from rfcompile.graph.line_facts import LineFacts, _filled
from rfcompile.graph.text import graph_text
from tests.traces import Trace


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.relu(self.linear(x))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Block(), Block())

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x) * 2


def facts_of(gm: fx.GraphModule) -> tuple[list[str], LineFacts]:
    text = graph_text(gm)
    facts = LineFacts.of(gm, text)
    lines = text.splitlines()
    assert len(lines) == len(facts.sent) == len(facts.modules) == len(facts.sources)
    return lines, facts


def test_modules_classes_and_lines_of_an_exported_model() -> None:
    gm = torch.export.export(Net(), (torch.randn(2, 4),)).graph_module
    lines, facts = facts_of(gm)
    found = {
        (line.split(" = ")[1].split("(")[0], module)
        for line, module in zip(lines, facts.modules, strict=True)
        if " = " in line
    }
    assert ("aten.linear.default", "blocks.1.linear") in found
    assert ("aten.relu.default", "blocks.0") in found
    assert ("aten.mul.Tensor", "") in found
    assert facts.classes["blocks.0"].endswith("Block")
    relus = [source for source, line in zip(facts.sources, lines, strict=True) if "relu:" in line]
    assert relus[0].startswith("tests/graph/test_line_facts.py:")


def test_lines_of_nested_graphs_count() -> None:
    class Nested(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cond(x.sum() > 0, lambda x: x.sin(), lambda x: x.cos(), (x,))

    gm = torch.export.export(Nested(), (torch.randn(3),)).graph_module
    lines, facts = facts_of(gm)
    assert any(line.startswith("self.true_graph_0:") for line in lines)
    assert facts.sent_bytes == 0


def test_bytes_are_known_while_the_groups_are(trace: Trace) -> None:
    import torch.distributed._functional_collectives as collectives

    def f(x: Tensor) -> Tensor:
        return collectives.wait_tensor(collectives.all_reduce(x, "sum", "0"))

    gm = trace(f, torch.zeros(8))
    text = graph_text(gm)
    assert LineFacts.of(gm, text).sent_bytes == LineFacts.of_text(text).sent_bytes == 48
    unknown = LineFacts.of_text(text.replace("'0'", "'nowhere'"))
    assert unknown.sent_bytes is None
    assert unknown.sent.count(None) == 1


def test_texts_are_joined_with_a_line_between() -> None:
    one = LineFacts((1, 2), ("a", "b"), ("f:1", "f:2"), {"a": "A"})
    two = LineFacts((3,), ("c",), ("g:1",), {"c": "C"})
    joined = LineFacts.joined([one, two])
    assert joined.sent == (1, 2, 0, 3)
    assert joined.modules == ("a", "b", "", "c")
    assert joined.classes == {"a": "A", "c": "C"}
    assert LineFacts.joined([one, LineFacts((3,))]).modules == ()


def test_a_node_without_a_module_belongs_to_what_its_neighbours_have_in_common() -> None:
    modules = [None, "a.b.c", None, None, "a.b.d", None, "a.x", None]
    assert [*_filled(modules)] == ["", "a.b.c", "a.b", "a.b", "a.b.d", "a", "a.x", ""]
