"""Dry runs of the benchmark scripts: they start, check their bytes, and write what they promise."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

MACHINE = {"processor", "cores", "torch", "python", "date"}


def rows_of(root: Path, out: Path, *command: str) -> list[dict[str, object]]:
    done = subprocess.run(
        [sys.executable, *command, "--out", str(out)],
        cwd=root, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in out.read_text().splitlines()]


def test_codec(root: Path, tmp_path: Path) -> None:
    rows = rows_of(root, tmp_path / "codec.jsonl", "benchmarks/codec.py", "--tiny")
    assert {row["operator"] for row in rows} == {
        "quantize", "dequantize", "dequantize_sum", "requantize",
    }  # fmt: skip
    assert {row["format"] for row in rows} == {"4b", "3b"}
    for row in rows:
        assert row.keys() >= MACHINE | {"median_ms", "iqr_ms", "clone_ms", "ratio", "GBps"}
        assert isinstance(row["ratio"], float)
        assert row["ratio"] > 0


def test_gpu_script_on_a_cpu(root: Path, tmp_path: Path) -> None:
    rows = rows_of(root, tmp_path / "gpu.jsonl", "benchmarks/gpu.py", "--device", "cpu", "--tiny")
    assert len(rows) == 2 * 4
    for row in rows:
        assert row.keys() >= MACHINE | {"median_ms", "iqr_ms", "share", "copy_GBps", "compile_s"}
