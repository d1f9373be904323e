"""Graphs with collectives from no process but this one: open it to write a test of a pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import pytest
import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from rfcompile.wire.process_groups import simulated


class Trace(Protocol):
    """The type of the fixture ``trace``."""

    def __call__(
        self, f: Callable[..., Any], *args: torch.Tensor, dynamic: bool = ...
    ) -> fx.GraphModule: ...


@pytest.fixture
def trace() -> Iterator[Trace]:
    """Trace a function on fake tensors, in the default group of 4 simulated ranks."""

    def run(f: Callable[..., Any], *args: torch.Tensor, dynamic: bool = False) -> fx.GraphModule:
        mode = "symbolic" if dynamic else "fake"
        graph: fx.GraphModule = make_fx(f, tracing_mode=mode)(*args)
        return graph

    with simulated(4):
        yield run
