"""How Inductor compiles the codec operators: on a GPU one node each, fused with its neighbours.

Importing this module registers the lowerings; ``backend.py`` and the public functions do so before
anything compiles. An operator is lowered by tracing its formula of ``codec/arithmetic.py`` and
lowering the trace in place, so what is generated and the formula are the same lines. On a CPU, and
for some formats on a GPU, a kernel of the package is called instead: see :func:`_is_called`.

Private torch symbols used here, tried on torch 2.11 (read) and 2.13 (run):
``_inductor.lowering.{register_lowering, process_subgraph_nodes, lowerings, fallbacks,
fallback_handler, _maybe_layout_constraints}``, ``_inductor.ir.{_CollectiveKernel,
ConcatKernel, ExternKernel, FixedLayout, ReinterpretView, StorageBox, TensorBox, View,
ir_node_to_tensor}``, ``_inductor.dependencies.{MemoryDep, extract_read_writes}``,
``_inductor.decomposition.{fast_random_decomps, register_decomposition, select_decomp_table}``,
``_inductor.config.{realize_*, unroll_reductions}_threshold``, ``_inductor.virtualized.V``,
``_inductor.utils.{sympy_product, sympy_subs}``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import sympy
import torch
from torch._inductor import config, ir
from torch._inductor.decomposition import (
    fast_random_decomps,
    register_decomposition,
    select_decomp_table,
)
from torch._inductor.dependencies import MemoryDep, extract_read_writes
from torch._inductor.lowering import (
    _maybe_layout_constraints,
    fallback_handler,
    fallbacks,
    lowerings,
    process_subgraph_nodes,
    register_lowering,
)
from torch._inductor.utils import sympy_product, sympy_subs
from torch._inductor.virtualized import V
from torch.fx.experimental.proxy_tensor import make_fx

from rfcompile.codec import cpu_codec, operators, triton_codec
from rfcompile.codec.fingerprint import source_digest
from rfcompile.codec.formats import QuantFormat
from rfcompile.wire import collectives
from rfcompile.wire import fake as _fake  # noqa: F401  # its operator is decomposed too
from rfcompile.wire.gathers import gather_payloads

_NEVER = 1_000_000


def _lower_pack(pieces: Sequence[Any], counts: Sequence[int]) -> Any:
    """Give each piece its place in one buffer and let it be written there: nothing is copied."""
    device, dtype = pieces[0].get_device(), pieces[0].get_dtype()
    rows = pieces[0].get_size()[0]
    row = sum((p.get_size()[1] * p.get_size()[2] for p in pieces), sympy.S.Zero)
    layout = ir.FixedLayout(device=device, dtype=dtype, size=[rows, row], stride=[row, sympy.S.One])
    kernel = ir.ConcatKernel(name=None, layout=layout, inputs=[])
    box = ir.StorageBox(kernel)
    written, field_start, first = [], sympy.S.Zero, 0
    for count in counts:
        _, groups, run = pieces[first].get_size()
        for k in range(count):
            place = ir.FixedLayout(
                device=device,
                dtype=dtype,
                size=[rows, groups, run],
                stride=[row, run * count, sympy.S.One],
                offset=field_start + k * run,
            )
            view = ir.ReinterpretView(data=box, layout=place)
            written.append(ir.ConcatKernel.realize_into(pieces[first + k], view))
        field_start += groups * run * count
        first += count
    kernel.name = V.graph.register_buffer(kernel)
    kernel.inputs = ir.ConcatKernel.unwrap_storage(written)
    V.graph.register_operation(kernel)
    return ir.TensorBox(box)


def _lower_gather(x: Any, world: int, group: str) -> Any:
    """torch's lowering, but of payloads on a CPU: see ``wire/gathers.py``."""
    if x.get_device().type != "cpu" or x.get_dtype() != torch.uint8:
        return _torch_gathers(x, world, group)
    kernel: Any = ir._CollectiveKernel.create_out_of_place(gather_payloads, x, world, group)
    return ir.TensorBox.create(kernel)


_generates_on_cpu = False


@contextmanager
def generating_on_cpu() -> Iterator[None]:
    """Inside, the codec is generated for a CPU too, as it is for a GPU: to look at it.

    Inductor takes seconds for the C++ of each site, which then waits for memory as a call does.
    """
    global _generates_on_cpu
    tag = torch.compiler.config.cache_key_tag
    _generates_on_cpu, torch.compiler.config.cache_key_tag = True, f"{tag}-generating"
    try:
        yield
    finally:
        _generates_on_cpu, torch.compiler.config.cache_key_tag = False, tag


