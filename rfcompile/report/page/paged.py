"""PagedReport: the base of the reports that have a page."""

from __future__ import annotations

from html import escape
from os import PathLike

from rfcompile.report.page.document import Page
from rfcompile.report.table import TableReport

NOTEBOOK_BYTES = 2_000_000
"""A notebook stores each output: a larger page is not put into it."""
_FRAME = "width:100%;height:44rem;border:1px solid #8888;border-radius:8px"


class PagedReport(TableReport):
    """A report that is also one HTML file, and shows it in notebooks."""

    def as_page(self) -> Page:
        """What the page shows."""
        raise NotImplementedError

    def html(self) -> str:
        """The page as a text: it needs no other file and no network."""
        return self.as_page().html()

    def page(self, path: str | PathLike[str]) -> None:
        """Write the page to a file.

        Raises:
            OSError: the file cannot be written.
        """
        self.as_page().write(path)

    def _repr_html_(self) -> str:
        """What a notebook shows: the page in a frame, or the text where the page is too large."""
        page = self.as_page()
        html = page.html()
        if len(html) <= NOTEBOOK_BYTES:
            frame = f'<iframe title="{escape(page.title)}" style="{_FRAME}"'
            return f'{frame} srcdoc="{escape(html)}"></iframe>'
        size = f"{len(html) / 1e6:.1f} MB"
        note = f"The page has {size}, too much for a notebook: write it, .page('report.html')."
        return f"<pre>{escape(self.text())}</pre><p>{escape(note)}</p>"
