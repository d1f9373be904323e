"""Progress: a line on the terminal that says how many batches are done and how long the rest takes.

The line is written to stderr and taken away at the end.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Generator, Iterable, Sized
from typing import TypeVar

T = TypeVar("T")
WIDTH = 24


def shown(batches: Iterable[T], task: str, is_shown: bool | None) -> Generator[T]:
    """The same batches, with a line of progress; None: if stderr is a terminal."""
    if not (sys.stderr.isatty() if is_shown is None else is_shown):
        yield from batches
        return
    total = len(batches) if isinstance(batches, Sized) else None
    begin, longest = time.perf_counter(), 0
    try:
        for done, batch in enumerate(batches):
            line = _line(task, done, total, time.perf_counter() - begin)
            longest = max(longest, len(line))
            sys.stderr.write(f"\r{line.ljust(longest)}")
            sys.stderr.flush()
            yield batch
    finally:
        sys.stderr.write(f"\r{' ' * longest}\r")
        sys.stderr.flush()


def _line(task: str, done: int, total: int | None, seconds: float) -> str:
    each = f", {seconds / done:.2g} s each" if done else ""
    if total is None:
        return f"{task}: batch {done + 1}{each}"
    filled = WIDTH * done // total
    left = f", {seconds / done * (total - done):.0f} s left" if done else ""
    return f"{task}: [{'#' * filled}{'.' * (WIDTH - filled)}] {done}/{total}{each}{left}"
