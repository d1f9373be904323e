"""Computes the attention matrices of any model on example inputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from rfcompile.find.attention_cores import Core, cores_of
from rfcompile.graph.capture import Inputs, Interpreter, buffers_kept, copied, flat_graph, in_mode
from rfcompile.passes.replace_softmax import ReplacedAttention


@dataclass(frozen=True)
class AttentionMatrix:
    """One attention of a model: its module's path, "softmax" or "polynomial", how it is spelled
    in the graph, its weights ``[.., queries, keys]`` in float32, and its line.
    """

    module: str
    kind: str
    spelling: str
    weights: Tensor
    source: str = ""

    @property
    def frobenius(self) -> float:
        """Frobenius norm, the mean over batch and heads."""
        norms = torch.linalg.matrix_norm(self.weights)
        return float(norms.double().mean())


def attention_matrices(model: nn.Module, inputs: Inputs) -> tuple[AttentionMatrix, ...]:
    """Those of ``model`` in eval mode, in order of use; it stays as it is.

    Raises:
        CaptureError: it cannot be captured.
    """
    with torch.no_grad(), in_mode(model, training=False), buffers_kept(model):
        module = flat_graph(model, inputs)
        run = Interpreter(module)
        run.run(*pytree.tree_leaves(copied(inputs)), enable_io_processing=False)
        return tuple(_matrices(module.graph, run.env))


def _matrices(graph: fx.Graph, values: Mapping[fx.Node, Any]) -> Iterator[AttentionMatrix]:
    for core in cores_of(graph):
        matrix = matrix_of(core, values)
        found = ReplacedAttention.of(core)
        yield AttentionMatrix(found.module, core.kind, found.spelling, matrix, found.source)


def matrix_of(core: Core, values: Mapping[fx.Node, Any]) -> Tensor:
    """The weights of an attention: of a fused one, its result for the values of one key each."""
    node: Any = core.weights
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
    if core.is_fused:
        value = values[core.value]
        each = torch.eye(value.shape[-2], dtype=value.dtype, device=value.device)
        each = each.expand(*value.shape[:-1], -1)
        if len(args) > 2:
            args = (*args[:2], each, *args[3:])
        else:
            kwargs = {**kwargs, "value": each}
    weights: Tensor = node.target(*args, **kwargs)
    return weights.float()
