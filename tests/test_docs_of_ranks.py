"""Pages of the documentation that need several ranks; tests/test_docs.py has the others."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.pages import PAGES, ROOT, Session, run_session, sessions_of
from tests.ranks import RunRanks

TOGETHER = [
    s for page in PAGES for s in sessions_of(page, (ROOT / page).read_text()) if s.ranks > 1
]


@pytest.mark.slow
@pytest.mark.parametrize("session", TOGETHER, ids=lambda session: session.name)
def test_the_python_of_a_page_runs_on_its_ranks(
    session: Session, ranks: RunRanks, tmp_path: Path
) -> None:
    ranks(session.ranks, run_session, session, str(tmp_path))
