"""Registered collectives of other libraries in graphs: found, rewritten, or refused by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, fx
from torch._functorch.aot_autograd import aot_module_simplified, make_boxed_func

from rfcompile.find.collectives import find_collectives
from rfcompile.graph.pipeline import run
from rfcompile.graph.text import graph_text
from rfcompile.graph.wire_bytes import wire_bytes
from rfcompile.passes import wire_pipeline
from rfcompile.passes.quantize_collectives import QuantizeCollectives
from rfcompile.report.report import Site
from rfcompile.wire.policy import Policy
from tests import foreign

if TYPE_CHECKING:
    from tests.traces import Trace

c10d = torch.ops._c10d_functional
vllm, sglang = foreign.vllm, foreign.sglang
X = torch.randn(8, 64)


@pytest.fixture(autouse=True)
def operators(trace: Trace) -> Iterator[None]:
    foreign.register()
    foreign.GROUPS["tp:0"] = dist.group.WORLD
    yield
    foreign.GROUPS.clear()


def quantized(gm: fx.GraphModule, **options: Any) -> tuple[str, list[Site]]:
    """The text after the passes of backend "rfquant", and the sites; again nothing changes."""
    policy = Policy.of(**{"bits": 4, "min_bytes": 0} | options)
    record = run(gm, wire_pipeline(policy, "forward"))
    assert sum(step.changes for step in run(gm, wire_pipeline(policy, "forward")).steps) == 0
    return graph_text(gm), [fact for fact in record.facts if isinstance(fact, Site)]


def functionalized(f: Callable[..., Any], *args: Tensor) -> fx.GraphModule:
    """The graph that Inductor gets of what changes tensors in place."""
    found: list[fx.GraphModule] = []

    def keep(gm: fx.GraphModule, example_inputs: Any) -> Any:
        found.append(gm)
        return make_boxed_func(gm.forward)

    def backend(gm: fx.GraphModule, example_inputs: Any) -> Any:
        return aot_module_simplified(gm, example_inputs, fw_compiler=keep)

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(f, backend=backend, fullgraph=True)(*args)
    return found[0]


def in_place_all_reduce(x: Tensor) -> Tensor:
    y = x * 2
    sglang.inplace_all_reduce(y, "tp:0")
    return y + 1


def moved(text: str) -> list[str]:
    """The collectives of a graph, by name."""
    names = ("all_to_all_single", "all_gather_into_tensor", "like_", "by_size")
    found = (line.split("= ")[1].split("(")[0] for line in text.splitlines() if "= " in line)
    return [name for name in found if any(part in name for part in names)]


TWO_SHOT = [
    "_c10d_functional.all_to_all_single.default",
    "_c10d_functional.all_gather_into_tensor.default",
]


@pytest.mark.parametrize(
    ("f", "kind", "moves", "shape"),
    [
        (lambda x: vllm.all_reduce(x * 2, "tp:0") + 1, "all_reduce", TWO_SHOT, "f32[8, 64]"),
        (
            lambda x: sglang.outplace_all_reduce(x * 2, "tp:0", "ca") + 1,
            "all_reduce",
            TWO_SHOT,
            "f32[8, 64]",
        ),
        (lambda x: vllm.all_gather(x, -1, 4, "tp:0"), "all_gather", TWO_SHOT[1:], "f32[8, 256]"),
        (lambda x: vllm.all_gather(x, 0, 4, "tp:0"), "all_gather", TWO_SHOT[1:], "f32[32, 64]"),
        (
            lambda x: vllm.reduce_scatter(x, 1, 4, "tp:0"),
            "reduce_scatter",
            TWO_SHOT[:1],
            "f32[8, 16]",
        ),
    ],
)
def test_each_kind_is_found_and_rewritten(
    trace: Trace, f: Callable[[Tensor], Tensor], kind: str, moves: list[str], shape: str
) -> None:
    text, (site,) = quantized(trace(f, X))
    assert (site.collective, site.format, site.world_size) == (kind, "4b:g128:rise", 4)
    assert moved(text) == moves
    assert text.splitlines()[-2].split(" = ")[0].endswith(shape)


def test_what_the_finder_says(trace: Trace) -> None:
    gm = trace(lambda x: vllm.all_gather(x, -1, 4, "tp:0"), X)
    before = graph_text(gm)
    (found,) = find_collectives(gm)
    assert graph_text(gm) == before
    assert (found.kind, found.group, found.world, found.op) == ("all_gather", "0", 4, "")
    assert found.foreign is not None
    assert (found.foreign.theirs, found.foreign.dim, found.foreign.problem) == ("tp:0", 1, "")


def test_an_operator_that_stays_exact_is_left_as_it_is(trace: Trace) -> None:
    gm = trace(lambda x: vllm.all_reduce(x * 2, "tp:0"), X)
    before = graph_text(gm)
    text, (site,) = quantized(gm, min_bytes=1 << 20)
    assert text == before
    assert site.why == "min_bytes"


@pytest.mark.parametrize("is_second_form", [True, False])
def test_in_place_operators_are_rewritten_in_functional_graphs(is_second_form: bool) -> None:
    with torch._inductor.config.patch(enable_auto_functionalized_v2=is_second_form):
        gm = functionalized(in_place_all_reduce, X)
    assert "auto_functionalized" in graph_text(gm)
    text, (site,) = quantized(gm)
    assert site.format == "4b:g128:rise"
    assert moved(text) == TWO_SHOT
    assert "auto_functionalized" not in text


def test_a_changed_part_of_a_tensor_is_refused_by_name() -> None:
    def f(x: Tensor) -> Tensor:
        y = x * 2
        sglang.inplace_all_reduce(y[2:5], "tp:0")
        return y + 1

    text, (site,) = quantized(functionalized(f, X))
    assert site.why == "out of reach"
    assert site.reason == "it changes a view of another tensor in place"
    assert "auto_functionalized" in text


@pytest.mark.parametrize(
    ("f", "reason"),
    [
        (in_place_all_reduce, "it changes its input in place in a graph that is not functional"),
        (
            lambda x: vllm.all_reduce(x, "tp:1"),
            "process_group('tp:1') raised KeyError: 'tp:1'",
        ),
        (lambda x: vllm.all_reduce(x, "pp:0"), "process group 'gone' is not known in this process"),
        (
            lambda x: vllm.all_gather(x, 1, 2, "tp:0"),
            "it returns torch.float32 of shape (8, 128); all_gather over 4 ranks gives "
            "torch.float32 of shape (8, 256)",
        ),
    ],
)
def test_what_cannot_be_rewritten_says_why(
    trace: Trace, f: Callable[[Tensor], Tensor], reason: str
) -> None:
    foreign.GROUPS["pp:0"] = "gone"
    gm = trace(f, X)
    before = graph_text(gm)
    text, (site,) = quantized(gm)
    assert text == before
    assert (site.format, site.why, site.reason) == (None, "out of reach", reason)


def test_statistics_stay_exact(trace: Trace) -> None:
    def f(x: Tensor) -> Tensor:
        total = vllm.all_reduce(x.exp().sum(-1, keepdim=True), "tp:0")
        return vllm.all_reduce(x / total, "tp:0")

    _, (statistic, traffic) = quantized(trace(f, X))
    assert statistic.why == "statistic"
    assert traffic.format == "4b:g128:rise"


def test_bytes_of_a_text_with_them_are_not_known(trace: Trace) -> None:
    def f(x: Tensor) -> Tensor:
        return vllm.all_reduce(x * 2, "tp:0") + 1

    static, symbolic = trace(f, X), trace(f, X, dynamic=True)
    in_place = functionalized(in_place_all_reduce, X)
    for gm in (static, in_place):
        assert wire_bytes(graph_text(gm)) is None
        assert wire_bytes(quantized(gm)[0]) == 396
    assert wire_bytes(quantized(symbolic, min_bytes=4096)[0]) is None


def test_only_groups_that_agreed_are_quantized(trace: Trace) -> None:
    def f(x: Tensor) -> Tensor:
        y = c10d.wait_tensor(c10d.all_reduce(x * 2, "sum", "0"))
        return vllm.all_reduce(y * 2, "tp:0")

    def formats(*groups: tuple[str, str]) -> list[str]:
        quantize = QuantizeCollectives(Policy.of(bits=4, min_bytes=0), groups=frozenset(groups))
        facts = run(trace(f, X), [quantize]).facts
        return [fact.format or fact.reason for fact in facts]

    refused = "the ranks of process group '{}' have not agreed on policy and operators"
    assert formats() == [refused.format("0"), refused.format("tp:0")]
    assert formats(("0", "0")) == ["4b:g128:rise", refused.format("tp:0")]
    assert formats(("tp:0", "1")) == [refused.format("0"), refused.format("tp:0")]
    assert formats(("tp:0", "0")) == ["4b:g128:rise"] * 2


def test_symbolic_sizes_are_compared_at_run_time(trace: Trace) -> None:
    def f(x: Tensor) -> Tensor:
        return vllm.all_reduce(x * 2, "tp:0") + 1

    text, (site,) = quantized(trace(f, X, dynamic=True), min_bytes=4096)
    assert moved(text) == ["rfcompile.by_size.default"]
    assert (site.format, site.bytes_before) == ("4b:g128:rise", None)
    assert site.reason == "exact below 4096 bytes, which each call decides"
    text, (site,) = quantized(trace(f, X, dynamic=True), min_bytes=0)
    assert moved(text) == TWO_SHOT
    assert site.reason == ""
