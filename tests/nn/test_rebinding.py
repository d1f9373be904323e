"""Models whose forward was replaced on the instance: what is made of them calls its own parts."""

from __future__ import annotations

import functools
import pickle
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import rfcompile as rf
from rfcompile.errors import CaptureError, OptionError
from rfcompile.graph.models import copy_of
from rfcompile.nn.rebinding import Bound, runs_its_class
from rfcompile.rewrites.adapters.rewrite import merge_adapters
from rfcompile.rewrites.low_rank.rewrite import LowRank

# Dynamo looks at the .grad of what is no leaf: torch's own warning, of a block that is compiled.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")

X = torch.randn(4, 32)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(32, 48), nn.Linear(48, 32)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


Patch = Callable[[Any], None]


def closure(module: Any) -> None:
    old = module.forward
    module.forward = lambda x: old(x) * 1.0


def twice(module: Any) -> None:
    closure(module)
    closure(module)


def in_a_list(module: Any) -> None:
    calls = [module.forward]
    module.forward = lambda x: calls[0](x)


def as_default(module: Any) -> None:
    def forward(x: Tensor, old: Any = module.forward) -> Any:
        return old(x)

    module.forward = forward


def method_of_a_closure(module: Any) -> None:
    old = module.forward
    module.forward = types.MethodType(lambda _, x: old(x), module)


def partial(module: Any) -> None:
    module.forward = functools.partial(checkpoint, module.forward, use_reentrant=False)


def wrapped(module: Any) -> None:
    module.forward = _decorated(module.forward)


def _decorated(function: Any) -> Any:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return call


def compiled(module: Any) -> None:
    module.forward = torch.compile(module.forward, backend="eager")


def kept_aside(module: Any) -> None:
    """What accelerate's hooks do."""
    module.old = module.forward

    def forward(module: Any, *args: Any, **kwargs: Any) -> Any:
        return module.old(*args, **kwargs)

    module.forward = functools.update_wrapper(functools.partial(forward, module), module.old)


def recursive(module: Any) -> None:
    old = module.forward

    def forward(x: Tensor, left: int = 1) -> Any:
        return forward(x, left - 1) if left else old(x)

    module.forward = forward


PATCHES: list[Patch] = [
    *(closure, twice, in_a_list, as_default, method_of_a_closure, partial, wrapped, compiled),
    *(kept_aside, recursive),
]
PLACES: dict[str, Callable[[Net], list[Any]]] = {
    "model": lambda net: [net],
    "blocks": lambda net: list(net.blocks),
    "linears": lambda net: [m for m in net.modules() if isinstance(m, nn.Linear)],
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("patch", PATCHES)
def test_adapters_and_low_rank_are_in_the_path(patch: Patch, place: str) -> None:
    net = Net()
    for module in PLACES[place](net):
        patch(module)
    expected = net(X).detach()

    for new in (
        rf.transform(net, rf.Adapters(rank=4)),
        rf.transform(net, LowRank(4, start="fresh")),
    ):
        trained = [p for p in new.parameters() if p.requires_grad]
        with torch.no_grad():
            for parameter in trained:
                parameter.add_(torch.randn_like(parameter))
        y = new(X)
        assert not torch.allclose(y, expected, atol=1e-3)
        y.sum().backward()
        assert all(p.grad is not None for p in trained)
        assert all(p.grad is None for p in net.parameters())
    assert torch.equal(net(X), expected)


@pytest.mark.parametrize("place", ["model", "blocks"])
@pytest.mark.parametrize("patch", PATCHES)
def test_wires_are_in_the_path(patch: Patch, place: str) -> None:
    net, plain = Net(), Net()
    plain.load_state_dict(net.state_dict())
    for module in PLACES[place](net):
        patch(module)
    expected = rf.transform(plain, bits=2)(X)
    assert torch.equal(rf.transform(net, bits=2)(X), expected)
    assert torch.equal(net(X), plain(X))


def test_a_merged_linear_computes_with_its_weight() -> None:
    net = Net()
    kept_aside(net.blocks[0].up)
    new = rf.transform(net, rf.Adapters(rank=4))
    with torch.no_grad():
        for parameter in new.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    expected = new(X)
    merge_adapters(new)
    # One rounding of the sum W + dW, in sums of 48 products.
    torch.testing.assert_close(new(X), expected, rtol=1e-4, atol=1e-5)


def test_a_hook_calls_the_copy() -> None:
    net = Net()
    other = net.blocks[1]
    net.blocks[0].register_forward_hook(lambda module, args, output: other.up(output)[:, :32])
    twin: Any = copy_of(net, share=False)
    with torch.no_grad():
        twin.blocks[1].up.weight.zero_()
        twin.blocks[1].up.bias.zero_()
    assert torch.equal(twin.blocks[0](X), torch.zeros(4, 32))


def test_what_holds_no_part_stays_shared() -> None:
    net, seen = Net(), []
    net.blocks[0].register_forward_hook(lambda module, args, output: seen.append(1))
    rf.transform(net, bits=4)(X)
    assert seen == [1]


NET = Net()


def test_a_global_name_is_an_error() -> None:
    NET.blocks[0].forward = lambda x: NET.blocks[1](x)
    with pytest.raises(CaptureError, match=r"forward of blocks\.0 \(Block\).* name 'NET'"):
        rf.transform(NET, bits=4)


def test_a_linear_with_a_forward_of_its_own_is_no_target() -> None:
    net = Net()
    up: Any = net.blocks[0].up
    up.forward = types.MethodType(lambda self, x: x @ self.weight.t(), up)
    assert not runs_its_class(up)
    with pytest.raises(OptionError, match="its forward is its own"):
        rf.transform(net, rf.Adapters(rank=4, modules=["blocks.0.up"]))
    (report,) = rf.rewrites_of(rf.transform(net, rf.Adapters(rank=4)))
    assert "blocks.0.up.weight" in str(report)


def test_a_bound_forward_pickles() -> None:
    linear = nn.Linear(3, 3)
    again = pickle.loads(pickle.dumps(Bound(linear)))
    x = torch.randn(2, 3)
    assert torch.equal(again(x), linear(x))
    assert again.__self__ is again.module
    assert again.__name__ == "forward"