def _is_called(op: Any, tensor: Any, fmt: QuantFormat) -> bool:
    """Whether a kernel of the package is called, where one could be generated.

    On a CPU; on a GPU what Inductor would need three launches for: rotations, and codes of rows
    that have one scale.
    """
    device = tensor.get_device()
    if device.type == "cpu":
        return not _generates_on_cpu and not cpu_codec.load_kernels()
    rotates = fmt.rotate is not None and op is not operators.requantize
    codes_rows = fmt.group_size is None and op in (operators.quantize, operators.requantize)
    return (rotates or codes_rows) and triton_codec.runs_on(device)


def _in_runs(tensor: Any) -> Any:
    """The tensor, first copied in its own order if that order is lost in the rows of a payload.

    That is so where a transposed tensor becomes rows: no step along them leads to a neighbour in
    memory, so that a GPU would load a sector of 32 bytes for each element, twice. A copy before
    they are rows knows where the neighbours are, and its kernel is tiled in two dimensions.
    """
    size = tensor.get_size()
    reads = extract_read_writes(tensor.make_loader(), size).reads
    numel = V.graph.sizevars.simplify(sympy_product(size))
    if not any(_is_scattered(dep, numel) for dep in reads if isinstance(dep, MemoryDep)):
        return tensor
    inner = tensor.data
    while isinstance(inner, ir.View):
        inner = inner.data
    return ir.View.create(ir.ExternKernel.require_contiguous(ir.TensorBox(inner)), size)


def _is_scattered(read: MemoryDep, numel: Any) -> bool:
    """Whether so many elements are read and none beside another."""
    origin = dict.fromkeys(read.var_names, sympy.S.Zero)
    first = sympy_subs(read.index, origin)
    steps = [sympy_subs(read.index, origin | {var: sympy.S.One}) - first for var in read.var_names]
    is_whole = V.graph.sizevars.simplify(sympy_product(read.size)) == numel
    return is_whole and bool(steps) and 0 not in steps and 1 not in steps


def _lower_formula(op: Any, formula: Callable[..., Any]) -> Callable[..., Any]:
    def lower(tensor: Any, format: str, *args: Any, **kwargs: Any) -> Any:
        if tensor.get_device().type != "cpu":
            tensor = _in_runs(tensor)
        if _is_called(op, tensor, QuantFormat.parse(format)):
            return fallback_handler(op, add_to_fallback_set=False)(tensor, format, *args, **kwargs)

        def call(x: torch.Tensor) -> Any:
            return formula(x, format, *args, **kwargs, pack=operators.pack)

        symbolic = V.fake_mode.shape_env is not None
        with V.fake_mode:
            graph = make_fx(
                call,
                decomposition_table=select_decomp_table(),
                tracing_mode="symbolic" if symbolic else "fake",
            )(ir.ir_node_to_tensor(tensor))
        # One kernel reads the payload once: intermediates (sums over ranks, rotated parts) must
        # not be stored because many outputs read them.
        with config.patch(
            realize_reads_threshold=_NEVER,
            realize_acc_reads_threshold=_NEVER,
            realize_opcount_threshold=_NEVER,
            unroll_reductions_threshold=1,  # an unrolled maximum would be recomputed for each code
        ):
            return process_subgraph_nodes(graph, [tensor])

    return lower


for _op in (
    operators.pack,
    *operators.FORMULAS,
):  # forget that Inductor may have met them as opaque calls
    fallbacks.discard(_op)
    _maybe_layout_constraints.pop(_op, None)
    lowerings.pop(_op, None)
register_lowering(operators.pack, type_promotion_kind=None)(_lower_pack)
for _op, _formula in operators.FORMULAS.items():
    register_lowering(_op, type_promotion_kind=None)(_lower_formula(_op, _formula))

_torch_gathers = lowerings[torch.ops._c10d_functional.all_gather_into_tensor.default]
register_lowering(
    torch.ops._c10d_functional.all_gather_into_tensor.default, type_promotion_kind=None
)(_lower_gather)

for _op, _wire in collectives.DECOMPOSITIONS.items():
    register_decomposition(_op)(_wire)
fast_random_decomps.cache_clear()


def tag_caches() -> None:
    """Make the sources of this package part of the key of Inductor's caches.

    They do not know what our lowerings generate: another version would find this one's kernels.
    Called for each compile, since the user may have set the tag since.
    """
    tag = f"rfcompile-{source_digest()}"
    if tag not in torch.compiler.config.cache_key_tag:
        torch.compiler.config.cache_key_tag += tag


tag_caches()
