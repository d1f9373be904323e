"""The residual-free start: what every linear of a block gets, against the formulas."""

from __future__ import annotations

import functools
import math
import os
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rfcompile.errors import ResidualError
from rfcompile.find.linears import Linear
from rfcompile.rewrites.attention.anatomy import Anatomy, Attention, Heads, anatomy
from rfcompile.rewrites.residual.initialization import (
    Initialization,
    Initialized,
    initialize,
    orthogonal,
)
from tests.zoo import TRANSFORMERS, WIDTH, ZOO, NanoGPT, tokens

os.environ.setdefault("HF_HUB_OFFLINE", "1")

RULE = Initialization(alpha=1.5, beta=0.7, gain=2.0, down=1.25, seed=3)


def rounding(rows: int, columns: int) -> float:
    """Loss of orthogonality of a Householder QR in float32: rows x columns x the unit roundoff."""
    return rows * columns * 2.0**-24


def assert_near(got: Tensor, expected: Tensor, bound: float) -> None:
    assert got.shape == expected.shape
    worst = float((got.double() - expected.double()).abs().max())
    assert worst <= bound, f"{worst:.2e} above {bound:.2e}"


def build(name: str) -> tuple[nn.Module, Anatomy]:
    if name in TRANSFORMERS:
        pytest.importorskip("transformers")
    return ZOO[name].build(), parts_of(name)


@functools.cache
def parts_of(name: str) -> Anatomy:
    """The anatomy holds names and numbers, which are those of every model from one config."""
    with torch.random.fork_rng(devices=[]):
        return anatomy(ZOO[name].build(), ((), ZOO[name].inputs()))


def in_blocks(parts: Anatomy) -> set[str]:
    """Modules of the linears that have a block's number in their path."""
    return {one.module for one in parts.linears if any(p.isdigit() for p in one.module.split("."))}


def matrix(model: nn.Module, linear: Linear) -> Tensor:
    weight = model.get_parameter(linear.weight).detach()
    return weight.mT if linear.is_transposed else weight


def heads_of(model: nn.Module, heads: Heads | None) -> list[Tensor]:
    assert heads is not None
    return [matrix(model, heads.linear)[list(features)] for features in heads.features]


