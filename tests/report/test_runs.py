"""Reports count runs; what Dynamo leaves uncompiled is said, and with strict=True an error.

Ranks are simulated, and graphs run as they are where only their runs matter.
"""

from __future__ import annotations

import functools
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch import Tensor, fx, nn
from torch._functorch.aot_autograd import make_boxed_func

import rfcompile as rf
import rfcompile.inductor.backend
from rfcompile.errors import (
    FormatError,
    OptionError,
    RecompileLimitError,
    RFCompileWarning,
    UnquantizedSiteError,
)
from rfcompile.graph.places import module_of
from rfcompile.wire.process_groups import simulated

if TYPE_CHECKING:
    from tests.ranks import Rank, RunRanks

WIDTH, LAYERS = 16, 3
OPTIONS = {"bits": 4, "min_bytes": 0}


def as_it_is(gm: fx.GraphModule, example_inputs: Any, **kwargs: Any) -> Any:
    return make_boxed_func(gm.forward)


@pytest.fixture(autouse=True)
def _two_ranks() -> Iterator[None]:
    rf.reports(clear=True)
    with simulated(2), patch.object(rfcompile.inductor.backend, "compile_fx_inner", as_it_is):
        yield
    rf.reports(clear=True)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + funcol.all_reduce(self.up(x), "sum", dist.group.WORLD)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(LAYERS))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def by_block(**options: Any) -> Model:
    model = Model().requires_grad_(False)
    for layer in model.layers:
        layer.compile(backend="rfquant", options=OPTIONS | options, fullgraph=True)
    return model


def test_a_graph_that_blocks_share_counts_for_each_of_them() -> None:
    model, x = by_block(), torch.randn(4, WIDTH)
    model(x)
    model(x)
    (report,) = rf.reports()
    (site,) = report.sites
    assert site.runs == LAYERS
    assert report.bytes_before == LAYERS * 4 * WIDTH * 4
    assert any(note.endswith(f"ran {2 * LAYERS} times, for {LAYERS} modules")
               for note in report.notes)  # fmt: skip
    assert report.text().splitlines()[2].split()[-1] == "runs"


def test_a_step_counts_what_runs_in_it_and_nothing_else() -> None:
    model, x = by_block(), torch.randn(4, WIDTH)
    with rf.measure_step() as first:
        model(x)
    rf.reports(clear=True)  # graphs go on running
    with rf.measure_step() as step:
        model(x)
        model(x)
    assert [site.runs for site in first.report().sites] == [LAYERS]
    (site,) = step.report().sites
    assert site.runs == 2 * LAYERS
    assert step.report().bytes_after == 2 * LAYERS * (site.bytes_after or 0) > 0


def test_graphs_of_other_shapes_are_left_out_of_a_step_and_named() -> None:
    model = by_block()
    model(torch.randn(4, WIDTH))
    with rf.measure_step() as step, torch._dynamo.config.patch(automatic_dynamic_shapes=False):
        model(torch.randn(8, WIDTH))
    assert [site.shape for site in step.report().sites] == [(8, WIDTH)]
    assert any("not run in this step" in note for note in step.report().notes)


def test_a_pattern_that_a_shared_graph_cannot_follow_is_said() -> None:
    x = torch.randn(4, WIDTH)
    with pytest.warns(RFCompileWarning, match="cannot tell apart the modules that share one graph"):
        by_block(sites={"layers.0.*": None})(x)
    torch._dynamo.reset()
    strict = by_block(sites={"layers.0.*": None}, strict=True)
    for _ in range(2):
        with pytest.raises(OptionError, match=r"sites\['layers\.0\.\*'\]"):
            strict(x)


def test_a_layer_with_options_of_its_own_stays_exact() -> None:
    model = by_block()
    model.layers[0].compile(backend="rfquant", options={"bits": None}, fullgraph=True)
    with rf.measure_step() as step:
        model(torch.randn(4, WIDTH))
    assert sorted((site.format or "", site.runs) for site in step.report().sites) == [
        ("", 1), ("4b:g128:rise", LAYERS - 1)
    ]  # fmt: skip


def test_a_pattern_that_a_step_does_not_use() -> None:
    x = torch.randn(4, WIDTH)
    with pytest.warns(RFCompileWarning, match="haed"), rf.measure_step():
        by_block(sites={"haed": 8})(x)
    torch._dynamo.reset()
    with pytest.raises(OptionError, match="haed"), rf.measure_step():
        by_block(sites={"haed": 8}, strict=True)(x)


# ---- what Dynamo leaves uncompiled -------------------------------------------------------------


def total(x: Tensor) -> Tensor:
    return funcol.all_reduce(x.sum(0), "sum", dist.group.WORLD)


def static(**options: Any) -> Callable[..., Tensor]:
    return torch.compile(total, backend="rfquant", options=OPTIONS | options, dynamic=False)


@torch._dynamo.config.patch(recompile_limit=1)  # type: ignore[untyped-decorator]
def test_the_recompile_limit_is_an_error_with_strict() -> None:
    run = static(strict=True)
    run(torch.randn(4, WIDTH))
    for _ in range(2):
        with pytest.raises(RecompileLimitError, match=r"recompile_limit.* dynamic=True"):
            run(torch.randn(5, WIDTH))
    assert issubclass(RecompileLimitError, UnquantizedSiteError)


