"""Backend "rfquant" on unmodified models: what it rewrites, and that training still adds up.

Where only the rewritten graphs matter, they run as they are: generating code for a model takes ten
times as long. Tests of options need no real ranks and simulate them.
"""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch import Tensor, fx, nn
from torch._functorch.aot_autograd import make_boxed_func
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.codecache import PyCodeCache
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

import rfcompile as rf
import rfcompile.inductor.backend
from rfcompile.errors import FormatError, OptionError, PolicyError, UnquantizedSiteError
from rfcompile.graph.text import read_statements
from rfcompile.report.report import Report
from rfcompile.report.step import merge_reports
from rfcompile.wire.gathers import gather_payloads
from rfcompile.wire.process_groups import simulated

if TYPE_CHECKING:
    from tests.ranks import Rank, RunRanks

MOVES_DATA = re.compile(r"_c10d_functional\.(?!wait_tensor)")


@contextlib.contextmanager
def graphs_run_as_they_are() -> Iterator[None]:
    """The backend hands its rewritten graphs to nobody."""

    def run_it(gm: fx.GraphModule, example_inputs: Any, **kwargs: Any) -> Any:
        for node in gm.graph.nodes:
            if node.target is torch.ops._c10d_functional.all_gather_into_tensor.default:
                node.target = gather_payloads  # as Inductor lowers it; torch's may end the process
        gm.recompile()
        return make_boxed_func(gm.forward)

    with patch.object(rfcompile.inductor.backend, "compile_fx_inner", run_it):
        yield


def reported() -> Report:
    """What was compiled since the last call."""
    return merge_reports(rf.reports(clear=True))


def assert_only_bytes_travel(report: Report) -> None:
    """No collective of the rewritten graphs moves anything but payloads."""
    for graph in report.graphs:
        types = {s.name: s.type for s in read_statements(graph.after)}
        for s in read_statements(graph.after):
            if MOVES_DATA.match(s.target):
                assert types[s.arguments.split(",")[0]].startswith("u8["), s


# ---- whole models --------------------------------------------------------------------------------


def llama_plan(layers: int, *, sequence_parallel: bool) -> dict[str, ParallelStyle]:
    """Megatron's tensor parallelism; embedding and head stay whole on every rank.

    With sequence parallelism what is between the linears is sharded by position.
    """
    sharded, whole = Shard(1), Replicate()
    plan: dict[str, ParallelStyle] = {}
    for i in range(layers):
        layer = f"model.layers.{i}"
        for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"):
            plan[f"{layer}.{name}"] = ColwiseParallel()
        for name in ("mlp.gate_proj", "mlp.up_proj"):
            plan[f"{layer}.{name}"] = ColwiseParallel()
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            output = sharded if sequence_parallel else whole
            plan[f"{layer}.{name}"] = RowwiseParallel(output_layouts=output)
        if sequence_parallel:
            plan[f"{layer}.input_layernorm"] = SequenceParallel()
            plan[f"{layer}.post_attention_layernorm"] = SequenceParallel()
            plan[f"{layer}.self_attn"] = PrepareModuleInput(
                input_kwarg_layouts={"hidden_states": sharded},
                desired_input_kwarg_layouts={"hidden_states": whole},
            )
            plan[f"{layer}.mlp"] = PrepareModuleInput(
                input_layouts=(sharded,), desired_input_layouts=(whole,)
            )
    if sequence_parallel:
        plan["model.layers.0"] = PrepareModuleInput(
            input_layouts=(whole,), desired_input_layouts=(sharded,), use_local_output=True
        )
        plan["model.norm"] = SequenceParallel()
        plan["lm_head"] = PrepareModuleInput(
            input_layouts=(sharded,), desired_input_layouts=(whole,), use_local_output=True
        )
    return plan


def llama(world: int, *, sequence_parallel: bool) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=64,
        use_cache=False,
    )
    model: nn.Module = LlamaForCausalLM(config)
    plan = llama_plan(2, sequence_parallel=sequence_parallel)
    return parallelize_module(model, init_device_mesh("cpu", (world,)), plan)


@dataclass(frozen=True)
class Step:
    """What one training step of the Llama gave."""

    loss: float
    logits: Tensor
    grads: dict[str, Tensor]


