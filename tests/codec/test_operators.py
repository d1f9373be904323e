"""The codec as operators: arithmetic.py's bytes, shapes on fake and symbolic tensors, errors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import sympy
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    ShapeEnv,
    StatelessSymbolicContext,
)

from rfcompile.codec import arithmetic, formats, operators
from rfcompile.codec.formats import BITS, QuantFormat
from rfcompile.errors import DtypeError, FormatError, NonFiniteError, PayloadError, ShapeError

SPECS = [
    *(f"{bits}b:g32" for bits in BITS),
    "4b:tensor:tread",
    "3b:g64:rise:h16:stoch:s3",
    "8b:tensor:h8",
    "2b:g128:h64:saturate",
]


def cases(spec: str) -> list[tuple[Any, tuple[Any, ...]]]:
    """Every codec operator with arguments for it."""
    x = torch.randn(2, 75)
    payload = operators.quantize(x, spec)
    return [
        (operators.quantize, (x, spec)),
        (operators.quantize, (x.bfloat16().t().contiguous().t(), spec, 5)),
        (operators.dequantize, (payload, spec, torch.float32)),
        (operators.dequantize, (payload, spec, torch.float16)),
        (operators.dequantize_sum, (payload, spec, torch.bfloat16, True)),
        (operators.requantize, (payload, spec)),
        (operators.requantize, (payload, spec, True, 5)),
    ]


def test_the_operators_are_public_by_name() -> None:
    names = ("quantize", "dequantize", "dequantize_sum", "requantize", "require_finite", "pack")
    for name in names:
        op = getattr(torch.ops.rfcompile, name).default
        assert op is getattr(operators, name)
        assert torch.Tag.pt2_compliant_tag in op.tags
    assert set(operators.FORMULAS) == {getattr(operators, name) for name in names[:4]}


@pytest.mark.parametrize("spec", SPECS)
def test_an_operator_is_its_formula(spec: str) -> None:
    fmt = QuantFormat.parse(spec)
    for op, (x, _, *rest) in cases(spec):
        formula: Any = getattr(arithmetic, op._schema.name.split("::")[1])
        assert torch.equal(op(x, spec, *rest), formula(x, fmt, *rest))


@pytest.mark.parametrize("spec", ["4b:g32", "3b:tensor", "8b:g64:h16:stoch"])
def test_opcheck(spec: str) -> None:
    for op, args in cases(spec):
        torch.library.opcheck(op, args)


def test_opcheck_of_the_two_helpers() -> None:
    pieces = [torch.randint(0, 255, (2, 3, 4), dtype=torch.uint8) for _ in range(3)]
    torch.library.opcheck(operators.pack, (pieces, [2, 1]))
    payload = torch.randint(0, 255, (2, 9), dtype=torch.uint8)
    torch.library.opcheck(
        operators.require_finite, (payload, torch.zeros(2, dtype=torch.bool), "here")
    )


def test_pack_lays_the_pieces_of_a_field_side_by_side() -> None:
    a, b, c = (torch.full((1, 2, 2), value) for value in (1, 2, 3))
    assert operators.pack([a, b, c], [2, 1]).tolist() == [[1, 1, 2, 2, 1, 1, 2, 2, 3, 3, 3, 3]]


# ---- shapes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", SPECS)
def test_fake_results_have_the_shape_dtype_and_stride_of_real_ones(spec: str) -> None:
    for numel in (0, 1, 75, 129):
        for dtype in formats.DTYPES:
            x = torch.randn(3, numel).to(dtype)
            payload = operators.quantize(x, spec)
            calls: list[tuple[Any, tuple[Any, ...]]] = [
                (operators.quantize, (x, spec)),
                (operators.dequantize, (payload, spec, dtype)),
                (operators.dequantize_sum, (payload, spec, dtype)),
                (operators.requantize, (payload, spec)),
            ]
            for op, (tensor, *rest) in calls:
                real = op(tensor, *rest)
                with FakeTensorMode() as mode:
                    fake = op(mode.from_tensor(tensor), *rest)
                assert (fake.shape, fake.dtype, fake.stride(), fake.device) == (
                    real.shape, real.dtype, real.stride(), real.device
                ), (op, numel)  # fmt: skip


def symbolic(x: torch.Tensor, env: ShapeEnv) -> torch.Tensor:
    context: Any = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC] * x.dim())
    return FakeTensorMode(shape_env=env).from_tensor(x, symbolic_context=context)


def size_at(size: Any, env: ShapeEnv, sizes: dict[int, int]) -> int:
    """A symbolic size, with each symbol replaced by the size its hint stands for."""
    if isinstance(size, int):
        return size
    expression = size.node.expr
    values = {s: sizes[int(env.backed_var_to_val[s])] for s in expression.free_symbols}
    return int(sympy.sympify(expression).subs(values))


@pytest.mark.parametrize("spec", SPECS)
def test_fake_kernels_keep_sizes_symbolic(spec: str) -> None:
    fmt = QuantFormat.parse(spec)
    env = ShapeEnv()
    x = symbolic(torch.randn(3, 500), env)
    payload = operators.quantize(x, spec)
    outputs = [
        payload,
        operators.dequantize(payload, spec, torch.float16),
        operators.dequantize_sum(payload, spec, torch.float32),
        operators.requantize(payload, spec),
    ]
    assert not env.guards  # no size was fixed, so none recompiles
    for rows, columns in ((2, 1), (3, 500), (4, 1024), (7, 100003)):
        sizes = {3: rows, 500: columns}
        found = [tuple(size_at(s, env, sizes) for s in out.shape) for out in outputs]
        E = fmt.group_elements(columns)
        padded = math.ceil(columns / E) * E
        row = fmt.row_bytes(columns)
        assert found == [(rows, row), (rows, padded), (padded,), (1, row)]


def test_the_operators_trace_to_one_node_each_with_symbolic_sizes() -> None:
    def exchange(x: torch.Tensor) -> torch.Tensor:
        payload = torch.ops.rfcompile.quantize(x.view(2, -1), "4b:g128:rise")
        reduced = torch.ops.rfcompile.requantize(payload, "4b:g128:rise")
        decoded: torch.Tensor = torch.ops.rfcompile.dequantize(reduced, "4b:g128:rise", x.dtype)
        return decoded

    gm = make_fx(exchange, tracing_mode="symbolic")(torch.randn(600))
    found = [n.target for n in gm.graph.find_nodes(op="call_function", target=operators.quantize)]
    assert found == [operators.quantize]
    assert len(gm.graph.find_nodes(op="call_function", target=operators.requantize)) == 1
    for numel in (600, 2, 1026):
        x = torch.randn(numel)
        assert torch.equal(gm(x), exchange(x))


# ---- errors: eager and fake kernels alike --------------------------------------------------------


@pytest.fixture(params=["eager", "fake"])
def place(request: pytest.FixtureRequest) -> Any:
    """Hands a tensor to a real or to a fake kernel."""
    return FakeTensorMode().from_tensor if request.param == "fake" else lambda x: x


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.bool, torch.float64])
def test_a_dtype_the_codec_does_not_take(place: Any, dtype: torch.dtype) -> None:
    with pytest.raises(DtypeError, match=rf"input of quantize has dtype {dtype}; .*float32"):
        operators.quantize(place(torch.zeros(2, 4).to(dtype)), "4b")


@pytest.mark.parametrize("shape", [(), (4,), (2, 3, 4)])
def test_rows_are_asked_for(place: Any, shape: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError, match=r"input of quantize has shape .*one row a chunk"):
        operators.quantize(place(torch.zeros(shape)), "4b")
    payload = place(torch.zeros(shape, dtype=torch.uint8))
    with pytest.raises(ShapeError, match="input of dequantize has shape"):
        operators.dequantize(payload, "4b", torch.float32)


@pytest.mark.parametrize(
    ("spec", "row"), [("4b", 65), ("4b", 1), ("3b:g16", 7), ("3b:tensor", 7), ("8b:tensor", 1)]
)
def test_a_payload_of_the_wrong_length(place: Any, spec: str, row: int) -> None:
    payload = place(torch.zeros(2, row, dtype=torch.uint8))
    for op, rest in (
        (operators.dequantize, (torch.float32,)),
        (operators.dequantize_sum, (torch.float32,)),
        (operators.requantize, ()),
    ):
        with pytest.raises(PayloadError, match=f"rows of {row} bytes.* with the format it") as e:
            op(payload, spec, *rest)
        assert e.value.format == QuantFormat.parse(spec).spec
        assert str(row) in str(e.value.got)


def test_a_payload_of_the_wrong_dtype(place: Any) -> None:
    with pytest.raises(PayloadError, match=r"torch\.int8 rows of 66 bytes"):
        operators.dequantize(place(torch.zeros(1, 66, dtype=torch.int8)), "4b", torch.float32)


def test_a_format_text_that_is_not_understood(place: Any) -> None:
    with pytest.raises(FormatError, match="bits=7 is not supported"):
        operators.quantize(place(torch.zeros(1, 4)), "7b")


def test_require_finite_names_the_site_and_the_ranks() -> None:
    payload = torch.randint(0, 255, (4, 9), dtype=torch.uint8)
    fine = torch.zeros(4, dtype=torch.bool)
    passed = operators.require_finite(payload, fine, "block 1")
    assert torch.equal(passed, payload)
    assert passed.data_ptr() != payload.data_ptr()

    flags = torch.tensor([False, True, False, True])
    with pytest.raises(NonFiniteError, match=r"input of block 1 on ranks 1, 3\. The format") as e:
        operators.require_finite(payload, flags, "block 1")
    assert (e.value.site, e.value.ranks) == ("block 1", (1, 3))