@pytest.fixture
def noises(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Every matrix of normal numbers that is drawn."""
    drawn: list[Tensor] = []
    real: Any = torch.randn

    def randn(*size: int, **kwargs: Any) -> Tensor:
        drawn.append(real(*size, **kwargs))
        return drawn[-1]

    monkeypatch.setattr(torch, "randn", randn)
    return drawn


# ---- queries and keys --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "gpt-neox", "llama"])
def test_scores_are_the_best_fit_of_a_noisy_identity(name: str, noises: list[Tensor]) -> None:
    model, parts = build(name)
    noises.clear()
    initialize(model, parts, in_blocks(parts), RULE)
    size = WIDTH // 4
    # In order of use: first each linear's orthogonal start, then each attention's heads.
    weights = {linear.weight for linear in parts.linears if linear.module in in_blocks(parts)}
    drawn = iter(noises[len(weights) :])
    for attention in parts.attentions:
        queries, keys = heads_of(model, attention.query), heads_of(model, attention.key)
        group = len(queries) // len(keys)
        for number, query in enumerate(queries):
            key = keys[number // group]
            noise = next(drawn).double() / math.sqrt(WIDTH)
            target = RULE.alpha * noise + RULE.beta * torch.eye(WIDTH)
            u, s, vh = torch.linalg.svd(target)
            if number % group == 0:  # the best approximation of this rank; both sides share it
                best = u[:, :size] * s[:size] @ vh[:size]
                for side in (query, key):
                    assert_near(side @ side.T, s[:size].diag(), WIDTH**2 * 2.0**-24 * float(s[0]))
            else:  # the best for this key: what is left has no part in the key's rows
                k = key.double()
                best = target @ torch.linalg.pinv(k) @ k
            assert_near(query.T @ key, best, WIDTH**2 * 2.0**-22 * float(s[0]) ** 2)
        next(drawn), next(drawn)  # values and output


def test_the_noise_has_the_stated_size() -> None:
    """One head as wide as the model: the product is the target itself."""
    width = 128
    model = nn.ModuleDict({name: nn.Linear(width, width) for name in "qkvo"})
    everything = (tuple(range(width)),)
    linears = {n: Linear(f"{n}.weight", f"{n}.bias", n, is_transposed=False) for n in "qkvo"}
    attention = Attention("", True, *(Heads(linears[n], everything) for n in "qkvo"))
    initialize(model, Anatomy(tuple(linears.values()), (attention,)), "qkvo", RULE)
    target = (model.get_parameter("q.weight").T @ model.get_parameter("k.weight")).detach()
    noise = (target - RULE.beta * torch.eye(width)) / RULE.alpha * math.sqrt(width)
    # Standard errors of a mean, a mean of the diagonal and a standard deviation, 5 of each.
    assert abs(float(noise.mean())) < 5 / width
    assert abs(float(noise.diagonal().mean())) < 5 / math.sqrt(width)
    assert abs(float(noise.std()) - 1) < 5 / (width * math.sqrt(2))


# ---- values, outputs, the rest -----------------------------------------------------------------


@pytest.mark.parametrize("name", ["nanogpt", "gpt2", "llama", "falcon"])
def test_values_and_outputs_are_orthogonal(name: str) -> None:
    model, parts = build(name)
    initialize(model, parts, in_blocks(parts), RULE)
    for attention in parts.attentions:
        value = torch.cat(heads_of(model, attention.value))
        assert attention.output is not None
        columns = matrix(model, attention.output.linear).T
        output = torch.cat([columns[list(features)] for features in attention.output.features])
        for side in (value, output):
            bound = RULE.gain**2 * rounding(*side.shape)
            assert_near(side @ side.T, RULE.gain**2 * torch.eye(len(side)), bound)
        assert len(output) == WIDTH


@pytest.mark.parametrize("name", ["nanogpt", "gpt2", "mixtral", "deepseek-v3"])
def test_the_rest_is_orthogonal_with_its_scale(name: str) -> None:
    model, parts = build(name)
    done = initialize(model, parts, in_blocks(parts), RULE)
    weights = {item.parameter for item in done if item.rule == "mlp"}
    assert weights
    stacks = 0
    for linear in parts.linears:
        if linear.weight not in weights:
            continue
        stack = matrix(model, linear)
        stacks += stack.dim() == 3
        for one in stack if stack.dim() == 3 else [stack]:
            out, width = one.shape
            scale = max(math.sqrt(out / width), 1.0) * (RULE.down if out < width else 1)
            gram = one.T @ one if out >= width else one @ one.T
            bound = scale**2 * rounding(out, width)
            assert_near(gram, scale**2 * torch.eye(len(gram)), bound)
    expected = {"mixtral": 4, "deepseek-v3": 2}  # the first layer of DeepSeek has no experts
    assert stacks == expected.get(name, 0)


def test_the_experts_differ() -> None:
    model, parts = build("mixtral")
    initialize(model, parts, in_blocks(parts), RULE)
    experts = model.get_parameter("model.layers.0.mlp.experts.down_proj")
    assert len({expert.sum().item() for expert in experts}) == len(experts)


@pytest.mark.parametrize(("rows", "columns"), [(5, 5), (7, 3), (3, 7), (1, 4)])
def test_orthogonal(rows: int, columns: int) -> None:
    w = orthogonal(rows, columns, torch.Generator().manual_seed(0))
    assert w.shape == (rows, columns)
    gram = w @ w.T if rows <= columns else w.T @ w
    assert_near(gram, torch.eye(min(rows, columns)), rounding(rows, columns))


def test_orthogonal_is_uniform() -> None:
    """The mean of a uniform one is zero: without the signs of R its diagonal would not be."""
    generator = torch.Generator().manual_seed(0)
    trials = 400
    mean = sum(orthogonal(4, 4, generator) for _ in range(trials)) / trials
    assert isinstance(mean, Tensor)
    assert float(mean.abs().max()) < 5 * 0.5 / math.sqrt(trials)  # an entry's deviation is 1 / 2


# ---- which -------------------------------------------------------------------------------------


def test_exactly_the_listed_parameters_change() -> None:
    model, parts = build("gpt2")
    for parameter in model.parameters():
        parameter.data.add_(0.5)  # no bias is zero
    before = {name: value.clone() for name, value in model.named_parameters()}
    layer = {module for module in in_blocks(parts) if ".h.1." in module}
    done = initialize(model, parts, layer)
    changed = {n for n, value in model.named_parameters() if not torch.equal(value, before[n])}
    assert changed == {item.parameter for item in done}
    prefix = "transformer.h.1"
    assert done == (
        Initialized(f"{prefix}.attn.c_attn.weight", "query, key, value"),
        Initialized(f"{prefix}.attn.c_proj.weight", "output"),
        Initialized(f"{prefix}.mlp.c_fc.weight", "mlp"),
        Initialized(f"{prefix}.mlp.c_proj.weight", "mlp"),
        Initialized(f"{prefix}.attn.c_attn.bias", "zero"),
        Initialized(f"{prefix}.attn.c_proj.bias", "zero"),
        Initialized(f"{prefix}.mlp.c_fc.bias", "zero"),
        Initialized(f"{prefix}.mlp.c_proj.bias", "zero"),
    )
    for item in done:
        if item.rule == "zero":
            assert not model.get_parameter(item.parameter).any()


def test_roles_of_separate_linears() -> None:
    model, parts = build("llama")
    done = initialize(model, parts, {m for m in in_blocks(parts) if ".layers.0." in m})
    rules = {item.parameter.removeprefix("model.layers.0."): item.rule for item in done}
    assert rules == {
        "self_attn.q_proj.weight": "query",
        "self_attn.k_proj.weight": "key",
        "self_attn.v_proj.weight": "value",
        "self_attn.o_proj.weight": "output",
        "mlp.gate_proj.weight": "mlp",
        "mlp.up_proj.weight": "mlp",
        "mlp.down_proj.weight": "mlp",
    }


def test_keys_and_values_of_a_cross_attention_belong_to_it() -> None:
    """They read the encoder, so they are in no branch of the decoder's stream."""
    model, parts = build("t5")
    cross = "decoder.block.0.layer.1.EncDecAttention"
    done = initialize(model, parts, {f"{cross}.q", f"{cross}.o"})
    rules = {item.parameter: item.rule for item in done}
    names = {"q": "query", "k": "key", "v": "value", "o": "output"}
    assert rules == {f"{cross}.{name}.weight": rule for name, rule in names.items()}


def test_layer_scales_become_one() -> None:
    model, parts = build("convnext")
    done = initialize(model, parts, {linear.module for linear in parts.linears})
    ones = [item.parameter for item in done if item.rule == "one"]
    assert ones == [f"stages.{i}.gamma" for i in (1, 2, 4, 5)]
    for name in ones:
        assert (model.get_parameter(name) == 1).all()


def test_the_seed_decides() -> None:
    states: list[Tensor] = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(states))
        model, parts = build("llama")
        initialize(model, parts, in_blocks(parts), Initialization(seed=seed))
        states.append(model.get_parameter("model.layers.1.mlp.up_proj.weight"))
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])


