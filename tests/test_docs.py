"""The documentation: its Python runs, every public name is in the reference, README is short."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

import rfcompile
from tests.pages import PAGES, ROOT, Session, check_output, run_session, sessions_of
from tests.test_layers import ROOMS, private_names

ALONE = [s for page in PAGES for s in sessions_of(page, (ROOT / page).read_text()) if s.ranks == 1]
DOORS = ("rfcompile", *(f"rfcompile.{name}" for name in rfcompile._PACKAGES if name != "errors"))
MAX_README_LINES = 200


@pytest.mark.slow
@pytest.mark.parametrize("session", ALONE, ids=lambda session: session.name)
def test_the_python_of_a_page_runs(session: Session, tmp_path: Path) -> None:
    run_session(SimpleNamespace(index=0), session, str(tmp_path))


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= MAX_README_LINES


# ---- the reference -------------------------------------------------------------------------------


def entries() -> set[str]:
    """Names that the reference documents: those named, and the classes of a whole module."""
    found = set()
    for page in (ROOT / "docs" / "reference").glob("*.md"):
        pattern = r"^\.\. auto(\w+):: (\S+)\n(   :members:)?"
        for kind, name, members in re.findall(pattern, page.read_text(), re.MULTILINE):
            found.add(name)
            if kind == "module" and members:
                module = importlib.import_module(name)
                found |= {f"{name}.{key}" for key in vars(module) if not key.startswith("_")}
    return found


@pytest.mark.parametrize("door", DOORS)
def test_every_public_name_has_an_entry_in_the_reference(door: str) -> None:
    documented, module = entries(), importlib.import_module(door)
    # A name that two doors have is documented at one of them.
    objects = {id(resolved(name)) for name in documented}
    missing = [name for name in module.__all__ if id(getattr(module, name)) not in objects]
    assert not missing, f"docs/reference has no entry for {missing} of {door}"


def resolved(name: str) -> object:
    owner, _, last = name.rpartition(".")
    if not owner:
        return importlib.import_module(name)
    module = importlib.import_module(owner)
    return getattr(module, last, None) or importlib.import_module(name)


# ---- internals -----------------------------------------------------------------------------------


def test_the_page_on_rooms_has_the_rows_of_the_test_on_layers() -> None:
    page = (ROOT / "docs" / "internals" / "layers.md").read_text()
    cells = re.findall(r"^\| \d+ \|[^|]*\|([^|]*)\|$", page, re.MULTILINE)
    rows = [set(re.findall(r"`([^`]+)`", cell)) for cell in cells]
    names = {"": "rfcompile/__init__.py"}
    assert rows == [{names.get(name, name) for name in room} for room in ROOMS]


def test_the_page_on_passes_has_every_file_of_the_folder() -> None:
    page = (ROOT / "docs" / "internals" / "passes.md").read_text()
    files = {path.name for path in (ROOT / "passes").glob("*.py")}
    assert files <= set(re.findall(r"(\w+\.py)`", page))


# ---- private torch -------------------------------------------------------------------------------


def test_the_page_on_private_torch_has_every_module_that_uses_it() -> None:
    table = (ROOT / "docs" / "internals" / "private-torch.md").read_text()
    files = [*(ROOT / "rfcompile").rglob("*.py"), *(ROOT / "passes").glob("*.py")]
    used = {file.resolve(): private_names(ast.parse(file.read_text())) for file in files}
    rows = {file: f"| `{file.relative_to(ROOT).as_posix()}` |" for file in used}
    missing = {row: used[file] for file, row in rows.items() if used[file] and row not in table}
    assert not missing


# ---- links ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES)
def test_links_to_files_lead_somewhere(page: str) -> None:
    text = re.sub(r"^```.*?^```", "", (ROOT / page).read_text(), flags=re.MULTILINE | re.DOTALL)
    targets = re.findall(r"\]\((?!https?:|#)([^)#\s]+)", text)
    missing = [target for target in targets if not ((ROOT / page).parent / target).exists()]
    assert not missing, f"{page} links to {missing}"


# ---- the checks above can fail -------------------------------------------------------------------


def test_blocks_of_a_session_share_names_and_others_do_not(tmp_path: Path) -> None:
    text = "```python\nx = 1\n```\n\n```python\nx += 1\n```\n<!-- session: ranks=1 -->\n"
    first, second = sessions_of("page.md", text + "```python\nprint(x)\n```\n")
    run_session(SimpleNamespace(index=0), first, str(tmp_path))
    with pytest.raises(NameError, match="'x' is not defined"):
        run_session(SimpleNamespace(index=0), second, str(tmp_path))


def test_another_output_than_promised_is_an_error(tmp_path: Path) -> None:
    text = "```python\nprint(1)\nprint(2)\n```\n<!-- output -->\n```\n1\n3\n```\n"
    [session] = sessions_of("page.md", text)
    with pytest.raises(AssertionError, match=r"page\.md:2 promises"):
        run_session(SimpleNamespace(index=0), session, str(tmp_path))


@pytest.mark.parametrize(
    ("printed", "promised", "fits"),
    [
        ("a\nb\nc", "a\n...\nc", True),
        ("a\nc", "a\n...", True),
        ("a  \nc\n", "a\nc", True),
        ("a\nb\nc", "a\n...\nd", False),
        ("ab", "a.", False),
    ],
)
def test_three_dots_stand_for_any_lines(printed: str, promised: str, fits: bool) -> None:
    if fits:
        check_output("page.md:1", printed, promised)
    else:
        with pytest.raises(AssertionError):
            check_output("page.md:1", printed, promised)


def test_hidden_setup_and_files_are_there(tmp_path: Path) -> None:
    text = "<!-- setup\nx = 1\n-->\n<!-- file: a.toml -->\n```toml\nbits = 4\n```\n"
    text += "```python\nfrom pathlib import Path\nprint(x, Path('a.toml').read_text())\n```\n"
    text += "<!-- output -->\n```text\n1 bits = 4\n```"
    [session] = sessions_of("page.md", text)
    run_session(SimpleNamespace(index=0), session, str(tmp_path))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- sesion: ranks=2 -->", "is no marker"),
        ("<!-- output -->\ntext", "no fence follows 'output'"),
        ("```python\nx = 1", "nothing ends what starts here"),
    ],
)
def test_a_marker_that_is_misspelt_is_an_error(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sessions_of("page.md", text)
