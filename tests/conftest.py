"""What all tests share: seeds, caches, threads, the skip of GPU tests; open it to add a fixture.

The environment is set before torch is imported, so that child processes inherit it.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import platform
import random
import shutil
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def _source_hash() -> str:
    digest = hashlib.sha256()
    for folder in ("rfcompile", "passes"):
        for path in sorted((ROOT / folder).glob("**/*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _num_cpus() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


# One cache for the session and the next ones: kernels are stored by their own text. Compiled graphs
# are not (no key of torch covers our lowerings), so their keys carry a hash of the sources.
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(ROOT / ".cache" / "inductor"))
os.environ.setdefault("TRITON_CACHE_DIR", str(ROOT / ".cache" / "triton"))
os.environ.setdefault("TORCH_COMPILE_CACHE_KEY_TAG", _source_hash())
# A container may show the host's cores: more threads than granted cores only wait for one another.
os.environ.setdefault("OMP_NUM_THREADS", str(min(4, _num_cpus())))
# Threads that wait must sleep: spinning ones made a busy machine six times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if sys.platform == "linux" and platform.machine() == "x86_64" and shutil.which("g++"):
    # Trust the CPU's own flags instead of compiling a probe for each instruction set (10 s): any
    # g++ that compiles torch's headers knows them.
    os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")

import numpy as np  # noqa: E402  (after the environment)
import torch  # noqa: E402

from tests.ranks import ranks  # noqa: E402
from tests.traces import trace  # noqa: E402

__all__ = ["ranks", "trace"]

# pytest listens to every logger that does not propagate, and torch writes a trace of each compile
# as soon as somebody listens: that took an eighth of the time of tests that compile.
logging.getLogger("torch.__trace").propagate = True


def pytest_report_header() -> str:
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "NONE, gpu tests skip"
    return f"torch {torch.__version__}, {torch.get_num_threads()} threads, CUDA device: {gpu}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing = {
        "gpu": "" if torch.cuda.is_available() else "a CUDA device, and torch sees none",
        "kernels": "" if importlib.util.find_spec("triton") else "triton (make test-kernels)",
        "clients": "" if importlib.util.find_spec("lightning") else "Lightning (make test-clients)",
        "torchtitan": ""
        if importlib.util.find_spec("torchtitan")
        else "torchtitan (make test-torchtitan)",
        "pages": ""
        if importlib.util.find_spec("playwright") and shutil.which("chromium")
        else "Chromium and playwright (make test-pages)",
    }
    for item in items:
        for marker, what in missing.items():
            if what and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=f"NOT TESTED HERE: needs {what}"))


CPU_SECONDS = 10.0
"""What a test without the mark ``slow`` may use."""
HEAVY = ("torch._dynamo", "torch._inductor.compile_fx", "transformers")
"""Importing one takes seconds, in whichever test happens to be the first."""


def cpu_seconds(children: bool) -> float:
    """What this process has used so far, and the children that it has waited for."""
    times = os.times()
    own = times.user + times.system
    return own + times.children_user + times.children_system if children else own


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """Fail a test that is slow and does not say so, or ``slow`` would come to mean nothing.

    The processes of the fixture ``ranks`` serve many tests: no single one is charged for them. Nor
    is a test judged that was the first to import a heavy module.
    """
    children = "ranks" not in getattr(item, "fixturenames", ())
    loaded = sys.modules.keys() & set(HEAVY)
    start = cpu_seconds(children)
    result = yield
    used = cpu_seconds(children) - start
    is_first = loaded != sys.modules.keys() & set(HEAVY)
    if used > CPU_SECONDS and not is_first and item.get_closest_marker("slow") is None:
        pytest.fail(
            f"{item.nodeid} used {used:.1f} s of CPU time; a test without the mark 'slow' may use "
            f"{CPU_SECONDS:.0f} s. Make it smaller, or mark it with @pytest.mark.slow.",
            pytrace=False,
        )
    return result


@pytest.fixture(autouse=True)
def _fresh_state() -> Iterator[None]:
    """Same seeds for each test; nothing compiled in one test is reused in the next."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    yield
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


@pytest.fixture
def rfquant_without_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    """The backend rfquant but for its last step: its graphs run as they are, none becomes C++."""
    from torch._functorch.aot_autograd import make_boxed_func

    from rfcompile.inductor import backend

    def interpreted(gm: torch.fx.GraphModule, inputs: object, **_: object) -> object:
        return make_boxed_func(gm.forward)

    monkeypatch.setattr(backend, "compile_fx_inner", interpreted)


@pytest.fixture(scope="session")
def root() -> Path:
    """The root of the repository."""
    return ROOT


@pytest.fixture(scope="session")
def rotation_blocks() -> Callable[[torch.Tensor, int], torch.Tensor]:
    """Groups ``[.., E]`` as the blocks of ``n`` that are rotated, ``[.., n, E / n]``."""

    def blocks(groups: torch.Tensor, n: int) -> torch.Tensor:
        places = min(n, 8)
        apart = groups.unflatten(-1, (places, -1, n // places))
        return apart.transpose(-1, -2).flatten(-3, -2)

    return blocks


@pytest.fixture(scope="session")
def rotation_matrix() -> Callable[[Sequence[int], int], torch.Tensor]:
    """The orthogonal rotation of a block with these axes in float64, by rotation.py's docstring."""
    from rfcompile.codec.rotation import signs

    def make(axes: Sequence[int], seed: int) -> torch.Tensor:
        rotation = torch.ones(1, 1, dtype=torch.float64)
        for n in axes:
            hadamard = torch.ones(1, 1, dtype=torch.float64)
            while len(hadamard) < n:
                hadamard = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]).double(), hadamard)
            rotation = torch.kron(rotation, hadamard * torch.tensor(signs(n, seed)) / n**0.5)
        return rotation

    return make