@torch._dynamo.config.patch(recompile_limit=1)  # type: ignore[untyped-decorator]
def test_the_recompile_limit_is_warned_of_and_in_the_report() -> None:
    run = static()
    run(torch.randn(4, WIDTH))
    with pytest.warns(RFCompileWarning, match="run exact"):
        run(torch.randn(5, WIDTH))
    assert any("recompile_limit" in note for note in rf.reports()[-1].notes)


BREAKING: dict[str, Callable[[Tensor], object]] = {
    "async": lambda y: dist.all_reduce(y, async_op=True).wait(),
    "broadcast": lambda y: dist.broadcast(y, 0),
    "reduce": lambda y: dist.reduce(y, 0),
    "gather": lambda y: dist.gather(y, [torch.empty_like(y) for _ in range(2)], 0),
    "all_to_all": lambda y: dist.all_to_all([y.clone(), y.clone()], [y, y]),
    "reduce_scatter": lambda y: dist.reduce_scatter(torch.empty_like(y), [y, y]),
}


@pytest.mark.parametrize("kind", BREAKING)
def test_a_graph_break_is_in_the_report_and_at_a_collective_an_error_with_strict(kind: str) -> None:
    def broken(x: Tensor) -> Tensor:
        y = x * 2
        BREAKING[kind](y)
        return y + 1

    x = torch.randn(4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Dynamo's own, on what it cannot trace
        torch.compile(broken, backend="rfquant", options=OPTIONS)(x)
        notes = [note for report in rf.reports() for note in report.notes]
        assert any("breaks at" in note and "test_runs.py" in note for note in notes)
        for _ in range(2):  # as many breaks as before a reset are new ones all the same
            torch._dynamo.reset()
            with pytest.raises(UnquantizedSiteError, match="breaks the graph"):
                torch.compile(broken, backend="rfquant", options=OPTIONS | {"strict": True})(x)


def test_a_break_elsewhere_is_none_at_a_collective() -> None:
    def broken(x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return x + 1

    torch.compile(broken, backend="rfquant", options=OPTIONS | {"strict": True})(torch.randn(4))
    assert any("breaks at" in note for report in rf.reports() for note in report.notes)


def test_a_stance_under_which_recompiles_are_eager_is_noted() -> None:
    run = static()
    run(torch.randn(4, WIDTH))
    with torch.compiler.set_stance("eager_on_recompile"), rf.measure_step() as step:
        run(torch.randn(4, WIDTH))
        run(torch.randn(5, WIDTH))
    assert any("set_stance('eager_on_recompile')" in note for note in step.report().notes)


def test_errors_that_torch_suppresses() -> None:
    with torch._dynamo.config.patch(suppress_errors=True):
        with pytest.raises(OptionError, match="suppress_errors"):
            static(strict=True)(torch.randn(4, WIDTH))
        torch._dynamo.reset()
        with pytest.warns(RFCompileWarning, match="suppress_errors"):
            static()(torch.randn(4, WIDTH))


def test_each_call_raises_an_exception_of_its_own() -> None:
    run = static(bits=7)
    depths, errors = [], []
    for _ in range(3):
        with pytest.raises(FormatError) as caught:
            run(torch.randn(4, WIDTH))
        depths.append(len(caught.traceback))
        errors.append(caught.value)
    assert len(set(depths[1:])) == 1  # the first call compiles, too
    assert len({id(error) for error in errors}) == 3
    assert errors[2].field == "bits"


# ---- paths of modules --------------------------------------------------------------------------


def as_closure(forward: Any) -> Any:
    return lambda x: forward(x)


def as_default(forward: Any) -> Any:
    def call(x: Tensor, *, inner: Any = forward) -> Any:
        return inner(x)

    return call


@pytest.mark.parametrize(
    "wrap",
    [as_closure, as_default, functools.partial, lambda f: as_closure(as_closure(f)),
     lambda f: torch.compile(f, backend="eager")],
    ids=["closure", "default", "partial", "twice", "compiled"],
)  # fmt: skip
def test_a_replaced_forward_does_not_show_in_paths(wrap: Callable[[Any], Any]) -> None:
    found: list[str] = []

    def look(gm: fx.GraphModule, example_inputs: Any) -> Any:
        found.extend(module_of(n) for n in gm.graph.nodes if n.target is nn.functional.linear)
        return gm.forward

    model = Model()
    for layer in model.layers:
        layer.forward = wrap(layer.forward)  # type: ignore[method-assign]
    torch.compile(model, backend=look)(torch.randn(4, WIDTH))
    assert found == [f"layers.{i}.up" for i in range(LAYERS)]


# ---- real ranks --------------------------------------------------------------------------------


def sent(rank: Rank) -> tuple[int, int]:
    """Bytes of a step by the report, and by the sizes of what the collectives were given."""
    model, x = by_block(), torch.randn(64, WIDTH)
    with patch.object(rfcompile.inductor.backend, "compile_fx_inner", as_it_is):
        model(x)
        with rf.measure_step() as step, torch.profiler.profile(record_shapes=True) as profile:
            model(x)
    moved: Counter[str] = Counter()
    for event in profile.events():
        if event.name.startswith("_c10d_functional::all_"):
            moved[event.name] += torch.Size(event.input_shapes[0]).numel()
    # Of two ranks each sends half of an exchange, and all of what it gathers.
    halves = moved["_c10d_functional::all_to_all_single"] // 2
    return step.report().bytes_after, halves + moved["_c10d_functional::all_gather_into_tensor"]


@pytest.mark.slow
def test_bytes_of_a_step_are_those_that_are_sent(ranks: RunRanks) -> None:
    for reported, given in ranks(2, sent):
        assert 0 < given <= 1.02 * reported
        assert reported <= 1.02 * given
