"""quantize_states: keeps optimizer states quantized between the steps."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim import optimizer as torch_optimizer

from rfcompile.codec.cpu_codec import load_kernels_for
from rfcompile.codec.formats import QuantFormat
from rfcompile.errors import StateError
from rfcompile.report.handle import Handle
from rfcompile.report.report import Report, Site
from rfcompile.states.composite import parts_of
from rfcompile.states.copies import carry, drop, handle_of
from rfcompile.states.loading import to_load
from rfcompile.states.moments import (
    MOMENTS,
    Owner,
    Verdict,
    compared_name,
    decide,
    holds_weights,
)
from rfcompile.states.packed_checks import is_packed
from rfcompile.states.packing import Packed, converted, pack, require_finite, sealed, unpack
from rfcompile.states.report import made, names_before, site_of
from rfcompile.wire.policy import Decision, Policy, Policyish, as_policy, exact


def quantize_states(
    optimizer: Optimizer,
    policy: Policyish = 8,
    *,
    offload: bool = False,
    packed_state_dict: bool = False,
) -> StatesHandle:
    """Keep the moments of an optimizer quantized between its steps.

    Each step decodes the states, runs, and codes the states again (:func:`pack` has the formula).
    So during forward and backward the states take ``bits / 8`` bytes an element and one scale a
    group. During the step they have their full size. A state that is not known to be a moment
    (weights, step sizes, preconditioners) stays exact, unless ``sites`` names it. ``moments.py``
    has the list, and the report gives the reason for each state.

    A wrapper that holds the optimizer (accelerate's, Lightning's, ZeroRedundancyOptimizer,
    Lookahead) may be given in place of the optimizer. A copy of the optimizer (``copy.deepcopy``,
    ``pickle``, ``torch.save``) is quantized, too, and has a handle of its own:
    :meth:`StatesHandle.of`. For parameters on a CPU the first call on a machine builds the codec's
    C++ library, in some seconds.

    Args:
        optimizer: a torch optimizer, or a wrapper that holds one.
        policy: bits, a format, a mapping or a Policy (``optimizer_state``, ``min_bytes``,
            ``sites``). ``sites`` takes names of parameters, and names of states in the form
            ``parameter.key``: ``{"*.exp_avg_sq": 8, "embedding.weight.*": None}``. A parameter
            without a name is called ``parameter 3``, and a pattern may then name its state by the
            key alone. With ``nonfinite="raise"`` a step that leaves NaN or Inf in a state raises
            NonFiniteError. Then the step is done, and all states of the optimizer stay decoded.
        offload: keep the payloads in host memory between steps.
        packed_state_dict: True: ``optimizer.state_dict()`` holds payloads (a quarter of the size at
            8 bits), and training continues from them bit for bit. False: ``optimizer.state_dict()``
            holds decoded tensors, which any optimizer can load. ``load_state_dict`` takes both.

    Returns:
        A :class:`StatesHandle`.

    Raises:
        HookError: ``optimizer`` is no optimizer.
        StateError: the states are quantized already.
        PolicyError, FormatError: the policy is not understood.
        NonFiniteError: a state has NaN or Inf and the format says "raise"; nothing was changed.
    """
    chosen = as_policy(policy)
    parts, wrappers = parts_of(optimizer)
    for part in parts:
        if handle_of(part) is not None:
            raise StateError(
                "the states are quantized already",
                [type(part).__name__],
                "Call remove() of the first handle before: StatesHandle.of(optimizer) returns it.",
            )
    handle = StatesHandle(chosen, offload=offload, packed_state_dict=packed_state_dict)
    handle._start(parts, wrappers)
    return handle


_COUNT = "rfcompile_num_packed"
"""In the first group of a packed state_dict: how many tensors were packed, which seeds rounding."""


def takes_packed(optimizer: Optimizer) -> bool:
    """Its ``load_state_dict`` keeps packed states as they are."""
    return all(handle_of(part) is not None for part in parts_of(optimizer)[0])


class StatesHandle(Handle):
    """What :func:`quantize_states` returns: the report, and ``remove()``."""

    def __init__(self, policy: Policy, *, offload: bool, packed_state_dict: bool) -> None:
        self._policy, self._offload, self._packs_dict = policy, offload, packed_state_dict
        self._num_packed = 0
        self._weights: dict[tuple[int, str], Verdict] = {}
        self._forget()

    def _forget(self) -> None:
        self._optimizers: list[Optimizer] = []
        self._loading: dict[Tensor, dict[str, Packed]] = {}
        self._loading_count: int | None = None
        self._wrapper_steps = False
        self._hooks: list[Any] = []

    @staticmethod
    def of(optimizer: Optimizer) -> StatesHandle:
        """Return the handle of an optimizer with quantized states; a copy has a handle of its own.

        Raises:
            StateError: the states of ``optimizer`` are not quantized.
        """
        part = parts_of(optimizer)[0][0]
        handle = handle_of(part)
        if not isinstance(handle, StatesHandle):
            raise StateError(
                "the states are not quantized", [type(part).__name__], "Call quantize_states."
            )
        return handle

    def remove(self) -> None:
        """Decode the states for good; afterwards the optimizer is a plain one again."""
        for hook in self._hooks:
            hook.remove()
        for optimizer in self._optimizers:
            self._unpack(optimizer)
            drop(optimizer)
        self._policy = Policy()

    def report(self) -> Report:
        """Return a report: a line for each state, with its bytes at rest or why it stays exact."""
        sites: list[Site] = []
        owners: list[Owner] = []
        compared: list[str] = []
        for part, owner, parameter in self._owners():
            state = self._optimizers[part].state.get(parameter, {})
            owners.append(owner)
            if not state:
                compared += names_before(self._policy, owner)
            for key, value in state.items():
                sites.append(self._site(part, owner, key, value, parameter))
                compared.append(compared_name(self._policy, owner, key))
        return made(self._policy, sites, owners, compared)

    # ---- to and from optimizers ----------------------------------------------------------

    def _start(self, parts: list[Optimizer], wrappers: list[Optimizer]) -> None:
        self._optimizers = list(parts)
        rule = "Nothing was changed: put finite values in it, or use nonfinite='propagate'."
        for part in parts:
            list(self._to_pack(part, rule))  # raises before anything is changed
        self._optimizers = []
        for part in parts:
            self.attach(part)
            self._pack(part)
        for wrapper in wrappers:
            self._attach_wrapper(wrapper)

    def attach(self, optimizer: Optimizer) -> None:
        """Hook an optimizer, as it is; a copy attaches itself."""
        load_kernels_for(p.device for group in optimizer.param_groups for p in group["params"])
        self._optimizers.append(optimizer)
        self._hooks += [
            optimizer.register_step_pre_hook(lambda o, *_: self._unpack(o)),
            optimizer.register_step_post_hook(lambda o, *_: self._after_step(o)),
            optimizer.register_load_state_dict_pre_hook(self._before_loading),
            optimizer.register_load_state_dict_post_hook(self._after_loading),
            optimizer.register_state_dict_post_hook(self._outside),
        ]
        carry(optimizer, self)

    def _attach_wrapper(self, wrapper: Optimizer) -> None:
        """States stay decoded until the wrapper's step is over: Lookahead reads them after the
        step of its optimizer. Wrappers without hooks do nothing of the kind."""
        try:
            self._hooks += [
                wrapper.register_step_pre_hook(lambda *_: self._wrapper_step(True)),
                wrapper.register_step_post_hook(lambda *_: self._wrapper_step(False)),
            ]
        except AttributeError:
            return

    def __getstate__(self) -> dict[str, Any]:
        """A copy has the settings, and the optimizers that are copied along."""
        names = ("_policy", "_offload", "_packs_dict", "_num_packed", "_weights")
        state = {name: getattr(self, name) for name in names}
        return {**state, "_weights": dict(self._weights)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    # ---- steps ---------------------------------------------------------------------------

    def _wrapper_step(self, starts: bool) -> None:
        self._wrapper_steps = starts
        for optimizer in self._optimizers:
            if starts:
                self._unpack(optimizer)
            else:
                self._pack(optimizer)

    def _after_step(self, optimizer: Optimizer) -> None:
        if not self._wrapper_steps and not _is_within_a_step(optimizer):
            self._pack(optimizer)

    @torch.no_grad()
    def _pack(self, optimizer: Optimizer) -> None:
        rule = (
            "The step is done and the states of this optimizer stay decoded: put finite values in "
            "them, load a checkpoint, or use nonfinite='propagate' to carry it as NaN."
        )
        for state, key, fmt in list(self._to_pack(optimizer, rule)):
            self._num_packed += 1
            packed = pack(state[key], fmt, self._num_packed)
            if self._offload:
                packed["payload"] = packed["payload"].cpu()
            state[key] = packed

    def _to_pack(
        self, optimizer: Optimizer, rule: str
    ) -> Iterator[tuple[dict[str, Any], str, QuantFormat]]:
        """States that are not packed and should be, and their formats.

        Raises:
            NonFiniteError: as a format asks for, with ``rule``.
        """
        part = self._optimizers.index(optimizer)
        self._look_for_weights(part)
        for place, owner, parameter in self._owners():
            if place != part:
                continue
            state = optimizer.state.get(parameter, {})
            for key, value in state.items():
                fmt = self._decide(part, owner, key, value, parameter).format
                if fmt is not None:
                    require_finite(value, fmt, f"state {key!r} of {owner.label}", rule)
                    yield state, key, fmt

    def _decide(self, part: int, owner: Owner, key: str, value: Any, parameter: Tensor) -> Decision:
        is_weight = self._weights.get((part, key), Verdict()).is_weight
        beside = self._optimizers[part].state.get(parameter, {})
        return decide(
            self._policy, owner, key, value, beside=beside, like=parameter, is_weight=is_weight
        )

    def _look_for_weights(self, part: int) -> None:
        """Decide for a key of moments whether this optimizer keeps weights there."""
        pairs: dict[str, list[tuple[Tensor, Tensor]]] = {}
        for parameter, state in self._optimizers[part].state.items():
            if isinstance(parameter, Tensor) and isinstance(state, dict):
                for key in state.keys() & MOMENTS:
                    if isinstance(state[key], Tensor):
                        pairs.setdefault(key, []).append((state[key], parameter))
        for key, found in pairs.items():
            verdict = self._weights.get((part, key), Verdict())
            if not verdict.is_final:
                self._weights[part, key] = verdict.after(holds_weights(found))

    @torch.no_grad()
    def _unpack(self, optimizer: Optimizer) -> None:
        for _, owner, parameter in self._owners(optimizer):
            state = optimizer.state.get(parameter, {})
            for key, value in state.items():
                if is_packed(value):
                    state[key] = unpack(value, parameter, f"state {key!r} of {owner.label}")

    # ---- state_dicts ---------------------------------------------------------------------

    def _outside(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        """The state_dict that users get; the optimizer's own states stay as they are."""
        likes = [parameter for _, _, parameter in self._owners(optimizer)]
        if not self._packs_dict:
            return converted(state_dict, likes, unpack)
        first, *rest = state_dict["param_groups"]
        groups = [{**first, _COUNT: self._num_packed}, *rest]
        packed = converted(state_dict, likes, lambda value, like, _: sealed(value, like))
        return {**packed, "param_groups": groups}

    def _before_loading(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Check and decode all of it before torch changes anything."""
        likes = [parameter for _, _, parameter in self._owners(optimizer)]
        plain, self._loading = to_load(state_dict, likes, self._policy)
        groups = [dict(group) for group in state_dict["param_groups"]]
        counts = [group.pop(_COUNT, None) for group in groups]
        count = next(iter(counts), None)
        self._loading_count = count if type(count) is int else None
        return {**plain, "param_groups": groups}

    def _after_loading(self, optimizer: Optimizer) -> None:
        """Take payloads as they are: coding what they decode to would not always return them."""
        for parameter, packed in self._loading.items():
            for key, value in packed.items():
                device = "cpu" if self._offload else parameter.device
                payload = value["payload"].to(device, copy=True)
                optimizer.state[parameter][key] = Packed({**value, "payload": payload})
        count, self._loading, self._loading_count = self._loading_count, {}, None
        if count is not None:
            self._num_packed = count
        self._pack(optimizer)

    # ---- its parameters ------------------------------------------------------------------

    def _owners(self, only: Optimizer | None = None) -> Iterator[tuple[int, Owner, Tensor]]:
        """The parameters in the order of state_dict, with the number of their optimizer."""
        index = 0
        for part, optimizer in enumerate(self._optimizers):
            for group in optimizer.param_groups:
                names = group.get("param_names") or [""] * len(group["params"])
                for name, parameter in zip(names, group["params"], strict=True):
                    if only is None or optimizer is only:
                        yield part, Owner(name, index), parameter
                    index += 1

    def _site(self, part: int, owner: Owner, key: str, value: Any, parameter: Tensor) -> Site:
        decision = self._decide(part, owner, key, value, parameter)
        if decision.format is not None:  # and yet it is not packed
            decision = exact("out of reach", "decoded after an error")
        return site_of(owner, key, value, decision)


def _is_within_a_step(optimizer: Optimizer) -> bool:
    """The step that ends was called by another one of the same optimizer: ``super().step()`` in a
    subclass, whose code may read the states next. Each runs in a frame of torch that calls hooks.
    """
    steps, frame = 0, sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        is_step = frame.f_code.co_name == "wrapper" and frame.f_globals is vars(torch_optimizer)
        steps += is_step and frame.f_locals.get("self") is optimizer
    return steps > 1
