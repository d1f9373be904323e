"""Polynomial attention as torch operators, so that graphs show each attention as one node.

``polynomial_attention`` has the arguments of ``scaled_dot_product_attention`` and
``polynomial_weights`` those of a softmax. Both are made of other operators, which autograd and
Inductor see; the product with the values is ``polynomial_sum``, which keeps no N x N matrix.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rfcompile.codec.operators import LIBRARY, as_autocast, without_autocast
from rfcompile.errors import AttentionError, ShapeError
from rfcompile.nn import polynomial_linear
from rfcompile.nn.polynomial import (
    Problem,
    backward,
    forward,
    row_factors,
    visible_keys,
    weights_of,
    wide,
)

GAIN = "attention_gain"
"""Name of the parameter of shape (1,) of an attention with ``scale="learned"``."""
_TAGS = (torch.Tag.pt2_compliant_tag,)


def polynomial_weights_formula(
    scores: Tensor,
    power: int,
    scale: str,
    gain: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """What stands in place of ``softmax(scores, -1, dtype)``; see :func:`weights_of`."""
    weights = weights_of(scores, power, scale, gain)
    return weights if dtype is None else weights.to(dtype)


def polynomial_attention_formula(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    power: int = 3,
    rows: str = "row",
    gain: Tensor | None = None,
    form: str = "auto",
) -> Tensor:
    """``scaled_dot_product_attention`` with ``s^p`` in place of the softmax.

    With dropout the weights are in memory, as they are where torch's attention drops out on a CPU.

    Args:
        query: ``[.., L, E]``, key: ``[.., S, E]``, value: ``[.., S, V]``, one dtype; in a region of
            ``torch.autocast`` they get its dtype, as torch's attention does it.
        attn_mask: as for torch: bool (True is seen) or float (added to the scores; what is not
            above ``MASKED`` hides the key), broadcastable to ``[.., L, S]``.
        rows: see :class:`~rfcompile.experimental.PolynomialAttention`, its ``scale``; gain: (1,).
        form: how it is computed; "linear" only has an effect where it is possible.
    Raises:
        ShapeError, AttentionError: a dtype.
    """
    query, key, value = _operands(query, key, value, enable_gqa)
    _check_mask(query, key, attn_mask, is_causal)
    mask = None if attn_mask is None else _with_sizes(attn_mask, key.shape[-2])
    if scale is None:
        scale = 1 / math.sqrt(query.shape[-1])
    if rows == "sequence":
        count = torch.full((1, 1), key.shape[-2], device=query.device)
    else:
        count = visible_keys(query, key, mask, is_causal)
    factors = row_factors(count, power, rows, query)
    if gain is not None:
        factors = factors * wide(gain)
    if dropout_p:
        problem = Problem(query, key, value, factors, mask, is_causal, scale, power)
        whole = slice(0, query.shape[-2]), slice(0, key.shape[-2])
        weights = F.dropout(problem.scores(*whole)[0].pow(power) * factors, dropout_p)
        return weights.to(value.dtype) @ value
    y: Tensor = polynomial_sum(query, key, value, mask, factors, is_causal, scale, power, form)
    return y


def _with_sizes(mask: Tensor, keys: Any) -> Tensor:
    return mask.expand(*(mask.shape[:-1] if mask.dim() > 1 else (1,)), keys)


def _operands(q: Tensor, k: Tensor, v: Tensor, gqa: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value of the same dtype, heads and leading sizes."""
    q, k, v = (as_autocast(x) for x in (q, k, v))
    if not q.dtype == k.dtype == v.dtype or not q.is_floating_point():
        raise AttentionError(
            f"query, key and value are {q.dtype}, {k.dtype}, {v.dtype}: give one floating-point "
            "type."
        )
    shapes = [tuple(x.shape) for x in (q, k, v)]
    rule = "give query [.., L, E], key [.., S, E] and value [.., S, V]"
    if q.dim() < 2 or not q.dim() == k.dim() == v.dim():
        raise ShapeError("polynomial attention", shapes, rule)
    if q.shape[-1] != k.shape[-1] or k.shape[-2] != v.shape[-2]:
        raise ShapeError("polynomial attention", shapes, rule)
    if gqa:
        for name, x in (("key", k), ("value", v)):
            if x.dim() < 3 or not x.shape[-3] or q.shape[-3] % x.shape[-3]:
                what = f"its heads must divide those of the query, {tuple(q.shape)}."
                raise ShapeError(f"the {name}", x.shape, what)
        k, v = (x.repeat_interleave(q.shape[-3] // x.shape[-3], -3) for x in (k, v))
    if q.shape[:-2] == k.shape[:-2] == v.shape[:-2]:
        return q, k, v
    try:
        leading = torch.broadcast_shapes(*(x.shape[:-2] for x in (q, k, v)))
    except RuntimeError as error:
        rule += ", of leading sizes that broadcast"
        raise ShapeError("polynomial attention", shapes, rule) from error
    q, k, v = (x.expand(*leading, *x.shape[-2:]) for x in (q, k, v))
    return q, k, v


def _check_mask(q: Tensor, k: Tensor, mask: Tensor | None, is_causal: bool) -> None:
    if mask is None:
        return
    if is_causal:
        raise ShapeError(
            "the mask",
            mask.shape,
            "give attn_mask or is_causal=True, not both; put the causal part into the mask.",
        )
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise AttentionError(
            f"the attention mask is {mask.dtype}: give bool, True where a key is seen, or a "
            "floating-point mask that is added to the scores."
        )
    wanted = (*q.shape[:-1], k.shape[-2])
    sizes = zip(reversed(mask.shape), reversed(wanted), strict=False)
    if mask.dim() > len(wanted) or any(a != b and a != 1 for a, b in sizes):
        raise ShapeError("the mask", mask.shape, f"it must broadcast to the scores {wanted}.")


# ---- the product with the values -----------------------------------------------------------


def _sum(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    factors: Tensor,
    is_causal: bool,
    scale: float,
    power: int,
    form: str = "auto",
) -> Tensor:
    problem = Problem(q, k, v, factors, mask, is_causal, scale, power)
    is_linear = polynomial_linear.is_linear(problem, form)
    with without_autocast(q):
        return polynomial_linear.forward(problem) if is_linear else forward(problem)


def _sum_backward(
    g: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    factors: Tensor,
    is_causal: bool,
    scale: float,
    power: int,
    form: str,
    of_mask: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    problem = Problem(q, k, v, factors, mask, is_causal, scale, power)
    with without_autocast(q):
        if polynomial_linear.is_linear(problem, form):
            found = polynomial_linear.backward(problem, g)
        else:
            found = backward(problem, g, mask=of_mask)
    bias = factors.new_empty(0) if found.mask is None or mask is None else found.mask.to(mask.dtype)
    return found.q.to(q.dtype), found.k.to(q.dtype), found.v.to(q.dtype), found.factors, bias


def _fake_sum(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
    return v.new_empty((*q.shape[:-1], v.shape[-1]))


def _fake_sum_backward(
    g: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    factors: Tensor,
    *rest: Any,
) -> tuple[Tensor, ...]:
    bias = mask if rest[-1] and mask is not None else factors.new_empty(0)
    return tuple(x.new_empty(x.shape) for x in (q, k, v, factors, bias))


_PROBLEM = (
    "Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor factors, bool is_causal, float scale, "
    "int power"
)
LIBRARY.define(f"polynomial_sum({_PROBLEM}, str form='auto') -> Tensor", tags=_TAGS)
LIBRARY.impl("polynomial_sum", _sum, "CompositeExplicitAutograd")
LIBRARY.impl("polynomial_sum", _fake_sum, "Meta")
LIBRARY.define(
    f"polynomial_sum_backward(Tensor g, {_PROBLEM}, str form, bool of_mask)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=_TAGS,
)
LIBRARY.impl("polynomial_sum_backward", _sum_backward, "CompositeExplicitAutograd")
LIBRARY.impl("polynomial_sum_backward", _fake_sum_backward, "Meta")
polynomial_sum: Any = torch.ops.rfcompile.polynomial_sum.default
polynomial_sum_backward: Any = torch.ops.rfcompile.polynomial_sum_backward.default


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, k, v, mask, factors, *ctx.options = inputs
    ctx.of_mask = mask is not None and mask.is_floating_point() and ctx.needs_input_grad[3]
    ctx.save_for_backward(q, k, v, mask, factors)


def _gradients(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    # To be differentiated again it is its parts, which autograd knows.
    backward_of: Any = _sum_backward if torch.is_grad_enabled() else polynomial_sum_backward
    dq, dk, dv, factors, mask = backward_of(g, *ctx.saved_tensors, *ctx.options, ctx.of_mask)
    return dq, dk, dv, mask if ctx.of_mask else None, factors, None, None, None, None


torch.library.register_autograd(
    "rfcompile::polynomial_sum", _gradients, setup_context=_keep, lib=LIBRARY
)

# ---- the two that stand in graphs --------------------------------------------------------------

LIBRARY.define(
    "polynomial_attention(Tensor query, Tensor key, Tensor value, Tensor? attn_mask=None, "
    "float dropout_p=0.0, bool is_causal=False, *, float? scale=None, bool enable_gqa=False, "
    "int power=3, str rows='row', Tensor? gain=None, str form='auto') -> Tensor",
    tags=_TAGS,
)
LIBRARY.impl("polynomial_attention", polynomial_attention_formula, "CompositeImplicitAutograd")
LIBRARY.define(
    "polynomial_weights(Tensor scores, int power, str scale, Tensor? gain=None, "
    "ScalarType? dtype=None) -> Tensor",
    tags=_TAGS,
)
LIBRARY.impl("polynomial_weights", polynomial_weights_formula, "CompositeImplicitAutograd")
polynomial_attention: Any = torch.ops.rfcompile.polynomial_attention.default
polynomial_weights: Any = torch.ops.rfcompile.polynomial_weights.default
