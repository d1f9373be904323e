"""Sends and receives between two ranks as operators that keep the order of the program.

torch's own operators have two problems if the graph itself makes the tensor that is sent. First,
torch registers a send under its tensor and under its handle, but only one of the two is waited for.
The other entry holds the tensor for ever. When the memory of the tensor is used again, a second
wait fails on gloo. Second, nothing keeps the order of the operators. So Inductor may wait for a
send before the receive that the other rank waits for. Here every operator mutates ``order``, a
tensor without meaning. So each operator runs after the one before.

Private torch symbol used here, tried on torch 2.13 to 2.15:
``_C._distributed_c10d._register_work``, what lets ``wait_tensor`` know of a send or a receive.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._ops import OpOverload

from rfcompile.codec.operators import LIBRARY
from rfcompile.wire.process_groups import resolve


def _start(
    order: Tensor,
    sent: Sequence[Tensor],
    received: Sequence[Tensor],
    names: Sequence[str],
    peers: Sequence[int],
    tags: Sequence[int],
    group: str,
    is_batch: bool,
) -> None:
    process_group = resolve(group)
    sources = {"isend": iter(sent), "irecv": iter(received)}
    tensors = [next(sources[name]) for name in names]
    operations = [
        dist.P2POp(getattr(dist, name), tensor, peer, process_group, tag)
        for name, tensor, peer, tag in zip(names, tensors, peers, tags, strict=True)
    ]
    works: list[Any]
    if is_batch:
        works = dist.batch_isend_irecv(operations)
    else:
        works = [op.op(op.tensor, op.peer, op.group, op.tag) for op in operations]
    for index, tensor in enumerate(tensors):
        work = works[min(index, len(works) - 1)]  # NCCL has one for the whole batch
        torch._C._distributed_c10d._register_work(tensor, work)


def _finish(order: Tensor, payload: Tensor) -> None:
    torch.ops._c10d_functional.wait_tensor(payload)


def _nothing(*args: object) -> None:
    return None


LIBRARY.define(
    "start_transfers(Tensor(a!) order, Tensor[] sent, Tensor(b!)[] received, str[] names, "
    "int[] peers, int[] tags, str group, bool is_batch) -> ()"
)
LIBRARY.define("finish_send(Tensor(a!) order, Tensor sent) -> ()")
LIBRARY.define("finish_receive(Tensor(a!) order, Tensor(b!) received) -> ()")
for _name, _kernel in (
    ("start_transfers", _start),
    ("finish_send", _finish),
    ("finish_receive", _finish),
):
    LIBRARY.impl(_name, _kernel, "CompositeExplicitAutograd")
    LIBRARY.impl(_name, _nothing, "Meta")

start_transfers: OpOverload[..., None] = torch.ops.rfcompile.start_transfers.default
"""``isend`` and ``irecv``, as ``names`` say, to and from global ranks ``peers``; ``is_batch``: as
one ``batch_isend_irecv``."""
finish_send: OpOverload[..., None] = torch.ops.rfcompile.finish_send.default
finish_receive: OpOverload[..., None] = torch.ops.rfcompile.finish_receive.default
"""Wait for one of them; before, what is sent must not change and what is received is not there."""
