"""Tells all ranks about an error of one rank, so that no rank waits in vain."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from rfcompile.errors import PeerError, ProcessGroupError, RFCompileError, TransportError
from rfcompile.wire.process_groups import resolve, sends_nothing, sole_group, transport

T = TypeVar("T")


def together(group: Any, site: str, action: Callable[[], T]) -> T:
    """Run ``action`` on every rank of ``group``; if it fails on any, every rank raises that error.

    Every rank must call. Of several errors that of the first rank is raised; its message names the
    rank. Where all ranks meet the same one, each raises its own, as it is. A rank that meets one
    and cannot tell the others raises it, too. A group of None: there is nobody to tell.

    Raises:
        The error of a rank, if it is of this package. PeerError: it is another one, of another
        rank. TransportError: a rank died or did not answer in time.
    """
    result, error = None, None
    try:
        result = action()
    except Exception as raised:
        error = raised
    found = _exchanged(group, site, error)
    failed = [rank for rank, sent in enumerate(found) if sent is not None]
    if not failed:
        return result  # type: ignore[return-value]
    if len(failed) == len(found) and len({(type(sent), str(sent)) for sent in found}) == 1:
        assert error is not None
        raise error
    rank = failed[0]
    if rank == group.rank() and not isinstance(error, RFCompileError):
        assert error is not None
        raise error
    if isinstance(found[rank], str):
        raise PeerError(site, rank, found[rank]) from error
    raise found[rank].on_rank(rank) from error


def resolved(group: Any, site: str) -> Any:
    """:func:`resolve`; the others get its error where they can only mean the default group."""
    try:
        return resolve(group)
    except ProcessGroupError:
        return together(sole_group(), site, lambda: resolve(group))


def _exchanged(group: Any, site: str, error: Exception | None) -> list[Any]:
    """What each rank met: an error of this package, the text of another one, or None."""
    mine = _sent(error)
    if group is None:
        return [mine]
    try:
        with transport(group, site):
            if sends_nothing(group):
                return [mine]
            found: list[Any] = [None] * group.size()
            dist.all_gather_object(found, mine, group=group)
    except TransportError as failure:
        if error is None:
            raise
        error.add_note(f"The other ranks could not be told: {failure}")
        return [mine]
    return found


def _sent(error: Exception | None) -> RFCompileError | str | None:
    """An error as other ranks get it: foreign ones may not load there."""
    if error is None or not isinstance(error, RFCompileError):
        return error if error is None else f"{type(error).__name__}: {error}"
    try:
        pickle.dumps(error)
    except Exception:  # a field that cannot travel: the type and the message are enough
        return error.bare()
    return error
