"""Generated GPU kernels without a GPU: emitted for an H100 that is not there, and interpreted.

``python fake_gpu.py emit FILE`` makes Inductor emit the kernels of a list of cases for sm_90, and
Triton compiles them by the ptxas it brings. ``python fake_gpu.py interpret FILE`` runs the same
kernels on CPU tensors in Triton's interpreter. Each is a process of its own: the first one replaces
parts of torch and Triton, and the second one needs ``TRITON_INTERPRET=1`` before it imports Triton.
FILE holds the list, and receives what came out; :func:`emit` and :func:`interpret` do all of this.

What the interpreter cannot show: flushed subnormals except those of ``floor`` (look for ``.ftz`` in
the PTX), how a device rounds a division, fused multiply-adds, races.

ALL private parts of torch and Triton that this needs are in this file, run with torch 2.13.0 and
Triton 3.7.1. torch: ``_dynamo.device_interface``, ``utils._triton``, ``_inductor.{graph, debug,
virtualized, decomposition, config}``, ``_inductor.fx_passes.{joint_graph, post_grad}``,
``_inductor.runtime.{hints, triton_helpers, triton_heuristics}``, ``_subclasses.fake_tensor``,
``_C._dynamo.guards``, and the text of a wrapper. Triton: ``runtime.driver``, ``backends``,
``runtime.interpreter``.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rfcompile.codec import operators

ROOT = Path(__file__).resolve().parents[2]
WIDEST_BLOCK = 32
"""Reductions of wider blocks are left out: one may take a minute, and autotuning drops it."""

WIDTHS = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128}
"""Bits that an instruction moves, by its modifier; without one, 32."""

H100: dict[str, Any] = {
    "name": "NVIDIA H100",
    "major": 9,
    "minor": 0,
    "multi_processor_count": 132,
    "total_memory": 80 << 30,
    "max_threads_per_multi_processor": 2048,
    "L2_cache_size": 50 << 20,
    "regs_per_multiprocessor": 65536,
    "max_threads_per_block": 1024,
    "warp_size": 32,
    "gcnArchName": "",
    "shared_memory_per_block": 49152,
    "shared_memory_per_block_optin": 232448,
    "shared_memory_per_multiprocessor": 233472,
}


@dataclass(frozen=True)
class Case:
    """One operator of the codec in one format, for ``rows`` rows of ``numel`` elements."""

    operator: str
    format: str
    rows: int = 4
    numel: int = 2**17
    dtype: torch.dtype = torch.bfloat16

    def __str__(self) -> str:
        return f"{self.operator} {self.format} [{self.rows}, {self.numel}]"

    def call(self, given: Tensor) -> Tensor:
        op = getattr(operators, self.operator)
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


@dataclass
class Kernel:
    """One generated kernel, compiled with one of its configurations."""

    name: str
    source: str
    config: dict[str, int]
    ptx: str
    sass: str
    """What the GPU would run, by the disassembler that Triton brings."""

    def instructions(self) -> list[str]:
        """Name and modifiers of each instruction, ``LDG.E.128``; loops are not unrolled."""
        pattern = r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)"
        return [name for name in re.findall(pattern, self.sass, re.MULTILINE) if name != "NOP"]

    def load_widths(self) -> list[int]:
        """Bits of each instruction that loads from global memory."""
        return self._widths("LDG.")

    def store_widths(self) -> list[int]:
        """Bits of each instruction that stores to global memory."""
        return self._widths("STG.")

    def _widths(self, start: str) -> list[int]:
        found = [name.split(".") for name in self.instructions() if name.startswith(start)]
        return [next((WIDTHS[part] for part in parts if part in WIDTHS), 32) for parts in found]

    def spills(self) -> int:
        """Instructions that move registers to or from local memory."""
        return sum(name.split(".")[0] in ("LDL", "STL") for name in self.instructions())


@dataclass
class Emitted:
    """What became of a case; ``error`` says why there is nothing else."""

    case: Case
    wrapper: str = ""
    kernels: list[Kernel] = field(default_factory=list)
    error: str = ""

    def launches(self) -> int:
        return len(re.findall(r"^\s*\w+\.run\(", self.wrapper, re.MULTILINE))

    def external_calls(self) -> list[str]:
        return re.findall(r"(?:extern_kernels|torch\.ops)\.[\w.]+\(", self.wrapper)


# ---- called by the tests -------------------------------------------------------------------------


def emit(cases: list[Case], folder: Path) -> list[Emitted]:
    """Emit and compile the kernels of each case, in a process of its own."""
    result: list[Emitted] = _run("emit", cases, folder, {"TRITON_INTERPRET": "0"})
    return result


def interpret(emitted: list[Emitted], folder: Path) -> list[str]:
    """Run each case's kernels in Triton's interpreter: "" for eager's bytes, else what differs."""
    result: list[str] = _run("interpret", emitted, folder, {"TRITON_INTERPRET": "1"})
    return result


