"""The operators of polynomial attention: numbers, gradients, masks, memory, bad input."""

from __future__ import annotations

import itertools
import math
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rfcompile.errors import AttentionError, ShapeError
from rfcompile.nn import polynomial_linear
from rfcompile.nn.attention_operators import (
    polynomial_attention,
    polynomial_sum,
    polynomial_weights,
)
from rfcompile.nn.polynomial import Problem

EPS = torch.finfo(torch.float32).eps


def double_factorial(power: int) -> int:
    return math.prod(range(1, 2 * power, 2))


def reference(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, power: int, rows: str
) -> Tensor:
    """The formula, written out in float64."""
    q, k, v = q.double(), k.double(), v.double()
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    seen = torch.ones_like(scores, dtype=torch.bool)
    if causal:
        seen = seen.tril()
    if mask is not None:
        seen = seen & (mask if mask.dtype == torch.bool else mask > -5000)
        scores = scores if mask.dtype == torch.bool else scores + mask.double()
    count = seen.sum(-1, keepdim=True).clamp(min=1) * double_factorial(power)
    count = count if rows == "row" else torch.full_like(count, k.shape[-2])
    return torch.where(seen, scores, 0) ** power / count.sqrt() @ v


def made(L: int, S: int, kind: str) -> tuple[list[Tensor], Tensor | None]:
    q, k, v = (torch.randn(2, 2, n, w) for n, w in ((L, 11), (S, 11), (S, 5)))
    masks = {
        "none": None,
        "bool": (torch.rand(2, 1, L, S) > 0.3).index_fill(2, torch.tensor([0]), False),
        "padding": torch.rand(2, 1, 1, S) > 0.3,
        "float": torch.randn(2, L, S).masked_fill(torch.rand(2, L, S) > 0.7, -math.inf),
        "lowest": torch.zeros(S).index_fill(0, torch.tensor([1]), torch.finfo().min),
    }
    return [q, k, v], masks[kind]


CASES = [
    (power, form, kind, causal)
    for power, form in ((1, "linear"), (2, "linear"), (2, "quadratic"), (3, "quadratic"))
    for kind in ("none", "bool", "padding", "float", "lowest")
    for causal in (False, True)
    if not (causal and kind != "none")
]


@pytest.mark.parametrize(("power", "form", "kind", "causal"), CASES)
@pytest.mark.parametrize(("L", "S"), [(150, 150), (300, 140), (7, 200)])
def test_it_is_the_formula(power: int, form: str, kind: str, causal: bool, L: int, S: int) -> None:
    (q, k, v), mask = made(L, S, kind)
    for rows in ("row", "sequence"):
        y = polynomial_attention(q, k, v, mask, 0.0, causal, power=power, rows=rows, form=form)
        expected = reference(q, k, v, mask, causal, power, rows)
        # Sums of n rounded terms: n eps times the sum of their magnitudes, here that of the terms
        # of the powers of (sum of |q| |k| + |mask|), which bounds both forms.
        bias = None
        if mask is not None:
            bias = mask if mask.dtype == torch.bool else torch.where(mask > -5000, mask.abs(), mask)
        bound = reference(q.abs(), k.abs(), v.abs(), bias, causal, power, rows)
        terms = S + power * (q.shape[-1] + 2) + polynomial_linear.num_features(11, 2)
        assert ((y - expected).abs() <= terms * EPS * bound).all()


