"""Quantized collectives on real ranks: equal everywhere, within the stated bounds, differentiable.

The reference is float64 arithmetic on the inputs of all ranks; the tolerance is the bound of the
collective's docstring, element by element.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import rfcompile as rf
from rfcompile.codec.formats import QuantFormat
from rfcompile.errors import NonFiniteError

if TYPE_CHECKING:
    from tests.ranks import Rank, RunRanks

NUMELS = (0, 1, 5, 127, 128, 129, 100003)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SPECS = (
    *(f"{bits}b" for bits in (2, 3, 4, 5, 6, 8)),
    "4b:tensor",
    "8b:g16",
    "3b:g1024:tread",
    "4b:stoch",
    "8b:stoch:s3",
    "4b:raise",
    "4b:saturate",
)
ROTATED = ("4b:h8", "4b:h128", "3b:g64:h32:stoch", "8b:tensor:h16")
WORLDS = (2, 4)
SRC = 1  # of every broadcast


# ---- the collectives, exactly and quantized ------------------------------------------------------


def even_splits(world: int) -> list[list[int]]:
    return [[1] * world for _ in range(world)]


def uneven_splits(world: int) -> list[list[int]]:
    """Rows from rank r (outer) to rank s: 0, 1, 2 or 3."""
    return [[(3 * r + 2 * s + 1) % 4 for s in range(world)] for r in range(world)]


@dataclass(frozen=True)
class Case:
    """A collective with its arguments; ``splits`` for all_to_all only."""

    name: str
    op: str = "sum"
    segments: int | None = None
    uneven: bool = False

    def shape(self, n: int, rank: int, world: int) -> tuple[int, ...]:
        """Of the input on one rank, so that a rank has ``n`` elements for each destination."""
        if self.name == "all_to_all":
            return (sum(self.splits(world)[rank]), n)
        return (world * n,) if self.name == "reduce_scatter" else (n,)

    def splits(self, world: int) -> list[list[int]]:
        return uneven_splits(world) if self.uneven else even_splits(world)

    def quantized(self, x: Tensor, fmt: Any, rank: Rank, group: Any = None) -> Tensor:
        if self.name == "all_reduce":
            return rf.all_reduce(x, fmt, group, op=self.op, segments=self.segments)
        if self.name == "reduce_scatter":
            return rf.reduce_scatter(x, fmt, group, op=self.op)
        if self.name == "all_gather":
            return rf.all_gather(x, fmt, group)
        if self.name == "broadcast":
            return rf.broadcast(x, fmt, group, src=SRC)
        splits = self.splits(rank.world)
        return rf.all_to_all(
            x,
            fmt,
            group,
            input_splits=splits[rank.index] if self.uneven else None,
            output_splits=[row[rank.index] for row in splits] if self.uneven else None,
        )

    def exact(self, inputs: Sequence[Tensor], rank: int) -> Tensor:
        """The result of one rank from the inputs of all."""
        world = len(inputs)
        scale = 1 / world if self.op == "avg" else 1.0
        if self.name == "all_reduce":
            return torch.stack(list(inputs)).sum(0) * scale
        if self.name == "reduce_scatter":
            return torch.stack(list(inputs)).sum(0).chunk(world)[rank] * scale
        if self.name == "all_gather":
            return torch.cat(list(inputs))
        if self.name == "broadcast":
            return inputs[SRC]
        splits = self.splits(world)
        return torch.cat([x.split(splits[r])[rank] for r, x in enumerate(inputs)])

    def peaks(self, inputs: Sequence[Tensor], fmt: QuantFormat) -> list[Tensor]:
        """Each element's replaced by the largest magnitude of the group it is coded in."""
        world = len(inputs)
        result = []
        for r, x in enumerate(inputs):
            if self.name == "all_to_all":
                rows = list(x.split(self.splits(world)[r]))
            elif self.name == "reduce_scatter":
                rows = list(x.chunk(world))
            elif self.name == "all_reduce":
                unit = world * (self.segments or 1) * fmt.group_elements(8)
                row = -(-x.numel() // unit) * unit // (world * (self.segments or 1))
                rows = list(x.split(row)) if row else [x]
            else:
                rows = [x]
            result.append(torch.cat([group_peaks(row, fmt) for row in rows]))
        return result

    def bound(self, inputs: Sequence[Tensor], rank: int, fmt: QuantFormat) -> Tensor:
        """Largest error by the docstrings, before the result is rounded to its dtype.

        One rounding of each rank's group, ``e * sum a_r`` (on an average, its mean); all_reduce
        rounds the sum again, whose peak is at most that of the exact sum plus its error.
        """
        e = fmt.max_error()
        peaks = self.peaks(inputs, fmt)
        routed = self.exact(peaks, rank)
        bound = e * routed
        if self.name == "all_reduce":
            total = self.exact(inputs, rank).abs() + bound
            bound = bound + e * self.peaks([total] * len(inputs), fmt)[0]
        return bound + (len(inputs) + 2) * 2.0**-24 * routed  # float32 sums


def group_peaks(x: Tensor, fmt: QuantFormat) -> Tensor:
    """``x`` with each element replaced by the largest magnitude of its group (of its row)."""
    flat = x.reshape(-1).abs()
    group = fmt.group_size or max(flat.numel(), 1)
    groups = torch.nn.functional.pad(flat, (0, -flat.numel() % group)).reshape(-1, group)
    peaks = groups.amax(1, keepdim=True) if groups.numel() else groups.new_zeros(len(groups), 1)
    return peaks.expand_as(groups).reshape(-1)[: flat.numel()].reshape(x.shape)


ALL_REDUCE = Case("all_reduce")
CASES = (
    ALL_REDUCE,
    Case("all_reduce", op="avg", segments=4),
    Case("reduce_scatter"),
    Case("reduce_scatter", op="avg"),
    Case("all_gather"),
    Case("all_to_all"),
    Case("all_to_all", uneven=True),
    Case("broadcast"),
)
REPLICATED = ("all_reduce", "all_gather", "broadcast")


def case_id(case: object) -> str:
    if not isinstance(case, Case):
        return str(case)
    extra = [case.op if case.op != "sum" else "", "uneven" if case.uneven else ""]
    return "-".join([case.name, *filter(None, extra)])


def make(
    shape: Sequence[int],
    rank: int,
    dtype: torch.dtype = torch.float32,
    *,
    contiguous: bool = True,
    seed: int = 0,
) -> Tensor:
    """Gaussian, another on each rank, with a standard deviation of ``1 + rank``."""
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    x = (torch.randn(*shape, 2, generator=generator) * (1 + rank)).to(dtype)
    return x.select(-1, 0).contiguous() if contiguous else x.select(-1, 1)


def inputs_of_all(case: Case, n: int, world: int, **kwargs: Any) -> list[Tensor]:
    """What :func:`make` gives on every rank, in float64."""
    return [make(case.shape(n, r, world), r, **kwargs).double() for r in range(world)]


def assert_within(got: Tensor, exact: Tensor, bound: Tensor, what: object) -> None:
    """``bound`` plus the rounding of ``got`` to its dtype."""
    unit = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[got.dtype]
    error = (got.double() - exact).abs()
    limit = bound + unit * (exact.abs() + bound) + 2.0**-25
    assert got.shape == exact.shape, what
    assert (error <= limit).all(), f"{what}: {(error / limit).max()} of the bound"


# ---- shapes, dtypes, formats ---------------------------------------------------------------------


def check_shapes(rank: Rank, case: Case) -> None:
    fmt = QuantFormat(4)
    for n in NUMELS:
        for dtype in DTYPES:
            for contiguous in (True, False):
                what = (case, n, dtype, contiguous)
                shape = case.shape(n, rank.index, rank.world)
                x = make(shape, rank.index, dtype, contiguous=contiguous)
                assert x.is_contiguous() == (contiguous or x.numel() < 2)
                before = x.clone()
                y = case.quantized(x, fmt, rank)
                assert torch.equal(x, before), what
                assert y.dtype == dtype
                assert y.is_contiguous()
                if case.name in REPLICATED:
                    rank.assert_same(y, what)
                inputs = inputs_of_all(case, n, rank.world, dtype=dtype, contiguous=contiguous)
                exact = case.exact(inputs, rank.index)
                assert_within(y, exact, case.bound(inputs, rank.index, fmt), what)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_every_size_dtype_and_stride(ranks: RunRanks, world: int, case: Case) -> None:
    ranks(world, check_shapes, case)


def check_formats(rank: Rank) -> None:
    for case in CASES:
        for spec in SPECS:
            fmt = QuantFormat.parse(spec)
            x = make(case.shape(1000, rank.index, rank.world), rank.index)
            y = case.quantized(x, fmt, rank)
            if case.name in REPLICATED:
                rank.assert_same(y, (case, spec))
            inputs = inputs_of_all(case, 1000, rank.world)
            bound = case.bound(inputs, rank.index, fmt)
            assert_within(y, case.exact(inputs, rank.index), bound, (case, spec))


@pytest.mark.parametrize("world", WORLDS)
def test_every_format(ranks: RunRanks, world: int) -> None:
    ranks(world, check_formats)


def check_rotated(rank: Rank) -> None:
    for case in CASES:
        for spec in ROTATED:
            # Rotated, an outlier of its group is coded with a step like everything else's, so the
            # group's L2 error falls; the elementwise bound is too loose to say anything.
            inputs = inputs_of_all(case, 4096, rank.world)
            for r, other in enumerate(inputs):
                place = torch.randperm(other.numel(), generator=seeded(r))
                other.view(-1)[place[: other.numel() // 128]] *= 30
            x = inputs[rank.index].float()
            plain = replace(QuantFormat.parse(spec), rotate=None)
            y, z = (case.quantized(x, fmt, rank) for fmt in (spec, plain))
            if case.name in REPLICATED:
                rank.assert_same(y, (case, spec))
            exact = case.exact(inputs, rank.index)
            error, without = ((v - exact).norm() / exact.norm() for v in (y, z))
            assert error < without or exact.numel() == 0, (case, spec, error, without)


@pytest.mark.parametrize("world", WORLDS)
def test_rotation_helps_against_outliers(ranks: RunRanks, world: int) -> None:
    ranks(world, check_rotated)


def check_segments(rank: Rank) -> None:
    for n in (1, 129, 5000):
        for spec in ("4b", "3b:g16", "8b:h32"):
            x = make((n,), rank.index)
            one, four = (rf.all_reduce(x, spec, segments=segments) for segments in (1, 4))
            # The same groups, so even the same bits.
            assert torch.equal(one, four)
            rank.assert_same(four)
    big = make((3 * 2**20,), rank.index)
    assert torch.equal(rf.all_reduce(big, 8), rf.all_reduce(big, 8, segments=1))


@pytest.mark.parametrize("world", WORLDS)
def test_segments_only_cut_the_message(ranks: RunRanks, world: int) -> None:
    ranks(world, check_segments)


def relative_errors(rank: Rank) -> dict[str, float]:
    errors = {}
    for spec in ("8b", "4b", "8b:h128", "4b:h128", "4b:tensor:h32"):
        inputs = [torch.randn(2**18, generator=seeded(r)) for r in range(rank.world)]
        y = rf.all_reduce(inputs[rank.index], spec)
        rank.assert_same(y)
        exact = sum(x.double() for x in inputs)
        assert isinstance(exact, Tensor)
        errors[spec] = ((y - exact).norm() / exact.norm()).item()
    return errors


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("world", WORLDS)
def test_relative_error_of_one_all_reduce_of_gaussian_data(ranks: RunRanks, world: int) -> None:
    first, *others = ranks(world, relative_errors)
    assert all(other == first for other in others)
    assert first["8b"] <= 0.012
    assert first["8b:h128"] <= 0.012
    assert first["4b"] <= 0.16
    assert first["4b:h128"] <= 0.16


# ---- values that are not finite ------------------------------------------------------------------


def check_nonfinite(rank: Rank) -> None:
    n, bad = 1000, 1
    for dtype in DTYPES:
        for case in CASES:
            for spec in ("4b", "8b:g64", "4b:h32", "2b:tensor", "4b:saturate"):
                what = (case, dtype, spec)
                inputs = [make(case.shape(n, r, rank.world), r, dtype) for r in range(rank.world)]
                flat = inputs[bad].view(-1)
                flat[flat.numel() // 3] = float("nan")
                flat[-1] = float("-inf")
                y = case.quantized(inputs[rank.index], spec, rank)
                if case.name in REPLICATED:
                    rank.assert_same(y, what)
                fmt = QuantFormat.parse(spec)
                marks = [
                    (x.isnan() if fmt.nonfinite == "saturate" else ~x.isfinite()).double()
                    for x in inputs
                ]
                hit = case.exact(case.peaks(marks, fmt), rank.index)
                if case.name == "all_reduce":  # the sum is coded again
                    hit = case.peaks([hit] * rank.world, fmt)[0]
                assert torch.equal(y.isnan(), hit > 0), what
                assert not y.isinf().any(), what


@pytest.mark.parametrize("world", WORLDS)
def test_nan_and_inf_of_one_rank_arrive_everywhere_in_their_groups(
    ranks: RunRanks, world: int
) -> None:
    ranks(world, check_nonfinite)


def overflow(rank: Rank) -> tuple[Tensor, Tensor]:
    x = torch.ones(300, dtype=torch.float16)
    x[5], x[200] = 40000, -40000
    scattered = rf.reduce_scatter(x.repeat(rank.world), 8)
    for y in (rf.all_reduce(x, 8), rf.all_reduce(x, "8b:h8"), scattered):
        rank.assert_same(y)
    return rf.all_reduce(x, 8), scattered


def test_a_float16_sum_out_of_range_is_inf_as_in_an_exact_all_reduce(ranks: RunRanks) -> None:
    for y in ranks(2, overflow)[0]:
        assert y[5] == float("inf")
        assert y[200] == -float("inf")
        assert y.isinf().sum() == 2
        assert not y.isnan().any()


def raise_on(rank: Rank, bad: Sequence[int]) -> list[NonFiniteError]:
    caught = []
    for case in CASES:
        x = make(case.shape(100, rank.index, rank.world), rank.index)
        if rank.index in bad:
            x.view(-1)[7] = float("nan")
            x.view(-1)[8] = float("inf")
        with pytest.raises(NonFiniteError) as error:
            case.quantized(x, "4b:raise", rank)
        caught.append(error.value)
        y = rf.all_reduce(make((100,), rank.index), "4b:raise")  # the group still works
        rank.assert_same(y)
    return caught


@pytest.mark.parametrize(("world", "bad"), [(2, (1,)), (4, (0, 3))])
def test_nonfinite_raise_raises_everywhere_and_names_the_ranks(
    ranks: RunRanks, world: int, bad: Sequence[int]
) -> None:
    names = {2: "rank 1", 4: "ranks 0, 3"}[world]
    for errors in ranks(world, raise_on, bad):
        assert [(error.site, error.ranks) for error in errors] == [
            (case.name, bad) for case in CASES
        ]
        for case, error in zip(CASES, errors, strict=True):
            assert f"NaN or Inf in the input of {case.name} on {names}." in str(error)


# ---- as operators --------------------------------------------------------------------------------


def check_operators(rank: Rank) -> None:
    """Schema, gradient and fake kernel (strides too) agree with what runs."""
    world = rank.world
    for n in (1, 75, 128):
        x = make((world * n, 1), rank.index)
        tail: tuple[Any, ...] = (world, "0")
        rows = [n] * world
        uneven = uneven_splits(world)
        inputs = uneven[rank.index]
        outputs = [row[rank.index] for row in uneven]
        y = make((sum(inputs), n), rank.index)
        for op, args in (
            ("all_reduce", (x, "4b", "sum", *tail, 0)),
            ("all_reduce", (x, "8b:g16", "avg", *tail, 4)),
            ("reduce_scatter", (x, "4b", "sum", *tail)),
            ("all_gather", (make((n,), rank.index), "4b", *tail)),
            ("all_gather", (x, "8b", *tail)),
            ("all_to_all", (x, "4b", rows, rows, "0")),
            ("all_to_all", (y, "4b", outputs, inputs, "0")),
            ("broadcast", (x, "4b:tensor", 1, *tail)),
        ):
            torch.library.opcheck(
                getattr(torch.ops.rfcompile, op).default,
                args,
                test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
            )


def test_the_operators_are_what_their_fake_kernels_promise(ranks: RunRanks) -> None:
    ranks(2, check_operators)


# ---- groups --------------------------------------------------------------------------------------


def check_alone(rank: Rank, group: Any = None) -> None:
    alone = replace(rank, index=0, world=1)
    for case in (Case("all_reduce", "avg"), Case("all_reduce"), *CASES[2:-1]):
        x = make(case.shape(129, 0, 1), 0, torch.float16).requires_grad_()
        y = case.quantized(x, 2, alone, group)
        assert torch.equal(y, x)
        assert y.data_ptr() != x.data_ptr()
        y.sum().backward()
        assert x.grad is not None
        assert (x.grad == 1).all()
    x = make((129,), 0)
    assert torch.equal(rf.broadcast(x, 2, group), x)


def check_groups_of_one(rank: Rank) -> None:
    groups = [dist.new_group([r]) for r in range(rank.world)]
    check_alone(rank, groups[rank.index])


def test_one_rank_is_exact(ranks: RunRanks) -> None:
    ranks(1, check_alone)
    ranks(2, check_groups_of_one)


def check_groups(rank: Rank) -> None:
    members = ([0, 1], [2, 3]), ([0, 2], [1, 3])
    for halves in members:
        groups = [dist.new_group(half) for half in halves]
        mine = 0 if rank.index in halves[0] else 1
        half, group = halves[mine], groups[mine]
        inputs = [make((1000,), r).double() for r in half]
        for handle in (group, group.group_name):
            y = rf.all_reduce(make((1000,), rank.index), 4, handle)
            rank.assert_same(y, half, group)
            bound = ALL_REDUCE.bound(inputs, 0, QuantFormat(4))
            assert_within(y, ALL_REDUCE.exact(inputs, 0), bound, half)
        y = rf.broadcast(make((1000,), rank.index), 4, group, src=SRC)  # src counts in the group
        fmt = QuantFormat(4)
        broadcast = Case("broadcast")
        assert_within(y, inputs[SRC], broadcast.bound(inputs, 0, fmt), half)


def test_several_groups(ranks: RunRanks) -> None:
    ranks(4, check_groups)


# ---- gradients -----------------------------------------------------------------------------------

ADJOINTS: dict[str, Callable[[Case], Case]] = {
    "all_reduce": lambda case: case,
    "reduce_scatter": lambda case: Case("all_gather"),
    "all_gather": lambda case: Case("reduce_scatter"),
    "all_to_all": lambda case: case,  # with the splits turned around
    "broadcast": lambda case: ALL_REDUCE,
}


def check_gradients(rank: Rank) -> None:
    n, fmt = 300, QuantFormat(4)
    for case in CASES:
        x = make(case.shape(n, rank.index, rank.world), rank.index).requires_grad_()
        y = case.quantized(x, fmt, rank)
        inputs = inputs_of_all(case, n, rank.world)
        outputs = [case.exact(inputs, r) for r in range(rank.world)]
        seeds = [make(out.shape, r, seed=1) for r, out in enumerate(outputs)]
        y.backward(seeds[rank.index])
        assert x.grad is not None
        grad = x.grad

        # The exact gradient: of all ranks' results by this rank's input.
        leaves = [x.requires_grad_() for x in inputs]
        loss = sum((case.exact(leaves, r) * seed).sum() for r, seed in enumerate(seeds))
        assert isinstance(loss, Tensor)
        loss.backward()
        exact = leaves[rank.index].grad
        if exact is None:
            exact = torch.zeros_like(leaves[rank.index])

        # The gradient went through the adjoint collective, on the grid of gradients.
        expected, bound = adjoint(case, seeds, fmt.for_kind("gradients"), rank)
        assert torch.equal(grad, expected), case
        assert_within(grad, exact, bound, case)
        if rank.index == SRC or case.name != "broadcast":
            assert not torch.equal(grad.double(), exact), f"{case}: backward was not quantized"


def adjoint(case: Case, seeds: list[Tensor], fmt: QuantFormat, rank: Rank) -> tuple[Tensor, Tensor]:
    """The gradient's bits, and the bound of its error."""
    seed, wide = seeds[rank.index], [s.double() for s in seeds]
    back = ADJOINTS[case.name](case)
    if case.name == "all_to_all":
        splits = case.splits(rank.world)
        value = rf.all_to_all(
            seed,
            fmt,
            input_splits=[row[rank.index] for row in splits],
            output_splits=splits[rank.index],
        )
        pieces = [
            group_peaks(w.split([row[r] for row in splits])[rank.index], fmt)
            for r, w in enumerate(wide)
        ]
        return value, fmt.max_error() * torch.cat(pieces)
    value = back.quantized(seed, fmt, rank)
    bound = back.bound(wide, rank.index, fmt)
    if case.name == "reduce_scatter" and case.op == "avg":
        return value / rank.world, bound / rank.world
    if case.name == "broadcast" and rank.index != SRC:
        return torch.zeros_like(value), torch.zeros_like(bound)
    return value, bound


@pytest.mark.parametrize("world", WORLDS)
def test_gradients_go_through_the_adjoint_collective_quantized(ranks: RunRanks, world: int) -> None:
    ranks(world, check_gradients)


# ---- compiled ------------------------------------------------------------------------------------


DECOMPOSED = (
    (ALL_REDUCE, "4b"),
    (Case("reduce_scatter", op="avg"), "8b:raise"),
    (Case("all_gather"), "4b:stoch"),
    (Case("all_to_all", uneven=True), "8b"),
    (Case("broadcast"), "3b:g64"),
)


def assert_same_when_compiled(
    rank: Rank, f: Callable[[Tensor], Tensor], shape: Sequence[int], backend: Any
) -> None:
    results = []
    for g in (f, torch.compile(f, fullgraph=True, backend=backend)):
        x = make(shape, rank.index).requires_grad_()
        y = g(x)
        y.backward(make(y.shape, rank.index, seed=1))
        results.append((y, x.grad))
    (y, grad), (y_compiled, grad_compiled) = results
    assert grad is not None
    assert grad_compiled is not None
    assert torch.equal(y, y_compiled)
    assert torch.equal(grad, grad_compiled)


def check_decomposed(rank: Rank, case: Case, spec: str) -> list[str]:
    """As Inductor gets it, operator by operator; returns the graphs."""
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.aot_autograd import make_boxed_func
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from torch._inductor.decomposition import select_decomp_table

    graphs = []

    def as_it_is(gm: Any, example_inputs: Any) -> Any:
        graphs.append(gm.code)
        targets = [str(node.target) for node in gm.graph.nodes]
        assert not any(name.startswith(f"rfcompile.{case.name}.") for name in targets)
        coding = ("rfcompile.quantize.", "rfcompile.dequantize.")
        assert any(name.startswith(coding) for name in targets)
        return make_boxed_func(gm.forward)

    def f(x: Tensor) -> Tensor:
        return case.quantized(x * 2, spec, rank).relu()

    backend = aot_autograd(
        fw_compiler=as_it_is,
        decompositions=select_decomp_table(),
        partition_fn=min_cut_rematerialization_partition,  # torch's other one drops collectives
    )
    assert_same_when_compiled(rank, f, case.shape(1000, rank.index, rank.world), backend)
    return graphs


@pytest.mark.parametrize(("case", "spec"), DECOMPOSED, ids=case_id)
def test_decomposed_equals_eager_bit_for_bit(ranks: RunRanks, case: Case, spec: str) -> None:
    one, other = ranks(2, check_decomposed, case, spec)
    # A rank may be given the other's graphs by a cache that looks at what both were made from.
    assert len(one) == 2
    assert one == other or case.uneven


def check_compiled(rank: Rank) -> None:
    """These and their gradients' collectives have every message, and an operator that raises.

    One scale a tensor compiles in a third of the time; test_lowering.py has the other formats.
    """
    cases = (Case("reduce_scatter", op="avg"), "8b:tensor:raise"), (Case("broadcast"), "3b:tensor")

    def f(x: Tensor) -> Tensor:
        return torch.cat([case.quantized(x * 2, spec, rank).relu() for case, spec in cases])

    assert_same_when_compiled(rank, f, (1000,), "inductor")


@pytest.mark.slow
def test_compiled_equals_eager_bit_for_bit(ranks: RunRanks) -> None:
    ranks(2, check_compiled)


def count_graphs(rank: Rank) -> int:
    graphs = torch._dynamo.utils.counters["stats"]
    graphs.clear()

    def f(x: Tensor) -> Tensor:
        return rf.all_reduce(x, 4)

    compiled = torch.compile(f, fullgraph=True, dynamic=True)
    for n in (100, 128, 1000):
        x = make((n, 7), rank.index)
        assert torch.equal(compiled(x), f(x)), n
    return int(graphs["unique_graphs"])


@pytest.mark.slow
def test_one_graph_serves_every_size(ranks: RunRanks) -> None:
    assert ranks(2, count_graphs) == [1, 1]
