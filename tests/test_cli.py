"""The command line: results on stdout, everything else on stderr, exit codes, bad targets."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest

from rfcompile.cli import main
from rfcompile.wire.policy import Policy

FACTORIES = '''
"""Models for the command line."""
import sys
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

X = torch.randn(16, 64)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(64, 128, bias=False)
        self.down = nn.Linear(128, 64, bias=False)

    def forward(self, x, scale=None):
        y = x + self.down(torch.relu(self.up(x)))
        return y if scale is None else y * scale


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Block(), Block()])

    def forward(self, x, scale=None):
        for layer in self.layers:
            x = layer(x, scale)
        return x


class Loud(Net):
    def forward(self, x):
        print("loud model")
        return super().forward(x)


def net(): return Net(), (X,)
def tensor(): return Net(), X
def keywords(): return Net(), {"x": X}
def both(): return Net(), (X,), {"scale": torch.ones(64)}
def exits(): sys.exit(0)
def empty(): return Net(), (X[:0],)
def loud():
    print("loud factory")
    return Loud(), (X,)
def to_plan():
    net = Net()
    batches = [(x, net(x).detach()) for x in torch.randn(2, 4, 64)]
    return net, batches, lambda model, batch: (model(batch[0]) - batch[1]).square().mean()
def dummies():
    model = Net()
    model.dummy_inputs = {"x": X}
    return model


def parallel():
    torch.manual_seed(0)
    plan = {"*.up": ColwiseParallel(), "*.down": RowwiseParallel()}
    model = nn.Sequential(Block(), Block())
    return parallelize_module(model, init_device_mesh("cpu", (4,)), plan), (X,)


instance = Net()
def without_inputs(): return Net()
def number(): return 5
def three_but_no_tuple(): return Net(), X, {}
def four(): return Net(), (), {}, 1
def wants_an_argument(size): return Net(), (X,)
def broken(): raise RuntimeError("no luck")
def exits(): sys.exit("enough")
def wrong_shape(): return Net(), (X[:, :3],)
def no_blocks(): return nn.Linear(64, 2), (X,)
'''


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str


Run = Callable[..., Result]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("targets")
    (path / "factories.py").write_text(FACTORIES, encoding="utf-8")
    (path / "syntax.py").write_text("def f(:\n", encoding="utf-8")
    (path / "crashes.py").write_text("1 / 0\n", encoding="utf-8")
    (path / "imports.py").write_text("import no_such_module_at_all\n", encoding="utf-8")
    return path


@pytest.fixture
def run(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run the command line in this process; a target without a path is a factory."""
    monkeypatch.setattr(sys, "path", [*sys.path])

    def call(command: str, target: str, *options: str) -> Result:
        full = target if ":" in target else f"{folder / 'factories.py'}:{target}"
        code = main([command, full, *options])
        return Result(code, *capsys.readouterr())

    return call


# ---- analyze ----------------------------------------------------------------------------------


def test_analyze(run: Run) -> None:
    result = run("analyze", "net")
    assert result.code == 0
    assert "layers.1" in result.out
    assert "excess kurtosis" in result.out
    found = json.loads(run("analyze", "net", "--json", "--modules", "layers.*.up").out)
    assert [block["module"] for block in found["blocks"]] == ["layers.0.up", "layers.1.up"]
    assert found["attentions"] == []


# ---- explain ----------------------------------------------------------------------------------


