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

from rfcompile.find.collectives import find_collectives
from rfcompile.find.statistics import Statistics
from rfcompile.graph.pipeline import run
from rfcompile.passes import wire_pipeline
from rfcompile.passes.merge_collectives import MergeCollectives
from rfcompile.passes.quantize_collectives import QuantizeCollectives
from rfcompile.report.report import Site
from rfcompile.wire.policy import Policy
from rfcompile.wire.process_groups import simulated

if TYPE_CHECKING:
    from tests.traces import Trace

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


# ---- the same values, written in other ways ------------------------------------------------------

CLASSES = torch.randn(4, V, T)  # batch, classes, positions
CLASS_LABELS = torch.randint(V, (4, T))
CHANNELS = torch.randn(V, D, 1)
PICKED = torch.arange(T) * V + LABELS


def picked_from_a_convolution(x: Tensor, kernel: Tensor, y: Tensor) -> Tensor:
    logits = F.conv1d(x.transpose(1, 2), kernel)
    return reduce(logits.gather(1, torch.stack([y, y], 1)).sum(1))


def smoothed_routing(x: Tensor, router: Tensor, bias: Tensor) -> Tensor:
    p = (x @ router).view(4, 4, E).sigmoid() + bias
    return reduce((p / p.sum(-1, keepdim=True)).mean(1))


def instance_norm(x: Tensor, kernel: Tensor) -> Tensor:
    h = F.conv2d(x, kernel)
    return reduce(torch.stack([h.mean((2, 3)), h.square().mean((2, 3))]))


