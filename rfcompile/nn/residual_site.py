"""ResidualSite: the submodule that takes the place of a residual add."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor, fx, nn

from rfcompile.errors import OptionError

Mode = Literal["keep", "gain", "free", "mix"]


class ResidualSite(nn.Module):
    """A residual add ``a + alpha * b`` as a module, so that its skip can be scaled or dropped.

    With the skip ``s`` (operand 0 or 1) and the branch ``f`` (the other one):

    - "keep": ``s + f``, the add that the model had, bit for bit.
    - "gain": ``gain * s + f`` with a parameter ``gain`` of shape (1,), 1 at first, where it is the
      same add bit for bit.
    - "free": ``f``, of the shape and dtype of the sum.
    - "mix": ``f W^T``, likewise, with a parameter ``weight`` [width, width]: dense mixing in the
      skip's place.

    Source: the modes are those of arXiv:2605.25880 (residual-free, dense mixing) as far as its
    abstract tells them; "gain" is the skip gain of arXiv:2311.01906, appendix.
    """

    gain: nn.Parameter
    weight: nn.Parameter

    def __init__(self, operand: int = 0) -> None:
        super().__init__()
        self.operand = operand
        self.mode: Mode = "keep"

    def become(
        self, mode: Mode, *, width: int | None = None, like: Tensor | None = None
    ) -> ResidualSite:
        """Change the mode; "gain" and "mix" make their parameter, on the device of ``like``.

        Raises:
            OptionError: no such mode, or "mix" without a width.
        """
        if mode not in get_args(Mode):
            raise OptionError("mode", mode, f"choose one of {', '.join(get_args(Mode))}.")
        for name in ("gain", "weight"):
            if name in self._parameters:
                delattr(self, name)
        device, dtype = (like.device, like.dtype) if like is not None else (None, None)
        if mode == "gain":
            self.gain = nn.Parameter(torch.ones(1, device=device, dtype=dtype))
        if mode == "mix":
            if width is None:
                raise OptionError("width", width, "mixing needs the width of the stream.")
            # In float32: torch has no QR decomposition of narrower numbers.
            weight = nn.init.orthogonal_(torch.empty(width, width, device=device))
            self.weight = nn.Parameter(weight.to(dtype))
        self.mode = mode
        return self

    def forward(
        self, a: Tensor, b: Tensor, *more: Any, function: str = "", **options: Any
    ) -> Tensor:
        """``a + alpha * b``, alpha third or by name; or a ``function`` of torch that adds."""
        if function:
            return self._of(function, [a, b, *more], options)
        alpha = more[0] if more else options.get("alpha", 1)
        if self.mode == "gain":
            if self.operand == 0:
                a = self.gain.to(a.dtype) * a
            else:
                b = self.gain.to(b.dtype) * b
        elif self.mode != "keep":
            skip, branch = (a, b if alpha == 1 else alpha * b) if self.operand == 0 else (b, a)
            return self._mixed(_as_in_sum(branch, skip))
        # Candidates that turn out to be no residual adds pass here too: numbers, lists.
        return a + b if alpha == 1 else torch.add(a, b, alpha=alpha)

    def _of(self, function: str, operands: list[Any], options: dict[str, Any]) -> Tensor:
        """``torch.lerp`` and its like: without the skip they add to zeros."""
        if self.mode != "keep":
            skip = operands[self.operand]
            is_gain = self.mode == "gain"
            operands[self.operand] = (
                self.gain.to(skip.dtype) * skip if is_gain else torch.zeros_like(skip)
            )
        total: Tensor = getattr(operands[0], function)(*operands[1:], **options)
        return total if self.mode in ("keep", "gain") else self._mixed(total)

    def _mixed(self, branch: Tensor) -> Tensor:
        if self.mode == "free":
            return branch
        mixed = nn.functional.linear(branch, self.weight.to(branch.dtype))
        return mixed.to(branch.dtype)  # autocast has another

    def extra_repr(self) -> str:
        return f"mode={self.mode!r}, skip={self.operand}"


@fx.wrap
def _as_in_sum(branch: Tensor, skip: Tensor) -> Tensor:
    """The branch as broad and as precise as the sum was: a stream in float32 stays in float32."""
    dtype = torch.promote_types(branch.dtype, skip.dtype)
    branch = branch if branch.dtype == dtype else branch.to(dtype)
    return branch if branch.shape == skip.shape else branch.expand(skip.shape)
