"""The quantized all-gather and reduce-scatter that FSDP2 calls instead of its own.

The parameters of a unit lie side by side in a flat buffer. Parameters of one format travel together
(see ``buckets.py``). Parameters that stay exact use the communication that the unit had before.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rfcompile.distributed.buckets import Part, Span, joined, parts_of
from rfcompile.distributed.fsdp_units import AllGather, ReduceScatter, Unit
from rfcompile.distributed.weight_delta import WeightDelta, delta_sent_bytes
from rfcompile.errors import RFCompileError, TransportError
from rfcompile.report.report import Site
from rfcompile.wire.cost import sent_bytes
from rfcompile.wire.exchanges import (
    all_gather_sent_bytes,
    finish_all_gather,
    reduce_scatter_sent_bytes,
    reduce_scatter_wire,
    start_all_gather,
)
from rfcompile.wire.policy import Policy, exact

Finish = Callable[[], Tensor]
"""Wait for a collective and decode."""


@dataclass(frozen=True)
class Sent:
    """What a collective of a unit carried when it last ran with a buffer of its size."""

    collective: str
    direction: str
    kind: str
    parts: tuple[Part, ...]
    dtype: torch.dtype
    group: str
    world: int
    delta: bool = False

    def sites(self, unit: Unit) -> tuple[Site, ...]:
        return tuple(self._site(part, unit) for part in self.parts)

    def _site(self, part: Part, unit: Unit) -> Site:
        size = part.size * (self.world if self.collective == "reduce_scatter" else 1)
        before = sent_bytes(self.collective, size * self.dtype.itemsize, self.world)
        after = before if part.format is None else self._bytes_after(part)
        return part.site(
            self.collective, size, (before, after), kind=self.kind, source=f"unit {unit.label}",
            dtype=self.dtype, group=self.group, world=self.world, direction=self.direction,
        )  # fmt: skip

    def _bytes_after(self, part: Part) -> int:
        assert part.format is not None
        if self.collective == "reduce_scatter":
            return reduce_scatter_sent_bytes(part.size * self.world, part.format, self.world)
        if not self.delta:
            return all_gather_sent_bytes(part.size, part.format, self.world)
        forward = self.direction == "forward"
        return delta_sent_bytes(part.size, part.format, self.world) if forward else 0


class _Quantized:
    """What both have: the unit, its policy, and the communication that was there before."""

    def __init__(self, inner: Any, unit: Unit, policy: Policy) -> None:
        self.inner = inner
        self.unit = unit
        self.seen: dict[str, Sent] = {}
        self._policy = policy
        self._known: dict[Any, tuple[Part, ...]] = {}

    def allocate(
        self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        buffer: Tensor = self.inner.allocate(size, dtype=dtype, device=device)
        return buffer

    def _parts(self, buffer: Tensor, kind: str, world: int) -> tuple[Part, ...]:
        """The parts of ``buffer`` ``[..., elements of a shard]``, the same on every rank."""
        sizes = self.unit.sizes(trainable=kind == "gradients")
        key = sizes, tuple(buffer.shape), buffer.dtype, world
        if key not in self._known:
            if sum(size for _, size in sizes) == buffer.shape[-1]:
                unit = self.unit.path
                parts = parts_of(self._policy, sizes, buffer, world, kind, unit, self.unit.label)
            else:
                parts = self._unknown([name for name, _ in sizes], buffer, kind, world)
            self._known[key] = parts
        return self._known[key]

    def _unknown(
        self, names: Sequence[str], buffer: Tensor, kind: str, world: int
    ) -> tuple[Part, ...]:
        """All of a buffer that holds others than all parameters of the unit.

        Its format is the one that all of them would have in a buffer of this size: ``min_bytes``
        counts what is sent.
        """
        size = buffer.shape[-1]
        span = Span(f"{self.unit.label} ({kind} of some parameters)", 0, size)
        if buffer.dtype == torch.uint8:
            why = "parameters of several dtypes, or u8 data, which FSDP sends as bytes"
            return (Part((span,), exact("dtype", why)),)
        alone = [
            part
            for name in names
            for part in parts_of(self._policy, [(name, size)], buffer, world, kind, self.unit.path)
        ]
        if alone and len({part.format for part in alone}) == 1:
            return (Part((span,), joined(part.decision for part in alone)),)
        reason = "which parameters it holds is not known (unused or converted ones), formats differ"
        return (Part((span,), exact("out of reach", reason)),)


class QuantizedAllGather(_Quantized, AllGather):
    """Gather a unit's weights: each rank's shard is coded, and every rank decodes all of them."""

    def __init__(self, inner: AllGather, unit: Unit, policy: Policy, weight_delta: bool) -> None:
        super().__init__(inner, unit, policy)
        self._weight_delta = weight_delta
        self._deltas: dict[tuple[str, ...], WeightDelta] = {}

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        async_op: bool = False,
    ) -> dist.Work | None:
        """Fill ``output_tensor`` ``[W m]`` with the ranks' ``input_tensor`` ``[m]``, decoded.

        With ``async_op`` the payloads are on the way when it returns, and ``wait`` of what it
        returns decodes them; without, all is done.
        """
        world = group.size()
        direction = "backward" if self.unit.in_backward else "forward"
        parts = self._parts_to(group, input_tensor)
        self.seen[direction] = Sent(
            "all_gather", direction, "weights", parts, input_tensor.dtype, group.group_name, world,
            self._weight_delta,
        )  # fmt: skip
        site = f"FSDP all-gather of {self.unit.label}"
        with transport(site, group):
            if all(part.format is None for part in parts):
                work = self.inner(output_tensor, input_tensor, group, async_op)
                return None if work is None else Pending(work.wait, site, group)
            sent = [self._start(part, part.gather(input_tensor), group, site) for part in parts]

        def finish() -> None:
            rows = output_tensor.view(world, -1)
            for part, values in zip(parts, sent, strict=True):
                part.scatter(values(), rows)

        pending = Pending(finish, site, group)
        if async_op:
            return pending
        pending.wait()
        return None

    def reset(self) -> None:
        for delta in self._deltas.values():
            delta.reset()

    def _parts_to(self, group: dist.ProcessGroup, shard: Tensor) -> tuple[Part, ...]:
        if group.group_name == self.unit.shard_group.group_name:
            return self._parts(shard, "weights", group.size())
        why = "reshard_after_forward=int: weights that were decoded already, among fewer ranks"
        span = Span(self.unit.label, 0, shard.numel())
        return (Part((span,), exact("not traffic", why)),)

    def _start(self, part: Part, x: Tensor, group: dist.ProcessGroup, site: str) -> Finish:
        """Send a part of this rank's shard; the result will be ``[W, m]``."""
        world, name = group.size(), group.group_name
        if part.format is None:
            rows = self.allocate((world * x.numel(),), dtype=x.dtype, device=x.device)
            work = self.inner(rows, x, group, True)

            def finish() -> Tensor:
                if work is not None:
                    work.wait()
                return rows.view(world, -1)

            return finish
        spec = part.format.spec
        if self._weight_delta:
            delta = self._deltas.setdefault(part.names, WeightDelta())
            copy = delta.copy if self.unit.in_backward else None
            return delta.start(x, spec, group, site) if copy is None else lambda: copy
        sent = start_all_gather(x, spec, world, name, site)
        return lambda: finish_all_gather(sent, spec, x.dtype, x.numel())


