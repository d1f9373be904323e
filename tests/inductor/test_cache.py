"""Compiled graphs kept on disk: used again when nothing changed, never when something did.

One job on two ranks compiles again and again; one of them at a time by Inductor, whose graphs the
other runs as they are.
"""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch import Tensor

import rfcompile as rf
from rfcompile.codec import cpu_codec, formats
from rfcompile.codec.fingerprint import source_digest
from rfcompile.inductor import lowering
from tests.inductor.test_backend import graphs_run_as_they_are

if TYPE_CHECKING:
    from tests.ranks import Rank, RunRanks

pytestmark = pytest.mark.slow

FOUR_BITS, EIGHT_BITS = "4b:tensor", "8b:tensor"  # which Inductor compiles in a third of the time
Runs = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def runs(ranks: RunRanks) -> Runs:
    """By what was done: hits and misses of the cache, what was computed, and the report."""
    zero, one = ranks(2, compile_often, uuid.uuid4().hex)
    assert not zero.keys() & one.keys()
    return {**zero, **one}


def test_graphs_are_compiled_once(runs: Runs) -> None:
    first = runs["first"]
    assert (first["hits"], first["misses"]) == (0, 3)
    assert first["compiled"] == first["eager"]
    assert [site["format"] for site in first["sites"]] == ["4b:tensor:rise", "4b:tensor:tread"]


@pytest.mark.parametrize("run", ["again", "of another process"])
def test_graphs_are_used_again(runs: Runs, run: str) -> None:
    assert runs[run] == runs["first"] | {"hits": 3, "misses": 0}  # the report too


def test_other_options_are_other_graphs(runs: Runs) -> None:
    first, eight_bits = runs["first"], runs["eight bits"]
    assert (eight_bits["hits"], eight_bits["misses"]) == (1, 2)  # the plain graph has no options
    assert eight_bits["compiled"] == eight_bits["eager"] != first["eager"]
    assert [site["format"] for site in eight_bits["sites"]] == ["8b:tensor:tread"] * 2


def test_other_sources_are_other_graphs(runs: Runs) -> None:
    first, edited = runs["first"], runs["edited"]
    assert (edited["hits"], edited["misses"]) == (0, 3)
    assert edited["compiled"] == edited["eager"] != first["eager"]
    assert edited["plain"] != first["plain"]
    assert edited["sites"] == first["sites"]


def test_every_edit_changes_the_digest_of_the_sources(root: Path, tmp_path: Path) -> None:
    copy = tmp_path / "rfcompile"
    shutil.copytree(root / "rfcompile", copy)  # the link as a folder
    assert digest_of(copy) == source_digest()
    for name in ("codec/formats.py", "passes/merge_collectives.py"):
        (copy / name).write_text((copy / name).read_text().replace("1", "2", 1))
        assert digest_of(copy) != source_digest()
        shutil.copy(root / "rfcompile" / name, copy / name)
    assert digest_of(copy) == source_digest()


def digest_of(package: Path) -> str:
    """By the copy's own file."""
    spec = importlib.util.spec_from_file_location(
        "fingerprint", package / "codec" / "fingerprint.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    digest: str = module.source_digest()
    return digest


# ---- on a rank -----------------------------------------------------------------------------------


def compile_often(rank: Rank, tag: str) -> Runs:
    """What this rank compiled by Inductor."""
    found = {}
    for what, compiler in {
        "first": 0, "again": 0, "of another process": 1, "eight bits": 0, "edited": 0
    }.items():  # fmt: skip
        fmt = EIGHT_BITS if what == "eight bits" else FOUR_BITS
        is_mine = rank.index == compiler
        sources = edited() if what == "edited" else nullcontext()
        with fresh(tag), sources, nullcontext() if is_mine else graphs_run_as_they_are():
            result = compiled_and_run(fmt, "inductor" if is_mine else "aot_eager")
        if is_mine:
            found[what] = result
    return found


@contextmanager
def fresh(tag: str) -> Iterator[None]:
    """As in a process that has compiled nothing."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    rf.reports(clear=True)
    with torch.compiler.config.patch(cache_key_tag=tag):
        yield


@contextmanager
def edited() -> Iterator[None]:
    """Other sources: another step of 4 bits."""
    with (
        patch.dict(formats._GAUSSIAN_STEP, {16: 0.3}),
        patch.object(lowering, "source_digest", lambda: "edited"),
        patch.object(cpu_codec, "_format", cpu_codec._format.__wrapped__),  # keeps the old step
    ):
        yield


def compiled_and_run(fmt: str, backend_of_plain: str) -> dict[str, Any]:
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))

    def trained(f: Callable[[Tensor], Tensor]) -> str:
        leaf = x.clone().requires_grad_()
        y = f(leaf)
        y.sum().backward()
        assert leaf.grad is not None
        data = torch.cat([y.detach(), leaf.grad]).numpy().tobytes()
        return hashlib.sha256(data).hexdigest()

    compiled = torch.compile(
        lambda x: funcol.all_gather_tensor_autograd(x * 2, 0, dist.group.WORLD).square(),
        backend="rfquant",
        options={"activations": fmt, "gradients": fmt, "min_bytes": 0, "strict": True},
        fullgraph=True,
    )
    plain = torch.compile(
        lambda x: rf.all_gather(x, FOUR_BITS), fullgraph=True, backend=backend_of_plain
    )
    result = {
        "compiled": trained(compiled),
        "eager": trained(lambda x: rf.all_gather(x * 2, fmt).square()),
        "plain": hashlib.sha256(plain(x).numpy().tobytes()).hexdigest(),
        "sites": [site for report in rf.reports() for site in report.to_dict()["sites"]],
    }
    counters = torch._dynamo.utils.counters["inductor"]
    return result | {
        "hits": counters["fxgraph_cache_hit"],
        "misses": counters["fxgraph_cache_miss"],
    }
