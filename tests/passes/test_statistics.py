"""Statistics by data flow: what stays exact, and the traffic next to it that must not.

Each case is traced twice: as the user wrote it, and through Inductor's decompositions. That the
numbers are right on real ranks is shown in distributed/test_backend.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch._inductor.decomposition import select_decomp_table
from torch.fx.experimental.proxy_tensor import make_fx

from rfcompile.passes import wire_pipeline
from rfcompile.passes.find_collectives import find_collectives
from rfcompile.passes.merge_collectives import MergeCollectives
from rfcompile.passes.quantize_collectives import QuantizeCollectives
from rfcompile.passes.statistics import Statistics
from rfcompile.pipeline import run
from rfcompile.policy import Policy
from rfcompile.process_groups import simulated
from rfcompile.report import Site

if TYPE_CHECKING:
    from tests.passes.conftest import Trace

c10d = torch.ops._c10d_functional
T, D, V, E = 16, 32, 64, 8  # tokens, features, vocabulary, experts
X, W, LOGITS = torch.randn(T, D), torch.randn(D, D), torch.randn(T, V)
IDS, LABELS, EXPERTS = torch.randint(D, (T,)), torch.randint(V, (T,)), torch.randint(E, (T,))
IMAGES, KERNEL = torch.randn(2, 3, 8, 8), torch.randn(4, 3, 3, 3)
HEADS = torch.randn(2, 4, 8, 16)
SCALAR = torch.tensor(1.0)


def reduce(x: Tensor, op: str = "sum") -> Tensor:
    out: Tensor = c10d.wait_tensor(c10d.all_reduce(x, op, "0"))
    return out


def gather(x: Tensor) -> Tensor:
    out: Tensor = c10d.wait_tensor(c10d.all_gather_into_tensor(x, 4, "0"))
    return out


def exchange(x: Tensor) -> Tensor:
    rows = [x.shape[0] // 4] * 4
    out: Tensor = c10d.wait_tensor(c10d.all_to_all_single(x, rows, rows, "0"))
    return out


# ---- losses, norms, experts: as people write them ------------------------------------------------


def vocabulary_parallel_loss(x: Tensor, y: Tensor) -> Tensor:
    """Megatron's, with label smoothing and a z-loss."""
    top = reduce(x.amax(-1, keepdim=True), "max")
    total = reduce((x - top).exp().sum(-1))
    outside = (y < 0) | (y >= V)
    rows = torch.arange(T)
    hit = reduce((x - top)[rows, y.clamp(0, V - 1)].masked_fill(outside, 0.0))
    smooth = reduce((x - top).mean(-1))
    return (total.log() - hit + 0.1 * smooth + total.log() ** 2).mean()


def loss_of_a_batch(x: Tensor) -> Tensor:
    x = x.view(4, 4, V)
    top = reduce(x.max(-1).values, "max")
    return reduce((x - top[..., None]).exp().sum(-1))


def sharded_rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    square = reduce(x.float().pow(2).sum(-1, keepdim=True))
    return reduce((x * torch.rsqrt(square / D + 1e-6) * weight) @ torch.eye(D))


def sharded_layer_norm(x: Tensor) -> Tensor:
    mean = reduce(x.mean(-1, keepdim=True))
    variance = reduce((x - mean).square().mean(-1, keepdim=True))
    return (x - mean) * variance.rsqrt()


def both_moments(x: Tensor) -> Tensor:
    return reduce(torch.cat(torch.var_mean(x, -1, keepdim=True), -1))


def norm_of_all(a: Tensor, b: Tensor) -> Tensor:
    return reduce(torch.stack([a.pow(2).sum(), torch.linalg.vector_norm(b)]))


def batch_norm(x: Tensor, kernel: Tensor) -> Tensor:
    x = F.conv2d(x, kernel)
    mean, square = reduce(x.mean((0, 2, 3))), reduce(x.square().mean((0, 2, 3)))
    return (x - mean.view(1, -1, 1, 1)) * square.view(1, -1, 1, 1)


