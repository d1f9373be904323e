"""Moves a graph that was captured on a CPU to the GPU that is not there.

Tensors become fake ones on the GPU, devices among the arguments become the GPU, constants become
inputs. What PyTorch computes by another operator on a GPU becomes a call that the GPU has.

Private parts of torch used here, run with 2.13.0:
``_subclasses.fake_tensor.FakeTensorMode``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils import _pytree as pytree

from rfcompile.emission.absent_gpu import DEVICE
from rfcompile.errors import EmissionError
from rfcompile.graph.places import source_of

_STALE = ("eager_input_vals", "tensor_meta", "example_value")
"""Metadata about the tensors on the CPU."""


def retarget(gm: fx.GraphModule) -> tuple[list[FakeTensor], FakeTensorMode]:
    """Move ``gm`` to the GPU, in place; its inputs there, and the mode that made them.

    Raises:
        EmissionError: a size is not known, or a node holds something that cannot be moved.
    """
    mode = FakeTensorMode(shape_env=ShapeEnv(), static_shapes=True)
    for node in list(gm.graph.nodes):
        _move(node, mode)
    for node in gm.graph.find_nodes(op="get_attr"):
        _replace_constant(gm, node, mode)
    gm.graph.lint()
    gm.recompile()
    return [node.meta["val"] for node in gm.graph.find_nodes(op="placeholder")], mode


def _move(node: fx.Node, mode: FakeTensorMode) -> None:
    for name in _STALE:
        node.meta.pop(name, None)
    if "val" in node.meta:
        moved = pytree.tree_map(lambda value: _moved(value, node, mode), node.meta["val"])
        node.meta["val"] = moved
    node.args = pytree.tree_map(_on_gpu, node.args)
    node.kwargs = pytree.tree_map(_on_gpu, node.kwargs)


def _moved(value: Any, node: fx.Node, mode: FakeTensorMode) -> Any:
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        raise EmissionError(str(node.target), source_of(node), f"the size {value} is not a number")
    if not isinstance(value, Tensor):
        return value
    if not all(isinstance(size, int) for size in (*value.shape, *value.stride())):
        raise EmissionError(
            str(node.target), source_of(node), f"the shape {tuple(value.shape)} has no numbers"
        )
    with mode:
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=DEVICE)


def _on_gpu(value: Any) -> Any:
    return DEVICE if isinstance(value, torch.device) and value.type == "cpu" else value


def _replace_constant(gm: fx.GraphModule, node: fx.Node, mode: FakeTensorMode) -> None:
    """A number becomes a call of ``full``, as Inductor writes it into a kernel, others an input."""
    value = gm
    for name in str(node.target).split("."):
        value = getattr(value, name)
    if not isinstance(value, Tensor):
        raise EmissionError(str(node.target), source_of(node), f"it holds a {type(value).__name__}")
    with mode:
        fake = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=DEVICE)
    if value.numel() == 1:
        with gm.graph.inserting_before(node):
            new = gm.graph.call_function(
                torch.ops.aten.full.default,
                (list(value.shape), value.item()),
                {"dtype": value.dtype, "device": DEVICE},
            )
    else:
        last = gm.graph.find_nodes(op="placeholder")
        first = next(iter(gm.graph.nodes))
        inserting = gm.graph.inserting_after(last[-1]) if last else gm.graph.inserting_before(first)
        with inserting:
            new = gm.graph.placeholder(f"constant_{node.name}")
    new.meta = node.meta | {"val": fake}
    node.replace_all_uses_with(new)
    gm.graph.erase_node(node)
