"""Pages in a real browser: they open, fold, sort, filter, link, print, and log no error.

Chromium is Debian's, driven by playwright: ``make test-pages``.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.report.page import cases

pytestmark = [pytest.mark.pages, pytest.mark.slow]

MAX_SECONDS, MAX_BYTES = 3.0, 5_000_000
"""To open the page of 48 layers, and its size."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        yield chromium
        chromium.close()


class Opened:
    """A page that is open, and what it logged."""

    def __init__(self, browser: Any, path: Path, **options: Any) -> None:
        self.tab = browser.new_page(viewport={"width": 1400, "height": 900}, **options)
        self.logged: list[str] = []
        self.tab.on("console", lambda message: self.logged.append(message.text))
        self.tab.on("pageerror", lambda error: self.logged.append(str(error)))
        self.tab.on("request", lambda request: self.logged.extend(foreign(request.url)))
        self.tab.goto(path.as_uri())

    def box(self, label: str) -> Any:
        """The first visible box of that label."""
        inner = f'has(b:text-is("{label}"))'
        return self.tab.locator(f"summary:{inner}:visible, button.r:{inner}:visible").first

    def visible(self) -> list[str]:
        """The labels of the boxes that are seen, of the first side that has one."""
        labels: list[str] = self.tab.evaluate(
            "[...document.querySelectorAll('summary, button.r')]"
            ".filter(box => box.checkVisibility()).map(box => box.querySelector('b').textContent)"
        )
        return labels

    def column(self, title: str) -> list[str]:
        """The visible cells of a column of the table."""
        heads = self.tab.locator("#sites th").all_inner_texts()
        cells: list[str] = self.tab.locator(
            f"#sites tbody td:nth-child({heads.index(title) + 1}):visible"
        ).all_inner_texts()
        return cells