def merged_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Each rank has some of the keys: its output, a maximum and a sum of exponentials."""
    scores = q @ k.transpose(-1, -2)
    top = scores.amax(-1, keepdim=True)
    e = (scores - top).exp()
    correction = (top - reduce(top, "max")).exp()
    return reduce((e @ v) * correction) / reduce(e.sum(-1, keepdim=True) * correction)


def of_a_kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    out, logsumexp = attention(q, k, v)
    return gather(out), gather(logsumexp)  # type: ignore[return-value]


def router_statistics(x: Tensor, router: Tensor) -> tuple[Tensor, ...]:
    p = (x @ router).softmax(-1)
    values, experts = p.topk(2)
    counts = F.one_hot(experts, E).float().sum((0, 1))
    by_sequence = p.view(4, 4, E).mean(1)
    entropy = -(p * p.log()).sum(-1)
    sent = exchange(values.reshape(-1))
    return reduce(p.mean(0)), reduce(counts), reduce(by_sequence), reduce(entropy), sent


def experts(x: Tensor, weight: Tensor, p: Tensor) -> Tensor:
    """Tokens go to their experts and come back weighed: sums over experts keep the features."""
    there = exchange(x.repeat_interleave(2, 0))
    back = exchange(there @ weight).view(T, 2, D)
    return reduce((back * p[..., None]).sum(1))


def masked_embedding(ids: Tensor, weight: Tensor) -> Tensor:
    outside = (ids < 0) | (ids >= D)
    return reduce(F.embedding(ids.clamp(0, D - 1), weight) * (~outside)[:, None])


def indexed_embedding(ids: Tensor, weight: Tensor) -> Tensor:
    rows = weight[ids.clamp(0, D - 1)]
    return reduce(rows.masked_fill((ids < 0)[:, None], 0.0))


def rotated_queries(x: Tensor, weight: Tensor) -> Tensor:
    a, b = (x @ weight).view(4, 4, 2, 8, 2).unbind(-1)
    angle = torch.arange(4.0)[:, None] * torch.arange(8.0)
    cos, sin = angle.cos()[None, :, None], angle.sin()[None, :, None]
    return exchange(torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(3))


def rounded(x: Tensor) -> Tensor:
    """Quantized by the user, at full size."""
    scale = x.abs().amax(-1, keepdim=True) / 127
    return gather((x / scale).round().to(torch.int8).float() * scale)


STATISTICS: Mapping[str, tuple[Callable[..., Any], tuple[Tensor, ...], str]] = {
    # By collective, in order: s for a statistic, t for traffic, m for a max.
    "vocabulary-parallel loss": (vocabulary_parallel_loss, (LOGITS, LABELS), "msss"),
    "loss of a batch": (loss_of_a_batch, (LOGITS,), "ms"),
    "logsumexp": (lambda x: reduce(x.logsumexp(-1)), (LOGITS,), "s"),
    "log-probabilities": (
        lambda x, y: reduce(x.log_softmax(-1).gather(1, y[:, None]).squeeze(1)),
        (LOGITS, LABELS),
        "s",
    ),
    "loss by token": (
        lambda x, y, mask: reduce(F.cross_entropy(x, y, reduction="none") * mask),
        (LOGITS, LABELS, torch.ones(T)),
        "s",
    ),
    "loss": (lambda x, y: reduce(F.cross_entropy(x, y)), (LOGITS, LABELS), "s"),
    "casts": (lambda x: reduce(x.bfloat16().float().square().sum(-1).bfloat16()), (X,), "s"),
    "RMS norm": (sharded_rms_norm, (X, torch.ones(D)), "st"),
    "layer norm": (sharded_layer_norm, (X,), "ss"),
    "both moments": (both_moments, (X,), "s"),
    "norm of all gradients": (norm_of_all, (X, W), "s"),
    "batch norm": (batch_norm, (IMAGES, KERNEL), "ss"),
    "merged attention": (merged_attention, (HEADS,) * 3, "mts"),
    "an attention kernel": (of_a_kernel, (HEADS,) * 3, "ts"),
    "router": (router_statistics, (X, torch.randn(D, E)), "sssss"),
    "one-hot routing": (lambda i: exchange(F.one_hot(i, E).float()), (EXPERTS,), "s"),
    "positions": (lambda x: gather(x.argmax(-1).float()), (X,), "s"),
    "ties": (lambda x: reduce((x == reduce(x, "max")).float()), (X,), "ms"),
    "a maximum that is sent on": (lambda x: gather(reduce(x, "max") * 2), (X,), "ms"),
    "top-k": (lambda x: gather(x.topk(4).values), (X,), "s"),
    "packed with traffic": (
        lambda x, w: reduce(torch.cat([x @ w, x.square().sum(-1, keepdim=True)], -1)),
        (X, W),
        "s",
    ),
    "positions with traffic": (
        lambda x, i: exchange(torch.cat([x, i.float()[:, None]], -1)),
        (X, EXPERTS),
        "s",
    ),
    "one value a row from outside": (lambda x: reduce(x * 2), (torch.randn(T, 1),), "s"),
    "one element": (lambda x, w: reduce((x @ w)[0, :1]), (X, W), "s"),
}

TRAFFIC: Mapping[str, tuple[Callable[..., Any], tuple[Tensor, ...], str]] = {
    "branch": (lambda x, w: reduce(F.gelu(x @ w) @ w), (X, W), "t"),
    "one output": (lambda x, w: reduce(x @ w[:, :1]), (X, W), "t"),
    "RMS norm": (lambda x: gather(F.rms_norm(x, (D,))), (X,), "t"),
    "layer norm": (lambda x, g: gather(F.layer_norm(x, (D,), g, g)), (X, torch.ones(D)), "t"),
    "normalized": (lambda x, w: gather(F.normalize(x @ w, dim=-1)), (X, W), "t"),
    "softmax": (lambda x, w: gather((x @ w).softmax(-1)), (X, W), "t"),
    "logits": (lambda x, w: gather(x @ w).log_softmax(-1), (X, W), "t"),
    "embedding": (masked_embedding, (IDS, W), "t"),
    "embedding by index": (indexed_embedding, (IDS, W), "t"),
    "rotary": (rotated_queries, (X, W), "t"),
    "experts": (experts, (X, W, torch.rand(T, 2)), "ttt"),
    "cumulative sums": (lambda x, w: reduce((x @ w).cumsum(-1).cumsum(0)), (X, W), "t"),
    "sorted": (lambda x: gather(x.sort(-1).values), (X,), "t"),
    "mean over a sequence": (lambda x, w: reduce((x @ w).view(4, 4, D).mean(1)), (X, W), "t"),
    "gated sum": (
        lambda x, w: reduce((F.silu(x @ w) * (x @ w)).view(4, 4, D).sum(1)),
        (X, W),
        "t",
    ),
    "pooling": (lambda x, k: gather(F.conv2d(x, k).mean((2, 3))), (IMAGES, KERNEL), "t"),
    "adaptive pooling": (
        lambda x, k: gather(F.adaptive_avg_pool2d(F.conv2d(x, k), 1).flatten(1)),
        (IMAGES, KERNEL),
        "t",
    ),
    "written-out matrices": (
        lambda a, b: reduce((a[:, None] * b[None]).sum(-1)),
        (X, W),
        "t",
    ),
    "rows by index": (lambda x, i: exchange(x[i % T]), (X, IDS), "t"),
    "a permutation of each row": (
        lambda x, i: gather(x.gather(1, i)),
        (X, torch.randint(D, (T, D))),
        "t",
    ),
    "dropout": (lambda x, w: reduce(F.dropout(x @ w, 0.1, True)), (X, W), "t"),
    "rounded": (rounded, (X,), "t"),
    "rounded weights": (
        lambda q, scale: gather(q.float() * scale),
        (torch.ones(D, D, dtype=torch.int8), torch.rand(D, 1)),
        "t",
    ),
    "elementwise maximum": (lambda x, w: reduce(torch.maximum(x @ w, x)), (X, W), "t"),
}

BACKWARD: Mapping[str, tuple[Callable[..., Any], tuple[Tensor, ...], str]] = {
    "of a matrix": (lambda g, w: reduce(g @ w) @ w, (X, W), "t"),
    "from outside": (lambda g, w: reduce(g) @ w, (X, W), "t"),
    "of a sum of all": (lambda g, w: reduce(g.expand(T, D)) @ w, (SCALAR, W), "t"),
    "of a bias": (lambda g: reduce(g.view(4, 4, D).sum((0, 1))), (X,), "t"),
    "of a norm's weight": (lambda g, x: reduce((g * x).sum(0)), (X, X), "t"),
    "of a bias of a convolution": (lambda g: reduce(g.sum((0, 2, 3))), (IMAGES,), "t"),
    "of tokens' experts": (
        lambda g, p, w: (reduce(g)[:, None] * p[..., None]).view(-1, D) @ w,
        (X, torch.rand(T, 2), W),
        "t",
    ),
    "of a statistic that was broadcast": (
        lambda g, x: reduce((g * x).sum(-1, keepdim=True)) * x,
        (X, X),
        "s",
    ),
    "of a mean loss": (lambda g, x: reduce(g.expand(T) / T)[:, None] * x, (SCALAR, LOGITS), "s"),
    "of a loss by token": (lambda g, x: reduce(g).unsqueeze(-1) * x, (torch.rand(T), LOGITS), "s"),
    "of a picked logit": (
        lambda g, y: torch.zeros(T, V).scatter_add(1, y[:, None], reduce(g)[:, None]),
        (torch.rand(T), LABELS),
        "s",
    ),
    "of a batch norm's mean": (lambda g, x: x + reduce(g.sum(0)) / T, (X, X), "s"),
}


def text_of(gm: fx.GraphModule, direction: str) -> list[str]:
    statistics = Statistics(gm, direction)
    found = find_collectives(gm)
    assert found
    return [
        "m" if c.op == "max" else statistics.why_exact(c.node.args[0], c.node)[:11] or "t"
        for c in found
    ]


@pytest.mark.parametrize("decomposed", [False, True])
@pytest.mark.parametrize(
    ("direction", "cases", "name"),
    [
        (direction, cases, name)
        for direction, cases in (
            ("forward", STATISTICS),
            ("forward", TRAFFIC),
            ("backward", BACKWARD),
        )
        for name in cases
    ],
)
def test_it_is_told_by_data_flow(
    direction: str, cases: Mapping[str, Any], name: str, decomposed: bool
) -> None:
    f, inputs, expected = cases[name]
    table = select_decomp_table() if decomposed else None
    with simulated(4):
        gm = make_fx(f, tracing_mode="fake", decomposition_table=table)(*inputs)
        found = text_of(gm, direction)
    # Tracing may move independent collectives: the order of the graph is that of the program.
    assert sorted(found) == sorted(
        {"s": "a statistic", "t": "t", "m": "m"}[letter] for letter in expected
    )


def test_symbolic_sizes_add_no_guard(trace: Trace) -> None:
    def f(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        return reduce(x.exp().sum(-1)), reduce(x * x.square().mean(-1, keepdim=True) @ w)

    gm = trace(f, X, W, dynamic=True)
    shape_env = next(iter(gm.graph.nodes)).meta["val"].fake_mode.shape_env
    before = len(shape_env.guards)
    assert text_of(gm, "forward") == ["a statistic", "t"]
    assert len(shape_env.guards) == before


def test_a_graph_inside_the_graph_gets_what_it_is_called_with(trace: Trace) -> None:
    body = trace(lambda x: reduce(x * 2), torch.randn(T))
    for outer, expected in (
        (lambda x, w: x.sum(-1), "a statistic"),
        (lambda x, w: x.mm(w)[:, 0], "t"),
    ):
        gm = trace(outer, X, W)
        gm.add_module("body", body)
        output = gm.graph.output_node()
        (value,) = output.all_input_nodes
        with gm.graph.inserting_before(output):
            call = gm.graph.call_module("body", (value,))
        output.args = (call,)
        statistics = Statistics(gm, "forward")
        (node,) = body.graph.find_nodes(op="call_function", target=c10d.all_reduce.default)
        assert (statistics.why_exact(node.args[0], node)[:11] or "t") == expected


def test_what_the_forward_graph_saved_is_what_it_was_there(trace: Trace) -> None:
    """Recomputed collectives follow the forward rule, from whatever was saved."""
    forward = trace(lambda x, w: (x.sum(-1), x.mm(w)[:, 0]), X, W)
    saved = Statistics(forward, "forward").returned()
    names = list(saved)
    backward = trace(lambda s, t: (reduce(s), reduce(t)), torch.randn(T), torch.randn(T))
    inputs = backward.graph.find_nodes(op="placeholder")
    for node, name in zip(inputs, names, strict=True):
        node.name = name
    for node in backward.graph.nodes:
        node.meta["partitioner_tag"] = "is_forward"
    statistics = Statistics(backward, "backward", saved=saved)
    found = [statistics.why_exact(c.node.args[0], c.node) for c in find_collectives(backward)]
    assert found == ["a statistic: made by aten.sum over features", ""]


# ---- what the passes do with it ------------------------------------------------------------------


def sites_of(gm: fx.GraphModule, policy: Policy, direction: str = "forward") -> list[Site]:
    facts = run(gm, wire_pipeline(policy, direction)).facts
    return [fact for fact in facts if isinstance(fact, Site)]


def test_a_statistic_is_exact_with_its_reason_and_nobody_needs_to_quantize_it(
    trace: Trace,
) -> None:
    gm = trace(lambda x: reduce(x.sum(-1)), X)
    (site,) = sites_of(gm, Policy.of(bits=4, min_bytes=0))
    assert (site.format, site.eligible) == (None, False)
    assert site.reason == "a statistic: made by aten.sum over features"
    assert site.bytes_after == site.bytes_before


def test_sites_quantize_a_statistic_by_name(trace: Trace) -> None:
    gm = trace(lambda x: reduce(x.sum(-1)), X)
    (collective,) = find_collectives(gm)
    collective.node.meta["nn_module_stack"] = {"loss": ("loss", torch.nn.Linear)}
    (site,) = sites_of(gm, Policy.of(bits=4, sites={"loss": 8}))
    assert site.format == "8b:g128:tread"


def test_a_parameter_of_one_column_is_weights(trace: Trace) -> None:
    gm = trace(gather, torch.randn(T, 1))
    (name,) = (node.name for node in gm.graph.find_nodes(op="placeholder"))
    quantize = QuantizeCollectives(Policy.of(bits=8, min_bytes=0), parameters=frozenset({name}))
    (site,) = run(gm, [quantize]).facts
    assert isinstance(site, Site)
    assert (site.kind, site.format) == ("weights", "8b:g128:tread")


def test_a_statistic_is_not_merged_into_traffic(trace: Trace) -> None:
    def f(x: Tensor, w: Tensor) -> Tensor:
        return reduce(x.sum(-1, keepdim=True)) + reduce(x @ w[:, :1])

    policy = Policy.of(bits=4, min_bytes=0)
    assert [site.format for site in sites_of(trace(f, X, W), policy)] == [None, "4b:g128:rise"]
    assert run(trace(f, X, W), [MergeCollectives()]).steps[0].changes == 0
