"""The examples of ``examples/integrations``, as a user starts them."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ranks import LOOPBACK

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples" / "integrations"
MAX_LINES = 40


def test_an_example_fits_a_screen() -> None:
    lines = {path.name: len(path.read_text().splitlines()) for path in EXAMPLES.glob("*.py")}
    assert len(lines) == 5
    assert max(lines.values()) <= MAX_LINES, lines


def run(*command: str, folder: Path) -> str:
    """What two processes print that torchrun starts."""
    environment = os.environ | LOOPBACK | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    result = subprocess.run(
        [*torchrun, "--nproc-per-node", "2", *command],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.slow
@pytest.mark.clients
@pytest.mark.parametrize("name", ["train_lightning.py", "train_accelerate.py"])
def test_an_example_trains_a_classifier(name: str, tmp_path: Path) -> None:
    output = run(str(EXAMPLES / name), folder=tmp_path)
    [loss] = re.findall(r"^loss ([\d.]+)$", output, re.MULTILINE)
    assert float(loss) < 0.8 * math.log(4)  # of four classes, before any step
    assert "1 of 1 sites quantized" in output
    assert re.search(r"sent by each rank \(7\.\d\dx less\)", output)


@pytest.mark.slow
@pytest.mark.clients
def test_the_example_of_trainer(tmp_path: Path) -> None:
    output = run(str(EXAMPLES / "train_trainer.py"), folder=tmp_path)
    [losses] = re.findall(r"losses \[(.*)\]", output)
    first, *_, last = map(float, losses.split(", "))
    assert last < 0.8 * first
    assert "21 of 21 parameters quantized" in output


def run_on_cpu(example: str, folder: Path) -> str:
    """What an example with torchtitan prints, after a check of its losses and parameters."""
    patches = str(Path(__file__).with_name("torchtitan_on_cpu.py"))
    output = run(patches, str(folder), example, folder=folder)
    losses = [float(x) for x in re.findall(r"RANK 0 LOSS ([\d.]+)", output)]
    assert len(losses) == 8
    assert losses[-1] < losses[0]
    digests = re.findall(r"RANK \d DIGEST ([0-9a-f]{64})", output)
    assert len(digests) == 2
    assert len(set(digests)) == 1
    return output


@pytest.mark.slow
@pytest.mark.torchtitan
def test_the_example_of_torchtitan(tmp_path: Path) -> None:
    output = run_on_cpu("train_torchtitan.py", tmp_path)
    assert "24 of 25 sites quantized" in output
    assert re.search(r"weights +16 of 16 .* 3\.9\dx", output)
    assert re.search(r"gradients +8 of 9 .* 7\.7\dx", output)


@pytest.mark.slow
@pytest.mark.torchtitan
def test_the_example_of_graph_trainer(tmp_path: Path) -> None:
    output = run_on_cpu("train_graph_trainer.py", tmp_path)
    assert "71 of 97 sites quantized" in output
    assert re.search(r"weights +32 of 45 .* 3\.9\dx", output)
    assert re.search(r"gradients +39 of 52 .* 7\.7\dx", output)
    assert "backward reduce_scatter  layers.5.feed_forward.w2 " in output
