"""The ways from a model to a graph that users take: torch.export, Dynamo, AOTAutograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn
from torch._dynamo.backends.common import aot_autograd

from rfcompile.graph.capture import capture


def export(model: nn.Module, kwargs: dict[str, Any], dynamic: bool = False) -> fx.GraphModule:
    """Aten operators, parameters as placeholders; not functional: ``add_`` stays."""
    if not dynamic:
        return capture(model, kwargs)
    auto = torch.export.Dim.AUTO
    shapes = {name: dict.fromkeys(range(value.dim()), auto) for name, value in kwargs.items()}
    program = torch.export.export(model, (), kwargs, dynamic_shapes=shapes, strict=False)
    graph: fx.GraphModule = program.graph_module
    return graph


def compiled(
    model: nn.Module, kwargs: dict[str, Any], dynamic: bool = False
) -> tuple[fx.GraphModule, fx.GraphModule]:
    """Dynamo's graph: torch functions, methods and Python operators, as the user wrote them. And
    AOTAutograd's forward graph: functional aten operators, some of them decomposed.
    """
    last: dict[str, fx.GraphModule] = {}  # Dynamo may start anew when a number becomes a constant

    def keep(gm: fx.GraphModule, _: Any) -> fx.GraphModule:
        last["aot"] = gm
        return gm

    def backend(gm: fx.GraphModule, inputs: Any) -> Any:
        last["dynamo"] = gm
        return aot_autograd(fw_compiler=keep, bw_compiler=lambda backward, _: backward)(gm, inputs)

    torch._dynamo.reset()
    torch.compile(model, backend=backend, fullgraph=True, dynamic=dynamic)(**kwargs)
    return last["dynamo"], last["aot"]


def graphs(
    model: nn.Module, kwargs: dict[str, Any], dynamic: bool = False
) -> dict[str, fx.GraphModule]:
    """The graph of every route, by name."""
    of_dynamo, of_aot = compiled(model, kwargs, dynamic)
    return {"export": export(model, kwargs, dynamic), "dynamo": of_dynamo, "aot": of_aot}