def test_the_page_of_explain(run: Run, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    result = run("explain", "net", "--html", str(page))
    assert result.code == 0
    assert result.err == f"rfcompile: wrote {page}\n"
    assert "layers.1" in page.read_text(encoding="utf-8")


@pytest.mark.parametrize("target", ["net", "tensor", "keywords", "both", "dummies"])
def test_explain(run: Run, target: str) -> None:
    result = run("explain", target)
    assert result.code == 0
    assert result.err == ""
    lines = result.out.splitlines()
    assert lines[0].startswith("4 of 4 sites quantized, 16.38 kB -> 2.11 kB sent by each rank")
    assert len(lines) == 11
    assert lines[3].split() == ["activations", "2", "of", "2", "8,192", "1,056", "7.76x"]
    assert "layers.0" in lines[7]
    assert "4b:g128:rise" in lines[7]


def test_formats_and_other_options(run: Run) -> None:
    out = run("explain", "net", "--bits", "2b:g64:h32").out
    assert "2b:g64:rise:h32" in out
    result = run("explain", "net", "--modules", "layers.*.up,layers.1")
    assert result.code == 0
    assert "6 of 6 sites quantized" in result.out
    result = run("explain", "net", "--min-bytes", "4097")
    assert result.code == 1, "eligible sites stay exact"
    assert "4096 bytes < min_bytes=4097" in result.out


def test_a_policy_file(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "policy.toml"
    file.write_text('activations = "2b:g64"\n[sites]\n"layers.0" = "exact"\n')
    result = run("explain", "net", "--policy", str(file))
    assert "2b:g64:rise" in result.out
    assert "sites['layers.0'] says exact" in result.out
    result = run("explain", "net", "--policy", str(file), "--min-bytes", "5000")
    assert "4096 bytes < min_bytes=5000" in result.out


def test_explain_as_json(run: Run) -> None:
    result = run("explain", "net", "--json", "--bits", "8")
    plain = json.loads(result.out, parse_constant=pytest.fail)
    assert plain["num_quantized"] == plain["num_sites"] == 4
    assert [site["module"] for site in plain["sites"]] == ["layers.0"] * 2 + ["layers.1"] * 2
    assert plain["sites"][0]["bytes_after"] == 8 * (128 + 2)
    nothing = json.loads(run("explain", "empty", "--json").out, parse_constant=pytest.fail)
    assert nothing["sites"][0]["sqnr_db"] is None


@pytest.mark.parametrize("command", ["explain", "diff"])
def test_what_the_model_prints_goes_to_stderr(run: Run, command: str) -> None:
    result = run(command, "loud", "--json")
    assert result.code == 0
    json.loads(result.out)
    assert result.err.startswith("loud factory\nloud model\n")


# ---- diff -------------------------------------------------------------------------------------


def test_diff(run: Run, tmp_path: Path) -> None:
    page = tmp_path / "diff.html"
    result = run("diff", "net", "--html", str(page))
    assert result.code == 0
    assert "+fake_wire: f32[16, 64] = rfcompile.fake_wire.default(add, '4b:g128:rise'" in result.out
    assert result.err == f"rfcompile: wrote {page}\n"
    text = page.read_text(encoding="utf-8")
    assert text.startswith("<!doctype html>")
    assert "fake_wire" in text


def test_diff_without_a_change(run: Run) -> None:
    result = run("diff", "net", "--min-bytes", "100000")
    assert (result.code, result.out) == (1, "no change\n")


def test_diff_as_json(run: Run) -> None:
    plain = json.loads(run("diff", "both", "--json").out, parse_constant=pytest.fail)
    assert plain["changed"] is True
    assert plain["added"] == {"rfcompile.fake_wire.default": 2}


# ---- plan -------------------------------------------------------------------------------------


def test_plan(run: Run, tmp_path: Path) -> None:
    page, policy = tmp_path / "plan.html", tmp_path / "plan.toml"
    options = ("--formats", "2,4,4b:h32", "--html", str(page), "--save", str(policy))
    result = run("plan", "to_plan", "--bytes", "400", *options)
    assert result.code == 0
    assert "layers.1" in result.out
    assert result.err == f"rfcompile: wrote {policy}\nrfcompile: wrote {page}\n"
    assert "Loss by bytes" in page.read_text(encoding="utf-8")
    assert set(Policy.from_file(policy).sites) == {"layers.0", "layers.1"}


def test_plan_as_json(run: Run) -> None:
    link = ("--link", "1e6,1e-4", "--formats", "2,4")
    plain = json.loads(run("plan", "to_plan", "--seconds", "1e-3", *link, "--json").out)
    assert plain["schema"] == "rfcompile.plan/1"
    assert plain["budget"] == "seconds"
    assert plain["link"]["latency"] == 1e-4


@pytest.mark.parametrize(
    ("target", "budget", "message"),
    [
        ("to_plan", ("--bytes", "1"), "bytes=1 is below the minimum that can be reached"),
        ("to_plan", ("--seconds", "1"), "seconds need a link"),
        ("net", ("--bytes", "1"), "gave Net, tuple; for a plan it must return (model, batches, lo"),
    ],
)
def test_errors_of_plan(run: Run, target: str, budget: tuple[str, str], message: str) -> None:
    result = run("plan", target, *budget)
    assert (result.code, result.out) == (3, "")
    assert message in result.err


# ---- residuals ----------------------------------------------------------------------------------


def test_residuals(run: Run) -> None:
    result = run("residuals", "both")
    lines = result.out.splitlines()
    assert (result.code, result.err) == (0, "")
    assert lines[0] == "2 residual adds: 2 block"
    assert lines[2].split()[:3] == ["0", "block", "layers.0"]
    assert "f32[16, 64]" in lines[2]
    assert lines[2].endswith("up, down")
    plain = json.loads(run("residuals", "loud", "--json").out)
    assert [add["module"] for add in plain["residuals"]] == ["layers.0", "layers.1"]


def test_residuals_where_there_are_none(run: Run) -> None:
    result = run("residuals", "no_blocks")
    assert (result.code, result.out) == (1, "0 residual adds\n")


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("missing", "cannot be loaded: AttributeError"),
        ("without_inputs", "Net has no example inputs"),
        ("wrong_shape", "Net cannot be captured as one graph: "),
    ],
)
def test_residuals_of_bad_targets(run: Run, target: str, message: str) -> None:
    result = run("residuals", target)
    assert (result.code, result.out) == (3, "")
    assert message in result.err


