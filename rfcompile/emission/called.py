"""Kernels of the package that a graph calls where Inductor would generate more launches.

Private parts used here, run with torch 2.13.0 and Triton 3.7.1: ``_inductor.ir.FallbackKernel``;
of a Triton function ``arg_names``, ``warmup``, ``runtime.jit.MockTensor``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx
from torch._inductor import ir

from rfcompile.codec import operators, triton_codec, triton_launch
from rfcompile.codec.formats import QuantFormat
from rfcompile.emission.machine_code import MachineCode, machine_code_of
from rfcompile.errors import EmissionError


@dataclass(frozen=True)
class Call:
    """A call of one of the codec's operators, or one launch of it.

    Args:
        operator: "quantize", "dequantize", "dequantize_sum" or "requantize".
        shape, stride, dtype: of the tensor that it is given.
        format: its text.
        options: the arguments after the format, by name.
        step: which launch of the call.
        function: the Triton function that is launched.
    """

    operator: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    format: str
    options: tuple[tuple[str, Any], ...]
    step: int = 0
    function: str = ""

    @property
    def kernel(self) -> str:
        """The name of the kernel; calls share it only if all of them is the same but the seed."""
        options = (value for name, value in self.options if name != "seed")
        words = (self.function, self.format, *self.shape, self.dtype, *options)
        text = "_".join(str(word).removeprefix("torch.") for word in words)
        return "".join(letter if letter.isalnum() else "_" for letter in f"codec_{text}")

    @property
    def source(self) -> str:
        """The modules that hold the kernel."""
        folder = Path(triton_codec.__file__).parent
        is_tensor = QuantFormat.parse(self.format).group_size is None
        names = ("triton_parts.py", "triton_tensors.py" if is_tensor else "triton_kernels.py")
        return "\n\n".join((folder / name).read_text("utf-8") for name in names)


@dataclass(frozen=True)
class Step:
    """One launch of a call.

    Args:
        reads, writes: bytes, by "given", "made", or the number of a tensor between launches.
    """

    call: Call
    reads: dict[str, int]
    writes: dict[str, int]
    kernel: Any
    programs: int
    arguments: tuple[Any, ...]
    options: Mapping[str, Any]


def call_of(node: Any) -> Call | None:
    """What a node of Inductor calls, if it is an operator of the package."""
    op: Any = getattr(node, "op_overload", None)
    if not isinstance(node, ir.FallbackKernel) or op not in operators.FORMULAS:
        return None
    (origin,) = (one for one in node.get_origins() if one.target is op)
    given, text = origin.args[:2]
    assert isinstance(given, fx.Node)
    assert isinstance(text, str)
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


def steps_of(call: Call) -> list[Step]:
    """The launches of a call. Of the tensors of a launch the last one is written."""
    launched: list[tuple[Any, int, tuple[Any, ...], dict[str, Any]]] = []

    def launch(kernel: Any, programs: int, arguments: tuple[Any, ...], **options: Any) -> None:
        launched.append((kernel, programs, arguments, options))

    x = torch.empty_strided(call.shape, call.stride, dtype=call.dtype, device="meta")
    options: Mapping[str, Any] = dict(call.options)
    with mock.patch.object(triton_launch, "launch", launch):
        made = getattr(triton_codec, call.operator)(x, QuantFormat.parse(call.format), **options)
    names: dict[int, str] = {id(made): "made"}
    steps = []
    for number, (kernel, programs, arguments, how) in enumerate(launched):
        tensors = [argument for argument in arguments if isinstance(argument, Tensor)]
        if number == 0:
            names[id(tensors[0])] = "given"  # or a copy of it in one piece
        nbytes = {names.setdefault(id(t), str(len(names))): t.nbytes for t in tensors}
        written = names[id(tensors[-1])]
        writes = {written: nbytes.pop(written)}
        step = replace(call, step=number, function=kernel.__name__)
        steps.append(Step(step, nbytes, writes, kernel, programs, arguments, how))
    return steps


def compile_call(call: Call) -> MachineCode:
    """Compile the kernel of a launch for the GPU that ``absent_gpu.install`` installed.

    Raises:
        EmissionError: Triton cannot compile it.
    """
    try:
        return _compiled(steps_of(call)[call.step])
    except Exception as error:
        reason = f"Triton cannot compile it: {type(error).__name__}: {error}"
        raise EmissionError(f"kernel {call.kernel}", "", reason) from error


def _compiled(step: Step) -> MachineCode:
    from triton.runtime.jit import MockTensor

    given = [MockTensor(a.dtype) if isinstance(a, Tensor) else a for a in step.arguments]
    done = step.kernel.warmup(*given, grid=(step.programs,), **step.options)
    names: Sequence[str] = step.kernel.arg_names
    named = dict(zip(names, step.arguments, strict=True))
    trips = [-(-named["pieces"] // named["P"])] if "P" in named else []
    trips.append(max(step.call.shape[0] - 1, 1))  # rows after the first
    return machine_code_of(done, {names[-1]: step.arguments[-1]}, step.programs, trips=trips)