class QuantizedReduceScatter(_Quantized, ReduceScatter):
    """Reduce a unit's gradients: what :func:`rfcompile.reduce_scatter` gives, bit for bit."""

    _num_sent = 0

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> dist.Work | None:
        """Reduce ``input_tensor`` ``[W m]`` over ranks into ``output_tensor`` ``[m]``, row r."""
        world = group.size()
        rows = input_tensor.view(world, -1)
        parts = self._parts(rows, "gradients", world)
        dtype, name = input_tensor.dtype, group.group_name
        # A unit whose gradients come at different times sends buffers of several sizes.
        self.seen[f"backward {rows.shape[1]}"] = Sent(
            "reduce_scatter", "backward", "gradients", parts, dtype, name, world
        )
        if self.unit.all_reduces:
            self.seen[f"all_reduce {rows.shape[1]}"] = self._all_reduce(rows)
        site = f"FSDP reduce-scatter of {self.unit.label}"
        reduction = reduction_of(op)
        with transport(site, group):
            if reduction is None or all(part.format is None for part in parts):
                return self.inner(output_tensor, input_tensor, group, op, async_op)  # type: ignore[no-any-return]
            for part in parts:
                x = part.gather(rows).reshape(-1)
                if part.format is None:
                    values = self.allocate((part.size,), dtype=dtype, device=x.device)
                    self.inner(values, x, group, op, False)
                else:
                    values = self._reduced(x, part.format.spec, *reduction, group, site)
                part.scatter(values, output_tensor)
        return None

    def _reduced(
        self, x: Tensor, spec: str, op: str, factor: float, group: dist.ProcessGroup, site: str
    ) -> Tensor:
        world = group.size()
        self._num_sent += 1
        seed = self._num_sent * world + group.rank()  # of stochastic rounding
        name = group.group_name
        values = reduce_scatter_wire(x, spec, op, world, name, site, seed)
        return values if factor == 1 else values * factor

    def _all_reduce(self, rows: Tensor) -> Sent:
        group = self.unit.replicate_group
        span = Span(self.unit.label, 0, rows.shape[1])
        why = "FSDP has no hook that replaces the all-reduce of HSDP"
        part = Part((span,), exact("no place", why))
        name, world = group.group_name, group.size()
        return Sent("all_reduce", "backward", "gradients", (part,), rows.dtype, name, world)


class Pending(dist.Work):
    """A collective that is on its way; ``wait`` finishes it."""

    def __init__(self, finish: Callable[[], object], site: str, group: dist.ProcessGroup) -> None:
        super().__init__()
        self._finish: Callable[[], object] | None = finish
        self._site, self._group = site, group

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:  # that of the group applies
        finish, self._finish = self._finish, None
        if finish is not None:
            with transport(self._site, self._group), torch.no_grad():
                finish()
        return True


def reduction_of(op: Any) -> tuple[str, float] | None:
    """ "sum" or "avg", and the factor for the result; None for other reductions."""
    if op == dist.ReduceOp.AVG:
        return "avg", 1.0
    if op == dist.ReduceOp.SUM:
        return "sum", 1.0
    if op == dist.ReduceOp.PREMUL_SUM:
        factor = op.__getstate__()[1]  # what pickle sees is all that Python can see of it
        return "sum", float(factor)
    return None


@contextlib.contextmanager
def transport(site: str, group: dist.ProcessGroup) -> Iterator[None]:
    """Errors of a process group become TransportError, which says where."""
    try:
        yield
    except (RFCompileError, torch.OutOfMemoryError):
        raise
    except RuntimeError as error:
        reason = f"{type(error).__name__}: {error}"
        raise TransportError(site, group.group_name, reason) from error
