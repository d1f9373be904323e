"""Attention temperature: the mass that it solves for, where it acts, what it leaves."""

from __future__ import annotations

import copy
import functools
import os
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rfcompile.errors import ResidualError
from rfcompile.rewrites.attention.anatomy import Anatomy, anatomy
from rfcompile.rewrites.residual.initialization import Initialization, initialize
from rfcompile.rewrites.residual.report import Temperature
from rfcompile.rewrites.residual.temperature import LIMIT, TEMPERATURE, TemperatureRule, temper
from tests.rewrites.attention.test_anatomy import MODELS, Own, recorded
from tests.zoo import TRANSFORMERS, ZOO, NanoGPT, tokens

os.environ.setdefault("HF_HUB_OFFLINE", "1")

BISECTION = 1e-6
"""30 halvings of log(256) leave 1e-8 of a temperature; the mean is a float32 sum: 1e-6 in all."""


def scores(model: nn.Module, inputs: dict[str, Tensor], scale: float | None, causal: bool) -> Any:
    """The weights of every attention, from its recorded queries and keys."""
    for q, k, _ in recorded(model, inputs):
        keys = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
        logits = q @ keys.transpose(-1, -2) * (scale or q.shape[-1] ** -0.5)
        if causal:
            future = torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1)
            logits = logits.masked_fill(future, -torch.inf)
        yield logits.softmax(-1)


def mass(weights: Tensor) -> float:
    return float(weights.detach().diagonal(dim1=-2, dim2=-1).mean())


def build(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    if name in TRANSFORMERS or "-" in name:
        pytest.importorskip("transformers")
    model = (MODELS[name][0] if name in MODELS else ZOO[name].build)().eval()
    inputs = ZOO.get(name, ZOO["llama"]).inputs()
    return attentive(model, parts_of(name)), inputs


@functools.cache
def parts_of(name: str) -> Anatomy:
    """The anatomy holds names and numbers, which are those of every model from one config."""
    with torch.random.fork_rng(devices=[]):
        model = (MODELS[name][0] if name in MODELS else ZOO[name].build)().eval()
        return anatomy(model, ((), ZOO.get(name, ZOO["llama"]).inputs()))


def attentive(model: nn.Module, parts: Anatomy) -> nn.Module:
    """With queries and keys that let tokens attend to themselves: every mass is in reach."""
    modules = {linear.module for linear in parts.linears if "head" not in linear.module}
    initialize(model, parts, modules, Initialization(alpha=0.5))
    return model


# ---- the mass ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["nanogpt", "llama-eager", pytest.param("qwen3", marks=pytest.mark.slow)]
)
def test_every_attention_gets_its_mass(name: str) -> None:
    model, inputs = build(name)
    before = [mass(weights) for weights in scores(model, inputs, None, True)]
    got = temper(model, ((), inputs), TemperatureRule(0.36))
    after = [mass(weights) for weights in scores(model, inputs, None, True)]
    assert len(got) == len(after) == 2
    assert got[0].mass_before == pytest.approx(before[0], abs=BISECTION)
    for item, measured in zip(got, after, strict=True):
        assert item.mass_after == pytest.approx(0.6, abs=BISECTION)  # 0.36 ** (1 / 2)
        assert measured == pytest.approx(item.mass_after, abs=BISECTION)


@pytest.mark.slow
def test_deeper_models_attend_more_to_themselves() -> None:
    for layers in (1, 3):
        model = attentive(NanoGPT(layers), anatomy(NanoGPT(layers), ((), tokens())))
        got = temper(model, ((), tokens()), TemperatureRule(0.6))
        masses = [0.6 ** (1 / layers)] * layers
        assert [t.mass_after for t in got] == pytest.approx(masses, abs=BISECTION)


def test_a_mass_out_of_reach_is_reported_as_it_is() -> None:
    """Equal keys: every token attends to all of them alike, whatever the temperature."""
    model = NanoGPT(1).eval()
    attention = model.get_submodule("blocks.0.attention")
    qkv = attention.get_submodule("qkv")
    qkv.get_parameter("weight").data[32:64] = 0
    (got,) = temper(model, ((), tokens()), TemperatureRule(0.9))
    uniform = sum(1 / n for n in range(1, 13)) / 12
    assert got.mass_before == pytest.approx(uniform, abs=BISECTION)
    assert got.mass_after == pytest.approx(uniform, abs=BISECTION)
    assert 1 / LIMIT <= got.value <= LIMIT


