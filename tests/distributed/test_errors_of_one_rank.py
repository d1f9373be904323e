"""An error that one rank meets at a door reaches all ranks at once: nobody waits for a timeout."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.optim import SGD, AdamW

import rfcompile as rf
from rfcompile.distributed import (
    QuantizedPipelineStage,
    broadcast_states,
    quantize_ddp,
    quantize_fsdp,
    quantize_pipeline_stage,
)
from rfcompile.errors import (
    DtypeError,
    FormatError,
    HookError,
    OptionError,
    PeerError,
    ProcessGroupError,
    RankMismatchError,
    RFCompileError,
    StateError,
    TransportError,
)
from rfcompile.rewrites.adapters.exchange import broadcast_adapters
from rfcompile.states.composite import Optimizers
from rfcompile.wire.together import together
from tests.ranks import Rank, RunRanks, any_error_of, error_of

WORLD = 2
TIMEOUT = 60
"""Seconds, of each group: nobody gets there."""
AT_ONCE = 10
"""Seconds, on a busy machine."""
CPU = torch.device("cpu")

Door = Callable[[Any, bool], object]
"""Calls a door in a group; the rank that is told so does it wrong."""


def new_group() -> Any:
    return dist.new_group(timeout=timedelta(seconds=TIMEOUT))


def seconds_and_error(f: Callable[[], object]) -> tuple[float, Exception]:
    dist.barrier()
    start = time.monotonic()
    error = any_error_of(f)
    return time.monotonic() - start, error


# ---- hooks ---------------------------------------------------------------------------------------


def linears() -> nn.Sequential:
    return nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))


def sharded(group: Any) -> nn.Module:
    model = linears()
    fully_shard(model, mesh=DeviceMesh.from_group(group, "cpu"))
    return model


def ddp(group: Any, policy: Any = 4, module: Any = None) -> object:
    given = DDP(linears(), process_group=group)
    return quantize_ddp(given if module is None else module(given), policy)


def hooked(given: DDP) -> DDP:
    given.register_comm_hook(None, allreduce_hook)
    return given


def compiled(given: DDP) -> Any:
    return torch.compile(given)


def foreign(given: nn.Module) -> nn.Module:
    """A module with a communication of its own."""
    unit: Any = given
    state = unit._get_fsdp_state()._fsdp_param_groups[0]

    class Own(type(state._all_gather_comm)):  # type: ignore[misc]
        pass

    unit.set_custom_all_gather(Own())
    return given


def stage(group: Any, policy: Any = 4, **options: Any) -> object:
    num = options.pop("num", WORLD)
    return QuantizedPipelineStage(
        nn.Linear(8, 8), dist.get_rank(), num, CPU, group=group, policy=policy, **options
    )


def changed_stage(group: Any, policy: Any, times: int = 1) -> object:
    made = PipelineStage(nn.Linear(8, 8), dist.get_rank(), WORLD, CPU, group=group)
    if times == 2:
        made.__class__ = type("Quantized", (QuantizedPipelineStage,), {})
    return quantize_pipeline_stage(made, policy)


HOOKS: dict[str, tuple[type[RFCompileError], str, Door]] = {
    "ddp policy": (FormatError, "bits=", lambda g, bad: ddp(g, "9b" if bad else 4)),
    "ddp hook": (
        HookError,
        "DistributedDataParallel cannot be quantized: it has the",
        lambda g, bad: ddp(g, module=hooked if bad else None),
    ),
    "ddp compiled": (
        HookError,
        "OptimizedModule cannot be quantized: pass the",
        lambda g, bad: ddp(g, module=compiled if bad else None),
    ),
    "fsdp policy": (
        FormatError, "bits=", lambda g, bad: quantize_fsdp(sharded(g), "9b" if bad else 4)
    ),
    "fsdp comm": (
        HookError,
        "FSDPSequential cannot be quantized: unit (root) has the custom",
        lambda g, bad: quantize_fsdp((foreign if bad else nn.Module.eval)(sharded(g)), 4),
    ),
    "stage policy": (FormatError, "bits=", lambda g, bad: stage(g, "9b" if bad else 4)),
    "changed policy": (FormatError, "bits=", lambda g, bad: changed_stage(g, "9b" if bad else 4)),
    "changed twice": (
        HookError, "Quantized cannot be", lambda g, bad: changed_stage(g, 4, 1 + bad)
    ),
}  # fmt: skip


def wrong_hooks(rank: Rank) -> dict[str, tuple[float, Exception]]:
    found = {}
    torch.compile(linears())  # what torch imports for it takes seconds
    for name, (*_, door) in HOOKS.items():
        group = new_group()
        found[name] = seconds_and_error(lambda d=door, g=group: d(g, rank.index == 1))
        door(group, False)  # the group still works
    return found


def test_an_error_of_one_rank_at_the_door_of_a_hook_reaches_all(ranks: RunRanks) -> None:
    for found in ranks(WORLD, wrong_hooks):
        for name, (kind, text, _) in HOOKS.items():
            seconds, error = found[name]
            assert type(error) is kind, (name, error)
            assert str(error).startswith(f"rank 1: {text}"), (name, error)
            assert seconds < AT_ONCE, name


def wrong_arguments_of_torch(rank: Rank) -> list[tuple[float, Exception]]:
    group = new_group()
    calls: list[Callable[[], object]] = [
        lambda: stage(group, num=1 + (rank.index != 1)),
        lambda: stage(group, **({"colour": 3} if rank.index else {})),
    ]
    return [seconds_and_error(call) for call in calls]


def test_what_torch_raises_in_one_rank_is_an_error_of_all(ranks: RunRanks) -> None:
    others, own = ranks(WORLD, wrong_arguments_of_torch)
    for (seconds, error), (own_seconds, own_error) in zip(others, own, strict=True):
        assert isinstance(error, PeerError)
        assert error.reason == f"{type(own_error).__name__}: {own_error}"
        assert type(own_error) in (ValueError, RuntimeError, TypeError)
        assert max(seconds, own_seconds) < AT_ONCE


# ---- modules of no known group -------------------------------------------------------------------

NO_GROUP: dict[str, tuple[str, Door]] = {
    "ddp": ("Sequential cannot be quantized: pass the torch.nn.parallel", lambda g, bad: ddp(
        g, module=(lambda _: linears()) if bad else None
    )),
    "fsdp": ("Sequential cannot be quantized: apply torch.distributed.fsdp", lambda g, bad: (
        quantize_fsdp(linears() if bad else fully_shard(linears()), 4)
    )),
    "stage": ("Sequential cannot be quantized: pass a PipelineStage", lambda g, bad: (
        quantize_pipeline_stage(linears(), 4) if bad else changed_stage(g, 4)
    )),
}  # fmt: skip


def modules_without_a_group(rank: Rank) -> list[tuple[float, Exception]]:
    """The default process group is the only one: the others can only be there."""
    return [
        seconds_and_error(lambda d=door: d(None, rank.index == 1)) for _, door in NO_GROUP.values()
    ]


def test_without_other_groups_the_default_one_carries_the_error(ranks: RunRanks) -> None:
    for found in ranks(WORLD, modules_without_a_group):
        for (seconds, error), (text, _) in zip(found, NO_GROUP.values(), strict=True):
            assert type(error) is HookError
            assert str(error).startswith(f"rank 1: {text}")
            assert seconds < AT_ONCE


def modules_outside_of_a_group(rank: Rank) -> list[tuple[float, Exception]]:
    """With another group a rank that is not in it must not wait for those who are."""
    dist.new_group([0])
    dist.barrier()
    if rank.index == 0:
        return []
    start = time.monotonic()
    calls: list[Callable[[], object]] = [
        lambda: quantize_ddp(linears(), 4),  # type: ignore[arg-type]
        lambda: quantize_fsdp(linears(), 4),
        lambda: quantize_pipeline_stage(linears(), 4),
    ]
    return [(time.monotonic() - start, error_of(call)) for call in calls]


def test_with_another_group_nobody_waits_in_the_default_one(ranks: RunRanks) -> None:
    _, alone = ranks(WORLD, modules_outside_of_a_group)
    for (seconds, error), (text, _) in zip(alone, NO_GROUP.values(), strict=True):
        assert str(error).startswith(text)
        assert seconds < AT_ONCE


# ---- meshes of two dimensions --------------------------------------------------------------------


def wrong_on_one_of_four(rank: Rank) -> tuple[float, Exception]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    model = linears()
    fully_shard(model, mesh=mesh)
    return seconds_and_error(lambda: quantize_fsdp(model, "9b" if rank.index == 3 else 4))


def test_an_error_reaches_all_ranks_of_a_mesh(ranks: RunRanks) -> None:
    for seconds, error in ranks(4, wrong_on_one_of_four):
        assert type(error) is FormatError
        assert "rank 1: bits=" in str(error)
        assert seconds < AT_ONCE


# ---- optimizer states and adapters ---------------------------------------------------------------


def optimizer(kind: Any = AdamW) -> Any:
    torch.manual_seed(0)
    model = linears()
    made = kind(model.parameters(), lr=1e-2)
    model(torch.ones(2, 16)).sum().backward()
    made.step()
    return made


def with_entry(made: Any, value: object) -> Any:
    made.state[made.param_groups[0]["params"][1]]["extra"] = value
    return made


def with_option(made: Any, value: object) -> Any:
    made.param_groups[0]["hook"] = value
    return made


class Wrapper:
    """As accelerate's: the optimizer is inside."""

    def __init__(self, inner: Any) -> None:
        self.optimizer = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.optimizer, name)


