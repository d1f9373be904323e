"""Lets the ranks that send in a graph compare what they do, while the graph is rewritten."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import fx
from torch.utils._python_dispatch import _disable_current_modes

from rfcompile.find.collectives import find_collectives
from rfcompile.report.report import Site
from rfcompile.wire.process_groups import agree


def foreign_operators(gm: fx.GraphModule) -> dict[str, str]:
    """What the registered operators of a graph do, as text, by process group."""
    found: dict[str, set[str]] = {}
    for collective in find_collectives(gm):
        if collective.foreign is not None:
            found.setdefault(collective.group, set()).add(collective.foreign.operator.text)
    return {group: "; ".join(["", *sorted(texts)]) for group, texts in found.items()}


def agree_on(plan: str, sites: Sequence[Site], foreign: Mapping[str, str]) -> None:
    """All ranks of each group that the sites name must call.

    Args:
        plan: what all of them must have alike; foreign: from :func:`foreign_operators`, of the
            graph as it was.

    Raises:
        RankMismatchError, TransportError: see :func:`~rfcompile.wire.process_groups.agree`.
    """
    with _disable_current_modes():
        # Only two ranks take part in a transfer: the others may not be compiling.
        shared = [s for s in sites if s.world_size > 1 and s.collective not in ("send", "recv")]
        for group in dict.fromkeys(site.group for site in shared):
            agree(group, plan + foreign.get(group, ""))
