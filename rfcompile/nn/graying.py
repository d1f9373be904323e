"""Token Graying as a torch operator: a power makes the spectrum of a token matrix flatter."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from rfcompile.codec.operators import LIBRARY, without_autocast
from rfcompile.errors import GrayingError, ShapeError

_TAGS = (torch.Tag.pt2_compliant_tag,)

FLOOR = 1e-5
"""Values below this part of the largest are scaled as it is: the power has an infinite slope at 0,
and what is so small is mostly rounding error, which it would amplify."""


def grayed(values: Tensor, largest: Tensor, epsilon: float) -> Tensor:
    """``x (max(|x| / m, FLOOR))^(epsilon - 1)``, which is ``sign(x) m (|x| / m)^epsilon``."""
    scale = torch.where(largest == 0, 1.0, largest)
    return values * (values.abs() / scale).clamp(min=FLOOR).pow(epsilon - 1)


def gray_tokens_formula(x: Tensor, visible: Tensor | None, epsilon: float, form: str) -> Tensor:
    """Each sample ``X`` with its spectrum raised to ``epsilon``, relative to its largest value.

    - "svd": ``X = U S V^T`` becomes ``U s_max (S / s_max)^epsilon V^T``: log condition number
      times ``epsilon``.
    - "dct": ``C = D_n X D_d^T`` becomes ``D_n^T (sign(C) c_max (|C| / c_max)^epsilon) D_d``,
      elementwise, with the orthonormal DCT-II matrices ``D``.

    Computed in float32 at least. NaN or Inf in a sample makes it NaN.

    Args:
        x: ``[.., n, d]`` floating point; any n and d. dtype out = dtype in.
        visible: ``[.., n]`` bool: the others are padding. They stay as they are, and the visible
            ones become what they would without them. None: all are visible.
    Raises:
        ShapeError, GrayingError: a dtype.

    Source: arXiv:2505.01996. Its DCT rule is not known to us: the one here is the SVD's, read
    elementwise. The factors s_max and c_max, which keep the size of the tokens, are ours (the
    paper's normalizes to 1), and so is FLOOR.
    """
    _check(x, visible)
    wide = x if x.dtype == torch.float64 else x.float()
    kept = wide if visible is None else wide.masked_fill(~visible.unsqueeze(-1), 0)
    with without_autocast(x):
        new = gray_svd(kept, epsilon) if form == "svd" else _by_dct(kept, visible, epsilon)
    if visible is not None:
        new = torch.where(visible.unsqueeze(-1), new, wide)
    return new.to(x.dtype)


def _check(x: Tensor, visible: Tensor | None) -> None:
    if not x.is_floating_point():
        raise GrayingError(f"the token matrix is {x.dtype}: give a floating-point type.")
    if x.dim() < 2:
        raise ShapeError("the token matrix", x.shape, "give [.., tokens, features].")
    if visible is not None and (visible.dtype != torch.bool or visible.shape != x.shape[:-1]):
        raise ShapeError(
            f"the padding mask ({visible.dtype})",
            visible.shape,
            f"give bool {tuple(x.shape[:-1])}, True where a token is.",
        )


# ---- by discrete cosines -----------------------------------------------------------------------


def dct_matrix(positions: Tensor, length: Tensor, n: Any, dtype: torch.dtype) -> Tensor:
    """``D_kt = sqrt((1 if k = 0 else 2) / N) cos(pi (2 t + 1) k / (2 N))`` for k < N, else 0.

    Args:
        positions: t, ``[.., tokens]`` int64; length: N, ``[.., 1]``; n: rows of the result.
    """
    k = torch.arange(n, device=positions.device)[:, None]
    t, N = positions.unsqueeze(-2), length.unsqueeze(-1).clamp(min=1)
    # The cosine has a period of 4 N steps: exact integers keep large angles precise.
    angle = ((2 * t + 1) * k % (4 * N)).to(dtype) * (math.pi / 2) / N
    norm = torch.where(k == 0, 1.0, 2.0).to(dtype) / N
    return angle.cos() * norm.sqrt() * (k < N)


def _whole_dct(n: Any, like: Tensor) -> Tensor:
    # Where something traces it the size may be a symbol, and the matrix none that can be kept.
    if type(like) is Tensor and _get_current_dispatch_mode() is None:
        return _kept_dct(n, like.dtype, like.device)
    return dct_matrix(*_all(n, like.device), n, like.dtype)


@lru_cache(maxsize=16)
def _kept_dct(n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return dct_matrix(*_all(n, device), n, dtype)


def _all(n: Any, device: torch.device) -> tuple[Tensor, Tensor]:
    return torch.arange(n, device=device), torch.full((1,), n, device=device)


def _by_dct(x: Tensor, visible: Tensor | None, epsilon: float) -> Tensor:
    n, d = x.shape[-2:]
    features = _whole_dct(d, x)
    if visible is None:
        tokens = _whole_dct(n, x)
    else:  # a matrix for each sample, for the number of tokens that it has
        tokens = dct_matrix(visible.cumsum(-1) - 1, visible.sum(-1, keepdim=True), n, x.dtype)
        tokens = tokens * visible.unsqueeze(-2)
    spectrum = tokens @ (x @ features.mT)
    largest = spectrum.abs().amax((-2, -1), keepdim=True) if n * d > 0 else spectrum
    return tokens.mT @ grayed(spectrum, largest, epsilon) @ features


# ---- by singular values ------------------------------------------------------------------------
# Autograd's derivative of the SVD divides by differences of singular values, which may be equal.
# That of the whole function does not: it has divided differences of it, finite everywhere.


def _gray_svd(x: Tensor, epsilon: float) -> Tensor:
    finite = x.isfinite().all(-1, keepdim=True).all(-2, keepdim=True)  # LAPACK refuses others
    U, S, Vh = torch.linalg.svd(torch.where(finite, x, 0), full_matrices=False)
    new = U * grayed(S, S[..., :1], epsilon).unsqueeze(-2) @ Vh
    return torch.where(finite, new, torch.nan)


def _gray_svd_backward(g: Tensor, x: Tensor, epsilon: float) -> Tensor:
    """The adjoint of the derivative at ``x``, which is the derivative's own form.

    With ``M = U^T G V``: ``U (K o sym(M) + L o skew(M)) V^T`` and, outside of the spaces of U and
    V, ``f(s) / s`` times ``G``; ``K_ij = (f(s_i) - f(s_j)) / (s_i - s_j)``, its limit ``f'`` where
    they are equal, ``L_ij = (f(s_i) + f(s_j)) / (s_i + s_j)``. The largest value, by which all are
    measured, adds ``(1 - epsilon) sum_i M_ii f(s_i) / s_max`` to its own direction.
    """
    finite = x.isfinite().all(-1, keepdim=True).all(-2, keepdim=True)
    U, S, Vh = torch.linalg.svd(torch.where(finite, x, 0), full_matrices=False)
    V, largest = Vh.mT, torch.where(S[..., :1] == 0, 1.0, S[..., :1])
    relative = S / largest
    ratio = relative.clamp(min=FLOOR).pow(epsilon - 1)  # f(s) / s
    f = relative * ratio
    above = relative >= FLOOR
    slope = torch.where(above, epsilon * ratio, ratio)
    gap, total = (relative.unsqueeze(-1) + sign * relative.unsqueeze(-2) for sign in (-1, 1))
    is_equal = gap.abs() <= CLOSE * total
    K = torch.where(
        is_equal,
        (slope.unsqueeze(-1) + slope.unsqueeze(-2)) / 2,
        (f.unsqueeze(-1) - f.unsqueeze(-2)) / torch.where(is_equal, 1.0, gap),
    )
    is_zero = total == 0
    ratios = ratio.unsqueeze(-1).expand_as(total)
    L = torch.where(
        is_zero, ratios, (f.unsqueeze(-1) + f.unsqueeze(-2)) / torch.where(is_zero, 1.0, total)
    )
    M = U.mT @ g @ V
    inner = K * (M + M.mT) / 2 + L * (M - M.mT) / 2
    of_largest = torch.where(above, (1 - epsilon) * f, 0) * M.diagonal(dim1=-2, dim2=-1)
    # Below FLOOR f(s) = s FLOOR^(epsilon - 1): it does not depend on the largest.
    first = torch.zeros_like(inner)
    first[..., :1, :1] = of_largest.sum(-1)[..., None, None]
    grad = U @ (inner + first) @ Vh
    left, right = g - U @ (U.mT @ g), g - (g @ V) @ Vh
    n, d = x.shape[-2:]
    if n > d:
        grad = grad + left @ V * ratio.unsqueeze(-2) @ Vh
    elif d > n:
        grad = grad + U * ratio.unsqueeze(-2) @ (U.mT @ right)
    return torch.where(finite, grad, torch.nan)


CLOSE = 1e-3
"""Singular values this close, relative to their sum, count as equal: the mean of the slopes is
within the square of this of the divided difference, whose rounding error grows as they meet."""

LIBRARY.define("gray_svd(Tensor x, float epsilon) -> Tensor", tags=_TAGS)
LIBRARY.impl("gray_svd", _gray_svd, "CompositeExplicitAutograd")
LIBRARY.impl("gray_svd", lambda x, epsilon: x.new_empty(x.shape), "Meta")
LIBRARY.define("gray_svd_backward(Tensor g, Tensor x, float epsilon) -> Tensor", tags=_TAGS)
LIBRARY.impl("gray_svd_backward", _gray_svd_backward, "CompositeExplicitAutograd")
LIBRARY.impl("gray_svd_backward", lambda g, x, epsilon: x.new_empty(x.shape), "Meta")
gray_svd: Any = torch.ops.rfcompile.gray_svd.default
gray_svd_backward: Any = torch.ops.rfcompile.gray_svd_backward.default


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, ctx.epsilon = inputs
    ctx.save_for_backward(x)


def _gradients(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
    # To be differentiated again it is its parts, which autograd knows.
    backward: Any = _gray_svd_backward if torch.is_grad_enabled() else gray_svd_backward
    with without_autocast(g):
        return backward(g, *ctx.saved_tensors, ctx.epsilon), None


torch.library.register_autograd("rfcompile::gray_svd", _gradients, setup_context=_keep, lib=LIBRARY)

LIBRARY.define(
    "gray_tokens(Tensor x, Tensor? visible, float epsilon, str form) -> Tensor", tags=_TAGS
)
LIBRARY.impl("gray_tokens", gray_tokens_formula, "CompositeImplicitAutograd")
gray_tokens: Any = torch.ops.rfcompile.gray_tokens.default
