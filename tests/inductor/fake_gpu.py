"""Kernels of single operators of the codec: emitted for a GPU that is not there, and interpreted.

Emitting and compiling is the product's own (``rfcompile/emission/``). :func:`interpret` runs the
same kernels on CPU tensors in Triton's interpreter, in a process of its own: ``TRITON_INTERPRET=1``
must be set before it imports Triton.

What the interpreter cannot show: flushed subnormals except those of ``floor`` (look for ``.ftz`` in
the PTX), how a device rounds a division, fused multiply-adds, races.

The interpreter's part uses private parts of Triton 3.7.1: ``runtime.interpreter``, and the text of
a wrapper.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rfcompile.codec import operators
from rfcompile.codec.formats import QuantFormat
from rfcompile.emission.absent_gpu import install
from rfcompile.emission.capture import CapturedGraph
from rfcompile.emission.child import in_children
from rfcompile.emission.emit import Emission, compiled_launch
from rfcompile.emission.emit import emit as emit_graph
from rfcompile.emission.gpus import gpu_of
from rfcompile.emission.machine_code import MachineCode, load_module

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Case:
    """One operator of the codec in one format, for ``rows`` rows of ``numel`` elements.

    Args:
        layout: of what is quantized. "rows": as it is; "transposed": a matrix whose transpose is
            made rows; "heads": ``[batch, heads, length, 128]``, as attention leaves it, is made
            ``[batch, length, heads * 128]``.
    """

    operator: str
    format: str
    rows: int = 4
    numel: int = 2**17
    dtype: torch.dtype = torch.bfloat16
    layout: str = "rows"

    def __str__(self) -> str:
        return f"{self.operator} {self.format} [{self.rows}, {self.numel}]"

    def call(self, given: Tensor) -> Tensor:
        op = getattr(operators, self.operator)
        if self.layout == "transposed":
            given = given.view(128, -1).t().reshape(self.rows, -1)
        elif self.layout == "heads":
            given = given.view(2, 4, -1, 128).transpose(1, 2).reshape(self.rows, -1)
        result: Tensor = (
            op(given, self.format, self.dtype)
            if self.operator.startswith("dequantize")
            else op(given, self.format)
        )
        return result

    def given(self) -> Tensor:
        """The input: values over 16 decades, with NaN, Inf, zeros of both signs and subnormals."""
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(self.rows * self.numel, generator=generator)
        x *= torch.logspace(-8, 8, x.numel())
        x[5], x[x.numel() // 2], x[-3] = torch.nan, torch.inf, -torch.inf
        quarter, eighth = x.numel() // 4, x.numel() // 8
        x[quarter : quarter + 300] = 0
        x[eighth : eighth + 200] *= 1e-38
        x[eighth + 200 : eighth + 230] = -0.0
        x[5 * eighth : 5 * eighth + 70] *= 1e-42  # subnormal beside 100: their levels are too
        x[3 * quarter : 3 * quarter + 130] *= 3e31
        x = x.view(self.rows, self.numel)
        if self.operator == "quantize":
            return x.to(self.dtype)
        return operators.quantize(x, self.format)

    def like(self) -> Tensor:
        """A tensor as :meth:`given` is, without values."""
        if self.operator == "quantize":
            return torch.empty(self.rows, self.numel, dtype=self.dtype)
        nbytes = QuantFormat.parse(self.format).payload_bytes(self.numel)
        return torch.empty(self.rows, nbytes, dtype=torch.uint8)


@dataclass
class Emitted:
    """What became of a case, with the machine code of each kernel by name; ``error`` says why there
    is nothing else.
    """

    case: Case
    emission: Emission | None = None
    codes: dict[str, MachineCode] = field(default_factory=dict)
    error: str = ""


# ---- called by the tests -------------------------------------------------------------------------


def emit(cases: Sequence[Case], target: str = "sm_90") -> list[Emitted]:
    """Emit and compile the kernels of each case, in processes of their own."""
    gpu = gpu_of(target)
    found = dict(in_children(lambda: install(gpu), emitted, cases, 2))
    return [found[number] for number in range(len(cases))]


def interpret(emitted: list[Emitted], folder: Path) -> list[str]:
    """Run each case's kernels in Triton's interpreter: "" for eager's bytes, else what differs."""
    file = folder / "interpret.pt"
    torch.save(emitted, file)
    done = subprocess.run(
        [sys.executable, "-m", "tests.inductor.fake_gpu", str(file)],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=ROOT, capture_output=True, text=True, timeout=1800, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    result: list[str] = torch.load(file, weights_only=False)
    return result


# ---- emit ----------------------------------------------------------------------------------------


def emitted(case: Case) -> Emitted:
    """The case, in a process that ``install`` gave its GPU."""
    try:
        emission = emit_graph(graph_of(lambda given: [case.call(given)], case.like()))
        codes = {}
        for launch in emission.launches:
            (codes[launch.kernel],) = compiled_launch(launch, emission.kernels[launch.kernel])
        return Emitted(case, emission, codes)
    except Exception as error:
        return Emitted(case, error="".join(traceback.format_exception(error))[-2000:])


def graph_of(call: Callable[[Tensor], list[Tensor]], given: Tensor) -> CapturedGraph:
    """The graph of a function of one tensor, as Inductor gets it."""
    from torch._inductor.decomposition import select_decomp_table
    from torch.fx.experimental.proxy_tensor import make_fx

    import rfcompile.inductor.lowering  # noqa: F401  # registers the lowerings

    gm = make_fx(call, decomposition_table=select_decomp_table(), tracing_mode="fake")(given)
    return CapturedGraph(gm, "forward", is_inference=True)


# ---- interpret -----------------------------------------------------------------------------------


def mend_interpreter() -> None:
    """Three repairs: bfloat16 is rounded to nearest, reductions run on whole arrays, libdevice."""
    from torch._inductor.runtime import triton_helpers
    from triton import language as tl
    from triton.runtime import interpreter

    triton_helpers.set_driver_to_gpu = lambda: None
    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    cast = builder.cast_impl

    def cast_impl(self: Any, source: Any, to: Any) -> Any:
        old, new = source.dtype.scalar, to.scalar
        if (old, new) == (tl.float32, tl.bfloat16):
            values = torch.from_numpy(np.array(source.data, dtype=np.float32))
            halves = values.to(torch.bfloat16).view(torch.int16).numpy()
            return handle(halves.view(np.uint16), new)
        if (old, new) == (tl.bfloat16, tl.float32):
            words = np.ascontiguousarray(source.data).view(np.uint16).astype(np.uint32) << 16
            return handle(words.view(np.float32), new)
        with np.errstate(invalid="ignore", over="ignore"):
            return cast(self, source, to)

    builder.cast_impl = cast_impl
    for name in ("si_to_fp", "ui_to_fp", "fp_to_si", "fp_to_ui", "fp_ext", "fp_trunc"):
        setattr(builder, f"create_{name}", cast_impl)
    builder.create_int_cast = lambda self, source, to, is_signed: cast_impl(self, source, to)

    def generic_reduce(self: Any, given: Any) -> Any:
        """Halves of the axis, by the kernel's own function: for those that heed no order."""
        (one,), axis = self.unravel(given, self.axis)
        data = np.moveaxis(one.handle.data, axis, 0)
        while len(data) > 1:
            half = len(data) // 2
            low, high = (
                self.to_tensor(np.ascontiguousarray(part), one.dtype)
                for part in (data[:half], data[half : 2 * half])
            )
            rest = data[2 * half :]
            data = np.concatenate([self.combine_fn.fn(low, high).handle.data, rest])
        result = np.expand_dims(data[0], axis) if self.keep_dims else data[0]
        return [self.to_tensor(result, one.dtype)]

    interpreter.ReduceOps.generic_reduce = generic_reduce


def _libdevice() -> SimpleNamespace:
    """What the interpreter lacks of it."""
    from triton import language as tl
    from triton.runtime.interpreter import TensorHandle

    def by(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def run(x: Any) -> Any:
            data = function(x.handle.data).astype(x.handle.data.dtype)
            return tl.core.tensor(TensorHandle(data, x.handle.dtype), x.type)

        return run

    def flushed(data: Any) -> Any:  # as CUDA's does
        return np.where(np.abs(data) < 2.0**-126, 0, data)

    return SimpleNamespace(
        nearbyint=by(np.rint), floor=by(lambda data: np.floor(flushed(data))), trunc=by(np.trunc)
    )


class _Interpreted:
    """A generated kernel without its heuristics, to be launched on CPU tensors."""

    def __init__(self, name: str, source: str, config: dict[str, int]) -> None:
        before, _, after = source.partition("@triton.jit")
        imports = re.sub(r"@triton_heuristics\..*", "", before, flags=re.DOTALL)
        self.function = getattr(load_module(f"{imports}\n@triton.jit{after}"), name)
        self.function.fn.__globals__["libdevice"] = _libdevice()
        signature = re.search(r"def \w+\((.*?)\):", after, re.DOTALL)
        assert signature is not None
        arguments = [argument.partition(":") for argument in signature[1].split(",")]
        self.names = [argument.strip() for argument, kind, _ in arguments if not kind]
        constants = [argument.strip() for argument, kind, _ in arguments if kind]
        self.constants = {constant: config[constant] for constant in constants}

    def run(self, *args: Any, stream: object = None) -> None:
        given = dict(zip(self.names, args, strict=True))
        grid = tuple(
            -(-given[f"{axis}numel"] // self.constants.get(f"{axis.upper()}BLOCK", 1))
            for axis in "xy"
            if f"{axis}numel" in given
        )
        with np.errstate(all="ignore"):
            self.function[grid](*args, **self.constants)


def _interpret(emitted: Emitted) -> str:
    if emitted.error:
        return emitted.error
    try:
        given = emitted.case.given()
        expected = emitted.case.call(given)
        (got,) = _call(emitted, given)
        got = got.reshape(expected.shape)
    except Exception as error:
        return "".join(traceback.format_exception(error))[-2000:]
    bits = torch.int16 if expected.dtype == torch.bfloat16 else torch.uint8
    nan = expected.isnan()
    if torch.equal(got.isnan(), nan):
        got, expected = got.masked_fill(nan, 0), expected.masked_fill(nan, 0)
    wrong = int((got.view(bits) != expected.view(bits)).sum())
    return f"{wrong} of {expected.numel()} elements differ" if wrong else ""


def _call(emitted: Emitted, given: Tensor) -> Any:
    """Run the wrapper on a CPU tensor."""
    assert emitted.emission is not None
    kernels = {
        name: _Interpreted(name, source, emitted.codes[name].config)
        for name, source in emitted.emission.kernels.items()
    }

    class Compile:
        def triton(self, name: str, source: str, **more: Any) -> _Interpreted:
            return kernels[name]

        def wait(self, scope: object) -> None:
            pass

    code = emitted.emission.wrapper
    for pattern, replacement in (
        (r"with torch\.cuda\._DeviceGuard\(0\):", "if True:"),
        (r"torch\.cuda\.set_device\(0\)", "pass"),
        (r"empty_strided_cuda = .*", "empty_strided_cuda = torch.empty_strided"),
        (r"empty_strided_p2p = .*", ""),
        (r"async_compile = AsyncCompile\(\)", "async_compile = _Compile()"),
        (r"(?m)^.*import.*get_raw_stream.*$", "get_raw_stream = lambda device: 0"),
        (r"empty_strided_cuda\(([^\n]*), torch\.(\w+)\)", r"_empty(\1, torch.\2)"),
    ):
        code = re.sub(pattern, replacement, code)

    def empty(size: Any, stride: Any, dtype: torch.dtype) -> Tensor:
        return torch.empty_strided(size, stride, dtype=dtype)

    names: dict[str, Any] = {"_Compile": Compile, "_empty": empty, "__name__": "wrapper"}
    exec(compile(code, "wrapper", "exec"), names)
    return names["call"]([given.clone()])


def main() -> None:
    mend_interpreter()
    (file,) = sys.argv[1:]
    torch.save(list(map(_interpret, torch.load(file, weights_only=False))), file)


if __name__ == "__main__":
    # Under its own name, so that what is stored is found again by the tests.
    from tests.inductor import fake_gpu

    fake_gpu.main()
