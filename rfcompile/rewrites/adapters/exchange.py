"""Sends adapters from one process to the others in a format of the wire."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rfcompile.codec.formats import QuantFormat, as_format
from rfcompile.errors import OptionError
from rfcompile.rewrites.adapters.factor import Factor
from rfcompile.rewrites.adapters.linear import AdaptedLinear, adapters_of
from rfcompile.wire.collectives import broadcast
from rfcompile.wire.process_groups import check_source, require_same, transport
from rfcompile.wire.together import resolved, together


@torch.no_grad()
def broadcast_adapters(
    model: nn.Module, fmt: QuantFormat | str | int, group: Any = None, *, src: int = 0
) -> int:
    """Give every rank the adapters of rank ``src``, in place; every rank must call.

    Each factor is coded once, and every rank, ``src`` too, ends with what the payload decodes to:
    bit-identical adapters. Magnitudes (DoRA) travel exactly. Adapters change when all ranks have
    all of the new ones; after an error every rank has its old ones.

    Args:
        fmt: of the payloads: bits, a :class:`~rfcompile.QuantFormat`, or its text. A grid that is
            not named is that of weights: zeros stay zero.
        src: a rank of the group.

    Returns:
        How many bytes the source's payloads have.

    Raises:
        On every rank: OptionError: no adapters, or quantized ones, whose codes no codec shortens;
        ``fmt`` or ``src``. RankMismatchError: other adapters, dtypes, formats or versions there, or
        none. FormatError, DtypeError, NonFiniteError. PeerError: another rank failed otherwise.
        TransportError: a rank died, or did not answer in time.
    """
    used = resolved(group, _SITE)
    chosen, found, described = together(used, _SITE, lambda: _prepared(model, fmt, src, used))
    problem = described if isinstance(described, OptionError) else None
    require_same(used, f"adapters {chosen.spec} src={src} {described}")
    if problem is not None:
        raise problem
    new, sent = together(used, _SITE, lambda: _received(found, chosen, used, src))
    for parameter, value in new:
        parameter.copy_(value)
    return sent


_SITE = "broadcast_adapters"


def _prepared(
    model: nn.Module, fmt: Any, src: int, group: Any
) -> tuple[QuantFormat, dict[str, AdaptedLinear], str | OptionError]:
    """The format, the adapters, and what they are or why there are none: ranks compare that."""
    wanted = as_format(fmt)
    if wanted is None:
        raise OptionError("fmt", fmt, "give a format; torch.distributed.broadcast is exact.")
    chosen = wanted.for_kind("weights")
    check_source(src, group.size())
    try:
        found = _to_send(model)
    except OptionError as error:
        return chosen, {}, error
    return chosen, found, str([_described(path, module) for path, module in found.items()])


def _received(
    found: dict[str, AdaptedLinear], fmt: QuantFormat, group: Any, src: int
) -> tuple[list[tuple[Tensor, Tensor]], int]:
    """Each parameter with what it becomes, and the bytes that were sent; nothing is changed."""
    new, sent = [], 0
    with transport(group, _SITE):
        for factor in (factor for m in found.values() for factor in (m.lora_A, m.lora_B)):
            old = factor().detach()
            new.append((old, broadcast(old, fmt, src=src, group=group)))
            sent += fmt.payload_bytes(old.numel())
        for module in found.values():
            if module.lora_magnitude is not None:
                old = module.lora_magnitude.detach()
                received = old.clone()
                dist.broadcast(received, group=group, group_src=src)
                new.append((old, received))
                sent += old.nbytes
    return new, sent


def _to_send(model: nn.Module) -> dict[str, AdaptedLinear]:
    found = adapters_of(model)
    for module in found.values():
        if not (isinstance(module.lora_A, Factor) and isinstance(module.lora_B, Factor)):
            rule = "its adapters are quantized: send what rf.adapters.save wrote."
            raise OptionError("model", type(model).__name__, rule)
    return found


def _described(path: str, module: AdaptedLinear) -> tuple[object, ...]:
    """What has to be the same on all ranks; B's rows are those of the linear."""
    tensors = (module.lora_A(), module.lora_B(), module.lora_magnitude)
    shapes = [None if x is None else (tuple(x.shape), str(x.dtype)) for x in tensors]
    return path, module.omega, module.gain, shapes
