"""Every report has text, plain data and JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rfcompile as rf
from rfcompile.report.table import TableReport, plain, table


@dataclass(frozen=True)
class Numbers(TableReport):
    values: tuple[float, ...]
    device: torch.device

    def lines(self) -> Iterator[str]:
        yield from table([["value"], *([str(value)] for value in self.values)])


def test_text_data_and_json_of_a_report() -> None:
    report = Numbers((1.5, float("nan"), float("-inf")), torch.device("cpu"))
    assert str(report) == report.text() == "value\n1.5\nnan\n-inf"
    expected = {"schema": "rfcompile.numbers/1", "values": [1.5, None, None], "device": "cpu"}
    assert report.to_dict() == expected
    assert json.loads(report.json(), parse_constant=pytest.fail) == report.to_dict()


def test_plain_keeps_what_json_has() -> None:
    value = {"a": (1, True, None, "text"), 2: [0.5]}
    assert plain(value) == {"a": [1, True, None, "text"], "2": [0.5]}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        attended = nn.functional.scaled_dot_product_attention(q, k, v)
        out: Tensor = x + self.out(attended)
        return out


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


X = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))
REPORTS: dict[str, Callable[[], Any]] = {
    "explain": lambda: rf.explain(Net(), bits=4, example_inputs=(X,)),
    "analyze": lambda: rf.analyze(Net(), example_inputs=(X,)),
    "residual": lambda: rewritten(rf.ResidualFree()),
    "attention": lambda: rewritten(rf.experimental.PolynomialAttention()),
    "graying": lambda: rewritten(rf.experimental.TokenGraying()),
    "low rank": lambda: rewritten(rf.LowRank(2, fit_steps=0)),
    "adapters": lambda: rewritten(rf.Adapters(2)),
    "quantized adapters": lambda: rf.rewrites_of(
        rf.adapters.quantize(rf.transform(Net(), rf.Adapters(2)), bits=4)
    )[-1],
}


def rewritten(how: Any) -> object:
    return rf.rewrites_of(rf.transform(Net(), how, example_inputs=(X,)))[-1]


@pytest.mark.parametrize("kind", REPORTS)
def test_every_report(kind: str) -> None:
    report = REPORTS[kind]()
    assert isinstance(report, TableReport)
    assert str(report) == report.text()
    assert len(report.text().splitlines()) > 2
    assert json.loads(report.json(), parse_constant=pytest.fail) == report.to_dict()
    rows = [value for value in report.to_dict().values() if isinstance(value, list) and value]
    assert rows, "it has rows"
