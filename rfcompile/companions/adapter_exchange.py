"""Send adapters from one process to the others on the wire's codec."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from rfcompile.collectives import broadcast
from rfcompile.companions.adapted_linear import AdaptedLinear, adapters_of
from rfcompile.companions.factor import Factor
from rfcompile.errors import PolicyError
from rfcompile.formats import QuantFormat, as_format
from rfcompile.process_groups import require_same


@torch.no_grad()
def broadcast_adapters(
    model: nn.Module, fmt: QuantFormat | str | int, src: int = 0, group: Any = None
) -> int:
    """Give every rank the adapters of rank ``src``, in place; every rank must call.

    Each factor is coded once, and every rank, ``src`` too, ends with what the payload decodes to:
    bit-identical adapters. Magnitudes (DoRA) travel exactly.

    Args:
        fmt: of the payloads: bits, a :class:`~rfcompile.QuantFormat`, or its text. A grid that is
            not named is that of weights: zeros stay zero.
        src: a rank of the group.

    Returns:
        How many bytes the source's payloads have.

    Raises:
        PolicyError: no adapters, or quantized ones, whose codes no codec shortens. On every rank
        RankMismatchError: other adapters, dtypes, formats or versions there, or none. FormatError,
        DtypeError.
    """
    wanted = as_format(fmt)
    if wanted is None:
        raise PolicyError("fmt", fmt, "give a format; torch.distributed.broadcast is exact.")
    chosen = wanted.for_kind("weights")
    used = group if group is not None else dist.group.WORLD
    problem = None
    try:
        found = _to_send(model)
        described = str([_described(path, module) for path, module in found.items()])
    except PolicyError as error:  # the other ranks wait: all of them are told before one raises
        problem, described = error, str(error)
    require_same(used, f"adapters {chosen.spec} src={src} {described}")
    if problem is not None:
        raise problem
    factors = [factor for m in found.values() for factor in (m.lora_A, m.lora_B)]
    sent = 0
    for factor in factors:
        factor().copy_(broadcast(factor().detach(), chosen, src, group))
        sent += chosen.payload_bytes(factor().numel())
    for module in found.values():
        if module.lora_magnitude is not None:
            dist.broadcast(module.lora_magnitude.detach(), group=used, group_src=src)
            sent += module.lora_magnitude.nbytes
    return sent


def _to_send(model: nn.Module) -> dict[str, AdaptedLinear]:
    found = adapters_of(model)
    for module in found.values():
        if not (isinstance(module.lora_A, Factor) and isinstance(module.lora_B, Factor)):
            rule = "its adapters are quantized: send what save_adapters wrote."
            raise PolicyError("model", type(model).__name__, rule)
    return found


def _described(path: str, module: AdaptedLinear) -> tuple[object, ...]:
    """What has to be the same on all ranks; B's rows are those of the linear."""
    tensors = (module.lora_A(), module.lora_B(), module.lora_magnitude)
    shapes = [None if x is None else (tuple(x.shape), str(x.dtype)) for x in tensors]
    return path, module.omega, module.gain, shapes
