"""The Triton kernels of the codec without a GPU: interpreted, or compiled for an absent one.

``python -m tests.codec.triton_process ROLE FILE`` is a process of its own: "interpret" needs
``TRITON_INTERPRET=1`` before it imports Triton, and a GPU's name replaces parts of torch. FILE
holds a list of cases and receives what became of each; :func:`run` does all of this.
"""

from __future__ import annotations

import os
import subprocess
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rfcompile.codec import arithmetic, operators, triton_codec
from rfcompile.codec.formats import QuantFormat
from rfcompile.emission.absent_gpu import install
from rfcompile.emission.called import Call, compile_call, steps_of
from rfcompile.emission.gpus import gpu_of
from rfcompile.emission.machine_code import MachineCode
from tests.inductor import fake_gpu

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Case:
    """All operators in one format, for ``rows`` rows of ``numel`` elements."""

    format: str
    dtype: torch.dtype = torch.bfloat16
    rows: int = 3
    numel: int = 3000
    average: bool = False
    is_transposed: bool = False

    def given(self) -> Tensor:
        """Wide values, as many as there are; see ``fake_gpu.Case.given``."""
        least = max(self.rows * self.numel, 4096)
        values = fake_gpu.Case("quantize", self.format, 1, least, self.dtype).given().view(-1)
        x = values[-self.rows * self.numel :] if self.rows * self.numel else values[:0]
        shape = (self.numel, self.rows) if self.is_transposed else (self.rows, self.numel)
        return x.reshape(shape).t() if self.is_transposed else x.reshape(shape)


def run(role: str, cases: list[Case], folder: Path) -> list[Any]:
    """Of each case: for "interpret" what differs ("" for nothing), for a GPU its kernels there."""
    file = folder / f"{role}.pt"
    torch.save(cases, file)
    interprets = str(int(role == "interpret"))
    done = subprocess.run(
        [sys.executable, "-m", "tests.codec.triton_process", role, str(file)],
        env=os.environ
        | {"TRITON_INTERPRET": interprets, "TRITON_CACHE_DIR": str(folder / "triton")},
        cwd=ROOT, capture_output=True, text=True, timeout=1800, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    found: list[Any] = torch.load(file, weights_only=False)
    return found


def both(case: Case, codec: Any = triton_codec) -> dict[str, tuple[Tensor, Tensor]]:
    """By operator, the result of the codec's kernel and that of the formula."""
    fmt, dtype, average = QuantFormat.parse(case.format), case.dtype, case.average
    x = case.given()
    payload = arithmetic.quantize(x, fmt, 5)
    return {
        name: (getattr(codec, name)(*arguments), getattr(arithmetic, name)(*arguments))
        for name, arguments in (
            ("quantize", (x, fmt, 5)),
            ("dequantize", (payload, fmt, dtype)),
            ("dequantize_sum", (payload, fmt, dtype, average)),
            ("requantize", (payload, fmt, average, 3)),
        )
    }


def differing(got: Tensor, expected: Tensor) -> str:
    """In their bits, but for which NaN it is."""
    if got.shape != expected.shape or got.dtype != expected.dtype:
        return f"{got.dtype} {got.shape} for {expected.dtype} {expected.shape}"
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[expected.itemsize]
    is_nan = expected.isnan() & got.isnan()
    wrong = int(((got.view(bits) != expected.view(bits)) & ~is_nan).sum())
    return f"{wrong} of {expected.numel()} elements differ" if wrong else ""


def _interpret(case: Case) -> str:
    try:
        found = {name: differing(*pair) for name, pair in both(case).items()}
    except Exception as error:
        return "".join(traceback.format_exception(error))[-2000:]
    return ", ".join(f"{name}: {text}" for name, text in found.items() if text)


def _compile(case: Case) -> dict[str, MachineCode]:
    """The operators' kernels, as a launch would compile them for the sizes of the case."""
    x = torch.empty(case.rows, case.numel, dtype=case.dtype, device="meta")
    payload = operators.quantize(x, case.format)
    made: dict[str, MachineCode] = {}
    for operator, given, options in (
        ("quantize", x, ()),
        ("dequantize", payload, (("dtype", case.dtype),)),
        ("dequantize_sum", payload, (("dtype", case.dtype), ("average", case.average))),
        ("requantize", payload, (("average", case.average),)),
    ):
        shape, stride = tuple(given.shape), tuple(given.stride())
        call = Call(operator, shape, stride, given.dtype, case.format, options)
        for step in steps_of(call):
            made[step.call.function] = compile_call(step.call)
    return made


def main() -> None:
    role, file = sys.argv[1:]
    if role == "interpret":
        from rfcompile.codec import triton_tensor_codec

        fake_gpu.mend_interpreter()
        triton_tensor_codec.MOST_PROGRAMS = 2  # so that a program has several pieces
    else:
        install(gpu_of(role))
    step = _interpret if role == "interpret" else _compile
    torch.save([step(case) for case in torch.load(file, weights_only=False)], file)


if __name__ == "__main__":
    # Under its own name, so that what is stored is found again by the tests.
    from tests.codec import triton_process

    triton_process.main()
