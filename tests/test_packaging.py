"""What is installed: packages, wheel, entry points, public names, and how it may be imported."""

from __future__ import annotations

import ast
import importlib
import json
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Callable, Iterator
from configparser import ConfigParser
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())

PUBLIC_NAMES = [
    "Adapters",
    "Link",
    "LowRank",
    "Policy",
    "QuantFormat",
    "Report",
    "ResidualFree",
    "Scores",
    "Site",
    "Wire",
    "adapters",
    "all_gather",
    "all_reduce",
    "all_to_all",
    "analyze",
    "broadcast",
    "dequantize",
    "diff",
    "distributed",
    "errors",
    "experimental",
    "explain",
    "find_residuals",
    "frontier",
    "inductor_pass",
    "joint_pass",
    "kernels",
    "low_rank",
    "measure_crossover",
    "measure_link",
    "measure_step",
    "merge_reports",
    "plan",
    "quantize",
    "quantize_traffic",
    "reduce_scatter",
    "register_collective",
    "reports",
    "rewrites_of",
    "score",
    "set_default_policy",
    "training",
    "transform",
]


FORKS = """
import json, os, sys, traceback
import torch
for line in sys.stdin:
    reader, writer = os.pipe()
    if os.fork() == 0:
        os.dup2(writer, 1)
        code = 0
        try:
            exec(json.loads(line), {"__name__": "__main__"})
        except BaseException:
            traceback.print_exc(file=sys.stdout)
            code = 1
        sys.stdout.flush()
        os._exit(code)
    os.close(writer)
    with os.fdopen(reader) as output:
        text = output.read()
    print(json.dumps([os.waitstatus_to_exitcode(os.wait()[1]), text]), flush=True)
"""
RunPython = Callable[[str], tuple[int, str]]
OutputOf = Callable[[str], str]


@pytest.fixture(scope="module")
def run_python() -> Iterator[RunPython]:
    """Exit code and output of a program, in a process of its own that has imported torch only."""
    command = [sys.executable, "-c", FORKS]
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, cwd=ROOT, text=True, **pipes) as server:
        assert server.stdin is not None
        assert server.stdout is not None
        requests, answers = server.stdin, server.stdout

        def run(code: str) -> tuple[int, str]:
            print(json.dumps(code), file=requests, flush=True)
            returned, output = json.loads(answers.readline())
            return returned, output.strip()

        yield run


@pytest.fixture
def output_of(run_python: RunPython) -> OutputOf:
    """What a program prints that does not fail."""

    def run(code: str) -> str:
        returned, output = run_python(code)
        assert returned == 0, output
        return output

    return run


def folders_with_python() -> set[str]:
    """Dotted names of the folders that hold modules, by the packaging's own mapping."""
    found = set()
    for folder, prefix in (("rfcompile", "rfcompile"), ("passes", "rfcompile.passes")):
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT / folder).parent.parts
            if folder == "rfcompile" and parts[:1] == ("passes",):
                continue
            found.add(".".join([prefix, *parts]))
    return found


def test_listed_packages_are_the_folders_on_disk() -> None:
    setuptools = PROJECT["tool"]["setuptools"]
    assert set(setuptools["packages"]) == folders_with_python()
    assert setuptools["package-dir"]["rfcompile.passes"] == "passes"
    link = ROOT / "rfcompile" / "passes"
    assert link.is_symlink()
    assert link.readlink() == Path("../passes")


def test_nothing_pins_an_upper_bound_or_functorch() -> None:
    optional = PROJECT["project"]["optional-dependencies"].values()
    for requirement in [*PROJECT["project"]["dependencies"], *(r for rs in optional for r in rs)]:
        assert not set("<=~!") & set(requirement.replace(">=", "")), requirement
        assert "functorch" not in requirement


def test_passes_is_not_a_top_level_module(run_python: RunPython) -> None:
    returned, output = run_python("import passes")
    assert returned != 0
    assert "ImportError" in output
    assert "import it as 'rfcompile.passes'" in output


