"""The pass runner: what it records, and that a pass cannot lie to it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from rfcompile.errors import CaptureError
from rfcompile.graph.pipeline import GraphPass, PassResult, Record, Tier, run
from rfcompile.graph.text import graph_text

aten = torch.ops.aten


@dataclass(frozen=True)
class Replace:
    """Rewrite calls of one operator to another, and tell how many as a fact."""

    old: Any = aten.relu.default
    new: Any = aten.neg.default
    name: str = "replace"
    tier: Tier = "model"

    def __call__(self, gm: fx.GraphModule) -> PassResult:
        nodes = gm.graph.find_nodes(op="call_function", target=self.old)
        for node in nodes:
            node.target = self.new
        return PassResult(gm, len(nodes), (f"{len(nodes)} {self.old}",))


@dataclass(frozen=True)
class Custom:
    """A pass with any behaviour."""

    rewrite: Callable[[fx.GraphModule], PassResult]
    name: str = "custom"
    tier: Tier = field(default="bitwise")

    def __call__(self, gm: fx.GraphModule) -> PassResult:
        return self.rewrite(gm)


X = torch.linspace(-1, 1, 4)


def graph() -> fx.GraphModule:
    return make_fx(lambda x: torch.relu(torch.relu(x) + 1), tracing_mode="fake")(X)


def test_an_emptied_graph_is_an_error() -> None:
    gm = graph()
    for node in reversed(gm.graph.nodes):
        gm.graph.erase_node(node)
    with pytest.raises(CaptureError, match=r"the graph is empty.*torch 2\.15.*Keep a copy of it"):
        run(gm, [])


def test_record_has_every_step_and_the_text_between() -> None:
    gm = graph()
    start = graph_text(gm)
    passes: list[GraphPass] = [
        Replace(),
        Replace(name="again"),
        Replace(aten.neg.default, aten.abs.default, name="to-abs"),
    ]
    record = run(gm, passes)
    assert [(s.name, s.changes) for s in record.steps] == [
        ("replace", 2), ("again", 0), ("to-abs", 2)
    ]  # fmt: skip
    first, second, third = record.steps
    assert first.before == start
    assert first.after == second.before == second.after == third.before != start
    assert third.after == graph_text(record.gm)
    assert all(step.seconds > 0 for step in record.steps)
    assert record.facts == ("2 aten.relu.default", "0 aten.relu.default", "2 aten.neg.default")
    assert first.facts == ("2 aten.relu.default",)


def test_the_graph_runs_rewritten_and_is_recompiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []
    recompile = fx.GraphModule.recompile

    def spy(self: fx.GraphModule) -> object:
        compiled.append(self)
        return recompile(self)

    gm = graph()
    monkeypatch.setattr(fx.GraphModule, "recompile", spy)
    record = run(gm, [Replace(), Replace(aten.neg.default, aten.abs.default)])
    assert compiled == [record.gm]
    assert torch.equal(record.gm(X), (X.abs() + 1).abs())


def test_a_pass_may_return_another_graph_module() -> None:
    other = make_fx(lambda x: x + 2, tracing_mode="fake")(X)
    record = run(graph(), [Custom(lambda gm: PassResult(other, 1)), Replace()])
    assert record.gm is other
    assert record.steps[1].before == graph_text(other)
    assert torch.equal(record.gm(X), X + 2)


def test_no_passes_no_steps() -> None:
    gm = graph()
    assert run(gm, []) == Record(gm, ())
    assert run(gm, []).facts == ()


def test_a_second_run_changes_nothing() -> None:
    record = run(graph(), [Replace()])
    assert [step.changes for step in run(record.gm, [Replace()]).steps] == [0]


# ---- passes that are wrong ---------------------------------------------------------------------


def test_a_pass_that_hides_a_change_is_caught() -> None:
    def rewrite(gm: fx.GraphModule) -> PassResult:
        return PassResult(Replace()(gm).gm, 0)

    with pytest.raises(AssertionError, match="0 changes reported, but the graph changed") as error:
        run(graph(), [Custom(rewrite, "liar")])
    assert error.value.__notes__ == ["in the rfcompile pass 'liar'"]


def test_a_pass_that_claims_a_change_it_did_not_make_is_caught() -> None:
    with pytest.raises(AssertionError, match="3 changes reported, but the graph stayed the same"):
        run(graph(), [Custom(lambda gm: PassResult(gm, 3))])


def test_a_malformed_graph_is_caught_by_the_lint_of_its_pass() -> None:
    def use_before_definition(gm: fx.GraphModule) -> PassResult:
        x, *_, output = gm.graph.nodes
        x.append(output)
        return PassResult(gm, 1)

    passes: list[GraphPass] = [
        Replace(), Custom(use_before_definition, "breaker"), Replace(name="never-reached")
    ]  # fmt: skip
    with pytest.raises(RuntimeError, match="used before it has been defined") as error:
        run(graph(), passes)
    assert error.value.__notes__ == ["in the rfcompile pass 'breaker'"]


def test_an_error_inside_a_pass_keeps_its_type_and_names_the_pass() -> None:
    def fail(gm: fx.GraphModule) -> PassResult:
        raise KeyError("x")

    with pytest.raises(KeyError) as error:
        run(graph(), [Custom(fail, "failing")])
    assert error.value.__notes__ == ["in the rfcompile pass 'failing'"]


# ---- what can be seen from outside -------------------------------------------------------------


def test_each_pass_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "rfcompile.graph.pipeline"):
        run(graph(), [Replace(), Replace(name="again")])
    lines = [r.getMessage() for r in caplog.records if r.name == "rfcompile.graph.pipeline"]
    assert [line.split(" in ")[0] for line in lines] == ["replace: 2 changes", "again: 0 changes"]


@pytest.fixture
def artifacts() -> Iterator[dict[str, str]]:
    """Structured trace artifacts by name, as a TORCH_TRACE handler would get them."""
    seen: dict[str, str] = {}

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            metadata = getattr(record, "metadata", {})
            if "artifact" in metadata:
                seen[metadata["artifact"]["name"]] = getattr(record, "payload", "")

    logger, handler = logging.getLogger("torch.__trace"), Handler()
    logger.addHandler(handler)
    yield seen
    logger.removeHandler(handler)


def test_changed_graphs_are_structured_artifacts(artifacts: dict[str, str]) -> None:
    record = run(graph(), [Replace(), Replace(name="again")])
    assert artifacts == {
        "rfcompile_input": record.steps[0].before,
        "rfcompile_replace": record.steps[0].after,
    }
