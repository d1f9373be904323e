"""A model of a kernel's time on the GPU: what its memory and its instructions take at least.

    memory  = (bytes read + bytes written) / (0.92 * DRAM bandwidth)
    compute = max over kinds of threads * instructions of the kind / (lanes * units * clock)
    time    = max(memory, compute)

Not in it: launches, latencies, caches, how many warps a register count lets run, clocks under
power limits. It says which kernels cannot reach the memory's speed, not how fast one is.
"""

from __future__ import annotations

from dataclasses import dataclass

from rfcompile.emission.gpus import GPU
from rfcompile.emission.machine_code import MachineCode

REACHED = 0.92
"""The share of the data sheet's bandwidth that a large copy reaches: about what copies are reported
to reach on these GPUs, not measured here."""


@dataclass(frozen=True)
class Estimate:
    """Seconds of one launch, by the model of this module."""

    memory: float
    compute: float

    @property
    def time(self) -> float:
        return max(self.memory, self.compute)

    @property
    def share(self) -> float:
        """Of the memory's speed: 1 where the instructions take less time than the bytes."""
        return self.memory / self.time if self.time else 1.0


def estimate(code: MachineCode, nbytes: int, gpu: GPU) -> Estimate:
    """The time of one launch that moves so many bytes."""
    threads = code.programs * code.warps * gpu.warp
    work = {**code.instructions, "issue": code.instructions_of_thread}
    compute = max(
        threads * count / (gpu.lanes[kind] * gpu.units * gpu.clock) for kind, count in work.items()
    )
    return Estimate(memory_time(nbytes, gpu), compute)


def memory_time(nbytes: int, gpu: GPU) -> float:
    """Seconds that the memory takes for so many bytes."""
    return nbytes / (REACHED * gpu.dram)