def adapted(group: Any, fmt: Any, module: bool = True) -> object:
    model: Any = rf.transform(linears(), rf.Adapters(2, modules=["0"])) if module else 3
    return broadcast_adapters(model, fmt, group)


def wrong_states(rank: Rank) -> list[tuple[float, Exception]]:
    me, group = rank.index, new_group()
    calls: list[Callable[[], object]] = [
        lambda: broadcast_states(with_entry(optimizer(), None if me else threading.Lock()), 8),
        lambda: broadcast_states(with_option(optimizer(), None if me else lambda: 1), 8, group),
        lambda: broadcast_states(optimizer(SGD if me else AdamW), 8, group),
        lambda: broadcast_states(
            Optimizers(optimizer(), optimizer(SGD)) if me else Optimizers(*halves()), 8, group
        ),
        lambda: adapted(group, "9b" if me else 4),
        lambda: adapted(group, 4, module=not me),
    ]
    return [seconds_and_error(call) for call in calls]


def halves() -> Iterator[Any]:
    yield from (optimizer(), optimizer())


def test_an_error_of_one_rank_with_states_or_adapters_reaches_all(ranks: RunRanks) -> None:
    expected: list[tuple[type[Exception], str]] = [
        (
            StateError,
            "rank 0: what cannot be pickled cannot be sent: \"state 'extra' of",
        ),
        (
            StateError,
            "rank 0: what cannot be pickled cannot be sent: \"'hook' of param",
        ),
        (RankMismatchError, "optimizer states of torch.optim.adamw.AdamW, all=8b"),
        (RankMismatchError, "of torch.optim.adamw.AdamW, torch.optim.sgd.SGD, "),
        (FormatError, "rank 1: bits="),
        (PeerError, "rank 1 failed with AttributeError: "),
    ]
    for index, found in enumerate(ranks(WORLD, wrong_states)):
        for (seconds, error), (kind, text) in zip(found, expected, strict=True):
            if kind is PeerError and index == 1:
                assert isinstance(error, AttributeError)
            else:
                assert type(error) is kind, error
                assert text in str(error), error
            assert seconds < AT_ONCE, text


