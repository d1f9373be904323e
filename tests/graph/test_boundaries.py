"""Where the wire goes: repeated blocks, branches, named modules; and what finds nothing."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from rfcompile.errors import BoundaryError
from rfcompile.graph.boundaries import find_blocks, find_boundaries, match_paths
from rfcompile.graph.places import module_calls


class Block(nn.Module):
    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(channels, 1)
        self.mlp = nn.Sequential(nn.Linear(channels, 8), nn.ReLU(), nn.Linear(8, channels))
        self.gate = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.gate(x))


class Other(Block):
    pass


class Residual(nn.Module):
    """A block of a ResNet."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.shortcut = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.shortcut(x))


class Holder(nn.Module):
    """A module with children of these names."""

    def __init__(self, **children: nn.Module) -> None:
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)


class Chain(Holder):
    """It calls its children one after the other, as timm's RegNet does."""

    def forward(self, x: Tensor) -> Tensor:
        for child in self.children():
            x = child(x)
        return x


class Norm(nn.LayerNorm):
    """One of the many modules of one class that are no blocks."""

    def __init__(self) -> None:
        super().__init__(4)


def blocks(count: int, cls: Callable[[], nn.Module] = Block) -> list[nn.Module]:
    return [cls() for _ in range(count)]


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU())


# ---- auto ------------------------------------------------------------------------------------


def resnet() -> nn.Module:
    """Stages of blocks between a stem and a head, all of it Sequentials."""
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU()),
        nn.Sequential(*blocks(2, Residual)),
        nn.Sequential(*blocks(3, Residual)),
        nn.Linear(4, 2),
    )


AUTO: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "list": (lambda: Holder(layers=nn.ModuleList(blocks(2))), ["layers.0", "layers.1"]),
    "between others": (
        lambda: nn.Sequential(nn.Linear(4, 4), *blocks(2), Other(), nn.Linear(4, 4)),
        ["1", "2"],
    ),
    "two classes": (
        lambda: nn.Sequential(Block(), Other(), Block(), Other()),
        ["0", "1", "2", "3"],
    ),
    "encoder and decoder": (
        lambda: Holder(
            encoder=Holder(layers=nn.ModuleList(blocks(2))),
            decoder=Holder(block=nn.Sequential(*blocks(2, Other))),
        ),
        ["encoder.layers.0", "encoder.layers.1", "decoder.block.0", "decoder.block.1"],
    ),
    "resnet": (resnet, ["1.0", "1.1", "2.0", "2.1", "2.2"]),
    "resnet with named stages": (
        lambda: Holder(
            stem=nn.Conv2d(3, 4, 3),
            layer1=nn.Sequential(*blocks(2, Residual)),
            layer2=nn.Sequential(*blocks(2, Residual)),
        ),
        ["layer1.0", "layer1.1", "layer2.0", "layer2.1"],
    ),
    "named blocks": (
        lambda: nn.Sequential(OrderedDict(a=Block(), b=Block(), c=nn.ReLU())),
        ["a", "b"],
    ),
    "blocks of blocks": (
        lambda: nn.ModuleList(
            Holder(inner=nn.ModuleList(blocks(2)), tail=Block()) for _ in range(2)
        ),
        ["0", "1"],
    ),
    "transformers of torch": (
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), 2),
        ["layers.0", "layers.1"],
    ),
    "sequentials, if nothing else": (lambda: nn.Sequential(mlp(), mlp()), ["0", "1"]),
    "sequentials beside blocks": (
        lambda: Holder(down=nn.ModuleList([mlp(), mlp()]), layers=nn.ModuleList(blocks(2))),
        ["layers.0", "layers.1"],
    ),
    "blocks that are attributes": (
        lambda: Chain(stem1=nn.Linear(4, 4), b1=Block(), b2=Block(), b3=Other(), b10=Block()),
        ["b1", "b2", "b10"],
    ),
    "stages that are attributes": (
        lambda: Chain(
            s1=Chain(b1=Block(), b2=Block()), s2=Chain(b1=Block()), norm1=Norm(), norm2=Norm()
        ),
        ["s1", "s2"],
    ),
    "one block many times": (lambda: nn.ModuleList([Block()] * 3), ["0"]),
    "an empty place": (
        lambda: nn.ModuleList([Block(), None, Block()]),  # type: ignore[list-item]
        ["0", "2"],
    ),
}


@pytest.mark.parametrize("name", AUTO)
def test_repeated_blocks(name: str) -> None:
    make, expected = AUTO[name]
    model = make()
    found = find_boundaries(model)
    assert list(found) == expected
    assert all(model.get_submodule(path) is module for path, module in found.items())


def test_a_module_with_two_paths_is_one_boundary() -> None:
    layers = nn.ModuleList(blocks(2))
    model = Holder(encoder=Holder(layers=layers), decoder=Holder(layers=layers))
    assert list(find_boundaries(model)) == ["encoder.layers.0", "encoder.layers.1"]
    assert list(find_boundaries(model, ["decoder.layers.1"])) == ["decoder.layers.1"]
    both = ["decoder.layers.1", "encoder.layers.1"]
    assert list(find_boundaries(model, both)) == ["encoder.layers.1"]


