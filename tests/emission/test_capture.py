"""The graphs that the backend hands to Inductor: all of them, and moved to a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed._functional_collectives as fc
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from rfcompile.emission.capture import capture
from rfcompile.emission.retarget import retarget
from rfcompile.errors import EmissionError
from rfcompile.wire.process_groups import simulated


class Reducing(nn.Module):
    """One all-reduce before a graph break, and a matrix after it."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(2**20))
        self.register_buffer("table", torch.arange(3.0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = fc.all_reduce(x * self.scale, "sum", "0")
        torch._dynamo.graph_break()
        return x.sin() + torch.tensor([1.0, 2.0, 3.0, 4.0]).sum()


def nodes(gm: fx.GraphModule, name: str) -> list[fx.Node]:
    return [node for node in gm.graph.nodes if name in str(node.target)]


def test_both_sides_of_a_graph_break_and_the_backward_pass_are_captured() -> None:
    with simulated(2):
        graphs = capture(Reducing(), (torch.randn(2**20),), {}, {"bits": 4, "min_bytes": 0})
    assert [graph.direction for graph in graphs] == ["forward", "forward", "backward", "backward"]
    assert len(nodes(graphs[0].gm, "rfcompile.quantize")) == 1  # on a CPU there are two segments
    assert graphs[0].place.startswith("tests/emission/test_capture.py:")
    assert not any(graph.is_inference for graph in graphs)


def test_a_model_without_parameters_has_an_inference_graph() -> None:
    (graph,) = capture(nn.GELU(), (torch.randn(8),), {}, {"bits": 4})
    assert graph.is_inference


def traced(body: Callable[..., Any], given: Tensor, **mode: Any) -> fx.GraphModule:
    with FakeTensorMode(allow_non_fake_inputs=True, **mode) as fakes:
        return make_fx(body)(fakes.from_tensor(given))


def test_tensors_devices_and_constants_are_moved() -> None:
    table = torch.tensor([1.0, 2.0, 3.0])

    def body(x: Tensor) -> tuple[Tensor]:
        return (x + table + torch.tensor(7.0) + torch.ones(3, device="cpu"),)

    gm = traced(body, torch.randn(3))
    retarget(gm)
    assert {n.meta["val"].device.type for n in gm.graph.nodes if "val" in n.meta} == {"cuda"}
    assert len(gm.graph.find_nodes(op="placeholder")) == 2
    assert gm.graph.find_nodes(op="get_attr") == []
    assert [node.kwargs["device"].type for node in nodes(gm, "aten.ones")] == ["cuda"]
    (seven,) = (n for n in nodes(gm, "aten.full") if n.args[1] == 7.0)
    assert seven.kwargs["dtype"] == torch.float32


def test_a_size_that_is_not_known_is_refused_by_name() -> None:
    gm = traced(lambda x: (x.cos(),), torch.randn(5), shape_env=ShapeEnv())
    with pytest.raises(EmissionError, match=r"has no kernels without a GPU: the shape \(s\d+,\)"):
        retarget(gm)
