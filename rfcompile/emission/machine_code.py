"""What Triton makes of a kernel for the GPU: registers, spills, shared memory, instructions.

The text that is read is what the GPU would run: SASS from the disassembler that Triton brings, on
AMD the assembler text that Triton writes itself.

Private parts used here, run with torch 2.13.0 and Triton 3.7.1: of the kernels that Inductor writes
``configs``, ``precompile(warm_cache_only=)`` and ``compile_results``; ``asm`` and
``metadata.shared`` of what Triton compiled.
"""

from __future__ import annotations

import importlib.util
import math
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from rfcompile.errors import EmissionError

WIDEST_BLOCK = 32
"""Reductions of wider blocks are left out: one may take a minute, and autotuning drops it."""


@dataclass(frozen=True)
class MachineCode:
    """A kernel, compiled with one of its configurations.

    Args:
        config: its block sizes.
        warps: a block has so many.
        registers: of a thread.
        spilled: bytes of local memory a thread, 0 where all fits into registers.
        shared: bytes of shared memory a block.
        loads, stores: instructions to and from global memory by the bits that each moves; an
            atomic one is a store.
        instructions: of a thread, by kind (``GPU.lanes``); loops count by their trips.
        programs: blocks that are launched.
        ir: PTX, or on AMD the assembler text.
        text: what the GPU runs.
    """

    config: dict[str, int]
    warps: int
    registers: int
    spilled: int
    shared: int
    loads: dict[int, int]
    stores: dict[int, int]
    instructions: dict[str, float]
    programs: int
    ir: str
    text: str

    @property
    def instructions_of_thread(self) -> float:
        return sum(self.instructions.values())


def compile_kernel(
    name: str, source: str, numels: Mapping[str, int], *, every_config: bool = False
) -> list[MachineCode]:
    """Compile a generated kernel for the GPU that ``absent_gpu.install`` installed.

    Only the widest of the configurations that Inductor would try on the GPU, unless
    ``every_config``; of reductions none that is wider than WIDEST_BLOCK.

    Args:
        numels: sizes of its loops, "x", "y", "r0_".

    Raises:
        EmissionError: Triton cannot compile it.
    """
    kernel = getattr(load_module(source), name)
    kernel.configs = _chosen(kernel.configs, is_reduction="r0_numel" in source, every=every_config)
    try:
        kernel.precompile(warm_cache_only=True)
    except Exception as error:
        reason = f"Triton cannot compile it: {type(error).__name__}: {error}"
        raise EmissionError(f"kernel {name}", "", reason) from error
    return [_read(result, source, numels) for result in kernel.compile_results]


def _chosen(configs: Sequence[Any], *, is_reduction: bool, every: bool) -> list[Any]:
    usable = [c for c in configs if not is_reduction or c.kwargs["XBLOCK"] <= WIDEST_BLOCK]
    usable = usable or [min(configs, key=_width)]
    return usable if every else [max(usable, key=_width)]


def _width(config: Any) -> int:
    result = 1
    for size in config.kwargs.values():
        result *= size if isinstance(size, int) else 1
    return result


def _read(result: Any, source: str, numels: Mapping[str, int]) -> MachineCode:
    sizes = {k: v for k, v in result.config.kwargs.items() if isinstance(v, int)}
    programs = _programs(sizes, numels)
    return machine_code_of(result.kernel, sizes, programs, trips=[_trips(sizes, numels)])


def machine_code_of(
    compiled: Any, config: dict[str, int], programs: int, *, trips: Sequence[int] = (1,)
) -> MachineCode:
    """What Triton compiled (its ``CompiledKernel``); ``trips`` of its loops, outer first."""
    asm = compiled.asm
    common = {
        "config": config,
        "warps": compiled.metadata.num_warps,
        "shared": int(compiled.metadata.shared),
        "programs": programs,
    }
    if "cubin" in asm:
        sass, usage = _disassembled(asm["cubin"])
        code = list(_sass(sass))
        found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
        assert found is not None, usage
        return MachineCode(
            registers=int(found[1]),
            spilled=int(found[2]) + int(found[3]),
            loads=_widths(code, "LDG", _sass_bits),
            stores=_widths(code, "STG|RED|ATOM", _sass_bits),
            instructions=_counted(code, trips, _sass_kind),
            ir=asm["ptx"],
            text=sass,
            **common,
        )
    text = asm["amdgcn"]
    code = list(_gcn(text))
    return MachineCode(
        registers=_metadata(text, "vgpr_count"),
        spilled=_metadata(text, "private_segment_fixed_size"),
        loads=_widths(code, "(global|buffer|flat)_load", _gcn_bits),
        stores=_widths(code, "(global|buffer|flat)_(store|atomic)", _gcn_bits),
        instructions=_counted(code, trips, _gcn_kind),
        ir=text,
        text=text,
        **common,
    )


