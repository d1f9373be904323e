"""JSON of reports: each keeps to its schema, and the page of the reference says the same."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import jsonschema
import pytest
import torch
from torch import Tensor, nn

import rfcompile as rf
from rfcompile.emission.compare import Change, KernelComparison
from rfcompile.planning.crossover import Crossover, CrossoverTime
from rfcompile.planning.measured_link import CarrierTime, MeasuredLinks
from rfcompile.report.schema import json_schema
from rfcompile.report.table import TableReport
from tests.pages import ROOT
from tests.planning.test_plan import distance, scored
from tests.rewrites.graying.test_rewrite import Encoder
from tests.rewrites.graying.test_rewrite import X as TOKENS
from tests.test_examples import load
from tests.test_layers import MODULES
from tests.zoo import NanoGPT

docs = load(ROOT / "docs" / "schema.py")
X = torch.randint(64, (2, 12))


def check(report: TableReport) -> dict[str, Any]:
    """The JSON of a report, which keeps to the schema of its class and names it."""
    schema = json_schema(type(report))
    jsonschema.Draft202012Validator.check_schema(schema)
    data = json.loads(report.json())
    jsonschema.validate(data, schema, jsonschema.Draft202012Validator)
    assert data["schema"] == schema["title"] == report.schema()
    return dict(data)


def test_scores_plans_and_checks() -> None:
    model, batches, scores = scored()
    plan = rf.plan(scores, bytes=50_000, link=rf.Link(1e6))
    check(scores)
    assert check(plan)["link"]["coding"] is None  # infinite
    check(plan.check(model, batches, loss=distance))
    check(plan.cost)
    check(rf.frontier(scores))
    check(Crossover("4b", "f32", 2, (CrossoverTime("all_reduce", 64, 1e-3, 1e-4, math.nan, 3),)))
    check(MeasuredLinks(2, (CarrierTime("send", 8, 1e-3, 1e-4, 3),), {"send": 1e9}))


MODELS: dict[str, Callable[[nn.Module], TableReport]] = {
    "report": lambda model: rf.explain(model, bits=4, example_inputs=(X,)),
    "graph_diff": lambda model: rf.diff(model, rf.transform(model, bits=4), example_inputs=(X,)),
    "analysis": lambda model: rf.analyze(model, example_inputs=(X,)),
    "adapter_report": lambda model: rewritten(model, rf.Adapters(2)),
}
SLOW: dict[str, Callable[[nn.Module], TableReport]] = {
    "residual_report": lambda model: rewritten(model, rf.ResidualFree("free")),
    "low_rank_report": lambda model: rewritten(model, rf.LowRank(4)),
    "polynomial_report": lambda model: rewritten(model, rf.experimental.PolynomialAttention()),
}


def rewritten(model: nn.Module, change: Any, x: Tensor = X) -> TableReport:
    return rf.rewrites_of(rf.transform(model, change, example_inputs=(x,)))[-1]


@pytest.mark.parametrize("name", MODELS)
def test_reports_of_a_model(name: str) -> None:
    data = check(MODELS[name](NanoGPT()))
    assert data["schema"] == f"rfcompile.{name}/1"


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_reports_of_rewrites(name: str) -> None:
    assert check(SLOW[name](NanoGPT()))["schema"] == f"rfcompile.{name}/1"


@pytest.mark.slow
def test_a_report_of_grayed_tokens() -> None:
    graying = rf.experimental.TokenGraying("dct")
    check(rewritten(Encoder().eval(), graying, TOKENS))


def test_a_report_has_what_it_computes() -> None:
    report = rf.explain(NanoGPT(), bits=4, example_inputs=(X,))
    data = check(report)
    assert data["num_quantized"] == report.num_quantized > 0
    assert data["kinds"][0]["bytes_before"] == report.kinds[0].bytes_before
    assert "graphs" not in data
    assert "calls" not in data


def test_quantized_adapters() -> None:
    model = rf.transform(NanoGPT(), rf.Adapters(2), example_inputs=(X,))
    check(rf.rewrites_of(rf.adapters.quantize(model, 4))[-1])


def test_kernels_without_their_sources() -> None:
    gpu = pytest.importorskip("rfcompile.emission.report")
    report = gpu.KernelReport("sm_90", "H100", "all=4b", (), "a model")
    assert check(report)["graphs"] == []
    schema = json_schema(gpu.KernelReport)
    assert "totals" in schema["$defs"]["GraphKernels"]["properties"]
    assert not {"triton", "machine_code"} & set(schema["$defs"]["Kernel"]["properties"])
    check(KernelComparison("a", "b", (Change("forward", "launches", 1, math.nan),)))


def test_the_page_says_what_the_reports_do() -> None:
    page = (ROOT / "docs" / "reference" / "schema.md").read_text()
    assert page == "\n".join(docs.page()) + "\n", "docs/reference/schema.md is old: make schema"


def test_every_report_is_on_the_page() -> None:
    pattern = re.compile(r"^class (\w+)\((?:Table|Paged)Report\):", re.MULTILINE)
    sources = [path.read_text() for path in MODULES.values()]
    found = {name for source in sources for name in pattern.findall(source)}
    assert found - {"PagedReport"} == {report.__name__ for report in docs.REPORTS}


# ---- the schema itself -------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """A part.

    Args:
        size, weight: two numbers,
            in grams.
    """

    size: int
    weight: float | None


@dataclass(frozen=True)
class Example(TableReport):
    """A report. It has parts."""

    kind: Literal["a", "b"]
    parts: tuple[Part, ...]
    pair: tuple[int, str]
    sums: dict[str, float]
    hidden: Tensor | None = dataclasses.field(default=None, repr=False)

    IN_JSON: ClassVar = ("count",)
    SCHEMA_VERSION: ClassVar = 2

    @property
    def count(self) -> int:
        """How many parts."""
        return len(self.parts)


EXAMPLE = Example("a", (Part(1, math.inf),), (1, "x"), {"y": math.nan})


def test_json_of_an_example() -> None:
    assert check(EXAMPLE) == {
        "schema": "rfcompile.example/2",
        "kind": "a",
        "parts": [{"size": 1, "weight": None}],
        "pair": [1, "x"],
        "sums": {"y": None},
        "count": 1,
    }
    properties = json_schema(Example)["$defs"]["Part"]["properties"]
    assert properties["weight"]["description"] == "two numbers, in grams."


@pytest.mark.parametrize(
    "change",
    [
        {"schema": "rfcompile.example/1"},
        {"kind": "c"},
        {"parts": [{"size": 1.5, "weight": 1}]},
        {"parts": [{"size": 1}]},
        {"pair": [1, "x", 2]},
        {"sums": {"y": "z"}},
        {"more": 1},
    ],
)
def test_the_schema_refuses_what_no_report_gives(change: dict[str, Any]) -> None:
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(EXAMPLE.to_dict() | change, json_schema(Example))


def test_a_field_that_json_has_not_is_an_error() -> None:
    @dataclass(frozen=True)
    class Wrong(TableReport):
        field: nn.Module

    with pytest.raises(TypeError, match="has no JSON schema"):
        json_schema(Wrong)