def llama_step(rank: Rank, model: nn.Module, call: Callable[..., Any]) -> Step:
    ids = torch.randint(0, 96, (3, 16), generator=torch.Generator().manual_seed(1))
    model.zero_grad()
    out = call(input_ids=ids, labels=ids)
    out.loss.backward()
    grads = {}
    for name, parameter in model.named_parameters():
        grad = parameter.grad
        assert grad is not None, name
        if not isinstance(grad, DTensor):
            rank.assert_same(grad, name)  # replicated: the same bits on every rank
        grads[name] = grad.full_tensor() if isinstance(grad, DTensor) else grad.clone()
    rank.assert_same(out.loss, "loss")
    rank.assert_same(out.logits, "logits")
    return Step(out.loss.item(), out.logits.detach(), grads)


def error_of_one_collective(rank: Rank, bits: int) -> float:
    """Relative L2 error of one quantized all-reduce of Gaussian data, measured."""
    x = [torch.randn(2**14, generator=torch.Generator().manual_seed(r)) for r in range(rank.world)]
    exact = torch.stack(x).sum(0)
    return relative(rf.all_reduce(x[rank.index], bits), exact)


def relative(got: Tensor, exact: Tensor) -> float:
    return ((got - exact).norm() / exact.norm()).item()


def train_llama(rank: Rank, bits: int, sequence_parallel: bool) -> dict[str, Any]:
    model = llama(rank.world, sequence_parallel=sequence_parallel)
    exact = llama_step(rank, model, model)
    options = {"bits": bits, "min_bytes": 0, "strict": True}
    # DTensor and a dynamic size on 3-D activations do not go together in torch 2.13.
    compiled = torch.compile(
        model, backend="rfquant", options=options, fullgraph=True, dynamic=False
    )
    with graphs_run_as_they_are():
        got = llama_step(rank, model, compiled)
    report = reported()
    assert_only_bytes_travel(report)
    return {
        "report": report,
        "delta": error_of_one_collective(rank, bits),
        "loss": (got.loss, exact.loss),
        "logits": (got.logits, exact.logits),
        "grads": {name: relative(got.grads[name], grad) for name, grad in exact.grads.items()},
    }


@pytest.mark.slow
@pytest.mark.parametrize(("bits", "sequence_parallel"), [(4, False), (8, True)])
def test_llama(ranks: RunRanks, bits: int, sequence_parallel: bool) -> None:
    """Every site of an unmodified DTensor Llama travels quantized, and the step stays close.

    Tolerance: each of N sites on the way adds an error of about ``delta`` relative to what it
    carries, with ``delta`` measured on one collective; rounding errors are independent, so they add
    up in squares to ``sqrt(N) * delta`` of the logits' (the gradient's) norm. The loss follows from
    the logits: by a token's logits its slope is at most sqrt(2) (softmax minus one-hot).
    """
    first = ranks(2, train_llama, bits, sequence_parallel)[0]
    report: Report = first["report"]
    sites = Counter((s.direction, s.collective, s.merged) for s in report.sites)
    if sequence_parallel:
        # A layer gathers before attention and MLP and scatters after them; so does the backward,
        # the other way round. Once more each: before lm_head, and for the embedding's gradient.
        assert sites == {
            ("forward", "all_gather", False): 5,
            ("forward", "reduce_scatter", False): 4,
            ("backward", "all_gather", False): 5,
            ("backward", "reduce_scatter", False): 4,
        }
    else:
        # Backward: one for each of q, k, v and of gate, up; those of one input are merged.
        assert sites == {
            ("forward", "all_reduce", False): 4,
            ("backward", "all_reduce", False): 4,
            ("backward", "all_reduce", True): 6,
        }
    kinds = {"forward": "activations", "backward": "gradients"}
    specs = {way: rf.QuantFormat(bits).for_kind(kind).spec for way, kind in kinds.items()}
    assert all(s.format == (None if s.merged else specs[s.direction]) for s in report.sites)
    assert report.num_quantized == report.num_sites
    assert "model.layers.1.mlp.down_proj" in {site.module for site in report.sites}
    assert all("modeling_llama.py:" in site.source for site in report.sites)
    assert report.bytes_after < report.bytes_before * (bits + 1) / 32

    delta, num_sites = first["delta"], report.num_sites
    num_forward = sum(site.direction == "forward" for site in report.sites)
    logits, exact_logits = first["logits"]
    limit = num_forward**0.5 * delta
    assert 0 < relative(logits, exact_logits) < limit
    loss, exact_loss = first["loss"]
    tokens = logits.shape[:2].numel()
    assert abs(loss - exact_loss) < 2**0.5 * limit * exact_logits.norm() / tokens**0.5
    worst = max(first["grads"], key=first["grads"].__getitem__)
    assert first["grads"][worst] < num_sites**0.5 * delta, worst


