"""Which adds are residual adds: every spelling fires, nothing that only looks like one does."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

from rfcompile.graph.pipeline import run
from rfcompile.graph.text import graph_text
from rfcompile.passes.find_residuals import FindResiduals, find_residuals
from tests.routes import compiled, export, graphs
from tests.zoo import NanoGPT, tokens

D = 8
Forward = Callable[["Parts", Tensor], Any]


def mlp(outputs: int = D) -> nn.Sequential:
    return nn.Sequential(nn.Linear(D, 2 * D), nn.ReLU(), nn.Linear(2 * D, outputs))


class Parts(nn.Module):
    """What the cases are built from; ``f``, ``g``, ``h`` are branches."""

    def __init__(self, forward: Forward) -> None:
        super().__init__()
        self.f, self.g, self.h, self.a, self.b = mlp(), mlp(), mlp(), nn.Linear(D, D), mlp()
        self.norm, self.norm_2 = nn.LayerNorm(D), nn.LayerNorm(D)
        self.q, self.k, self.v = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, D)
        self.down, self.up = nn.Linear(D, 2, bias=False), nn.Linear(2, D, bias=False)
        self.gate, self.wide = nn.Linear(D, D), nn.Linear(D, 2 * D)
        self.cell, self.dropout = nn.GRUCell(D, D), nn.Dropout(0.5)
        self.conv, self.conv_2 = nn.Conv1d(4, 4, 3, padding=1), nn.Conv1d(4, 4, 3, padding=1)
        self.point = nn.Conv1d(4, 4, 1)
        self.gain = nn.Parameter(torch.rand(D))
        self.scalar = nn.Parameter(torch.rand(()))
        self.positions = nn.Parameter(torch.randn(4, D))
        self.codes = nn.Parameter(torch.randn(16, D))
        self.case = forward

    def forward(self, x: Tensor) -> Any:
        return self.case(self, x)


def inputs() -> dict[str, Any]:
    return {"x": torch.randn(2, 4, D)}


def kinds_of(gm: fx.GraphModule) -> dict[str, int]:
    return dict(Counter(add.kind for add in find_residuals(gm)))


class Cases(nn.Module):
    """Cases side by side: each has parts, and an input, of its own."""

    def __init__(self, forwards: Iterable[Forward]) -> None:
        super().__init__()
        self.cases = nn.ModuleList(Parts(forward) for forward in forwards)

    def forward(self, xs: list[Tensor]) -> list[Any]:
        return [case(x) for case, x in zip(self.cases, xs, strict=True)]


def compiled_kinds(cases: Mapping[str, Forward]) -> dict[str, dict[str, dict[str, int]]]:
    """The kinds of each case, by route, with one compile for all of them."""
    found = {}
    xs = [inputs()["x"] for _ in cases]
    with torch.no_grad():  # else half of the time went into backward graphs that nobody reads
        gms = compiled(Cases(cases.values()), {"xs": xs})
    for route, gm in zip(("dynamo", "aot"), gms, strict=True):
        kinds: dict[str, Counter[str]] = {case: Counter() for case in cases}
        for add in find_residuals(gm):
            kinds[[*cases][int(add.module.split(".")[1])]][add.kind] += 1
        found[route] = {case: dict(counts) for case, counts in kinds.items()}
    return found


def attend(m: Parts, q: Tensor, k: Tensor | None = None, v: Tensor | None = None) -> Tensor:
    k = q if k is None else k
    v = k if v is None else v
    return F.scaled_dot_product_attention(m.q(q), m.k(k), m.v(v))


# ---- what must fire ----------------------------------------------------------------------------


def in_place(m: Parts, x: Tensor) -> Tensor:
    y = m.a(x)
    y += m.f(2 * y)
    return y


def in_place_method_as_statement(m: Parts, x: Tensor) -> Tensor:
    y = m.a(x)
    y.add_(m.f(2 * y))
    return y + m.g(y)


def chain(m: Parts, x: Tensor) -> Tensor:
    for _ in range(3):
        x = x + m.f(m.norm(x))
    return x


def post_norm(m: Parts, x: Tensor) -> Tensor:
    x = m.norm(x + m.f(x))
    return m.norm_2(x + m.g(x))


def written_out(m: Parts, x: Tensor) -> Tensor:
    return x + m.f(x) + m.g(x + m.f(x))


def stochastic_depth(m: Parts, x: Tensor) -> Tensor:
    keep = x.new_empty((x.shape[0], 1, 1)).bernoulli_(0.5)
    return x + m.f(x) * keep


def stochastic_depth_of_a_batch(m: Parts, x: Tensor) -> Tensor:
    chosen = torch.arange(1)
    return torch.index_add(x, 0, chosen, m.f(x[:1]))


def position_in_every_layer(m: Parts, x: Tensor) -> Tensor:  # DETR
    for _ in range(3):
        q = x + m.positions
        x = m.norm(x + attend(m, q, q, x))
    return x


def position_dropped_out_in_every_layer(m: Parts, x: Tensor) -> Tensor:
    for _ in range(3):
        q = x + m.dropout(m.positions.expand(2, 4, D))
        x = m.norm(x + attend(m, q, q, x))
    return x


def query_only_with_position(m: Parts, x: Tensor) -> Tensor:
    y = m.a(x)
    return y + attend(m, y + m.positions, m.codes.expand(2, 16, D))


def latents(m: Parts, x: Tensor) -> Tensor:  # Perceiver
    z = m.positions.expand(2, 4, D)
    z = z + attend(m, z, x)
    return z + m.f(z)


def reversible(m: Parts, x: Tensor) -> Tensor:
    a, b = x, m.a(x)
    a = a + m.f(b)
    b = b + m.g(a)
    return torch.cat([a, b], -1)


def recomputed(m: Parts, x: Tensor) -> Tensor:
    def block(x: Tensor) -> Tensor:
        return x + m.f(x)

    x = checkpoint(block, x, use_reentrant=False)
    return x + m.g(x)


class Matmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return grad @ weight.mT, (x.mT @ grad).sum(0)


def own_gradient(m: Parts, x: Tensor) -> Tensor:
    y: Tensor = Matmul.apply(m.norm(x), m.codes[:D])  # type: ignore[no-untyped-call]
    return x + y


@torch.compiler.nested_compile_region
def region(m: Parts, x: Tensor) -> Tensor:
    return x + m.f(x)


def compiled_regions(m: Parts, x: Tensor) -> Tensor:
    return region(m, region(m, x))


def mixed_precision(m: Parts, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        y = m.f(x)
    return (x.float() + y.float()).to(x.dtype)


def what_is_left(m: Parts, x: Tensor) -> Tensor:  # residual vector quantization
    first = m.f(x)
    rest = x + (-first)
    return first + m.g(rest)


FIRES: dict[str, tuple[Forward, int]] = {
    "a negated branch": (what_is_left, 1),
    "a negated stream": (lambda m, x: m.f(-x) + -x, 1),
    "plain": (lambda m, x: x + m.f(x), 1),
    "branch first": (lambda m, x: m.f(x) + x, 1),
    "one matrix as the branch": (lambda m, x: x + m.a(x), 1),
    "reflected": (lambda m, x: x.__radd__(m.f(x)), 1),
    "torch.add with alpha": (lambda m, x: torch.add(x, m.f(x), alpha=0.5), 1),
    "keywords": (lambda m, x: torch.add(input=x, other=m.f(x)), 1),
    "difference": (lambda m, x: x - m.f(x), 1),
    "torch.sub": (lambda m, x: torch.sub(x, m.f(x), alpha=2), 1),
    "rsub": (lambda m, x: torch.rsub(m.f(x), x), 1),
    "+=": (in_place, 1),
    "add_ as a statement": (in_place_method_as_statement, 2),
    "addcmul": (lambda m, x: torch.addcmul(x, m.f(x), m.g(x), value=0.5), 1),
    "lerp": (lambda m, x: torch.lerp(x, m.f(x), 0.3), 1),
    "lerp with a learned weight": (lambda m, x: torch.lerp(x, m.f(x), m.gain), 1),
    "lerp by hand": (lambda m, x: x + m.gain * (m.f(x) - x), 1),
    "mixture with learned weights": (lambda m, x: m.scalar * x + (1 - m.scalar) * m.f(x), 1),
    "baddbmm": (lambda m, x: torch.baddbmm(x, m.f(x), m.codes[:D].expand(2, D, D)), 1),
    "addmm": (lambda m, x: torch.addmm(x[0], m.f(x)[0], m.codes[:D]), 1),
    "stack and sum": (lambda m, x: torch.stack([x, m.f(x)]).sum(0), 1),
    "stack and mean": (lambda m, x: torch.mean(torch.stack((m.f(x), x), 1), dim=1), 1),
    "python sum": (lambda m, x: sum([x, m.f(x)]), 1),
    "scaled skip": (lambda m, x: 0.7 * x + m.f(x), 1),
    "divided sum": (lambda m, x: x / 2**0.5 + m.f(x) / 2**0.5, 1),
    "learned skip": (lambda m, x: m.gain * x + m.f(x), 1),
    "LayerScale": (lambda m, x: x + m.gain * m.f(x), 1),
    "ReZero": (lambda m, x: x + m.scalar * m.f(x), 1),
    "tanh gate of Flamingo": (lambda m, x: x + m.scalar.tanh() * m.f(x), 1),
    "dropped out skip": (lambda m, x: m.dropout(x) + m.dropout(m.f(x)), 1),
    "stochastic depth": (stochastic_depth, 1),
    "stochastic depth of a batch": (stochastic_depth_of_a_batch, 1),
    "masked skip": (lambda m, x: x * torch.ones(2, 4, 1) + m.f(x), 1),
    "cast and reshaped": (lambda m, x: x.double().flatten(0, 1) + m.f(x).double().flatten(0, 1), 1),
    "channels last": (lambda m, x: x + m.conv(x.roll(1, 2)), 1),
    "cropped skip": (lambda m, x: x[:, 1:] + m.f(x)[:, 1:], 1),
    "chain": (chain, 3),
    "post-norm": (post_norm, 2),
    "written out: the same sum is one value": (written_out, 3),
    "parallel x + f + g": (lambda m, x: x + m.f(x) + m.g(x), 1),
    "parallel f + g + x": (lambda m, x: m.f(x) + m.g(x) + x, 1),
    "parallel f + (x + g)": (lambda m, x: m.f(x) + (x + m.g(x)), 1),
    "bias on the way": (lambda m, x: (x + m.gain) + m.f(x), 1),
    "position added to each layer's queries": (position_in_every_layer, 3),
    "position dropped out anew in each layer": (position_dropped_out_in_every_layer, 3),
    "queries enter only with their position": (query_only_with_position, 1),
    "learned latents": (latents, 2),
    "reversible": (reversible, 2),
    "checkpoint": (recomputed, 2),
    "x + x * gate": (lambda m, x: x + x * m.gate(x).sigmoid(), 1),
    "autocast": (mixed_precision, 1),
    "convolution": (lambda m, x: x + m.conv_2(m.conv(x).relu()), 1),
    "attention": (lambda m, x: x + attend(m, m.norm(x)), 1),
    "Fourier mixing": (lambda m, x: x + torch.fft.fft2(x).real, 1),
    "spread branch": (lambda m, x: x + m.f(x.mean(1, keepdim=True)), 1),
    "a vector": (lambda m, x: x[0, 0] + m.f(x[0, 0]), 1),
    "a clone of the skip": (lambda m, x: x.clone() + m.f(x), 1),
}


@pytest.mark.parametrize("rule", FIRES)
def test_fires(rule: str) -> None:
    forward, count = FIRES[rule]
    assert kinds_of(export(Parts(forward), inputs())) == {"block": count}


@pytest.mark.parametrize("half", [0, 1])
@pytest.mark.slow
def test_fires_when_compiled(half: int) -> None:
    cases = dict([*FIRES.items()][half::2])
    expected = {rule: {"block": count} for rule, (_, count) in cases.items()}
    kinds = compiled_kinds({rule: forward for rule, (forward, _) in cases.items()})
    assert kinds == {"dynamo": expected, "aot": expected}


# ---- what must not fire ------------------------------------------------------------------------


def gelu_polynomial(m: Parts, x: Tensor) -> Tensor:
    y = m.a(x)
    return 0.5 * y * (1 + torch.tanh(0.79 * (y + 0.044 * y.pow(3))))


def rotary(m: Parts, x: Tensor) -> Tensor:
    angles = torch.arange(4.0)[:, None] @ torch.rand(1, D)
    q = m.q(x)
    a, b = q.chunk(2, -1)
    return q * angles.cos() + torch.cat((-b, a), -1) * angles.sin()


def softmax_with_mask(m: Parts, x: Tensor) -> Tensor:
    scores = m.q(x) @ m.k(x).mT
    scores = scores + torch.full((4, 4), -1e9).triu(1)
    scores = scores - scores.amax(-1, keepdim=True)
    return (scores.exp() / scores.exp().sum(-1, keepdim=True)) @ m.v(x)


def relative_positions(m: Parts, x: Tensor) -> Tensor:
    q = m.q(x)
    return q @ m.k(x).mT + q @ m.positions.mT


def experts(m: Parts, x: Tensor) -> Tensor:
    weights = m.gate(x).softmax(-1)
    y = torch.zeros_like(x)
    for i, expert in enumerate((m.f, m.g, m.h)):
        y = y + weights[..., i : i + 1] * expert(x)
    return y + m.b(x)


def experts_in_place(m: Parts, x: Tensor) -> Tensor:
    flat = x.flatten(0, 1)
    y = torch.zeros_like(flat)
    for expert in (m.f, m.g):
        chosen = torch.arange(4)
        y.index_add_(0, chosen, expert(flat[chosen]))
    return y.view_as(x)


def highway(m: Parts, x: Tensor) -> Tensor:
    t = m.gate(x).sigmoid()
    return t * m.f(x) + (1 - t) * x


def highway_scalar_gate(m: Parts, x: Tensor) -> Tensor:
    t = m.gate(x)[..., :1].sigmoid()
    return t * m.f(x) + (1 - t) * x


def lstm_by_hand(m: Parts, x: Tensor) -> Tensor:
    c = torch.zeros(2, D)
    h = torch.zeros(2, D)
    for t in range(3):
        z = m.q(x[:, t]) + m.k(h)
        c = z.sigmoid() * c + m.v(h).sigmoid() * z.tanh()
        h = c.tanh()
    return h


def gru_by_cell(m: Parts, x: Tensor) -> Tensor:
    h = torch.zeros(2, D)
    for t in range(3):
        h = m.cell(x[:, t], h)
    return h


def gru_by_hand(m: Parts, x: Tensor) -> Tensor:
    h = torch.zeros(2, D)
    for _ in range(3):
        z = m.gate(h).sigmoid()
        n = m.k(h).tanh()
        h = n + z * (h - n)
    return h


def straight_through(m: Parts, x: Tensor) -> Tensor:
    z = m.a(x)
    chosen = m.codes[torch.cdist(z.flatten(0, 1), m.codes).argmin(-1)].view_as(z)
    return z + (chosen - z).detach()


def residual_quantizer(m: Parts, x: Tensor) -> Tensor:
    z = m.a(x)
    for _ in range(2):
        z = z - m.codes[torch.cdist(z.flatten(0, 1), m.codes).argmin(-1)].view_as(z)
    return z


def position_added_to_every_layer(m: Parts, x: Tensor) -> Tensor:
    for layer in (m.f, m.g, m.h):
        x = layer(x + m.positions.expand(2, 4, D))
    return x


def batch_norm_by_hand(m: Parts, x: Tensor) -> Tensor:
    y = m.a(x)
    return (y - y.mean((0, 1))) / (y.var((0, 1)) + 1e-5).sqrt() * m.gain + m.gain


def split_and_sum(m: Parts, x: Tensor) -> Tensor:  # Res2Net
    a, b = m.wide(x).chunk(2, -1)
    return m.f(a) + b


SILENT: dict[str, Forward] = {
    "linear with bias": lambda m, x: F.linear(x, m.a.weight, m.a.bias),
    "bias by hand": lambda m, x: x @ m.codes[:D] + m.gain,
    "addmm as a linear layer": lambda m, x: torch.addmm(m.gain, x[0], m.codes[:D]),
    "position embedding": lambda m, x: m.f(x + m.positions),
    "position embedding in every layer": position_added_to_every_layer,
    "gelu polynomial": gelu_polynomial,
    "rotary": rotary,
    "softmax and mask": softmax_with_mask,
    "relative positions": relative_positions,
    "norm by hand": batch_norm_by_hand,
    "GLU": lambda m, x: m.f(x).sigmoid() * m.g(x),
    "GLU plus one": lambda m, x: m.f(x) * (1 + m.g(x)),
    "mixture of experts": experts,
    "mixture of experts in place": experts_in_place,
    "LoRA": lambda m, x: m.a(x) + m.up(m.down(x)),
    "merged LoRA": lambda m, x: F.linear(x, m.a.weight + m.up.weight @ m.down.weight),
    "q + k attention": lambda m, x: torch.tanh(m.q(x)[:, :, None] + m.k(x)[:, None]).sum(2),
    "q + k of one shape": lambda m, x: torch.tanh(m.q(x) + m.k(x)),
    "highway": highway,
    "highway with one gate a token": highway_scalar_gate,
    "highway as lerp": lambda m, x: torch.lerp(x, m.f(x), m.gate(x).sigmoid()),
    "LSTM by hand": lstm_by_hand,
    "GRU cell": gru_by_cell,
    "GRU by hand": gru_by_hand,
    "concat": lambda m, x: torch.cat([x, m.f(x)], -1),
    "product": lambda m, x: x * m.f(x),
    "straight-through estimator": straight_through,
    "residual vector quantizer": residual_quantizer,
    "change of a tensor": lambda m, x: m.f(x) - x,
    "change of a tensor as a sum": lambda m, x: m.f(x) + (-x).contiguous(),
    "two models": lambda m, x: m.f(x) + m.g(x),
    "halves": split_and_sum,
    "elementwise branch": lambda m, x: x + F.gelu(m.norm(x)),
    "loss": lambda m, x: m.f(x).sum() + x.sum(),
    "integers": lambda m, x: x.long() + m.f(x).long(),
    "moved in time": lambda m, x: x + m.gain * (x.roll(1, 1) - x),
}


@pytest.mark.parametrize("rule", SILENT)
def test_silent(rule: str) -> None:
    assert kinds_of(export(Parts(SILENT[rule]), inputs())) == {}


@pytest.mark.slow
def test_silent_when_compiled() -> None:
    nothing: dict[str, dict[str, int]] = {rule: {} for rule in SILENT}
    assert compiled_kinds(SILENT) == {"dynamo": nothing, "aot": nothing}


# ---- kinds -------------------------------------------------------------------------------------


def adapters(m: Parts, x: Tensor) -> Tensor:
    for layer in (m.f, m.g):
        y = layer(m.norm(x))
        x = x + (y + m.b(y))
    return x


def stages(m: Parts, x: Tensor) -> Tensor:  # SwinIR
    for _ in range(2):
        start = x
        x = x + m.f(m.norm(x))
        x = x + m.g(m.norm(x))
        x = start + m.a(x)
    return x


def whole_image(m: Parts, x: Tensor) -> Tensor:  # EDSR
    y = m.a(x)
    y = y + m.f(y)
    y = y + m.g(y)
    return x - m.q(y)


def first_values(m: Parts, x: Tensor) -> Tensor:  # value residual
    first = m.v(x)
    for layer in (m.f, m.g, m.h):
        x = x + attend(m, x) @ m.codes[:D]
        x = x + layer(x)
    return x + m.a(m.v(x) + first)


def first_embedding_again(m: Parts, x: Tensor) -> Tensor:
    first = m.norm(x)
    y = first
    for layer in (m.f, m.g):
        y = m.scalar * y + m.scalar * first if layer is m.g else y
        y = y + layer(m.norm_2(y))
    return y


def projected(m: Parts, x: Tensor) -> Tensor:
    return (m.conv_2(m.conv(x).relu()) + m.point(x)).relu()


def separable_shortcut(m: Parts, x: Tensor) -> Tensor:  # GhostNet
    return m.conv_2(m.conv(x).relu()) + m.point(m.norm(m.conv(x)))


def pooled(m: Parts, x: Tensor) -> Tensor:
    return F.avg_pool1d(m.conv_2(m.conv(x).relu()), 2) + F.avg_pool1d(x, 2)


def lora_of_a_convolution(m: Parts, x: Tensor) -> Tensor:
    return m.conv(x).relu() + m.point(m.conv_2(x))


KINDS: dict[str, tuple[Forward, dict[str, int]]] = {
    "adapters are local": (adapters, {"block": 2, "local": 2}),
    "a skip over a stage is long": (stages, {"block": 4, "long": 2}),
    "a skip over the model is long": (whole_image, {"block": 2, "long": 1}),
    "a skip between values is long": (first_values, {"block": 7, "long": 1}),
    "a skip from the embedding is long": (first_embedding_again, {"block": 2, "long": 1}),
    "a convolution on the skip": (projected, {"projection": 1}),
    "two convolutions on the skip": (separable_shortcut, {"projection": 1}),
    "a pooled skip": (pooled, {"projection": 1}),
    "LoRA of a convolution": (lora_of_a_convolution, {}),
}


@pytest.mark.parametrize("case", KINDS)
def test_kinds(case: str) -> None:
    forward, expected = KINDS[case]
    assert kinds_of(export(Parts(forward), inputs())) == expected


@pytest.mark.slow
def test_kinds_when_compiled() -> None:
    expected = {case: kinds for case, (_, kinds) in KINDS.items()}
    kinds = compiled_kinds({case: forward for case, (forward, _) in KINDS.items()})
    assert kinds == {"dynamo": expected, "aot": expected}


# ---- facts -------------------------------------------------------------------------------------


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mlp, self.dropout = nn.LayerNorm(D), mlp(), nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.mlp(self.norm(x))) + x  # the line of the facts


def facts_line() -> int:
    lines = Path(__file__).read_text().splitlines()
    return next(i for i, line in enumerate(lines, 1) if line.endswith("# the line of the facts"))


def test_facts() -> None:
    model = nn.Sequential(Layer(), Layer())
    spellings = {}
    for route, gm in graphs(model, {"input": torch.randn(2, 4, D)}).items():
        first, second = find_residuals(gm)
        nodes = {node.name: node for node in gm.graph.nodes}
        for order, add in enumerate((first, second)):
            assert add.kind == "block"
            assert add.order == order
            assert add.module == str(order)
            assert add.source == f"tests/passes/test_find_residuals.py:{facts_line()}"
            assert add.branch == (f"{order}.mlp.0", f"{order}.mlp.2")
            assert (add.shape, add.dtype) == ((2, 4, D), "f32")
            assert nodes[add.node].args[add.operand] is nodes[add.skip]
            assert (add.operand, add.stream) == (1, add.skip)
        assert second.stream == first.node
        spellings[route] = first.spelling
    assert spellings == {
        "export": "aten.add.Tensor",
        "dynamo": "operator.add",
        "aot": "aten.add.Tensor",
    }


def test_the_pass_leaves_the_graph_as_it_is() -> None:
    gm = export(Parts(chain), inputs())
    before = graph_text(gm)
    record = run(gm, [FindResiduals()])
    assert graph_text(record.gm) == before
    (step,) = record.steps
    assert (step.name, step.changes, len(step.facts)) == ("find-residuals", 0, 3)


def test_a_skip_that_is_a_copy_tells_where_it_starts() -> None:
    gm = export(Parts(lambda m, x: 0.5 * x.double() + m.f(x).double()), inputs())
    (add,) = find_residuals(gm)
    assert (add.stream, add.skip, add.operand, add.dtype) == ("x", "mul", 0, "f64")


def test_a_node_of_a_nested_graph_has_its_path() -> None:
    of_dynamo, _ = compiled(Parts(recomputed), inputs())
    inner, outer = find_residuals(of_dynamo)
    body, _, name = inner.node.partition(".")
    assert name in {node.name for node in getattr(of_dynamo, body).graph.nodes}
    assert outer.node in {node.name for node in of_dynamo.graph.nodes}
    assert inner.source.startswith("tests/passes/test_find_residuals.py:")


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_a_branch_with_its_own_gradient() -> None:
    for route, gm in graphs(Parts(own_gradient), inputs()).items():
        assert kinds_of(gm) == {"block": 1}, route


def test_a_region_that_is_compiled_once_counts_where_it_is_called() -> None:
    for gm in compiled(Parts(compiled_regions), inputs()):
        first, second = find_residuals(gm)
        assert first.node != second.node or first.stream != second.stream


def test_every_term_but_the_skip_is_the_branch() -> None:
    gm = export(Parts(lambda m, x: torch.stack([m.f(x), x, m.g(x)]).sum(0)), inputs())
    (add,) = find_residuals(gm)
    assert (add.operand, add.branch) == (1, ("f.0", "f.2", "g.0", "g.2"))


@pytest.mark.parametrize(
    ("forward", "expected"),
    [(chain, 3), (highway, 0), (experts, 0), (FIRES["LayerScale"][0], 1), (projected, 1)],
)
def test_a_graph_of_modules_without_shapes(forward: Forward, expected: int) -> None:
    class Leaves(fx.Tracer):
        def is_leaf_module(self, module: nn.Module, name: str) -> bool:
            return isinstance(module, (nn.Sequential, nn.Linear, nn.LayerNorm, nn.Conv1d))

    model = Parts(forward)
    found = find_residuals(fx.GraphModule(model, Leaves().trace(model)))
    assert len(found) == expected
    assert all((add.shape, add.dtype) == ((), "") for add in found)


def test_a_graph_in_a_graph_may_return_one_tensor() -> None:
    inner = fx.symbolic_trace(nn.Sequential(nn.Linear(D, D), nn.ReLU()))

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.inner(x)
            return x[1] + self.inner(x)[1]

    model = Outer()

    class Leaves(fx.Tracer):
        def is_leaf_module(self, module: nn.Module, name: str) -> bool:
            return module is inner

    gm = fx.GraphModule(model, Leaves().trace(model))
    assert [add.node for add in find_residuals(gm)] == ["add", "add_1"]


def test_two_equal_tensors_stay_two_when_one_is_changed() -> None:
    def f(m: Parts, x: Tensor) -> Tensor:
        a, b = x * 2, x * 2
        a.add_(m.q(x))
        return (b + m.f(b)) * a

    for gm in graphs(Parts(f), inputs()).values():
        first, second = find_residuals(gm)
        assert second.stream != first.node


@pytest.mark.slow
def test_many_layers_in_a_second() -> None:
    model = NanoGPT(layers=48)
    gm = export(model, tokens())
    assert len(gm.graph.nodes) > 1000
    start = time.perf_counter()
    found = find_residuals(gm)
    assert time.perf_counter() - start < 5  # 0.1 s on an idle core
    assert Counter(add.kind for add in found) == {"block": 96}
