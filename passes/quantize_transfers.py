"""Rewrite sends and receives between two ranks to their quantized form."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, fx

from rfcompile import ops
from rfcompile.codec import DTYPES
from rfcompile.errors import CaptureError
from rfcompile.formats import QuantFormat
from rfcompile.graph import dtype_text, module_of, source_of
from rfcompile.passes.find_collectives import WAIT, all_nodes
from rfcompile.passes.splicing import Decompositions, splice
from rfcompile.pipeline import PassResult
from rfcompile.policy import Policy
from rfcompile.process_groups import resolve
from rfcompile.report import Site

aten = torch.ops.aten
KINDS = {"forward": "activations", "backward": "gradients"}


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

    Dynamo captures them with ``TORCHDYNAMO_ENABLE_P2P_COMPILATION=1`` (torch 2.13). Each end has a
    graph of its own and decides for itself, so both must come to the same decision: the format
    follows from the policy, the direction (forward: activations, backward: gradients), the dtype,
    the size (``min_bytes``; a symbolic one counts as large) and the ``sites`` pattern of the module
    that sends or receives. Every transfer becomes a :class:`~rfcompile.Site`; a "recv" sends no
    bytes.

    Rewrites:
        isend(x, dst) -> isend(quantize(x), dst)
        irecv(buffer, src); wait_tensor -> irecv(payload, src); wait_tensor; buffer.copy_(decoded)

    The tier is "rounding"; the bound is the codec's.
    """

    policy: Policy
    direction: str = "forward"
    decompositions: Decompositions = field(default_factory=dict)
    name: str = "quantize-transfers"
    tier: Literal["rounding"] = "rounding"

    def __call__(self, gm: fx.GraphModule) -> PassResult:
        sites = []
        for transfer in [t for node in all_nodes(gm) for t in _transfers(node)]:
            site, fmt = self._decide(transfer)
            sites.append(site)
            if fmt is not None:
                _quantize(transfer, fmt, self.decompositions)
        return PassResult(gm, sum(site.format is not None for site in sites), tuple(sites))

    def _decide(self, transfer: _Transfer) -> tuple[Site, QuantFormat | None]:
        x, kind = transfer.value, KINDS[self.direction]
        module = module_of(transfer.node)
        size = x.numel() * x.element_size()
        fmt, reason, eligible = None, _nothing_to_do(transfer), False
        if not reason:
            known = size if isinstance(size, int) else 2**62
            fmt, reason = self.policy.format_for(kind, module, known)
            eligible = fmt is not None or "min_bytes" in reason
            if fmt is not None and (out_of_reach := _out_of_reach(transfer, fmt)):
                fmt, reason = None, out_of_reach
        before = after = 0 if not transfer.is_send else size if isinstance(size, int) else None
        if fmt is not None and before:
            after = fmt.payload_bytes(x.numel())
        name = str(transfer.node.args[-1])
        site = Site(
            collective="send" if transfer.is_send else "recv",
            direction=self.direction,
            kind=kind,
            module=module,
            source=source_of(transfer.node),
            shape=tuple(s if isinstance(s, int) else str(s) for s in x.shape),
            dtype=dtype_text(x.dtype),
            group=name,
            world_size=resolve(name).size(),
            format=fmt.spec if fmt else None,
            reason=reason,
            eligible=eligible,
            bytes_before=before,
            bytes_after=after,
        )
        return site, fmt


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


def _nothing_to_do(transfer: _Transfer) -> str:
    """Why a transfer is exact whatever the policy says, "" if it is not; the other end agrees."""
    if transfer.value.dtype not in DTYPES:
        return f"{dtype_text(transfer.value.dtype)} data is not quantized"
    size = transfer.value.numel()
    return "empty tensor" if isinstance(size, int) and size == 0 else ""


def _out_of_reach(transfer: _Transfer, fmt: QuantFormat) -> str:
    """Why a transfer cannot be quantized although it should be; the other end agrees."""
    if fmt.nonfinite == "raise":
        return "nonfinite='raise' needs every rank, and here are two"
    return ""


def _waits(handle: fx.Node) -> list[fx.Node]:
    """Those for a transfer, in order: what a wait returns may be waited for again."""
    waits = [user for user in handle.users if user.target is WAIT]
    return waits + [later for wait in waits for later in _waits(wait)]


# ---- how ---------------------------------------------------------------------------------------


def _quantize(transfer: _Transfer, fmt: QuantFormat, decompositions: Decompositions) -> None:
    def encode(x: Tensor) -> Tensor:
        return ops.quantize(x.reshape(1, x.numel()), fmt.spec)

    def payload(buffer: Tensor) -> Tensor:
        size = fmt.payload_bytes(buffer.numel())
        return torch.empty((1, size), dtype=torch.uint8, device=buffer.device)

    def decode(buffer: Tensor, received: Tensor) -> Tensor:
        values = ops.dequantize(received, fmt.spec, buffer.dtype)
        return buffer.copy_(values.narrow(1, 0, buffer.numel()).reshape(buffer.shape))

    node, tensor, handle = transfer.node, transfer.tensor, transfer.handle
    make = encode if transfer.is_send else payload
    travelling = splice(make, [tensor], node, lambda _: node, decompositions)
    _carry(transfer, travelling, fmt)
    if transfer.is_send:
        return
    waits = _waits(handle) if handle is not None else []
    if not waits:
        raise CaptureError(
            f"the irecv at {source_of(node) or module_of(node)} is not waited for where it is "
            "compiled, so what arrives cannot be decoded: wait for it in the same function, or "
            "send exactly (a policy whose sites name its module with None, on both ranks)."
        )
    # What is read after a wait is the buffer: the operators fill it, whatever they return.
    assert handle is not None
    first, *later = waits
    for read in (handle, *reversed(waits)):
        read.replace_all_uses_with(tensor, delete_user_cb=lambda user: user is not first)
    for wait in reversed(later):
        wait.graph.erase_node(wait)
    after = first.next
    splice(decode, [tensor, first], node, lambda _: after, decompositions)


def _carry(transfer: _Transfer, payload: fx.Node, fmt: QuantFormat) -> None:
    """Let the transfer move the payload in place of its tensor, under a tag of the format."""
    node, value = transfer.node, payload.meta["val"]
    args: Any = list(node.args)
    moved = value.new_empty(0) if transfer.is_send else value
    if transfer.number is None:
        args[0], args[2] = payload, _tag(args[2], fmt)
        node.meta["val"] = moved
    else:
        tensors, values = list(args[3]), list(node.meta["val"])
        tensors[transfer.number], values[transfer.number] = payload, moved
        args[3], node.meta["val"] = tensors, values
        args[2] = [_tag(t, fmt) if n == transfer.number else t for n, t in enumerate(args[2])]
    node.args = tuple(args)
    if transfer.handle is not None:
        for waited in (transfer.handle, *_waits(transfer.handle)):
            waited.meta["val"] = moved


def _tag(tag: int, fmt: QuantFormat) -> int:
    """Another tag for each format: gloo then never takes one for another, and both ends time out.

    It would fill part of a longer buffer. (NCCL has no tags, and its sizes must agree.) A tag that
    needs the upper half itself stays as it is.
    """
    return tag | (zlib.crc32(fmt.spec.encode()) & 0x7FFF) << 16 if tag < 2**16 else tag
