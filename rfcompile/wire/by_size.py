"""A collective that chooses at run time: exact below a size, quantized from there on.

Where a graph serves every size (a server decodes one token or reads a long prompt with the same
code), a size that is compared while compiling decides nothing. ``rfcompile::by_size`` compares the
size of each call. Below ``min_bytes`` it calls the operator that stood there before, so a small
message is what it was, bit for bit, and takes as long. All ranks must send the same size, as they
must in the collectives themselves.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from rfcompile.codec.operators import LIBRARY
from rfcompile.wire.exchanges import all_gather_wire, all_reduce_wire, reduce_scatter_wire


def along_dim(
    x: Tensor,
    kind: str,
    fmt: str,
    op: str,
    world: int,
    group: str,
    dim: int = 0,
    segments: int = 0,
    site: str = "a collective",
) -> Tensor:
    """The quantized collective of this kind; a reduce_scatter or all_gather along ``dim``."""
    if kind == "all_reduce":
        return all_reduce_wire(x, fmt, op, world, group, segments, site)
    rows = x.movedim(dim, 0).contiguous() if dim else x
    if kind == "all_gather":
        result = all_gather_wire(rows, fmt, world, group, site)
    else:
        result = reduce_scatter_wire(rows, fmt, op, world, group, site)
    return result.movedim(0, dim).contiguous() if dim else result


def shape_of_result(
    kind: str, shape: Sequence[int | torch.SymInt], dim: int, world: int
) -> list[int | torch.SymInt]:
    """Of a collective of this kind along ``dim``, from the shape of what is sent."""
    result = list(shape)
    if kind == "all_gather":
        result[dim] = result[dim] * world
    if kind == "reduce_scatter":
        result[dim] = result[dim] // world
    return result


def call_as_text(op: OpOverload[..., Any], sent: str, others: Mapping[str, Any]) -> str:
    """What ``by_size`` takes as ``exact``: a call of ``op`` with the tensor as its argument
    ``sent``; "" where one of the ``others`` cannot be written as text.
    """
    try:
        return json.dumps([str(op), sent, dict(others)], sort_keys=True)
    except TypeError:
        return ""


def _exactly(x: Tensor, exact: str) -> Tensor:
    """Call the operator that stood there; one that writes into its input gets a copy."""
    name, sent, constants = json.loads(exact)
    namespace, packet, overload = name.split(".")
    op: OpOverload[..., Any] = getattr(getattr(getattr(torch.ops, namespace), packet), overload)
    if not op._schema.is_mutable:
        result: Tensor = op(**{sent: x}, **constants)
        return result.contiguous()  # as the fake kernel promises
    copy = x.clone(memory_format=torch.contiguous_format)
    op(**{sent: copy}, **constants)
    return copy


def _by_size(
    x: Tensor,
    kind: str,
    format: str,
    op: str,
    world: int,
    group: str,
    dim: int,
    segments: int,
    min_bytes: int,
    exact: str,
    site: str,
) -> Tensor:
    if x.numel() * x.element_size() < min_bytes or x.numel() == 0:
        return _exactly(x, exact)
    return along_dim(x, kind, format, op, world, group, dim, segments, site)


def _fake(x: Tensor, kind: str, format: str, op: str, world: int, *rest: Any) -> Tensor:
    _, dim, *_ = rest
    return x.new_empty(shape_of_result(kind, x.shape, dim, world))


LIBRARY.define(
    "by_size(Tensor x, str kind, str format, str op, int world, str group, int dim, "
    "int segments, int min_bytes, str exact, str site) -> Tensor"
)
LIBRARY.impl("by_size", _by_size, "CompositeExplicitAutograd")
LIBRARY.impl("by_size", _fake, "Meta")
by_size: OpOverload[..., Tensor] = torch.ops.rfcompile.by_size.default
"""``by_size(x, kind, format, op, world, group, dim, segments, min_bytes, exact, site)``: see the
module."""