def wrapped_on_one_rank(rank: Rank) -> list[Tensor]:
    made = optimizer()
    if rank.index == 0:
        for state in made.state.values():
            state["exp_avg"].fill_(0.5)
    given = Wrapper(made) if rank.index else made
    broadcast_states(given, rf.Policy(optimizer_state=8, min_bytes=0))
    return [state["exp_avg"] for state in made.state.values()]


def test_wrappers_do_not_count_as_another_class(ranks: RunRanks) -> None:
    zero, one = ranks(WORLD, wrapped_on_one_rank)
    assert len(zero) == 4
    assert all(map(torch.equal, zero, one))


def a_group_that_is_none(rank: Rank) -> list[tuple[float, Exception]]:
    group: Any = "nowhere" if rank.index else None
    return [
        seconds_and_error(lambda: broadcast_states(optimizer(), 8, group)),
        seconds_and_error(lambda: adapted(group, 4)),
    ]


def test_a_group_that_one_rank_does_not_know_is_an_error_of_all(ranks: RunRanks) -> None:
    for found in ranks(WORLD, a_group_that_is_none):
        for seconds, error in found:
            assert type(error) is ProcessGroupError
            assert str(error).startswith("rank 1: process group 'nowhere' does not exist")
            assert seconds < AT_ONCE


