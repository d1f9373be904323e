"""Models whose residual adds stand where a rewrite of sources does not look at once."""

from __future__ import annotations

import copy
import pickle
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rfcompile as rf
from rfcompile.errors import ResidualError, SourceError
from rfcompile.nn.residual_site import ResidualSite
from rfcompile.rewrites.residual.report import residual_report
from rfcompile.training import TemperatureRule
from tests.zoo import ZOO, pretrained, texts

WIDTH = 8
X = torch.randn(2, 4, WIDTH, generator=torch.Generator().manual_seed(0))


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(WIDTH, 6), nn.Tanh(), nn.Linear(6, WIDTH))


def sites_of(model: nn.Module) -> list[ResidualSite]:
    return [module for module in model.modules() if isinstance(module, ResidualSite)]


def annealed(model: nn.Module, number: int) -> nn.Module:
    """The model with a gain for each of ``number`` skips: at gain 1 it computes what it did."""
    new = rf.transform(model, residual="anneal", example_inputs=(X,))
    assert len(sites_of(new)) == number
    assert torch.equal(new(X), model(X))
    return new


# ---- key-value caches --------------------------------------------------------------------------


class Cache:
    """Tensors in an object that torch.export does not know."""

    def __init__(self, keys: list[Tensor]) -> None:
        self.keys = keys


class Cached(nn.Module):
    def __init__(self, config: Any = None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.config = config

    def forward(self, x: Tensor) -> Any:
        keys = []
        for block in self.blocks:
            keys.append(x)
            x = x + block(x)
        if self.config is not None and not self.config.text_config.use_cache:
            return (x,)
        return x, Cache(keys)


NESTED = SimpleNamespace(text_config=SimpleNamespace(use_cache=True))


@pytest.mark.parametrize("config", [None, NESTED], ids=["no switch", "a nested config"])
@pytest.mark.parametrize("mode", ["anneal", "free"])
def test_a_model_that_returns_a_cache(mode: Any, config: Any) -> None:
    model = Cached(config)
    assert len(rf.find_residuals(model, example_inputs=(X,))) == 2
    new = rf.transform(model, residual=mode, example_inputs=(X,))
    result, cache = new(X)
    expected, keys = model(X)
    assert len(cache.keys) == len(keys.keys) == 2
    assert torch.equal(result, expected) == (mode == "anneal")
    assert not model._forward_hooks
    assert not new._forward_hooks
    assert NESTED.text_config.use_cache


@pytest.mark.slow
def test_t5_with_its_own_configuration() -> None:
    """Its encoder and decoder have configurations of their own, where use_cache is True."""
    pytest.importorskip("transformers")
    config = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2}
    model = pretrained(
        "T5", config | {"num_heads": 4, "decoder_start_token_id": 0}, "ForConditionalGeneration"
    )().eval()
    inputs = texts()
    new = rf.transform(model, residual="anneal", example_inputs=((), inputs))
    assert len(sites_of(new)) == ZOO["t5"].kinds["block"]
    got, expected = new(**inputs), model(**inputs)
    assert torch.equal(got.logits, expected.logits)
    assert got.past_key_values is not None
