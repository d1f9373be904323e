"""The anatomy of attentions by a numeric argument: change the rows of a head, see what changes."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from rfcompile.find.linears import Linear
from rfcompile.rewrites.attention.anatomy import Anatomy, Attention, Heads, anatomy
from tests.zoo import GROUPED, HEADS, TRANSFORMERS, WIDTH, ZOO, NanoGPT, pretrained, tokens

os.environ.setdefault("HF_HUB_OFFLINE", "1")


class Recorder(TorchFunctionMode):
    """The query, key and value of every attention, [batch, head, token, feature]."""

    def __init__(self) -> None:
        super().__init__()
        self.products: list[tuple[Tensor, Tensor]] = []
        self.fused: list[tuple[Tensor, Tensor, Tensor]] = []

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is F.scaled_dot_product_attention:
            self.fused.append(args[:3])
        elif function in (torch.matmul, Tensor.matmul) and args[0].dim() == args[1].dim() == 4:
            self.products.append(args[:2])
        return function(*args, **(kwargs or {}))

    def operands(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        if self.fused:
            return self.fused
        pairs = zip(self.products[::2], self.products[1::2], strict=True)
        return [(q, k.transpose(-1, -2), v) for (q, k), (_, v) in pairs]


def recorded(model: nn.Module, inputs: dict[str, Tensor]) -> list[tuple[Tensor, Tensor, Tensor]]:
    with torch.no_grad(), Recorder() as recorder:
        model(**inputs)
    return recorder.operands()


def rows(model: nn.Module, linear: Linear) -> Tensor:
    weight = model.get_parameter(linear.weight).data
    return weight.T if linear.is_transposed else weight


def changed_heads(before: Tensor, after: Tensor) -> set[int]:
    return {h for h in range(before.shape[1]) if not torch.equal(before[:, h], after[:, h])}


def check(model: nn.Module, inputs: dict[str, Tensor], number: int, attention: Attention) -> None:
    """Every listed feature feeds its head and no other one; what is not listed feeds none."""
    before = recorded(model, inputs)[number]
    for role, (name, heads) in enumerate(
        (name, getattr(attention, name)) for name in ("query", "key", "value")
    ):
        assert isinstance(heads, Heads), name
        count = before[role].shape[1]
        assert count % len(heads.features) == 0
        group = count // len(heads.features)  # of query heads, where they share a key
        weight = rows(model, heads.linear)
        listed = [feature for head in heads.features for feature in head]
        assert len(set(listed)) == len(listed), "each feature belongs to one head"
        others = sorted(set(range(len(weight))) - set(listed))
        for head, features in [*enumerate(heads.features), (None, others)]:
            old = weight[list(features)].clone()
            weight[list(features)] += 1 + old.abs()
            got = changed_heads(before[role], recorded(model, inputs)[number][role])
            weight[list(features)] = old
            expected = set() if head is None else {*range(head * group, (head + 1) * group)}
            assert got == expected, (name, head)
    check_output(model, inputs, attention, before[0].shape[1])


def check_output(
    model: nn.Module, inputs: dict[str, Tensor], attention: Attention, count: int
) -> None:
    """A change of a head's values changes exactly what the output linear reads of that head."""
    value, output = attention.value, attention.output
    assert value is not None
    assert output is not None
    assert len(output.features) == count
    read: list[Tensor] = []
    module = model.get_submodule(output.linear.module)
    hook = module.register_forward_pre_hook(lambda _, args: read.append(args[0].detach().clone()))
    recorded(model, inputs)
    weight = rows(model, value.linear)
    group = count // len(value.features)
    for head, features in enumerate(value.features):
        old = weight[list(features)].clone()
        weight[list(features)] += 1 + old.abs()
        recorded(model, inputs)
        weight[list(features)] = old
        got = (read[0] != read[-1]).flatten(0, -2).any(0).nonzero().flatten().tolist()
        expected = output.features[head * group : (head + 1) * group]
        assert got == sorted(feature for features in expected for feature in features)
    hook.remove()


def eager(name: str, config: dict[str, Any], kind: str) -> Callable[[], nn.Module]:
    return pretrained(name, config | {"attn_implementation": "eager"}, kind)


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], dict[str, Tensor]], int]] = {
    name: (ZOO[name].build, ZOO[name].inputs, attentions)
    for name, attentions in {
        "nanogpt": 2,
        "gpt2": 2,  # fused and transposed
        "llama": 2,  # grouped queries
        "qwen3": 2,  # a norm on queries and keys
        "gpt-neox": 2,  # fused, interleaved by head
        "falcon": 2,  # fused, one key for all heads
        "bert": 2,
        "modernbert": 2,
        "vit": 2,
        "t5": 6,  # written out, and cross-attention
        "whisper": 6,
    }.items()
} | {
    "llama-eager": (eager("Llama", GROUPED, "ForCausalLM"), tokens, 2),
    "mixtral-eager": (
        eager("Mixtral", GROUPED | {"num_local_experts": 4}, "ForCausalLM"),
        tokens,
        2,
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_every_head_has_its_features(name: str) -> None:
    build, make, count = MODELS[name]
    if name in TRANSFORMERS or "-" in name:
        pytest.importorskip("transformers")
    model, inputs = build().eval(), make()
    for parameter in model.parameters():  # no row that is zero or like another one
        parameter.data = torch.randn_like(parameter) / 4
    state = {key: value.clone() for key, value in model.state_dict().items()}
    parts = anatomy(model, ((), inputs))
    assert len(parts.attentions) == count
    for number, attention in enumerate(parts.attentions):
        check(model, inputs, number, attention)
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key]), key
    assert all(parameter.grad is None for parameter in model.parameters())


