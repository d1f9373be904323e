"""The GPUs that kernels are emitted for: what torch and Triton ask of a device, and its speed.

Sizes (multiprocessors, registers, shared memory, warp) and peak speeds (DRAM, clock) are those of
the makers' data sheets: NVIDIA A100, H100 SXM and HGX B200 data sheets, AMD Instinct MI300X data
sheet. Lanes a clock follow the table "throughput of native arithmetic instructions" of the CUDA C++
programming guide, and for AMD the CDNA 3 white paper: four vector units of 16 lanes a compute unit.
None of them was measured here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rfcompile.errors import OptionError

NVIDIA_LANES: Mapping[str, int] = {
    "float": 128,  # add, multiply, multiply-add of float32
    "multiply": 64,  # of 32-bit integers
    "logic": 64,  # integer add, shift, compare, select, and, or
    "special": 16,  # conversions from and to float, reciprocals, roots
    "memory": 32,  # loads, stores, shuffles
    "issue": 128,  # four schedulers of one warp
}
AMD_LANES: Mapping[str, int] = {
    "float": 64,
    "multiply": 16,  # of 32-bit integers: a quarter
    "logic": 64,
    "special": 16,
    "memory": 16,
    "issue": 64,
}


@dataclass(frozen=True)
class GPU:
    """A target of code generation.

    Args:
        target: "sm_90" or "gfx942", as compilers call it.
        dram: peak bytes a second of its memory.
        clock: hertz under load (NVIDIA: the boost clock).
        units: multiprocessors or compute units.
        lanes: results a clock and unit, by kind of instruction.
    """

    target: str
    name: str
    capability: tuple[int, int]
    dram: float
    clock: float
    units: int
    memory: int
    l2: int
    shared_per_block: int
    shared_per_unit: int
    lanes: Mapping[str, int]
    warp: int = 32
    registers: int = 65536

    @property
    def is_amd(self) -> bool:
        return self.target.startswith("gfx")

    def device_properties(self) -> dict[str, Any]:
        """What ``torch.cuda.get_device_properties`` has, as far as Inductor asks."""
        return {
            "name": self.name,
            "major": self.capability[0],
            "minor": self.capability[1],
            "multi_processor_count": self.units,
            "total_memory": self.memory,
            "max_threads_per_multi_processor": 2048,
            "max_threads_per_block": 1024,
            "L2_cache_size": self.l2,
            "regs_per_multiprocessor": self.registers,
            "warp_size": self.warp,
            "gcnArchName": f"{self.target}:sramecc+:xnack-" if self.is_amd else "",
            "shared_memory_per_block": 65536 if self.is_amd else 49152,
            "shared_memory_per_block_optin": self.shared_per_block,
            "shared_memory_per_multiprocessor": self.shared_per_unit,
        }


GPUS = {
    gpu.target: gpu
    for gpu in (
        GPU(
            target="sm_80",
            name="NVIDIA A100",
            capability=(8, 0),
            dram=2.039e12,
            clock=1.41e9,
            units=108,
            memory=80 << 30,
            l2=40 << 20,
            shared_per_block=166912,
            shared_per_unit=167936,
            lanes={**NVIDIA_LANES, "float": 64},
        ),
        GPU(
            target="sm_90",
            name="NVIDIA H100",
            capability=(9, 0),
            dram=3.35e12,
            clock=1.755e9,
            units=132,
            memory=80 << 30,
            l2=50 << 20,
            shared_per_block=232448,
            shared_per_unit=233472,
            lanes=NVIDIA_LANES,
        ),
        GPU(
            target="sm_100",
            name="NVIDIA B200",
            capability=(10, 0),
            dram=8.0e12,
            clock=1.85e9,
            units=148,
            memory=180 << 30,
            l2=126 << 20,
            shared_per_block=232448,
            shared_per_unit=233472,
            lanes=NVIDIA_LANES,
        ),
        GPU(
            target="gfx942",
            name="AMD Instinct MI300X",
            capability=(9, 4),
            dram=5.3e12,
            clock=2.1e9,
            units=304,
            memory=192 << 30,
            l2=4 << 20,
            shared_per_block=65536,
            shared_per_unit=65536,
            lanes=AMD_LANES,
            warp=64,
            registers=131072,
        ),
    )
}


def gpu_of(target: str) -> GPU:
    """The GPU of a target.

    Raises:
        OptionError: there is none of that name.
    """
    if target not in GPUS:
        rule = f"use one of {', '.join(f'{gpu.target} ({gpu.name})' for gpu in GPUS.values())}."
        raise OptionError("target", target, rule)
    return GPUS[target]
