"""A module and the graph that torch.export makes of it get the same rows in their reports."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rfcompile as rf
from rfcompile.errors import OptionError
from rfcompile.rewrites.residual.report import ResidualReport
from tests.rewrites.models import WIDTH, made
from tests.rewrites.models import tokens as ids
from tests.zoo import NanoGPT, tokens


def reports(model: nn.Module, how: Any, args: Any = (), kwargs: Any = None) -> list[Any]:
    graph = torch.export.export(model, args, kwargs).module()
    inputs = (args, kwargs or {})
    return [
        rf.rewrites_of(rf.transform(route, how, example_inputs=inputs))[-1]
        for route in (model, graph)
    ]


class Einsum(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            scores = torch.einsum("bqd,bkd->bqk", x, x)
            return torch.einsum("bqk,bkd->bqd", scores.softmax(-1), x)


class Mixed(nn.Module):
    """Layers of torch, an attention by einsum in a region, and a head whose path has numbers."""

    def __init__(self) -> None:
        super().__init__()
        layers = [nn.TransformerEncoderLayer(WIDTH, 2, 32, 0.0, batch_first=True) for _ in "ab"]
        self.blocks, self.mix = nn.ModuleList(layers), Einsum()
        self.heads = nn.ModuleList([nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU())])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.heads[0](self.mix(x))


X = torch.randn(2, 5, WIDTH)


@pytest.mark.slow
def test_polynomial_attention_has_the_same_rows() -> None:
    for model, args, kwargs in ((NanoGPT().eval(), (), tokens()), (Mixed().eval(), (X,), None)):
        module, graph = reports(model, rf.experimental.PolynomialAttention(), args, kwargs)
        assert module.attentions == graph.attentions
        assert len(module.attentions) > 1


@pytest.mark.slow
def test_an_attention_by_einsum_becomes_polynomial_on_both_routes() -> None:
    # float64: the power makes float32 sums in another order visible
    model, x = Mixed().double().eval(), X.double()
    graph: Any = torch.export.export(model, (x,)).module()
    new = [
        rf.transform(m, rf.experimental.PolynomialAttention(), example_inputs=(x,))
        for m in (model, graph)
    ]
    torch.testing.assert_close(new[0](x), new[1](x))
    assert not torch.allclose(new[0](x), model(x))


@pytest.mark.parametrize("how", [rf.LowRank(2, fit_steps=2), rf.Adapters(2)], ids=str)
def test_low_rank_and_adapters_have_the_same_rows(how: Any) -> None:
    module, graph = reports(made(), how, (ids(),))
    assert module.sites == graph.sites
    assert module.left == graph.left == ()


def test_matrices_left_are_the_same() -> None:
    module, graph = reports(Mixed().eval(), rf.LowRank(2, start="fresh"), (X,))
    assert [site.path for site in module.sites] == [site.path for site in graph.sites]
    assert module.left == graph.left
    assert "blocks.0.self_attn.in_proj_weight" in module.left
    assert not any(site.path.startswith("heads") for site in graph.sites)


def test_both_refuse_a_model_without_blocks_and_one_with_adapters() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    graph: Any = torch.export.export(model, (torch.ones(2, 4),)).module()
    for route in (model, graph):
        with pytest.raises(OptionError, match="has no repeated blocks: name them"):
            rf.transform(route, rf.LowRank(2))
    whole: Any = torch.export.export(made(), (ids(),)).module()
    for route in (whole, made()):
        with pytest.raises(OptionError, match="it has adapters: merge them first"):
            rf.transform(rf.transform(route, rf.Adapters(2)), rf.Adapters(2))


def test_residual_adds_have_the_same_rows() -> None:
    found = []
    for report in reports(NanoGPT().eval(), rf.ResidualFree("anneal"), (), tokens()):
        assert isinstance(report, ResidualReport)
        found.append([replace(site.add, node="") for site in report.sites])
    assert found[0] == found[1]
    assert len(found[0]) == 4


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # torch's own copying
def test_a_graph_keeps_the_reports_of_all_its_rewrites() -> None:
    graph: Any = torch.export.export(made(), (ids(),)).module()
    once = rf.transform(graph, rf.Adapters(2, modules="up"), rf.Wire(4), example_inputs=(ids(),))
    twice = copy.deepcopy(rf.transform(once, rf.LowRank(2, fit_steps=0, modules="down")))
    names = [[type(r).__name__ for r in rf.rewrites_of(gm)] for gm in (graph, once, twice)]
    assert names == [[], ["AdapterReport"], ["AdapterReport", "LowRankReport"]]