def test_the_global_random_numbers_stay() -> None:
    model, parts = build("nanogpt")
    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    initialize(model, parts, in_blocks(parts))
    assert torch.equal(torch.rand(2), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    model = NanoGPT().to(dtype)
    parts = anatomy(model, ((), tokens()))
    initialize(model, parts, in_blocks(parts), RULE)
    other = NanoGPT()
    initialize(other, parts, in_blocks(parts), RULE)
    for name, value in model.named_parameters():
        assert value.dtype is dtype
        if "mlp" in name:
            assert torch.equal(value, other.get_parameter(name).to(dtype)), name


# ---- errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["weight", "bias"])
def test_a_frozen_parameter(part: str) -> None:
    model, parts = build("nanogpt")
    name = f"blocks.1.mlp.2.{part}"
    model.get_parameter(name).requires_grad_(False)
    before = {n: value.clone() for n, value in model.named_parameters()}
    with pytest.raises(ResidualError, match=rf"^{name} is frozen, .* residual='anneal' on a trai"):
        initialize(model, parts, in_blocks(parts))
    for n, value in model.named_parameters():
        assert torch.equal(value, before[n]), n


def test_a_frozen_parameter_elsewhere() -> None:
    model, parts = build("nanogpt")
    model.get_parameter("tokens.weight").requires_grad_(False)
    assert initialize(model, parts, in_blocks(parts))


def test_a_parameter_of_another_class() -> None:
    class Sharded(nn.Parameter):
        pass

    model, parts = build("nanogpt")
    linear = model.get_submodule("blocks.0.mlp.0")
    linear.weight = Sharded(torch.randn(2 * WIDTH, WIDTH))
    with pytest.raises(ResidualError, match=r"^blocks\.0\.mlp\.0\.weight is a Sharded: initialize"):
        initialize(model, parts, in_blocks(parts))