# ---- simulated ranks --------------------------------------------------------------------------


@pytest.mark.usefixtures("rfquant_without_inductor")
def test_explain_with_simulated_ranks(run: Run) -> None:
    result = run("explain", "parallel", "--world-size=4", "--min-bytes=0", "--json")
    plain = json.loads(result.out)
    assert result.code == 0
    assert [(s["direction"], s["collective"], s["world_size"]) for s in plain["sites"]] == [
        ("forward", "all_reduce", 4),
        ("forward", "all_reduce", 4),
        ("backward", "all_reduce", 4),
    ]


@pytest.mark.usefixtures("rfquant_without_inductor")
def test_diff_with_simulated_ranks(run: Run) -> None:
    result = run("diff", "parallel", "--world-size=4", "--min-bytes=0")
    assert result.code == 0
    assert "-all_reduce: f32[16, 64] = _c10d_functional.all_reduce.default" in result.out
    assert "_c10d_functional.all_reduce.default" in result.out.split("@@")[-1]
    assert result.err == ""


def test_simulated_ranks_of_a_model_that_needs_none(run: Run) -> None:
    result = run("diff", "no_blocks", "--world-size", "2", "--modules", "")
    assert result.code == 0
    assert "+fake_wire" in result.out


# ---- errors -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("missing", "cannot be loaded: AttributeError: module 'factories' has no attribute"),
        ("nowhere.models:f", "cannot be loaded: ModuleNotFoundError: No module named 'nowhere'"),
        ("..up:f", "cannot be loaded: TypeError"),
        ("syntax.py:f", "cannot be loaded: SyntaxError: invalid syntax"),
        ("crashes.py:f", "cannot be loaded: ZeroDivisionError: division by zero"),
        ("imports.py:f", "No module named 'no_such_module_at_all'"),
        ("number", "gave int; it must return a torch.nn.Module"),
        ("three_but_no_tuple", "gave Net, Tensor, dict; it must return"),
        ("four", "gave Net, tuple, dict, int; it must return"),
        ("wants_an_argument", "cannot be called without arguments: TypeError"),
        ("broken", "cannot be called without arguments: RuntimeError: no luck"),
        ("without_inputs", "Net has no example inputs"),
        ("instance", "Net has no example inputs"),
        ("no_blocks", "Linear has no repeated blocks"),
        ("wrong_shape", "mat1 and mat2 shapes cannot be multiplied"),
    ],
)
def test_bad_targets(run: Run, folder: Path, target: str, message: str) -> None:
    if target.split(":")[0] in ("syntax.py", "crashes.py", "imports.py"):
        target = f"{folder}/{target}"
    result = run("explain", target)
    assert result.code == 3
    assert result.out == ""
    assert message in result.err


