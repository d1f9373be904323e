"""Texts and comparisons of reports on kernels, and what is said without Triton."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import pytest
from torch import nn

import rfcompile as rf
from rfcompile.emission import absent_gpu
from rfcompile.emission.compare import compare, read_report
from rfcompile.emission.emit import Emission, Launch
from rfcompile.emission.gpus import gpu_of
from rfcompile.emission.machine_code import MachineCode
from rfcompile.emission.report import GraphKernels, KernelReport, model_text
from rfcompile.errors import MissingPackageError, OptionError

H100 = gpu_of("sm_90")
CODE = MachineCode(
    config={"XBLOCK": 32}, warps=2, registers=56, spilled=8, shared=32, loads={128: 8, 8: 2},
    stores={64: 1}, instructions={"float": 100.0}, programs=10, ir="", text="SASS",
)  # fmt: skip


def launch(kernel: str, *operators: str, least: int) -> Launch:
    return Launch(
        kernel, operators, ("node",), ("model.py:3", "model.py:4"), {"x": 320}, {"a": 1000},
        {"b": 250}, 640, least,
    )  # fmt: skip


def report(*launches: Launch, policy: str = "4b") -> KernelReport:
    names = {one.kernel: "" for one in launches}
    emission = Emission("wrapper", names, launches, ("all_reduce", "all_reduce"), ("aten.mm",))
    codes = {name: [CODE] for name in names}
    graph = GraphKernels.of("forward", "model.py:3", emission, codes, H100)
    return KernelReport(H100.target, H100.name, policy, (graph,), model_text(H100), ("noted",))


def test_the_text() -> None:
    first = launch("k", "add", "mul", "sin", "cos", "tan", "quantize", least=1250)
    lines = report(first, first, launch("z", "exp", least=0)).text().splitlines()
    assert lines == [
        "NVIDIA H100 (sm_90): 3 launches of 2 kernels, 2 collective calls, 1 external call, "
        "3.75 kB moved, 1.50x of the least, 0.0 us (model)",
        "policy: 4b",
        "",
        "forward from model.py:3: 3 launches of 2 kernels, 2 collective calls, 1 external call, "
        "3.75 kB moved, 1.50x of the least, 0.0 us (model)",
        "   fuses                       place          launches  read   written  least  loads      "
        "stores  regs  spilled  shared  instr/elem  model us  share",
        "0  add, mul, sin, quantize +2  model.py:3 +1  2         2,000  500      2,500  8x128 2x8  "
        "1x64    56    8        32      100.0       0.00      0.19",
        "1  exp                         model.py:3 +1  1         1,000  250      0      8x128 2x8  "
        "1x64    56    8        32      100.0       0.00      0.19",
        "collectives: 2 all_reduce",
        "external: 1 aten.mm",
        "",
        f"model: {model_text(H100)}",
        "note: noted",
    ]


def test_a_comparison_gives_every_total_that_changed() -> None:
    one, two = launch("k", "add", least=1250), launch("z", "exp", least=0)
    found = compare(report(one).to_dict(), report(one, two, policy="2b").to_dict())
    assert found.text().splitlines()[:2] == [
        "before: NVIDIA H100 (sm_90), 4b",
        "after:  NVIDIA H100 (sm_90), 2b",
    ]
    (launches, *_) = found.changes
    assert (launches.graph, launches.total) == ("forward", "launches")
    assert (launches.before, launches.after) == (1, 2)
    assert [line.split() for line in found.lines()][3] == ["forward", "launches", "1", "2", "2.00x"]
    nothing = compare(report(one).to_dict(), report(one).to_dict() | {"graphs": []})
    assert {change.after for change in nothing.changes} == {None}


def test_a_stored_report_is_read_again(tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    file.write_text(report(launch("k", "add", least=1)).json())
    assert read_report(file)["target"] == "sm_90"
    for text in ("{}", "[1]", "no JSON", '{"graphs": [{"direction": "forward"}]}'):
        file.write_text(text)
        with pytest.raises(OptionError, match="holds no report of `rfcompile kernels --json`"):
            read_report(file)


def test_without_triton_the_message_names_the_extra() -> None:
    with (
        mock.patch.object(absent_gpu, "find_spec", return_value=None),
        pytest.raises(MissingPackageError, match=r"pip install 'rfcompile\[kernels\]'"),
    ):
        rf.kernels(nn.Linear(2, 2), bits=4)
