"""One report of a whole training step: compiled graphs, DDP's hook and optimizer states."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
import torch.distributed._functional_collectives as funcol
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import rfcompile as rf
from rfcompile.distributed import quantize_ddp
from rfcompile.training import quantize_states
from tests.inductor.test_backend import graphs_run_as_they_are

if TYPE_CHECKING:
    from tests.ranks import Rank, RunRanks

WIDTH = 64


def step(rank: Rank) -> rf.Report:
    torch.manual_seed(rank.index)
    ddp = DistributedDataParallel(nn.Linear(WIDTH, WIDTH, bias=False))
    sites = {"weight": 4, "haed": None}
    hook = quantize_ddp(ddp, rf.Policy.of(bits=4, min_bytes=0, sites=sites))
    optimizer = torch.optim.AdamW(ddp.parameters())
    states = quantize_states(optimizer, rf.Policy.of(bits=8, min_bytes=0))

    def total(x: Tensor) -> Tensor:
        return funcol.all_reduce(x, "sum", list(range(rank.world)))

    rf.reports(clear=True)
    options = {"bits": 8, "min_bytes": 0, "sites": sites}
    compiled = torch.compile(total, backend="rfquant", options=options, dynamic=False)
    with graphs_run_as_they_are():
        compiled(ddp(torch.randn(4, WIDTH)).detach())
    ddp(torch.randn(4, WIDTH)).sum().backward()
    optimizer.step()
    (graph,) = rf.reports()
    assert graph.patterns == {"weight": False, "haed": False}
    assert hook.report().patterns == {"weight": True, "haed": False}
    return rf.merge_reports(rf.reports(clear=True), hook, states)


@pytest.mark.slow
def test_a_step_is_one_table(ranks: RunRanks) -> None:
    first, second = ranks(2, step)
    kinds = {line.kind: line for line in first.kinds}
    assert [*kinds] == ["activations", "gradients", "optimizer_state"]
    assert kinds["activations"].bytes_before == 4 * 4 * WIDTH
    assert kinds["gradients"].bytes_before == 4 * WIDTH * WIDTH
    assert kinds["optimizer_state"].is_kept
    assert first.bytes_before == 4 * 4 * WIDTH + 4 * WIDTH * WIDTH
    assert first.bytes_after == sum(
        kinds[kind].bytes_after for kind in ("activations", "gradients")
    )
    assert kinds["gradients"].ratio > 7
    assert [note for note in first.notes if "nothing" in note] == [
        "sites['haed'] applies to nothing here: no name matches that none before it takes"
    ]
    assert "(kept)" in first.text()
    assert [line.bytes_after for line in second.kinds] == [line.bytes_after for line in first.kinds]
