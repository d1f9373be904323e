"""Kernels of the package that a graph calls where Inductor cannot generate one launch: rotations.

Private parts used here, run with torch 2.13.0 and Triton 3.7.1: ``_inductor.ir.FallbackKernel``;
of a Triton function ``warmup``, ``runtime.jit.MockTensor``.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx
from torch._inductor import ir

from rfcompile.codec import operators, triton_codec
from rfcompile.codec.formats import QuantFormat
from rfcompile.emission.machine_code import MachineCode, machine_code_of
from rfcompile.errors import EmissionError


@dataclass(frozen=True)
class Call:
    """A call of one of the codec's operators.

    Args:
        operator: "quantize", "dequantize", "dequantize_sum" or "requantize".
        shape, stride, dtype: of the tensor that it is given.
        format: its text.
        options: the arguments after the format, by name.
    """

    operator: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    format: str
    options: tuple[tuple[str, Any], ...]

    @property
    def kernel(self) -> str:
        """The name of the kernel; calls share it only if all of them is the same but the seed."""
        options = (value for name, value in self.options if name != "seed")
        words = (self.operator, self.format, *self.shape, self.dtype, *options)
        text = "_".join(str(word).removeprefix("torch.") for word in words)
        return "".join(letter if letter.isalnum() else "_" for letter in f"codec_{text}")

    @property
    def rows(self) -> int:
        return self.shape[0]


def call_of(node: Any) -> Call | None:
    """What a node of Inductor calls, if it is a kernel of the package."""
    op: Any = getattr(node, "op_overload", None)
    if not isinstance(node, ir.FallbackKernel) or op not in operators.FORMULAS:
        return None
    (origin,) = (one for one in node.get_origins() if one.target is op)
    given, text = origin.args[:2]
    assert isinstance(given, fx.Node)
    assert isinstance(text, str)
    if not triton_codec.runs_on(torch.device("cuda"), QuantFormat.parse(text)):
        return None
    value: Tensor = given.meta["val"]
    names = [argument.name for argument in op._schema.arguments]
    options = dict(zip(names[2:], origin.args[2:], strict=False)) | origin.kwargs
    return Call(
        operator=op._schema.name.partition("::")[2],
        shape=tuple(value.shape),
        stride=tuple(value.stride()),
        dtype=value.dtype,
        format=text,
        options=tuple(options.items()),
    )


def source_of_kernels() -> str:
    """The module that holds the kernels."""
    return Path(inspect.getfile(triton_codec)).with_name("triton_kernels.py").read_text("utf-8")


def compile_call(call: Call) -> MachineCode:
    """Compile the kernel of a call for the GPU that ``absent_gpu.install`` installed.

    Raises:
        EmissionError: Triton cannot compile it.
    """
    from triton.runtime.jit import MockTensor

    made: list[MachineCode] = []

    def compiled(kernel: Any, programs: int, arguments: tuple[Any, ...], **options: Any) -> None:
        given = [MockTensor(a.dtype) if isinstance(a, Tensor) else a for a in arguments]
        done = kernel.warmup(*given, grid=(programs,), **options)
        rows_after_the_first = max(call.rows - 1, 1)
        config = {"BLOCK": arguments[-1]}
        made.append(machine_code_of(done, config, programs, trips=rows_after_the_first))

    x = torch.empty_strided(call.shape, call.stride, dtype=call.dtype, device="meta")
    options: Mapping[str, Any] = dict(call.options)
    try:
        with mock.patch.object(triton_codec, "_run", compiled):
            getattr(triton_codec, call.operator)(x, QuantFormat.parse(call.format), **options)
    except Exception as error:
        reason = f"Triton cannot compile it: {type(error).__name__}: {error}"
        raise EmissionError(f"kernel {call.kernel}", "", reason) from error
    (code,) = made
    return code
