"""The rule of conftest.py: a test that needs more than 10 s of CPU time has the mark slow."""

from __future__ import annotations

import subprocess
import sys
from types import ModuleType, SimpleNamespace

import pytest

from tests import conftest


def charge(request: pytest.FixtureRequest, seconds: float) -> object:
    """Pretend that the running test used ``seconds``; what the hook returns for its result."""
    clock = iter((100.0, 100.0 + seconds))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conftest, "cpu_seconds", lambda children: next(clock))
        call = conftest.pytest_runtest_call(request.node)
        next(call)
        with pytest.raises(StopIteration) as done:
            call.send("the result")
    return done.value.value


def test_ten_seconds_are_allowed(request: pytest.FixtureRequest) -> None:
    assert charge(request, 10.0) == "the result"


def test_more_is_a_failure_that_says_what_to_do(request: pytest.FixtureRequest) -> None:
    text = r"what_to_do used 10\.1 s of CPU time; .* may use 10 s\. Make it smaller, or mark it"
    with pytest.raises(pytest.fail.Exception, match=text):
        charge(request, 10.1)


def test_who_imports_a_heavy_module_first_is_not_judged(request: pytest.FixtureRequest) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conftest, "HEAVY", ("heavy",))
        patch.setattr(conftest, "cpu_seconds", lambda children: 100.0 * ("heavy" in sys.modules))
        call = conftest.pytest_runtest_call(request.node)
        next(call)
        patch.setitem(sys.modules, "heavy", ModuleType("heavy"))
        with pytest.raises(StopIteration):
            call.send(None)


@pytest.mark.slow
def test_the_mark_allows_more(request: pytest.FixtureRequest) -> None:
    assert charge(request, 1000.0) == "the result"


def test_a_child_is_counted_where_it_should_be() -> None:
    children = conftest.cpu_seconds(children=True) - conftest.cpu_seconds(children=False)
    subprocess.run([sys.executable, "-c", "sum(range(2_000_000))"], check=True)
    later = conftest.cpu_seconds(children=True) - conftest.cpu_seconds(children=False)
    assert later > children


def test_processes_that_serve_many_tests_are_charged_to_none() -> None:
    asked: list[bool] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conftest, "cpu_seconds", lambda children: asked.append(children) or 0.0)
        for fixtures in (("ranks",), ("tmp_path",)):
            call = conftest.pytest_runtest_call(SimpleNamespace(fixturenames=fixtures))
            assert list(call) == [None]
    assert asked == [False, False, True, True]
