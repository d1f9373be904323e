"""Pages of the documentation as programs: their Python blocks run, and print what they say.

Markdown that a reader does not see says how:

``<!-- session: ranks=2 -->``  the blocks from here on share a new namespace, on so many ranks;
                               ``ranks=2 eager``: rewritten graphs run as they are, no kernel is
                               made of them (a minute less; other tests compile the same model)
``<!-- setup`` ... ``-->``     Python that runs, but is not shown
``<!-- output -->``            the fence that follows is what the block before it prints on rank 0;
                               a line ``...`` stands for any lines
``<!-- file: policy.toml -->`` the fence that follows is the content of that file
"""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, chdir, nullcontext, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from torch import fx
from torch._functorch.aot_autograd import make_boxed_func

from rfcompile.inductor import backend

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("README.md", *sorted(p.relative_to(ROOT).as_posix() for p in ROOT.glob("docs/**/*.md")))


@dataclass
class Block:
    """Some Python, what it must print (None: anything), or the file that it stands for."""

    line: int
    code: str
    output: str | None = None
    file: str = ""


@dataclass
class Session:
    """Blocks that share a namespace."""

    page: str
    line: int
    ranks: int
    is_eager: bool = False
    blocks: list[Block] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"{self.page}:{self.line}"


def sessions_of(page: str, text: str) -> list[Session]:
    """The sessions of a page that have something to run.

    Raises:
        ValueError: a marker is misspelt, or a fence or comment does not end.
    """
    sessions, mark = [Session(page, 1, 1)], ""
    lines = iter(enumerate(text.splitlines(), 1))
    for number, line in lines:
        if found := re.fullmatch(r"<!-- session: ranks=(\d+)( eager)? -->", line):
            sessions.append(Session(page, number, int(found[1]), bool(found[2])))
        elif line == "<!-- setup":
            code = _until(lines, "-->", page, number)
            sessions[-1].blocks.append(Block(number + 1, code))
        elif re.fullmatch(r"<!-- (output|file: \S+) -->", line):
            mark = line[5:-4]
        elif line.startswith("<!--"):
            raise ValueError(f"{page}:{number}: {line!r} is no marker; see {Path(__file__).name}.")
        elif fence := re.match(r"(\s*)(```+)(\S*)", line):
            body = _until(lines, fence[1] + fence[2], page, number)
            _fence(sessions[-1].blocks, mark, fence[3], number + 1, body)
            mark = ""
        elif mark and line:
            raise ValueError(f"{page}:{number}: no fence follows {mark!r}.")
    return [session for session in sessions if session.blocks]


def _until(lines: Iterator[tuple[int, str]], end: str, page: str, start: int) -> str:
    found: list[str] = []
    for _, line in lines:
        if line.rstrip() == end:
            return "\n".join(found)
        found.append(line)
    raise ValueError(f"{page}:{start}: nothing ends what starts here; {end!r} is missing.")


def _fence(blocks: list[Block], mark: str, language: str, line: int, body: str) -> None:
    if mark == "output":
        blocks[-1].output = body
    elif mark:
        blocks.append(Block(line, body, file=mark.removeprefix("file: ")))
    elif language == "python":
        blocks.append(Block(line, body))


def run_session(rank: Any, session: Session, folder: str) -> None:
    """Run the blocks of a session, in a folder of their own, as one program."""
    place = Path(folder) / str(rank.index)
    place.mkdir(parents=True, exist_ok=True)
    namespace: dict[str, Any] = {"__name__": "page"}
    sys.path.insert(0, str(ROOT / "examples"))
    try:
        with chdir(place), _no_kernels() if session.is_eager else nullcontext():
            for block in session.blocks:
                printed = _run(session.page, block, namespace)
                if block.output is not None and rank.index == 0:
                    check_output(f"{session.page}:{block.line}", printed, block.output)
    finally:
        sys.path.remove(str(ROOT / "examples"))


def _no_kernels() -> AbstractContextManager[object]:
    def run_as_it_is(gm: fx.GraphModule, inputs: object, **options: object) -> object:
        return make_boxed_func(gm.forward)

    return mock.patch.object(backend, "compile_fx_inner", run_as_it_is)


def _run(page: str, block: Block, namespace: dict[str, Any]) -> str:
    if block.file:
        Path(block.file).write_text(block.code + "\n")
        return ""
    # Lines of the page: tracebacks, and whoever reads a function's source, find them there.
    code = compile("\n" * (block.line - 1) + block.code, str(ROOT / page), "exec")
    with redirect_stdout(io.StringIO()) as printed:
        exec(code, namespace)
    return printed.getvalue()


def check_output(place: str, printed: str, promised: str) -> None:
    """
    Raises:
        AssertionError: it printed something else.
    """
    pattern = r"\n".join(
        r"[^\0]*?" if line.strip() == "..." else re.escape(line.rstrip())
        for line in promised.strip().splitlines()
    )
    text = "\n".join(line.rstrip() for line in printed.strip().splitlines())
    assert re.fullmatch(pattern, text), f"{place} promises\n{promised}\nbut printed\n{printed}"
