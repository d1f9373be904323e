"""transform(attention="polynomial"): every kind of model, and what it must go on doing."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import rfcompile as rf
from rfcompile.errors import AttentionError, OptionError, ShapeError
from rfcompile.experimental import PolynomialReport
from rfcompile.rewrites.attention.matrices import attention_matrices
from tests.zoo import ZOO, NanoGPT, tokens

EPS = torch.finfo(torch.float32).eps


def report_of(model: nn.Module) -> PolynomialReport:
    report = rf.rewrites_of(model)[-1]
    assert isinstance(report, PolynomialReport)
    return report


def output_of(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    made: Any = model(**inputs)
    tensor: Tensor = made if isinstance(made, Tensor) else made[0]
    return tensor


def polynomial(model: nn.Module, inputs: Any, **options: Any) -> nn.Module:
    return rf.transform(
        model, rf.experimental.PolynomialAttention(**options), example_inputs=inputs
    )


ATTENTIONS = {"gpt2": 1, "llama": 1, "bert": 1, "vit": 1, "t5": 3}  # in a layer


QUICK = (("gpt2", "sdpa"), ("vit", "eager"))
"""What every run of the tests takes; make test-slow takes the others."""


@pytest.mark.parametrize(
    ("name", "implementation"),
    [
        pytest.param(name, how, marks=[] if (name, how) in QUICK else pytest.mark.slow)
        for name in ATTENTIONS
        for how in ("sdpa", "eager")
    ],
)
def test_public_models(name: str, implementation: str) -> None:
    pytest.importorskip("transformers")
    entry = ZOO[name]
    layers = 2 if (name, implementation) == ("t5", "eager") else 1  # which reads the first's biases
    model: Any = entry.build(layers)
    model.set_attn_implementation(implementation)
    with torch.no_grad():  # at std 0.02 scores vanish
        for parameter in model.parameters():
            parameter.mul_(3 if parameter.dim() > 1 else 1)
    inputs = entry.inputs()
    new = polynomial(model, inputs, power=2)
    report = report_of(new)
    assert len(report.attentions) == ATTENTIONS[name] * layers
    spelling = "softmax.int" if implementation == "eager" else "scaled_dot_product_attention"
    assert all(spelling in attention.spelling for attention in report.attentions)
    matrices = attention_matrices(new, ((), inputs))
    assert [matrix.kind for matrix in matrices] == ["polynomial"] * len(matrices)
    model.eval()
    new.eval()
    before, after = output_of(model, inputs), output_of(new, inputs)
    assert after.isfinite().all()
    assert not torch.allclose(before, after, atol=1e-3)
    assert new.state_dict().keys() == model.state_dict().keys()
    after.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in new.parameters())


@pytest.mark.slow
def test_sdpa_and_eager_compute_the_same() -> None:
    pytest.importorskip("transformers")
    model: Any = ZOO["llama"].build(layers=1).eval()
    inputs = tokens() | {"attention_mask": torch.ones(2, 12, dtype=torch.int64)}
    inputs["attention_mask"][0, :4] = 0
    outputs = []
    for implementation in ("sdpa", "eager"):
        model.set_attn_implementation(implementation)
        new = polynomial(model, inputs).eval()
        outputs.append(output_of(new, inputs)[inputs["attention_mask"] > 0])
    torch.testing.assert_close(outputs[0], outputs[1])


@pytest.mark.slow
def test_generation_with_a_cache_gives_the_tokens_of_one_without() -> None:
    pytest.importorskip("transformers")
    model: Any = ZOO["llama"].build()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.dim() > 1 else 1)
    new: Any = polynomial(model, tokens()).eval()
    prompt = tokens()["input_ids"]
    made = [
        new.generate(prompt, max_new_tokens=6, do_sample=False, use_cache=cached, eos_token_id=None)
        for cached in (True, False)
    ]
    assert torch.equal(*made)
    assert made[0].shape[1] == 18


@pytest.fixture
def gpt() -> NanoGPT:
    return NanoGPT().eval()


def test_a_causal_model_stays_causal(gpt: NanoGPT) -> None:
    inputs = tokens()
    new = polynomial(gpt, inputs)
    changed = {"input_ids": inputs["input_ids"].clone()}
    changed["input_ids"][:, 7] += 1
    before, after = new(**inputs), new(**{k: v % 64 for k, v in changed.items()})
    assert torch.equal(before[:, :7], after[:, :7])
    assert not torch.equal(before[:, 7:], after[:, 7:])


@pytest.mark.slow
def test_it_compiles_exports_copies_and_pickles(gpt: NanoGPT) -> None:
    inputs = tokens()
    new = polynomial(gpt, inputs, scale="learned")
    expected = new(**inputs)
    same: Any
    for same in (copy.deepcopy(new), pickle.loads(pickle.dumps(new))):
        assert torch.equal(same(**inputs), expected)
        with torch.no_grad():  # it has a gain of its own
            same.blocks[0].attention.attention_gain.zero_()
        assert torch.equal(new(**inputs), expected)
        assert not torch.equal(same(**inputs), expected)
    dynamic = {"input_ids": {1: torch.export.Dim.AUTO}}
    program = torch.export.export(new, (), inputs, dynamic_shapes=dynamic)
    assert torch.equal(program.module()(**inputs), expected)
    longer = {"input_ids": torch.randint(64, (2, 20))}
    torch.testing.assert_close(program.module()(**longer), new(**longer))
    compiled = torch.compile(new, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**inputs), expected)
    compiled(**inputs).square().mean().backward()
    grads = [p.grad.clone() for p in new.parameters() if p.grad is not None]
    new.zero_grad()
    new(**inputs).square().mean().backward()
    for a, b in zip(grads, (p.grad for p in new.parameters() if p.grad is not None), strict=True):
        torch.testing.assert_close(a, b)


def test_the_original_stays_and_shares_its_parameters(gpt: NanoGPT) -> None:
    inputs = tokens()
    expected = gpt(**inputs)
    new = polynomial(gpt, inputs)
    assert torch.equal(gpt(**inputs), expected)
    assert dict(new.named_parameters()).keys() == dict(gpt.named_parameters()).keys()
    assert all(a is b for a, b in zip(new.parameters(), gpt.parameters(), strict=True))


def test_the_learned_gain_starts_at_the_norm_of_the_softmax(gpt: NanoGPT) -> None:
    inputs = tokens()
    new = polynomial(gpt, inputs, scale="learned")
    first = report_of(new).norms[0]
    # Two means of norms in float32, over 8 matrices of 12 x 12.
    assert first.after == pytest.approx(first.before, rel=200 * EPS)
    names = {name for name, _ in new.named_parameters()} - {n for n, _ in gpt.named_parameters()}
    assert names == {f"blocks.{i}.attention.attention_gain" for i in range(2)}
    assert all(p.shape == (1,) for n, p in new.named_parameters() if n in names)


@pytest.mark.slow
def test_the_report_has_norms_and_bounds(gpt: NanoGPT) -> None:
    report = report_of(polynomial(gpt, tokens(), power=1))
    assert [norm.bound for norm in report.norms] == [math.sqrt(12)] * 2
    assert all(0 < norm.before <= norm.bound for norm in report.norms)
    assert "blocks.1.attention" in str(report)


@pytest.mark.slow
def test_as_a_graph_it_is_the_module(gpt: NanoGPT) -> None:
    inputs = tokens()
    graph = torch.export.export(gpt, (), inputs).module()
    new = rf.transform(graph, rf.experimental.PolynomialAttention(power=2, scale="row"))
    torch.testing.assert_close(new(**inputs), polynomial(gpt, inputs, power=2)(**inputs))
    text = rf.diff(graph, new).text()
    assert "-scaled_dot_product_attention" in text
    assert "+polynomial_attention" in text


@pytest.mark.slow
def test_the_diff_of_modules_shows_it(gpt: NanoGPT) -> None:
    text = rf.diff(gpt, polynomial(gpt, tokens()), example_inputs=((), tokens())).text()
    assert text.count("+polynomial_attention") == 2


# ---- torch's own attention -----------------------------------------------------------------------


@pytest.mark.parametrize("batch_first", [True, False])
def test_torch_encoders(batch_first: bool) -> None:
    layer = nn.TransformerEncoderLayer(32, 4, 64, 0.0, batch_first=batch_first)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=batch_first).eval()
    x = torch.randn(2, 6, 32) if batch_first else torch.randn(6, 2, 32)
    padding = torch.zeros(2, 6, dtype=torch.bool)
    padding[0, 4:] = True
    new = polynomial(model, (x,), power=2)
    assert len(report_of(new).attentions) == 2
    expected = new(x, src_key_padding_mask=padding)
    with torch.no_grad():  # where torch has a kernel for the whole layer
        torch.testing.assert_close(new(x, src_key_padding_mask=padding), expected)
    short = new(x[:1, :4] if batch_first else x[:4, :1])
    torch.testing.assert_close(short, expected[:1, :4] if batch_first else expected[:4, :1])
    for same in (copy.deepcopy(new), pickle.loads(pickle.dumps(new))):
        assert torch.equal(same(x, src_key_padding_mask=padding), expected)
    causal = nn.Transformer.generate_square_subsequent_mask(6)
    y = new(x, mask=causal, is_causal=True)
    z = new(x.cumsum(1 if batch_first else 0), mask=causal, is_causal=True)
    first = (slice(None), 0) if batch_first else (0,)
    torch.testing.assert_close(y[first], z[first])


class Cross(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True, **options)

    def forward(self, x: Tensor, y: Tensor) -> Any:
        return self.attention(x, y, y)


def test_a_cross_attention_and_its_weights() -> None:
    x, y = torch.randn(2, 5, 16), torch.randn(2, 7, 16)
    for options in ({}, {"kdim": 16, "vdim": 16, "bias": False}):
        new: Any = polynomial(Cross(**options), (x, y))
        attended, weights = new(x, y)
        assert attended.shape == x.shape
        assert weights.shape == (2, 5, 7)
        without, none = new.attention(x, y, y, need_weights=False)
        assert none is None
        torch.testing.assert_close(attended, without)
        alone, _ = new.attention(x[0], y[0], y[0])
        torch.testing.assert_close(alone, attended[0])
    with pytest.raises(AttentionError, match="is_causal=True is a hint"):
        new.attention(x, x, x, is_causal=True)


BAD_MASKS: list[tuple[str, Tensor, type[Exception], str]] = [
    ("key_padding_mask", torch.ones(2, 7, dtype=torch.int64), AttentionError, "int64: give bool"),
    ("attn_mask", torch.ones(5, 7, dtype=torch.uint8), AttentionError, "uint8: give bool"),
    ("key_padding_mask", torch.ones(2, 5), ShapeError, r"\(2, 5\): give \(2, 7\)"),
    ("attn_mask", torch.ones(1, 7), ShapeError, r"\(1, 7\): give \(5, 7\) or \(4, 5, 7\)"),
    ("attn_mask", torch.ones(2, 5, 7), ShapeError, r"give \(5, 7\) or \(4, 5, 7\)"),
]


def test_masks_that_torch_refuses_are_refused() -> None:
    x, y = torch.randn(2, 5, 16), torch.randn(2, 7, 16)
    new: Any = polynomial(Cross(), (x, y))
    for need_weights in (True, False):
        for name, mask, error, message in BAD_MASKS:
            with pytest.raises(error, match=message):
                new.attention(x, y, y, need_weights=need_weights, **{name: mask})
        heads = torch.zeros(4, 5, 7).index_fill(-1, torch.tensor([6]), -math.inf)
        cut, _ = new.attention(x, y, y, attn_mask=heads, need_weights=need_weights)
        torch.testing.assert_close(cut, new(x, y[:, :6])[0])


def test_keys_of_its_own_are_refused() -> None:
    x = torch.randn(2, 5, 16)
    with pytest.raises(AttentionError, match="add_bias_kv or add_zero_attn"):
        polynomial(Cross(add_zero_attn=True), (x, x))


# ---- all together --------------------------------------------------------------------------------


@pytest.mark.slow
def test_all_methods_in_one_call() -> None:
    layer = nn.TransformerEncoderLayer(32, 4, 64, 0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    x = torch.randn(2, 6, 32)
    new = rf.transform(
        model,
        rf.experimental.PolynomialAttention(power=3, scale="learned"),
        rf.experimental.TokenGraying("dct", 0.95),
        residual="free",
        bits=4,
        example_inputs=(x,),
    )
    names = [type(report).__name__ for report in rf.rewrites_of(new)]
    assert names == ["ResidualReport", "PolynomialReport", "GrayingReport"]
    new(x).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in new.parameters())
    assert torch.equal(pickle.loads(pickle.dumps(new))(x), new(x))


def test_a_later_transform_keeps_it(gpt: NanoGPT) -> None:
    inputs = tokens()
    new = polynomial(gpt, inputs)
    wired = rf.transform(new, bits=8)
    assert [m.kind for m in attention_matrices(wired, ((), inputs))] == ["polynomial"] * 2
    free = rf.transform(new, residual="anneal", example_inputs=inputs)
    torch.testing.assert_close(free.eval()(**inputs), new(**inputs))


# ---- errors ------------------------------------------------------------------------------------


class Routed(nn.Module):
    """An attention, and a softmax that is none, in one module."""

    def __init__(self) -> None:
        super().__init__()
        self.project, self.router = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = F.scaled_dot_product_attention(self.project(x), x, x)
        return y * self.router(x).softmax(-1)[..., :1]


class Columns(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x @ x.mT).softmax(-2) @ x


MODELS: list[tuple[Callable[[], nn.Module], str]] = [
    (lambda: nn.Linear(8, 8), "Linear has no softmax attention: scaled_dot_product_attention"),
    (Routed, "a module of the model has both an attention and another softmax"),
    (Columns, r"0 of 1 attentions can be replaced; not: \(the model\)"),
]


@pytest.mark.parametrize(("build", "message"), MODELS)
def test_what_cannot_be_replaced_is_an_error(build: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(AttentionError, match=message):
        polynomial(build(), (torch.randn(2, 5, 8),))


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(8, 24)

    def forward(self, x: Tensor, inside: bool | None = None) -> Any:
        def attend(x: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(*self.project(x).chunk(3, -1))

        return attend(x) if inside is None else checkpoint(attend, x, use_reentrant=inside)


def test_a_checkpoint_must_hold_the_whole_module() -> None:
    """torch would compute the attention again outside of the module, with its softmax."""
    x = torch.randn(2, 5, 8, requires_grad=True)
    new: Any = polynomial(Checkpointed(), (x,))
    (expected,) = torch.autograd.grad(new(x).square().sum(), x)
    for reentrant in (False, True):
        (g,) = torch.autograd.grad(checkpoint(new, x, use_reentrant=False).square().sum(), x)
        assert torch.equal(g, expected)
        with pytest.raises(AttentionError, match="checkpoint the module itself"):
            new(x, reentrant)
        with torch.no_grad():  # nothing will be computed again
            assert torch.equal(new(x, reentrant), new(x))
    with pytest.raises(AttentionError, match="checkpoint the module itself"):
        torch.compile(new, backend="aot_eager")(x, False)  # type: ignore[no-untyped-call]


def test_twice_is_an_error(gpt: NanoGPT) -> None:
    with pytest.raises(AttentionError, match="has polynomial attention already"):
        polynomial(polynomial(gpt, tokens()), tokens())
    with pytest.raises(AttentionError, match="the graph has no softmax attention"):
        polynomial(torch.export.export(nn.Linear(8, 8), (torch.ones(2, 8),)).module(), None)


OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"power": 0}, "power=0 is not supported: give a whole number"),
    ({"power": 2.5}, "power=2.5"),
    ({"scale": "rows"}, "scale='rows' is not supported: choose"),
    ({"form": "linear"}, "only powers 1 and 2"),
]


@pytest.mark.parametrize(("options", "message"), OPTIONS)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        rf.experimental.PolynomialAttention(**options)
