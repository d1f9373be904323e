"""Sine-activated low rank: the formula, the rewrite of modules and graphs, the fit, the report."""

from __future__ import annotations

import copy
import io
import math
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rfcompile as rf
from rfcompile.errors import NonFiniteError, OptionError, RFCompileWarning, StateError
from rfcompile.low_rank import LowRankLinear, LowRankReport
from rfcompile.nn.low_rank import low_rank_weight
from rfcompile.rewrites.adapters.rewrite import merge_adapters
from rfcompile.rewrites.low_rank.factors import drawn, fitted, omega_for
from rfcompile.rewrites.low_rank.linear import merge_low_rank
from rfcompile.rewrites.low_rank.rewrite import LowRank
from tests.rewrites.models import WIDTH, graph_of, made, moved, tokens

UP, DOWN = "blocks.0.up", "blocks.1.down"


def low(model: nn.Module, path: str = UP) -> LowRankLinear:
    module = model.get_submodule(path)
    assert isinstance(module, LowRankLinear)
    return module


def report_of(model: nn.Module) -> LowRankReport:
    report = rf.rewrites_of(model)[-1]
    assert isinstance(report, LowRankReport)
    return report


# ---- the formula -------------------------------------------------------------------------------


def test_the_formula_element_by_element() -> None:
    left, right = torch.randn(3, 2), torch.randn(2, 4)
    weight = low_rank_weight(left, right, 1.5, 2.0)
    for i in range(3):
        for j in range(4):
            phase = 1.5 * sum(float(left[i, k] * right[k, j]) for k in range(2))
            assert math.isclose(float(weight[i, j]), math.sin(phase) / 2, abs_tol=1e-6)
    plain = low_rank_weight(left, right, None, 2.0)
    torch.testing.assert_close(plain, left @ right / 2, rtol=1e-6, atol=1e-6)


def test_the_sine_has_the_rank_that_the_product_has_not() -> None:
    new = drawn(torch.ones(64, 64), 4, omega_for(2.5, 64, 4), None, torch.Generator())
    stable, numerical = rf.low_rank.effective_ranks(
        low_rank_weight(new.left, new.right, new.omega, new.gain)
    )
    plain_stable, plain = rf.low_rank.effective_ranks(new.left @ new.right)
    assert plain == 4
    assert numerical > 32
    assert stable > plain_stable


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_becomes_no_number(bad: float) -> None:
    model = rf.transform(made(), LowRank(4, start="fresh"))
    with torch.no_grad():
        low(model).left[0, 0] = bad
    assert model(tokens()).isnan().any()
    weights = made()
    with torch.no_grad():
        weights.blocks[0].up.weight[1, 1] = bad  # type: ignore[union-attr]
    with pytest.raises(NonFiniteError):
        rf.transform(weights, rf.LowRank(4))


def test_bfloat16_is_off_by_no_more_than_stated() -> None:
    new = drawn(torch.ones(32, 32), 4, omega_for(2.5, 32, 4), None, torch.Generator())
    left, right = new.left.bfloat16(), new.right.bfloat16()
    coarse = low_rank_weight(left, right, new.omega, new.gain)
    assert coarse.dtype is torch.bfloat16
    assert new.omega is not None
    scaled = (new.omega * left).double()  # the factor's own rounding
    phase = scaled @ right.double()
    bound = 2**-8 * (phase.abs() + 1) / new.gain  # + 1: the result is rounded, too
    assert ((coarse.double() - phase.sin() / new.gain).abs() <= bound).all()


# ---- from scratch --------------------------------------------------------------------------------


def test_a_fresh_weight_has_the_asked_spread_and_a_usual_scale() -> None:
    for rank, inputs in ((1, 64), (8, 256)):
        weight = torch.ones(256, inputs)
        new = drawn(weight, rank, omega_for(2.5, inputs, rank), None, torch.Generator())
        # The spread of n products is itself random: a standard deviation of about
        # 2.5 * sqrt((1 / out + 1 / in) / (2 rank)); five of them.
        sigma = 2.5 * math.sqrt((1 / 256 + 1 / inputs) / (2 * rank))
        assert abs(new.spread - 2.5) < 5 * sigma
        assert new.gain == inputs**0.5
        dense = low_rank_weight(new.left, new.right, new.omega, new.gain)
        assert 0.3 < float(dense.std()) * inputs**0.5 < 1.0


