"""Work in forked processes: results, errors, deaths."""

from __future__ import annotations

import os

import pytest

from rfcompile.emission.child import in_children
from rfcompile.errors import EmissionError, OptionError

STATE: list[str] = []


def test_items_are_shared_and_what_a_child_changes_stays_there() -> None:
    def work(item: object) -> tuple[int, int]:
        STATE.append("work")
        return os.getpid(), len(STATE)

    unpicklable = [lambda: None] * 5
    found = dict(in_children(lambda: STATE.append("prepared"), work, unpicklable, 2))
    assert [*sorted(found)] == [0, 1, 2, 3, 4]
    pids = [found[number][0] for number in range(5)]
    assert len({*pids}) == 2
    assert os.getpid() not in pids
    assert pids[0] == pids[2] == pids[4]
    assert found[4][1] == 4  # prepared, and three items
    assert STATE == []


def test_an_error_of_this_package_keeps_its_type() -> None:
    def work(item: int) -> int:
        raise OptionError("item", item, "use another.")

    with pytest.raises(OptionError, match="item=3 is not supported") as caught:
        list(in_children(lambda: None, work, [3], 1))
    assert caught.value.option == "item"


def test_another_error_comes_with_its_traceback() -> None:
    with pytest.raises(EmissionError, match=r"ZeroDivisionError: division by zero"):
        list(in_children(lambda: None, lambda item: 1 / item, [0], 1))


def test_a_child_that_dies_is_an_error() -> None:
    with pytest.raises(EmissionError, match="the process that makes them ended with 7"):
        list(in_children(lambda: os._exit(7), lambda item: item, [1, 2], 2))


def test_no_items_need_no_child() -> None:
    assert list(in_children(lambda: os._exit(7), lambda item: item, [], 2)) == []