class MLP(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, hidden, bias=False)
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.down(nn.functional.silu(self.gate(x)) * self.up(x))
        return out


def parallel_mlps(world: int) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(MLP(64, 128), MLP(64, 128))
    plan: dict[str, ParallelStyle] = {}
    for i in range(2):
        plan |= {f"{i}.gate": ColwiseParallel(), f"{i}.up": ColwiseParallel()}
        plan[f"{i}.down"] = RowwiseParallel()
    return parallelize_module(model, init_device_mesh("cpu", (world,)), plan)


def train_mlps(rank: Rank, fmt: str | None, inductor: bool = False) -> list[float]:
    model = parallel_mlps(rank.world)
    run: Any = model
    if fmt is not None:
        options = {"activations": fmt, "gradients": fmt, "min_bytes": 0, "strict": True}
        run = torch.compile(
            model, backend="rfquant", options=options, fullgraph=True, dynamic=False
        )
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(48, 64, generator=generator).requires_grad_()
    target = torch.randn(48, 64, generator=generator)
    optimizer = torch.optim.SGD(model.parameters(), lr=2.0)
    losses = []
    with contextlib.nullcontext() if inductor else graphs_run_as_they_are():
        for _ in range(6):
            loss = nn.functional.mse_loss(run(x), target)
            losses.append(loss.item())
            loss.backward()
            assert x.grad is not None
            rank.assert_same(x.grad, "the gradient of the input")
            optimizer.step()
            optimizer.zero_grad()
            x.grad = None
    report = reported()
    assert report.num_quantized == report.num_sites == (4 if fmt else 0)
    return losses


@pytest.fixture(scope="module")
def exact_mlps(ranks: RunRanks) -> list[float]:
    """The losses of the exact model."""
    exact: list[float] = ranks(2, train_mlps, None)[0]
    return exact


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fmt", "inductor", "share"),
    [
        ("8b", False, 0.01),
        ("4b", False, 0.1),
        # The one whole model that is compiled to the end, in a format that compiles fast.
        ("8b:tensor", True, 0.01),
    ],
)
def test_tensor_parallel_mlps_train(
    ranks: RunRanks, exact_mlps: list[float], fmt: str, inductor: bool, share: float
) -> None:
    assert exact_mlps[-1] < 0.9 * exact_mlps[0]
    results = ranks(2, train_mlps, fmt, inductor)
    assert all(losses == results[0] for losses in results)
    # A share of the whole descent, about the error of one collective.
    assert results[0] == pytest.approx(exact_mlps, abs=share * (exact_mlps[0] - exact_mlps[-1]))
    assert results[0] != exact_mlps


def infer(rank: Rank) -> None:
    model = parallel_mlps(rank.world)
    x = torch.randn(48, 64, generator=torch.Generator().manual_seed(3))
    outputs = []
    for context in (contextlib.nullcontext, torch.no_grad, torch.inference_mode):
        torch._dynamo.reset()
        run = torch.compile(
            model,
            backend="rfquant",
            options={"bits": 4, "min_bytes": 0, "strict": True},
            fullgraph=True,
            dynamic=False,
        )
        with context(), graphs_run_as_they_are():
            y = run(x)
        report = reported()
        assert [site.format for site in report.sites] == ["4b:g128:rise"] * 2
        assert [graph.direction for graph in report.graphs] == ["forward"]
        rank.assert_same(y)
        outputs.append(y)
    assert y.is_inference()
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


