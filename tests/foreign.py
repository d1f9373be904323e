"""Collectives of other libraries: operators with the schemas that vLLM and SGLang define.

``GROUPS`` maps their names of groups to process groups, as those libraries do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.library import infer_schema

import rfcompile as rf

GROUPS: dict[str, Any] = {}
CALLS: list[str] = []
"""Operators that ran here, by name."""


def group_of(name: str) -> Any:
    return GROUPS[name]


def all_reduce(tensor: Tensor, group_name: str) -> Tensor:
    CALLS.append("all_reduce")
    total = tensor.clone()
    dist.all_reduce(total, group=GROUPS[group_name])
    return total


def all_gather(tensor: Tensor, dim: int, world_size: int, group_name: str) -> Tensor:
    CALLS.append("all_gather")
    parts = [torch.empty_like(tensor) for _ in range(world_size)]
    dist.all_gather(parts, tensor.contiguous(), group=GROUPS[group_name])
    return torch.cat(parts, dim)


def reduce_scatter(tensor: Tensor, dim: int, world_size: int, group_name: str) -> Tensor:
    CALLS.append("reduce_scatter")
    total = tensor.clone()
    dist.all_reduce(total, group=GROUPS[group_name])
    return total.chunk(world_size, dim)[dist.get_rank(GROUPS[group_name])].clone()


def inplace_all_reduce(tensor: Tensor, group_name: str) -> None:
    CALLS.append("inplace_all_reduce")
    dist.all_reduce(tensor, group=GROUPS[group_name])


def outplace_all_reduce(tensor: Tensor, group_name: str, method: str) -> Tensor:
    CALLS.append("outplace_all_reduce")
    total = tensor.clone()
    dist.all_reduce(total, group=GROUPS[group_name])
    return total


def gathered_shape(tensor: Tensor, dim: int, world_size: int, group_name: str) -> Tensor:
    shape = list(tensor.shape)
    shape[dim] *= world_size
    return tensor.new_empty(shape)


def scattered_shape(tensor: Tensor, dim: int, world_size: int, group_name: str) -> Tensor:
    shape = list(tensor.shape)
    shape[dim] //= world_size
    return tensor.new_empty(shape)


def same_shape(tensor: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(tensor)


def define(
    library: torch.library.Library,
    function: Callable[..., Any],
    fake: Callable[..., Any],
    mutates: tuple[str, ...] = (),
) -> None:
    name = function.__name__
    library.define(name + infer_schema(function, mutates_args=mutates))
    library.impl(name, function, "CompositeExplicitAutograd" if not mutates else "CPU")
    library._register_fake(name, fake)


LIKE_VLLM = torch.library.Library("like_vllm", "FRAGMENT")
LIKE_SGLANG = torch.library.Library("like_sglang", "FRAGMENT")
define(LIKE_VLLM, all_reduce, same_shape)
define(LIKE_VLLM, all_gather, gathered_shape)
define(LIKE_VLLM, reduce_scatter, scattered_shape)
define(LIKE_SGLANG, inplace_all_reduce, lambda tensor, group_name: None, ("tensor",))
define(LIKE_SGLANG, outplace_all_reduce, same_shape)
vllm, sglang = torch.ops.like_vllm, torch.ops.like_sglang


def register() -> None:
    """As a user does it."""
    shared: dict[str, Any] = {"group": "group_name", "process_group": group_of}
    rf.register_collective("like_vllm::all_reduce", kind="all_reduce", **shared)
    rf.register_collective(vllm.all_gather, kind="all_gather", dim="dim", **shared)
    rf.register_collective(vllm.reduce_scatter, kind="reduce_scatter", dim="dim", **shared)
    rf.register_collective(sglang.inplace_all_reduce, kind="all_reduce", mutates="tensor", **shared)
    rf.register_collective(
        sglang.outplace_all_reduce,
        kind="all_reduce",
        group=1,
        reduce="sum",
        process_group=group_of,
    )
