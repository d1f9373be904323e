"""find_residuals on whole models: the zoo, every way to a graph, what it takes and what it says."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from rfcompile import find_residuals
from rfcompile.errors import CaptureError, OptionError, RFCompileError
from rfcompile.passes.find_residuals import ResidualAdd
from rfcompile.rewrites.residual.find import as_json, as_text
from tests.routes import graphs
from tests.zoo import PARALLEL, TRANSFORMERS, VOCABULARY, ZOO, Block, NanoGPT, ResNet, tokens

os.environ.setdefault("HF_HUB_OFFLINE", "1")


def build(name: str) -> nn.Module:
    if name in TRANSFORMERS:
        pytest.importorskip("transformers")
    return ZOO[name].build()


def kinds(found: Iterable[ResidualAdd]) -> dict[str, int]:
    return dict(Counter(add.kind for add in found))


# ---- the zoo (every model of it: test_surgery.py) ----------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["nanogpt", "resnet", "llama", "gpt-neox", "swin", "t5"])
def test_every_route_finds_the_same(name: str) -> None:
    model = build(name)
    for route, gm in graphs(model, ZOO[name].inputs()).items():
        assert kinds(find_residuals(gm)) == ZOO[name].kinds, route


@pytest.mark.slow
@pytest.mark.parametrize("name", ["nanogpt", "convnext"])
def test_dynamic_shapes(name: str) -> None:
    for route, gm in graphs(build(name), ZOO[name].inputs(), dynamic=True).items():
        found = find_residuals(gm)
        assert kinds(found) == ZOO[name].kinds, route
        assert all(isinstance(add.shape[0], str) for add in found), "a symbolic size is a text"


@pytest.mark.parametrize("name", ["convnext", "bert"])
def test_training_and_evaluation(name: str) -> None:
    model = build(name)
    for mode in (True, False):
        model.train(mode)
        assert kinds(find_residuals(model, example_inputs=ZOO[name].inputs())) == ZOO[name].kinds
        assert model.training is mode


def test_parallel_blocks_name_both_branches() -> None:
    found = find_residuals(build("gpt-neox"), example_inputs=ZOO["gpt-neox"].inputs())
    assert kinds(found) == PARALLEL
    for layer, add in enumerate(found):
        assert add.module == f"gpt_neox.layers.{layer}"
        parts = {path.removeprefix(f"{add.module}.").split(".")[0] for path in add.branch}
        assert parts == {"attention", "mlp"}


# ---- what it takes -----------------------------------------------------------------------------


def test_torchs_own_transformer_in_both_modes() -> None:
    model = nn.Transformer(16, 2, 2, 2, 32, batch_first=True).requires_grad_(False)
    x = torch.randn(1, 3, 16)
    fast = torch.backends.mha.get_fastpath_enabled()
    for mode in (True, False):
        assert kinds(find_residuals(model.train(mode), example_inputs=(x, x))) == {"block": 10}
    assert torch.backends.mha.get_fastpath_enabled() is fast


def test_a_model_whose_output_torch_export_does_not_know() -> None:
    class Cache:
        def __init__(self, x: Tensor) -> None:
            self.x = x

    class Caching(Block):
        def forward(self, x: Tensor) -> Any:
            raise_if_it_runs(x)
            return super().forward(x), Cache(x)

    def raise_if_it_runs(x: Tensor) -> None:
        assert torch.compiler.is_compiling()

    found = find_residuals(Caching(16), example_inputs=(torch.randn(1, 3, 16),))
    assert kinds(found) == {"block": 2}


def test_a_compiled_model_is_the_model() -> None:
    found = find_residuals(torch.compile(NanoGPT()), example_inputs=tokens())
    assert [add.module for add in found] == ["blocks.0", "blocks.0", "blocks.1", "blocks.1"]


def test_dummy_inputs_stand_in() -> None:
    class WithDummies(NanoGPT):
        dummy_inputs = tokens()

    assert kinds(find_residuals(WithDummies())) == {"block": 4}


def test_a_graph_is_read_as_it_is() -> None:
    class Leaves(fx.Tracer):
        def is_leaf_module(self, module: nn.Module, name: str) -> bool:
            return isinstance(module, nn.Linear)

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.a(x)
            return x + self.b(x).relu()

    model = Two()
    gm = fx.GraphModule(model, Leaves().trace(model))
    plain = find_residuals(gm)
    shaped = find_residuals(gm, example_inputs=(torch.randn(2, 4),))
    assert [(a.node, a.skip) for a in plain] == [("add", "x"), ("add_1", "add")]
    assert [(a.node, a.skip) for a in shaped] == [("add", "x"), ("add_1", "add")]
    assert [a.shape for a in plain] == [(), ()]
    assert [a.shape for a in shaped] == [(2, 4), (2, 4)]
    assert not any("val" in node.meta for node in gm.graph.nodes), "the graph is the user's"


def test_a_model_without_residual_adds_is_no_error() -> None:
    assert (
        find_residuals(
            nn.Sequential(nn.Linear(4, 4), nn.ReLU()), example_inputs=(torch.randn(2, 4),)
        )
        == ()
    )


def test_the_model_stays_as_it_is() -> None:
    model = ResNet().train()
    x = torch.randn(2, 3, 16, 16)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    find_residuals(model, example_inputs=(x,))
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), f"{name}: batch statistics would have moved"
    assert all(parameter.grad is None for parameter in model.parameters())


# ---- errors ------------------------------------------------------------------------------------


def test_no_inputs() -> None:
    with pytest.raises(
        CaptureError, match=r"NanoGPT has no example inputs: pass example_inputs=\(x,\)"
    ):
        find_residuals(NanoGPT())
    assert issubclass(CaptureError, RFCompileError)


def test_what_cannot_be_captured_keeps_its_cause() -> None:
    class Branching(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(CaptureError, match="Branching cannot be captured as one graph") as caught:
        find_residuals(Branching(), example_inputs=(torch.randn(2),))
    assert caught.value.__cause__ is not None
    assert "eval mode" in str(caught.value)
    with pytest.raises(CaptureError, match="NanoGPT cannot be captured"):
        find_residuals(
            NanoGPT(), example_inputs={"input_ids": torch.full((1, 4), VOCABULARY), "z": 1}
        )


def test_not_a_model() -> None:
    with pytest.raises(OptionError, match=r"give a torch\.nn\.Module"):
        find_residuals(lambda x: x, example_inputs=(torch.randn(2),))


# ---- text and JSON -----------------------------------------------------------------------------


def test_text_and_json() -> None:
    found = find_residuals(ZOO["resnet"].build(), example_inputs=ZOO["resnet"].inputs())
    lines = as_text(found).splitlines()
    assert lines[0] == "6 residual adds: 4 block, 2 projection"
    assert lines[1].split() == ["kind", "module", "source", "sum", "branch", "through"]
    assert len(lines) == 8
    assert lines[4].split()[:3] == ["2", "projection", "blocks.2"]
    assert "f32[2, 16, 15, 15]" in lines[4]
    assert lines[4].endswith("body.0, body.3")
    plain = json.loads(as_json(found))
    assert plain["num_residuals"] == 6
    assert plain["kinds"] == {"block": 4, "projection": 2}
    assert plain["residuals"][2]["module"] == "blocks.2"
    assert plain["residuals"][2]["shape"] == [2, 16, 15, 15]
    assert as_text(()) == "0 residual adds"
    assert json.loads(as_json(())) == {"num_residuals": 0, "kinds": {}, "residuals": []}