@pytest.mark.slow
def test_inference_sends_what_training_sends(ranks: RunRanks) -> None:
    ranks(2, infer)


# ---- every collective that a graph may hold ------------------------------------------------------

Pair = tuple[Callable[[Tensor, Any], Tensor], Callable[[Tensor, Any, Any], Tensor]]
"""A functional collective of torch, and ours, both of (x, group) and ours of the format too."""

COLLECTIVES: dict[str, Pair] = {
    "all_reduce": (
        lambda x, group: funcol.all_reduce(x, "sum", group),
        lambda x, fmt, group: rf.all_reduce(x, fmt, group),
    ),
    "reduce_scatter": (
        lambda x, group: funcol.reduce_scatter_tensor_autograd(x, "sum", 0, group),
        lambda x, fmt, group: rf.reduce_scatter(x, fmt, group),
    ),
    "all_gather": (
        lambda x, group: funcol.all_gather_tensor_autograd(x, 0, group),
        lambda x, fmt, group: rf.all_gather(x, fmt, group),
    ),
    "all_to_all": (
        lambda x, group: funcol.all_to_all_single_autograd(x, None, None, group),
        lambda x, fmt, group: rf.all_to_all(x, fmt, group),
    ),
}


def check_functional(rank: Rank, dtype: torch.dtype) -> None:
    group = dist.group.WORLD
    for name, (torch_one, ours) in COLLECTIVES.items():
        x = torch.randn(8, 75, generator=torch.Generator().manual_seed(rank.index)).to(dtype)
        results = []
        for compiled in (True, False):
            leaf = x.clone().requires_grad_()
            if compiled:
                f = torch.compile(
                    lambda x, c=torch_one: c(x * 2, group).square(),
                    backend="rfquant",
                    options={"activations": 4, "gradients": 8, "min_bytes": 0, "strict": True},
                    fullgraph=True,
                )
                with graphs_run_as_they_are():
                    y = f(leaf)
                    y.float().sum().backward()
                report = reported()
                assert_only_bytes_travel(report)
                formats = [(s.direction, s.format) for s in report.sites]
                assert formats == [("forward", "4b:g128:rise"), ("backward", "8b:g128:tread")]
                assert report.sites[0].collective == name
            else:
                # The gradient in its own format: exactly 8 bits, the adjoint by autograd.
                middle = leaf * 2
                out = ours(middle.detach(), 4, group)
                y = out.square()
                back = ours_backward(name)(2 * out, 8, group)
                middle.backward(back)
            assert leaf.grad is not None
            results.append((y.detach(), leaf.grad))
        (y, grad), (y_eager, grad_eager) = results
        assert torch.equal(y, y_eager), name
        assert torch.equal(grad, grad_eager), name


def ours_backward(name: str) -> Callable[[Tensor, Any, Any], Tensor]:
    adjoint = {"reduce_scatter": "all_gather", "all_gather": "reduce_scatter"}.get(name, name)
    return COLLECTIVES[adjoint][1]


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_a_rewritten_collective_is_the_function_bit_for_bit(ranks: RunRanks, world: int) -> None:
    ranks(world, check_functional, torch.float32)
    if world == 2:
        ranks(world, check_functional, torch.bfloat16)


