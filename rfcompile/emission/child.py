"""Work in child processes that are forked from this one: what they change there ends with them."""

from __future__ import annotations

import multiprocessing
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar, cast

import torch

from rfcompile.errors import EmissionError, RFCompileError

Given = TypeVar("Given")
Result = TypeVar("Result")


def in_children(
    prepare: Callable[[], None],
    work: Callable[[Given], Result],
    given: Sequence[Given],
    children: int,
) -> Iterator[tuple[int, Result]]:
    """``work`` of every item and the item's number, as they are done.

    An item need not pickle, its result must.

    Args:
        prepare: called first in each child.
        children: how many processes share the items.

    Raises:
        EmissionError: a child met an error that is not of this package, or died.
    """
    fork = multiprocessing.get_context("fork")
    ends: dict[Any, Any] = {}  # a pipe from each process
    try:
        for number in range(min(children, len(given))):
            near, far = fork.Pipe(duplex=False)
            mine = list(enumerate(given))[number::children]
            process = fork.Process(target=_child, args=(far, prepare, work, mine), daemon=True)
            with warnings.catch_warnings():
                # Of a process with threads: the child starts none and waits for none.
                warnings.simplefilter("ignore", DeprecationWarning)
                process.start()
            far.close()
            ends[near] = process
        while ends:
            for end in wait(list(ends)):
                try:
                    done = cast(Connection, end).recv()
                except EOFError:
                    process = ends.pop(end)
                    process.join()
                    if process.exitcode:
                        reason = f"the process that makes them ended with {process.exitcode}"
                        raise EmissionError("a graph", "", reason) from None
                    continue
                if isinstance(done, BaseException):
                    raise done
                yield done
    finally:
        for process in ends.values():
            process.kill()
            process.join()


def _child(
    far: Connection,
    prepare: Callable[[], None],
    work: Callable[[Any], Any],
    mine: Sequence[tuple[int, Any]],
) -> None:
    torch.set_num_threads(1)  # those of the parent do not exist here
    try:
        prepare()
        for number, item in mine:
            far.send((number, work(item)))
    except RFCompileError as error:
        far.send(error)
    except BaseException as error:
        text = "".join(traceback.format_exception(error))[-3000:]
        far.send(EmissionError("a graph", "", text))
    finally:
        far.close()