def test_boundaries_that_the_model_has_not(run: Run) -> None:
    result = run("explain", "net", "--modules=layers.7")
    assert (result.code, result.out) == (3, "")
    assert "no module that is called matches 'layers.7'" in result.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["frobnicate"], "invalid choice: 'frobnicate'"),
        (["explain"], "the following arguments are required: MODULE:FACTORY"),
        (["explain", "a:b", "--min-bytes", "many"], "'many' is not 0 or more"),
        (["explain", "a:b", "--min-bytes=-1"], "'-1' is not 0 or more"),
        (["explain", "a:b", "--bits", "7"], "bits=7 is not supported: choose one of (2, 3, 4"),
        (["diff", "a:b", "--bits", "abc"], "format='abc' is not supported"),
        (["diff", "a:b", "--bits", "4b:g64:g32"], "'g32' says group_size once more"),
        (["explain", "a:b", "--policy", "/no/policy.toml"], "it cannot be read"),
        (["explain", "a:b", "--policy", __file__], "write TOML"),
        (["explain", "a:b", "--policy", "."], "it cannot be read"),
        (["explain", "a:b", "--bits", "4", "--policy", "p"], "it cannot be read"),
        (["diff", "a:b", "--html", "/no/folder.html"], "is no name for a file in a folder"),
        (["explain", "no_colon_at_all"], "'no_colon_at_all' is not MODULE:FACTORY"),
        (["analyze", ":f"], "':f' is not MODULE:FACTORY"),
        (["residuals", "a:"], "'a:' is not MODULE:FACTORY"),
        (["residuals", "/nowhere/absent.py:f"], "there is no file /nowhere/absent.py"),
        (["explain", "a:b", "--world-size", "0"], "'0' is not 1 or more"),
        (["residuals", "a:b", "--html", "x"], "unrecognized arguments: --html"),
        (["plan", "a:b"], "one of the arguments --bytes --seconds --loss is required"),
        (["plan", "a:b", "--bytes", "1", "--loss", "1"], "not allowed with argument --bytes"),
        (["plan", "a:b", "--bytes", "few"], "invalid float value: 'few'"),
        (["plan", "a:b", "--bytes", "1", "--formats", "4,9"], "bits=9 is not supported"),
        (["plan", "a:b", "--seconds", "1", "--link", "fast"], "give numbers, as in 125e6,1e-4"),
        (["plan", "a:b", "--seconds", "1", "--link", "0"], "bytes a second, above 0"),
    ],
)
def test_usage_errors(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err


def test_bits_and_a_policy_exclude_one_another(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (file := tmp_path / "policy.toml").write_text("bits = 4")
    with pytest.raises(SystemExit) as caught:
        main(["explain", "a:b", "--bits", "4", "--policy", str(file)])
    assert caught.value.code == 2
    assert "not allowed with argument --bits" in capsys.readouterr().err


def test_the_environment_is_the_default(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RFCOMPILE_BITS", "2b:g64")
    assert "2b:g64" in run("explain", "net").out
    assert "8b:g128" in run("explain", "net", "--bits", "8").out
    monkeypatch.setenv("RFCOMPILE_POLICY", "policy.toml")
    both = run("explain", "net")
    assert both.code == 3
    assert "unset one of the two" in both.err


def test_a_factory_that_exits_does_not_choose_the_code(run: Run) -> None:
    assert run("explain", "exits").code == 3


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    for option, expected in (("--version", "rfcompile "), ("--help", "usage: rfcompile")):
        with pytest.raises(SystemExit) as caught:
            main([option])
        assert caught.value.code == 0
        assert capsys.readouterr().out.startswith(expected)


# ---- processes --------------------------------------------------------------------------------


def process(command: list[str], folder: Path, **env: Any) -> Result:
    done = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return Result(done.returncode, done.stdout, done.stderr)


@pytest.mark.slow
def test_as_a_module_and_as_a_script(folder: Path, root: Path) -> None:
    """A module name is found in the working directory; the exit code is the process's."""
    module = [sys.executable, "-W", "error::UserWarning", "-m", "rfcompile.cli"]
    result = process([*module, "explain", "factories:net"], folder, PYTHONPATH=str(root))
    assert result.code == 0, result.err
    assert result.out.startswith("4 of 4 sites quantized")
    assert result.err == ""

    script = shutil.which("rfcompile", path=str(Path(sys.executable).parent))
    if script:
        result = process([script, "explain", "factories:net", "--bits", "7"], folder)
        assert (result.code, result.out) == (2, "")
        assert "bits=7 is not supported" in result.err


def test_the_documented_exit_codes() -> None:
    import rfcompile.cli

    text = dedent(rfcompile.cli.__doc__ or "")
    assert all(f"\n{code}    " in text for code in range(4))
