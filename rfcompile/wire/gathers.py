"""An all_gather of payloads that gloo survives, in and outside graphs.

gloo runs collectives in two threads. Each, when it has ended one, writes the name of its kind into
a string of the process group without a lock. Short names fit into the string itself. The name
``ALLGATHER_COALESCED`` does not: two threads free its memory twice, and the process dies with
``malloc(): unaligned tcache chunk`` (``ProcessGroupGloo::runLoop`` of torch 2.13; found with the
address sanitizer). torch's ``_c10d_functional.all_gather_into_tensor`` has this name on gloo; its
form with ``out=`` has the name ``ALLGATHER``.

Graphs hold torch's functional operator, which passes and torch know. Inductor lowers it, where
it gathers payloads on a CPU, to :data:`gather_payloads` (``inductor/lowering.py``).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor

from rfcompile.codec.operators import LIBRARY

c10d = torch.ops._c10d_functional


def start_gather(x: Tensor, world: int, group: str) -> Tensor:
    """Start to gather ``x`` of all ranks along dim 0, for ``wait_tensor``; works in traces too."""
    is_safe = x.device.type != "cpu" or isinstance(x, FakeTensor)
    started: Tensor = (c10d.all_gather_into_tensor if is_safe else _gather)(x, world, group)
    return started


def _gather(x: Tensor, world: int, group: str) -> Tensor:
    out = _empty(x, world, group)
    started: Tensor = c10d.all_gather_into_tensor_out(x, world, group, out=out)
    return started


def _empty(x: Tensor, world: int, group: str) -> Tensor:
    return x.new_empty((world * x.shape[0], *x.shape[1:]))


LIBRARY.define("gather_payloads(Tensor x, int world, str group) -> Tensor")
LIBRARY.impl("gather_payloads", _gather, "CompositeExplicitAutograd")
LIBRARY.impl("gather_payloads", _empty, "Meta")
gather_payloads: OpOverload[..., Tensor] = torch.ops.rfcompile.gather_payloads.default
"""``_c10d_functional.all_gather_into_tensor`` by its form with ``out=``."""
