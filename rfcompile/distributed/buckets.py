"""Decides which parameters of a flat buffer travel together, and in which format.

DDP and FSDP lay the values of several parameters side by side and send them at once: DDP gradients,
``[elements]``, FSDP shards of weights, ``[elements]``, and of gradients, ``[ranks, elements]``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rfcompile.codec.formats import QuantFormat
from rfcompile.errors import HookError
from rfcompile.report.report import Site
from rfcompile.wire.cost import sent_bytes
from rfcompile.wire.exchanges import all_reduce_sent_bytes, default_segments
from rfcompile.wire.policy import Decision, Policy, exact


@dataclass(frozen=True)
class Span:
    """A parameter's place in the buffer: ``buffer[..., start : start + size]``."""

    name: str
    start: int
    size: int


@dataclass(frozen=True)
class Part:
    """Parameters of a buffer that one collective carries.

    Args:
        spans: their places, in the order of the buffer; none is empty.
        decision: how they travel.
    """

    spans: tuple[Span, ...]
    decision: Decision

    @property
    def format(self) -> QuantFormat | None:
        """How they travel; None: exactly."""
        return self.decision.format

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(span.name for span in self.spans)

    @property
    def size(self) -> int:
        return sum(span.size for span in self.spans)

    def site(
        self,
        collective: str,
        size: int,
        sent: tuple[int | None, int | None],
        *,
        kind: str,
        source: str,
        dtype: torch.dtype,
        group: str,
        world: int,
        direction: str = "backward",
    ) -> Site:
        """Its line in a report: a ``collective`` of ``size`` elements, bytes ``sent`` exactly and
        in its format."""
        first, last = self.names[0], self.names[-1]
        return Site.of(
            self.decision,
            (size,),
            dtype,
            sent,
            collective=collective,
            direction=direction,
            kind=kind,
            module=first if len(self.spans) == 1 else f"{first} ... {last}",
            source=source,
            group=group,
            world_size=world,
        )

    def pieces(self, values: Tensor) -> list[Tensor]:
        """A view for each parameter of ``values`` ``[size]``, which :meth:`gather` returned."""
        return list(values.split([span.size for span in self.spans]))

    def gather(self, buffer: Tensor) -> Tensor:
        """Its values side by side ``[..., size]``: a view of the buffer where they are so there."""
        views = self._views(buffer)
        return views[0] if len(views) == 1 else torch.cat(views, -1)

    def scatter(self, values: Tensor, buffer: Tensor) -> None:
        """Write ``values`` ``[..., size]`` of any dtype to their places."""
        views = self._views(buffer)
        pieces = values.split([view.shape[-1] for view in views], -1)
        for view, new in zip(views, pieces, strict=True):
            if view.data_ptr() != new.data_ptr():
                view.copy_(new)

    def _views(self, buffer: Tensor) -> list[Tensor]:
        runs: list[list[int]] = []
        for span in self.spans:
            if runs and runs[-1][1] == span.start:
                runs[-1][1] += span.size
            else:
                runs.append([span.start, span.start + span.size])
        return [buffer.narrow(-1, start, end - start) for start, end in runs]


def elements_of(parameter: Tensor) -> int:
    """What a parameter takes of DDP's buffers: two real numbers for a complex one."""
    return parameter.numel() * (2 if parameter.is_complex() else 1)


def parts_of(
    policy: Policy,
    sizes: Sequence[tuple[str, int]],
    buffer: Tensor,
    world: int,
    kind: str = "gradients",
    unit: str = "",
    what: str = "a buffer",
) -> tuple[Part, ...]:
    """Group the parameters of a buffer by the format that the policy gives their values.

    A pattern of ``policy.sites`` is compared with a parameter's name, then with the path of its
    module, then with ``unit``. ``min_bytes`` counts the bytes in this buffer of all parameters that
    no pattern names.

    Args:
        sizes: name and number of elements of each parameter, in the order of the buffer.
        buffer: ``[..., sum of sizes]``, or sparse.
        world: ranks of the collective.
        kind: of the traffic, as in Policy.
        unit: path of the module that the buffer belongs to, "" for none.
        what: the buffer is, for an error.

    Raises:
        HookError: the sizes do not add up to the buffer, a part of which would not be sent.
    """
    _require_cover(sizes, buffer, what)
    spans, start = [], 0
    for name, size in sizes:
        spans.append(Span(name, start, size))
        start += size
    spans = [span for span in spans if span.size]
    paths = {span.name: path_of(policy, span.name, unit) for span in spans}
    unnamed = [span for span in spans if policy.override_for(paths[span.name]) is None]
    rows = buffer.shape[:-1].numel()
    unnamed_bytes = rows * sum(span.size for span in unnamed) * buffer.element_size()

    groups: dict[QuantFormat | None, list[tuple[Span, Decision]]] = {}
    for span in spans:
        path = paths[span.name]
        decision = policy.decide(kind, path, unnamed_bytes, dtype=buffer.dtype, world=world)
        if buffer.layout != torch.strided:
            decision = exact("dtype", "sparse gradients are not quantized")
        groups.setdefault(decision.format, []).append((span, decision))
    return tuple(
        Part(tuple(span for span, _ in members), joined(decision for _, decision in members))
        for members in groups.values()
    )


def joined(decisions: Iterable[Decision]) -> Decision:
    """One decision for tensors of one format: the rule of an eligible one, and all reasons."""
    found = list(dict.fromkeys(decisions))
    first = next((decision for decision in found if decision.eligible), found[0])
    reasons = dict.fromkeys(decision.reason for decision in found if decision.reason)
    return replace(first, reason="; ".join(reasons))


def _require_cover(sizes: Sequence[tuple[str, int]], buffer: Tensor, what: str) -> None:
    total = sum(size for _, size in sizes)
    held = buffer.numel() if buffer.layout != torch.strided else buffer.shape[-1]
    if total != held:
        names = ", ".join(name for name, _ in sizes[:3]) + (", ..." if len(sizes) > 3 else "")
        raise HookError(
            what,
            f"it holds {held} elements, its parameters ({names}) have {total}: what is left over "
            "would not be sent. Average these gradients exactly, without this hook, and report it.",
        )


def path_of(policy: Policy, name: str, unit: str = "") -> str:
    """The first of a parameter's names that a pattern of ``sites`` matches."""
    module = name.rpartition(".")[0]
    named = (path for path in (name, module, unit) if policy.override_for(path) is not None)
    return next(named, module)


def site_of(
    part: Part,
    index: int,
    dtype: torch.dtype,
    group: str,
    world: int,
    device: torch.device,
    *,
    segments: int = 0,
    is_sparse: bool = False,
) -> Site:
    """The line of a report on a part of DDP's bucket ``index``."""
    before = None  # what is sparse has no size before it is there
    if not is_sparse:
        before = sent_bytes("all_reduce", part.size * dtype.itemsize, world)
    after = before
    if part.format is not None:
        segments = segments or default_segments(part.size, part.format, device)
        after = all_reduce_sent_bytes(part.size, part.format, world, segments)
    return part.site(
        "all_reduce", part.size, (before, after), kind="gradients", source=f"bucket {index}",
        dtype=dtype, group=group, world=world,
    )  # fmt: skip