def names(parts: Anatomy) -> list[str]:
    return [linear.weight for linear in parts.linears]


def features(heads: Heads | None) -> tuple[tuple[int, ...], ...]:
    assert heads is not None
    return heads.features


def block(start: int, size: int) -> tuple[int, ...]:
    return tuple(range(start, start + size))


@pytest.mark.slow
def test_exact_features() -> None:
    pytest.importorskip("transformers")
    size = WIDTH // HEADS
    nano = anatomy(NanoGPT(), ((), tokens())).attentions[0]
    for third, heads in enumerate((nano.query, nano.key, nano.value)):
        assert features(heads) == tuple(block(third * WIDTH + h * size, size) for h in range(HEADS))
    assert features(nano.output) == tuple(block(h * size, size) for h in range(HEADS))
    neox = anatomy(ZOO["gpt-neox"].build(), ((), tokens())).attentions[0]
    for third, heads in enumerate((neox.query, neox.key, neox.value)):
        expected = tuple(block((3 * h + third) * size, size) for h in range(HEADS))
        assert features(heads) == expected
    falcon = anatomy(ZOO["falcon"].build(), ((), tokens())).attentions[0]
    assert features(falcon.query) == tuple(block(h * size, size) for h in range(HEADS))
    assert features(falcon.key) == (block(WIDTH, size),)
    assert features(falcon.value) == (block(WIDTH + size, size),)
    gpt2 = anatomy(ZOO["gpt2"].build(), ((), tokens())).attentions[1]
    assert gpt2.query is not None
    assert gpt2.query.linear == Linear(
        "transformer.h.1.attn.c_attn.weight",
        "transformer.h.1.attn.c_attn.bias",
        "transformer.h.1.attn.c_attn",
        is_transposed=True,
    )


@pytest.mark.slow
def test_rotary_heads_are_read_as_a_whole() -> None:
    """A half of the head is turned with the other half: the order is the linear's."""
    pytest.importorskip("transformers")
    attention = anatomy(ZOO["llama"].build(), ((), tokens())).attentions[0]
    assert features(attention.query) == tuple(block(8 * h, 8) for h in range(4))
    assert features(attention.key) == (block(0, 8), block(8, 8))


@pytest.mark.slow
def test_which_attentions_attend_to_their_own_tokens() -> None:
    pytest.importorskip("transformers")
    same_length = tokens() | {"decoder_input_ids": tokens()["input_ids"]}
    parts = anatomy(ZOO["t5"].build(), ((), same_length))
    assert [a.is_self for a in parts.attentions] == [True, True, True, False, True, False]
    parts = anatomy(ZOO["deepseek-v3"].build(), ((), tokens()))
    assert [attention.is_self for attention in parts.attentions] == [True, True]


def test_router_softmax_is_no_attention() -> None:
    pytest.importorskip("transformers")
    build, make, _ = MODELS["mixtral-eager"]
    parts = anatomy(build(), ((), make()))
    assert [a.module for a in parts.attentions] == [f"model.layers.{i}.self_attn" for i in (0, 1)]


# ---- made for a purpose ------------------------------------------------------------------------


class Own(nn.Module):
    """One attention of 4 heads; what comes in and goes out is a choice."""

    def __init__(self, width: int = 32, spelling: str = "fused", gate: bool = False) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.out, self.gate = nn.Linear(width, width), nn.Linear(width, width) if gate else None
        self.spelling = spelling

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (4, -1)) for f in (self.q, self.k, self.v))
        if self.spelling == "einsum":
            weights = torch.einsum("bihd,bjhd->bhij", q, k).softmax(-1)
            y = torch.einsum("bhij,bjhd->bihd", weights, v).flatten(2)
        elif self.spelling == "bmm":
            q, k, v = (t.transpose(1, 2).flatten(0, 1) for t in (q, k, v))
            y = torch.bmm(torch.bmm(q, k.mT).softmax(-1), v)
            y = y.unflatten(0, (len(x), 4)).transpose(1, 2).flatten(2)
        else:
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
            y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        if self.gate is not None:
            y = y * torch.sigmoid(self.gate(x))
        return self.out(y)


