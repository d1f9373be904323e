"""What differs between versions of torch, each way of it, on whichever torch is installed."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

import rfcompile as rf
from rfcompile import torch_versions
from rfcompile.errors import HookError, RFCompileWarning
from rfcompile.find.collectives import find_collectives
from rfcompile.passes.quantize_collectives import QuantizeCollectives
from rfcompile.passes.quantize_transfers import QuantizeTransfers
from rfcompile.torch_versions import (
    TRIED,
    global_rank,
    gradient_order,
    reduction_name,
    require,
    split_joined_waits,
    stage_outputs,
    warn_if_untried,
)
from rfcompile.wire.process_groups import simulated

c10d = torch.ops._c10d_functional
P2P = pytest.mark.skipif(not hasattr(c10d, "batch_p2p_ops"), reason="this torch has no p2p graphs")


# ---- a torch that nobody tried -------------------------------------------------------------------


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    torch_versions._warn_if_untried.cache_clear()
    yield lambda version: monkeypatch.setattr(torch, "__version__", version)
    torch_versions._warn_if_untried.cache_clear()


@pytest.mark.parametrize("version", ["2.16.0", "2.16.0.dev20261201+cpu", "3.0.0a0+gitabc"])
def test_a_newer_torch_is_a_warning_once(installed: Any, version: str) -> None:
    installed(version)
    with pytest.warns(RFCompileWarning, match=rf"torch {version[:6]}.*2\.11, 2\.13, 2\.14, 2\.15"):
        warn_if_untried()
    warn_if_untried()  # the test's filters make a second warning an error


@pytest.mark.parametrize("version", [*(f"{v}.0+cpu" for v in TRIED), "2.12.1", "2.9.0"])
def test_an_older_torch_is_none(installed: Any, version: str) -> None:
    installed(version)
    warn_if_untried()


@pytest.mark.usefixtures("rfquant_without_inductor")
def test_the_backend_warns(installed: Any) -> None:
    installed("9.9.0")
    f = torch.compile(torch.sin, backend="rfquant", options={"bits": 4})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        f(torch.zeros(3))
        f(torch.zeros(3, 3))
    ours = [w for w in caught if issubclass(w.category, RFCompileWarning)]
    assert len(ours) == 1


def test_what_is_missing_is_named_with_the_version() -> None:
    thing = SimpleNamespace(a=1, new=2)
    require(thing, ["a", "old|new"], "thing")
    with pytest.raises(HookError) as caught:
        require(thing, ["a", "b", "c|d"], "thing")
    text = f"thing cannot be quantized: in torch {torch.__version__} it has no b, no c|d."
    assert str(caught.value).startswith(text)
    assert "tried with torch 2.11, 2.13, 2.14, 2.15" in str(caught.value)


# ---- FSDP2 and pipelines -------------------------------------------------------------------------


def test_gradients_lie_in_the_order_of_parameters_or_as_fsdp_says() -> None:
    params = ["a", "b", "c"]
    assert gradient_order(SimpleNamespace(fsdp_params=params)) == params
    group = SimpleNamespace(fsdp_params=params, _reduce_scatter_param_indices=[0, 2, 1])
    assert gradient_order(group) == ["a", "c", "b"]


@pytest.mark.parametrize("order", [[], [0, 1], [0, 1, 1], [0, 1, 3]])
def test_an_order_that_is_none_is_not_believed(order: list[int]) -> None:
    params = ["a", "b", "c"]
    group = SimpleNamespace(fsdp_params=params, _reduce_scatter_param_indices=order)
    assert gradient_order(group) == []


def test_outputs_of_a_stage_wherever_torch_keeps_them() -> None:
    old = SimpleNamespace(fwd_cache={1: (("y",), ["x"])})
    state = SimpleNamespace(live_outputs=["y"])
    new = SimpleNamespace(_forward_chunk_states={1: state})
    assert [*stage_outputs(old, 1)] == [*stage_outputs(new, 1)] == ["y"]


# ---- reductions ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("op", "name"),
    [
        ("SUM", "sum"),
        ("avg", "avg"),
        ("", ""),
        (dist.ReduceOp.SUM, "sum"),
        (dist.ReduceOp.AVG, "avg"),
        (dist.ReduceOp(dist.ReduceOp.MAX), "max"),
        (dist._make_nccl_premul_sum(0.5), "premul_sum"),
    ],
)
def test_reductions_have_one_name(op: object, name: str) -> None:
    assert reduction_name(op) == name


# ---- graphs --------------------------------------------------------------------------------------


@pytest.fixture
def joined_wait() -> Iterator[Any]:
    """``wait_tensors``, defined for the test where torch has none."""
    if hasattr(c10d, "wait_tensors"):
        yield c10d.wait_tensors
        return
    with torch.library._scoped_library("_c10d_functional", "FRAGMENT") as library:
        library.define("wait_tensors(Tensor[] tensors) -> Tensor[]")
        library.impl("wait_tensors", lambda tensors: list(tensors), "Meta")
        yield c10d.wait_tensors


def batch(x: Tensor, wait: Any) -> Tensor:
    """What Dynamo makes of ``batch_isend_irecv``, with a wait for both."""
    received = torch.empty_like(x)
    both = c10d.batch_p2p_ops(["isend", "irecv"], [1, 1], [0, 0], [x, received], "0")
    _, mine = wait(list(both))
    return mine + 1


def targets(gm: fx.GraphModule) -> list[str]:
    return [str(node.target) for node in gm.graph.nodes if node.op == "call_function"]


@P2P
def test_a_joined_wait_becomes_one_for_each(joined_wait: Any) -> None:
    with simulated(2):
        gm = make_fx(batch, tracing_mode="fake")(torch.zeros(4, 4), joined_wait)
    split_joined_waits(gm.graph)
    gm.graph.lint()
    assert targets(gm).count("_c10d_functional.wait_tensor.default") == 2
    assert "_c10d_functional.wait_tensors.default" not in targets(gm)
    (add,) = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.add.Tensor)
    wait: Any = add.args[0]
    assert wait.target is c10d.wait_tensor.default
    assert wait.args[0].args[1] == 1  # what was received


@P2P
def test_a_joined_wait_is_no_collective(joined_wait: Any) -> None:
    with simulated(2):
        gm = make_fx(batch, tracing_mode="fake")(torch.zeros(4, 4), joined_wait)
        assert find_collectives(gm) == ()


@P2P
def test_a_batch_with_a_joined_wait_is_quantized(joined_wait: Any) -> None:
    with simulated(2):
        gm = make_fx(batch, tracing_mode="fake")(torch.zeros(64, 64), joined_wait)
        result = QuantizeTransfers(rf.Policy.of(bits=4, min_bytes=0))(gm)
    assert result.changes == 2
    assert "_c10d_functional.wait_tensors.default" not in targets(gm)
    assert targets(gm).count("rfcompile.finish_receive.default") == 1


@P2P
@pytest.mark.parametrize("joined", [False, True])
def test_what_is_waited_for_twice_is_there_after_the_first_wait(
    joined_wait: Any, joined: bool
) -> None:
    def twice(x: Tensor) -> Tensor:
        received = torch.empty_like(x)
        both = c10d.batch_p2p_ops(["isend", "irecv"], [1, 1], [0, 0], [x, received], "0")
        first = joined_wait(list(both)) if joined else [c10d.wait_tensor(y) for y in both]
        y = first[1] * 2
        c10d.wait_tensor(both[1])
        return y

    with simulated(2):
        gm = make_fx(twice, tracing_mode="fake")(torch.zeros(64, 64))
        QuantizeTransfers(rf.Policy.of(bits=4, min_bytes=0))(gm)
    order = targets(gm)
    assert order.index("rfcompile.finish_receive.default") < order.index("aten.mul.Tensor")


@P2P
@pytest.mark.parametrize(("local", "peer"), [(True, 3), (False, 2)])
def test_peers_are_ranks_of_the_group_or_global(
    monkeypatch: pytest.MonkeyPatch, local: bool, peer: int
) -> None:
    monkeypatch.setattr(torch_versions, "_peers_are_local", lambda: local)
    with simulated(4):
        group = dist.new_group([0, 2, 3])
        assert global_rank(2, group) == peer


def test_a_collective_that_nobody_knows_stays_exact_with_a_reason() -> None:
    with torch.library._scoped_library("_c10d_functional", "FRAGMENT") as library:
        library.define("gossip_(Tensor(a!) x, Any reduce_op, str group_name) -> Tensor(a!)")
        library.define("wait_for_all(Tensor x) -> Tensor")
        for name in ("gossip_", "wait_for_all"):
            library.impl(name, lambda x, *_: torch.empty_like(x), "Meta")

        def f(x: Tensor) -> Tensor:
            return c10d.wait_for_all(c10d.gossip_(x, "sum", "0"))

        with simulated(4):
            gm = make_fx(f, tracing_mode="fake")(torch.zeros(64, 64))
            result = QuantizeCollectives(rf.Policy.of(bits=4, min_bytes=0))(gm)
    (site,) = result.facts
    assert isinstance(site, rf.Site)
    assert (site.collective, site.format, site.group) == ("gossip_", None, "0")
    assert site.reason == "gossip_ is not rewritten in this version"


def test_a_group_that_the_graph_computes_is_not_known() -> None:
    with simulated(4):
        gm = make_fx(
            lambda x: c10d.wait_tensor(c10d.all_reduce(x, "sum", "0")), tracing_mode="fake"
        )(torch.zeros(64, 64))
        (call,) = gm.graph.find_nodes(op="call_function", target=c10d.all_reduce.default)
        with gm.graph.inserting_before(call):
            group = gm.graph.call_function(str, ("0",))
        call.args = (*call.args[:2], group)
        result = QuantizeCollectives(rf.Policy.of(bits=4, min_bytes=0))(gm)
    (site,) = result.facts
    assert isinstance(site, rf.Site)
    assert site.reason == "process group '%str_1' is not known in this process"