def check_in_place(rank: Rank) -> None:
    x = torch.randn(8, 75, generator=torch.Generator().manual_seed(rank.index))
    world = rank.world
    inputs, outputs = ([2, 6], [3, 6]) if rank.index else ([5, 3], [5, 2])

    def f(x: Tensor) -> tuple[Tensor, ...]:
        reduced = x * 2
        dist.all_reduce(reduced)
        gathered = x.new_empty(world * 8, 75)
        dist.all_gather_into_tensor(gathered, x)
        scattered = x.new_empty(8 // world, 75)
        dist.reduce_scatter_tensor(scattered, x)
        uneven = x.new_empty(sum(outputs), 75)
        dist.all_to_all_single(uneven, x, outputs, inputs)
        return reduced, gathered, scattered, uneven

    def ours(x: Tensor) -> tuple[Tensor, ...]:
        return (
            rf.all_reduce(x * 2, 4),
            rf.all_gather(x, 4),
            rf.reduce_scatter(x, 4),
            rf.all_to_all(x, 4, input_splits=inputs, output_splits=outputs),
        )

    options = {"bits": 4, "min_bytes": 0, "strict": True}
    f_quantized = torch.compile(f, backend="rfquant", options=options, fullgraph=True)
    with graphs_run_as_they_are():
        results = f_quantized(x)
    for y, expected in zip(results, ours(x), strict=True):
        assert torch.equal(y, expected)
    assert_only_bytes_travel(reported())


def test_in_place_collectives_too(ranks: RunRanks) -> None:
    ranks(2, check_in_place)


def check_uneven(rank: Rank) -> list[str | None]:
    """Experts' traffic: every rank has splits of its own, and they change between calls."""

    def f(x: Tensor, sent: list[int], got: list[int]) -> Tensor:
        y = x.new_empty(sum(got), x.shape[1])
        dist.all_to_all_single(y, x, got, sent)
        return y

    options = {"bits": 8, "strict": True}  # some sizes are below min_bytes, some are not
    run = torch.compile(f, backend="rfquant", options=options, fullgraph=True)
    for splits in (
        [[40, 200], [10, 20]],
        [[64, 64], [64, 64]],
        [[64, 64], [64, 70]],  # dynamic from here on, on rank 1 only
        [[64, 64], [0, 0]],
        [[3, 5], [64, 71]],
    ):
        sent, got = splits[rank.index], [row[rank.index] for row in splits]
        x = torch.full((sum(sent), 64), rank.index + 1.0)
        with graphs_run_as_they_are():
            y = run(x, sent, got)
        assert torch.equal(y, rf.all_to_all(x, 8, input_splits=sent, output_splits=got))
    return [site.format for report in rf.reports(clear=True) for site in report.sites]


@pytest.mark.slow
def test_ranks_with_different_splits_decide_alike(ranks: RunRanks) -> None:
    for formats in ranks(2, check_uneven):
        assert set(formats) == {"8b:g128:tread"}


def check_merged(rank: Rank) -> None:
    """Exact in both runs: only the order of additions differs."""
    w = torch.randn(3, 64, 64, generator=torch.Generator().manual_seed(rank.index))

    def f(x: Tensor) -> Tensor:
        total = x.relu()
        for i in range(3):
            total = total + funcol.all_reduce(x @ w[i], "sum", dist.group.WORLD)
        return total

    results = []
    for merge in (False, True):
        torch._dynamo.reset()
        x = torch.randn(48, 64, generator=torch.Generator().manual_seed(3)).requires_grad_()
        options: dict[str, Any] = {"bits": None, "merge": merge}
        run = torch.compile(f, backend="rfquant", options=options, fullgraph=True)
        with graphs_run_as_they_are():
            y = run(x)
            y.square().sum().backward()
        assert x.grad is not None
        rank.assert_same(y)
        results.append((y, x.grad, reported()))
    (y, grad, report), (y_merged, grad_merged, report_merged) = results
    # Backward: all three reduce the same gradient, which AOTAutograd does once.
    assert (report.num_sites, report.num_merged) == (4, 0)
    assert (report_merged.num_sites, report_merged.num_merged) == (2, 2)
    assert report_merged.bytes_before == report.bytes_before
    for got, expected in ((y_merged, y), (grad_merged, grad)):
        scale = expected.abs().max().item()
        torch.testing.assert_close(got, expected, rtol=0, atol=64 * 2**-24 * scale)


def test_merging_changes_only_the_order_of_additions(ranks: RunRanks) -> None:
    ranks(2, check_merged)


def check_dynamic_batch(rank: Rank) -> None:
    """Megatron's two linears; three batch sizes, one graph, and the bits of the eager functions."""
    generator = torch.Generator().manual_seed(rank.index)
    up, down = torch.randn(64, 32, generator=generator), torch.randn(32, 64, generator=generator)

    def block(x: Tensor, reduce: Callable[[Tensor], Tensor]) -> Tensor:
        return reduce(torch.relu(x @ up) @ down).square()

    options = {"bits": 4, "min_bytes": 0, "strict": True}
    f = torch.compile(
        lambda x: block(x, lambda t: funcol.all_reduce(t, "sum", dist.group.WORLD)),
        backend="rfquant",
        options=options,
        fullgraph=True,
    )
    for batch in (12, 7, 40):
        x = torch.randn(batch, 64, generator=torch.Generator().manual_seed(batch))
        grads, outputs = [], []
        for g in (f, lambda x: block(x, lambda t: rf.all_reduce(t, 4))):
            leaf = x.clone().requires_grad_()
            torch._dynamo.mark_dynamic(leaf, 0)
            with graphs_run_as_they_are():
                y = g(leaf)
                y.sum().backward()
            outputs.append(y.detach())
            grads.append(leaf.grad)
        assert torch.equal(*outputs)
        torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-5)  # sums of the matmuls
        rank.assert_same(outputs[0])
    report = reported()
    assert [graph.direction for graph in report.graphs] == ["forward", "backward"]
    assert [site.shape for site in report.sites] == [(report.sites[0].shape[0], 64)] * 2
    assert isinstance(report.sites[0].shape[0], str)
    assert report.num_quantized == 2
    assert "2 sites of symbolic size not counted" in report.summary()


