"""The public function kernels: a report on the GPU kernels of a model, without the GPU."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import fx, nn

from rfcompile.emission.absent_gpu import check_triton, install
from rfcompile.emission.capture import CapturedGraph, capture
from rfcompile.emission.child import in_children
from rfcompile.emission.emit import Emission, Launch, compiled_launch, emit
from rfcompile.emission.gpus import GPU, gpu_of
from rfcompile.emission.machine_code import MachineCode
from rfcompile.emission.report import GraphKernels, KernelReport, model_text
from rfcompile.errors import CaptureError
from rfcompile.graph.capture import inputs_of
from rfcompile.graph.models import check_module, copy_of, is_compiled_for_wire, uncompiled
from rfcompile.graph.one_step import state_kept
from rfcompile.report import journal
from rfcompile.report.step import merge_reports
from rfcompile.rewrites.wires import Wire, wire_of, with_fake_wire
from rfcompile.wire.policy import Policyish

log = logging.getLogger(__name__)

_CPU_ATTENTION = ("_for_cpu", "_for_cpu_backward")
PROCESSES = 2
"""So many kernels are compiled at a time."""


def kernels(
    model: nn.Module,
    wire: Wire | None = None,
    *,
    bits: Policyish = None,
    example_inputs: Any = None,
    target: str = "sm_90",
    every_config: bool = False,
) -> KernelReport:
    """Report the GPU kernels that the backend "rfquant" generates for a model, without that GPU.

    ``print`` the report. The model is compiled and runs once on the given inputs, on the device
    where it is: forward and, if it has trainable parameters, backward. Then Inductor generates code
    for the target, and Triton compiles it, in processes of their own. Gradients, buffers, random
    state and the model itself stay as they are. Times are those of a model: nothing is measured.

    A model without collectives gets a fake wire, as :func:`explain` gives it one.

    Args:
        wire, bits, example_inputs: as in :func:`explain`.
        target: "sm_80" (A100), "sm_90" (H100), "sm_100" (B200) or "gfx942" (MI300X).
        every_config: compile every configuration that Inductor would try on the GPU, and report
            the one that the model of time takes for the fastest. If left out, the widest one.

    Raises:
        MissingPackageError: Triton is not installed.
        OptionError: an argument is not understood.
        CaptureError: there are no inputs, or nothing was compiled.
        EmissionError: a part of the model has no code for the target.
    """
    check_triton()
    gpu = gpu_of(target)
    wire = wire_of(wire, bits)
    check_module(model)
    model = uncompiled(model)
    if isinstance(model, fx.GraphModule):
        rule = "kernels() runs it on a backward pass too: give the nn.Module that it was made from."
        raise CaptureError(f"{type(model).__name__} is a graph: {rule}")
    args, kwargs = inputs_of(model, example_inputs)
    policy = wire.chosen
    if not is_compiled_for_wire(model, wire.modules):
        policy = policy.for_fake_wire()
        model = with_fake_wire(copy_of(model, share=True), replace(wire, policy=policy))
    with state_kept(model), journal.aside() as reports:
        graphs = capture(model, args, kwargs, {"policy": policy})
    if not graphs:
        raise CaptureError(f"{type(model).__name__}: torch.compile found nothing to compile in it.")
    emissions = _emissions(graphs, gpu)
    codes = _codes(emissions, gpu, every_config)
    sites = merge_reports(reports)
    return KernelReport(
        target=gpu.target,
        gpu=gpu.name,
        policy=policy.describe(),
        graphs=tuple(
            GraphKernels.of(graph.direction, graph.place, emission, of_graph, gpu)
            for graph, emission, of_graph in zip(graphs, emissions, codes, strict=True)
        ),
        model=model_text(gpu),
        notes=(*([sites.summary()] if sites.sites else []), *_notes(emissions, sites.notes)),
    )


def _emissions(graphs: Sequence[CapturedGraph], gpu: GPU) -> list[Emission]:
    found: dict[int, Emission] = {}
    for number, emission in in_children(lambda: install(gpu), emit, graphs, PROCESSES):
        found[number] = emission
        log.info("generated graph %d of %d", len(found), len(graphs))
    return [found[number] for number in range(len(graphs))]


def _codes(
    emissions: Sequence[Emission], gpu: GPU, every_config: bool
) -> list[dict[str, list[MachineCode]]]:
    """Of each graph the machine code of its kernels by name."""
    jobs = [
        (graph, launch, emission.kernels[launch.kernel])
        for graph, emission in enumerate(emissions)
        for launch in {launch.kernel: launch for launch in emission.launches}.values()
    ]

    def work(job: tuple[int, Launch, str]) -> list[MachineCode]:
        _, launch, source = job
        return compiled_launch(launch, source, every_config=every_config)

    found: list[dict[str, list[MachineCode]]] = [{} for _ in emissions]
    compiled = in_children(lambda: install(gpu), work, jobs, PROCESSES)
    for done, (number, codes) in enumerate(compiled, 1):
        graph, launch, _ = jobs[number]
        found[graph][launch.kernel] = codes
        log.info("compiled kernel %d of %d", done, len(jobs))
    return found


def _notes(emissions: Sequence[Emission], notes: Sequence[str]) -> list[str]:
    calls = [call for emission in emissions for call in emission.external_calls]
    attention = "the attention of the CPU stands for the one that PyTorch picks on a GPU"
    mine = [attention] if any(call.endswith(_CPU_ATTENTION) for call in calls) else []
    return [*mine, *(note for note in notes if " ran " not in note)]
