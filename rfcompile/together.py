"""Errors that one rank meets around a collective reach all ranks: nobody waits in vain."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from rfcompile.errors import PeerError, RFCompileError
from rfcompile.process_groups import transport

T = TypeVar("T")


def together(group: Any, site: str, action: Callable[[], T]) -> T:
    """Run ``action`` on every rank of ``group``; if it fails on any, every rank raises that error.

    Every rank must call. Of several errors that of the first rank is raised; its message names the
    rank.

    Raises:
        The error of a rank, if it is of this package. PeerError: it is another one, of another
        rank. TransportError: a rank died or did not answer in time.
    """
    result, error = None, None
    try:
        result = action()
    except Exception as raised:
        error = raised
    found: list[Any] = [None] * group.size()
    if group.size() == 1 or dist.get_backend(group) == "fake":
        found = [_sent(error)]
    else:
        with transport(group, site):
            dist.all_gather_object(found, _sent(error), group=group)
    failed = [rank for rank, sent in enumerate(found) if sent is not None]
    if not failed:
        return result  # type: ignore[return-value]
    rank = failed[0]
    if group.size() == 1 or (rank == group.rank() and not isinstance(error, RFCompileError)):
        assert error is not None
        raise error
    if isinstance(found[rank], str):
        raise PeerError(site, rank, found[rank]) from error
    raise found[rank].on_rank(rank) from error


def _sent(error: Exception | None) -> RFCompileError | str | None:
    """An error as other ranks get it: foreign ones may not load there."""
    if error is None or not isinstance(error, RFCompileError):
        return error if error is None else f"{type(error).__name__}: {error}"
    try:
        pickle.dumps(error)
    except Exception:  # a field that cannot travel: the type and the message are enough
        return error.bare()
    return error