@pytest.mark.parametrize(
    "model",
    [
        nn.Linear(4, 4),
        mlp(),
        nn.Sequential(*[nn.Linear(4, 4) for _ in range(3)]),
        nn.Sequential(Block(), Other()),
        Holder(a=Block(), b=Block()),
        Holder(norm1=Norm(), norm2=Norm(), b1=Block(), b2=Other()),
        nn.ModuleDict({"0": Block(), "1": Block()}),
        nn.ModuleList([nn.LSTM(4, 4), nn.LSTM(4, 4)]),
    ],
    ids=lambda model: type(model).__name__,
)
def test_no_blocks_is_an_error_that_says_what_to_do(model: nn.Module) -> None:
    with pytest.raises(
        BoundaryError, match=rf"^{type(model).__name__} has no repeated blocks"
    ) as e:
        find_boundaries(model)
    assert "modules=['path.of.module', ...]" in str(e.value)
    assert isinstance(e.value, ValueError)
    with pytest.raises(BoundaryError, match="has no repeated blocks"):
        find_boundaries(model, "branches")


# ---- by hand ---------------------------------------------------------------------------------


def test_branches() -> None:
    model = Holder(layers=nn.ModuleList(blocks(2)))
    assert list(find_boundaries(model, "branches")) == [
        f"layers.{i}.{name}" for i in range(2) for name in ("attention", "mlp")
    ]


def test_branches_in_a_list() -> None:
    model = nn.ModuleList(Holder(layer=nn.ModuleList([mlp(), Block()])) for _ in range(2))
    assert list(find_boundaries(model, "branches")) == ["0.layer.1", "1.layer.1"]


def test_paths_and_patterns() -> None:
    model = Holder(layers=nn.ModuleList(blocks(3)), head=nn.Linear(4, 2))
    assert list(find_boundaries(model, ["head", "layers.1"])) == ["layers.1", "head"]
    assert list(find_boundaries(model, ("layers.?",))) == [f"layers.{i}" for i in range(3)]
    assert list(find_boundaries(model, (p for p in ["*.gate"]))) == [
        f"layers.{i}.gate" for i in range(3)
    ]
    assert "layers" not in find_boundaries(model, ["*"]), "a list is never called"
    assert list(find_boundaries(mlp(), ["*"])) == ["", "0", "1"]
    assert list(find_boundaries(mlp(), [""])) == [""], "the model itself"


def test_a_function_chooses() -> None:
    model = Holder(layers=nn.ModuleList(blocks(2)))
    found = find_boundaries(model, lambda path, module: isinstance(module, nn.ReLU))
    assert list(found) == ["layers.0.mlp.1", "layers.1.mlp.1"]
    asked: list[str] = []
    with pytest.raises(BoundaryError, match="chooses no module of Holder"):
        find_boundaries(model, lambda path, module: bool(asked.append(path)))
    assert "layers" not in asked


def test_a_list_with_a_forward_is_a_module_like_others() -> None:
    class Blocks(nn.ModuleList):
        def forward(self, x: Any) -> Any:
            return x

    assert list(find_boundaries(Holder(layers=Blocks(blocks(1))), ["layers"])) == ["layers"]


def test_errors() -> None:
    model = Holder(layers=nn.ModuleList(blocks(2)))
    with pytest.raises(BoundaryError, match=r"no module that is called matches 'towers'.*'blocks'"):
        find_boundaries(model, "towers")
    for path in ("layers.2", "layers", "Layers.0"):
        with pytest.raises(BoundaryError, match=f"no module that is called matches '{path}'") as e:
            find_boundaries(model, ["layers.0", path])
        assert "such as layers.0, layers.0.attention" in str(e.value)
    with pytest.raises(BoundaryError, match=r"such as \(none\)"):
        match_paths(("x",), [""])
    with pytest.raises(BoundaryError, match="chooses no module"):
        find_boundaries(model, [])


# ---- graphs ------------------------------------------------------------------------------------


def called(gm: fx.GraphModule) -> dict[str, str]:
    return {call.path: call.cls for node in gm.graph.nodes for call in module_calls(node)}


@pytest.mark.parametrize(
    "name",
    [
        "between others",
        "two classes",
        "resnet",
        "sequentials, if nothing else",
        "blocks that are attributes",
        "stages that are attributes",
    ],
)
def test_a_graph_has_the_blocks_of_its_module(name: str) -> None:
    make, expected = AUTO[name]
    model = make().eval()
    x = torch.randn(1, 3, 8, 4) if name == "resnet" else torch.randn(3, 4)
    assert find_blocks(called(fx.symbolic_trace(model))) == expected
    exported = torch.export.export(model, (x,)).module()
    assert isinstance(exported, fx.GraphModule)
    assert find_blocks(called(exported)) == expected


def test_blocks_by_class_name() -> None:
    block, linear = "my.Block", "torch.nn.modules.linear.Linear"
    sequential = "torch.nn.modules.container.Sequential"
    assert find_blocks({"h.0": block, "h.1": block, "h.2": "my.Other"}) == ["h.0", "h.1"]
    assert find_blocks({"": sequential, "a": block, "b": block}) == ["a", "b"]
    nested = dict.fromkeys(("h.0", "h.0.experts.0", "h.0.experts.1", "h.1"), block)
    assert find_blocks(nested) == ["h.0", "h.1"]
    for without in (
        {},
        {"": block},
        {"h.0": block, "g.0": block},
        {"h.0": linear, "h.1": linear},
        {"": "my.Model", "left": block, "right": block},
    ):
        assert find_blocks(without) == []
