"""The graphs that the backend "rfquant" hands to Inductor, forward and backward, of one step."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from rfcompile.emission.absent_gpu import DEVICE
from rfcompile.graph.one_step import run_backward
from rfcompile.graph.places import source_of
from rfcompile.inductor.backend import rewritten


@dataclass(frozen=True)
class CapturedGraph:
    """A rewritten graph, as Inductor would get it.

    Args:
        direction: "forward" or "backward".
        is_inference: no backward pass follows.
    """

    gm: fx.GraphModule
    direction: str
    is_inference: bool

    @property
    def place(self) -> str:
        """The first line of the model that it has a node of."""
        return next(filter(None, map(source_of, self.gm.graph.nodes)), "")


def capture(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], options: Mapping[str, Any]
) -> list[CapturedGraph]:
    """Compile ``model`` with the backend, run it forward and backward, and return its graphs.

    The passes see a model on a GPU. The graphs run as they are, so that what comes after a graph
    break and the backward pass are captured too. A graph is captured once, however often it runs.

    Args:
        options: of the backend.
    """
    found: list[CapturedGraph] = []

    def take(gm: fx.GraphModule, example_inputs: Sequence[Any], **given: Any) -> Any:
        direction = "backward" if given.get("is_backward") else "forward"
        same = fx.GraphModule(gm, copy.deepcopy(gm.graph))  # it shares the constants
        found.append(CapturedGraph(same, direction, bool(given.get("is_inference"))))
        return _boxed(gm)

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        return rewritten(gm, example_inputs, options, take, DEVICE)

    def call(*args: Any, **kwargs: Any) -> Any:
        return model(*args, **kwargs)

    # Code of its own: a graph that is compiled already would not be captured again.
    call.__code__ = call.__code__.replace()
    run_backward(model, torch.compile(call, backend=backend, dynamic=False)(*args, **kwargs))
    return found


def _boxed(gm: fx.GraphModule) -> Callable[[list[Any]], Any]:
    def run(inputs: list[Any]) -> Any:
        given = list(inputs)
        inputs.clear()
        return gm.forward(*given)

    run._boxed_call = True  # type: ignore[attr-defined]
    return run
