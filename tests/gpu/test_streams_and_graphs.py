"""Streams of their own and CUDA graphs: kernels run where and when torch says."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import rfcompile.inductor.lowering  # noqa: F401  # registers the lowerings
from tests.gpu.on_gpu import (
    ADVICE,
    assert_same,
    by_formula,
    by_operators,
    captured,
    payload_of,
    side_stream,
    wide_values,
)

pytestmark = pytest.mark.filterwarnings(ADVICE)

SOME = ["4b:g128:rise", "3b:g32:tread:stoch", "2b:g128:h32", "8b:tensor", "5b:tensor:h32"]


@pytest.mark.parametrize("fmt", SOME)
def test_a_stream_of_its_own(fmt: str, device: torch.device) -> None:
    """The input is still being computed when the operators are launched."""
    x = wide_values(torch.bfloat16, 8, 4096)
    payload = payload_of(x, fmt)
    turn = torch.eye(2048, dtype=torch.float32, device=device)
    with side_stream(device):
        for _ in range(10):
            turn = turn @ turn
        late = x.to(device) * turn[0, 0].to(torch.bfloat16)
        got = by_operators(late, payload.to(device), fmt)
    assert_same(got, by_formula(x, payload, fmt))


@pytest.mark.slow
@pytest.mark.parametrize("is_compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("fmt", SOME)
def test_a_cuda_graph_is_replayed(fmt: str, is_compiled: bool, device: torch.device) -> None:
    given = wide_values(torch.bfloat16, 4, 3000)
    x, payload = given.to(device), payload_of(given, fmt).to(device)
    run = torch.compile(by_operators, fullgraph=True, dynamic=False)

    def call() -> list[Tensor]:
        return (run if is_compiled else by_operators)(x, payload, fmt)

    replay = captured(device, call)
    for scale in (1, 2, -3):
        other = given * scale
        x.copy_(other)
        payload.copy_(payload_of(other, fmt))
        assert_same(replay(), by_formula(other, payload.cpu(), fmt))


@pytest.mark.slow
@pytest.mark.parametrize("fmt", SOME)
def test_cuda_graphs_of_torch_compile(fmt: str, device: torch.device) -> None:
    """``mode="reduce-overhead"``, which captures by itself."""
    run = torch.compile(by_operators, fullgraph=True, mode="reduce-overhead")
    for scale in (1, 2, -3, 4):
        x = wide_values(torch.bfloat16, 4, 3000) * scale
        payload = payload_of(x, fmt)
        torch.compiler.cudagraph_mark_step_begin()
        assert_same(run(x.to(device), payload.to(device), fmt), by_formula(x, payload, fmt))