# ---- the rule itself -----------------------------------------------------------------------------


def fail(error: Exception) -> Any:
    raise error


def some_fail(rank: Rank) -> list[Exception]:
    group, me = dist.group.WORLD, rank.index

    def raised(error: Exception) -> Exception:
        return any_error_of(lambda: together(group, "x", lambda: fail(error)))

    return [
        raised(HookError("same", "no.")),
        raised(ValueError("same")),
        raised(HookError(f"other {me}", "no.")),
        raised(ValueError(f"other {me}")),
        raised(HookError("some", "no.") if me else ValueError("some")),
    ]


def test_all_ranks_that_fail_alike_have_errors_of_their_own(ranks: RunRanks) -> None:
    zero, one = ranks(WORLD, some_fail)
    told = [
        "same cannot be quantized: no.",
        "same",
        "rank 0: other 0 cannot be quantized: no.",
    ]
    assert [str(error) for error in zero] == [*told, "other 0", "some"]
    assert [str(error) for error in one[:3]] == told
    kinds = [HookError, ValueError, HookError, PeerError, PeerError]
    assert [type(error) for error in one] == kinds
    assert "rank 0 failed with ValueError: other 0" in str(one[3])


def nobody_listens(rank: Rank) -> list[str] | None:
    group = dist.new_group(timeout=timedelta(seconds=1))
    if rank.index == 0:
        return None
    error = error_of(lambda: together(group, "x", lambda: fail(OptionError("a", 1, "b."))))
    assert type(error) is OptionError
    return error.__notes__


def test_a_rank_that_cannot_tell_the_others_raises_its_own_error(ranks: RunRanks) -> None:
    _, notes = ranks(WORLD, nobody_listens)
    assert notes is not None
    assert notes[0].startswith("The other ranks could not be told: x failed in process group")


def test_without_a_process_group_errors_come_at_once() -> None:
    assert not dist.is_initialized()
    with pytest.raises(HookError, match=r"^Linear cannot be quantized: pass the torch\.nn"):
        quantize_ddp(nn.Linear(2, 2), 4)  # type: ignore[arg-type]
    with pytest.raises(FormatError, match=r"^bits="):
        quantize_fsdp(nn.Linear(2, 2), "9b")
    with pytest.raises(HookError, match=r"^Linear cannot be quantized: apply"):
        quantize_fsdp(nn.Linear(2, 2), 4)
    with pytest.raises(HookError, match=r"^Linear cannot be quantized: pass a Pipe"):
        quantize_pipeline_stage(nn.Linear(2, 2), 4)
    with pytest.raises(ValueError, match="process group"):
        QuantizedPipelineStage(nn.Linear(2, 2), 0, 2, CPU, policy=4)
    with pytest.raises(ProcessGroupError, match=r"^there is no process group"):
        broadcast_states(optimizer(), 8)


# ---- what costs no message -----------------------------------------------------------------------


def a_wrong_call_of_a_collective(rank: Rank) -> tuple[float, Exception]:
    group = dist.new_group(timeout=timedelta(seconds=1))
    x = torch.ones(64)
    found = seconds_and_error(lambda: rf.all_reduce(x.long() if rank.index else x, 4, group))
    dist.barrier()  # the process lives on: gloo would tell the others if it ended
    return found


def test_a_wrong_call_of_a_collective_is_an_error_there_and_a_timeout_elsewhere(
    ranks: RunRanks,
) -> None:
    # The public collectives send no message to agree on what they know: see docs/limits.md.
    (seconds, other), (own_seconds, own) = ranks(WORLD, a_wrong_call_of_a_collective)
    assert type(own) is DtypeError
    assert own_seconds < 0.5
    assert type(other) is TransportError
    assert "or it raised an error of its own before it sent anything" in str(other)
    assert 0.5 < seconds < 1 + AT_ONCE
