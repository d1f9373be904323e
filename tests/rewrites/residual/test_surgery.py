"""Opening the residual adds of whole models: which, verified how, and what a failure leaves."""

from __future__ import annotations

import os
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from rfcompile.errors import CaptureError, ResidualError
from rfcompile.nn.residual_site import ResidualSite
from rfcompile.rewrites.residual import surgery
from rfcompile.rewrites.residual.surgery import open_sites
from tests.zoo import TRANSFORMERS, ZOO, Block, NanoGPT, ResNet, pictures, tokens

os.environ.setdefault("HF_HUB_OFFLINE", "1")

X = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))


def sites_of(model: nn.Module) -> dict[str, ResidualSite]:
    return {n: m for n, m in model.named_modules() if isinstance(m, ResidualSite)}


def state_of(model: nn.Module) -> list[Any]:
    """What a failure must not change: every module, its class and its attributes."""
    return [
        (path, module, type(module), module.training, sorted(vars(module)), [*module._modules])
        for path, module in model.named_modules()
    ]


def outputs(model: nn.Module, inputs: dict[str, Tensor]) -> list[Tensor]:
    torch.manual_seed(0)  # for dropout
    with torch.no_grad():
        leaves = pytree.tree_leaves(model(**inputs))
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


# ---- the zoo -----------------------------------------------------------------------------------


class Opened:
    """A model of the zoo before and after its residual adds are submodules."""

    def __init__(self, name: str) -> None:
        if name in TRANSFORMERS:
            pytest.importorskip("transformers")
        self.entry = ZOO[name]
        torch.manual_seed(0)
        self.model, self.inputs = self.entry.build().eval(), self.entry.inputs()
        self.names, self.expected = [*self.model.state_dict()], outputs(self.model, self.inputs)
        self.sites, self.left = open_sites(self.model, ((), self.inputs))


QUICK = ("nanogpt", "gpt2", "convnext")
"""The models that every run of the tests takes; make test-slow takes the others."""


@pytest.fixture(
    scope="module",
    params=[pytest.param(n, marks=[] if n in QUICK else pytest.mark.slow) for n in ZOO],
)
def opened(request: pytest.FixtureRequest) -> Opened:
    return Opened(request.param)


def test_every_residual_add_is_found(opened: Opened) -> None:
    kinds = Counter(add.kind for add in (*(site.add for site in opened.sites), *opened.left))
    assert kinds == opened.entry.kinds


def test_every_residual_add_has_its_facts(opened: Opened) -> None:
    found = sorted([*(site.add for site in opened.sites), *opened.left], key=lambda add: add.order)
    assert [add.order for add in found] == list(range(len(found)))
    for add in found:
        assert add.source, add
        assert add.module, add
        assert add.dtype == "f32"
        assert add.branch, add


def test_every_block_has_its_site(opened: Opened) -> None:
    assert len(opened.sites) == opened.entry.kinds["block"]
    assert {site.path for site in opened.sites} == set(sites_of(opened.model))
    for site in opened.sites:
        assert site.path.rpartition(".")[0] == site.add.module
        assert not opened.model.get_submodule(site.path).training


def test_the_opened_model_is_the_same_one(opened: Opened) -> None:
    assert list(opened.model.state_dict()) == opened.names
    got = outputs(opened.model, opened.inputs)
    assert len(got) == len(opened.expected)
    assert all(torch.equal(a, b) for a, b in zip(opened.expected, got, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["convnext", "gpt2", "bloom"])
def test_in_training_mode(name: str) -> None:
    """The same random numbers give the same result: dropout and random depth are untouched."""
    if name in TRANSFORMERS:
        pytest.importorskip("transformers")
    model, inputs = ZOO[name].build().train(), ZOO[name].inputs()
    expected = outputs(model, inputs)
    opened, _ = open_sites(model, ((), inputs))
    assert len(opened) == ZOO[name].kinds["block"]
    assert all(module.training for module in model.modules())
    got = outputs(model, inputs)
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))


@pytest.mark.parametrize("training", [True, False])
def test_torchs_own_transformer(training: bool) -> None:
    """Its layers have a kernel of their own in eval mode, which must not bypass the sites."""
    layer = nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).train(training)
    padding = torch.zeros(2, 5, dtype=torch.bool)
    padding[1, 3:] = True
    opened, _ = open_sites(model, ((X,), {}))
    paths = [f"layers.{layer}.residual_{number}" for layer in (0, 1) for number in (0, 1)]
    assert [site.path for site in opened] == paths
    for site in sites_of(model).values():
        site.become("free")
    model.eval().requires_grad_(False)  # now torch would take its kernel
    with torch.no_grad():
        branch = X
        for part in model.layers:
            attended = part.self_attn(branch, branch, branch, need_weights=False)[0]
            branch = part.norm1(attended)
            branch = part.norm2(part.linear2(torch.relu(part.linear1(branch))))
        torch.testing.assert_close(model(X), branch)
        kept = ~padding
        padded = model(X, src_key_padding_mask=padding)
        model.train()
        torch.testing.assert_close(model(X, src_key_padding_mask=padding)[kept], padded[kept])


