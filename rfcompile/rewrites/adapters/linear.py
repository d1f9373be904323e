"""The module that replaces a linear when an adapter is added to its weight.

Private torch symbols used here, tried on torch 2.13: ``_parameters``, ``_save_to_state_dict`` and
``_load_from_state_dict`` of a module, which torch's own modules override; ``_fqn_modifiers``, by
which torch.distributed.checkpoint learns that a child's name is not in the state_dict.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from rfcompile.errors import OptionError
from rfcompile.graph.models import uncompiled, without_wrappers
from rfcompile.nn.low_rank import FactoredLinear, low_rank_weight
from rfcompile.rewrites.adapters.factor import AnyFactor, Factor
from rfcompile.rewrites.low_rank.targets import is_conv1d

BASE = "base_layer"


class Base(Factor):
    """The weight of the linear that was there; in a state_dict it has the name that it had."""

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        own: dict[str, Any] = {}
        super()._save_to_state_dict(own, "", keep_vars)
        destination[f"{_outside(prefix)}weight"] = own["weight"]

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, metadata: Any, strict: bool, missing_keys: list[str],
        *rest: Any,
    ) -> None:  # fmt: skip
        missing: list[str] = []
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, *rest)
        missing_keys += [f"{_outside(prefix)}weight" for _ in missing]


def _outside(prefix: str) -> str:
    return prefix.removesuffix(f"{BASE}.")


class AdaptedLinear(FactoredLinear):
    """``y = x (W + dW)^T + b``, where ``dW`` is ``low_rank_weight(B, A, omega, gain)``.

    ``lora_A()`` is A, [rank, in], and ``lora_B()`` is B, [out, rank]. With ``lora_magnitude`` m,
    [out], (DoRA) the weight is ``m_i (W + dW)_i / |(W + dW)_i|``, the norm of row i without a
    gradient. Names in the state_dict are those of the linear, ``lora_A.weight`` and so on, and
    ``_extra_state``, which has omega and gain.

    ``weight`` reads as the weight that the module computes with, so that code which takes it
    (``nn.MultiheadAttention``, ``F.linear(x, self.proj.weight)``) sees the adapter. W itself is the
    parameter ``base_layer.weight``, for FSDP and others look parameters up by
    ``getattr(module, name)``: no name may stand for two tensors. In a state_dict, and for
    torch.distributed.checkpoint, W is ``weight`` as before, so that those of the model without
    adapters fit; loading takes either name.

    The module is the linear that it was, of another class.
    """

    base_layer: Base
    lora_A: AnyFactor
    lora_B: AnyFactor
    lora_magnitude: nn.Parameter | None
    bias: nn.Parameter | None
    is_transposed: bool
    dense_class: type[nn.Module]

    @staticmethod
    def become(
        linear: nn.Module,
        left: AnyFactor,
        right: AnyFactor,
        omega: float | None,
        gain: float,
        magnitude: Tensor | None = None,
    ) -> AdaptedLinear:
        """Change a linear in place: ``left`` is B, ``right`` is A."""
        dense_class, is_transposed = type(linear), is_conv1d(linear)
        module: Any = linear
        module.__class__ = AdaptedLinear
        module.base_layer = Base(module._parameters.pop("weight"))
        module.lora_A, module.lora_B = right, left
        parameter = None if magnitude is None else nn.Parameter(magnitude)
        module.register_parameter("lora_magnitude", parameter)
        module.omega, module.gain = omega, gain
        module.is_transposed, module.dense_class = is_transposed, dense_class
        return cast(AdaptedLinear, module)

    def base(self) -> Tensor:
        """The weight without the adapter, [out, in]."""
        weight: Tensor = self.base_layer.weight
        return weight.t() if self.is_transposed else weight

    def delta(self) -> Tensor:
        """What the adapter adds to the weight, [out, in]."""
        return low_rank_weight(*self._factors(), self.omega, self.gain)

    def _factors(self) -> tuple[Tensor, Tensor]:
        """B and A in the dtype of the weight, whatever the model was cast to since."""
        dtype = self.base().dtype
        return self.lora_B().to(dtype), self.lora_A().to(dtype)

    def matrix(self) -> Tensor:
        """The weight with the adapter, [out, in]."""
        weight: Tensor = self.base() + self.delta()
        if self.lora_magnitude is None:
            return weight
        norm: Tensor = weight.detach().norm(dim=1)
        return weight * (self.lora_magnitude / norm).unsqueeze(1)

    @property
    def weight(self) -> Tensor:
        """The same in the linear's own layout, [in, out] of a ``Conv1D``."""
        weight = self.matrix()
        return weight.t() if self.is_transposed else weight

    def forward(self, x: Tensor) -> Tensor:
        if self.omega is not None or self.lora_magnitude is not None:
            return F.linear(x, self.matrix(), self.bias)
        b, a = self._factors()
        thin = F.linear(x, a / self.gain)
        return F.linear(x, self.base(), self.bias) + F.linear(thin, b)

    @torch.no_grad()
    def merge(self) -> None:
        """Become the dense linear again, of the weight that this one computes, in a new tensor."""
        weight = self.weight.contiguous()
        requires_grad = self.base().requires_grad
        del self.lora_A, self.lora_B, self.base_layer, self._parameters["lora_magnitude"]
        for name in ("omega", "gain", "is_transposed"):
            delattr(self, name)
        module: Any = self
        module.__class__ = self.__dict__.pop("dense_class")
        own = dict(module._parameters)
        module._parameters.clear()
        module.weight = nn.Parameter(weight, requires_grad)  # the first one, as it was
        module._parameters.update(own)

    @staticmethod
    def _fqn_modifiers() -> dict[str, str]:
        return {"weight": BASE}

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, metadata: Any, strict: bool, missing_keys: list[str],
        unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        name, own = f"{prefix}weight", f"{prefix}{BASE}.weight"
        if name in state_dict:
            if own in state_dict:
                unexpected_keys.append(own)
            state_dict[own] = state_dict.pop(name)  # the base layer loads it next
        super()._load_from_state_dict(
            state_dict, prefix, metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def extra_repr(self) -> str:
        kind = "" if self.omega is None else f"omega={self.omega:.4g}, "
        outputs, inputs = self.base().shape
        return f"in={inputs}, out={outputs}, {kind}gain={self.gain:.4g}"


def adapted(model: nn.Module) -> dict[str, AdaptedLinear]:
    """The linears that have an adapter, by path; wrappers of ``torch.compile`` are in none."""
    inner = uncompiled(model)
    with without_wrappers(inner):
        return {path: m for path, m in inner.named_modules() if isinstance(m, AdaptedLinear)}


def adapters_of(model: nn.Module, *, may_be_sharded: bool = False) -> dict[str, AdaptedLinear]:
    """The same.

    Raises:
        OptionError: there are none, or, unless they may be, they are sharded.
    """
    found = adapted(model)
    if not found:
        name = type(uncompiled(model)).__name__
        raise OptionError(
            "model", name, "it has no adapters: rf.transform(model, rf.Adapters(8)) first."
        )
    for path, module in found.items():
        is_sharded = any(isinstance(parameter, DTensor) for parameter in module.parameters())
        if is_sharded and not may_be_sharded:
            rule = "the adapter is sharded: do this before, or gather its full_tensor() first."
            raise OptionError("model", path, rule)
    return found
