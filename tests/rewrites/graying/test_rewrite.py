"""TokenGraying: where it goes, padding, causal models, errors."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rfcompile as rf
from rfcompile.errors import BoundaryError, GrayingError, OptionError, ShapeError
from rfcompile.experimental import GrayingReport
from rfcompile.nn.graying import gray_tokens
from rfcompile.rewrites.graying.hook import TokenHook
from tests.zoo import ZOO, NanoGPT, tokens


class Attention(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        mask = None if attention_mask is None else attention_mask.bool()[:, None]
        return nn.functional.scaled_dot_product_attention(q, k, v, mask)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(16), Attention()

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return x + self.attention(self.norm(x), attention_mask=attention_mask)


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        for block in self.blocks:
            x = block(x, attention_mask)
        return x


@pytest.fixture
def encoder() -> Encoder:
    return Encoder()


X = torch.randn(2, 7, 16, generator=torch.Generator().manual_seed(0))


def grayed(model: nn.Module, form: Any = "dct", inputs: Any = (X,), **options: Any) -> nn.Module:
    how = rf.experimental.TokenGraying(form, **options) if isinstance(form, str) else form
    return rf.transform(model, how, example_inputs=inputs)


def report_of(model: nn.Module) -> GrayingReport:
    report = rf.rewrites_of(model)[-1]
    assert isinstance(report, GrayingReport)
    return report


@pytest.mark.parametrize("form", ["dct", "svd"])
def test_the_first_block_gets_grayed_tokens(encoder: Encoder, form: str) -> None:
    new = grayed(encoder, form, epsilon=0.6)
    assert torch.equal(new(X), encoder(gray_tokens(X, None, 0.6, form)))
    [place] = report_of(new).places
    assert place.module == "blocks.0"
    assert place.after < place.before
    if form == "svd":
        assert place.after == pytest.approx(place.before**0.6, rel=1e-4)
    assert new.state_dict().keys() == encoder.state_dict().keys()
    assert all(a is b for a, b in zip(new.parameters(), encoder.parameters(), strict=True))


def test_other_places(encoder: Encoder) -> None:
    new = grayed(encoder, rf.experimental.TokenGraying("dct", 0.7, modules="attention"))
    assert [p.module for p in report_of(new).places] == ["blocks.0.attention", "blocks.1.attention"]
    x = X
    for block in encoder.blocks:
        x = x + block.attention(gray_tokens(block.norm(x), None, 0.7, "dct"))
    assert torch.equal(new(X), x)
    named = grayed(encoder, rf.experimental.TokenGraying("svd", modules=("blocks.1",)))
    between = gray_tokens(encoder.blocks[0](X), None, 0.7, "svd")
    assert torch.equal(named(X), encoder.blocks[1](between))


def test_padding_does_not_matter(encoder: Encoder) -> None:
    new = grayed(encoder, epsilon=0.5)
    mask = torch.ones(2, 7, dtype=torch.int64)
    mask[0, 4:] = 0
    hook = TokenHook("blocks.0", "dct", 0.5, ("x", "attention_mask"))
    seen = gray_tokens(X, mask > 0, 0.5, "dct")
    for pairs in (mask, mask > 0, (mask - 1) * 1e4):
        (new_x, _), _ = hook(encoder, (X, pairs[:, None, None]), {})
        assert torch.equal(new_x, seen)
    y = new(X, mask[:, None].expand(-1, 7, -1).bool()[:, 0])
    torch.testing.assert_close(y[0, :4], new(X[:1, :4])[0])


@pytest.mark.parametrize("batch_first", [True, False])
def test_padding_of_torch_layers(batch_first: bool) -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=batch_first)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=batch_first).eval()
    x = X if batch_first else X.transpose(0, 1)
    padding = torch.zeros(2, 7, dtype=torch.bool)
    padding[0, 4:] = True
    new = grayed(model, "svd", (x,), epsilon=0.6)
    with torch.no_grad():
        y = new(x, src_key_padding_mask=padding)
        z = new(X[:1, :4] if batch_first else X[:1, :4].transpose(0, 1))
    y, z = (y[0, :4], z[0]) if batch_first else (y[:4, 0], z[:, 0])
    torch.testing.assert_close(y, z)


@pytest.mark.slow
def test_public_models() -> None:
    pytest.importorskip("transformers")
    places = {"bert": "encoder.layer.0", "vit": "layers.0", "t5": "encoder.block.0"}
    for name, place in places.items():
        entry = ZOO[name]
        new = grayed(entry.build(), "dct", entry.inputs(), epsilon=0.7)
        assert [p.module for p in report_of(new).places] == [place]
    assert report_of(new).left == (("decoder.block.0", "its attention is causal"),)
    bert = grayed(ZOO["bert"].build().eval(), "dct", tokens(), epsilon=0.7)
    inputs = tokens() | {"attention_mask": torch.ones(2, 12, dtype=torch.int64)}
    inputs["attention_mask"][0, 5:] = 0
    short = {name: x[:1, :5] for name, x in inputs.items()}
    torch.testing.assert_close(bert(**inputs)[0][0, :5], bert(**short)[0][0])


@pytest.mark.slow
def test_it_compiles_exports_copies_and_pickles(encoder: Encoder) -> None:
    new = grayed(encoder, epsilon=0.8)
    expected = new(X)
    for same in (copy.deepcopy(new), pickle.loads(pickle.dumps(new))):
        assert torch.equal(same(X), expected)
    program = torch.export.export(new, (X,), dynamic_shapes=({1: torch.export.Dim.AUTO},))
    assert torch.equal(program.module()(X), expected)
    torch.testing.assert_close(program.module()(X[:, :5]), new(X[:, :5]))
    compiled = torch.compile(new, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(X), expected)
    compiled(X).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in new.parameters())


@pytest.mark.slow
def test_compiled_it_takes_every_length(encoder: Encoder) -> None:
    encoder.blocks = encoder.blocks[:1].double()  # whose rounding stays small after the powers
    new: Any = rf.transform(
        encoder,
        rf.experimental.PolynomialAttention(),
        rf.experimental.TokenGraying(modules=("blocks.0",)),
        example_inputs=(X.double(),),
    )
    compiled = torch.compile(new, fullgraph=True, dynamic=True, backend="aot_eager")
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[0, 4:] = False
    for n in (7, 6):
        made = []
        for call in (new, compiled):
            x = X[:, :n].double().requires_grad_()
            y = call(x, mask[:, :n])
            made.append((y, *torch.autograd.grad(y.square().sum(), [x, *new.parameters()])))
        for a, b in zip(*made, strict=True):
            torch.testing.assert_close(a, b)


def test_a_second_graying_takes_the_place_of_the_first(encoder: Encoder) -> None:
    twice = grayed(grayed(encoder, epsilon=0.5), epsilon=0.9)
    assert torch.equal(twice(X), grayed(encoder, epsilon=0.9)(X))


def test_as_a_graph_it_is_the_module(encoder: Encoder) -> None:
    graph = torch.export.export(encoder, (X,)).module()
    for where in ("input", "attention", ("blocks.1",)):
        how = rf.experimental.TokenGraying("dct", 0.7, where)
        new = rf.transform(graph, how)
        torch.testing.assert_close(new(X), grayed(encoder, how)(X))
    assert "+gray_tokens: f32[2, 7, 16]" in rf.diff(graph, new).text()
    assert [p.module for p in report_of(new).places] == ["blocks.1"]


# ---- errors ------------------------------------------------------------------------------------


def test_causal_models_are_refused() -> None:
    with pytest.raises(GrayingError, match=r"at blocks\.0: its attention is causal") as caught:
        grayed(NanoGPT(), inputs=tokens())
    assert caught.value.modules == ("blocks.0",)
    graph = torch.export.export(NanoGPT(), (), tokens()).module()
    with pytest.raises(GrayingError, match=r"at blocks\.0: its attention is causal"):
        grayed(graph)


def test_a_model_that_turns_causal_later_is_refused(encoder: Encoder) -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True)
    new = grayed(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))
    mask = nn.Transformer.generate_square_subsequent_mask(7)
    with pytest.raises(GrayingError, match=r"layers\.0 is called with is_causal=True"):
        new(X, mask=mask)  # torch sees what the mask is
    one = {"input_ids": tokens()["input_ids"][:, :1]}
    with pytest.raises(GrayingError, match=r"the model has one token .*: give more"):
        grayed(NanoGPT(), inputs=one)


def test_a_causal_mask_in_a_graph_is_seen() -> None:
    pytest.importorskip("transformers")
    graph = torch.export.export(ZOO["llama"].build(), (), tokens()).module()
    with pytest.raises(GrayingError, match="causal"):
        grayed(graph)


def test_places_that_match_nothing(encoder: Encoder) -> None:
    with pytest.raises(BoundaryError, match="no module that is called matches 'layers"):
        grayed(encoder, rf.experimental.TokenGraying(modules=("layers.*",)))
    with pytest.raises(BoundaryError, match="no repeated blocks"):
        grayed(nn.Linear(16, 16))
    with pytest.raises(GrayingError, match="has no self-attention"):
        grayed(nn.Linear(16, 16), rf.experimental.TokenGraying(modules="attention"))


def test_masks_of_odd_shape_and_other_arguments(encoder: Encoder) -> None:
    new = grayed(encoder)
    with pytest.raises(ShapeError, match=r"attention_mask of blocks\.0 has shape \(2, 6\)"):
        new(X, torch.ones(2, 6, dtype=torch.bool))
    with pytest.raises(GrayingError, match=r"torch\.float32 of shape .*: give bool or integers"):
        new(X, torch.ones(2, 7))
    with pytest.raises(ShapeError, match="Token Graying takes"):
        new(X[None])


OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"form": "fft"}, "form='fft' is not supported: choose 'dct' or 'svd'"),
    ({"form": 3}, "form=3 is not supported"),
    ({"epsilon": 0.0}, "epsilon=0.0 is not supported: give a number above"),
    ({"form": "svd", "epsilon": 1.5}, r"epsilon=1\.5"),
    ({"modules": 3}, "modules=3 is not supported: give paths or patterns"),
]


@pytest.mark.parametrize(("options", "message"), OPTIONS)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        rf.experimental.TokenGraying(**options)