def test_one_graph_serves_a_dynamic_batch(ranks: RunRanks) -> None:
    ranks(2, check_dynamic_batch)


def check_mesh(rank: Rank) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "model"))
    rows, columns = mesh["model"].get_group(), mesh["data"].get_group()

    def f(x: Tensor, row: Callable[[Tensor], Tensor], column: Callable[[Tensor], Tensor]) -> Tensor:
        return column(row(x * 2).relu())

    x = torch.randn(300, generator=torch.Generator().manual_seed(rank.index))
    expected = f(
        x,
        lambda t: rf.all_reduce(t, 4, rows),
        lambda t: rf.all_reduce(t, 4, columns, op="avg"),
    )
    compiled = torch.compile(
        lambda x: f(
            x,
            lambda t: funcol.all_reduce(t, "sum", rows),
            lambda t: funcol.all_reduce(t, "avg", columns),
        ),
        backend="rfquant",
        options={"bits": 4, "min_bytes": 0, "strict": True},
        fullgraph=True,
    )
    with graphs_run_as_they_are():
        y = compiled(x)
    assert torch.equal(y, expected)
    rank.assert_same(y)
    report = reported()
    groups = [(site.group, site.world_size) for site in report.sites]
    assert groups == [(rows.group_name, 2), (columns.group_name, 2)]
    assert report.num_quantized == 2


def test_a_mesh_of_two_dimensions(ranks: RunRanks) -> None:
    ranks(4, check_mesh)


# ---- options (no ranks: simulated, so numbers mean nothing) --------------------------------------


@pytest.fixture
def two_ranks() -> Iterator[None]:
    rf.reports(clear=True)
    with simulated(2), graphs_run_as_they_are():
        yield


