"""What Inductor makes of a graph for the GPU: kernels, launches, other calls, and their bytes.

Inductor runs as it does for a GPU that is there, up to the point where it would load what it wrote.

Private parts used here, run with torch 2.13.0: ``_inductor.compile_fx.compile_fx_inner``,
``_inductor.exc.InductorError``, ``_inductor.graph.GraphLowering.{compile_to_module, codegen,
scheduler, get_output_names}``, ``_inductor.codegen.triton.TritonScheduling.define_kernel``,
``_inductor.ir.{MultiOutput, MutationLayoutSHOULDREMOVE, NonOwningLayout}``,
``_inductor.scheduler.{ExternKernelSchedulerNode, Scheduler.codegen_extern_call}``,
``_inductor.dependencies.MemoryDep``, ``_inductor.virtualized.V``, ``_inductor.config``,
``_guards.{tracing, TracingContext}``, and in the text of a wrapper the places where kernels stand.
"""

from __future__ import annotations

import operator
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from math import prod
from typing import Any
from unittest import mock

import torch
from torch import fx
from torch._guards import TracingContext, tracing
from torch._inductor import config, ir
from torch._inductor.codegen.triton import TritonScheduling
from torch._inductor.compile_fx import compile_fx_inner
from torch._inductor.dependencies import MemoryDep
from torch._inductor.exc import InductorError
from torch._inductor.graph import GraphLowering
from torch._inductor.scheduler import ExternKernelSchedulerNode, Scheduler
from torch._inductor.virtualized import V
from torch._ops import OpOverload

from rfcompile.emission.called import Call, call_of, compile_call, steps_of
from rfcompile.emission.capture import CapturedGraph
from rfcompile.emission.machine_code import MachineCode, compile_kernel
from rfcompile.emission.retarget import retarget
from rfcompile.errors import EmissionError
from rfcompile.graph.places import source_of

_KERNEL = re.compile(r"(\w+) = async_compile\.triton\('\w+', '''(.*?)''', device_str", re.DOTALL)
_MOVES = ("reshape", "_unsafe_view", "expand", "clone", "convert_element_type", "_to_copy")
_COLLECTIVES = ("_c10d_functional", "_c10d_functional_autograd")


@dataclass(frozen=True)
class Launch:
    """One launch of a generated kernel, or of one of the package.

    Args:
        kernel: its name.
        operators: what it fuses, in the order of the graph: names of operators, each once.
        nodes: the nodes of the graph that it computes.
        sources: the lines of the model that these come from.
        numels: sizes of its loops by name, "x", "y", "r0_".
        reads, writes: bytes, by the buffer.
        read, written, least: bytes; see :class:`Emission`.
        elements: of the largest tensor that it reads or writes.
        call: what it computes, if the kernel is one of the package.
    """

    kernel: str
    operators: tuple[str, ...]
    nodes: tuple[str, ...]
    sources: tuple[str, ...]
    numels: dict[str, int]
    reads: dict[str, int]
    writes: dict[str, int]
    elements: int
    least: int = 0
    call: Call | None = None

    @property
    def read(self) -> int:
        return sum(self.reads.values())

    @property
    def written(self) -> int:
        return sum(self.writes.values())


@dataclass(frozen=True)
class Emission:
    """What Inductor makes of one graph.

    A launch reads and writes each of its buffers once, as far as it touches it. ``least`` of a
    launch are those of these bytes that generated kernels cannot save: what it reads first of the
    graph's inputs and of the results of other calls (matrix products, collectives), and what it
    writes for such calls or as an output of the graph. What one generated kernel leaves for another
    one is not among them.

    Args:
        wrapper: the Python module that Inductor wrote.
        kernels: the Triton source of each kernel; of one of the package the whole module.
        collective_calls, external_calls: what else the wrapper calls, in order.
    """

    wrapper: str
    kernels: dict[str, str]
    launches: tuple[Launch, ...]
    collective_calls: tuple[str, ...]
    external_calls: tuple[str, ...]