def test_passes_exists_once(output_of: OutputOf) -> None:
    code = """
import sys, rfcompile.passes
from pathlib import Path
file = Path(rfcompile.passes.__file__).resolve()
copies = [n for n, m in sys.modules.items()
          if getattr(m, "__file__", None) and Path(m.__file__).resolve() == file]
print(copies, rfcompile.passes is sys.modules["rfcompile.passes"])
"""
    assert output_of(code) == "['rfcompile.passes'] True"


def test_the_public_names_are_exactly_these() -> None:
    import rfcompile

    assert sorted(rfcompile.__all__) == PUBLIC_NAMES
    for name in PUBLIC_NAMES:
        assert getattr(rfcompile, name) is not None
        assert name in dir(rfcompile)


def test_the_public_names_of_distributed_are_exactly_these() -> None:
    from rfcompile import distributed

    assert sorted(distributed.__all__) == [
        "DDPHandle",
        "FSDPHandle",
        "QuantizedPipelineStage",
        "broadcast_states",
        "quantize_ddp",
        "quantize_fsdp",
        "quantize_pipeline_stage",
        "split_at_boundaries",
    ]
    assert all(hasattr(distributed, name) for name in distributed.__all__)


@pytest.mark.parametrize(
    ("door", "names"),
    [
        (
            "adapters",
            "AdaptedLinear AdapterReport QuantizedReport broadcast load merge quantize save",
        ),
        ("low_rank", "LowRankLinear LowRankReport effective_ranks merge stable_rank_bounds"),
        ("experimental", "GrayingReport PolynomialAttention PolynomialReport TokenGraying"),
    ],
)
def test_the_public_names_of_a_namespace_are_exactly_these(door: str, names: str) -> None:
    module = importlib.import_module(f"rfcompile.{door}")
    assert module.__all__ == names.split()
    assert all(hasattr(module, name) for name in module.__all__)


def test_importing_the_package_loads_next_to_nothing(output_of: OutputOf) -> None:
    code = (
        "import sys, torch; before = set(sys.modules); import rfcompile;"
        "print(sorted(set(sys.modules) - before))"
    )
    assert output_of(code) == "['rfcompile', 'rfcompile.codec', 'rfcompile.codec.on_use']"


@pytest.mark.slow
def test_operators_are_defined_when_one_is_asked_for(output_of: OutputOf) -> None:
    code = (
        "import pkgutil, torch, rfcompile; "
        "from importlib import import_module; "
        "from importlib.util import find_spec; "
        "asked = torch.ops.rfcompile.quantize.default; "
        "names = lambda: {n for n in torch._C._dispatch_get_all_op_names() if 'rfcompile::' in n}; "
        "found = names(); "
        "[import_module(m.name) for m in pkgutil.walk_packages(rfcompile.__path__, 'rfcompile.')"
        " if not m.name.endswith('__main__')"
        " and (not m.name.startswith('rfcompile.codec.triton_') or find_spec('triton'))]; "
        "print(asked, asked is rfcompile.codec.operators.quantize, sorted(names() - found), "
        "hasattr(torch.ops.rfcompile, 'surprise'))"
    )
    assert output_of(code) == "rfcompile.quantize.default True [] False"


def test_the_codec_does_not_load_the_compiler(output_of: OutputOf) -> None:
    # Seconds of start-up. (Dynamo comes along with torch.compiler's decorators.)
    heavy = {"torch._inductor.lowering", "torch._inductor.compile_fx", "rfcompile.inductor.backend"}
    heavy |= {"torch._inductor.codecache", "torch.distributed.pipelining"}
    heavy |= {"rfcompile.distributed", "rfcompile.adapters"}
    code = (
        "import sys, torch, rfcompile as rf; rf.dequantize(rf.quantize(torch.ones(3), 4), 4, (3,));"
        f"print(sorted({heavy!r} & set(sys.modules)))"
    )
    assert output_of(code) == "[]"