@pytest.mark.parametrize("spelling", ["fused", "einsum", "bmm"])
@pytest.mark.parametrize("gate", [False, True])
def test_spellings_of_attention(spelling: str, gate: bool) -> None:
    model = Own(spelling=spelling, gate=gate)
    (attention,) = anatomy(model, ((torch.randn(2, 5, 32),), {})).attentions
    expected = tuple(block(8 * h, 8) for h in range(4))
    for role in ("query", "key", "value", "output"):
        heads = getattr(attention, role)
        assert features(heads) == expected, role
        assert heads.linear.module == {"output": "out"}.get(role, role[0])


@pytest.mark.parametrize("spelling", ["fused", "bmm"])
def test_heads_in_place_of_a_batch(spelling: str) -> None:
    """Operands of three dimensions are heads, whatever the batch is."""

    class First(Own):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x[:1])

    class NoBatch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.own = Own()

        def forward(self, x: Tensor) -> Tensor:
            parts = (self.own.q, self.own.k, self.own.v)
            q, k, v = (f(x[0]).unflatten(-1, (4, -1)).transpose(0, 1) for f in parts)
            y = F.scaled_dot_product_attention(q, k, v)
            return self.own.out(y.transpose(0, 1).flatten(1))

    model = First(spelling=spelling) if spelling == "bmm" else NoBatch()
    (attention,) = anatomy(model, ((torch.randn(2, 5, 32),), {})).attentions
    for heads in (attention.query, attention.key, attention.value):
        assert features(heads) == tuple(block(8 * h, 8) for h in range(4))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_wide_models_of_few_digits(dtype: torch.dtype) -> None:
    """Integers above 256 have no exact bfloat16, those above 2048 no float16."""
    model = Own(2560).to(dtype)
    (attention,) = anatomy(model, ((torch.randn(1, 2, 2560, dtype=dtype),), {})).attentions
    for heads in (attention.query, attention.output):
        assert features(heads) == tuple(block(640 * h, 640) for h in range(4))


def test_attention_without_linears() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.out = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(F.scaled_dot_product_attention(x, x, x))

    (attention,) = anatomy(Plain(), ((torch.randn(2, 2, 5, 8),), {})).attentions
    assert attention.query is attention.key is attention.value is None
    assert attention.is_self


class Experts(nn.Module):
    """Three experts as one stack, used in a way of choice; LayerScale on what comes out."""

    def __init__(self, spelling: str) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 16, 8))
        self.down = nn.Parameter(torch.randn(3, 8, 16))
        self.gamma = nn.Parameter(torch.full((8,), 1e-6))
        self.spelling = spelling

    def forward(self, x: Tensor) -> Tensor:
        if self.spelling == "bmm":
            y = torch.bmm(torch.relu(torch.bmm(x.expand(3, -1, -1), self.up.mT)), self.down.mT)
        elif self.spelling == "index":
            pairs = zip(self.up, self.down, strict=True)
            parts = [F.linear(torch.relu(F.linear(x, u)), d) for u, d in pairs]
            return self.gamma * torch.stack(parts).sum(0)
        else:  # bfloat16 only
            ends = torch.arange(1, 4, dtype=torch.int32) * 4
            y = torch._grouped_mm(x.repeat(3, 1), self.up.mT, ends)
            y = torch._grouped_mm(torch.relu(y), self.down.mT, ends)
            return y * self.gamma
        return y.sum(0)


@pytest.mark.parametrize("spelling", ["bmm", "index", "grouped"])
def test_stacks_of_linears(spelling: str) -> None:
    dtype = torch.bfloat16 if spelling == "grouped" else torch.float32
    parts = anatomy(Experts(spelling).to(dtype), ((torch.randn(4, 8, dtype=dtype),), {}))
    found = {linear.weight: linear for linear in parts.linears}
    assert list(found) == ["up", "down"]
    assert not any(linear.is_transposed for linear in found.values())
    assert found["down"].scale == ("gamma" if spelling == "grouped" else None)


@pytest.mark.slow
def test_experts_of_transformers() -> None:
    pytest.importorskip("transformers")
    for name in ("mixtral", "deepseek-v3"):
        parts = anatomy(ZOO[name].build(), ((), ZOO[name].inputs()))
        for part in ("gate_up_proj", "down_proj"):
            assert f"model.layers.1.mlp.experts.{part}" in names(parts)


def test_scales() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(8, 8) for _ in range(3))
            self.gamma, self.rezero = nn.Parameter(torch.ones(8)), nn.Parameter(torch.zeros(()))
            self.norm = nn.RMSNorm(8)

        def forward(self, x: Tensor) -> Tensor:
            x = F.dropout(self.a(x), 0.1, self.training) * self.gamma
            x = self.rezero * self.b(x)
            return self.norm(self.c(x))

    parts = anatomy(Scaled(), ((torch.randn(2, 8),), {}))
    assert [linear.scale for linear in parts.linears] == ["gamma", "rezero", None]