def test_zeros_start_at_zero_and_learn() -> None:
    model = made()
    nn.init.zeros_(model.get_submodule(DOWN).weight)  # type: ignore[arg-type]
    for start in ("fresh", "fit"):
        new = rf.transform(model, LowRank(4, start=start))  # type: ignore[arg-type]
        assert not low(new, DOWN).weight.any()
        new(tokens()).sum().backward()
        gradient = low(new, DOWN).left.grad
        assert gradient is not None
        assert gradient.any()


def test_seeds_and_the_original() -> None:
    model = made()
    before = copy.deepcopy(model.state_dict())
    first, again, other = (
        rf.transform(model, LowRank(4, start="fresh", seed=seed)) for seed in (0, 0, 1)
    )
    assert torch.equal(low(first).left, low(again).left)
    assert not torch.equal(low(first).left, low(other).left)
    assert not torch.equal(low(first).right, low(first, "blocks.1.up").right)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


# ---- the fit -------------------------------------------------------------------------------------


def test_a_plain_fit_is_the_truncated_svd() -> None:
    weight = torch.randn(12, 20, generator=torch.Generator().manual_seed(0))
    fit = fitted(weight, 5, None, None, torch.Generator(), 0)
    values = torch.linalg.svdvals(weight)
    best = float(values[5:].norm() / values.norm())
    assert fit.error == fit.svd_error
    assert math.isclose(fit.error or 0, best, rel_tol=1e-5)
    off = weight - low_rank_weight(fit.left, fit.right, None, fit.gain)
    assert math.isclose(float(off.norm() / weight.norm()), best, rel_tol=1e-4)


def test_a_fit_reports_its_error_and_is_not_worse_than_its_start() -> None:
    weight = torch.randn(24, 24, generator=torch.Generator().manual_seed(0))
    errors = []
    for steps in (0, 100):
        fit = fitted(weight, 6, 7.0, None, torch.Generator(), steps)
        dense = low_rank_weight(fit.left, fit.right, fit.omega, fit.gain)
        measured = float((weight - dense).norm() / weight.norm())
        assert math.isclose(fit.error or 0, measured, rel_tol=1e-4)
        errors.append(measured)
    assert errors[1] < errors[0]


@pytest.mark.parametrize("omega", [None, 7.0])
@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_a_fit_has_no_unit(scale: float, omega: float | None) -> None:
    weight = torch.randn(12, 10, generator=torch.Generator().manual_seed(0))
    fit = fitted(weight * scale, 3, omega, None, torch.Generator(), 10)
    dense = low_rank_weight(fit.left, fit.right, fit.omega, fit.gain) / scale
    measured = float((weight - dense).norm() / weight.norm())
    assert math.isclose(fit.error or 0, measured, rel_tol=1e-4)


def test_a_weight_that_is_a_sine_of_low_rank_is_found_again() -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = (0.4 * torch.randn(*s, generator=generator) for s in ((30, 3), (3, 30)))
    weight = low_rank_weight(left, right, 1.0, 4.0)  # phases below pi / 2: arcsin is exact
    assert float((left @ right).abs().max()) < math.pi / 2
    fit = fitted(weight, 3, 10.0, 4.0, torch.Generator(), 0)
    assert (fit.error or 0) < 1e-5
    assert (fit.svd_error or 0) > 1e-3


# ---- modules -------------------------------------------------------------------------------------


def test_the_new_model_is_an_ordinary_one() -> None:
    model = rf.transform(made(), LowRank(4, start="fresh"))
    x = tokens()
    expected = model(x)
    expected.sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    names = model.state_dict().keys()
    assert {f"{UP}.left", f"{UP}.right", f"{UP}.bias", "head.weight"} <= names
    assert f"{UP}.weight" not in names
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), expected)
        assert str(rf.rewrites_of(twin)[0]) == str(rf.rewrites_of(model)[0])
    exported = torch.export.export(model, (x,)).module()
    assert torch.equal(exported(x), expected)
    assert "omega" in repr(low(model))
    with torch.autocast("cpu", torch.bfloat16):
        assert low(model)(torch.randn(2, WIDTH)).dtype is torch.bfloat16
    half = copy.deepcopy(model).bfloat16()
    assert half(x).dtype is torch.bfloat16


