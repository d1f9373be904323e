"""``rf.kernels`` and ``rfcompile kernels``: what is reported of a small model. Needs Triton: ``make
test-kernels``.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import rfcompile as rf
from rfcompile.cli import main
from rfcompile.emission.compare import compare
from rfcompile.emission.report import KernelReport
from rfcompile.errors import CaptureError, OptionError

pytestmark = pytest.mark.kernels

WIDTH, TOKENS = 64, 256
BYTES = 4 * WIDTH * TOKENS
"""Of the tensor between the blocks, float32."""
PAYLOAD = WIDTH * TOKENS // 2 + 2 * WIDTH * TOKENS // 128
"""4 bits an element and two bytes for the scale of 128."""


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.up(x))


class Net(nn.Module):
    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(), Block()])
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        for layer in self.layers:
            x = layer(x)
        return x


def net() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """The factory for the command line."""
    return Net(), (torch.randn(TOKENS, WIDTH),)


@dataclass(frozen=True)
class Made:
    report: KernelReport
    model: nn.Module


@pytest.fixture(scope="module")
def made() -> Made:
    model, inputs = net()
    return Made(rf.kernels(model, bits=4, example_inputs=inputs), model)


@pytest.mark.slow
def test_kernels_of_the_package_are_reported_as_generated_ones_are() -> None:
    model, inputs = net()
    report = rf.kernels(model, bits="4b:h32", example_inputs=inputs)
    forward = next(graph for graph in report.graphs if graph.direction == "forward")
    quantize, dequantize = (one for one in forward.kernels if one.name.startswith("codec_"))
    assert (quantize.operators, dequantize.operators) == (("quantize",), ("dequantize",))
    assert quantize.launches == dequantize.launches == 2
    assert quantize.read == dequantize.written == 2 * BYTES
    assert quantize.written == dequantize.read == 2 * PAYLOAD
    assert quantize.spilled == dequantize.spilled == 0
    assert "def quantize(" in quantize.triton
    assert {*forward.external_calls} == {"aten.mm"}


def test_the_model_stays_as_it_was(made: Made) -> None:
    assert made.model.calls == 0
    assert all(p.grad is None for p in made.model.parameters())


def test_every_graph_is_reported(made: Made) -> None:
    report = made.report
    assert (report.target, report.gpu) == ("sm_90", "NVIDIA H100")
    assert {graph.direction for graph in report.graphs} == {"forward", "backward"}
    assert report.policy.startswith("activations=4b:g128:rise")
    products = [call for graph in report.graphs for call in graph.external_calls]
    assert {*products} <= {"aten.mm", "aten.addmm"}
    assert len(products) == 5  # the first block has no gradient of its input


def test_a_payload_is_counted_to_the_byte(made: Made) -> None:
    """The fake wire of the first block writes it, and reads it again."""
    kernels = [kernel for graph in made.report.graphs for kernel in graph.kernels]
    (written,) = {k.written // k.launches for k in kernels if k.operators[-1:] == ("quantize",)}
    assert written == PAYLOAD
    decoding = [kernel for kernel in kernels if "dequantize" in kernel.operators]
    assert decoding
    assert all((kernel.read // kernel.launches) % 4 == PAYLOAD % 4 for kernel in decoding)


def test_kernels_are_compiled_for_the_target(made: Made) -> None:
    for graph in made.report.graphs:
        for kernel in graph.kernels:
            assert "EXIT" in kernel.machine_code
            assert "triton.jit" in kernel.triton
            assert 0 < kernel.registers <= 255
            assert kernel.spilled == 0
            assert kernel.stores
            assert kernel.instructions > 1
            assert 0 < kernel.model_share <= 1
            assert kernel.least <= kernel.read + kernel.written


def test_the_lines_of_the_model_are_named(made: Made) -> None:
    sources = {s for graph in made.report.graphs for k in graph.kernels for s in k.sources}
    assert any(source.startswith("tests/emission/test_kernels.py:") for source in sources)


def test_the_text_has_a_line_a_kernel(made: Made) -> None:
    lines = made.report.text().splitlines()
    assert lines[0].startswith("NVIDIA H100 (sm_90): ")
    assert lines[0].endswith(" us (model)")
    header = "fuses place launches read written least loads stores regs spilled shared"
    assert sum(line.split()[:11] == header.split() for line in lines) == sum(
        bool(graph.kernels) for graph in made.report.graphs
    )
    assert any(line.startswith("model: us is the larger of bytes") for line in lines)


def test_the_guide_shows_the_columns_that_there_are(made: Made, root: Path) -> None:
    page = (root / "docs" / "guide" / "kernels.md").read_text()
    (header,) = {" ".join(x.split()) for x in page.splitlines() if x.strip().startswith("fuses ")}
    assert header in [" ".join(line.split()) for line in made.report.text().splitlines()]


def test_data_and_sources(made: Made, tmp_path: Path) -> None:
    stored = json.loads(made.report.json())
    (first, *_) = stored["graphs"]
    assert first["totals"]["launches"] == made.report.graphs[0].launches
    assert "triton" not in first["kernels"][0]
    files = made.report.write_sources(tmp_path)
    assert {file.suffix for file in files} == {".py", ".asm"}
    for number, graph in enumerate(made.report.graphs):
        wrapper = (tmp_path / f"{number}_{graph.direction}.py").read_text()
        assert wrapper.count(".run(") == graph.launches
    same = compare(stored, made.report.to_dict())
    assert all(change.before == change.after for change in same.changes)


@pytest.mark.slow
def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], made: Made) -> None:
    before = tmp_path / "before.json"
    before.write_text(made.report.json())
    command = ["kernels", f"{__file__}:net", "--bits", "2", "--target", "gfx942"]
    assert main([*command, "--diff", str(before), "--source", str(tmp_path / "code")]) == 0
    result = capsys.readouterr()
    assert "before: NVIDIA H100 (sm_90), activations=4b:g128:rise" in result.out
    assert "after:  AMD Instinct MI300X (gfx942), activations=2b:g128:rise" in result.out
    assert "forward least bytes" in " ".join(result.out.split())
    assert "rfcompile: generated graph 1 of " in result.err
    assert "rfcompile: compiled kernel 1 of " in result.err
    assert list((tmp_path / "code").glob("*_forward/*.asm"))


@pytest.mark.slow
def test_every_configuration_finds_no_slower_one() -> None:
    model, x = nn.Sequential(nn.Tanh(), nn.Softmax(-1)), torch.randn(512, 512)
    given = {"wire": rf.Wire(4, modules=["0"]), "example_inputs": (x,)}
    widest = rf.kernels(model, **given)
    best = rf.kernels(model, every_config=True, **given)
    assert sum(g.model_us for g in best.graphs) <= sum(g.model_us for g in widest.graphs)


def test_what_is_not_understood_is_refused() -> None:
    model, inputs = net()
    with pytest.raises(OptionError, match="target='sm_7' is not supported: use one of sm_80"):
        rf.kernels(model, bits=4, example_inputs=inputs, target="sm_7")
    with pytest.raises(OptionError, match="give bits or a Wire, not both"):
        rf.kernels(model, rf.Wire(4), bits=4, example_inputs=inputs)
    with pytest.raises(CaptureError, match="is a graph"):
        rf.kernels(torch.fx.symbolic_trace(model), bits=4, example_inputs=inputs)


def test_a_missing_report_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(SystemExit):
        main(["kernels", f"{__file__}:net", "--diff", str(tmp_path / "other.json")])
    assert "it holds no report of `rfcompile kernels --json`" in capsys.readouterr().err
