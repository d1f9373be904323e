"""The pass that computes weights from factors: the graph it writes, layouts, sums, the formula."""

from __future__ import annotations

from textwrap import dedent

import torch
from torch import Tensor, fx, nn

from rfcompile.graph.pipeline import run
from rfcompile.graph.text import graph_text
from rfcompile.nn.low_rank import low_rank_weight
from rfcompile.passes.factor_weights import FactoredWeight, FactorWeights


class Twice(nn.Module):
    """One weight, read twice, in the layout [in, out]."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(torch.ones(3), x, self.weight) + x @ self.weight


def factors(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(*s, generator=generator) for s in ((rows, 2), (2, columns)))  # type: ignore[return-value]


def test_a_called_linear_is_spelled_out() -> None:
    gm = fx.symbolic_trace(nn.Sequential(nn.Linear(4, 3), nn.ReLU()))
    left, right = factors(3, 4)
    bias = gm.get_parameter("0.bias")

    record = run(gm, [FactorWeights((FactoredWeight("0", left, right, 5.0, 2.0),))])

    assert record.steps[0].changes == 1
    assert graph_text(gm) == dedent("""\
        input
        0_left = self.0.left
        0_right = self.0.right
        mul = torch.mul(0_left, 5.0)
        mm = torch.mm(mul, 0_right)
        sin = torch.sin(mm)
        div = torch.div(sin, 2.0)
        0_bias = self.0.bias
        linear = torch._C._nn.linear(input, div, 0_bias)
        1 = self.1(linear)
        return 1""")
    x = torch.randn(5, 4)
    weight = low_rank_weight(left, right, 5.0, 2.0)
    assert torch.equal(gm(x), nn.functional.linear(x, weight, bias).relu())
    assert "0.weight" not in dict(gm.named_parameters())


def test_all_reads_of_a_transposed_weight_share_one_sum() -> None:
    module = Twice()
    gm = fx.symbolic_trace(module)
    left, right = factors(3, 4)
    new = FactoredWeight("", left, right, None, 0.5, True, True, names=("b", "a"))

    run(gm, [FactorWeights((new,))])

    x = torch.randn(5, 4)
    weight = module.weight + low_rank_weight(left, right, None, 0.5).t()
    # the same operations in the same order
    assert torch.equal(gm(x), torch.addmm(torch.ones(3), x, weight) + x @ weight)
    assert len(gm.graph.find_nodes(op="get_attr", target="weight")) == 1
    assert len(gm.graph.find_nodes(op="call_function", target=torch.mm)) == 1
    assert {name for name, _ in gm.named_parameters()} == {"weight", "a", "b"}


def test_an_exported_graph_keeps_its_shapes_and_compiles() -> None:
    x = torch.randn(5, 4)
    gm = torch.export.export(nn.Sequential(nn.Linear(4, 3)), (x,)).module()
    assert isinstance(gm, fx.GraphModule)
    left, right = factors(3, 4)

    run(gm, [FactorWeights((FactoredWeight("0", left, right, 5.0, 2.0),))])

    assert "sin: f32[3, 4] = torch.sin(mm)" in graph_text(gm)
    compiled = torch.compile(gm, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), gm(x), rtol=0, atol=0)


def test_no_weights_change_nothing() -> None:
    gm = fx.symbolic_trace(nn.Sequential(nn.Linear(4, 3)))
    assert run(gm, [FactorWeights(())]).steps[0].changes == 0
