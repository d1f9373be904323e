"""The report on generated GPU kernels: a table for each graph, data, JSON, sources."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from rfcompile.emission.emit import Emission, Launch
from rfcompile.emission.gpus import GPU
from rfcompile.emission.machine_code import MachineCode
from rfcompile.emission.roofline import REACHED, Estimate, estimate, memory_time
from rfcompile.report.report import format_bytes
from rfcompile.report.table import TableReport, table

CODEC = ("quantize", "requantize", "dequantize", "dequantize_sum", "quantize_dequantize")
_SHOWN = 4
"""So many operators a kernel are named in the text; the data has all."""


@dataclass(frozen=True)
class Kernel:
    """A generated kernel, and all launches of it in one graph.

    Args:
        operators, nodes, sources: what it fuses, and the lines of the model that this comes from.
        read, written, least: bytes of all launches; ``least`` without what it hands to or gets
            from another generated kernel, and each of the graph's tensors once.
        loads, stores: instructions to and from global memory by the bits that each moves.
        registers, spilled, shared: of a thread, bytes a thread, bytes a block.
        instructions: of all threads, for an element of the largest tensor that it touches.
        model_us, model_share: by the model of ``emission/roofline.py``: microseconds of all
            launches, and the share of the memory's speed.
        config, warps: the configuration that was compiled.
        triton, machine_code: its texts.
    """

    name: str
    operators: tuple[str, ...]
    nodes: tuple[str, ...]
    sources: tuple[str, ...]
    launches: int
    read: int
    written: int
    least: int
    loads: dict[int, int]
    stores: dict[int, int]
    registers: int
    spilled: int
    shared: int
    instructions: float
    model_us: float
    model_share: float
    config: dict[str, int]
    warps: int
    triton: str = field(repr=False)
    machine_code: str = field(repr=False)

    @classmethod
    def of(
        cls, launches: Sequence[Launch], triton: str, codes: Sequence[MachineCode], gpu: GPU
    ) -> Kernel:
        """The kernel of these launches, in the configuration that the model takes for fastest."""
        first = launches[0]

        def modelled(code: MachineCode) -> Estimate:
            return estimate(code, first.read + first.written, gpu)

        code = min(codes, key=lambda code: modelled(code).time)
        threads = code.programs * code.warps * gpu.warp
        return cls(
            name=first.kernel,
            operators=tuple(dict.fromkeys(o for launch in launches for o in launch.operators)),
            nodes=tuple(dict.fromkeys(n for launch in launches for n in launch.nodes)),
            sources=tuple(dict.fromkeys(s for launch in launches for s in launch.sources)),
            launches=len(launches),
            read=sum(launch.read for launch in launches),
            written=sum(launch.written for launch in launches),
            least=sum(launch.least for launch in launches),
            loads=code.loads,
            stores=code.stores,
            registers=code.registers,
            spilled=code.spilled,
            shared=code.shared,
            instructions=code.instructions_of_thread * threads / max(first.elements, 1),
            model_us=1e6 * len(launches) * modelled(code).time,
            model_share=modelled(code).share,
            config=code.config,
            warps=code.warps,
            triton=triton,
            machine_code=code.text,
        )


@dataclass(frozen=True)
class GraphKernels:
    """One graph: its generated kernels, and what else it calls.

    Args:
        direction: "forward" or "backward".
        place: the first line of the model in it.
        collective_calls, external_calls: operators, in the order of the calls.
        least_us: what the memory takes for the least bytes, by the model.
        wrapper: the Python module that Inductor wrote.
    """

    direction: str
    place: str
    kernels: tuple[Kernel, ...]
    collective_calls: tuple[str, ...]
    external_calls: tuple[str, ...]
    least_us: float
    wrapper: str = field(repr=False)

    IN_JSON: ClassVar = ("totals",)

    @classmethod
    def of(
        cls,
        direction: str,
        place: str,
        emission: Emission,
        codes: Mapping[str, Sequence[MachineCode]],
        gpu: GPU,
    ) -> GraphKernels:
        by_kernel: dict[str, list[Launch]] = {}
        for launch in emission.launches:
            by_kernel.setdefault(launch.kernel, []).append(launch)
        kernels = tuple(
            Kernel.of(launches, emission.kernels[name], codes[name], gpu)
            for name, launches in by_kernel.items()
        )
        least = sum(kernel.least for kernel in kernels)
        return cls(
            direction,
            place,
            kernels,
            emission.collective_calls,
            emission.external_calls,
            1e6 * memory_time(least, gpu),
            emission.wrapper,
        )

    @property
    def title(self) -> str:
        return self.direction + (f" from {self.place}" if self.place else "")

    @property
    def launches(self) -> int:
        return sum(kernel.launches for kernel in self.kernels)

    @property
    def moved(self) -> int:
        """Bytes read and written."""
        return sum(kernel.read + kernel.written for kernel in self.kernels)

    @property
    def least(self) -> int:
        return sum(kernel.least for kernel in self.kernels)

    @property
    def model_us(self) -> float:
        return sum(kernel.model_us for kernel in self.kernels)

    def totals(self) -> dict[str, float]:
        return {
            "launches": self.launches,
            "kernels": len(self.kernels),
            "collective calls": len(self.collective_calls),
            "external calls": len(self.external_calls),
            "bytes": self.moved,
            "least bytes": self.least,
            "spilled": sum(kernel.spilled * kernel.launches for kernel in self.kernels),
            "model us": self.model_us,
        }


@dataclass(frozen=True)
class KernelReport(TableReport):
    """What :func:`~rfcompile.kernels` found; printing it gives a table for each graph.

    Nothing ran on a GPU: times and shares are those of a model.

    Args:
        target, gpu: what the kernels were compiled for.
        policy: what the wire was told.
        graphs: in the order of their compilation.
        notes: what else to know.
    """

    target: str
    gpu: str
    policy: str
    graphs: tuple[GraphKernels, ...]
    model: str
    notes: tuple[str, ...] = ()

    @property
    def launches(self) -> int:
        return sum(graph.launches for graph in self.graphs)

    def summary(self) -> str:
        return f"{self.gpu} ({self.target}): {_counts(self.graphs)}"

    def lines(self) -> Iterator[str]:
        """The summary, and for each graph its totals, a line a kernel, and its other calls."""
        yield self.summary()
        if self.policy:
            yield f"policy: {self.policy}"
        for graph in self.graphs:
            yield ""
            yield f"{graph.title}: {_counts([graph])}"
            yield from table(_rows(graph)) if graph.kernels else []
            if graph.collective_calls:
                yield f"collectives: {_listed(graph.collective_calls)}"
            if graph.external_calls:
                yield f"external: {_listed(graph.external_calls)}"
        yield ""
        yield f"model: {self.model}"
        yield from (f"note: {note}" for note in self.notes)

    def write_sources(self, folder: Path) -> list[Path]:
        """Write what Inductor and Triton made, and return the files.

        Of each graph the module that launches its kernels, and in a folder beside it the Triton
        code and the machine code of each kernel.
        """
        written: list[Path] = []
        for number, graph in enumerate(self.graphs):
            name = f"{number}_{graph.direction}"
            (folder / name).mkdir(parents=True, exist_ok=True)
            files = {folder / f"{name}.py": graph.wrapper}
            for kernel in graph.kernels:
                files[folder / name / f"{kernel.name}.py"] = kernel.triton
                files[folder / name / f"{kernel.name}.asm"] = kernel.machine_code
            for file, text in files.items():
                file.write_text(text, encoding="utf-8")
            written += files
        return written


def model_text(gpu: GPU) -> str:
    """What the modelled times are, in one line."""
    return (
        f"us is the larger of bytes / ({REACHED} x {gpu.dram / 1e12:.2f} TB/s) and instructions / "
        f"({gpu.units} units x {gpu.clock / 1e9:.2f} GHz x lanes); share is bytes' part of it. No "
        "launches, no latencies, no measurement"
    )


def _counts(graphs: Sequence[GraphKernels]) -> str:
    moved, least = sum(g.moved for g in graphs), sum(g.least for g in graphs)
    parts = [
        f"{_many(sum(g.launches for g in graphs), 'launch', 'launches')} of "
        f"{_many(sum(len(g.kernels) for g in graphs), 'kernel')}",
        _many(sum(len(g.collective_calls) for g in graphs), "collective call"),
        _many(sum(len(g.external_calls) for g in graphs), "external call"),
        f"{format_bytes(moved)} moved, {_ratio(moved, least)} of the least",
        f"{sum(g.model_us for g in graphs):.1f} us (model)",
    ]
    return ", ".join(parts)


def _many(count: int, one: str, more: str = "") -> str:
    return f"{count} {one if count == 1 else more or one + 's'}"


def _ratio(moved: int, least: int) -> str:
    return f"{moved / least:.2f}x" if least else "-"


_HEADER = (
    *("", "fuses", "place", "launches", "read", "written", "least", "loads", "stores"),
    *("regs", "spilled", "shared", "instr/elem", "model us", "share"),
)


def _rows(graph: GraphKernels) -> list[list[str]]:
    rows = [list(_HEADER)]
    for number, kernel in enumerate(graph.kernels):
        rows.append(
            [
                str(number),
                _fused(kernel.operators),
                _first(kernel.sources),
                str(kernel.launches),
                f"{kernel.read:,}",
                f"{kernel.written:,}",
                f"{kernel.least:,}",
                _widths(kernel.loads),
                _widths(kernel.stores),
                str(kernel.registers),
                str(kernel.spilled),
                str(kernel.shared),
                f"{kernel.instructions:.1f}",
                f"{kernel.model_us:.2f}",
                f"{kernel.model_share:.2f}",
            ]
        )
    return rows


def _fused(operators: Sequence[str]) -> str:
    """Those of the codec, and the first ones of the others."""
    others = [name for name in operators if name not in CODEC]
    room = max(_SHOWN - (len(operators) - len(others)), 0)
    shown = [name for name in operators if name in CODEC or name in others[:room]]
    more = len(operators) - len(shown)
    return ", ".join(shown) + (f" +{more}" if more else "")


def _first(sources: Sequence[str]) -> str:
    return (sources[0] if sources else "") + (f" +{len(sources) - 1}" if len(sources) > 1 else "")


def _widths(counts: Mapping[int, int]) -> str:
    return " ".join(f"{count}x{bits}" for bits, count in sorted(counts.items(), reverse=True))


def _listed(calls: Sequence[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in Counter(calls).items())
