"""The module of a linear whose weight is sin(omega U V) / g."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rfcompile.graph.models import uncompiled, without_wrappers
from rfcompile.nn.low_rank import FactoredLinear, low_rank_weight
from rfcompile.rewrites.low_rank.targets import is_conv1d


class LowRankLinear(FactoredLinear):
    """``y = x W^T + b``, with ``W`` of two factors; see :func:`low_rank_weight`.

    Parameters: ``left`` [out, rank], ``right`` [rank, in], and the ``bias`` that there was. Omega
    and gain are in the state_dict as ``_extra_state``. The weight is formed once a call, so a call
    costs what the dense linear costs and a product more; what is small is what is kept:
    parameters, gradients, optimizer states, checkpoints, traffic.

    The module is the linear that it was, hooks and attributes included, of another class, which
    ``weight`` reads as before. (``torch.nn.utils.parametrize`` would keep the class, too, but its
    modules are not picklable, and its names in a state_dict are long.)
    """

    left: nn.Parameter
    right: nn.Parameter
    bias: nn.Parameter | None
    is_transposed: bool
    dense_class: type[nn.Module]

    @staticmethod
    def become(
        linear: nn.Module, left: Tensor, right: Tensor, omega: float | None, gain: float
    ) -> LowRankLinear:
        """Change a linear in place; the factors take its dtype and device."""
        weight = linear._parameters.pop("weight")
        assert weight is not None
        dense_class, is_transposed = type(linear), is_conv1d(linear)
        module: Any = linear
        module.__class__ = LowRankLinear
        for name, factor in (("left", left), ("right", right)):
            parameter = nn.Parameter(factor.to(weight.device, weight.dtype), weight.requires_grad)
            module.register_parameter(name, parameter)
        module.omega, module.gain = omega, gain
        module.is_transposed, module.dense_class = is_transposed, dense_class
        return cast(LowRankLinear, module)

    @property
    def weight(self) -> Tensor:
        """The dense weight, as the linear had it, [out, in], or [in, out] of a ``Conv1D``."""
        weight = self.matrix()
        return weight.t() if self.is_transposed else weight

    def matrix(self) -> Tensor:
        """The dense weight, [out, in]."""
        return low_rank_weight(self.left, self.right, self.omega, self.gain)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.matrix(), self.bias)

    @torch.no_grad()
    def merge(self) -> None:
        """Become the dense linear again, of the weight that this one computes."""
        weight = self.weight.contiguous()
        requires_grad = self.left.requires_grad
        for name in ("left", "right"):
            del self._parameters[name]
        for name in ("omega", "gain", "is_transposed"):
            delattr(self, name)
        module: Any = self
        module.__class__ = self.__dict__.pop("dense_class")
        module.weight = nn.Parameter(weight, requires_grad)

    def extra_repr(self) -> str:
        (outputs, rank), inputs = self.left.shape, self.right.shape[1]
        sine = "no sine" if self.omega is None else f"omega={self.omega:.4g}"
        return f"in={inputs}, out={outputs}, rank={rank}, {sine}, gain={self.gain:.4g}"


def merge_low_rank(model: nn.Module) -> tuple[str, ...]:
    """Make every low-rank linear of ``model`` dense again, in place: the same function, bit for bit
    in one dtype. Returns their paths; none is an empty tuple.
    """
    inner = uncompiled(model)
    with without_wrappers(inner):
        found = {p: m for p, m in inner.named_modules() if isinstance(m, LowRankLinear)}
    for module in found.values():
        module.merge()
    return tuple(found)
