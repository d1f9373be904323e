"""The model of a kernel's time."""

from __future__ import annotations

from dataclasses import replace

import pytest

from rfcompile.emission.gpus import GPUS, gpu_of
from rfcompile.emission.machine_code import MachineCode
from rfcompile.emission.roofline import REACHED, estimate, memory_time
from rfcompile.errors import OptionError

CODE = MachineCode(
    config={"XBLOCK": 256}, warps=4, registers=32, spilled=0, shared=0, loads={128: 1},
    stores={64: 1}, instructions={"float": 10.0, "logic": 30.0}, programs=1000, ir="", text="",
)  # fmt: skip


def test_a_kernel_of_few_instructions_takes_the_time_of_its_bytes() -> None:
    gpu = gpu_of("sm_90")
    found = estimate(CODE, 10**9, gpu)
    assert found.time == found.memory == memory_time(10**9, gpu) == 1e9 / (REACHED * 3.35e12)
    assert found.share == 1


def test_the_busiest_kind_of_instruction_sets_the_time() -> None:
    gpu = gpu_of("sm_90")
    found = estimate(CODE, 1, gpu)
    threads = 1000 * 4 * 32
    assert found.compute == threads * 30 / (64 * gpu.units * gpu.clock)  # more than 40 / 128
    assert found.time == found.compute
    assert found.share == pytest.approx(found.memory / found.compute)


def test_every_instruction_is_issued() -> None:
    gpu = gpu_of("sm_90")
    even = replace(CODE, instructions={"float": 60.0, "logic": 30.0, "multiply": 30.0})
    assert estimate(even, 1, gpu).compute == 128000 * 120 / (128 * gpu.units * gpu.clock)


@pytest.mark.parametrize("gpu", GPUS.values(), ids=GPUS)
def test_a_gpu_has_lanes_for_every_kind(gpu: object) -> None:
    assert gpu.lanes.keys() == {"float", "multiply", "logic", "special", "memory", "issue"}
    assert gpu.device_properties()["warp_size"] == (64 if gpu.is_amd else 32)


def test_an_unknown_target_is_told_the_known_ones() -> None:
    with pytest.raises(OptionError, match=r"target='sm_1' .* sm_80 \(NVIDIA A100\), sm_90"):
        gpu_of("sm_1")
