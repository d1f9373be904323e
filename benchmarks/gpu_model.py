"""The operators that ``gpu.py`` times, and what a model says of their generated kernels: that of
``rfcompile/emission/roofline.py``.

``python benchmarks/gpu_model.py TARGET NUMEL FORMAT...`` prints the shares as JSON. It is a process
of its own that sees no GPU: one that is there is no model of itself.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

import rfcompile.inductor.lowering  # noqa: F401  # registers the lowerings
from rfcompile.codec import operators
from rfcompile.codec.triton_codec import has_triton
from rfcompile.emission.absent_gpu import install
from rfcompile.emission.capture import CapturedGraph
from rfcompile.emission.child import in_children
from rfcompile.emission.emit import compiled_launch, emit
from rfcompile.emission.gpus import GPU, GPUS, gpu_of
from rfcompile.emission.roofline import estimate, memory_time

ROWS = 8
Shares = dict[str, dict[str, float]]
"""By the format and the operator."""


def calls_of(fmt: str) -> dict[str, Callable[[Tensor], Tensor]]:
    """The four operators, each as a function of the one tensor that it codes or decodes."""
    return {
        "quantize": lambda x: operators.quantize(x, fmt),
        "dequantize": lambda p: operators.dequantize(p, fmt, torch.bfloat16),
        "dequantize_sum": lambda p: operators.dequantize_sum(p, fmt, torch.bfloat16),
        "requantize": lambda p: operators.requantize(p, fmt),
    }


def modelled_shares(formats: Sequence[str], numel: int, device: str) -> Shares:
    """The time of the least bytes over the modelled time of all kernels, for 8 rows of bfloat16.

    Nothing where there is no model; it is printed why.
    """
    target = _target(device)
    if target not in GPUS or not has_triton():
        why = "no Triton here" if target in GPUS else f"no sizes of {target} in emission/gpus.py"
        print(f"no modelled shares: {why}")
        return {}
    done = subprocess.run(
        [sys.executable, __file__, target, str(numel), *formats],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        print(f"no modelled shares: {done.stderr[-500:]}")
        return {}
    shares: Shares = json.loads(done.stdout.splitlines()[-1])
    return shares


def _target(device: str) -> str:
    """Of the GPU here; for a dry run that of an H100."""
    if device == "cpu":
        return "sm_90"
    if torch.version.hip:
        return torch.cuda.get_device_properties(0).gcnArchName.partition(":")[0]
    return "sm_{}{}".format(*torch.cuda.get_device_capability())


def _share(job: tuple[str, str], numel: int, gpu: GPU) -> float:
    fmt, name = job
    emission = emit(_graph_of(calls_of(fmt)[name], _like(fmt, name, numel)))
    seconds, least = 0.0, 0
    for launch in emission.launches:
        (code,) = compiled_launch(launch, emission.kernels[launch.kernel])
        seconds += estimate(code, launch.read + launch.written, gpu).time
        least += launch.least
    return memory_time(least, gpu) / seconds


def _like(fmt: str, name: str, numel: int) -> Tensor:
    """An input of the operator; its values do not matter."""
    x = torch.empty(ROWS, numel // ROWS, dtype=torch.bfloat16, device="meta")
    given = x if name == "quantize" else operators.quantize(x, fmt)
    return torch.empty(given.shape, dtype=given.dtype)


def _graph_of(call: Callable[[Tensor], Tensor], given: Tensor) -> CapturedGraph:
    from torch._inductor.decomposition import select_decomp_table
    from torch.fx.experimental.proxy_tensor import make_fx

    trace = make_fx(
        lambda x: [call(x)], decomposition_table=select_decomp_table(), tracing_mode="fake"
    )
    return CapturedGraph(trace(given), "forward", is_inference=True)


def main() -> None:
    target, numel, *formats = sys.argv[1:]
    gpu = gpu_of(target)
    jobs = [(fmt, name) for fmt in formats for name in calls_of(fmt)]
    work = partial(_share, numel=int(numel), gpu=gpu)
    shares: Shares = {fmt: {} for fmt in formats}
    processes = min(8, os.cpu_count() or 1)
    for number, share in in_children(partial(install, gpu), work, jobs, processes):
        fmt, name = jobs[number]
        shares[fmt][name] = share
    print(json.dumps(shares))


if __name__ == "__main__":
    main()
