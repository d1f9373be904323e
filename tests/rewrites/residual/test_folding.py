"""Folding of mixing matrices: the same function, one product less; and what cannot be folded."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor, nn

import rfcompile as rf
from rfcompile.errors import ResidualError
from rfcompile.nn.residual_site import ResidualSite
from rfcompile.rewrites.residual.rewrite import ResidualFree
from rfcompile.training import fold_mixing
from tests.zoo import TRANSFORMERS, ZOO, Block, NanoGPT

os.environ.setdefault("HF_HUB_OFFLINE", "1")

X = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0)).double()
MIX, PLAIN = ResidualFree("mix"), ResidualFree("mix", temperature=None)


def mixed(model: nn.Module, inputs: object, how: ResidualFree = MIX) -> nn.Module:
    """In float64, with mixing matrices and biases that training has changed."""
    new = rf.transform(model.double(), how, example_inputs=inputs).eval()
    for parameter in new.parameters():
        parameter.data += torch.randn_like(parameter) / 10
    return new


def modes(model: nn.Module) -> set[str]:
    return {module.mode for module in model.modules() if isinstance(module, ResidualSite)}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["nanogpt", "gpt2", "gpt-neox", "llama"])
def test_the_same_function(name: str) -> None:
    """Bias or none, transposed weights, attention and MLP side by side.

    Both are sums of at most 100 terms of size 1 in float64, some ten in a row: 1e-10 is far above
    what rounding does and far below what a wrong fold would do.
    """
    if name in TRANSFORMERS:
        pytest.importorskip("transformers")
    inputs = ZOO[name].inputs()
    model = mixed(ZOO[name].build(), ((), inputs))
    state = {key: value.clone() for key, value in model.state_dict().items()}
    output = model(**inputs)
    expected = output if isinstance(output, Tensor) else output[0]
    changed = fold_mixing(model, example_inputs=((), inputs))
    assert modes(model) == {"free"}
    got = model(**inputs)
    got = got if isinstance(got, Tensor) else got[0]
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)
    left = model.state_dict()
    assert state.keys() - left.keys() == {key for key in state if "residual_" in key}
    assert {key for key in left if not torch.equal(left[key], state[key])} == set(changed)


def test_float32_rounds_once() -> None:
    """The folded weight is the float64 product, rounded."""
    model = rf.transform(Block(16), PLAIN, example_inputs=(X.float(),))
    mixing = [model.get_parameter(f"residual_{number}.weight").double() for number in (0, 1)]
    weights = [model.get_parameter(f"{name}.weight") for name in ("attention.out", "mlp.2")]
    expected = [(m @ w.double()).float() for m, w in zip(mixing, weights, strict=True)]
    fold_mixing(model, example_inputs=(X.float(),))
    assert all(torch.equal(w, e) for w, e in zip(weights, expected, strict=True))


def test_a_sum_a_scale_and_a_sign() -> None:
    class Sums(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f, self.g = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            y = self.f(x) + self.g(torch.tanh(x))
            return x - 0.5 * nn.functional.dropout(y, 0.1, self.training)

    model = mixed(Sums(), (X,), PLAIN)
    expected = model(X)
    assert set(fold_mixing(model, example_inputs=(X,))) == {
        f"{name}.{part}" for name in "fg" for part in ("weight", "bias")
    }
    torch.testing.assert_close(model(X), expected, rtol=0, atol=1e-12)


class PostNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.good, self.f, self.norm = Block(16), nn.Linear(16, 16), nn.LayerNorm(16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.good(x)
        return x + self.norm(self.f(x))


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.f(x)
        return x + self.f(torch.relu(x))


class ReadElsewhere(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.f(x)
        return x + y, y


@pytest.mark.parametrize(
    ("cls", "text"),
    [
        (PostNorm, r"the mixing of residual_0 cannot .*its last operation is layer_norm_\d\)"),
        (Shared, r"f\.weight is used elsewhere too"),
        (ReadElsewhere, r"the mixing of residual_0 cannot be folded: .*linear is read elsewhere"),
    ],
)
def test_what_cannot_be_folded(cls: type[nn.Module], text: str) -> None:
    model = mixed(cls(), (X,), PLAIN)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ResidualError, match=text):
        fold_mixing(model, example_inputs=(X,))
    assert modes(model) == {"mix"}
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key])


def test_a_block_in_a_loop_is_folded_once() -> None:
    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Block(16)

        def forward(self, x: Tensor) -> Tensor:
            return self.block(self.block(x))

    model = mixed(Loop(), (X,), PLAIN)
    expected = model(X)
    fold_mixing(model, example_inputs=(X,))
    torch.testing.assert_close(model(X), expected, rtol=0, atol=1e-10)


def test_nothing_to_fold() -> None:
    with pytest.raises(ResidualError, match=r"^NanoGPT has no mixing to fold: transform it"):
        fold_mixing(NanoGPT())
