"""Compiled graphs kept on disk: used again when nothing changed, never when something did.

Every run is two new processes on gloo (this file, run as a program).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

Run = Callable[..., dict[str, Any]]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Compile and train on two ranks; ``package``: a folder that holds another copy of ours.

    Runs of one test share a cache that nobody else uses: kernels are found by their text, but the
    keys of graphs hold a tag.
    """
    tag = uuid.uuid4().hex

    def run_it(options: dict[str, Any], package: Path | None = None) -> dict[str, Any]:
        path = [str(package)] if package else []
        if os.environ.get("PYTHONPATH"):
            path.append(os.environ["PYTHONPATH"])
        environment = os.environ | {
            "TORCH_COMPILE_CACHE_KEY_TAG": tag,
            "TORCHINDUCTOR_COMPILE_THREADS": "1",
            "OMP_NUM_THREADS": "1",
            **({"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}),
            "PYTHONPATH": os.pathsep.join(path),
        }
        store = tmp_path / f"store-{uuid.uuid4().hex}"
        command = [sys.executable, __file__, json.dumps(options), str(store)]
        ranks = [
            subprocess.Popen(
                [*command, str(rank)],
                env=environment,
                cwd=tmp_path,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(2)
        ]
        answers = []
        try:
            for rank in ranks:
                out, err = rank.communicate(timeout=240)
                assert rank.returncode == 0, err[-4000:]
                answers.append(json.loads(out.splitlines()[-1]))
        finally:
            for rank in ranks:
                rank.kill()
                rank.communicate()
        assert answers[0] == answers[1]
        answer: dict[str, Any] = answers[0]
        if package:
            assert Path(answer["file"]).is_relative_to(package)
        return answer

    return run_it


@pytest.mark.slow
def test_graphs_are_used_again_until_options_or_sources_change(
    run: Run, root: Path, tmp_path: Path
) -> None:
    four_bits = {"bits": 4, "min_bytes": 0, "strict": True}
    first = run(four_bits)
    assert (first["hits"], first["misses"]) == (0, 3)
    assert first["compiled"] == first["eager"]
    assert [site["format"] for site in first["sites"]] == ["4b:g128:rise", "4b:g128:tread"]

    again = run(four_bits)
    assert (again["hits"], again["misses"]) == (3, 0)
    assert again == first | {"hits": 3, "misses": 0}  # the report too

    eight_bits = run(four_bits | {"bits": 8})
    assert (eight_bits["hits"], eight_bits["misses"]) == (1, 2)  # the plain graph has no options
    assert eight_bits["compiled"] == eight_bits["eager"] != first["eager"]
    assert [site["format"] for site in eight_bits["sites"]] == ["8b:g128:tread"] * 2

    shutil.copytree(root / "rfcompile", tmp_path / "edited" / "rfcompile")  # the link as a folder
    formats = tmp_path / "edited" / "rfcompile" / "codec" / "formats.py"
    before = formats.read_text()
    assert before.count("16: 0.3352") == 1
    formats.write_text(before.replace("16: 0.3352", "16: 0.3"))
    edited = run(four_bits, tmp_path / "edited")
    assert (edited["hits"], edited["misses"]) == (0, 3)
    assert edited["compiled"] == edited["eager"] != first["eager"]
    assert edited["plain"] != first["plain"]
    assert edited["sites"] == first["sites"]


# ---- one rank ------------------------------------------------------------------------------------


def main(options: dict[str, Any], store: str, rank: int) -> dict[str, Any]:
    import torch.distributed._functional_collectives as funcol

    import rfcompile as rf

    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))

    def trained(f: Callable[[Tensor], Tensor]) -> str:
        leaf = x.clone().requires_grad_()
        y = f(leaf)
        y.sum().backward()
        assert leaf.grad is not None
        data = torch.cat([y.detach(), leaf.grad]).numpy().tobytes()
        return hashlib.sha256(data).hexdigest()

    compiled = torch.compile(
        lambda x: funcol.all_reduce(x * 2, "sum", dist.group.WORLD).square(),
        backend="rfquant",
        options=options,
        fullgraph=True,
    )
    plain = torch.compile(lambda x: rf.all_reduce(x, 4), fullgraph=True)
    result = {
        "compiled": trained(compiled),
        "eager": trained(lambda x: rf.all_reduce(x * 2, options["bits"]).square()),
        "plain": hashlib.sha256(plain(x).numpy().tobytes()).hexdigest(),
        "sites": [site for report in rf.reports() for site in report.to_dict()["sites"]],
        "file": rf.__file__,
    }
    counters = torch._dynamo.utils.counters["inductor"]
    dist.destroy_process_group()
    return result | {
        "hits": counters["fxgraph_cache_hit"],
        "misses": counters["fxgraph_cache_miss"],
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(main(json.loads(sys.argv[1]), sys.argv[2], int(sys.argv[3]))))