def negative_log_likelihoods(x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(x, y, reduction="none")


OTHER_WORDS: Mapping[str, tuple[Callable[..., Any], tuple[Tensor, ...], str]] = {
    "taken": (lambda x, i: reduce(torch.take(x @ x.T @ x, i)), (LOGITS, PICKED), "s"),
    "of all in a line": (lambda x, i: reduce(x.reshape(-1)[i]), (LOGITS, PICKED), "s"),
    "selected in a line": (
        lambda x, i: reduce(x.exp().flatten().index_select(0, i)),
        (LOGITS, PICKED),
        "s",
    ),
    "classes before positions": (
        lambda x, y: reduce(x.gather(1, y[:, None])[:, 0]),
        (CLASSES, CLASS_LABELS),
        "s",
    ),
    "classes moved": (
        lambda x, y: reduce(x.view(4, 4, V).mT.gather(1, y.view(4, 1, 4))),
        (LOGITS, LABELS),
        "s",
    ),
    "classes of a convolution": (
        picked_from_a_convolution,
        (torch.randn(4, T, D), CHANNELS, CLASS_LABELS),
        "s",
    ),
    "classes first": (
        lambda w, x, y: reduce((w @ x.T).gather(0, y[None])[0]),
        (torch.randn(V, D), X, LABELS),
        "s",
    ),
    "diagonal": (lambda x: reduce((x @ x.T).diagonal()), (X,), "s"),
    "squares by einsum": (lambda x: reduce(torch.einsum("td,td->t", x, x)), (X,), "s"),
    "squares by bmm": (lambda x: reduce(torch.bmm(x[:, None], x[..., None]).view(T)), (X,), "s"),
    "squares by ones": (lambda x: reduce(x.square() @ torch.ones(D, 1)), (X,), "s"),
    "a sum by a vector of ones": (lambda x, w: reduce((x @ w) @ torch.ones(D)), (X, W), "s"),
    "a sum by a vector": (lambda x, w: reduce(x @ w @ w[0]), (X, W), "s"),
    "dot products in one tensor": (
        lambda x: reduce(torch.stack([x[0] @ x[0], x[1] @ x[1]])),
        (X,),
        "s",
    ),
    "masked losses by einsum": (
        lambda x, y, mask: reduce(
            torch.einsum("bs,bs->b", negative_log_likelihoods(x, y).view(4, 4), mask.float())
        ),
        (LOGITS, LABELS, torch.rand(4, 4) > 0.5),
        "s",
    ),
    "masked losses by a matrix": (
        lambda x, y, mask: reduce(mask.float() @ negative_log_likelihoods(x, y)),
        (LOGITS, LABELS, torch.rand(4, T) > 0.5),
        "s",
    ),
    "losses by class": (
        lambda x, y, c: reduce(F.one_hot(c, E).float().T @ negative_log_likelihoods(x, y)),
        (LOGITS, LABELS, EXPERTS),
        "s",
    ),
    "counts by a matrix": (
        lambda c: reduce(F.one_hot(c, E).float().T @ F.one_hot(c, E).float()),
        (EXPERTS,),
        "s",
    ),
    "routed by einsum": (
        lambda x, w, c: reduce(
            torch.einsum("te,te->e", (x @ w).softmax(-1), F.one_hot(c, E).float())
        ),
        (X, torch.randn(D, E), EXPERTS),
        "s",
    ),
    "routed by ones": (
        lambda x, w: reduce(torch.ones(1, T) @ (x @ w).softmax(-1)),
        (X, torch.randn(D, E)),
        "s",
    ),
    "routed with a bias": (smoothed_routing, (X, torch.randn(D, E), torch.randn(E)), "s"),
    "distances": (lambda x, y: reduce(torch.cdist(x[:, None], y[:, None]).view(T)), (X, X), "s"),
    "sorted": (lambda x: reduce(x.sort(-1, descending=True).values[:, :4]), (X,), "s"),
    "the last of a sorted row": (lambda x, w: reduce((x @ w).sort(-1)[0][:, -1]), (X, W), "s"),
    "the last running sum": (lambda x: reduce(x.exp().cumsum(-1)[:, -1]), (X,), "s"),
    "the last running logsumexp": (lambda x: reduce(x.logcumsumexp(-1)[:, -1:]), (X,), "s"),
    "pooled features": (lambda x: reduce(F.avg_pool1d(x[:, None], D)[:, 0]), (X,), "s"),
    "one class": (lambda x, w: reduce((x @ w).log_softmax(-1).narrow(1, 3, 1)), (X, W), "s"),
    "each of two": (
        lambda x, w: reduce((x @ w).softmax(-1).unbind(-1)[0] * 2),
        (X, torch.randn(D, 2)),
        "s",
    ),
    "one feature of a norm": (lambda x: reduce(torch.renorm(x, 2, 0, 1.0)[:, :1]), (X,), "s"),
    "instance norm": (instance_norm, (IMAGES, KERNEL), "s"),
    "moments of an instance norm": (
        lambda x, k: reduce(torch.cat(torch.var_mean(F.conv2d(x, k), (2, 3)))),
        (IMAGES, KERNEL),
        "s",
    ),
}

QUERY, KEYS = torch.randn(8, 1, 16), torch.randn(8, 6, 16)
TABLE = torch.randn(E, D)


def linear_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k = q.exp(), k.softmax(-1)
    return reduce(q @ (k.mT @ v) / (q @ k.sum(-2, keepdim=True).mT))


def queries_with_a_norm(x: Tensor, weight: Tensor) -> Tensor:
    """Halves of pairs of features are no values that stand for a row."""
    a, b = F.rms_norm((x @ weight).view(4, 4, 4, 8), (8,)).view(4, 4, 4, 4, 2).unbind(-1)
    return exchange(torch.stack([a - b, a + b], -1).flatten(3))


def dispatched(x: Tensor, c: Tensor) -> Tensor:
    return exchange(torch.einsum("te,td->ed", F.one_hot(c, E).float(), x))


def last_tokens(x: Tensor, weight: Tensor, i: Tensor) -> Tensor:
    h = (x @ weight).view(4, 4, D)
    return gather(h.gather(1, i[:, None, None].expand(4, 1, D))[:, 0])


OTHER_TRAFFIC: Mapping[str, tuple[Callable[..., Any], tuple[Tensor, ...], str]] = {
    "one query": (lambda q, k: reduce((q @ k.mT).softmax(-1) @ k), (QUERY, KEYS), "t"),
    "scores of one query": (lambda q, k: reduce(q @ k.mT), (QUERY, KEYS), "t"),
    "one query by einsum": (
        lambda q, k: reduce(torch.einsum("bs,bsd->bd", (q @ k.mT).softmax(-1)[:, 0], k)),
        (QUERY, KEYS),
        "t",
    ),
    "one key": (lambda q, k: reduce((q @ k.mT).softmax(-1) @ k), (QUERY, QUERY), "t"),
    "attention": (
        lambda q, k, v: reduce(F.scaled_dot_product_attention(q, k, v)),
        (HEADS,) * 3,
        "t",
    ),
    "linear attention": (linear_attention, (HEADS,) * 3, "t"),
    "a state of linear attention": (lambda k, v: reduce(k.exp().mT @ v), (HEADS, HEADS), "t"),
    "weighed experts": (
        lambda p, y: reduce(torch.einsum("tk,tkd->td", p.topk(2).values, y)),
        (torch.rand(T, E), torch.randn(T, 2, D)),
        "t",
    ),
    "dispatched by einsum": (dispatched, (X, EXPERTS), "t"),
    "embedding by one-hot": (
        lambda c, w: reduce(F.one_hot(c, E).float() @ w),
        (EXPERTS, TABLE),
        "t",
    ),
    "a masked mean of each sequence": (
        lambda x, w, mask: reduce(mask[:, None].float() @ (x @ w).view(4, 4, D)),
        (X, W, torch.rand(4, 4) > 0.5),
        "t",
    ),
    "a head of one output": (
        lambda x, w: reduce(F.linear(F.linear(x, w), w[:1])),
        (X, W),
        "t",
    ),
    "a rotation": (lambda x, w: reduce(x @ w @ torch.ones(D, D).tril()), (X, W), "t"),
    "integer weights": (
        lambda x, w: reduce(F.relu(x).square() @ w.float()),
        (X, torch.ones(D, D, dtype=torch.int8)),
        "t",
    ),
    "gates": (
        lambda x, w: reduce(((x @ w).sigmoid() * (x @ w)).view(4, 4, D).mean(1)),
        (X, W),
        "t",
    ),
    "halves": (lambda x, w: reduce(F.glu(x @ w, -1)), (X, W), "t"),
    "half of a softmax": (lambda x, w: gather((x @ w).softmax(-1)[:, : D // 2]), (X, W), "t"),
    "one column": (lambda x, w: reduce((x @ w)[:, 0]), (X, W), "t"),
    "chosen columns": (
        lambda x, w, i: reduce((x @ w).index_select(1, i)),
        (X, W, torch.arange(4)),
        "t",
    ),
    "queries with a norm": (queries_with_a_norm, (X, W), "t"),
    "the first token": (
        lambda x, w: gather(F.layer_norm((x @ w).view(4, 4, D), (D,))[:, 0]),
        (X, W),
        "t",
    ),
    "last tokens": (last_tokens, (X, W, torch.randint(4, (4,))), "t"),
    "the last of running sums of tokens": (
        lambda x, w: reduce((x @ w).view(4, 4, D).cumsum(1)[:, -1]),
        (X, W),
        "t",
    ),
    "tokens in a line": (lambda x, w: exchange((x @ w).flatten()).view(T, D), (X, W), "t"),
    "a map that is pooled twice": (
        lambda x, k: gather(F.avg_pool2d(F.conv2d(x, k), 2).mean((2, 3))),
        (IMAGES, KERNEL),
        "t",
    ),
    "gated channels that are pooled": (
        lambda x, k: gather(torch.mul(*F.conv2d(x, k).chunk(2, 1)).mean((2, 3))),
        (IMAGES, KERNEL),
        "t",
    ),
    "a sequence that is pooled": (
        lambda x, w: gather(F.avg_pool1d((x @ w).view(4, 4, D).mT, 4)[..., 0]),
        (X, W),
        "t",
    ),
}

OTHER_BACKWARD: Mapping[str, tuple[Callable[..., Any], tuple[Tensor, ...], str]] = {
    "of squares by bmm": (
        lambda g, x: torch.bmm(x[..., None], reduce(g).view(T, 1, 1)),
        (torch.rand(T), X),
        "s",
    ),
    "of a sum by ones": (lambda g, x: reduce(g) @ torch.ones(1, D) * x, (torch.rand(T, 1), X), "s"),
    "of losses by class": (
        lambda g, c, x: (F.one_hot(c, E).float() @ reduce(g))[:, None] * x,
        (torch.rand(E), EXPERTS, LOGITS),
        "s",
    ),
    "of a logit picked in a line": (
        lambda g, i: torch.zeros(T * V).index_put((i,), reduce(g), True).view(T, V),
        (torch.rand(T), PICKED),
        "s",
    ),
    "of a logit taken": (
        lambda g, i: torch.zeros(T, V).put(i, reduce(g), True),
        (torch.rand(T), PICKED),
        "s",
    ),
    "of classes before positions": (
        lambda g, y: torch.zeros(4, V, T).scatter_add(1, y[:, None], reduce(g)[:, None]),
        (torch.rand(4, T), CLASS_LABELS),
        "s",
    ),
    "of last tokens": (
        lambda g, i, w: (
            torch.zeros(4, 4, D).scatter_add(
                1, i[:, None, None].expand(4, 1, D), reduce(g)[:, None]
            )
            @ w
        ),
        (torch.rand(4, D), torch.randint(4, (4,)), W),
        "t",
    ),
    "of a diagonal": (
        lambda g, x: torch.zeros(T, T).diagonal_scatter(reduce(g)) @ x,
        (torch.rand(T), X),
        "s",
    ),
    "of pooled features": (
        lambda g, x: torch.ops.aten.avg_pool2d_backward(
            reduce(g).view(T, 1, 1, 1),
            x.view(T, 1, 1, D),
            [1, D],
            [1, D],
            [0, 0],
            False,
            True,
            None,
        ),
        (torch.rand(T), X),
        "s",
    ),
    "of a pooled map": (
        lambda g, x, k: F.conv2d(
            torch.ops.aten.avg_pool2d_backward(
                reduce(g)[..., None, None], x, [8, 8], [8, 8], [0, 0], False, True, None
            ),
            k,
        ),
        (torch.rand(2, 3), IMAGES, KERNEL),
        "t",
    ),
    "of one class": (
        lambda g, x: torch.zeros(T, V).select_scatter(reduce(g), 1, 3) * x,
        (torch.rand(T), LOGITS),
        "s",
    ),
    "of pairs that were rotated": (
        lambda g, w: torch.zeros(T, D // 2, 2).select_scatter(reduce(g), 2, 0).view(T, D) @ w,
        (torch.rand(T, D // 2), W),
        "t",
    ),
    "of a half": (
        lambda g, x: torch.zeros(T, D).slice_scatter(reduce(g), 1, 0, D // 2) * x,
        (torch.rand(T, D // 2), X),
        "t",
    ),
    "of the first token": (
        lambda g, w: torch.zeros(4, 4, D).select_scatter(reduce(g), 1, 0) @ w,
        (torch.rand(4, D), W),
        "t",
    ),
    "of one query": (
        lambda g, k, w: (reduce(g) @ k.mT) @ w,
        (QUERY, KEYS, torch.randn(6, 6)),
        "t",
    ),
    "of a head of one output": (lambda g, w: reduce(g) @ w[:1], (torch.rand(T, 2)[:, :1], W), "s"),
    "of a matrix of one output": (lambda g, x: reduce(x.T @ g), (torch.rand(T, 2)[:, 1:], X), "t"),
    "of a bias by ones": (lambda g: reduce(torch.ones(1, T) @ g), (X,), "t"),
    "of a norm's weight by einsum": (
        lambda g, x: reduce(torch.einsum("td,td->d", g, x)),
        (X, X),
        "t",
    ),
    "of an embedding by one-hot": (
        lambda g, c: reduce(F.one_hot(c, E).float().T @ g),
        (X, EXPERTS),
        "t",
    ),
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
            ("forward", OTHER_WORDS),
            ("forward", OTHER_TRAFFIC),
            ("backward", OTHER_BACKWARD),
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