def test_non_causal_attention_with_a_mask() -> None:
    model, inputs = build("bert")
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[:, 9:] = 0
    got = temper(model, ((), inputs | {"attention_mask": mask}), TemperatureRule(0.3))
    assert len(got) == 2
    # Queries of padding cannot attend to themselves: at most 9 of 12 tokens can. The second layer
    # of this untrained model does not get that far.
    assert got[0].mass_after == pytest.approx(0.3**0.5, abs=BISECTION)
    assert got[1].value == pytest.approx(1 / 16)
    assert got[1].mass_after < 0.3**0.5


# ---- where it acts -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "gpt-neox", "falcon"])
def test_queries_are_divided_and_nothing_else(name: str) -> None:
    model, inputs = build(name)
    before = recorded(model, inputs)[0]
    first = temper(model, ((), inputs))[0]
    after = recorded(model, inputs)[0]
    torch.testing.assert_close(after[0], before[0] / first.value)
    assert torch.equal(after[1], before[1])
    assert torch.equal(after[2], before[2])


@pytest.mark.parametrize("name", ["qwen3"])
@pytest.mark.slow
def test_fused_and_written_out_attention_agree(name: str) -> None:
    """One checkpoint, two implementations: the temperature is in the queries of both."""
    transformers = pytest.importorskip("transformers")
    model, inputs = build(name)
    temper(model, ((), inputs))
    config: Any = copy.deepcopy(model.config)
    config._attn_implementation = "eager"
    other = type(model)(config).eval()
    assert isinstance(other, transformers.PreTrainedModel)
    temper(other, ((), inputs))
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(other(**inputs).logits, model(**inputs).logits)


@pytest.mark.slow
def test_behind_a_norm_of_the_queries() -> None:
    model, inputs = build("qwen3")
    got = temper(model, ((), inputs))
    names = [f"model.layers.{layer}.self_attn.q_norm.{TEMPERATURE}" for layer in (0, 1)]
    assert [item.name for item in got] == names
    assert {n for n, _ in model.named_parameters() if TEMPERATURE in n} == set(names)


class Halves(nn.Module):
    """Two attentions whose queries one linear makes, as differential attention has."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(16, 16) for _ in range(3))

    def operands(self, x: Tensor) -> list[tuple[Tensor, ...]]:
        parts = [f(x).unflatten(-1, (4, -1)).transpose(1, 2) for f in (self.q, self.k, self.v)]
        return list(zip(*(part.chunk(2, 1) for part in parts), strict=True))

    def forward(self, x: Tensor) -> Tensor:
        first, second = (F.scaled_dot_product_attention(*parts) for parts in self.operands(x))
        return first - 0.5 * second


def test_two_attentions_of_one_query_linear() -> None:
    model, x = Halves(), torch.randn(2, 5, 16)
    (q_1, k_1, _), (q_2, k_2, _) = model.operands(x)
    first, second = temper(model, ((x,), {}), TemperatureRule(0.2))
    assert first.name == second.name == f"q.{TEMPERATURE}"
    assert first.value == second.value
    for found, (q, k, _), before in zip(
        (first, second), model.operands(x), (q_1, q_2), strict=True
    ):
        torch.testing.assert_close(q, before / found.value)
        assert mass((q @ k.mT / 2).softmax(-1)) == pytest.approx(found.mass_after, abs=BISECTION)
    assert torch.equal(model.operands(x)[0][1], k_1)
    assert torch.equal(model.operands(x)[1][1], k_2)


def test_a_side_path_to_the_query_linear() -> None:
    """A LoRA beside a fused linear: what both give is scaled, where the queries are."""

    class WithLoRA(nn.Module):
        def __init__(self, base: nn.Module) -> None:
            super().__init__()
            self.base, self.a, self.b = base, nn.Linear(32, 2), nn.Linear(2, 96)

        def forward(self, x: Tensor) -> Tensor:
            return self.base(x) + self.b(self.a(x))

    model, inputs = build("nanogpt")
    attention = model.get_submodule("blocks.0.attention")
    attention.qkv = WithLoRA(attention.get_submodule("qkv"))
    before = recorded(model, inputs)[0]
    first = temper(model, ((), inputs))[0]
    after = recorded(model, inputs)[0]
    assert first.name == f"blocks.0.attention.qkv.{TEMPERATURE}"
    torch.testing.assert_close(after[0], before[0] / first.value)
    assert torch.equal(after[1], before[1])
    assert torch.equal(after[2], before[2])


class OneNorm(nn.Module):
    """Queries and keys share a norm, which must not be scaled; a norm before is no way either."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.norm = nn.LayerNorm(16), nn.LayerNorm(4)
        self.q, self.k = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        q, k = (self.norm(f(x).unflatten(-1, (4, -1))).transpose(1, 2) for f in (self.q, self.k))
        return F.scaled_dot_product_attention(q, k, x.unflatten(-1, (4, -1)).transpose(1, 2))


