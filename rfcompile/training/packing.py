"""Tensors of optimizer states as payloads of the wire; open this file to see what is stored.

A packed tensor is a dict of plain values, so that ``torch.save`` and a loader with
``weights_only=True`` take it. Tensors without a negative value (second moments) are coded as their
fourth root: they span many decades, and an update divides by their square root. On the mid-rise
grid none of them becomes zero beside others that are not, so no update grows without bound.

The codec is that of the wire; the fourth root is our rule.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeGuard

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from rfcompile import codec, ops
from rfcompile.errors import StateError
from rfcompile.formats import QuantFormat
from rfcompile.policy import Policy, Policyish, as_policy

Packed = dict[str, Any]
"""``payload`` (uint8), ``format``, ``shape`` and ``dtype`` of the tensor, and ``root``: 1 or 4."""

_KEYS = {"payload", "format", "shape", "dtype", "root"}
_EXACT = ("step",)


def is_packed(value: object) -> TypeGuard[Packed]:
    return isinstance(value, dict) and value.keys() == _KEYS


def pack(x: Tensor, fmt: QuantFormat, seed: int = 0) -> Packed:
    """Code a tensor (of a DTensor, this rank's part): ``C(x)``, or ``C(x^(1/4))`` if ``x >= 0``.

    Error: that of ``fmt`` on what is coded; a group with NaN or Inf decodes to NaN.

    Args:
        x: float32, bfloat16 or float16, any shape.
        seed: for stochastic rounding.
    """
    local = x.to_local() if isinstance(x, DTensor) else x
    root = 4 if local.numel() and bool(local.min() >= 0) else 1
    coded = local.float().sqrt().sqrt() if root == 4 else local
    used = replace(fmt, grid="mid-rise", rotate=None) if root == 4 else fmt
    return {
        "payload": ops.quantize(coded.reshape(1, local.numel()), used.spec, seed).reshape(-1),
        "format": used.spec,
        "shape": list(local.shape),
        "dtype": str(local.dtype).removeprefix("torch."),
        "root": root,
    }


def unpack(packed: Packed, like: Tensor | None = None) -> Tensor:
    """Decode what :func:`pack` returned: on the device of ``like``, and with its mesh and
    placements if it is a DTensor.

    Raises:
        PayloadError: the payload does not fit the shape and format.
    """
    fmt, shape = QuantFormat.parse(packed["format"]), tuple(packed["shape"])
    dtype = getattr(torch, packed["dtype"])
    numel = torch.Size(shape).numel()
    payload: Tensor = packed["payload"]
    if like is not None:
        payload = payload.to(like.device, non_blocking=True)
    codec.check_payload(payload, fmt, numel, 1)
    decoded = torch.float32 if packed["root"] == 4 else dtype
    values = ops.dequantize(payload.reshape(1, -1), fmt.spec, decoded)
    x = values.narrow(1, 0, numel).reshape(shape)
    x = x.square().square().to(dtype) if packed["root"] == 4 else x
    if isinstance(like, DTensor):
        return DTensor.from_local(
            x, like.device_mesh, like.placements, shape=like.shape, stride=like.stride()
        )
    return x


def format_of(policy: Policy, name: str, key: str, value: object) -> tuple[QuantFormat | None, str]:
    """The format of a state, and if it is None the reason."""
    if not isinstance(value, Tensor):
        return None, "no tensor"
    local = value.to_local() if isinstance(value, DTensor) else value
    if key in _EXACT:
        return None, "counts steps"
    if local.dim() == 0:
        return None, "a single number, such as NAdam's mu_product: its errors would add up"
    if local.dtype not in codec.DTYPES:
        return None, f"{str(local.dtype).removeprefix('torch.')} data is not quantized"
    return policy.format_for("optimizer_state", name, local.nbytes)


def pack_state_dict(state_dict: Mapping[str, Any], policy: Policyish = 8) -> dict[str, Any]:
    """The ``state_dict()`` of an optimizer with its large tensors packed, to save or to send.

    Formats are ``policy.optimizer_state``; ``sites`` takes parameter names, where the optimizer
    was made from named parameters. Undo it with :func:`unpack_state_dict`.

    Raises:
        StateError: it is no state_dict of an optimizer. PolicyError, FormatError: the policy is not
        understood.
    """
    _require_state_dict(state_dict, "Pass what optimizer.state_dict() returned.")
    chosen = as_policy(policy)
    names = dict(_names(state_dict["param_groups"]))
    state = {
        index: {
            key: pack(value, fmt) if (fmt := format_of(chosen, name, key, value)[0]) else value
            for key, value in entries.items()
        }
        for index, entries in state_dict["state"].items()
        for name in (names.get(index, ""),)
    }
    return {**state_dict, "state": state}


def unpack_state_dict(
    state_dict: Mapping[str, Any], parameters: Sequence[Tensor] = ()
) -> dict[str, Any]:
    """Undo :func:`pack_state_dict`: what ``optimizer.load_state_dict`` takes.

    Args:
        parameters: of the optimizer in order, to put the states where they are: on their devices,
            sharded as they are. Without them states stay on the payloads' device.

    Raises:
        StateError: it is no state_dict of an optimizer. PayloadError: a payload is damaged.
    """
    _require_state_dict(state_dict, "Pass what pack_state_dict returned.")
    likes = dict(enumerate(parameters))
    state = {
        index: {k: unpack(v, likes.get(index)) if is_packed(v) else v for k, v in entries.items()}
        for index, entries in state_dict["state"].items()
    }
    return {**state_dict, "state": state}


def _require_state_dict(state_dict: Mapping[str, Any], rule: str) -> None:
    if not {"state", "param_groups"} <= state_dict.keys():
        raise StateError("this is no state_dict of an optimizer", list(state_dict), rule)


def _names(groups: list[dict[str, Any]]) -> Iterator[tuple[int, str]]:
    for group in groups:
        yield from zip(group["params"], group.get("param_names", ()), strict=False)