@pytest.mark.parametrize(("power", "form", "kind", "causal"), CASES)
def test_its_gradients_are_those_of_the_numbers(
    power: int, form: str, kind: str, causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(polynomial_linear, "CHUNK", 3)
    monkeypatch.setattr("rfcompile.nn.polynomial.BLOCK", 1)
    tensors, mask = made(20, 18, kind)
    gain = torch.full((1,), 1.3, dtype=torch.float64, requires_grad=True)
    inputs = [x[:1, :, :, :3].double().requires_grad_() for x in tensors]
    if mask is not None:
        mask = mask[:1] if mask.dim() == 4 else mask
        if mask.is_floating_point():
            inputs.append(mask.double().requires_grad_())

    def attend(q: Tensor, k: Tensor, v: Tensor, gain: Tensor, *bias: Tensor) -> Tensor:
        y: Tensor = polynomial_attention(
            q, k, v, bias[0] if bias else mask, 0.0, causal,
            power=power, rows="learned", gain=gain, form=form,
        )  # fmt: skip
        return y

    everything = (*inputs[:3], gain, *inputs[3:])
    assert torch.autograd.gradcheck(attend, everything, fast_mode=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.autograd.gradgradcheck(attend, everything, fast_mode=True)


def test_rows_without_keys_are_zeros_and_masked_keys_do_not_matter() -> None:
    (q, k, v), _ = made(6, 8, "none")
    mask = torch.ones(6, 8, dtype=torch.bool)
    mask[2], mask[:, 5] = False, False
    k[..., 5, :], v[..., 5, :] = 1e30, 1e30
    y = polynomial_attention(q.requires_grad_(), k, v, mask)
    assert not y[..., 2, :].any()
    y.sum().backward()
    assert q.grad is not None
    assert q.grad.isfinite().all()
    assert not q.grad[..., 2, :].any()
    without = [x[..., [0, 1, 2, 3, 4, 6, 7], :] for x in (k, v)]
    rest = polynomial_attention(q, *without)
    torch.testing.assert_close(y[..., 3, :], rest[..., 3, :])


@pytest.mark.parametrize("form", ["quadratic", "linear"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_stays_so(form: str, bad: float) -> None:
    (q, k, v), _ = made(9, 9, "none")
    q[0, 0, 4, 0] = bad
    y = polynomial_attention(q, k, v, None, 0.0, True, power=2, form=form)
    assert not y[0, 0, 4].isfinite().any()
    assert y[0, 0, :4].isfinite().all()
    v[1, 1, 3] = bad
    y = polynomial_attention(q, k, v, None, 0.0, True, power=2, form=form)
    assert not y[1, 1, 3:].isfinite().any()


def test_half_precision_and_grouped_heads() -> None:
    q = torch.randn(1, 4, 10, 8, dtype=torch.bfloat16)
    k, v = torch.randn(2, 1, 2, 10, 8, dtype=torch.bfloat16)
    y = polynomial_attention(q, k, v, is_causal=True, enable_gqa=True)
    assert y.dtype == torch.bfloat16
    whole = [x.repeat_interleave(2, 1) for x in (k, v)]
    assert torch.equal(y, polynomial_attention(q, *whole, is_causal=True))


@pytest.mark.parametrize("form", ["quadratic", "linear"])
def test_autocast_takes_its_dtype(form: str) -> None:
    q, k, v = (torch.randn(2, 9, 4, requires_grad=True) for _ in range(3))
    narrow = [x.bfloat16() for x in (q, k, v)]
    expected = polynomial_attention(*narrow, power=2, form=form)
    with torch.autocast("cpu", torch.bfloat16):
        y = polynomial_attention(q, narrow[1], v, power=2, form=form)  # q and k of other dtypes
        assert polynomial_attention(q.double(), k.double(), v.double()).dtype == torch.float64
        (a,) = torch.autograd.grad(y.sum(), q)
    (b,) = torch.autograd.grad(expected.sum(), q)
    assert torch.equal(y, expected)
    assert torch.equal(a, b)


@pytest.mark.parametrize("form", ["quadratic", "linear"])
def test_leading_sizes_and_masks_broadcast(form: str) -> None:
    """One key head for all queries, one query for all samples: torch's attention takes both."""
    q, k, v = torch.randn(1, 3, 5, 4), torch.randn(2, 1, 6, 4), torch.randn(2, 3, 6, 2)
    small = [x.requires_grad_() for x in (q, k, v)]
    big = [x.detach().expand(2, 3, -1, -1).contiguous().requires_grad_() for x in (q, k, v)]
    mask = torch.tensor(True)
    y = polynomial_attention(*small, mask, power=2, form=form)
    expected = polynomial_attention(*big, mask.expand(1, 6), power=2, form=form)
    assert torch.equal(y, expected)
    y.sum().backward()
    expected.sum().backward()
    for a, b in zip(small, big, strict=True):
        assert a.grad is not None
        assert b.grad is not None
        torch.testing.assert_close(a.grad, b.grad.sum_to_size(a.shape))


def test_scores_of_half_precision_do_not_overflow() -> None:
    q = torch.full((1, 2, 128), 30.0, dtype=torch.float16)  # q k is 115,200, a score 10,182
    y = polynomial_attention(q, q, q * 1e-3, power=1)
    # Rounding of q / sqrt(128), of the score and of the result, by half an eps each, and its sums.
    expected = polynomial_attention(q.float(), q.float(), (q * 1e-3).float(), power=1)
    torch.testing.assert_close(y.float(), expected, rtol=4 * torch.finfo(torch.float16).eps, atol=0)


def test_dropout_drops_weights_and_keeps_their_mean() -> None:
    q, k = torch.randn(2, 1, 1, 40, 8)
    v = torch.eye(40).expand(1, 1, 40, 40)
    exact = polynomial_attention(q, k, v, is_causal=True)
    torch.manual_seed(0)
    dropped = polynomial_attention(q, k, v, None, 0.25, True)
    kept = dropped != 0
    torch.testing.assert_close(dropped[kept], exact[kept] / 0.75)
    share = float(kept.sum() / (exact != 0).sum())
    # 820 weights: five standard deviations of the share.
    assert abs(share - 0.75) < 5 * math.sqrt(0.75 * 0.25 / 820)


@pytest.mark.parametrize("scale", ["row", "sequence"])
def test_weights_stand_in_place_of_a_softmax(scale: str) -> None:
    q, k, v = torch.randn(3, 2, 2, 12, 8)
    scores = q @ k.mT / math.sqrt(8)
    mask = torch.zeros(12, 12).masked_fill(~torch.ones(12, 12, dtype=torch.bool).tril(), -1e9)
    weights = polynomial_weights((scores + mask).requires_grad_(), 3, scale)
    expected = polynomial_attention(q, k, v, is_causal=True, rows=scale)
    torch.testing.assert_close(weights @ v, expected)
    cast = polynomial_weights(scores.bfloat16(), 3, scale, None, torch.float32)
    assert cast.dtype == torch.float32
    assert not polynomial_weights(torch.full((2, 3), -math.inf), 3, scale).any()


def test_rows_have_the_promised_norm() -> None:
    q, k = torch.randn(2, 8, 1, 256, 64)
    v = torch.eye(256).expand(8, 1, 256, 256)
    for power in (1, 2, 3):
        weights = polynomial_attention(q, k, v, power=power)
        square = float(weights.square().sum(-1).mean())
        # Scores are N(0, 1) but share queries; eight matrices of 256 x 256.
        assert 0.7 < square < 1.4


def test_the_linear_form_is_taken_where_it_multiplies_less() -> None:
    def problem(tokens: int, power: int, width: int = 16) -> Problem:
        x = torch.empty(1, tokens, width)
        return Problem(x, x, x, torch.ones(1, 1), None, False, 1.0, power)

    def taken(tokens: int, power: int) -> bool:
        return polynomial_linear.is_linear(problem(tokens, power), "auto")

    assert [taken(n, 2) for n in (128, 4096)] == [False, True]
    assert [taken(n, 1) for n in (16, 128)] == [False, True]
    assert not polynomial_linear.is_linear(problem(4096, 3), "auto")


def test_compiled_it_is_the_same_and_keeps_no_matrix() -> None:
    """What autograd keeps is q, k, v and a factor for each row; so does the compiled graph."""
    q, k, v = (torch.randn(1, 2, 130, 8, requires_grad=True) for _ in range(3))
    kept: list[int] = []

    def pack(x: Tensor) -> Tensor:
        kept.append(x.numel())
        return x

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        y: Tensor = polynomial_attention(q, k, v, is_causal=True)
        return y

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        y = attend(q, k, v)
    assert max(kept) <= q.numel()
    grads = torch.autograd.grad(y.square().sum(), (q, k, v))
    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True, dynamic=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        again = compiled(q, k, v)
    assert max(kept) <= q.numel()
    torch.testing.assert_close(again, y)
    for a, b in zip(torch.autograd.grad(again.square().sum(), (q, k, v)), grads, strict=True):
        torch.testing.assert_close(a, b)


def test_the_operator_tells_the_truth_about_itself() -> None:
    q, k, v = (torch.randn(1, 2, 9, 4, requires_grad=True) for _ in range(3))
    bias = torch.randn(9, 9, requires_grad=True)
    for mask, causal in ((None, True), (bias, False)):
        arguments = (q, k, v, mask, torch.ones(1, 1), causal, 0.5, 3)
        torch.library.opcheck(polynomial_sum, arguments)


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"attn_mask": torch.ones(3, 3, dtype=torch.bool)}, ShapeError, r"broadcast to the scores"),
    ({"attn_mask": torch.ones(1, 1, 1, 5, 5)}, ShapeError, "broadcast"),
    ({"attn_mask": torch.ones(5, 5), "is_causal": True}, ShapeError, "not both"),
    ({"attn_mask": torch.ones(5, 5, dtype=torch.int64)}, AttentionError, "int64: give bool"),
    ({"key": torch.ones(1, 2, 5, 3)}, ShapeError, r"key \[\.\., S, E\]"),
    ({"value": torch.ones(1, 2, 5, 4).double()}, AttentionError, "one floating-point type"),
    ({"value": torch.ones(1, 2, 6, 4)}, ShapeError, r"value \[\.\., S, V\]"),
    ({"key": torch.ones(1, 3, 5, 4)}, ShapeError, "leading sizes that broadcast"),
    ({"key": torch.ones(1, 3, 5, 4), "enable_gqa": True}, ShapeError, "its heads must divide"),
    ({"value": torch.ones(1, 3, 5, 4), "enable_gqa": True}, ShapeError, "its heads must divide"),
]


@pytest.mark.parametrize(("wrong", "error", "message"), BAD)
def test_bad_input_is_refused(wrong: dict[str, Any], error: type[Exception], message: str) -> None:
    given = {name: torch.ones(1, 2, 5, 4) for name in ("query", "key", "value")}
    with pytest.raises(error, match=message):
        polynomial_attention(**{**given, **wrong})


def test_empty_sequences_are_legal() -> None:
    for L, S in itertools.product((0, 3), (0, 4)):
        q, k, v = (torch.randn(1, 2, n, 4) for n in (L, S, S))
        y = polynomial_attention(q, k, v, power=1)
        assert y.shape == F.scaled_dot_product_attention(q, k, v).shape
        assert not y.isnan().any()