def test_a_state_dict_says_omega_and_gain() -> None:
    fit = LowRank(2, fit_steps=0)
    model, other = (rf.transform(made(seed=seed), fit) for seed in (0, 1))
    assert low(model).gain != low(other).gain  # each fit chose its own
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file))
    assert torch.equal(other(tokens()), model(tokens()))
    plain = rf.transform(made(), rf.Adapters(rank=2, alpha=1.0))
    sine = moved(rf.transform(made(), rf.Adapters(rank=2, sine=True)))
    plain.load_state_dict(sine.state_dict())
    assert torch.equal(plain(tokens()), sine(tokens()))
    for bad in ([1.0], [math.nan, 1.0], [1.0, 0.0]):
        with pytest.raises(StateError, match="damaged scales"):
            low(model).set_extra_state(torch.tensor(bad))


def test_compiled_in_one_graph_and_trained() -> None:
    model = rf.transform(made(), LowRank(4, start="fresh"))
    twin = copy.deepcopy(model)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    model(tokens()).square().sum().backward()
    compiled(tokens()).square().sum().backward()
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert p.grad is not None, name
        # float32 sums in another order: a handful of roundings of numbers of this size
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-4, atol=1e-4 * float(p.grad.abs().max()))


def test_merging_gives_the_dense_model_back() -> None:
    model = rf.transform(made(), LowRank(4, start="fresh"))
    expected = model(tokens())
    paths = merge_low_rank(model)
    assert len(paths) == 4
    assert type(model.get_submodule(UP)) is nn.Linear
    assert model.state_dict().keys() == made().state_dict().keys()
    assert torch.equal(model(tokens()), expected)
    assert merge_low_rank(model) == ()


@pytest.mark.parametrize("whole", [True, False])
def test_merging_what_was_compiled_returns_its_own_paths(whole: bool) -> None:
    model: Any = made()
    if whole:
        model = torch.compile(model, backend="eager")
    else:
        model.blocks[0] = torch.compile(model.blocks[0], backend="eager")
    rank = LowRank(2, start="fresh", modules=["up"])
    paths = ("blocks.0.up", "blocks.1.up")
    assert merge_low_rank(rf.transform(model, rank)) == paths
    assert merge_adapters(rf.transform(model, rf.Adapters(2, modules=["up"]))) == paths


def test_hooks_and_shared_modules_stay() -> None:
    model = made()
    model.blocks[1] = model.blocks[0]
    seen = []
    model.blocks[0].up.register_forward_hook(lambda *_: seen.append(1))  # type: ignore[union-attr]
    new = rf.transform(model, LowRank(4, start="fresh"))
    assert len(report_of(new).sites) == 2
    assert new.get_submodule("blocks.0.up") is new.get_submodule("blocks.1.up")
    new(tokens())
    assert seen == [1, 1]


def test_a_weight_that_others_read_is_the_computed_one() -> None:
    attention = nn.ModuleDict({"a": nn.MultiheadAttention(WIDTH, 2, batch_first=True)})
    new = rf.transform(attention, LowRank(4, start="fresh", modules="out_proj"))
    x = torch.randn(2, 3, WIDTH)
    expected, _ = new["a"](x, x, x)  # type: ignore[index]
    merge_low_rank(new)
    assert torch.equal(new["a"](x, x, x)[0], expected)  # type: ignore[index]


def test_conv1d_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=2, n_embd=WIDTH, n_head=2, vocab_size=11)
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config).eval()  # its head is tied, and stays
    rank = LowRank(WIDTH, sine=False, modules=["c_fc", "attn.c_attn"])
    with pytest.warns(RFCompileWarning, match="saves nothing"):
        full = rf.transform(model, rank)
    expected, got = model(tokens()).logits, full(tokens()).logits
    # rank 16 of 16: the product of the factors is the weight, but for float32 roundings
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    site = full.get_submodule("transformer.h.0.mlp.c_fc")
    assert isinstance(site, LowRankLinear)
    assert site.weight.shape == (WIDTH, 4 * WIDTH)
    assert report_of(full).sites[0].shape == (3 * WIDTH, WIDTH)
    merge_low_rank(full)
    assert type(full.get_submodule("transformer.h.0.mlp.c_fc")).__name__ == "Conv1D"
    torch.testing.assert_close(full(tokens()).logits, got, rtol=1e-5, atol=1e-5)