class NormBefore(OneNorm):
    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        q, k = (F.normalize(f(x).unflatten(-1, (4, -1))).transpose(1, 2) for f in (self.q, self.k))
        return F.scaled_dot_product_attention(q, k + x[:, None, :, :4], k)


@pytest.mark.parametrize(
    ("cls", "text"),
    [
        (OneNorm, "norm makes the queries of an attention, but is also called elsewhere"),
        (NormBefore, "scaling the output of q does not scale its queries and nothing else"),
    ],
)
def test_what_scales_more_than_queries(cls: type[nn.Module], text: str) -> None:
    model = cls()
    with pytest.raises(ResidualError, match=text):
        temper(model, ((torch.randn(2, 5, 16),), {}))
    assert not any(TEMPERATURE in name for name in model.state_dict())


@pytest.mark.slow
def test_cross_attention_keeps_its_temperature() -> None:
    """Also where both sequences have one length."""
    pytest.importorskip("transformers")
    model = ZOO["t5"].build().eval()
    ids = tokens()["input_ids"]
    got = temper(model, ((), {"input_ids": ids, "decoder_input_ids": ids}))
    sides = ["encoder.block.{}.layer.0.SelfAttention", "decoder.block.{}.layer.0.SelfAttention"]
    assert [item.attention for item in got] == [side.format(i) for side in sides for i in (0, 1)]


@pytest.mark.parametrize("spelling", ["fused", "einsum", "bmm"])
def test_spellings_of_attention(spelling: str) -> None:
    model, x = Own(spelling=spelling), torch.randn(2, 5, 32)
    model.k.weight.data = model.q.weight.data
    (got,) = temper(model, ((x,), {}), TemperatureRule(0.5))
    assert got.name == f"q.{TEMPERATURE}"
    assert got.mass_after == pytest.approx(0.5, abs=BISECTION)
    q, k, v = (f(x).unflatten(-1, (4, -1)).transpose(1, 2) for f in (model.q, model.k, model.v))
    weights = (q @ k.mT * (8**-0.5 if spelling == "fused" else 1)).softmax(-1)
    assert mass(weights) == pytest.approx(0.5, abs=BISECTION)
    torch.testing.assert_close(model(x), model.out((weights @ v).transpose(1, 2).flatten(2)))


# ---- learnable or fixed ------------------------------------------------------------------------


def test_a_learnable_one_learns() -> None:
    model, inputs = build("nanogpt")
    got = temper(model, ((), inputs))
    model(**inputs).square().sum().backward()
    for item in got:
        parameter = model.get_parameter(item.name)
        assert parameter.shape == (1,)
        assert float(parameter.detach()) == pytest.approx(item.value)
        assert parameter.grad is not None
        assert parameter.grad.abs() > 0


def test_a_fixed_one_is_a_buffer() -> None:
    model, inputs = build("nanogpt")
    got = temper(model, ((), inputs), TemperatureRule(learnable=False))
    assert [name for name, _ in model.named_buffers() if TEMPERATURE in name] == [
        t.name for t in got
    ]
    assert not [name for name, _ in model.named_parameters() if TEMPERATURE in name]
    assert {item.name for item in got} <= set(model.state_dict())


def test_the_state_and_the_copy_have_it() -> None:
    model, inputs = build("gpt2")
    got = temper(model, ((), inputs))
    twin = copy.deepcopy(model)
    assert torch.equal(twin(**inputs).logits, model(**inputs).logits)
    twin.get_parameter(got[0].name).data.mul_(2)
    assert not torch.equal(twin(**inputs).logits, model(**inputs).logits)
    twin.load_state_dict(model.state_dict())
    assert torch.equal(twin(**inputs).logits, model(**inputs).logits)