def _run(role: str, given: list[Any], folder: Path, environment: dict[str, str]) -> list[Any]:
    file = folder / f"{role}.pt"
    torch.save(given, file)
    done = subprocess.run(
        [sys.executable, "-m", "tests.inductor.fake_gpu", role, str(file)],
        env=os.environ | environment | {"TRITON_CACHE_DIR": str(folder / "triton")},
        cwd=ROOT, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    result: list[Any] = torch.load(file, weights_only=False)
    return result


# ---- emit ----------------------------------------------------------------------------------------


def install_fake_gpu() -> None:
    """Let torch and Triton find an H100."""
    import triton
    from torch._dynamo import device_interface
    from torch._inductor.runtime import triton_helpers
    from torch._inductor.runtime.hints import DeviceProperties
    from torch.utils import _triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.driver import DriverBase

    properties: Any = SimpleNamespace(**H100)

    class FakeInterface(device_interface.CudaInterface):
        class Worker(device_interface.CudaInterface.Worker):
            current_device = staticmethod(lambda: 0)
            get_device_properties = staticmethod(lambda device=None: properties)

        current_device = staticmethod(lambda: 0)
        device_count = staticmethod(lambda: 1)
        set_device = staticmethod(lambda device: None)
        exchange_device = staticmethod(lambda device: 0)
        maybe_exchange_device = staticmethod(lambda device: 0)
        synchronize = staticmethod(lambda device=None: None)
        get_raw_stream = staticmethod(lambda device: 0)
        get_device_properties = staticmethod(lambda device=None: properties)
        is_available = staticmethod(lambda: True)
        is_bf16_supported = staticmethod(lambda including_emulation=False: True)
        get_compute_capability = staticmethod(lambda device=None: 90)
        is_triton_capable = staticmethod(lambda device=None: True)
        raise_if_triton_unavailable = staticmethod(lambda device=None: None)

    class FakeDriver(DriverBase):
        def __init__(self) -> None:
            limits = {
                "max_shared_mem": properties.shared_memory_per_block_optin,
                "multiprocessor_count": properties.multi_processor_count,
                "warpSize": properties.warp_size,
                "max_num_regs": properties.regs_per_multiprocessor,
            }
            self.utils = SimpleNamespace(get_device_properties=lambda device: limits)

        is_active = staticmethod(lambda: True)

        def map_python_to_cpp_type(self, ty: str) -> str:
            return ty

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", 90, 32)

        def get_active_torch_device(self) -> torch.device:
            return torch.device("cuda", 0)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: object = None) -> int:
            return 0

        def get_benchmarker(self) -> Any:
            raise RuntimeError("there is no GPU to measure on")

    device_interface.get_interface_for_device("cpu")  # registers the real ones, once
    for name in ("cuda", "cuda:0"):
        device_interface.register_interface_for_device(name, FakeInterface)
    torch.cuda.get_device_capability = lambda device=None: (9, 0)
    torch.cuda.get_device_properties = lambda device=None: properties
    triton.runtime.driver.set_active(FakeDriver())
    triton_helpers.set_driver_to_gpu = lambda: None
    for cached in (*vars(_triton).values(), DeviceProperties.create):
        if hasattr(cached, "cache_clear"):
            cached.cache_clear()


def _emit(case: Case) -> Emitted:
    emitted = Emitted(case)
    try:
        emitted.wrapper = _wrapper(lambda given: case.call(given), case.given())
        for name, source in _kernels_of(emitted.wrapper):
            emitted.kernels.append(_compile(name, source))
    except Exception as error:
        emitted.error = "".join(traceback.format_exception(error))[-2000:]
    return emitted


