"""How passes run: the protocol of a pass, the runner, and the record of what was done."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal, Protocol

from torch import fx
from torch._logging._internal import trace_structured

from rfcompile.errors import CaptureError
from rfcompile.graph.line_facts import LineFacts
from rfcompile.graph.text import graph_text

log = logging.getLogger(__name__)

Tier = Literal["bitwise", "rounding", "model"]
"""What a pass may do to the numbers: nothing, a stated rounding error, or change the function."""


@dataclass(frozen=True)
class PassResult:
    """What a pass returns: the graph, how many places it changed, and what it found out."""

    gm: fx.GraphModule
    changes: int
    facts: tuple[object, ...] = ()


class GraphPass(Protocol):
    """A rewrite or an analysis: a frozen dataclass whose fields are its options.

    It neither lints nor recompiles: the runner does. ``changes == 0`` promises an unchanged text.
    """

    @property
    def name(self) -> str: ...

    @property
    def tier(self) -> Tier: ...

    def __call__(self, gm: fx.GraphModule) -> PassResult: ...


@dataclass(frozen=True)
class Step:
    """One pass, as it ran; :func:`~rfcompile.graph.text.graph_text` before and after."""

    name: str
    changes: int
    seconds: float
    before: str
    after: str
    facts: tuple[object, ...]


@dataclass(frozen=True)
class Record:
    """The rewritten graph, every step to it, and the facts of the first and of the last text."""

    gm: fx.GraphModule
    steps: tuple[Step, ...]
    facts_before: LineFacts = field(default=LineFacts(), compare=False)
    facts_after: LineFacts = field(default=LineFacts(), compare=False)

    @property
    def facts(self) -> tuple[object, ...]:
        """What the passes found out, in order."""
        return tuple(fact for step in self.steps for fact in step.facts)


def run(gm: fx.GraphModule, passes: Iterable[GraphPass]) -> Record:
    """Run the passes in order; lint after each, recompile once at the end.

    Each step is logged at DEBUG and written as a structured trace (``TORCH_TRACE``, tlparse) where
    that is on. A pass that fails, or whose count the graph contradicts, is a bug of the pass: the
    error's notes name it.

    Raises:
        CaptureError: the graph has no output.
    """
    if not gm.graph.find_nodes(op="output"):
        raise CaptureError(
            "the graph is empty, which no model's is: torch 2.15 and later empty a graph that "
            "Dynamo captured when its backend raises. Keep a copy of it: "
            "fx.GraphModule(gm, copy.deepcopy(gm.graph))."
        )
    steps: list[Step] = []
    text = graph_text(gm)
    facts_before = LineFacts.of(gm, text)
    _trace("input", text)
    for graph_pass in passes:
        try:
            gm, step = _run_one(graph_pass, gm, text)
        except Exception as error:
            error.add_note(f"in the rfcompile pass {graph_pass.name!r}")
            raise
        log.debug("%s: %d changes in %.1f ms", step.name, step.changes, step.seconds * 1e3)
        text = step.after
        if step.changes:
            _trace(step.name, text)
        steps.append(step)
    for module in gm.modules():  # graphs inside the graph too
        if isinstance(module, fx.GraphModule):
            module.recompile()
    return Record(gm, tuple(steps), facts_before, LineFacts.of(gm, text))


def _run_one(graph_pass: GraphPass, gm: fx.GraphModule, before: str) -> tuple[fx.GraphModule, Step]:
    start = time.perf_counter()
    result = graph_pass(gm)
    result.gm.graph.lint()
    seconds = time.perf_counter() - start
    after = graph_text(result.gm)
    if (result.changes == 0) != (before == after):
        raise AssertionError(
            f"{result.changes} changes reported, but the graph "
            + ("stayed the same" if before == after else "changed")
        )
    return result.gm, Step(graph_pass.name, result.changes, seconds, before, after, result.facts)


def _trace(name: str, text: str) -> None:
    trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": f"rfcompile_{name}", "encoding": "string"},
        payload_fn=lambda: text,
    )
