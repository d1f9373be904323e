"""Reads the calls of collectives that are operators of other libraries.

An operator that changes its input in place stands in a functional graph as ``auto_functionalized``:
it takes the operator and its arguments, and returns what the operator returns and what became of
the input. The second form (``auto_functionalized_v2``) has the tensors that are changed in a list
of their own, and may change a part of one.

Private torch symbols used here, tried on torch 2.13: the arguments of
``torch.ops.higher_order.auto_functionalized_v2`` (``_all_bases``, ``_x_base_index``, ``_x_size``,
``_x_slice_dim``).
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from rfcompile.errors import ProcessGroupError
from rfcompile.wire.by_size import call_as_text, shape_of_result
from rfcompile.wire.foreign import ForeignCollective, registered
from rfcompile.wire.process_groups import resolve

_higher_order = torch.ops.higher_order


@dataclass(frozen=True)
class ForeignCall:
    """One call of a registered operator.

    Args:
        node: the call; operator: what it does; arguments: what it was called with, by name.
        sent: the node of the tensor that is sent; result: of what arrived, None where none is.
        theirs: the group as the call names it; group: torch's name of it, or "".
        dim: the dimension that is joined or cut, 0 or more.
        problem: why this call cannot be rewritten, "" if it can.
    """

    node: fx.Node
    operator: ForeignCollective
    arguments: dict[str, Any]
    sent: Any
    result: fx.Node | None
    theirs: Any
    group: str
    dim: int
    problem: str

    def as_text(self) -> str:
        """The call but for the tensor, as ``wire/by_size.py`` repeats it; "" where an argument is
        known only at run time.
        """
        names = {argument.name for argument in self.operator.op._schema.arguments}
        others = {k: v for k, v in self.arguments.items() if k in names - {self.operator.sent}}
        return call_as_text(self.operator.op, self.operator.sent, others)


def called_operator(node: fx.Node) -> ForeignCollective | None:
    """The registered collective that a node calls, functionalized or not; None if it does not."""
    if node.op != "call_function":
        return None
    return registered(node.args[0] if _is_functionalized(node) and node.args else node.target)


def foreign_call(node: fx.Node) -> ForeignCall | None:
    """What a node calls if that is a registered collective, else None."""
    called = called_operator(node)
    if called is None:
        return None
    arguments = called.arguments(() if _is_functionalized(node) else node.args, node.kwargs)
    sent, problem = _sent_of(node, called, arguments)
    theirs = arguments.get(called.group)
    group, why_no_group = _group_of(called, theirs)
    result = _result_of(node, called, arguments)
    dim, why_no_dim = _dim_of(called, arguments, sent)
    problem = problem or why_no_group or why_no_dim
    if not problem and result is None:
        problem = "nothing reads its result"
    call = ForeignCall(node, called, arguments, sent, result, theirs, group, dim, problem)
    return replace(call, problem=problem or _wrong_shape(call))


def _is_functionalized(node: fx.Node) -> bool:
    return node.target in (
        _higher_order.auto_functionalized,
        _higher_order.auto_functionalized_v2,
    )


def _sent_of(
    node: fx.Node, called: ForeignCollective, arguments: dict[str, Any]
) -> tuple[Any, str]:
    name = called.sent
    if node.target is not _higher_order.auto_functionalized_v2:
        in_place = called.mutates is not None and not _is_functionalized(node)
        problem = "it changes its input in place in a graph that is not functional"
        return arguments.get(name), problem if in_place else ""
    base = arguments["_all_bases"][arguments[f"_{name}_base_index"]]
    is_part = any(f"_{name}_{word}" in arguments for word in ("size", "slice_dim"))
    return base, "it changes a view of another tensor in place" if is_part else ""


def _result_of(
    node: fx.Node, called: ForeignCollective, arguments: dict[str, Any]
) -> fx.Node | None:
    """The node itself, or what takes the changed tensor out of what it returns."""
    if not _is_functionalized(node):
        return node if called.mutates is None else None
    place = 1 + int(arguments.get(f"_{called.sent}_base_index") or 0)
    readers = [user for user in node.users if user.target is operator.getitem]
    found = [user for user in readers if user.args[1] == place]
    return found[0] if len(found) == 1 and len(node.users) == 1 else None


def _group_of(called: ForeignCollective, theirs: Any) -> tuple[str, str]:
    if isinstance(theirs, fx.Node):
        return "", f"its group, %{theirs.name}, is known only at run time"
    try:
        group = called.torch_group(theirs)
    except Exception as error:  # of a function of the user's
        return "", f"process_group({theirs!r}) raised {type(error).__name__}: {error}"
    try:
        resolve(group)
    except ProcessGroupError:
        return group, f"process group {group!r} is not known in this process"
    return group, ""


def _dim_of(called: ForeignCollective, arguments: dict[str, Any], sent: Any) -> tuple[int, str]:
    dim = arguments.get(called.dim) if isinstance(called.dim, str) else called.dim
    rank = sent.meta["val"].dim() if isinstance(sent, fx.Node) and "val" in sent.meta else 0
    if called.kind == "all_reduce":
        return 0, ""
    if type(dim) is not int or not -rank <= dim < rank:
        return 0, f"its dimension is {dim}, which no tensor of {rank} dimensions has"
    return dim % rank, ""


def _wrong_shape(call: ForeignCall) -> str:
    """Why what arrives is not what the registered kind gives, or ""."""
    assert call.result is not None
    if not isinstance(call.sent, fx.Node) or "val" not in call.sent.meta:
        return "its graph has no shapes"
    before, after = call.sent.meta["val"], call.result.meta.get("val")
    if after is None:
        return "its graph has no shapes"
    world = resolve(call.group).size()
    wanted = shape_of_result(call.operator.kind, before.shape, call.dim, world)
    is_same = len(wanted) == after.dim() and all(
        statically_known_true(a == b) for a, b in zip(wanted, after.shape, strict=True)
    )
    if is_same and before.dtype == after.dtype:
        return ""
    return (
        f"it returns {after.dtype} of shape {tuple(after.shape)}; {call.operator.kind} over "
        f"{world} ranks gives {before.dtype} of shape {tuple(wanted)}"
    )