def test_with_everything_else_in_one_call() -> None:
    model = rf.transform(
        made(), LowRank(4, start="fresh"), residual="free", bits=4, example_inputs=(tokens(),)
    )
    assert [type(report).__name__ for report in rf.rewrites_of(model)] == [
        "ResidualReport", "LowRankReport",
    ]  # fmt: skip
    assert low(model).right.shape == (4, WIDTH)
    model(tokens()).sum().backward()
    assert low(model).left.grad is not None
    diff = rf.diff(made(), model, example_inputs=(tokens(),))
    assert "aten.sin.default" in str(diff)


def test_compiled_models() -> None:
    compiled = torch.compile(made(), backend="eager")
    new = rf.transform(compiled, LowRank(4, start="fresh"))
    assert isinstance(low(new, f"_orig_mod.{UP}"), LowRankLinear)
    inner = made()
    compiled_block: Any = torch.compile(inner.blocks[0], backend="eager")
    inner.blocks[0] = compiled_block
    sites = report_of(rf.transform(inner, LowRank(4, start="fresh"))).sites
    assert [site.path for site in sites][:2] == ["blocks.0.up", "blocks.0.down"]


# ---- graphs --------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["export", "symbolic"])
def test_a_graph_computes_what_the_module_does(how: str) -> None:
    model = made()
    x = tokens()
    gm = graph_of(model, how)
    rank = LowRank(4, fit_steps=5)
    graph, module = rf.transform(gm, rank), rf.transform(model, rank)
    assert torch.equal(graph(x), module(x))
    assert [s.path for s in report_of(graph).sites] == [s.path for s in report_of(module).sites]
    graph(x).sum().backward()
    assert graph.get_parameter(f"{UP}.left").grad is not None
    assert torch.equal(gm(x), model(x))


# ---- the report ----------------------------------------------------------------------------------


def test_the_report_counts() -> None:
    model = rf.transform(made(), LowRank(4))
    report = report_of(model)
    assert [site.path for site in report.sites] == [
        "blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down",
    ]  # fmt: skip
    assert report.parameters == (4 * 2 * WIDTH**2, 4 * 4 * 3 * WIDTH)
    assert report.nbytes == (4 * report.parameters[0], 4 * report.parameters[1])
    before = sum(p.numel() for p in made().parameters())
    after = sum(p.numel() for p in model.parameters())
    assert before - after == report.parameters[0] - report.parameters[1]
    site = report.sites[0]
    assert site.error is not None
    assert site.svd_error is not None
    dense = made().get_submodule(UP).weight
    assert isinstance(dense, Tensor)
    off = float(((low(model).weight - dense).norm() / dense.norm()).detach())
    assert math.isclose(site.error, off, rel_tol=1e-4)
    assert f"{report.parameters[0]:,} -> {report.parameters[1]:,} parameters" in str(report)
    assert UP in str(report)


def test_matrices_that_are_no_linears_are_named() -> None:
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 32, batch_first=True)
    model = nn.TransformerEncoder(layer, 2)
    new = rf.transform(model, LowRank(4, start="fresh"))
    assert "layers.0.self_attn.in_proj_weight" in report_of(new).left
    assert "in_proj_weight" in str(report_of(new))
    x = torch.randn(2, 3, WIDTH)
    new.eval()
    with torch.no_grad():
        expected = new(x)  # torch's fast path reads the weights
        merge_low_rank(new)
        torch.testing.assert_close(new(x), expected, rtol=1e-5, atol=1e-5)


# ---- what cannot be ------------------------------------------------------------------------------


def test_a_rank_larger_than_the_matrix() -> None:
    with pytest.raises(OptionError, match=r"rank=17 .* blocks\.0\.up is 32 x 16: .* at most 16"):
        rf.transform(made(), rf.LowRank(17))