def test_a_module_that_is_called_twice_has_one_temperature() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Own()
            self.block.k.weight.data = self.block.q.weight.data

        def forward(self, x: Tensor) -> Tensor:
            return self.block(self.block(x))

    model, x = Twice(), torch.randn(2, 5, 32)
    first, second = temper(model, ((x,), {}), TemperatureRule(0.3))
    assert first.name == second.name == f"block.q.{TEMPERATURE}"
    assert first.value == second.value == float(model.get_parameter(first.name).detach())
    assert first.mass_after == pytest.approx(0.3**0.5, abs=BISECTION)
    masses = [mass(weights) for weights in scores(model, {"x": x}, None, False)]
    assert masses == pytest.approx([first.mass_after, second.mass_after], abs=BISECTION)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    model = NanoGPT().to(dtype).eval()
    temper(model, ((), tokens()))
    assert model(**tokens()).dtype is dtype


# ---- errors ------------------------------------------------------------------------------------


def test_queries_that_no_linear_makes() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Identity()
            self.out = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(F.scaled_dot_product_attention(x, x, x))

    model = Plain()
    text = r"^the attention of the model cannot be tempered: no linear makes its queries\. Pass"
    with pytest.raises(ResidualError, match=text):
        temper(model, ((torch.randn(2, 2, 5, 8),), {}))
    assert not list(model.buffers())


@pytest.mark.parametrize("own", [{}, {"batch_first": True}, {"bias": False}, {"kdim": 8}])
def test_torchs_own_attention(own: dict[str, Any]) -> None:
    """Its queries, and nothing else, are divided; it stays what it is otherwise."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(16, 2, **own)

        def forward(self, x: Tensor, **options: Any) -> Any:
            return self.attention(x, x[..., : own.get("kdim", 16)], x, **options)

    model, x = Model(), torch.randn(5, 5, 16)
    plain = copy.deepcopy(model)
    (found,) = temper(model, ((x,), {}), TemperatureRule(0.3))
    assert found.name == f"attention.{TEMPERATURE}"
    mask = torch.zeros(5, 5, dtype=torch.bool).index_fill(1, torch.tensor([4]), True)
    options = {"key_padding_mask": mask, "average_attn_weights": False}
    assert not torch.allclose(model(x)[0], plain(x)[0])
    name = "in_proj_weight" if "kdim" not in own else "q_proj_weight"
    plain.get_parameter(f"attention.{name}").data[:16] /= found.value
    if own.get("bias", True):
        plain.attention.in_proj_bias.data[:16] /= found.value
    for given in ({}, options, {"need_weights": False}):
        torch.testing.assert_close(model(x, **given), plain(x, **given))
    torch.testing.assert_close(model.eval()(x[0])[0], plain.eval()(x[0])[0])
    copied = copy.deepcopy(model)
    assert torch.equal(copied(x)[0], model(x)[0])
    assert temper(model, ((x,), {}))[0].name == found.name
    assert set(model.state_dict()) == {f"attention.{TEMPERATURE}", *plain.state_dict()}


@pytest.mark.parametrize("share", [0.0, 1.0, -0.5, 2.0])
def test_a_share_is_between_zero_and_one(share: float) -> None:
    with pytest.raises(ResidualError, match=rf"^self_mass={share} is not supported: it is a share"):
        TemperatureRule(share)


def test_no_attention_no_temperature() -> None:
    assert temper(nn.Linear(4, 4), ((torch.randn(2, 4),), {})) == ()


def test_tempered_once() -> None:
    model, inputs = build("nanogpt")
    first = temper(model, ((), inputs), TemperatureRule(0.3))
    second = temper(model, ((), inputs), TemperatureRule(0.35))
    assert [item.name for item in second] == [item.name for item in first]
    assert isinstance(second[0], Temperature)
    value = float(model.get_parameter(second[0].name).detach())
    assert second[0].value == pytest.approx(value)
    assert second[0].mass_before == pytest.approx(first[0].mass_after, abs=BISECTION)
    weights = scores(model, inputs, None, True)
    assert [mass(w) for w in weights] == pytest.approx([0.35**0.5] * 2, abs=BISECTION)
