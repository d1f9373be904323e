"""Packs tensors of optimizer states into payloads, and unpacks them.

A packed tensor in a state_dict is a dict of plain values, so that ``torch.save`` and a loader with
``weights_only=True`` take it. Zeros stay zeros: the grid is mid-tread, whatever the format says,
and nothing is rotated, so what never had a gradient does not move.

Tensors without a negative value (second moments) are coded as their fourth root: they span many
decades, and an update divides by their square root. None of them is clipped, and none becomes zero
that is not: a value below one grid step counts as one step. So no update grows without bound.

The codec is that of the wire; the fourth root and the lift to one step are our rules.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from rfcompile.codec import arithmetic, operators
from rfcompile.codec.formats import QuantFormat, Rounding
from rfcompile.errors import NonFiniteError, StateError
from rfcompile.states.moments import MOMENTS, Owner, decide, holds_weights
from rfcompile.states.packed_checks import (
    CHECK,
    DTYPES,
    KEYS,
    check_packed,
    checksum,
    damaged,
    is_packed,
)
from rfcompile.states.sharded_payloads import from_rows, is_in_rows, to_rows
from rfcompile.wire.policy import Policyish, as_policy


class Packed(dict[str, Any]):
    """``payload`` (uint8), ``format``, ``shape`` and ``dtype`` of the tensor, and ``root``: 1 or 4.

    It stands where the tensor was. Code that takes it for the tensor gets an error that says so.
    """

    @classmethod
    def __torch_function__(cls, function: Any, *_: Any, **__: Any) -> NoReturn:
        name = getattr(function, "__name__", str(function))
        raise StateError(
            "a quantized state was used as a tensor between two steps",
            [name],
            "States are tensors while the optimizer steps, and in its state_dict(). Call remove() "
            "of the handle (StatesHandle.of(optimizer)) before, or leave the state exact: "
            "sites={'*.KEY': None}.",
        )

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(
            f"a quantized state has no {name!r}: it is a tensor only while the optimizer steps, "
            "and in its state_dict()"
        )


def pack(x: Tensor, fmt: QuantFormat, seed: int = 0) -> Packed:
    """Code a tensor (of a DTensor, this rank's part): ``C(x)``, or ``C(x^(1/4))`` if ``x >= 0``.

    Error: that of the packed format on what is coded, and up to one grid step for fourth roots
    below one; a group with NaN or Inf decodes to NaN. Zeros decode to zeros, and fourth roots that
    are not zero to values that are not.

    Args:
        x: float32, bfloat16 or float16, any shape.
        seed: for stochastic rounding.
    """
    local = x.to_local() if isinstance(x, DTensor) else x
    root = 4 if local.numel() and not bool((local < 0).any()) else 1
    used = replace(fmt, grid="mid-tread", rotate=None)
    rows = local.reshape(1, local.numel())
    if root == 4:
        used = _of_roots(used)
        rows = _lifted(rows.float().sqrt().sqrt(), used)
    return Packed(
        payload=operators.quantize(rows, used.spec, seed).reshape(-1),
        format=used.spec,
        shape=list(local.shape),
        dtype=str(local.dtype).removeprefix("torch."),
        root=root,
    )


def unpack(packed: Mapping[str, Any], like: Tensor | None = None, name: str = "a state") -> Tensor:
    """Decode what :func:`pack` returned: on the device of ``like``, and with its mesh and
    placements if it is a DTensor.

    Raises:
        PayloadError: it is damaged. StateError: it was sharded in another way than ``like``.
    """
    here = localized(packed, like, name)
    fmt, shape, dtype = QuantFormat.parse(here["format"]), here["shape"], DTYPES[here["dtype"]]
    payload: Tensor = here["payload"]
    if like is not None:
        payload = payload.to(like.device, non_blocking=True)
    decoded = torch.float32 if here["root"] == 4 else dtype
    values = operators.dequantize(payload.reshape(1, -1), fmt.spec, decoded)
    x = values.narrow(1, 0, math.prod(shape)).reshape(shape)
    x = _fourth_power(x, dtype) if here["root"] == 4 else x
    if isinstance(like, DTensor):
        return DTensor.from_local(
            x, like.device_mesh, like.placements, shape=like.shape, stride=like.stride()
        )
    return x


def _of_roots(fmt: QuantFormat) -> QuantFormat:
    # At 2 bits all that is not zero is the largest value: there is nothing to round at random.
    rounding: Rounding = "nearest" if fmt.bits == 2 else fmt.rounding
    return replace(fmt, range="full", rounding=rounding)


def _lifted(roots: Tensor, fmt: QuantFormat) -> Tensor:
    """``roots``, where they are not zero at least one grid step of their group."""
    step = arithmetic.steps(roots, fmt)
    if fmt.rounding == "stochastic":  # the codec's 1 / step is up to 2**-15 off: not even then 0
        step = step * (1 + 2**-14)
    return torch.where(roots > 0, torch.maximum(roots, step), roots)


def _fourth_power(roots: Tensor, dtype: torch.dtype) -> Tensor:
    """In ``dtype``, without leaving its range: zero and infinity are of zero and infinity only."""
    limits = torch.finfo(dtype)
    inside = roots.square().square().clamp(limits.smallest_normal * limits.eps, limits.max)
    return torch.where(roots == 0, 0.0, inside).to(dtype)


# ---- what is in a state_dict ---------------------------------------------------------------------


def sealed(packed: Mapping[str, Any], like: Tensor | None = None) -> dict[str, Any]:
    """A packed state for a state_dict: plain, a copy, with a checksum of its description.

    Of a sharded parameter ``like`` the payload becomes a DTensor of all ranks' payloads; see
    ``sharded_payloads.py``.
    """
    plain = {key: packed[key] for key in packed if key != CHECK}
    if isinstance(like, DTensor) and not is_in_rows(plain):
        plain = to_rows(plain, like)
    else:
        plain["payload"] = plain["payload"].clone()
    return {**plain, CHECK: checksum(plain)}


def localized(packed: Mapping[str, Any], like: Tensor | None, name: str) -> Packed:
    """A packed state of a state_dict as it is kept on this rank.

    Raises:
        PayloadError: it is damaged. StateError: it was sharded in another way than ``like``.
    """
    check_packed(packed, name)
    plain = {key: packed[key] for key in KEYS}
    if is_in_rows(plain):
        plain = from_rows(plain, like, name)
        check_packed(plain, name)
    elif isinstance(like, DTensor) and plain["shape"] != list(like.to_local().shape):
        here = f"{list(like.to_local().shape)}, this rank's part of the parameter"
        damaged(name, plain, f"of shape {plain['shape']}", here)
    return Packed(plain)


def require_finite(x: Tensor, fmt: QuantFormat, name: str, rule: str) -> None:
    """Raise NonFiniteError where the format says ``nonfinite="raise"`` and ``x`` has NaN or Inf."""
    local = x.to_local() if isinstance(x, DTensor) else x
    if fmt.nonfinite == "raise" and not bool(local.isfinite().all()):
        raise NonFiniteError(name, rule=rule)


def pack_state_dict(
    state_dict: Mapping[str, Any],
    policy: Policyish = 8,
    parameters: Sequence[Tensor] = (),
) -> dict[str, Any]:
    """The ``state_dict()`` of an optimizer with its large moments packed, to save or to send.

    Formats are ``policy.optimizer_state``; ``sites`` takes names of parameters, and of states as
    ``parameter.key``. What is no moment stays exact unless it is named so:
    :func:`~rfcompile.training.packing_report` tells why. Undo it with :func:`unpack_state_dict`.

    Args:
        parameters: of the optimizer in order; with them weights under a moment's key are seen.

    Raises:
        StateError: it is no state_dict of an optimizer. NonFiniteError: as the format asks for.
        PolicyError, FormatError: the policy is not understood.
    """
    require_state_dict(state_dict, "Pass what optimizer.state_dict() returned.")
    chosen = as_policy(policy)
    weights = _weights_in(state_dict, parameters)
    rule = "Nothing was packed: put finite values in it, or use nonfinite='propagate'."
    state = {}
    for index, owner, entries in entries_of(state_dict):
        state[index] = dict(entries) if isinstance(entries, Mapping) else entries
        for key, value in entries.items() if isinstance(entries, Mapping) else ():
            is_weight = key in weights
            fmt = decide(chosen, owner, key, value, beside=entries, is_weight=is_weight).format
            if fmt is not None:
                require_finite(value, fmt, f"state {key!r} of {owner.label}", rule)
                like = value if isinstance(value, DTensor) else None
                state[index][key] = sealed(pack(value, fmt), like)
    return {**state_dict, "state": state}


def _weights_in(state_dict: Mapping[str, Any], parameters: Sequence[Tensor]) -> set[str]:
    """Keys of moments that hold weights, as far as the parameters are known."""
    pairs: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for _, owner, entries in entries_of(state_dict):
        if isinstance(entries, Mapping) and owner.index < len(parameters):
            for key in entries.keys() & MOMENTS:
                if isinstance(entries[key], Tensor):
                    pairs.setdefault(key, []).append((entries[key], parameters[owner.index]))
    return {key for key, found in pairs.items() if holds_weights(found)}


def unpack_state_dict(
    state_dict: Mapping[str, Any], parameters: Sequence[Tensor] = ()
) -> dict[str, Any]:
    """Undo :func:`pack_state_dict`: what ``optimizer.load_state_dict`` takes.

    Args:
        parameters: of the optimizer in order, to put the states where they are: on their devices,
            sharded as they are. Without them states stay on the payloads' device.

    Raises:
        StateError: it is no state_dict of an optimizer, or its states were sharded in another way.
        PayloadError: a packed state is damaged.
    """
    require_state_dict(state_dict, "Pass what pack_state_dict returned.")
    return converted(state_dict, parameters, unpack)


def converted(
    state_dict: Mapping[str, Any],
    likes: Sequence[Tensor],
    convert: Callable[[Mapping[str, Any], Tensor | None, str], Any],
) -> dict[str, Any]:
    """A state_dict with every packed state converted, given its parameter and its name."""
    state = {}
    for index, owner, entries in entries_of(state_dict):
        like = likes[owner.index] if owner.index < len(likes) else None
        state[index] = entries
        if isinstance(entries, Mapping):
            state[index] = {
                key: convert(v, like, f"state {key!r} of {owner.label}") if is_packed(v) else v
                for key, v in entries.items()
            }
    return {**state_dict, "state": state}


def require_state_dict(state_dict: object, rule: str) -> None:
    """Raise StateError unless it has the shape of ``optimizer.state_dict()``."""
    found = list(map(str, state_dict)) if isinstance(state_dict, Mapping) else []
    what = "this is no state_dict of an optimizer"
    if not isinstance(state_dict, Mapping) or not {"state", "param_groups"} <= state_dict.keys():
        raise StateError(what, found or [type(state_dict).__name__], rule)
    groups = state_dict["param_groups"]
    are_groups = isinstance(groups, list | tuple) and all(
        isinstance(group, Mapping) and isinstance(group.get("params"), list | tuple)
        for group in groups
    )
    if not are_groups or not isinstance(state_dict["state"], Mapping):
        raise StateError(what, ["state", "param_groups"], rule)


def entries_of(state_dict: Mapping[str, Any]) -> Iterator[tuple[Any, Owner, Any]]:
    """For each entry of ``state``: its key there, whose it is, and its states.

    The place of a parameter is where its key stands in the groups, as ``load_state_dict`` reads it.
    """
    owners: dict[Any, Owner] = {}
    for group in state_dict["param_groups"]:
        names = group.get("param_names") or ()
        for i, index in enumerate(group["params"]):
            owners[index] = Owner(str(names[i]) if i < len(names) else "", len(owners))
    for index, entries in state_dict["state"].items():
        yield index, owners.get(index, Owner(str(index), _NOWHERE)), entries


_NOWHERE = 2**62
"""The place of a state that belongs to no parameter."""
