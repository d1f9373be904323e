"""Residual adds of a model, seen while it runs: an oracle for ``rf.find_residuals``.

It shares no code with the package and reads no graph: it watches the aten operators of one forward
pass. Each tensor knows of which tensors it is a copy, and from which it was computed through a
contraction (a matrix product, a convolution, attention, pooling). ``a + b`` is residual if ``a`` is
a copy of a tensor that ``b`` was computed from through a contraction, or the other way round. Skips
through a projection are outside this rule.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import reduce
from operator import or_
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

CONTRACTIONS = (
    *("mm", "bmm", "addmm", "baddbmm", "addbmm", "mv", "addmv", "dot", "_grouped_mm"),
    *("convolution", "_convolution", "mkldnn_convolution", "avg_pool", "max_pool", "_fft"),
    *("adaptive_avg_pool", "_adaptive_avg_pool", "_scaled_dot_product"),
)
COPIES = frozenset(
    (
        *("view", "_unsafe_view", "reshape", "_reshape_alias", "expand", "permute", "transpose"),
        *("t", "slice", "select", "unsqueeze", "squeeze", "split", "split_with_sizes", "unbind"),
        *("clone", "_to_copy", "detach", "alias", "roll", "flip", "constant_pad_nd", "unfold"),
        *("as_strided", "lift_fresh", "masked_fill", "contiguous", "chunk", "unsafe_split"),
    )
)
SCALES = frozenset(("mul", "div"))
CONSTANTS = ("zeros_like", "ones_like", "empty_like", "full_like", "rand", "new_", "scalar_tensor")
"""Their values depend on no tensor."""
ADDS = frozenset(("add", "sub", "rsub"))


@dataclass(frozen=True)
class _Facts:
    """Sets of tensors as bits of a number: those it is a copy of, those it comes from, and those
    of them that went through a contraction."""

    copied: int = 0
    seen: int = 0
    contracted: int = 0


_CONSTANT = _Facts()


class ResidualOracle(TorchDispatchMode):
    """``found`` has a row for each residual add: the lines that led to it, innermost first."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[list[str]] = []
        self._facts = WeakIdKeyDictionary()
        self._count = 0

    def watch(self, *tensors: Tensor) -> None:
        """Inputs of the model."""
        for tensor in tensors:
            self._facts[tensor] = self._new()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        inputs = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        known = [self._facts.get(x, _CONSTANT) for x in inputs]
        outputs = [x for x in pytree.tree_leaves(result) if isinstance(x, Tensor)]
        name = func._schema.name.partition("::")[2].removesuffix("_")
        if any(facts.seen for facts in known) and not name.startswith(CONSTANTS):
            facts = self._result(name, inputs, known, outputs)
            for output in outputs:
                self._facts[output] = facts
        return result

    def _result(
        self, name: str, inputs: list[Tensor], known: list[_Facts], outputs: list[Tensor]
    ) -> _Facts:
        varying = [facts for facts in known if facts.seen]
        if len(varying) == 1 and (name in COPIES or name in SCALES):
            return varying[0]
        if name == "copy" and len(known) > 1:
            return known[1]
        seen = reduce(or_, (facts.seen for facts in known))
        if name.startswith(CONTRACTIONS):
            return self._new(seen, seen)
        if name in ADDS and len(varying) == 2 and self._is_residual(inputs, known, outputs):
            self.found.append(_lines())
        return self._new(seen, reduce(or_, (facts.contracted for facts in known)))

    def _is_residual(
        self, inputs: list[Tensor], known: list[_Facts], outputs: list[Tensor]
    ) -> bool:
        (output,) = outputs
        a, b = known[:2]
        return output.is_floating_point() and any(
            skip.copied & branch.contracted and tensor.shape == output.shape
            for skip, branch, tensor in ((a, b, inputs[0]), (b, a, inputs[1]))
        )

    def _new(self, seen: int = 0, contracted: int = 0) -> _Facts:
        own = 1 << self._count
        self._count += 1
        return _Facts(own, seen | own, contracted)


def residual_adds(model: Callable[..., Any], inputs: dict[str, Tensor]) -> list[list[str]]:
    """The residual adds in one call of the model, each as the lines that led to it."""
    oracle = ResidualOracle()
    oracle.watch(*(x for x in pytree.tree_leaves(inputs) if isinstance(x, Tensor)))
    with torch.no_grad(), oracle:
        model(**inputs)
    return oracle.found


def differences(seen: list[list[str]], found: Iterable[str]) -> tuple[list[str], list[str]]:
    """Adds that the oracle saw and nobody found, and lines that were found and it did not see."""
    left, missed = Counter(found), []
    for lines in seen:
        line = next((line for line in lines if left[line]), None)
        if line is None:
            missed.append(lines[0])
        else:
            left[line] -= 1
    return missed, sorted(left.elements())


_TORCH = str(Path(torch.__file__).parent)


def _lines() -> list[str]:
    """What calls the operator now, innermost first, without torch and this file."""
    found = []
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        file = frame.f_code.co_filename
        if not file.startswith((_TORCH, __file__, "<")):
            path = Path(file)
            found.append(f"{Path(*path.parts[-2:]).as_posix()}:{frame.f_lineno}")
        frame = frame.f_back
    return found