def compiled(f: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    run: Callable[..., Any] = torch.compile(f, backend="rfquant", options=options, fullgraph=True)
    return run


def mixed(x: Tensor) -> tuple[Tensor, ...]:
    group = dist.group.WORLD
    return (
        funcol.all_reduce(x, "sum", group),
        funcol.all_reduce(x, "max", group),
        funcol.all_reduce((x > 0).long(), "sum", group),
        funcol.all_gather_tensor(x > 0, 0, group),
        funcol.all_reduce(x.double(), "sum", group),
        funcol.all_reduce(x[:2], "sum", group),
    )


@pytest.mark.usefixtures("two_ranks")
def test_what_stays_exact_has_its_reason() -> None:
    compiled(mixed, bits=4, min_bytes=64)(torch.randn(256))
    report = reported()
    assert [(site.collective, site.dtype, site.format, site.reason) for site in report.sites] == [
        ("all_reduce", "f32", "4b:g128:rise", ""),
        (
            "all_reduce",
            "f32",
            None,
            "the reduction 'max' of rounded values is not the rounded reduction",
        ),
        ("all_reduce", "i64", None, "i64 data is not quantized"),
        ("all_gather", "b8", None, "b8 data is not quantized"),
        ("all_reduce", "f64", None, "f64 data is not quantized"),
        ("all_reduce", "f32", None, "8 bytes < min_bytes=64"),
    ]
    assert [site.eligible for site in report.sites] == [True, *[False] * 4, True]
    assert report.num_quantized == 1
    assert len(report.skipped) == 5
    for site in report.skipped:
        assert site.bytes_after == site.bytes_before


class Block(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return funcol.all_reduce(x * 2, "sum", dist.group.WORLD).relu()


def blocks() -> nn.Module:
    return nn.Sequential(Block(), nn.Sequential(Block(), Block()))


@pytest.mark.usefixtures("two_ranks")
def test_sites_override_the_policy_by_module_path() -> None:
    sites = {"1.0": None, "1.*": "8b:g64"}
    compiled(blocks(), bits=4, min_bytes=2**30, sites=sites)(torch.randn(64))
    assert [(site.module, site.format, site.reason) for site in reported().sites] == [
        ("0", None, "256 bytes < min_bytes=1073741824"),
        ("1.0", None, "sites['1.0'] says exact"),
        ("1.1", "8b:g64:tread", ""),
    ]


@pytest.mark.usefixtures("two_ranks")
def test_strict_raises_what_is_left_with_its_own_type() -> None:
    run = compiled(blocks(), bits=4, strict=True, sites={"1.0": 8, "1.1": None})
    with pytest.raises(UnquantizedSiteError, match=r"1 eligible site would stay exact") as caught:
        run(torch.randn(64))
    ((where, why),) = caught.value.sites
    assert re.fullmatch(r"forward all_reduce at 0 \S*test_backend\.py:\d+", where)
    assert why == "256 bytes < min_bytes=16384"
    with pytest.raises(UnquantizedSiteError):
        run(torch.randn(64))


@pytest.mark.usefixtures("two_ranks")
def test_strict_looks_at_the_backward_graph_too() -> None:
    x = torch.randn(64, requires_grad=True)
    group = dist.group.WORLD
    run = compiled(
        lambda x: funcol.reduce_scatter_tensor_autograd(x, "sum", 0, group).square(),
        bits=4,
        strict=True,
        min_bytes=200,
    )
    with pytest.raises(UnquantizedSiteError, match="backward all_gather"):
        run(x).sum().backward()


@pytest.mark.usefixtures("two_ranks")
@pytest.mark.parametrize(
    ("options", "kind", "pattern", "fields"),
    [
        ({"bitz": 4}, PolicyError, "bitz=4 is not supported: the options are", {"option": "bitz"}),
        ({"bits": 7}, FormatError, "bits=7 is not supported: choose one of", {"field": "bits"}),
        ({"group_size": 64}, PolicyError, "group_size=64 .* give bits as well", {}),
        ({"bits": 4, "strict": 1}, OptionError, "strict=1 .* use True or False", {"value": 1}),
        ({"bits": 4, "merge": None}, OptionError, "merge=None", {"option": "merge"}),
        ({"bits": 4, "inductor": 3}, OptionError, "inductor=3", {"option": "inductor"}),
        ({"strict": True}, PolicyError, "there is no policy; use options", {}),
        ({"policy": rf.Policy(), "bits": 4}, PolicyError, "no other option", {}),
        (
            {"bits": 4, "residual": "free"},
            OptionError,
            r"residual='free' .* rfcompile\.transform\(model, residual=",
            {"option": "residual"},
        ),
    ],
)
def test_options_that_are_not_understood(
    options: dict[str, Any], kind: type[Exception], pattern: str, fields: dict[str, Any]
) -> None:
    run = compiled(Block(), **options)
    with pytest.raises(kind, match=pattern) as caught:
        run(torch.randn(64))
    assert type(caught.value) is kind
    assert {name: getattr(caught.value, name) for name in fields} == fields


@pytest.mark.usefixtures("two_ranks")
def test_a_mode_is_one_of_the_options() -> None:
    with pytest.raises(PolicyError, match="there is no policy; use options"):
        torch.compile(Block(), backend="rfquant", mode="max-autotune")(torch.randn(64))
    compiled(Block(), bits=4, min_bytes=0, mode="max-autotune")(torch.randn(64))
    assert reported().sites[0].format == "4b:g128:rise"


@pytest.mark.usefixtures("two_ranks")
def test_a_policy_as_an_option() -> None:
    policy = rf.Policy(activations="3b:g16", min_bytes=0)
    compiled(Block(), policy=policy)(torch.randn(64))
    report = reported()
    assert [site.format for site in report.sites] == ["3b:g16:rise"]
    assert report.policy == policy.describe()
    with graphs_run_as_they_are():
        compiled(Block(), bits=None)(torch.randn(64))
    assert reported().sites[0].reason == "the policy sends activations exact"


@pytest.mark.slow
def test_without_collectives_it_is_a_compiler_like_any_other() -> None:
    x = torch.randn(5)
    assert torch.equal(compiled(torch.relu, bits=4, strict=True)(x), x.relu())
    assert reported().sites == ()


def test_passes_that_the_user_configured_still_run() -> None:
    seen: dict[str, list[str]] = {}

    def watch(name: str) -> Callable[[fx.Graph], None]:
        def look(graph: fx.Graph) -> None:
            seen[name] = [str(node.target) for node in graph.nodes if node.op == "call_function"]

        return look

    def nothing(self: object, argtypes: list[str], source: str) -> Callable[..., None]:
        return lambda *_: None  # the C++ of the kernels is not compiled

    configured = torch._inductor.config.patch(
        post_grad_custom_pre_pass=watch("before"), fx_graph_cache=False
    )
    options = {"inductor": {"post_grad_custom_post_pass": watch("after")}}
    try:
        with simulated(2), configured, patch.object(AsyncCompile, "cpp_pybinding", nothing):
            compiled(Block(), bits=4, min_bytes=0, **options)(torch.randn(1000))
    finally:
        PyCodeCache.cache_clear()  # its modules have the kernels that do nothing
    for name in ("before", "after"):
        assert seen[name].count("rfcompile.quantize.default") == 1
        assert "rfcompile.requantize.default" in seen[name]
        assert "rfcompile.dequantize.default" in seen[name]
        assert "_c10d_functional.all_reduce.default" not in seen[name]


# ---- statistics ----------------------------------------------------------------------------------


def vocabulary_parallel_loss(rank: Rank) -> tuple[float, float, float, list[str]]:
    """The loss over a sharded vocabulary, the exact one, and how far its gradient is off."""
    tokens, vocabulary = 8192, 64
    group, mine = dist.group.WORLD, vocabulary // rank.world
    first = rank.index * mine
    logits = torch.randn(tokens, vocabulary, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(vocabulary, (tokens,), generator=torch.Generator().manual_seed(1))

    def loss(x: Tensor) -> Tensor:
        top = funcol.all_reduce(x.detach().amax(-1, keepdim=True), "max", group)
        total = funcol.all_reduce((x - top).exp().sum(-1, keepdim=True), "sum", group)
        is_mine = (labels >= first) & (labels < first + mine)
        place = (labels - first).clamp(0, mine - 1)[:, None]
        hit = (x - top).gather(1, place) * is_mine[:, None]
        return (total.log() - funcol.all_reduce(hit, "sum", group)).mean()

    grads = []
    for f in (loss, compiled(loss, bits=2)):
        x = logits[:, first : first + mine].clone().requires_grad_()
        value = f(x)
        value.backward()
        assert x.grad is not None
        grads.append(x.grad)
    exact = nn.functional.cross_entropy(logits, labels).item()
    reasons = [site.reason for site in reported().sites]
    return value.item(), exact, relative(grads[1], grads[0]), reasons


def run_exact_loss(rank: Rank) -> tuple[float, float, float, list[str]]:
    with graphs_run_as_they_are():
        return vocabulary_parallel_loss(rank)


def test_a_vocabulary_parallel_loss_at_2_bits_is_exact(ranks: RunRanks) -> None:
    """By the default min_bytes all of it would be quantized; it sums 8,192 floats near 5."""
    for loss, exact, error, reasons in ranks(2, run_exact_loss):
        assert abs(loss - exact) <= 8192 * torch.finfo(torch.float32).eps
        assert error <= 32 * torch.finfo(torch.float32).eps
        assert len(reasons) == 5
        assert [reason.startswith("a statistic") for reason in reasons] == [False, *[True] * 4]