def emit(graph: CapturedGraph) -> Emission:
    """Let Inductor generate code for the GPU that ``absent_gpu.install`` installed.

    ``graph.gm`` is changed.

    Raises:
        EmissionError: a node cannot be moved to the GPU, or Inductor met an error there.
    """
    inputs, mode = retarget(graph.gm)
    launches: list[Launch] = []
    define: Any = TritonScheduling.define_kernel

    def define_kernel(self: Any, source: str, schedule: Any, kernel: Any) -> str:
        name: str = define(self, source, schedule, kernel)
        launches.append(_launch(name, schedule, kernel))
        return name

    extern: Any = Scheduler.codegen_extern_call

    def codegen_extern_call(self: Any, scheduled: Any) -> None:
        if call := call_of(scheduled.node):
            launches.extend(_called_launches(call, scheduled.node))
        extern(self, scheduled)

    with ExitStack() as stack:
        for owner, name, new in (
            (TritonScheduling, "define_kernel", define_kernel),
            (Scheduler, "codegen_extern_call", codegen_extern_call),
            (GraphLowering, "compile_to_module", _stop),
        ):
            stack.enter_context(mock.patch.object(owner, name, new))
        stack.enter_context(config.patch(fx_graph_cache=False, fx_graph_remote_cache=False))
        stack.enter_context(tracing(TracingContext(mode)))
        stack.enter_context(V.set_fake_mode(mode))
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", "TensorFloat32 tensor cores")
        try:
            compile_fx_inner(
                graph.gm,
                inputs,
                is_backward=graph.direction == "backward",
                is_inference=graph.is_inference,
            )
        except _Written as written:
            return _emission(written, launches)
        except InductorError as error:
            raise _told(error, graph.gm) from error
    raise EmissionError("a graph", graph.place, "Inductor generated no code for it")


class _Written(BaseException):
    """Inductor wrote its code: it goes no further."""

    def __init__(self, lowering: Any, wrapper: str) -> None:
        super().__init__()
        self.lowering, self.wrapper = lowering, wrapper


def _stop(self: Any) -> Any:
    code = self.codegen()[0]
    raise _Written(self, str(getattr(code, "value", code)))


def _told(error: Exception, gm: fx.GraphModule) -> EmissionError:
    """The error with the node that it is about, if its text names one."""
    text = str(error)
    named = re.search(r"While executing %(\w+)|target: ([\w.]+)", text)
    about = [n for n in gm.graph.nodes if named and str(n.target if named[2] else n) in named[0]]
    what = str(about[0].target) if about else "a graph"
    return EmissionError(what, source_of(about[0]) if about else "", text[:2000])


def compiled_launch(
    launch: Launch, source: str, *, every_config: bool = False
) -> list[MachineCode]:
    """The machine code of the kernel of a launch; see :func:`machine_code.compile_kernel`."""
    if launch.call:
        return [compile_call(launch.call)]
    return compile_kernel(launch.kernel, source, launch.numels, every_config=every_config)


# ---- launches, while Inductor writes them --------------------------------------------------------


def _launch(name: str, schedule: Any, kernel: Any) -> Launch:
    nodes = [node for node in schedule if hasattr(node, "read_writes")]
    removed = kernel.removed_buffers | V.graph.removed_buffers
    given = [dep for node in nodes for dep in node.read_writes.reads]
    made = [dep for node in nodes for dep in node.read_writes.writes]
    written = {dep.name for dep in made}
    reads = _bytes(dep for dep in given if dep.name not in written)
    writes = _bytes(dep for dep in made if dep.name not in removed)
    origins = _in_order({origin for node in nodes for origin in node.node.get_origins()})
    if not reads:  # it fills: what its nodes name beside the last one is read elsewhere
        origins = origins[-1:]
    if torch.uint8 not in {V.graph.get_dtype(buffer) for buffer in (*reads, *writes)}:
        # It touches no payload: if it does anything else, it only reads what was decoded before.
        origins = [node for node in origins if not _is_of_codec(node)] or origins
    computing = [node for node in origins if _computes(node)] or origins
    return Launch(
        kernel=name,
        operators=tuple(dict.fromkeys(map(_operator, computing))),
        nodes=tuple(node.name for node in origins),
        sources=tuple(dict.fromkeys(filter(None, map(source_of, origins)))),
        numels={prefix: int(numel) for prefix, numel in kernel.numels.items()},
        reads=reads,
        writes=writes,
        elements=max((int(V.graph.get_numel(n)) for n in (*reads, *writes)), default=0),
    )


def _called_launches(call: Call, node: Any) -> Iterator[Launch]:
    """The launches of a kernel of the package: each touches each of its tensors once."""
    (given,), (made,) = node.inputs, node.outputs
    names = {"given": _real(given.get_name()), "made": _real(made.get_name())}
    origins = [origin for origin in _in_order(node.get_origins()) if _is_of_codec(origin)]
    for step in steps_of(call):
        reads, writes = (
            {names.get(name, f"{names['made']}_{name}"): nbytes for name, nbytes in found.items()}
            for found in (step.reads, step.writes)
        )
        yield Launch(
            kernel=step.call.kernel,
            operators=(call.operator,),
            nodes=tuple(origin.name for origin in origins),
            sources=tuple(dict.fromkeys(filter(None, map(source_of, origins)))),
            numels={},
            reads=reads,
            writes=writes,
            elements=max(int(V.graph.get_numel(name)) for name in names.values()),
            call=step.call,
        )


