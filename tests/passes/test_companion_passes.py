"""The fx passes of the companions: exact text, near misses kept, nothing twice, nn.Softmax too."""

from __future__ import annotations

from textwrap import dedent

import pytest
import torch
from torch import Tensor, fx, nn

from rfcompile.errors import GrayingError
from rfcompile.graph.text import graph_text
from rfcompile.passes.gray_tokens import GrayTokens
from rfcompile.passes.replace_softmax import ReplacedAttention, ReplaceSoftmax


class Written(nn.Module):
    """An attention, written out, and a router's softmax, which is none."""

    def __init__(self) -> None:
        super().__init__()
        self.softmax, self.router = nn.Softmax(-1), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.softmax(x @ x.mT) @ x
        return y * self.router(y).softmax(-1)[..., :1]


X = torch.randn(2, 5, 4)


def test_a_softmax_between_products_is_replaced_and_another_is_kept() -> None:
    graph = torch.export.export(Written(), (X,)).module()
    expected = graph(X)
    result = ReplaceSoftmax(2, "sequence")(graph)
    graph.recompile()
    text = graph_text(graph)
    assert result.changes == 1
    assert "rfcompile.polynomial_weights.default(matmul, 2, 'sequence', None, None)" in text
    assert text.count("aten.softmax.int") == 1
    assert not torch.allclose(graph(X), expected)
    [fact] = result.facts
    assert isinstance(fact, ReplacedAttention)
    assert (fact.module, fact.spelling) == ("softmax", "aten.softmax.int")
    assert ReplaceSoftmax(2, "sequence")(graph).changes == 0


def test_a_fused_attention_keeps_its_arguments() -> None:
    class Fused(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True, scale=0.5)

    graph = torch.export.export(Fused(), (X,)).module()
    ReplaceSoftmax(3, "learned")(graph)
    graph.recompile()
    assert (
        "polynomial_attention: f32[2, 5, 4] = rfcompile.polynomial_attention.default(x, x, x, None,"
        " 0.0, True, scale=0.5, power=3, rows='learned', gain=attention_gain_0, form='auto')"
    ) in graph_text(graph)
    assert dict(graph.named_parameters())["attention_gain_0"].tolist() == [1.0]
    graph(X.requires_grad_()).sum().backward()
    assert graph.attention_gain_0.grad is not None


def test_symbolic_traces_are_read_too() -> None:
    graph = fx.symbolic_trace(Written())
    assert ReplaceSoftmax()(graph).changes == 1
    graph.recompile()
    assert graph(X).shape == X.shape


def test_graying_needs_names_and_shapes() -> None:
    graph = fx.symbolic_trace(Written())
    with pytest.raises(GrayingError, match="the graph needs shapes and the modules' names"):
        GrayTokens()(graph)


def test_the_first_read_of_a_block_is_grayed() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Written() for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x + 1)
            return x

    graph = torch.export.export(Net(), (X,)).module()
    assert GrayTokens("svd", 0.5)(graph).changes == 1
    lines = [line for line in graph_text(graph).splitlines() if "gray_tokens" in line]
    assert "\n".join(lines) == dedent("""\
        gray_tokens: f32[2, 5, 4] = rfcompile.gray_tokens.default(add, None, 0.5, 'svd')
        mT: f32[2, 4, 5] = aten.mT.default(gray_tokens)
        matmul: f32[2, 5, 5] = aten.matmul.default(gray_tokens, mT)
        matmul_1: f32[2, 5, 4] = aten.matmul.default(softmax, gray_tokens)""")
