"""The pages of reports and plans: what they show with much, with little, and with nothing."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import rfcompile as rf
from rfcompile.errors import ScoreError
from rfcompile.report.page import paged
from rfcompile.report.report import Report
from tests.planning.test_plan import case
from tests.report.page.parsed import Parsed
from tests.report.test_report import GRADIENT, MERGED, QUANTIZED, SMALL, STATE, SYMBOLIC
from tests.zoo import NanoGPT

__all__ = ["case"]


def labels(page: Parsed) -> list[str]:
    return page.text.get("b", [])


def cells(page: Parsed) -> list[list[str]]:
    """The table, line by line."""
    width = len(page.text["th"])
    found = page.text["td"]
    return [found[i : i + width] for i in range(0, len(found), width)]


def test_an_explained_model() -> None:
    report = rf.explain(NanoGPT(layers=6), bits=4, example_inputs=(torch.randint(64, (2, 12)),))
    page = Parsed(report.html())
    assert "\N{MULTIPLICATION SIGN}6" in page.text["em"]
    assert {"blocks", "blocks.5"} < set(labels(page))
    assert page.text["figcaption"] == [
        "Bytes by kind of traffic", "Kurtosis by depth", "SQNR by bits",
    ]  # fmt: skip
    assert len(cells(page)) == len(report.sites) == 12
    assert re.search(r"Arrows follow the order of the calls", report.html())
    first = page.data["boxes"][str(page.all("tr")[1]["data-box"])]
    facts = dict(fact[:2] for fact in first["facts"])
    assert facts["SQNR"] == f"{report.sites[0].sqnr_db:.3g} dB"
    assert first["unknown"].startswith("predicted loss (rf.score")


def test_sites_alone_are_drawn_by_their_modules() -> None:
    report = Report((QUANTIZED, GRADIENT, SMALL, SYMBOLIC, MERGED, STATE), notes=("a <note>",))
    page = Parsed(report.html())
    assert {"blocks", "blocks.0", "mlp", "norm"} <= set(labels(page))
    assert ["symbolic", "symbolic"] in [line[5:7] for line in cells(page)]
    assert "a <note>" in page.text["li"]
    assert "optimizer_state (kept)" in "".join(page.text["svg"])
    assert len([attrs for attrs in page.all("tr") if attrs.get("data-box")]) == 6


def test_sites_of_no_module_have_a_table_and_no_boxes() -> None:
    page = Parsed(Report((replace(QUANTIZED, module=""),)).html())
    assert labels(page) == []
    assert len(cells(page)) == 1
    assert not [attrs for attrs in page.all("tr") if "data-box" in attrs]


def test_an_empty_report() -> None:
    page = Parsed(Report((), notes=("nothing is sent",)).html())
    assert "table" not in page.text
    assert page.text["li"] == ["nothing is sent"]


def test_runs_count() -> None:
    page = Parsed(Report((replace(QUANTIZED, runs=3),)).html())
    [line] = cells(page)
    assert "6,144" in line
    assert "3" in line


def test_a_plan_with_and_without_its_scores(case: Any, tmp_path: Path) -> None:
    model, _, scores = case
    plan = rf.plan(scores, bytes=40_000)
    plan.page(tmp_path / "plan.html", scores=scores, model=model)
    html = (tmp_path / "plan.html").read_text(encoding="utf-8")
    page = Parsed(html)
    assert page.text["figcaption"][-1] == "Loss by bytes"
    assert "NanoGPT" not in labels(page)
    assert "LayerNorm" in page.text["i"]
    assert html.count("<title>uniform ") == 4
    assert html.count("<title>this plan: ") == 1
    alone = Parsed(plan.html())
    assert {"blocks.0", "blocks.1", "blocks.2"} < set(labels(alone))
    assert "LayerNorm" not in alone.text.get("i", [])
    assert any("need the scores" in note for note in alone.text["li"])


def test_scores_of_another_model_are_an_error(case: Any, tmp_path: Path) -> None:
    plan = rf.plan(case[2], bytes=40_000)
    with pytest.raises(ScoreError, match="give the scores that the plan was made of"):
        plan.page(tmp_path / "plan.html", scores=replace(case[2], model="0"))


def test_a_folder_that_does_not_exist_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Report(()).page(tmp_path / "none" / "report.html")


def test_notebooks_get_the_page_or_say_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    report = Report((QUANTIZED,))
    shown = Parsed(report._repr_html_())
    assert shown.all("iframe")[0]["srcdoc"] == report.html()
    monkeypatch.setattr(paged, "NOTEBOOK_BYTES", 100)
    shown = Parsed(report._repr_html_())
    assert shown.text["pre"] == [report.text()]
    assert "too much for a notebook" in shown.text["p"][0]


def test_a_model_without_parts() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    report = rf.explain(model, rf.Wire(4, modules=["0"]), example_inputs=(torch.randn(2, 4),))
    assert labels(Parsed(report.html())) == ["0"]
