"""The page of a diff: closed, alone, escaped, and with every box, statement and site."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor, nn

import rfcompile as rf
from rfcompile.report.diff import diff
from tests.report.page.parsed import Parsed

BEFORE = """\
x_1: f32[8]
relu: f32[8] = aten.relu.default(x_1)
all_reduce: f32[8] = _c10d_functional.all_reduce.default(relu, 'sum', 'nowhere')
wait_tensor: f32[8] = _c10d_functional.wait_tensor.default(all_reduce)
add: f32[8] = aten.add.Tensor(wait_tensor, x_1)
return (add,)"""
AFTER = """\
x_1: f32[8]
relu: f32[8] = aten.relu.default(x_1)
quantize: u8[1, 6] = rfcompile.quantize.default(relu, '4b:g128:rise')
all_gather: u8[4, 6] = _c10d_functional.all_gather_into_tensor.default(quantize, 4, '0')
wait_tensor: u8[4, 6] = _c10d_functional.wait_tensor.default(all_gather)
dequantize: f32[8] = rfcompile.dequantize.default(wait_tensor, '4b:g128:rise', torch.float32)
add: f32[8] = aten.add.Tensor(dequantize, x_1)
return (add,)"""


def test_a_page_is_closed_and_has_every_line_of_the_diff() -> None:
    d = diff(BEFORE, AFTER)
    page = Parsed(d.html())
    shown = [line for line in page.text["pre"][0].splitlines() if line] or page.text["pre"]
    for line in d.lines()[2:]:
        if line[0] in "+-":
            assert f"{line[0]} {line[1:]}" in shown[0]
    assert "unknown -> 18" in page.text["dd"]
    assert page.data["texts"][0]["lines"] == BEFORE.splitlines()
    assert page.data["texts"][1]["lines"] == AFTER.splitlines()


def test_a_page_needs_no_other_file_and_knows_dark_screens() -> None:
    html = diff(BEFORE, AFTER).html()
    page = Parsed(html)
    tags = {tag for tag, _ in page.found}
    assert tags.isdisjoint({"link", "img", "iframe"})
    assert not {"src", "href"} & {name for _, attrs in page.found for name in attrs}
    assert "://" not in html
    assert "url(" not in html
    assert "prefers-color-scheme: dark" in html
    assert "@media print" in html


def test_a_page_escapes_what_a_graph_may_hold() -> None:
    call = "__main__.<lambda>(x, '</code></script><script>alert(1)')"
    text = f"x: f32[8]\nf: f32[8] = {call}\nreturn f"
    page = Parsed(diff("x: f32[8]", text).html())
    assert len(page.all("script")) == 2  # the data and the code
    assert page.data["texts"][1]["lines"][1] == text.splitlines()[1]


def test_equal_graphs() -> None:
    page = Parsed(diff(BEFORE, BEFORE).html())
    assert "No change." in page.text["p"]
    assert not page.all("button", "added")
    assert not page.all("button", "removed")


def test_kinds_of_operators_have_their_colours() -> None:
    page = Parsed(diff(BEFORE, AFTER).html())
    model = [attrs["class"].split()[1] for attrs in page.all("span", "f")]
    assert model.count("quantize") == 1
    assert model.count("dequantize") == 1
    assert model.count("collective") == 3 + 1  # all_reduce, all_gather, and two sides of the wait


def test_what_crosses_ranks_is_thick_and_has_its_bytes() -> None:
    html = diff(AFTER, AFTER).html()
    thick = re.findall(r'<span class="e crossed"[^>]*><u>([^<]*)</u>', html)
    assert thick == ["18 B"] * 4  # from the all-gather and from its wait, on both sides


def test_every_line_of_the_table_leads_to_a_box() -> None:
    page = Parsed(diff(BEFORE, AFTER).html())
    ids = {attrs["id"] for _, attrs in page.found if "id" in attrs}
    lines = [attrs for attrs in page.all("tr") if attrs.get("id")]
    assert len(lines) > 4
    assert all(f"b{attrs['data-box']}" in ids for attrs in lines)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


def model(layers: int) -> nn.Sequential:
    return nn.Sequential(*(Block() for _ in range(layers)))


@pytest.mark.parametrize("layers", [2, pytest.param(80, marks=pytest.mark.slow)])
def test_repeated_layers_are_one_box(layers: int) -> None:
    net, x = model(layers), torch.randn(4, 8)
    html = rf.diff(net, rf.transform(net, bits=4), example_inputs=(x,)).html()
    page = Parsed(html)
    assert page.text["em"] == [f"\N{MULTIPLICATION SIGN}{layers}"] * 2
    assert open_boxes(html) < 60
    assert html.count("<b>fake_wire</b>") == layers


def open_boxes(html: str) -> int:
    """The boxes that are seen when the page opens."""
    depth: list[bool] = []
    count = 0
    for tag in re.findall(r'<details[^>]*>|</details>|<span class="f |</summary>', html):
        if tag.startswith("<details"):
            depth.append(" open" in tag)
            head = True
        elif tag == "</details>":
            depth.pop()
        elif tag == "</summary>":
            head = False
        else:
            around = depth[:-1] if depth and head else depth
            count += all(around)
    return count
