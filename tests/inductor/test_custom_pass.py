"""The pass for Inductor's hook: what servers compile, on real ranks; its key; its errors.

The operators have the schemas of vLLM's and SGLang's (``tests/foreign.py``).
"""

from __future__ import annotations

import pickle
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch import Tensor

import rfcompile as rf
from rfcompile import QuantFormat
from rfcompile.errors import PolicyError, ProcessGroupError, RankMismatchError
from rfcompile.inductor import custom_pass
from rfcompile.report.step import merge_reports
from rfcompile.wire import foreign as registry
from rfcompile.wire.process_groups import simulated
from tests import foreign
from tests.ranks import error_of

if TYPE_CHECKING:
    from tests.ranks import Rank, RunRanks

vllm, sglang = foreign.vllm, foreign.sglang
FORMAT = "4b:g64"
POLICY = {"activations": FORMAT, "min_bytes": 4096}
FEATURES = 64
SMALL, LARGE = 3, 80
"""Rows of a message below and above ``min_bytes``, in bfloat16 and float32."""


def served(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    """What a layer of a server does: in place, out of place (strides too), gathered, scattered."""
    changed = x @ weight
    sglang.inplace_all_reduce(changed, "tp:0")
    return (
        vllm.all_reduce(x @ weight, "tp:0"),
        changed,
        sglang.outplace_all_reduce((x @ weight).t(), "tp:0", "ca"),
        vllm.all_gather(x @ weight, -1, 2, "tp:0"),
        vllm.reduce_scatter(x @ weight, 1, 2, "tp:0"),
    )


NAMES = (
    "all_reduce",
    "inplace_all_reduce",
    "outplace_all_reduce",
    "all_gather",
    "reduce_scatter",
)


@pytest.fixture(scope="module", params=[torch.bfloat16, torch.float32])
def runs(ranks: RunRanks, request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    return ranks(2, serve, request.param)


def test_small_messages_are_exact_and_go_by_their_own_operators(
    runs: list[dict[str, Any]],
) -> None:
    for run in runs:
        assert run["small is exact"] == [True] * len(NAMES)
        assert sorted(run["called"]) == sorted(NAMES)


def test_large_messages_are_what_the_eager_functions_give(runs: list[dict[str, Any]]) -> None:
    for run in runs:
        assert run["large called"] == []
        assert run["large is rf's"] == [True] * len(NAMES)
        assert 0.0 < run["worst error by its bound"] <= 1.0


def test_the_report_counts_and_says_what_each_call_decides(runs: list[dict[str, Any]]) -> None:
    report = runs[0]["report"]
    assert report.startswith("5 of 5 sites quantized")
    assert "(exact below 4096 bytes, which each call decides)" in report
    assert "nobody counts how often it runs" in report


def test_before_ranks_agree_everything_is_exact_and_says_why(runs: list[dict[str, Any]]) -> None:
    for run in runs:
        assert run["exact before"]
        assert run["before"].startswith("0 of 5 sites quantized")
        assert "process group 'tp:0' have not agreed" in run["before"]


def test_sizes_that_are_numbers_are_decided_while_compiling(ranks: RunRanks) -> None:
    for run in ranks(2, serve_fixed_sizes):
        assert run["sites"] == [("4b:g64:rise", ""), (None, "min_bytes")]
        assert run["large is rf's"]
        assert run["small is exact"]


def test_a_graph_from_the_cache_of_another_process(ranks: RunRanks) -> None:
    for run in ranks(2, serve_from_caches, uuid.uuid4().hex):
        assert run["first"] == (0, 1, True)
        assert run["of the other process"] == (1, 0, True)
        assert run["one of both"] in [(1, 0, True), (0, 1, True)]
        assert run["other policy"] == (0, 1, False)


def test_the_backend_finds_them_too(ranks: RunRanks) -> None:
    for run in ranks(2, serve_by_the_backend):
        assert run["summary"].startswith("5 of 5 sites quantized")
        assert run["large is rf's"] == [True] * len(NAMES)
        assert run["small is exact"] == [True] * len(NAMES)


def test_torchs_own_collectives_and_gradients(ranks: RunRanks) -> None:
    sites = [("forward", "activations", "8b:g64:tread"), ("backward", "gradients", "4b:g64:tread")]
    for run in ranks(2, train_by_the_pass):
        assert run["sites"] == sites
        assert run["is rf's"] == [True, True]


def test_ranks_that_differ_are_told(ranks: RunRanks) -> None:
    for kind, text in ranks(2, disagree):
        assert kind is RankMismatchError
        assert "inductor pass" in text


def test_ranks_that_registered_other_facts_are_told(ranks: RunRanks) -> None:
    for errors in ranks(2, disagree_on_an_operator):
        for kind, text in errors:
            assert kind is RankMismatchError
            assert "reduce=sum" in text
            assert "reduce=avg" in text


def test_the_key_has_policy_sources_operators_and_groups() -> None:
    foreign.register()
    first = rf.inductor_pass(4)
    assert first.uuid() == rf.inductor_pass("4b").uuid()
    assert first.uuid() != rf.inductor_pass(8).uuid()
    assert first.uuid() == pickle.loads(pickle.dumps(first)).uuid()
    assert "like_vllm::all_reduce(Tensor tensor, str group_name) -> Tensor" in str(first.uuid())
    with patch.object(custom_pass, "source_digest", lambda: "edited"):
        edited = first.uuid()
    assert edited != first.uuid()
    with simulated(2):
        before = first.uuid()
        foreign.GROUPS["tp:0"] = dist.group.WORLD
        assert first.agree("tp:0") is first
        assert first.uuid() == (*before, "tp:0=0 of 2")
        assert rf.inductor_pass(8).uuid() == rf.inductor_pass("8b").uuid()
    assert first.uuid() == before


def test_wrong_input_is_refused() -> None:
    foreign.register()
    with pytest.raises(PolicyError, match=r"give bits .* or set a default one"):
        rf.inductor_pass()
    with pytest.raises(PolicyError, match="speed"):
        rf.inductor_pass({"speed": 4})
    with simulated(2), pytest.raises(ProcessGroupError, match="'nowhere' is no process group"):
        rf.inductor_pass(4).agree("nowhere")
    with pytest.raises(ProcessGroupError, match="make the groups and register"):
        rf.inductor_pass(4).agree("tp:0")


# ---- on a rank -----------------------------------------------------------------------------------


@contextmanager
def fresh(tag: str) -> Iterator[None]:
    """As in a process that has compiled nothing; what compiles inside leaves no report."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    rf.reports(clear=True)
    foreign.CALLS.clear()
    with torch.no_grad(), torch.compiler.config.patch(cache_key_tag=tag):
        yield
    rf.reports(clear=True)


def compiled(
    f: Callable[..., Any], graph_pass: Any, dynamic: bool, **options: Any
) -> Callable[..., Any]:
    options = {"post_grad_custom_post_pass": graph_pass, **options}
    return torch.compile(f, fullgraph=True, dynamic=dynamic, options=options)


def inputs(rank: Rank, rows: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rank.index)
    x = torch.randn(rows, FEATURES, generator=generator)
    shared = torch.Generator().manual_seed(7)
    weight = torch.randn(FEATURES, FEATURES, generator=shared) / 8
    return x.to(dtype), weight.to(dtype)


def wanted(x: Tensor, weight: Tensor) -> list[Tensor]:
    """What the eager functions of this package give."""
    y = x @ weight
    total = rf.all_reduce(y, FORMAT)
    gathered = rf.all_gather(y.movedim(1, 0).contiguous(), FORMAT).movedim(0, 1)
    scattered = rf.reduce_scatter(y.movedim(1, 0).contiguous(), FORMAT).movedim(0, 1)
    return [total, total, rf.all_reduce(y.t(), FORMAT), gathered, scattered]


def worst_error(rank: Rank, found: tuple[Tensor, ...], x: Tensor, weight: Tensor) -> float:
    """Of the all_reduce, as a share of the bound that :func:`rfcompile.all_reduce` states, with
    the largest magnitudes of whole tensors, and of the rounding of the result to its dtype."""
    values = [y.float() for y in rank.gathered(x @ weight)]
    exact = torch.stack(values).sum(0)
    e = rf.QuantFormat.parse(FORMAT).max_error()
    sent = sum(y.abs().max().item() for y in values)
    largest = exact.abs().max().item() + e * sent
    bound = e * (sent + largest) + torch.finfo(x.dtype).eps * (1 + e) * largest
    return (found[0].float() - exact).abs().max().item() / bound


def start(rank: Rank, policy: Any = POLICY) -> Any:
    foreign.register()
    foreign.GROUPS["tp:0"] = dist.group.WORLD
    return rf.inductor_pass(policy)


def serve(rank: Rank, dtype: torch.dtype) -> dict[str, Any]:
    graph_pass = start(rank)
    small, large = inputs(rank, SMALL, dtype), inputs(rank, LARGE, dtype)
    with fresh(uuid.uuid4().hex):
        before = compiled(served, graph_pass, dynamic=True)(*large)
        run: dict[str, Any] = {
            "exact before": all(map(torch.equal, before, served(*large))),
            "before": str(merge_reports(rf.reports())),
        }
    graph_pass.agree("tp:0")
    with fresh(uuid.uuid4().hex):
        # Servers have in-place operators in the first of both forms.
        first_form = {"enable_auto_functionalized_v2": dtype is torch.float32}
        call = compiled(served, graph_pass, dynamic=True, **first_form)
        found = call(*large)
        run["large called"] = list(foreign.CALLS)
        exact = call(*small)
        run["called"] = list(foreign.CALLS)
        assert len(rf.reports()) == 1
        run["report"] = str(merge_reports(rf.reports()))
    for name, y in zip(NAMES[:4], found[:4], strict=True):
        rank.assert_same(y, name)
    run["small is exact"] = list(map(torch.equal, exact, served(*small)))
    run["large is rf's"] = list(map(torch.equal, found, wanted(*large)))
    run["worst error by its bound"] = worst_error(rank, found, *large)
    return run


def serve_fixed_sizes(rank: Rank) -> dict[str, Any]:
    graph_pass = start(rank).agree("tp:0")
    x, weight = inputs(rank, LARGE, torch.bfloat16)

    def f(x: Tensor) -> tuple[Tensor, Tensor]:
        y = x @ weight
        return vllm.all_reduce(y, "tp:0"), vllm.all_reduce(y[:SMALL].clone(), "tp:0")

    with fresh(uuid.uuid4().hex):
        found, exact = compiled(f, graph_pass, dynamic=False)(x)
        (report,) = rf.reports()
    rank.assert_same(found)
    y = x @ weight
    return {
        "sites": [(site.format, site.why) for site in report.sites],
        "large is rf's": torch.equal(found, rf.all_reduce(y, FORMAT)),
        "small is exact": torch.equal(exact, vllm.all_reduce(y[:SMALL], "tp:0")),
    }


def serve_by_the_backend(rank: Rank) -> dict[str, Any]:
    start(rank)
    small, large = (inputs(rank, rows, torch.bfloat16) for rows in (SMALL, LARGE))
    with fresh(uuid.uuid4().hex):
        call = torch.compile(
            served, backend="rfquant", fullgraph=True, dynamic=True, options=POLICY
        )
        found, exact = call(*large), call(*small)
        (report,) = rf.reports()
        return {
            "summary": report.summary(),
            "large is rf's": list(map(torch.equal, found, wanted(*large))),
            "small is exact": list(map(torch.equal, exact, served(*small))),
        }


def train_by_the_pass(rank: Rank) -> dict[str, Any]:
    policy = {"activations": "8b:g64", "gradients": "4b:g64", "min_bytes": 0}
    graph_pass = rf.inductor_pass(policy).agree(None)
    x, weight = inputs(rank, LARGE, torch.float32)
    leaf = x.clone().requires_grad_()
    with fresh(uuid.uuid4().hex), torch.enable_grad():
        call = compiled(
            lambda x: funcol.all_gather_tensor_autograd(x @ weight, 0, dist.group.WORLD),
            graph_pass,
            dynamic=False,
        )
        y = call(leaf)
        sent = inputs(rank, 2 * LARGE, torch.float32)[0]
        y.backward(sent)
        sites = [site for report in rf.reports() for site in report.sites]
    gradient = rf.reduce_scatter(sent, QuantFormat.parse("4b:g64").for_kind("gradients"))
    return {
        "sites": [(site.direction, site.kind, site.format) for site in sites],
        "is rf's": [
            torch.equal(y, rf.all_gather(x @ weight, "8b:g64")),
            torch.equal(leaf.grad, gradient @ weight.T),
        ],
    }


def one_all_reduce(x: Tensor, weight: Tensor) -> Tensor:
    return vllm.all_reduce(x @ weight, "tp:0")


def serve_from_caches(rank: Rank, tag: str) -> dict[str, Any]:
    """Each rank compiles with a cache of its own, then finds the other's graph."""
    graph_pass = start(rank).agree("tp:0")
    x, weight = inputs(rank, LARGE, torch.bfloat16)
    want = rf.all_reduce(x @ weight, FORMAT)
    run = {}
    for what, name in {
        "first": f"{tag}{rank.index}",
        "of the other process": f"{tag}{1 - rank.index}",
        "one of both": f"{tag}0" if rank.index else uuid.uuid4().hex,
        "other policy": f"{tag}{rank.index}",
    }.items():
        if what == "other policy":
            graph_pass = start(rank, {"activations": "8b:g64", "min_bytes": 4096}).agree("tp:0")
        with fresh(name):
            found = compiled(one_all_reduce, graph_pass, dynamic=True)(x, weight)
            counters = torch._dynamo.utils.counters["inductor"]
            run[what] = (
                counters["fxgraph_cache_hit"],
                counters["fxgraph_cache_miss"],
                torch.equal(found, want),
            )
        rank.assert_same(found, what)
        dist.barrier()
    return run


def disagree(rank: Rank) -> tuple[type, str]:
    graph_pass = start(rank, 4 + 4 * rank.index)
    error = error_of(lambda: graph_pass.agree("tp:0"))
    return type(error), str(error)


def disagree_on_an_operator(rank: Rank) -> list[tuple[type, str]]:
    """By the pass, and by the backend."""
    start(rank)
    with patch.dict(registry._REGISTERED):
        del registry._REGISTERED[vllm.all_reduce.default]
        rf.register_collective(
            vllm.all_reduce,
            kind="all_reduce",
            reduce=("sum", "avg")[rank.index],
            group="group_name",
            process_group=foreign.group_of,
        )
        found = [error_of(lambda: rf.inductor_pass(POLICY).agree("tp:0"))]
        with fresh(uuid.uuid4().hex):
            call = torch.compile(one_all_reduce, backend="rfquant", options=POLICY)
            found.append(error_of(lambda: call(*inputs(rank, LARGE, torch.float32))))
    return [(type(error), str(error)) for error in found]