def _wrapper(call: Callable[[Tensor], Tensor], like: Tensor) -> str:
    """The Python module that Inductor writes for ``call``: its kernels, and a function of calls."""
    from torch._inductor.debug import DebugContext
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.fx_passes.joint_graph import joint_graph_passes
    from torch._inductor.fx_passes.post_grad import post_grad_passes
    from torch._inductor.graph import GraphLowering
    from torch._inductor.virtualized import V
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    import rfcompile.inductor.lowering  # noqa: F401  # registers the lowerings

    fake_mode = FakeTensorMode(shape_env=ShapeEnv(), static_shapes=True)
    with fake_mode:
        fake = torch.empty(like.shape, dtype=like.dtype, device="cuda")
        gm = make_fx(call, decomposition_table=select_decomp_table(), tracing_mode="real")(fake)
    with fake_mode, V.set_fake_mode(fake_mode):
        joint_graph_passes(gm)
        post_grad_passes(gm, is_inference=True)
        graph = GraphLowering(
            gm, is_inference=True, shape_env=fake_mode.shape_env, example_inputs=[fake]
        )
        with V.set_graph_handler(graph), V.set_debug_handler(DebugContext()):
            graph.run(fake)
            code = graph.codegen()[0]
    return str(getattr(code, "value", code))


def _kernels_of(wrapper: str) -> list[tuple[str, str]]:
    pattern = r"(\w+) = async_compile\.triton\('\w+', '''(.*?)''', device_str"
    return re.findall(pattern, wrapper, re.DOTALL)


def _compile(name: str, source: str) -> Kernel:
    """Compile the widest of the kernel's own configurations, up to WIDEST_BLOCK for reductions."""
    kernel = getattr(_module(source), name)
    usable = [
        config
        for config in kernel.configs
        if "r0_numel" not in source or config.kwargs["XBLOCK"] <= WIDEST_BLOCK
    ]
    kernel.configs = [max(usable, key=lambda config: config.kwargs["XBLOCK"])]
    kernel.precompile(warm_cache_only=True)
    (result,) = kernel.compile_results
    asm = result.kernel.asm
    return Kernel(name, source, dict(result.config.kwargs), asm["ptx"], disassemble(asm["cubin"]))


def disassemble(cubin: bytes) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        done = subprocess.run([tool, "-c", file], capture_output=True, text=True, check=True)
    return done.stdout


_MODULES: list[tempfile.TemporaryDirectory[str]] = []


def _module(source: str) -> ModuleType:
    """The source as a module of its own file, which Triton reads again."""
    folder = tempfile.TemporaryDirectory()
    _MODULES.append(folder)
    path = Path(folder.name) / f"generated_{len(_MODULES)}.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


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

    def __init__(self, kernel: Kernel) -> None:
        before, _, after = kernel.source.partition("@triton.jit")
        imports = re.sub(r"@triton_heuristics\..*", "", before, flags=re.DOTALL)
        self.function = getattr(_module(f"{imports}\n@triton.jit{after}"), kernel.name)
        self.function.fn.__globals__["libdevice"] = _libdevice()
        signature = re.search(r"def \w+\((.*?)\):", after, re.DOTALL)
        assert signature is not None
        names = [name.strip() for name in signature[1].split(",")]
        self.names = [name for name in names if ":" not in name]
        self.constants = {
            name.split(":")[0].strip(): kernel.config[name.split(":")[0].strip()]
            for name in names
            if ":" in name
        }

    def run(self, *args: Any, stream: object = None) -> None:
        given = dict(zip(self.names, args, strict=True))
        assert "ynumel" not in given, "a grid of two dimensions: teach it to this class"
        programs = -(-given["xnumel"] // self.constants.get("XBLOCK", 1))
        with np.errstate(all="ignore"):
            self.function[(programs,)](*args, **self.constants)


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
    kernels = {kernel.name: _Interpreted(kernel) for kernel in emitted.kernels}

    class Compile:
        def triton(self, name: str, source: str, **more: Any) -> _Interpreted:
            return kernels[name]

        def wait(self, scope: object) -> None:
            pass

    code = emitted.wrapper
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


# ---- the two processes ---------------------------------------------------------------------------


def _steps(role: str, given: list[Any]) -> Iterator[Any]:
    if role == "emit":
        from torch._inductor import config

        config.use_static_triton_launcher = False  # keeps the PTX of a compiled kernel
        install_fake_gpu()
        yield from map(_emit, given)
    else:
        mend_interpreter()
        yield from map(_interpret, given)


def main() -> None:
    role, file = sys.argv[1:]
    torch.save(list(_steps(role, torch.load(file, weights_only=False))), file)


if __name__ == "__main__":
    # Under its own name, so that what is stored is found again by the tests.
    from tests.inductor import fake_gpu

    fake_gpu.main()
