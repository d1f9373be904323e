"""analyze: condition numbers, kurtosis and norms by block, as data, text and JSON."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import Tensor, nn

import rfcompile as rf
from rfcompile.errors import BoundaryError, CaptureError
from rfcompile.report.measures import condition_number, condition_numbers, excess_kurtosis
from tests.zoo import NanoGPT, tokens


def test_condition_numbers() -> None:
    diagonal = torch.diag(torch.tensor([8.0, 4, 2]))
    wide = torch.cat([diagonal, torch.zeros(3, 5)], 1)
    assert condition_numbers(torch.stack([wide, wide * 3])).tolist() == [4, 4]
    # The geometric mean of 4 and 1.
    assert condition_number(torch.stack([diagonal, torch.eye(3)])) == pytest.approx(2)
    x = torch.stack([diagonal, torch.zeros(3, 3), torch.full((3, 3), math.nan)])
    first, singular, bad = condition_numbers(x).tolist()
    assert first == 4
    assert math.isnan(singular)
    assert math.isnan(bad)
    assert condition_number(torch.diag(torch.tensor([1.0, 0]))) == math.inf


def test_blocks_and_attentions() -> None:
    model = NanoGPT().train()
    inputs = tokens()
    state = torch.get_rng_state()
    found = rf.analyze(model, example_inputs=inputs)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    seen: list[Tensor] = []
    hooks = [block.register_forward_hook(lambda *a: seen.append(a[2])) for block in model.blocks]
    model.eval()(**inputs)
    for hook in hooks:
        hook.remove()
    first, last = found.blocks
    assert [first.module, last.module] == ["blocks.0", "blocks.1"]
    assert first.condition_out == last.condition_in == condition_number(seen[0])
    assert last.kurtosis == excess_kurtosis(seen[1])
    norms = [(a.module, a.kind, a.bound) for a in found.attentions]
    assert norms == [(f"blocks.{i}.attention", "softmax", math.sqrt(12)) for i in range(2)]
    # A row of softmax has a sum of 1, so a norm between 1 / sqrt(visible keys) and 1.
    assert all(1 < a.frobenius <= a.bound for a in found.attentions)
    assert "blocks.1.attention" in str(found)
    plain = json.loads(found.json(), parse_constant=pytest.fail)
    assert plain["blocks"][0]["condition_in"] == first.condition_in


def test_graying_shows_in_what_enters() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    x = torch.randn(2, 7, 16)
    new = rf.transform(model, rf.experimental.TokenGraying("svd", 0.5), example_inputs=(x,))
    before, after = (
        rf.analyze(model, example_inputs=(x,)).blocks[0],
        rf.analyze(new, example_inputs=(x,)).blocks[0],
    )
    assert after.condition_in == pytest.approx(before.condition_in**0.5, rel=1e-4)


def test_what_was_not_measured_is_noted() -> None:
    class Spare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.TransformerEncoderLayer(8, 2, 8) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            if x.sum() > 0:  # no graph of this
                return self.layers[0](x)
            return self.layers[0](x)

    found = rf.analyze(Spare(), example_inputs=(torch.randn(3, 2, 8),))
    assert found.notes[0].startswith("nothing was measured at layers.1")
    assert found.notes[1].startswith("attentions were not measured: Spare cannot be captured")
    assert not found.attentions
    assert json.loads(found.json())["blocks"][1]["condition_in"] is None
    with pytest.raises(CaptureError, match="has no example inputs"):
        rf.analyze(Spare())
    with pytest.raises(BoundaryError, match="no repeated blocks"):
        rf.analyze(nn.Linear(3, 3), example_inputs=(torch.ones(2, 3),))
