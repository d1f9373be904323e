"""Dry runs of the benchmark scripts: they start, check their bytes, and write what they promise."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.benchmark, pytest.mark.slow]

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
    assert {row["format"] for row in rows} == {"4b"}
    for row in rows:
        assert row.keys() >= MACHINE | {"median_ms", "iqr_ms", "clone_ms", "ratio", "GBps"}
        assert isinstance(row["ratio"], float)
        assert row["ratio"] > 0


def test_compile_time(root: Path, tmp_path: Path) -> None:
    script = ["benchmarks/compile_time.py", "--layers", "1", "--turns", "1"]
    (row,) = rows_of(root, tmp_path / "compile_time.jsonl", *script)
    assert row.keys() >= MACHINE | {"layers", "world_size", "seconds", "ratios"}
    assert row["ratios"]["exact"] == [1.0]  # type: ignore[index]


def test_rewrite_time(root: Path, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    script = ["benchmarks/rewrite_time.py", "--layers", "2", "--runs", "1"]
    rows = rows_of(root, tmp_path / "rewrite_time.jsonl", *script)
    assert [row["model"] for row in rows] == ["llama", "gpt"]
    for row in rows:
        assert row.keys() >= MACHINE | {"seconds", "ratios", "calls", "load"}
        calls: Any = row["calls"]
        captures = {name: count["captures"] for name, count in calls.items()}
        expected = {"export": 1, "find": 1, "anneal": 1, "free": 2, "wire": 0, "explain": 0}
        assert captures == expected


def test_gpu_script_on_a_cpu(root: Path, tmp_path: Path) -> None:
    rows = rows_of(root, tmp_path / "gpu.jsonl", "benchmarks/gpu.py", "--device", "cpu", "--tiny")
    by_kind = {kind: [row for row in rows if row["what"] == kind] for kind in ("kernel", "block")}
    peers = [row for row in rows if "peer" in row]
    assert {(row["format"], row["how"]) for row in by_kind["kernel"]} == {
        (fmt, how) for fmt in ("3b", "4b:h32") for how in ("eager", "compiled")
    }
    assert len(by_kind["kernel"]) == 16
    for row in by_kind["kernel"]:
        assert row.keys() >= MACHINE | {"median_ms", "iqr_ms", "share", "copy_GBps", "compile_s"}
        is_modelled = row["how"] == "compiled" and importlib.util.find_spec("triton") is not None
        assert (row["modelled"] is not None) == is_modelled
    names = {str(row["peer"]).split()[0] for row in peers}
    assert names >= {"eager", "compiled", "rfcompile", "bitsandbytes", "torchao"}
    assert all("median_ms" in row or row["why"] for row in peers)
    exact, quantized = by_kind["block"]
    assert (exact["quantized_sites"], quantized["quantized_sites"]) == (0, 4)
    assert 3 < exact["bytes_sent"] / quantized["bytes_sent"] < 4  # type: ignore[operator]


STUDY = "steps 2 layers 1 width 32 heads 2 context 16 batch 2 batches 1 threads 1"


def sizes(text: str) -> list[str]:
    pairs = zip(*[iter(text.split())] * 2, strict=True)
    return ["--no-compile", *(part for name, value in pairs for part in (f"--{name}", value))]


@pytest.mark.parametrize("task", ["language", "digits"])
def test_residual_study(root: Path, tmp_path: Path, task: str) -> None:
    if task == "digits":
        pytest.importorskip("sklearn")
    out = tmp_path / "study.jsonl"
    command = ["benchmarks/residual_study.py", *sizes(f"{STUDY} seeds 1 task {task}")]
    command += ["--arms", "residual+adamw", "free+muon"]
    for _ in range(2):  # the second time nothing is left to do
        rows = rows_of(root, out, *command)
        assert [row["arm"] for row in rows] == ["residual+adamw", "free+muon"]
    for row in rows:
        assert row.keys() >= MACHINE | {"validation_loss", "kurtosis", "increases", "traffic"}
    assert out.with_suffix(".png").stat().st_size > 10_000


def test_pictures_are_drawn_again_from_the_results(root: Path, tmp_path: Path) -> None:
    names = "demo", "residual_study", "traffic", "plan"
    command = [sys.executable, "benchmarks/pictures.py", *names, "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    pictures = {path.stem: path.stat().st_size for path in tmp_path.glob("*.png")}
    appendix = "residual_study_kurtosis", "residual_study_recipe", "traffic_variants"
    assert pictures.keys() == {*names, *appendix}
    assert all(10_000 < size < 250_000 for size in pictures.values())


def test_the_arms_of_the_study_in_plain_words(root: Path) -> None:
    code = """