def _programs(sizes: Mapping[str, int], numels: Mapping[str, int]) -> int:
    result = 1
    for axis in ("x", "y", "z"):
        if axis in numels:
            result *= -(-numels[axis] // sizes.get(f"{axis.upper()}BLOCK", 1))
    return result


def _trips(sizes: Mapping[str, int], numels: Mapping[str, int]) -> int:
    """How often a loop over what is reduced runs; a persistent reduction has no such loop."""
    return -(-numels["r0_"] // sizes["R0_BLOCK"]) if "R0_BLOCK" in sizes else 1


# ---- instructions --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Instruction:
    """``name`` with its modifiers; ``jump``: a loop begins so many instructions before it, or 0."""

    name: str
    jump: int = 0


def _counted(code: Sequence[Instruction], trips: Sequence[int], kind_of: Any) -> dict[str, float]:
    """Instructions by kind; those in a loop count by its trips, the outer loop's come first."""
    ends = {end - one.jump: end for end, one in enumerate(code) if one.jump}  # the last of each
    found: Counter[str] = Counter()
    for place, instruction in enumerate(code):
        depth = sum(start <= place <= end for start, end in ends.items())
        found[kind_of(instruction.name)] += math.prod(trips[:depth])
    return dict(found)


def _widths(code: Sequence[Instruction], pattern: str, bits: Any) -> dict[int, int]:
    found = Counter(bits(i.name) for i in code if re.match(pattern, i.name))
    return dict(sorted(found.items(), reverse=True))


_SASS_LINE = re.compile(
    r"^(?P<label>\.L\w+):|^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?(?P<name>[A-Z][\w.]*)"
    r"(?:[^;`]*`\((?P<to>\.L\w+)\))?",
    re.MULTILINE,
)
_GCN_LINE = re.compile(
    r"^(?P<label>\.LBB\w+):|^\s+(?P<name>(?:[vs]|global|buffer|flat|ds|scratch)_\w+)"
    r"(?:\s+(?P<to>\.LBB\w+))?",
    re.MULTILINE,
)


def _sass(text: str) -> Iterator[Instruction]:
    return (i for i in _instructions(_SASS_LINE, text, "BRA") if i.name != "NOP")


def _gcn(text: str) -> Iterator[Instruction]:
    return _instructions(_GCN_LINE, text, "s_c?branch")


def _instructions(line: re.Pattern[str], text: str, branch: str) -> Iterator[Instruction]:
    labels: dict[str, int] = {}
    number = 0
    for match in line.finditer(text):
        if match["label"]:
            labels[match["label"]] = number
            continue
        to = labels.get(match["to"] or "") if re.match(branch, match["name"]) else None
        yield Instruction(match["name"], 0 if to is None else number - to)
        number += 1


_SASS_BITS = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128, "256": 256}
_FLOAT = {"FFMA", "FMUL", "FADD", "FFMA2", "FADD2", "FMUL2", "HFMA2", "HADD2", "HMUL2"}
_SPECIAL = {"MUFU", "F2I", "I2F", "FRND", "F2F", "POPC", "FLO", "BREV"}
_MEMORY = {"LDG", "STG", "LDS", "STS", "LDL", "STL", "SHFL", "ATOMG", "RED", "REDUX", "LDSM"}
_CONTROL = {
    *("BRA", "EXIT", "BAR", "BSSY", "BSYNC", "RET", "CALL", "S2R", "S2UR", "CS2R", "DEPBAR"),
    *("WARPSYNC", "LDC", "LDCU", "ULDC"),
}


def _sass_bits(name: str) -> int:
    return next((_SASS_BITS[part] for part in name.split(".") if part in _SASS_BITS), 32)


def _sass_kind(name: str) -> str:
    base = name.split(".")[0]
    if base in _FLOAT:
        return "float"
    if base.startswith("IMAD"):
        return "multiply"
    if base in _SPECIAL:
        return "special"
    if base in _MEMORY:
        return "memory"
    return "issue" if base in _CONTROL or base.startswith("U") else "logic"


_GCN_BITS = {"dwordx4": 128, "dwordx3": 96, "dwordx2": 64, "dword": 32}


def _gcn_bits(name: str) -> int:
    last = name.removesuffix("_d16_hi").removesuffix("_d16").split("_")[-1]
    return _GCN_BITS.get(last, 8 if "byte" in last else 16 if "short" in last else 32)


def _gcn_kind(name: str) -> str:
    if name.startswith(("global", "buffer", "flat", "ds", "scratch")):
        return "memory"
    if name.startswith("s_"):
        return "issue"
    if re.match(r"v_(rcp|rsq|sqrt|exp|log|sin|cos)", name):
        return "special"
    if re.match(r"v_(mul|mad)_(lo|hi|u64|i64)", name):
        return "multiply"
    return "float" if re.search(r"_f(16|32|64)", name) else "logic"


def _metadata(text: str, key: str) -> int:
    found = re.search(rf"\.{key}:\s+(\d+)", text)
    assert found is not None, f"no {key} in the assembler text"
    return int(found[1])


def _disassembled(cubin: bytes) -> tuple[str, str]:
    """SASS, and what NVIDIA's tool says of registers and memory."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        sass, usage = (
            subprocess.run(
                [tools / tool, option, file], capture_output=True, text=True, check=True
            ).stdout
            for tool, option in (("nvdisasm", "-c"), ("cuobjdump", "--dump-resource-usage"))
        )
    return sass, usage


# ---- sources as modules --------------------------------------------------------------------------

_FOLDERS: list[tempfile.TemporaryDirectory[str]] = []


def load_module(source: str) -> ModuleType:
    """The source as a module of its own file, which Triton reads again."""
    folder = tempfile.TemporaryDirectory()
    _FOLDERS.append(folder)
    path = Path(folder.name) / f"generated_{len(_FOLDERS)}.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module