def foreign(url: str) -> list[str]:
    return [] if url.startswith(("file:", "data:", "blob:", "about:")) else [f"requested {url}"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pages")


@pytest.fixture(scope="module")
def parallel(folder: Path) -> tuple[Path, Path]:
    report = cases.parallel_report()
    report.page(folder / "report.html")
    cases.rf.diff(report).page(folder / "diff.html")
    return folder / "report.html", folder / "diff.html"


@pytest.fixture
def diff(browser: Any, parallel: tuple[Path, Path]) -> Iterator[Opened]:
    yield from opened(browser, parallel[1])


@pytest.fixture(scope="module")
def explained_path(folder: Path) -> Path:
    cases.explained().page(folder / "explain.html")
    return folder / "explain.html"


@pytest.fixture
def explained(browser: Any, explained_path: Path) -> Iterator[Opened]:
    yield from opened(browser, explained_path)


def opened(browser: Any, path: Path, **options: Any) -> Iterator[Opened]:
    page = Opened(browser, path, **options)
    yield page
    assert page.logged == []
    page.tab.close()


def test_a_diff_folds_and_unfolds(diff: Opened) -> None:
    assert diff.visible()[:3] == ["forward", "embedding", "blocks"]
    diff.box("blocks.0").click()
    assert {"attention_norm", "attention", "mlp_norm", "mlp"} < set(diff.visible())
    diff.box("blocks.0").click()
    assert "mlp_norm" not in diff.visible()
    diff.tab.locator('[data-do="unfold"]').click()
    assert {"quantize", "all_to_all_single", "dequantize", "all_reduce"} <= set(diff.visible())
    diff.tab.locator('[data-do="fold"]').click()
    assert diff.visible() == ["forward", "backward"]


def test_the_panel_shows_the_box_under_the_pointer(diff: Opened) -> None:
    diff.tab.locator('[data-do="unfold"]').click()
    diff.box("quantize").hover()
    panel = diff.tab.locator("#panel").inner_text()
    for text in ("quantize", "u8[2, 4224]", "8,448", "4b:g128", "gpt.py:", "attention.out"):
        assert text in panel
    assert "Not known: " in panel
    diff.box("head").focus()
    assert "Linear" in diff.tab.locator("#panel").inner_text()


def test_what_crosses_ranks_is_thick(diff: Opened) -> None:
    diff.tab.locator('[data-do="unfold"]').click()
    widths = {
        cls: diff.tab.locator(f".e{cls}").first.evaluate("e => e.getBoundingClientRect().width")
        for cls in (".crossed", ":not(.crossed)")
    }
    assert widths[".crossed"] >= 1.5 * widths[":not(.crossed)"]
    assert diff.tab.locator(".e.crossed:visible u").first.inner_text().endswith("kB")


def test_both_sides_stand_beside_one_another(diff: Opened) -> None:
    faces = diff.box("embedding").locator(".f")
    left, right = (faces.nth(i).bounding_box() for i in (0, 1))
    assert left["y"] == right["y"]
    assert left["x"] + left["width"] < right["x"]


def test_the_table_sorts_and_filters(explained: Opened) -> None:
    heads = explained.tab.locator("#sites th")
    kurtosis = heads.filter(has_text="kurtosis")
    kurtosis.locator("button").click()
    assert kurtosis.get_attribute("aria-sort") == "ascending"
    numbers = [float(text) for text in explained.column("kurtosis") if text]
    assert numbers == sorted(numbers)
    assert len(numbers) == 12
    assert explained.column("kurtosis")[12:] == [""] * 12  # what is not known comes last
    kurtosis.locator("button").click()
    assert [float(text) for text in explained.column("kurtosis") if text] == numbers[::-1]
    explained.tab.fill("#filter", "blocks.3 exact")
    assert explained.column("module") == ["blocks.3", "blocks.3"]
    assert explained.tab.locator("#count").inner_text() == "2 of 24"
    explained.tab.locator('[data-do="all"]').click()
    assert len(explained.column("module")) == 24


def test_lines_and_boxes_lead_to_one_another(explained: Opened) -> None:
    assert "blocks.7" not in explained.visible()
    explained.tab.locator("#sites tbody tr", has_text="blocks.7").first.click()
    assert "blocks.7" in explained.visible()
    focus = "document.activeElement.querySelector('b').textContent"
    assert explained.tab.evaluate(focus) == "blocks.7"
    assert explained.tab.locator("tr.hit").count() == 2
    explained.tab.locator("#panel button").first.click()
    assert "blocks.7" in explained.tab.evaluate("document.activeElement.textContent")
    explained.box("blocks.7").hover()
    explained.tab.get_by_text("Only these 2").click()
    assert explained.column("module") == ["blocks.7", "blocks.7"]


def test_the_panel_has_what_was_measured(explained: Opened) -> None:
    explained.box("blocks").click()
    explained.box("blocks.11").hover()
    panel = explained.tab.locator("#panel").inner_text()
    for text in ("SQNR", " dB", "excess kurtosis", "4b:g128", "65,536 -> 8,448", "f32[4, 64, 64]"):
        assert text in panel
    assert "predicted loss (rf.score and rf.plan predict it)" in panel


def test_the_keyboard_is_enough(diff: Opened) -> None:
    press, focus = diff.tab.keyboard.press, "document.activeElement.querySelector('b').textContent"
    diff.box("forward").focus()
    press("ArrowDown")
    press("ArrowDown")
    assert diff.tab.evaluate(focus) == "blocks"
    press("ArrowRight")  # it is open: into it
    assert diff.tab.evaluate(focus) == "blocks.0"
    press("ArrowRight")
    assert "mlp_norm" in diff.visible()
    press("ArrowLeft")
    assert "mlp_norm" not in diff.visible()
    press("ArrowLeft")
    assert diff.tab.evaluate(focus) == "blocks"
    press("Enter")
    assert "blocks.0" not in diff.visible()[:4]


def test_a_screen_reader_gets_names_and_states(explained: Opened) -> None:
    model = explained.tab.locator("#model").aria_snapshot()
    for text in ('button "Unfold all"', 'button "embedding Embedding"', "10 4b:g128:rise, "):
        assert text in model
    assert "\N{BLACK RIGHT-POINTING SMALL TRIANGLE}" not in model
    assert explained.tab.get_by_role("img", name="Kurtosis by depth").count() == 1
    assert explained.tab.get_by_role("columnheader").count() > 5
    assert explained.tab.locator("#panel").get_attribute("aria-live") == "polite"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_follows_the_setting_of_the_system(
    scheme: str, browser: Any, parallel: tuple[Path, Path]
) -> None:
    for page in opened(browser, parallel[0], color_scheme=scheme):
        page.tab.locator('[data-do="unfold"]').click()
        for selector in ("h1", ".f b", ".f.quantize b", ".f.collective b", "#sites td", ".f u"):
            colours = page.tab.locator(f"{selector}:visible").first.evaluate(COLOURS)
            assert contrast(*colours) >= 4.5, selector  # level AA of WCAG 2


COLOURS = """element => {
  const solid = (at) => {
    const colour = getComputedStyle(at).backgroundColor;
    return colour === "rgba(0, 0, 0, 0)" ? solid(at.parentElement) : colour;
  };
  return [getComputedStyle(element).color, solid(element)];
}"""


def contrast(ink: str, page: str) -> float:
    """The contrast ratio of WCAG 2 between two "rgb(r, g, b)"."""

    def luminance(colour: str) -> float:
        parts = [int(part) / 255 for part in colour[4:-1].split(",")]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    dark, bright = sorted((luminance(ink), luminance(page)))
    return (bright + 0.05) / (dark + 0.05)


def test_a_page_prints(explained: Opened, tmp_path: Path) -> None:
    explained.tab.emulate_media(media="print", color_scheme="dark")
    assert explained.tab.evaluate("getComputedStyle(document.body).color") == "rgb(0, 0, 0)"
    assert not explained.tab.locator("#panel").is_visible()
    assert not explained.tab.locator("#filter").is_visible()
    assert explained.tab.locator("#sites tbody tr").last.is_visible()
    assert explained.tab.pdf(path=tmp_path / "page.pdf").startswith(b"%PDF")


def test_a_plan_has_its_frontier(browser: Any, folder: Path) -> None:
    plan, scores, model = cases.planned()
    plan.page(folder / "plan.html", scores=scores, model=model)
    for page in opened(browser, folder / "plan.html"):
        figures = [figure.inner_text() for figure in page.tab.locator("figcaption").all()]
        assert figures == [
            "Bytes by kind of traffic", "Kurtosis by depth", "SQNR by bits", "Loss by bytes",
        ]  # fmt: skip
        page.box("blocks").click()
        page.box("blocks.0").click()
        page.box("mlp").hover()
        panel = page.tab.locator("#panel").inner_text()
        for text in ("predicted loss", "excess kurtosis", "elements a batch", "Not known: shape"):
            assert text in panel


def test_a_page_of_48_layers_opens_at_once(browser: Any, folder: Path) -> None:
    pytest.importorskip("transformers")
    path = folder / "deep.html"
    cases.deep_diff(48).page(path)
    assert path.stat().st_size < MAX_BYTES
    for page in opened(browser, path):
        assert page.box("layers").is_visible()
        assert page.tab.evaluate(LOADED) < 1000 * MAX_SECONDS
        assert len(page.visible()) < 60
        page.box("layers").click()
        assert "layers.47" in page.visible()


LOADED = "performance.getEntriesByType('navigation')[0].loadEventEnd"
"""Milliseconds from the start of the navigation, by the browser's own clock."""


def test_a_notebook_shows_the_page(browser: Any, tmp_path: Path) -> None:
    cell = cases.explained(4)._repr_html_()
    (tmp_path / "notebook.html").write_text(f"<!doctype html><div>{cell}</div>", encoding="utf-8")
    for page in opened(browser, tmp_path / "notebook.html"):
        frame = page.tab.frame_locator("iframe")
        frame.locator('summary:has(b:text-is("blocks"))').hover()
        assert "sites within" in frame.locator("#panel").inner_text()
