"""Token Graying's operator: both spectra, their gradients, padding, bad input."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from rfcompile.errors import GrayingError, ShapeError
from rfcompile.nn.graying import FLOOR, dct_matrix, gray_svd, gray_tokens

SHAPES = [(7, 5), (16, 16), (5, 12), (1, 3), (197, 13)]


def orthonormal_dct(n: int) -> np.ndarray:
    k, t = np.arange(n)[:, None], np.arange(n)
    matrix = np.cos(np.pi * (2 * t + 1) * k / (2 * n)) * math.sqrt(2 / n)
    matrix[0] /= math.sqrt(2)
    return matrix


@pytest.mark.parametrize("n", [1, 2, 7, 64, 197])
def test_the_matrix_is_the_orthonormal_cosine_transform(n: int) -> None:
    D = dct_matrix(torch.arange(n), torch.tensor([n]), n, torch.float64)
    np.testing.assert_allclose(D.numpy(), orthonormal_dct(n), atol=n * 2e-16 + 1e-15)
    torch.testing.assert_close(D @ D.mT, torch.eye(n, dtype=torch.float64))


@pytest.mark.parametrize(("n", "d"), SHAPES)
def test_dct_raises_the_coefficients(n: int, d: int) -> None:
    x = torch.randn(2, n, d, dtype=torch.float64)
    left, right = orthonormal_dct(n), orthonormal_dct(d)
    spectrum = left @ x.numpy() @ right.T
    largest = np.abs(spectrum).max((1, 2), keepdims=True)
    raised = np.sign(spectrum) * largest * (np.abs(spectrum) / largest) ** 0.6
    expected = left.T @ raised @ right
    np.testing.assert_allclose(gray_tokens(x, None, 0.6, "dct").numpy(), expected, atol=1e-12)


@pytest.mark.parametrize(("n", "d"), SHAPES)
def test_svd_takes_the_condition_number_to_the_power(n: int, d: int) -> None:
    x = torch.randn(3, n, d, dtype=torch.float64)
    y = gray_tokens(x, None, 0.6, "svd")
    before, after = torch.linalg.svdvals(x), torch.linalg.svdvals(y)
    torch.testing.assert_close(after[:, 0], before[:, 0])
    torch.testing.assert_close(
        after[:, 0] / after[:, -1], (before[:, 0] / before[:, -1]) ** 0.6, rtol=1e-9, atol=0
    )


@pytest.mark.parametrize("form", ["dct", "svd"])
def test_one_changes_nothing_and_dtypes_stay(form: str) -> None:
    x = torch.randn(2, 9, 6)
    torch.testing.assert_close(gray_tokens(x, None, 1.0, form), x)
    assert gray_tokens(x.bfloat16(), None, 0.7, form).dtype == torch.bfloat16


@pytest.mark.parametrize("form", ["dct", "svd"])
def test_autocast_does_not_make_it_less_exact(form: str) -> None:
    x = torch.randn(2, 9, 6, requires_grad=True)
    y = gray_tokens(x, None, 0.7, form)
    with torch.autocast("cpu", torch.bfloat16):
        again = gray_tokens(x, None, 0.7, form)
    assert torch.equal(again, y)
    (a,), (b,) = (torch.autograd.grad(z.square().sum(), x) for z in (again, y))
    assert torch.equal(a, b)


@pytest.mark.parametrize("form", ["dct", "svd"])
@pytest.mark.parametrize(("n", "d"), [(5, 3), (3, 5), (4, 4)])
def test_gradients(form: str, n: int, d: int) -> None:
    x = torch.randn(2, n, d, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: gray_tokens(x, None, 0.7, form), (x,))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.autograd.gradgradcheck(lambda x: gray_tokens(x, None, 0.7, form), (x,))


def test_a_run_on_fake_tensors_leaves_real_ones_real() -> None:
    x = torch.randn(23, 29)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert gray_tokens(x, None, 0.7, "dct").shape == x.shape
    assert type(gray_tokens(x, None, 0.7, "dct")) is Tensor


@pytest.mark.parametrize(
    "values", [[3, 2, 2, 2, 1], [1] * 5, [2, 1, 0, 0, 0], [0] * 5, [1, 1e-7, 1e-7, 0, 0]]
)
def test_the_svd_gradient_is_finite_at_repeated_values(values: list[float]) -> None:
    torch.manual_seed(0)
    (P, Q), S = torch.linalg.qr(torch.randn(2, 5, 5))[0], torch.tensor(values)
    x = (P @ torch.diag(S.float()) @ Q).requires_grad_()
    y = gray_tokens(x, None, 0.6, "svd")
    direction = torch.randn_like(y)
    (g,) = torch.autograd.grad(y, x, direction)
    # No slope of the function exceeds that at its floor; the largest value's own adds at most
    # 1 - epsilon times the trace of U^T G V.
    slope = FLOOR ** (0.6 - 1) + 0.4 * math.sqrt(5)
    assert g.norm() <= slope * direction.norm() * (1 + 1e-4)
    assert g.isfinite().all()


def test_the_gradient_at_repeated_values_is_the_slope() -> None:
    (P, Q) = torch.linalg.qr(torch.randn(2, 5, 5, dtype=torch.float64))[0]
    x = (P @ torch.diag(torch.tensor([3.0, 2, 2, 2, 1]).double()) @ Q).requires_grad_()
    step, direction = 1e-6, torch.randn(5, 5, dtype=torch.float64)
    (g,) = torch.autograd.grad(gray_svd(x, 0.6), x, direction)
    e = torch.randn_like(x)

    def along(size: float) -> float:
        return float((gray_svd(x.detach() + size * e, 0.6) * direction).sum())

    high, low = along(step), along(-step)
    assert float((g * e).sum()) == pytest.approx((high - low) / (2 * step), rel=1e-6)


@pytest.mark.parametrize("form", ["dct", "svd"])
def test_padding_is_as_if_it_were_not_there(form: str) -> None:
    x = torch.randn(3, 9, 4)
    visible = torch.ones(3, 9, dtype=torch.bool)
    visible[0, :3], visible[1, 6:], visible[2] = False, False, False
    y = gray_tokens(x, visible, 0.7, form)
    torch.testing.assert_close(y[0, 3:], gray_tokens(x[0, 3:], None, 0.7, form))
    torch.testing.assert_close(y[1, :6], gray_tokens(x[1, :6], None, 0.7, form))
    assert torch.equal(y[~visible], x[~visible])


@pytest.mark.parametrize("form", ["dct", "svd"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_stays_so_in_its_sample(form: str, bad: float) -> None:
    x = torch.randn(2, 4, 3)
    x[0, 1, 1] = bad
    y = gray_tokens(x.requires_grad_(), None, 0.7, form)
    assert not y[0].isfinite().any()
    torch.testing.assert_close(y[1], gray_tokens(x[1], None, 0.7, form))


def test_zeros_and_empty_samples() -> None:
    for form in ("dct", "svd"):
        assert not gray_tokens(torch.zeros(2, 4, 3), None, 0.7, form).any()
        assert gray_tokens(torch.zeros(0, 4, 3), None, 0.7, form).shape == (0, 4, 3)
        assert gray_tokens(torch.zeros(2, 0, 3), None, 0.7, form).shape == (2, 0, 3)


@pytest.mark.slow
def test_compiled_it_is_the_same() -> None:
    def both(x: Tensor) -> Tensor:
        y: Tensor = gray_tokens(gray_tokens(x, None, 0.9, "dct"), None, 0.7, "svd")
        return y

    x = torch.randn(2, 11, 6, requires_grad=True)
    y = both(x)
    again = torch.compile(both, backend="aot_eager", fullgraph=True, dynamic=True)(x)
    torch.testing.assert_close(again, y)
    (a,), (b,) = (torch.autograd.grad(z.square().sum(), x) for z in (again, y))
    torch.testing.assert_close(a, b)
    torch.library.opcheck(gray_svd, (x, 0.6))


def test_bad_input_is_refused() -> None:
    x = torch.randn(2, 5, 3)
    with pytest.raises(ShapeError, match=r"give \[\.\., tokens, features\]"):
        gray_tokens(x[0, 0], None, 0.7, "dct")
    with pytest.raises(ShapeError, match=r"give bool \(2, 5\)"):
        gray_tokens(x, torch.ones(2, 4, dtype=torch.bool), 0.7, "dct")
    with pytest.raises(ShapeError, match=r"torch\.int64"):
        gray_tokens(x, torch.ones(2, 5, dtype=torch.int64), 0.7, "dct")
    with pytest.raises(GrayingError, match=r"torch\.int64: give a floating-point type"):
        gray_tokens(x.long(), None, 0.7, "dct")
