"""One dialect for modules: paths, patterns, the last parts of paths, and a function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import rfcompile as rf
from rfcompile.errors import BoundaryError, OptionError
from rfcompile.graph.modules import Modules, matching, matching_any

X = (torch.randn(2, 8),)
PATHS = ["", "up", "blocks.0", "blocks.0.up", "blocks.1", "blocks.1.up", "blocks.10.up"]


@pytest.mark.parametrize(
    ("pattern", "meant"),
    [
        ("", [""]),
        ("up", ["up"]),  # there is such a path: that module, and no other
        ("blocks.1", ["blocks.1"]),
        ("1.up", ["blocks.1.up"]),
        ("*.up", ["blocks.0.up", "blocks.1.up", "blocks.10.up"]),
        ("blocks.?", ["blocks.0", "blocks.1"]),
        ("[01].up", ["blocks.0.up", "blocks.1.up"]),
        ("down", []),
        ("p", []),
    ],
)
def test_what_a_pattern_means(pattern: str, meant: list[str]) -> None:
    assert matching(pattern, PATHS) == meant


def test_several_patterns_give_each_path_once_and_in_order() -> None:
    assert matching_any(["*.up", "blocks.0.up", ""], PATHS) == ["", *PATHS[3::2], "blocks.10.up"]


@pytest.mark.parametrize(
    "modules", [3, [3], ["up", None], nn.Linear, nn.Linear(2, 2), {"up": 8}], ids=str
)
@pytest.mark.parametrize(
    "door",
    [
        lambda modules: rf.Wire(4, modules),
        lambda modules: rf.LowRank(2, modules=modules),
        lambda modules: rf.Adapters(2, modules=modules),
        lambda modules: rf.experimental.TokenGraying(modules=modules),
        lambda modules: rf.analyze(net(), modules=modules, example_inputs=X),
    ],
)
def test_what_is_no_text_is_an_error(modules: object, door: Callable[[object], object]) -> None:
    with pytest.raises(OptionError, match="give paths or patterns as texts"):
        door(modules)


def test_nowhere_is_an_error_that_says_why() -> None:
    nothing: list[Modules] = [[], lambda *_: False]
    for modules in nothing:
        with pytest.raises(BoundaryError, match="chooses no module of Sequential"):
            rf.transform(net(), rf.Wire(4, modules))
    with pytest.raises(BoundaryError, match="the repeated blocks of Sequential have no branches"):
        rf.transform(net(), rf.Wire(4, "branches"))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.up(x)


def net() -> nn.Module:
    return nn.Sequential(Block(), Block())


SPELLINGS: list[Callable[[], Modules]] = [
    lambda: "up",
    lambda: "*.up",
    lambda: ["0.up", "1.up"],
    lambda: (path for path in ("0.up", "1.up")),
    lambda: lambda path, _: path.endswith("up"),
]


@pytest.mark.parametrize("spelled", SPELLINGS)
def test_every_door_reads_modules_alike(spelled: Callable[[], Modules]) -> None:
    expected = {"0.up", "1.up"}
    wired = rf.explain(net(), rf.Wire(4, spelled()), example_inputs=X)
    assert {site.module for site in wired.sites} == expected
    analysis = rf.analyze(net(), modules=spelled(), example_inputs=X)
    assert {block.module for block in analysis.blocks} == expected
    for how in (rf.LowRank(2, fit_steps=0, modules=spelled()), rf.Adapters(2, modules=spelled())):
        report: Any = rf.rewrites_of(rf.transform(net(), how))[-1]
        assert {site.path for site in report.sites} == expected


def test_every_door_refuses_a_path_that_there_is_not() -> None:
    for how in (rf.Wire(4, "down"), rf.LowRank(2, modules="down"), rf.Adapters(2, modules="down")):
        with pytest.raises((BoundaryError, OptionError), match="'down'"):
            rf.transform(net(), how)
    with pytest.raises(BoundaryError, match="'down'"):
        rf.analyze(net(), modules="down", example_inputs=X)