def test_a_rank_that_saves_nothing_warns_with_the_figures() -> None:
    with pytest.warns(RFCompileWarning, match=r"rank 11 takes 528 parameters in place of 512"):
        rf.transform(made(), LowRank(11, start="fresh"))


def test_modules_that_match_nothing() -> None:
    with pytest.raises(OptionError, match=r"'blocks\.\*\.upp' .* Linears here are .*blocks\.0\.up"):
        rf.transform(made(), rf.LowRank(4, modules=["blocks.*.upp"]))
    with pytest.raises(OptionError, match="chooses no linear"):
        rf.transform(made(), rf.LowRank(4, modules=lambda *_: False))
    for odd in (3, [3]):
        with pytest.raises(OptionError, match="paths or patterns as texts"):
            rf.transform(made(), rf.LowRank(4, modules=odd))  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="no repeated blocks"):
        rf.transform(nn.Sequential(nn.Linear(4, 4)), rf.LowRank(2))
    gm = torch.export.export(made(), (tokens(),)).module()
    with pytest.raises(OptionError, match="no linear has this path"):
        rf.transform(gm, rf.LowRank(4, modules=["nope"]))


@pytest.mark.parametrize("modules", [["up"], ["blocks.*.up"], lambda path, _: path.endswith("up")])
def test_ways_to_choose(modules: object) -> None:
    new = rf.transform(made(), LowRank(2, start="fresh", modules=modules))  # type: ignore[arg-type]
    assert [site.path for site in report_of(new).sites] == ["blocks.0.up", "blocks.1.up"]


class Tripled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 3 * super().forward(x)


def test_a_linear_with_a_forward_of_its_own_stays() -> None:
    model = made()
    model.blocks[0].up = Tripled(WIDTH, 2 * WIDTH)
    new = rf.transform(model, rf.Adapters(rank=2))
    assert torch.equal(new(tokens()), model(tokens()))
    assert "blocks.0.up.weight" in str(rf.rewrites_of(new)[-1])
    with pytest.raises(OptionError, match=r"'blocks\.0\.up' .* Tripled: its forward is its own"):
        rf.transform(model, rf.LowRank(2, modules=["up"]))
    fresh = rf.transform(made(), LowRank(2, start="fresh", modules=["up"]))
    with pytest.raises(OptionError, match=r"LowRankLinear: .* changed already \(merge it first\)"):
        rf.transform(fresh, rf.Adapters(rank=2, modules=["up"]))


def test_tied_meta_and_sharded_weights() -> None:
    tied = made(tied=True)
    rf.transform(tied, LowRank(4, start="fresh"))  # the blocks are not tied
    with pytest.raises(OptionError, match=r"tied, embedding\.weight = head\.weight"):
        rf.transform(tied, rf.LowRank(4, modules=["head"]))
    gm = torch.export.export(tied, (tokens(),)).module()
    with pytest.raises(OptionError, match="tied"):
        rf.transform(gm, rf.LowRank(4, modules=["head"]))
    with pytest.raises(OptionError, match="meta device"):
        rf.transform(made().to("meta"), rf.LowRank(4))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank=0"),
        ({"rank": 2.0}, r"rank=2\.0"),
        ({"rank": 2, "omega": -1.0}, r"omega=-1\.0"),
        ({"rank": 2, "omega": math.nan}, "omega=nan"),
        ({"rank": 2, "g": 0}, "g=0"),
        ({"rank": 2, "spread": "auto"}, r"spread='auto' .* give a positive number\."),
        ({"rank": 2, "start": "svd"}, "start='svd'"),
        ({"rank": 2, "fit_steps": -1}, "fit_steps=-1"),
        ({"rank": 2, "sine": False, "omega": 3.0}, "without a sine"),
    ],
)
def test_options_outside_their_rule(options: dict[str, object], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        LowRank(**options)  # type: ignore[arg-type]


def test_an_empty_batch() -> None:
    rank = LowRank(2, start="fresh", modules="0")
    layer = rf.transform(nn.Sequential(nn.Linear(8, 6)), rank)
    assert layer(torch.empty(0, 8)).shape == (0, 6)
    x = torch.randn(4, 8)
    inner = low(layer, "0")
    assert torch.equal(layer(x), F.linear(x, inner.weight, inner.bias))
