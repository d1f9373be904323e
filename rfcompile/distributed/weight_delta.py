"""Weight differences for FSDP2: sends what changed since the last gather of weights.

Let ``w`` be the shard of a rank, ``c`` the values that all ranks decoded for this shard so far, and
``C`` the round trip of the codec. The rank sends ``C(w - c)``. Every rank, this one too,
continues with ``c' = c + C(w - c)``. The error of ``c'`` is the error of coding one difference. The
difference is small, because a step changes weights little. The next difference contains the error.

The price is memory: every rank keeps ``c`` of all shards, which is the size of the full weights in
the dtype of the gather. Gradients and optimizer state are still divided among the ranks, but the
weights are not. The backward pass uses the copy ``c`` and gathers nothing.

Source of the idea: SDP4Bit (arXiv 2410.15526).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rfcompile.codec.formats import QuantFormat
from rfcompile.torch_versions import all_gather_single
from rfcompile.wire.cost import sent_bytes
from rfcompile.wire.exchanges import all_gather_sent_bytes, finish_all_gather, start_all_gather


class WeightDelta:
    """The copy of some weights that all ranks of a process group have.

    Before each gather ranks compare how many differences their copies hold: 8 bytes a rank. If
    they do not all have one of the same age (at first, after :meth:`reset` on any of them, after an
    error), the weights are sent exactly and all ranks start from these. So do they after a gather
    of NaN or Inf, which no difference could repair.
    """

    def __init__(self) -> None:
        self._copy: Tensor | None = None
        self._age = 0

    def reset(self) -> None:
        """Start anew with the next gather of a forward pass; one rank is enough."""
        self._age = 0

    def start(self, x: Tensor, fmt: str, group: Any, site: str) -> Callable[[], Tensor]:
        """Send the shard ``x`` ``[m]``; a function that waits and returns the copy ``[W, m]``."""
        copy, self._copy = self._copy, None  # it comes back when all went well
        ages = torch.empty(group.size(), dtype=torch.int64, device=x.device)
        mine = ages.new_full((1,), 0 if copy is None else self._age)
        all_gather_single(ages, mine, group=group)
        age, *others = ages.tolist()
        if copy is None or age == 0 or any(other != age for other in others):
            return self._start_exactly(x, group)
        difference = x.float() - copy[group.rank()].float()
        world, name = group.size(), group.group_name
        sent = start_all_gather(difference, fmt, world, name, site)

        def finish() -> Tensor:
            decoded = finish_all_gather(sent, fmt, torch.float32, x.numel())
            return self._keep((copy.float() + decoded).to(x.dtype), age + 1)

        return finish

    def _start_exactly(self, x: Tensor, group: Any) -> Callable[[], Tensor]:
        rows = x.new_empty(group.size() * x.numel())
        work = all_gather_single(rows, x, group=group, async_op=True)

        def finish() -> Tensor:
            work.wait()
            return self._keep(rows.view(group.size(), -1), 1)

        return finish

    def _keep(self, copy: Tensor, age: int) -> Tensor:
        self._copy = copy if bool(copy.isfinite().all()) else None
        self._age = age
        return copy

    @property
    def copy(self) -> Tensor | None:
        """``[W, m]`` of the last gather, None if there is none to go on from."""
        return self._copy


def delta_sent_bytes(size: int, fmt: QuantFormat, world: int) -> int:
    """Bytes one rank sends for a difference of ``size`` elements."""
    return all_gather_sent_bytes(size, fmt, world) + sent_bytes("all_gather", 8, world)