def _real(name: str) -> str:
    """What waits for a collective renames its result."""
    renamed: str = V.graph.scheduler.mutation_real_name.get(name, name)
    return renamed


def _bytes(deps: Iterator[Any]) -> dict[str, int]:
    """Bytes touched of each buffer: the sum over different indices, at most the whole."""
    found: dict[str, dict[Any, int]] = {}
    for dep in deps:
        if isinstance(dep, MemoryDep):
            found.setdefault(_real(dep.name), {})[dep.index] = _numel(dep)
    result = {}
    for name, parts in found.items():
        numel = min(sum(parts.values()), int(V.graph.get_numel(name)))
        result[name] = numel * V.graph.get_dtype(name).itemsize
    return result


def _numel(dep: MemoryDep) -> int:
    sizes = dict(zip(dep.var_names, dep.size, strict=True))
    used = sizes if dep.is_indirect() else sizes.keys() & dep.index.free_symbols
    return int(prod(sizes[var] for var in used))


def _in_order(nodes: set[fx.Node]) -> list[fx.Node]:
    """Those of the graph: the formula of an operator of the codec has nodes of its own."""
    return sorted(
        (node for node in nodes if node.graph is V.graph.graph), key=lambda node: node._sort_key
    )


def _is_of_codec(node: fx.Node) -> bool:
    return str(node.target).startswith("rfcompile.")


def _computes(node: fx.Node) -> bool:
    if not isinstance(node.target, OpOverload):
        return node.target is not operator.getitem
    return not node.target.is_view and _operator(node) not in _MOVES


def _operator(node: fx.Node) -> str:
    """``rfcompile.quantize.default`` is quantize."""
    return str(node.target).split(".")[1 if isinstance(node.target, OpOverload) else -1]


# ---- the whole, when it is written ---------------------------------------------------------------


def _emission(written: _Written, launches: list[Launch]) -> Emission:
    graph = written.lowering
    collectives, externals = [], []
    leaving = {_owner(graph, name) for name in graph.get_output_names()}
    for node in graph.scheduler.nodes:
        if not isinstance(node, ExternKernelSchedulerNode) or call_of(node.node):
            continue
        leaving |= {_owner(graph, dep.name) for dep in node.read_writes.reads}
        call = _called(node.node)
        if call.startswith(_COLLECTIVES):
            if "wait_tensor" not in call:
                collectives.append(call.partition(".")[2])
        elif call:
            externals.append(call)
    leaving |= set(graph.graph_input_names) | set(graph.mutated_inputs)
    return Emission(
        wrapper=written.wrapper,
        kernels=dict(_KERNEL.findall(written.wrapper))
        | {launch.kernel: launch.call.source for launch in launches if launch.call},
        launches=tuple(_with_least(launches, leaving, lambda name: _owner(graph, name))),
        collective_calls=tuple(collectives),
        external_calls=tuple(externals),
    )


def _called(node: Any) -> str:
    """What an external node calls: "aten.mm", "_c10d_functional.all_reduce", "" for nothing."""
    if isinstance(node, ir.MultiOutput):
        return ""
    overload = getattr(node, "op_overload", None)
    if isinstance(overload, OpOverload):
        return str(overload).rpartition(".")[0]
    name = str(node.python_kernel_name or type(node).__name__)
    return name.replace("extern_kernels.", "aten.").removeprefix("torch.ops.")


def _owner(graph: Any, name: str) -> str:
    """The buffer whose memory a buffer is a part of."""
    while True:
        buffer = graph.name_to_buffer.get(name)
        layout = getattr(buffer, "layout", None)
        if isinstance(layout, ir.NonOwningLayout):
            name = layout.view.get_name()
        elif isinstance(layout, ir.MutationLayoutSHOULDREMOVE):
            name = layout.get_buffer().get_name()
        else:
            return name


def _with_least(
    launches: list[Launch], leaving: set[str], owner: Callable[[str], str]
) -> Iterator[Launch]:
    generated = {owner(name) for launch in launches for name in launch.writes}
    seen: set[tuple[str, str]] = set()
    for launch in launches:
        least = 0
        for name, nbytes in launch.reads.items():
            if owner(name) not in generated and ("read", name) not in seen:
                least += nbytes
                seen.add(("read", name))
        for name, nbytes in launch.writes.items():
            if owner(name) in leaving:
                least += nbytes
        yield replace(launch, least=least)
