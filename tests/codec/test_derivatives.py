"""Derivatives of wired models: forward mode, torch.func and higher orders, or a typed error."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn

import rfcompile as rf
from rfcompile.errors import DerivativeError
from rfcompile.nn.graying import gray_tokens
from rfcompile.wire import collectives
from rfcompile.wire.fake import fake_wire, send
from rfcompile.wire.process_groups import simulated

# torch compiles its forward-mode formulas with torch.jit.script, which it deprecates itself.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")

X, V = torch.randn(2, 3, 16), torch.randn(2, 3, 16)
SPEC = "4b:g16:rise"


def wired(x: Tensor) -> Tensor:
    return send(x * 2, SPEC, "").sin()


def tangent_of_wired(x: Tensor, v: Tensor) -> Tensor:
    """The wire counts as the identity, at the value that came over it."""
    return send(x * 2, SPEC, "").cos() * 2 * v


def dual(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor | None:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(forward_ad.make_dual(x, V))).tangent


def close(a: Tensor | None, b: Tensor) -> None:
    assert a is not None
    torch.testing.assert_close(a, b)


def test_a_tangent_passes_straight_through() -> None:
    expected = tangent_of_wired(X, V)
    close(torch.func.jvp(wired, (X,), (V,))[1], expected)
    close(dual(wired, X), expected)
    close(dual(wired, X.clone().requires_grad_()), expected)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_jacobians_of_both_modes_agree() -> None:
    x = X[0, 0]
    jacobian = torch.diag(send(x * 2, SPEC, "").cos() * 2)
    close(torch.func.jacfwd(wired)(x), jacobian)
    close(torch.func.jacrev(wired)(x), jacobian)
    second = torch.func.hessian(lambda x: wired(x).sum())(x)
    close(second, torch.diag(-send(x * 2, SPEC, "").sin() * 4))


def test_gradients_of_torch_func() -> None:
    expected = tangent_of_wired(X, torch.ones_like(X))
    close(torch.func.grad(lambda x: wired(x).sum())(X), expected)
    _, pull = torch.func.vjp(wired, X)
    close(pull(V)[0], tangent_of_wired(X, V))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_codes_each_sample_by_itself() -> None:
    expected = torch.stack([wired(x) for x in X])
    assert torch.equal(torch.func.vmap(wired)(X), expected)
    grads = torch.func.vmap(torch.func.grad(lambda x: wired(x).sum()))(X)
    close(grads, torch.stack([tangent_of_wired(x, torch.ones_like(x)) for x in X]))


def test_gradient_of_a_gradient() -> None:
    x = X.clone().requires_grad_()
    (first,) = torch.autograd.grad(wired(x).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    close(second, -send(X * 2, SPEC, "").sin() * 4)


def test_a_wired_model_and_its_graph() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Tanh()).requires_grad_(False)
    new = rf.transform(model, rf.Wire(8, modules=["0"]))
    _, expected = torch.func.jvp(model, (X,), (V,))
    size = float(expected.norm())
    _, tangent = torch.func.jvp(new, (X,), (V,))
    # tanh' is taken at a value that is off by the wire's error, at 8 bits less than 2 %.
    assert float((tangent - expected).norm()) < 0.02 * size
    graph = torch.export.export(new, (X,), strict=False).module()
    close(torch.func.jvp(graph, (X,), (V,))[1], tangent)
    parameters = dict(new.named_parameters())
    close(torch.func.functional_call(new, parameters, (X,)), new(X))


def test_no_tangent_is_lost() -> None:
    """What has no forward-mode formula says so."""
    with pytest.raises(DerivativeError, match=r"rfcompile\.quantize has no forward-mode"):
        torch.func.jvp(lambda x: rf.dequantize(rf.quantize(x, 8), 8, x.shape), (X,), (V,))
    with pytest.raises(DerivativeError, match="gray_svd has no forward-mode"):
        torch.func.jvp(lambda x: gray_tokens(x, None, 0.7, "svd"), (X,), (V,))
    with simulated(2), pytest.raises(DerivativeError, match="all_reduce has no forward-mode"):
        torch.func.jvp(lambda x: collectives.all_reduce(x, 4), (X,), (V,))
    with simulated(2), pytest.raises(DerivativeError, match="all_gather has no forward-mode"):
        dual(lambda x: collectives.all_gather(x, 4), X)


def test_the_bare_operator_refuses_gradients_of_torch_func() -> None:
    with pytest.raises(DerivativeError, match=r"fake_wire has no gradient inside torch\.func"):
        torch.func.grad(lambda x: fake_wire(x, SPEC, "").sum())(X)
    close(torch.func.jvp(lambda x: fake_wire(x, SPEC, ""), (X,), (V,))[1], V)


def test_compiled_code_keeps_its_gradient() -> None:
    def grad_of(function: Callable[[Tensor], Tensor]) -> Tensor:
        x = X.clone().requires_grad_()
        return torch.autograd.grad(function(x).sum(), x)[0]

    assert torch.equal(
        grad_of(torch.compile(wired, backend="aot_eager", fullgraph=True)), grad_of(wired)
    )
