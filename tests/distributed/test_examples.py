"""The examples that need several ranks; tests/test_examples.py has the others.

One of them really starts through torchrun. The others run on ranks that are there, as torchrun
would start them, and graphs that the backend rewrites run as they are.
"""

from __future__ import annotations

import importlib
import io
import json
import os
import re
import runpy
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

import rfcompile as rf
from tests.inductor.test_backend import graphs_run_as_they_are

if TYPE_CHECKING:
    from tests.ranks import Rank, RunRanks

RANKS = 2
EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
TORCHRUN = [
    sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"
]  # fmt: skip


def run_script(rank: Rank, name: str, *options: str) -> str:
    """What the script prints on this rank."""
    script = str(EXAMPLES / name)
    place = {"RANK": rank.index, "LOCAL_RANK": rank.index, "WORLD_SIZE": rank.world}
    environment = {key: str(n) for key, n in (place | {"LOCAL_WORLD_SIZE": rank.world}).items()}
    rf.reports(clear=True)  # of tests that ran on this rank before
    try:
        with (
            patch.dict(os.environ, environment),
            patch.object(sys, "argv", [script, *options]),
            patch.object(sys, "path", [str(EXAMPLES), *sys.path]),
            patch.object(dist, "init_process_group", lambda *_, **__: None),
            patch.object(dist, "destroy_process_group", lambda: None),
            patch.object(torch.cuda, "device_count", lambda: 0),
            graphs_run_as_they_are(),
            redirect_stdout(io.StringIO()) as printed,
        ):
            runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise
    finally:
        torch.use_deterministic_algorithms(False)
    return printed.getvalue()


def losses_in(text: str) -> list[float]:
    return [float(loss) for loss in re.findall(r"loss ([\d.]+)", text)]


# ---- the demo ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_quick_demo_trains_with_every_all_reduce_at_4_bits(
    ranks: RunRanks, tmp_path: Path
) -> None:
    script = "train_tensor_parallel.py"
    first, second = ranks(RANKS, run_script, script, "--quick", "--out", str(tmp_path))

    assert "bit-identical on all ranks" in first
    assert second == ""
    lines = (tmp_path / "results.jsonl").read_text().splitlines()
    exact, four = map(json.loads, lines)
    assert (exact["bits"], four["bits"]) == (None, 4)
    assert exact["wire_bytes"] == exact["exact_bytes"] == four["exact_bytes"]
    assert exact["num_quantized"] == 0
    assert four["num_quantized"] == four["num_sites"] == exact["num_sites"] == 8  # 2 blocks x 4
    assert 7.0 < four["exact_bytes"] / four["wire_bytes"] < 8.0  # 32 bits to 4 and a scale
    for row in (exact, four):
        assert row["losses"][-1] < row["losses"][0] - 1
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def load(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.delitem(sys.modules, name, raising=False)
    module = importlib.import_module(name)
    monkeypatch.delitem(sys.modules, name)
    return module


def test_the_demo_starts_itself_through_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    demo = load("train_tensor_parallel", monkeypatch)
    calls: list[tuple[Any, Any]] = []

    def run(command: list[str], env: dict[str, str]) -> Any:
        calls.append((command, env))
        return subprocess.CompletedProcess(command, 3)

    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(sys, "argv", ["script", "--quick"])
    monkeypatch.setattr(subprocess, "run", run)

    assert demo.main() == 3
    [(command, environment)] = calls
    assert command == [*TORCHRUN, str(EXAMPLES / "train_tensor_parallel.py"), "--quick"]
    assert environment == {"OMP_NUM_THREADS": "1", **os.environ}


# ---- data parallel, pipeline parallel, sharded ---------------------------------------------------


@pytest.mark.slow
def test_the_data_parallel_example_trains_with_4_bit_gradients() -> None:
    script = EXAMPLES / "train_ddp.py"
    assert len(script.read_text().splitlines()) < 60
    options = ["--bits", "4", "--error-feedback", "--steps", "20"]
    path = os.pathsep.join(filter(None, [str(EXAMPLES.parent), os.environ.get("PYTHONPATH", "")]))
    run = subprocess.run(
        [*TORCHRUN, str(script), *options],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
    )

    assert run.returncode == 0, run.stderr  # it compares the ranks' parameters, too
    first, second = losses_in(run.stdout)
    assert second < first < 5
    assert "3 of 3 sites quantized, 525.57 kB -> 67.98 kB sent by each rank" in run.stdout
    assert "note: 15 of 15 parameters quantized" in run.stdout


@pytest.mark.slow
def test_the_pipeline_example_trains_with_4_bits_in_both_directions(ranks: RunRanks) -> None:
    name = "train_pipeline.py"
    assert len((EXAMPLES / name).read_text().splitlines()) < 60
    first_stage, last_stage = ranks(RANKS, run_script, name, "--bits", "4", "--steps", "20")

    first, second = losses_in(last_stage)
    assert second < first < 5
    line = "1 of 1 sites quantized, 262.14 kB -> 33.79 kB sent by each rank (7.76x less)"
    assert line in first_stage  # activations from one, gradients from the other
    assert line in last_stage
    assert "forward send  stages.0" in first_stage
    assert "backward send  stages.1" in last_stage


@pytest.mark.slow
def test_the_fsdp2_example_trains_with_weight_differences(ranks: RunRanks) -> None:
    name = "train_fsdp2.py"
    assert len((EXAMPLES / name).read_text().splitlines()) < 60
    options = ("--bits", "4", "--weight-delta", "--steps", "20")
    printed, _ = ranks(RANKS, run_script, name, *options)

    first, second = losses_in(printed)
    assert second < first < 5
    assert "8 of 8 sites quantized, 722.69 kB -> 68.00 kB sent by each rank" in printed


# ---- the model -----------------------------------------------------------------------------------


def small_gpt() -> tuple[nn.Module, Any]:
    """A tiny GPT whose branches are not zero, as they are at the start of a training."""
    with patch.object(sys, "path", [str(EXAMPLES), *sys.path]):
        gpt = importlib.import_module("gpt")
    torch.manual_seed(0)
    model: nn.Module = gpt.GPT(gpt.GPTConfig(width=32, layers=2, heads=2, context=16))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model, gpt.parallelize


def check_parallel(rank: Rank) -> None:
    model, _ = small_gpt()
    parallel, parallelize = small_gpt()
    parallelize(parallel, init_device_mesh("cpu", (rank.world,)))
    tokens = torch.randint(256, (3, 16))
    logits: list[Tensor] = [m(tokens) for m in (model, parallel)]
    for y in logits:
        y.square().mean().backward()

    torch.testing.assert_close(logits[1], logits[0])
    for name, parameter in model.named_parameters():
        gradient: Any = parallel.get_parameter(name).grad
        whole = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
        torch.testing.assert_close(whole, parameter.grad, msg=name)


def test_the_parallel_model_computes_what_the_model_computes(ranks: RunRanks) -> None:
    ranks(RANKS, check_parallel)