def test_random_numbers_modes_and_buffers_stay() -> None:
    model = ResNet()
    model.blocks[0].eval()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    inputs = pictures()
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    open_sites(model, ((), inputs))
    assert torch.equal(torch.rand(3), expected)
    old = [m.training for m in model.modules() if not isinstance(m, ResidualSite)]
    assert old == modes
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name


# ---- kinds -------------------------------------------------------------------------------------


class Adapted(Block):
    """A block whose MLP has an adapter: a residual add within a branch."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.down, self.up = nn.Linear(width, 4), nn.Linear(4, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm_1(x))
        y = self.mlp(self.norm_2(x))
        y = y + self.up(torch.relu(self.down(y)))
        return x + y


def test_adds_of_other_kinds_are_left_and_can_follow() -> None:
    model = Adapted(16).eval()
    expected = model(X)
    opened, left = open_sites(model, ((X,), {}))
    assert [site.path for site in opened] == ["residual_0", "residual_1"]
    assert [(add.kind, add.module) for add in left] == [("local", "")]
    sites = sites_of(model)
    sites["residual_0"].become("gain")
    more, left = open_sites(model, ((X,), {}), ("local",))
    assert [site.path for site in more] == ["residual_2"]
    assert [add.kind for add in left] == ["block", "block"]
    assert sites_of(model)["residual_0"] is sites["residual_0"]
    assert torch.equal(model(X), expected)
    sites_of(model)["residual_2"].become("free")
    assert not torch.equal(model(X), expected)


# ---- errors ------------------------------------------------------------------------------------


class Aliased(nn.Module):
    """Adds in place to a tensor that is read elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        stream = x * 1
        alias = stream.view_as(stream)
        stream += self.f(stream)
        return stream, alias


class OutOfReach(nn.Module):
    """Adds in a way that is no addition in the source."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.f = Block(16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(x)
        return torch.stack([x, self.f(x)]).mean(0)


class OnlyLong(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.f(x)


def test_a_change_in_place_that_is_read_elsewhere() -> None:
    model = nn.Sequential(Block(16), Aliased())
    before = state_of(model)
    with pytest.raises(ResidualError, match=r"^Sequential computes something else .*x = x \+ f"):
        open_sites(model, ((X,), {}))
    assert state_of(model) == before


def test_what_cannot_be_rewritten_is_named() -> None:
    model = OutOfReach()
    before = state_of(model)
    with pytest.raises(
        ResidualError,
        match=r"^2 of 3 residual adds of OutOfReach .*test_surgery\.py:\d+ \(aten\.mea",
    ) as error:
        open_sites(model, ((X,), {}))
    assert [add.spelling for add in error.value.left] == ["aten.mean.dim"]
    assert state_of(model) == before


def test_nothing_to_rewrite() -> None:
    model = OnlyLong()
    before = state_of(model)
    text = r"^OnlyLong has no residual add of kind block \(0 of other kinds\): there is nothing"
    with pytest.raises(ResidualError, match=text) as error:
        open_sites(model, ((X,), {}))
    assert error.value.left == ()
    assert state_of(model) == before


def test_nothing_of_this_kind() -> None:
    model = NanoGPT()
    before = state_of(model)
    with pytest.raises(
        ResidualError, match=r"no residual add of kind local, long \(4 of oth"
    ) as error:
        open_sites(model, ((), tokens()), ("local", "long"))
    assert len(error.value.left) == 4
    assert state_of(model) == before


def test_an_error_on_the_way_undoes_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stop(Exception):
        pass

    def fail(*_: object) -> None:
        raise Stop

    model = NanoGPT()
    before = state_of(model)
    monkeypatch.setattr(surgery, "_check_equal", fail)
    with pytest.raises(Stop):
        open_sites(model, ((), tokens()))
    assert state_of(model) == before


def test_a_model_that_cannot_be_captured() -> None:
    class Decides(Block):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if x.sum() > 0 else x

    model = Decides(16)
    before = state_of(model)
    with pytest.raises(CaptureError, match="Decides cannot be captured"):
        open_sites(model, ((X,), {}))
    assert state_of(model) == before