def test_type_checkers_see_the_names_that_are_loaded_on_use() -> None:
    import rfcompile

    tree = ast.parse((ROOT / "rfcompile" / "__init__.py").read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {
        alias.name: (node.module or "").removeprefix("rfcompile").removeprefix(".")
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert seen == rfcompile._HOME_OF | dict.fromkeys(rfcompile._PACKAGES, "")
    assert sorted(seen) == sorted(rfcompile.__all__)


def test_a_public_name_is_never_the_module_of_that_name(output_of: OutputOf) -> None:
    code = (
        "import rfcompile as rf, rfcompile.explain, rfcompile.analyze, rfcompile.cli;"
        "from rfcompile import rewrites_of;"
        "print([callable(x) for x in (rf.diff, rf.explain, rf.analyze, rewrites_of, rf.transform)],"
        "rf.errors.FormatError.__name__, rf.distributed.quantize_ddp.__name__, 'diff' in dir(rf))"
    )
    assert output_of(code) == f"{[True] * 5} FormatError quantize_ddp True"
    import rfcompile

    with pytest.raises(AttributeError, match="module 'rfcompile' has no attribute 'surprise'"):
        rfcompile.surprise  # noqa: B018


def test_entry_points_lead_somewhere() -> None:
    project = PROJECT["project"]
    assert project["entry-points"]["torch_dynamo_backends"] == {
        "rfquant": "rfcompile.inductor.backend:rfquant"
    }
    assert project["scripts"] == {"rfcompile": "rfcompile.cli:main"}
    for target in ("rfcompile.inductor.backend:rfquant", "rfcompile.cli:main"):
        module, _, function = target.partition(":")
        source = ROOT / (module.replace(".", "/") + ".py")
        defined = [n.name for n in ast.parse(source.read_text()).body if hasattr(n, "name")]
        assert function in defined


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """A wheel built from a copy of the sources, so that no older build folder can leak into it."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("rfcompile", "passes"):
        shutil.copytree(
            ROOT / name, folder / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__")
        )
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / name)
    (folder / "dist").mkdir()
    build = "from setuptools.build_meta import build_wheel; build_wheel('dist')"  # as pip does
    result = subprocess.run(
        [sys.executable, "-c", build], cwd=folder, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    [path] = (folder / "dist").glob("*.whl")
    return zipfile.ZipFile(path)


def test_the_wheel_holds_every_module_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    expected = {
        *("rfcompile/py.typed", "rfcompile/codec/cpu_kernels.cpp"),
        *("rfcompile/report/page/style.css", "rfcompile/report/page/script.js"),
    }
    for folder, prefix in (("rfcompile", "rfcompile"), ("passes", "rfcompile/passes")):
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT / folder).as_posix()
            if not (folder == "rfcompile" and parts.startswith("passes/")):
                expected.add(f"{prefix}/{parts}")
    files = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert files == expected


def test_the_wheel_carries_entry_points_and_licence(wheel: zipfile.ZipFile) -> None:
    [info] = {name.split("/")[0] for name in wheel.namelist() if ".dist-info/" in name}
    entry_points = ConfigParser()
    entry_points.read_string(wheel.read(f"{info}/entry_points.txt").decode())
    assert dict(entry_points["torch_dynamo_backends"]) == {
        "rfquant": "rfcompile.inductor.backend:rfquant"
    }
    assert dict(entry_points["console_scripts"]) == {"rfcompile": "rfcompile.cli:main"}
    licence = wheel.read(f"{info}/licenses/LICENSE").decode()
    assert licence.split()[:4] == ["Apache", "License", "Version", "2.0,"]
    assert licence == (ROOT / "LICENSE").read_text()
    metadata = wheel.read(f"{info}/METADATA").decode()
    assert "License-Expression: Apache-2.0" in metadata
    assert "Requires-Python: >=3.11" in metadata


def test_the_corpus_is_the_one_its_readme_names() -> None:
    import hashlib

    data = ROOT / "examples" / "data"
    digest = hashlib.sha256((data / "shakespeare.txt.gz").read_bytes()).hexdigest()
    assert digest in (data / "README.md").read_text()