import sys; sys.path.insert(0, "benchmarks")
from study_plots import meaning
assert meaning("free+muon+annealed") == "residual-free, skips annealed, Muon"
assert meaning("free+muon-rotary") == "residual-free, Muon, learned positions"
assert meaning("free+adamw 0.001") == "residual-free, AdamW, rate 0.001"
assert meaning("free+muon, decay 0.1") == "residual-free, Muon, decay 0.1"
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_companions_low_rank(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "companions.jsonl"
    command = ["benchmarks/companions.py", "low_rank", "--tiny", "--steps", "2", "--ranks", "2"]
    command += ["--seeds", "2", "--rates", "1e-2", "--tasks"]
    rows_of(root, out, *command, "cost")
    rows = rows_of(root, out, *command, "language")  # the other's rows stay
    assert {row["kind"] for row in rows} == {"cost", "main", "spread", "fit"}
    arms = {row["arm"] for row in rows if row["kind"] == "main"}
    assert arms == {"dense", "plain rank 2", "sine rank 2"}
    for row in rows:
        assert row.keys() >= MACHINE
    assert out.with_suffix(".png").stat().st_size > 10_000


def test_companions_adapters(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "adapters.jsonl"
    sizes = "--base-steps 2 --steps 2 --ranks 1 2 --bits 2 4 --seeds 1 --rates 1e-2 --growths 10"
    rows = rows_of(root, out, "benchmarks/companions.py", "adapters", "--tiny", *sizes.split())
    main = [row for row in rows if row["kind"] == "main"]
    assert len(main) == 3 * 2 * (1 + 3 * 2)
    for row in main:
        if row["bits"] != 32 and row["method"] == "LoRA":
            assert row["bytes"] < row["file"]  # type: ignore[operator]
    assert out.with_suffix(".png").stat().st_size > 10_000


def test_the_bjontegaard_delta_of_known_curves(root: Path) -> None:
    pytest.importorskip("scipy")
    code = """
import sys; sys.path.insert(0, "benchmarks")
from companions_adapters import bd_rate, front
curve = [(100, 3.0), (200, 2.5), (400, 2.2), (800, 2.0)]
half = [(size / 2, loss) for size, loss in curve]
assert abs(bd_rate(curve, half) + 50) < 1e-9
assert abs(bd_rate(half, curve) - 100) < 1e-9
assert abs(bd_rate(curve, curve)) < 1e-9
assert bd_rate(curve, [(100, 9.0), (200, 8.0)]) is None
assert front([*curve, (300, 2.6)]) == curve
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_anneal_study(root: Path, tmp_path: Path) -> None:
    trained = ["benchmarks/residual_study.py", *sizes(f"{STUDY} seeds 1")]
    trained += ["--arms", "residual+muon", "--checkpoints", str(tmp_path)]
    rows_of(root, tmp_path / "study.jsonl", *trained)
    checkpoint = str(tmp_path / "language residual+muon 0.pt")
    out = tmp_path / "anneal.jsonl"
    rows = rows_of(root, out, "benchmarks/anneal_study.py", checkpoint, *sizes(STUDY))
    assert [row["arm"] for row in rows] == ["kept", "annealed", "dropped", "fresh"]
    kept, annealed, dropped, fresh = (row["course"][0][1] for row in rows)  # type: ignore[index]
    assert kept == annealed != dropped != fresh


def test_plan(root: Path, tmp_path: Path) -> None:
    out, checkpoint = tmp_path / "plan.jsonl", tmp_path / "gpt.pt"
    sizes = "--steps 2 --layers 1 --width 32 --heads 2 --context 16 --batch 2 --batches 2"
    command = ["benchmarks/plan.py", *sizes.split(), "--evaluation", "2", "--threads", "1"]
    command += ["--models", "gpt", "--seeds", "1", "--bits", "4", "--points", "3", "--alone", "1"]
    rows = rows_of(root, out, *command, "--checkpoint", str(checkpoint))
    tasks = [(row["boundary"], row["task"]) for row in rows]
    assert tasks == [(b, t) for b in ("stream", "branch") for t in ("plan", "frontier", "alone")]
    assert checkpoint.exists()
    assert out.with_suffix(".png").exists()
    assert rows_of(root, out, *command, "--checkpoint", str(checkpoint)) == rows  # nothing is left
    for row in rows[::3]:
        assert row.keys() >= MACHINE | {"uniform", "predicted_increase", "ratio", "formats"}
        planned, budget = row["planned_bytes"], row["budget"]
        assert isinstance(planned, float)
        assert isinstance(budget, float)
        assert planned <= budget


def test_score_cost(root: Path, tmp_path: Path) -> None:
    sizes = "--layers 2 --width 32 --heads 2 --context 16 --batch 2 --batches 1 --runs 2"
    out = tmp_path / "cost.jsonl"
    [row] = rows_of(root, out, "benchmarks/score_cost.py", *sizes.split())
    assert row.keys() >= MACHINE | {"step", "score", "ratio"}


def test_plan_link(root: Path, tmp_path: Path) -> None:
    needs_namespaces()
    sizes = "--steps 2 --layers 1 --width 32 --heads 2 --context 16 --batch 2 --batches 2"
    command = ["benchmarks/plan_link.py", *sizes.split(), "--ranks", "2", "--rates", "1gbit"]
    rows = rows_of(root, tmp_path / "link.jsonl", *command, "--runs", "2", "--seconds", "0.2")
    assert [row["wire"] for row in rows[:3]] == [
        "exact", "2b:g128:rise", "plan as good as 2b:g128:rise"
    ]  # fmt: skip
    assert all(row["planned_bytes"] and row["sent_bytes"] for row in rows)


def needs_namespaces() -> None:
    if os.geteuid() != 0 or not (shutil.which("ip") and shutil.which("tc")):
        pytest.skip("NOT TESTED HERE: network namespaces need root, ip and tc")


def test_crossover(root: Path, tmp_path: Path) -> None:
    needs_namespaces()
    command = ["benchmarks/crossover.py", "--quick", "--seconds", "0.5"]
    (row,) = rows_of(root, tmp_path / "crossover.jsonl", *command)
    assert row.keys() >= MACHINE | {"ranks", "rate", "format", "times"}
    assert {*row["min_bytes"]} == {"all_reduce", "all_gather", "reduce_scatter"}  # type: ignore[misc]


def test_traffic(root: Path, tmp_path: Path) -> None:
    needs_namespaces()
    out = tmp_path / "traffic.jsonl"
    command = ["benchmarks/traffic.py", "--kinds", "states adamw", "--worlds", "2"]
    command += ["--steps", "1", "--runs", "2", "--rate", "1gbit"]
    first = rows_of(root, out, *command)
    assert [(row["task"], row["wire"]) for row in first] == [
        (task, wire) for task in ("loss", "time") for wire in ("float32", "int8", "int4")
    ]
    assert rows_of(root, out, *command) == first  # nothing was left to do
    for row in first[3:]:
        sent, predicted = row["sent_bytes"], row["predicted_bytes"]
        assert isinstance(sent, float)
        assert isinstance(predicted, float)
        assert predicted <= sent <= 1.03 * predicted


def test_companions(root: Path, tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    out = tmp_path / "companions.jsonl"
    command = ["benchmarks/companions.py", "attention", "--tiny", "--seeds", "1"]
    rows = rows_of(root, out, *command, "--only", "length", "language")
    assert {row["part"] for row in rows} == {"length", "language"}
    again = rows_of(root, out, *command, "--only", "length", "language")
    assert len(again) == len(rows)  # nothing is left to do
    assert out.with_suffix(".png").stat().st_size > 10_000
