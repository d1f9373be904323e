"""Optimizer states that are quantized whenever the optimizer is not stepping."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from rfcompile.errors import HookError, StateError
from rfcompile.formats import QuantFormat
from rfcompile.graph import dtype_text
from rfcompile.policy import Policy, Policyish, as_policy
from rfcompile.report import AT_REST, Report, Site
from rfcompile.training.optimizers import Optimizers
from rfcompile.training.packing import (
    Packed,
    format_of,
    is_packed,
    pack,
    unpack,
    unpack_state_dict,
)


def quantize_states(
    optimizer: Optimizer,
    policy: Policyish = 8,
    *,
    offload: bool = False,
    packed_state_dict: bool = False,
) -> QuantizedStates:
    """Keep an optimizer's states quantized between its steps.

    Each step decodes the states, runs, and codes them again (:func:`pack` has the formula), so in
    forward and backward they take ``bits / 8`` bytes an element and a scale a group; within the
    step they are whole. Any optimizer whose states are tensors in ``optimizer.state`` will do.

    Args:
        policy: as everywhere: bits, a format, a mapping, a Policy (``optimizer_state``,
            ``min_bytes``, ``sites`` by parameter name).
        offload: keep the payloads in host memory between steps.
        packed_state_dict: ``optimizer.state_dict()`` holds payloads (a quarter of the size at 8
            bits), from which training goes on bit for bit, instead of decoded tensors, which any
            optimizer can load. ``load_state_dict`` takes both.

    Raises:
        HookError: it is no optimizer. StateError: its states are quantized already.
        PolicyError, FormatError: the policy is not understood.
    """
    chosen = as_policy(policy)
    parts = optimizer.optimizers if isinstance(optimizer, Optimizers) else (optimizer,)
    if not isinstance(optimizer, Optimizer):
        raise HookError(type(optimizer).__name__, "pass a torch.optim.Optimizer.")
    for part in parts:
        if _ATTRIBUTE in part.__dict__:
            raise StateError(
                "the states are quantized already",
                [type(part).__name__],
                "Call remove() of the first handle before.",
            )
    handle = QuantizedStates(parts, chosen, offload=offload, packed_state_dict=packed_state_dict)
    for part in parts:
        part.__dict__[_ATTRIBUTE] = handle
    return handle


_ATTRIBUTE = "_rfcompile_states"


class QuantizedStates:
    """What :func:`quantize_states` returns: the report, and the way back."""

    def __init__(
        self,
        optimizers: tuple[Optimizer, ...],
        policy: Policy,
        *,
        offload: bool,
        packed_state_dict: bool,
    ) -> None:
        self._optimizers, self._policy = optimizers, policy
        self._offload = offload
        self._num_packed = 0
        self._loading: dict[Any, dict[str, Any]] = {}
        self._hooks = []
        for optimizer in optimizers:
            self._hooks += [
                optimizer.register_step_pre_hook(lambda o, *_: self._unpack(o)),
                optimizer.register_step_post_hook(lambda o, *_: self._pack(o)),
                optimizer.register_load_state_dict_pre_hook(self._before_loading),
                optimizer.register_load_state_dict_post_hook(self._after_loading),
            ]
            if not packed_state_dict:
                self._hooks.append(optimizer.register_state_dict_post_hook(_plain))
            self._pack(optimizer)

    def remove(self) -> None:
        """Decode the states for good; the optimizer is a plain one again."""
        for hook in self._hooks:
            hook.remove()
        for optimizer in self._optimizers:
            self._unpack(optimizer)
            optimizer.__dict__.pop(_ATTRIBUTE, None)

    def report(self) -> Report:
        """A line a state: the bytes it takes at rest before and after, or why it stays exact."""
        names = [name for o in self._optimizers for name, _ in _parameters(o)]
        notes = []
        if self._policy.sites and not all(names):
            notes.append("sites reach no parameter without a name: build the optimizer from names")
        return Report.of(self._policy, self._sites(), names=names, notes=notes)

    # ---- the hooks -----------------------------------------------------------------------

    @torch.no_grad()
    def _pack(self, optimizer: Optimizer) -> None:
        for name, parameter in _parameters(optimizer):
            state = optimizer.state.get(parameter, {})
            for key, value in state.items():
                fmt, _ = format_of(self._policy, name, key, value)
                if fmt is not None:
                    state[key] = self._stored(value, fmt)

    def _stored(self, value: Tensor, fmt: QuantFormat) -> Packed:
        self._num_packed += 1
        packed = pack(value, fmt, self._num_packed)
        if self._offload:
            packed["payload"] = packed["payload"].cpu()
        return packed

    @torch.no_grad()
    def _unpack(self, optimizer: Optimizer) -> None:
        for _, parameter in _parameters(optimizer):
            state = optimizer.state.get(parameter, {})
            for key, value in state.items():
                if is_packed(value):
                    state[key] = unpack(value, parameter)

    def _before_loading(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        self._loading = state_dict["state"]
        return _plain(optimizer, state_dict)

    def _after_loading(self, optimizer: Optimizer) -> None:
        """Take payloads as they are: coding what they decode to would not always return them."""
        for index, (_, parameter) in enumerate(_parameters(optimizer)):
            for key, value in self._loading.get(index, {}).items():
                if is_packed(value):
                    device = "cpu" if self._offload else parameter.device
                    payload = value["payload"].to(device, copy=True)
                    optimizer.state[parameter][key] = {**value, "payload": payload}
        self._loading = {}
        self._pack(optimizer)

    def _sites(self) -> Iterator[Site]:
        for optimizer in self._optimizers:
            for index, (name, parameter) in enumerate(_parameters(optimizer)):
                for key, value in optimizer.state.get(parameter, {}).items():
                    yield self._site(name, index, key, value)

    def _site(self, name: str, index: int, key: str, value: Any) -> Site:
        _, reason = ("", "") if is_packed(value) else format_of(self._policy, name, key, value)
        before = after = value.nbytes if isinstance(value, Tensor) else 0
        shape = tuple(value.shape) if isinstance(value, Tensor) else ()
        dtype = dtype_text(value.dtype) if isinstance(value, Tensor) else type(value).__name__
        if is_packed(value):
            torch_dtype = getattr(torch, value["dtype"])
            shape, dtype = tuple(value["shape"]), dtype_text(torch_dtype)
            before = torch.Size(shape).numel() * torch_dtype.itemsize
            after = value["payload"].nbytes
        return Site(
            collective=key,
            direction=AT_REST,
            kind="optimizer_state",
            module=name or f"parameter {index}",
            source="",
            shape=shape,
            dtype=dtype,
            group="",
            world_size=1,
            format=value["format"] if is_packed(value) else None,
            reason=reason,
            eligible=is_packed(value) or "min_bytes" in reason,
            bytes_before=before,
            bytes_after=after,
        )


def _plain(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """A state_dict of decoded tensors; the optimizer's own states stay as they are."""
    return unpack_state_dict(state_dict, [parameter for _, parameter in _parameters(optimizer)])


def _parameters(optimizer: Optimizer) -> Iterator[tuple[str, Tensor]]:
    """Names, where the optimizer knows them, and parameters in the order of state_dict."""
    for group in optimizer.param_groups:
        names = group.get("param_names") or [""] * len(group["params"])
        yield from zip(names, group["params"], strict=True)
