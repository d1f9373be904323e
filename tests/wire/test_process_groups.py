"""Process groups by handle, name or default; without one, a typed error; simulated ranks."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

import rfcompile as rf
from rfcompile.codec.compiling import constant_while_compiling
from rfcompile.errors import ProcessGroupError
from rfcompile.wire.process_groups import (
    agree,
    name_of,
    require_same,
    resolve,
    simulated,
)


def test_a_group_by_handle_by_name_and_by_default() -> None:
    with simulated(4):
        pair = dist.new_group([0, 1])
        world = dist.group.WORLD
        assert world is not None
        assert resolve(None) is world
        assert resolve(pair) is pair
        assert resolve(pair.group_name) is pair
        assert (resolve(None).size(), resolve(pair).size()) == (4, 2)
        assert name_of(pair) == name_of(pair.group_name) == pair.group_name


def test_no_group_at_all() -> None:
    assert not dist.is_initialized()
    for group in (None, "0"):
        with pytest.raises(
            ProcessGroupError,
            match=r"there is no process group: call torch\.distributed\.init_process_group first",
        ):
            resolve(group)
    with pytest.raises(ProcessGroupError, match="even with a single process"):
        rf.all_reduce(torch.ones(3), 4)
    with pytest.raises(RuntimeError, match="init_process_group"):  # the builtin it resembles
        rf.broadcast(torch.ones(3), 4)


def test_a_group_that_is_not_there() -> None:
    with (
        simulated(2),
        pytest.raises(
            ProcessGroupError, match=r"process group 'tp' does not exist in this process: pass a"
        ) as caught,
    ):
        resolve("tp")
    assert caught.value.__cause__ is not None


def test_simulated_ranks_agree_and_are_gone_afterwards() -> None:
    with simulated(8):
        assert (dist.get_rank(), dist.get_world_size()) == (0, 8)
        assert agree("0", "anything")
        require_same(dist.group.WORLD, "anything")
    assert not dist.is_initialized()


def test_a_simulation_leaves_an_existing_group_alone() -> None:
    with simulated(8):
        with simulated(2):
            assert dist.get_world_size() == 8
        assert dist.is_initialized()


def test_a_simulation_ends_with_an_error_too() -> None:
    with pytest.raises(LookupError), simulated(2):
        raise LookupError
    assert not dist.is_initialized()


def test_a_constant_runs_once_while_its_caller_is_traced() -> None:
    calls = []

    @constant_while_compiling
    def note(word: str) -> int:
        calls.append(word)
        return len(word)

    f = torch.compile(lambda x: x + note("four"), backend="eager", fullgraph=True)
    x = torch.ones(2)
    assert f(x).tolist() == [5.0, 5.0]
    assert f(x + 1).tolist() == [6.0, 6.0]
    assert calls == ["four"]
