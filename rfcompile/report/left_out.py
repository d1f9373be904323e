"""Finds what Dynamo leaves uncompiled, for the notes of reports and for ``strict=True``.

Dynamo has no hook for its recompile limit. Beyond the limit Dynamo runs a function uncompiled and
does not call the backend again. So this file wraps the function in which Dynamo checks the limit.

Private torch symbols used here, tried on torch 2.13 (run):
``_dynamo.convert_frame.exceeds_recompile_limit`` (a function of the cache's size and the compile
id, asked before each compile; answers whether, and the name of the limit),
``_dynamo.config.{recompile_limit, accumulated_recompile_limit, suppress_errors, disable}``,
``_dynamo.utils.graph_break_reasons`` (a list of ``reason`` and ``user_stack``),
``_guards.CompileContext.current_compile_id`` (``frame_id``: a number for each function).
"""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch._dynamo import config, convert_frame
from torch._dynamo.utils import graph_break_reasons
from torch._guards import CompileContext

from rfcompile.errors import PolicyError, RecompileLimitError, RFCompileWarning
from rfcompile.graph.places import frames_of, module_calls, short_path
from rfcompile.report import journal


def frame_of_compile() -> int | None:
    """Dynamo's number of the function that is compiled now."""
    compile_id = CompileContext.current_compile_id()
    return None if compile_id is None else compile_id.frame_id


def place_of(gm: fx.GraphModule) -> str:
    """Where a Dynamo graph begins: "Block at model.py:12"."""
    for node in gm.graph.nodes:
        if node.op in ("placeholder", "output", "get_attr") or not (frames := frames_of(node)):
            continue
        file, line = frames[0]
        calls = module_calls(node)
        name = f"{calls[0].cls.split('.')[-1]} at " if calls and not calls[0].path else ""
        return f"{name}{short_path(file)}:{line}"
    return ""


# ---- the recompile limit -----------------------------------------------------------------------


def watch_recompile_limit() -> None:
    """From now on Dynamo's recompile limit is not reached without a word."""
    dynamo: Any = convert_frame
    if not isinstance(dynamo.exceeds_recompile_limit, _Watched):
        dynamo.exceeds_recompile_limit = _Watched(dynamo.exceeds_recompile_limit)


class _Watched:
    """Dynamo's question whether a function was compiled too often, and what follows from yes."""

    def __init__(self, exceeds: Any) -> None:
        self.exceeds = exceeds

    def __call__(self, cache_size: Any, compile_id: Any) -> tuple[bool, str]:
        exceeded, limit = self.exceeds(cache_size, compile_id)
        if exceeded and (entries := journal.entries_of(compile_id.frame_id)):
            _limit_reached(entries, limit)
        return exceeded, limit


def _limit_reached(entries: list[journal.Entry], limit: str) -> None:
    place = entries[0].place
    error = RecompileLimitError(place, limit, getattr(config, limit))
    if any(entry.strict for entry in entries):
        raise error
    note = error.rule
    if note not in entries[-1].notes:
        entries[-1].notes.append(note)
        warnings.warn(note, RFCompileWarning, stacklevel=2)


# ---- graph breaks ------------------------------------------------------------------------------

_num_seen = 0
_TORCH = Path(torch.__file__).parent
_COLLECTIVE = ("distributed", "c10d", "ProcessGroup", "dist.Work", "of class `Work`")


@dataclass(frozen=True)
class Break:
    """A place where Dynamo's graph ends; ``is_collective``: at a collective or a wait for one."""

    place: str
    why: str
    is_collective: bool

    def __str__(self) -> str:
        return f"{self.place} ({self.why})".lstrip()


def new_breaks() -> tuple[Break, ...]:
    """Graph breaks since the last call."""
    global _num_seen
    if _num_seen > len(graph_break_reasons):  # somebody cleared them
        _num_seen = 0
    new, _num_seen = graph_break_reasons[_num_seen:], len(graph_break_reasons)
    return tuple(dict.fromkeys(map(_break_of, new)))


def forget_breaks() -> None:
    """Dynamo was reset, which clears its list."""
    global _num_seen
    _num_seen = 0


def _break_of(reason: Any) -> Break:
    """The user's line and the first line of the reason; all of both tells a collective."""
    stack = [(Path(frame.filename), frame.lineno) for frame in reason.user_stack or ()]
    users = [(file, line) for file, line in stack if _TORCH not in file.parents] or stack
    place = f"{short_path(str(users[-1][0]))}:{users[-1][1]}" if users else ""
    is_collective = any(word in reason.reason for word in _COLLECTIVE)
    is_collective |= any(_TORCH / "distributed" in file.parents for file, _ in stack)
    return Break(place, reason.reason.strip().splitlines()[0], is_collective)


def note_on_breaks(breaks: tuple[Break, ...]) -> str:
    listing = ", ".join(map(str, breaks[:8])) + (", ..." if len(breaks) > 8 else "")
    return f"the graph breaks at {listing}: a collective that runs there is exact and no site here"


# ---- settings of torch -------------------------------------------------------------------------


def check_settings(*, strict: bool) -> None:
    """Settings of Dynamo under which what fails is exact instead.

    Raises:
        PolicyError: ``strict``, and errors are suppressed.
    """
    if config.suppress_errors:
        rule = (
            "torch._dynamo.config.suppress_errors (TORCHDYNAMO_SUPPRESS_ERRORS) runs what does not "
            "compile as it is, and so exact. Turn it off"
        )
        if strict:
            raise PolicyError("strict", strict, f"{rule}, or drop strict.")
        warnings.warn(f"{rule} to see such errors.", RFCompileWarning, stacklevel=2)


def warn_if_disabled() -> None:
    """Without Dynamo no backend is ever called: what can be said is said when it is looked up."""
    if os.environ.get("TORCHDYNAMO_DISABLE", "") == "1":
        text = 'TORCHDYNAMO_DISABLE=1: backend "rfquant" is not used, and all collectives are exact'
        warnings.warn(text, RFCompileWarning, stacklevel=2)
