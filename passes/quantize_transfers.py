"""A pass that makes sends and receives between two ranks carry payloads."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, fx

from rfcompile.codec import operators
from rfcompile.codec.formats import QuantFormat
from rfcompile.errors import CaptureError
from rfcompile.find.axes import bytes_of, has_one_element, is_one
from rfcompile.find.collectives import WAIT, all_nodes
from rfcompile.find.directions import NO_DIRECTION, Directions
from rfcompile.find.origins import Origin
from rfcompile.find.statistics import Statistics
from rfcompile.graph.pipeline import PassResult
from rfcompile.graph.places import module_of, source_of
from rfcompile.graph.splicing import Decompositions, origin_of, splice
from rfcompile.report.report import Site
from rfcompile.torch_versions import global_rank, split_joined_waits
from rfcompile.wire.policy import Decision, Policy, exact
from rfcompile.wire.process_groups import resolve
from rfcompile.wire.transfers import finish_receive, finish_send, start_transfers

aten = torch.ops.aten


@dataclass(frozen=True)
class _Transfer:
    """A tensor that leaves for a rank or comes from one.

    Args:
        node: isend, irecv or batch_p2p_ops; ``number``: its place in a batch.
        tensor: what is sent, or the buffer that is filled.
        handle: what is waited for, None if nobody does.
    """

    node: fx.Node
    number: int | None
    is_send: bool
    tensor: fx.Node
    handle: fx.Node | None

    @property
    def value(self) -> Tensor:
        value: Tensor = self.tensor.meta["val"]
        return value


@dataclass(frozen=True)
class QuantizeTransfers:
    """Send payloads in ``torch.distributed.isend``, ``irecv`` and ``batch_isend_irecv``.

    Dynamo captures them with ``TORCHDYNAMO_ENABLE_P2P_COMPILATION=1`` (torch 2.13 or later). Each
    end has a graph of its own and decides for itself, so both must come to the same decision: the
    format follows from the policy, the direction (forward: activations, backward: gradients), the
    dtype, the size (``min_bytes``; a symbolic one counts as large) and the ``sites`` pattern of the
    module that sends or receives. Every transfer becomes a :class:`~rfcompile.Site`; a "recv" sends
    no bytes.

    A statistic stays exact where both ends see it by the shape: a single element, or one value a
    row (``[..., 1]``). What receives does not know what a tensor was made of, so another statistic
    (``find/statistics.py``) that would be quantized is an error of the end that sends it, until a
    pattern of ``sites`` says on both ends what is meant.

    Rewrites (see ``wire/transfers.py``):
        isend(x, dst); wait_tensor -> payload = quantize(x); start_transfers(payload, dst);
            finish_send(payload)
        irecv(buffer, src); wait_tensor -> payload = empty; start_transfers(payload, src);
            finish_receive(payload); buffer.copy_(dequantize(payload))

    The tier is "rounding"; the bound is the codec's.
    """

    policy: Policy
    direction: str = "forward"
    decompositions: Decompositions = field(default_factory=dict)
    saved: Mapping[str, Origin] = field(default_factory=dict)
    name: str = "quantize-transfers"
    tier: Literal["rounding"] = "rounding"

    def __call__(self, gm: fx.GraphModule) -> PassResult:
        sites = []
        calls: dict[fx.Graph, dict[fx.Node, list[tuple[_Transfer, QuantFormat | None]]]] = {}
        transfers = [t for node in all_nodes(gm) for t in _transfers(node)]
        if not transfers:
            return PassResult(gm, 0)
        statistics = Statistics(gm, self.direction, saved=self.saved)
        for transfer in transfers:
            decision = self._decide(transfer, statistics)
            sites.append(self._site(transfer, decision, statistics.directions))
            node = transfer.node
            calls.setdefault(node.graph, {}).setdefault(node, []).append(
                (transfer, decision.format)
            )
        for decided in calls.values():
            if any(fmt for call in decided.values() for _, fmt in call):
                self._rewrite(decided)
        return PassResult(gm, sum(site.format is not None for site in sites), tuple(sites))

    def _rewrite(
        self, calls: Mapping[fx.Node, Sequence[tuple[_Transfer, QuantFormat | None]]]
    ) -> None:
        """All transfers of a graph, exact ones too: they keep their order among each other."""
        first = next(iter(calls))
        split_joined_waits(first.graph)
        tensor = calls[first][0][0].tensor

        def token(x: Tensor) -> Tensor:
            return torch.empty(1, dtype=torch.uint8, device=x.device)

        order = splice(token, [tensor], first, lambda _: first, self.decompositions)
        for node, decided in calls.items():
            _replace(node, decided, order, self.decompositions)

    def _decide(self, transfer: _Transfer, statistics: Statistics) -> Decision:
        """What both ends decide alike: what only the sender sees may at most be an error."""
        x, module = transfer.value, module_of(transfer.node)
        is_named = self.policy.override_for(module) is not None
        kind = statistics.directions.kind_of(transfer.node)
        facts: dict[str, Any] = {"dtype": x.dtype, "numel": x.numel()}
        if kind == "unknown":
            return self.policy.decide_without_kind(NO_DIRECTION, module, bytes_of(x), **facts)
        decision = self.policy.decide(kind, module, bytes_of(x), **facts)
        if decision.why in ("dtype", "empty"):
            return decision
        if not is_named and (reason := _looks_like_a_statistic(transfer)):
            return exact("statistic", reason)
        if decision.format is not None and (reason := _out_of_reach(transfer, decision.format)):
            return exact("out of reach", reason)
        if decision.format is not None and transfer.is_send and not is_named:
            _refuse_a_statistic(transfer, statistics)
        return decision

    def _site(self, transfer: _Transfer, decision: Decision, directions: Directions) -> Site:
        x, name = transfer.value, str(transfer.node.args[-1])
        before = after = bytes_of(x) if transfer.is_send else 0
        if decision.format is not None and before:
            after = decision.format.payload_bytes(x.numel())
        return Site.of(
            decision,
            x.shape,
            x.dtype,
            (before, after),
            collective="send" if transfer.is_send else "recv",
            direction=directions.of(transfer.node),
            kind=directions.kind_of(transfer.node),
            module=module_of(transfer.node),
            source=source_of(transfer.node),
            group=name,
            world_size=resolve(name).size(),
        )


# ---- where -------------------------------------------------------------------------------------


def _transfers(node: fx.Node) -> Iterator[_Transfer]:
    target: Any = node.target
    if node.op != "call_function" or getattr(target, "namespace", "") != "_c10d_functional":
        return
    args: Any = node.args
    if target._opname in ("isend", "irecv"):
        yield _Transfer(node, None, target._opname == "isend", args[0], node)
    elif target._opname == "batch_p2p_ops":
        items = {user.args[1]: user for user in node.users}
        for number, (op, tensor) in enumerate(zip(args[0], args[3], strict=True)):
            yield _Transfer(node, number, op == "isend", tensor, items.get(number))


def _looks_like_a_statistic(transfer: _Transfer) -> str:
    """Why a transfer is a statistic by its shape, "" if it is not; the other end agrees."""
    shape = tuple(transfer.value.shape)
    if has_one_element(shape):
        return "a statistic: a single element"
    return "a statistic: one value a row" if is_one(shape[-1]) else ""


def _refuse_a_statistic(transfer: _Transfer, statistics: Statistics) -> None:
    """The end that receives would take its payload for exact values, or the other way round."""
    why = statistics.why_exact(transfer.tensor, transfer.node)
    if why:
        module = module_of(transfer.node)
        raise CaptureError(
            f"what the isend at {source_of(transfer.node) or module or '(unknown place)'} sends is "
            f"{why}. It must stay exact, but the rank that receives it cannot see that. Send it as "
            "[..., 1] (both ends keep such a tensor exact), or name the module on both ranks: "
            f"sites={{{module or '*'!r}: None}} keeps what it sends exact, a format quantizes it."
        )


def _out_of_reach(transfer: _Transfer, fmt: QuantFormat) -> str:
    """Why a transfer cannot be quantized although it should be; the other end agrees."""
    if fmt.nonfinite == "raise":
        return "nonfinite='raise' needs every rank, and here are two"
    return ""


def _waits(handle: fx.Node) -> list[fx.Node]:
    """Those for a transfer: what a wait returns may be waited for again."""
    waits = [user for user in handle.users if user.target is WAIT]
    return waits + [later for wait in waits for later in _waits(wait)]


def _earliest_need(transfer: _Transfer, waits: list[fx.Node]) -> fx.Node:
    """Where a transfer must be over.

    torch itself may wait for a receive as soon as it has begun (not so for a batch in 2.15); then
    the user waits for that wait, and reads the buffer only later.
    """
    if transfer.is_send:
        return min(waits)  # the earliest in the graph
    node, values = transfer.node, [transfer.tensor, *waits]
    reads = [u for v in values for u in v.users if u not in (node, *waits) and u > node]
    return min([*([w for w in waits if w.args[0] in waits] or waits), *reads])


# ---- how ---------------------------------------------------------------------------------------


def _replace(
    node: fx.Node,
    decided: Sequence[tuple[_Transfer, QuantFormat | None]],
    order: fx.Node,
    decompositions: Decompositions,
) -> None:
    """Let payloads travel in place of what isend, irecv or batch_p2p_ops moves."""
    is_batch = decided[0][0].number is not None
    args: Any = node.args
    peers, tags = (args[1], args[2]) if is_batch else ([args[1]], [args[2]])
    moved = [
        splice(partial(_moved, fmt, t.is_send), [t.tensor], node, lambda _: node, decompositions)
        for t, fmt in decided
    ]
    both = list(zip(decided, moved, strict=True))
    sent = [payload for (transfer, _), payload in both if transfer.is_send]
    received = [payload for (transfer, _), payload in both if not transfer.is_send]
    names = ["isend" if transfer.is_send else "irecv" for transfer, _ in decided]
    tags = [_tag(tag, fmt) for (_, fmt), tag in zip(decided, tags, strict=True)]
    group = resolve(args[-1])
    peers = [global_rank(peer, group) for peer in peers]
    started = (order, sent, received, names, peers, tags, args[-1], is_batch)
    _insert(start_transfers, started, node, before=node)
    for (transfer, fmt), payload in both:
        _finish(transfer, fmt, payload, order, decompositions)
    for old in (*reversed(list(node.users)), node):
        node.graph.erase_node(old)


def _moved(fmt: QuantFormat | None, is_send: bool, x: Tensor) -> Tensor:
    """What is sent in place of ``x``, or what is received for it."""
    if is_send:
        return (
            x.contiguous() if fmt is None else operators.quantize(x.reshape(1, x.numel()), fmt.spec)
        )
    if fmt is None:
        return torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return torch.empty((1, fmt.payload_bytes(x.numel())), dtype=torch.uint8, device=x.device)


def _filled(fmt: QuantFormat | None, buffer: Tensor, received: Tensor) -> Tensor:
    if fmt is None:
        return buffer.copy_(received)
    values = operators.dequantize(received, fmt.spec, buffer.dtype)
    return buffer.copy_(values.narrow(1, 0, buffer.numel()).reshape(buffer.shape))


def _finish(
    transfer: _Transfer,
    fmt: QuantFormat | None,
    payload: fx.Node,
    order: fx.Node,
    decompositions: Decompositions,
) -> None:
    node, handle = transfer.node, transfer.handle
    waits = _waits(handle) if handle is not None else []
    if not waits:
        raise CaptureError(
            f"the {'isend' if transfer.is_send else 'irecv'} at "
            f"{source_of(node) or module_of(node)} is not waited for where it is compiled, so it "
            "is not known when its payload may go: wait for it in the same function, or let all "
            "that this function sends and receives stay exact (a policy whose sites name its "
            "module with None, on both ranks)."
        )
    first = _earliest_need(transfer, waits)
    finish = finish_send if transfer.is_send else finish_receive
    _insert(finish, (order, payload), node, before=first)
    if not transfer.is_send:
        inputs = [transfer.tensor, payload]
        splice(partial(_filled, fmt), inputs, node, lambda _: first, decompositions)
    # What is read after a wait is the tensor: the operators fill it, whatever they return.
    assert handle is not None
    for read in (*reversed(waits), handle):
        read.replace_all_uses_with(transfer.tensor)
    for wait in reversed(waits):
        wait.graph.erase_node(wait)


def _insert(op: Any, args: tuple[Any, ...], like: fx.Node, before: fx.Node) -> None:
    with like.graph.inserting_before(before):
        node = like.graph.call_function(op, args)
    node.meta = origin_of(like) | {"val": None}


def _tag(tag: int, fmt: QuantFormat | None) -> int:
    """Another tag for each format: gloo then never takes one for another, and both ends time out.

    It would fill part of a longer buffer. (NCCL has no tags, and its sizes must agree.) A tag that
    needs the upper half itself stays as it is.
    """
    if fmt is None or tag >= 2**16:
        return tag
    return tag | (zlib.crc32(fmt.spec.encode()) & 0x7FFF) << 16
