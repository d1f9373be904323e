"""Adapters on two ranks: exchanged as payloads of the wire, bit-identical afterwards."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

import rfcompile as rf
from rfcompile.adapters import AdaptedLinear
from rfcompile.errors import (
    FormatError,
    OptionError,
    PeerError,
    RankMismatchError,
    TransportError,
)
from rfcompile.rewrites.adapters import exchange
from rfcompile.rewrites.adapters.exchange import broadcast_adapters
from tests.ranks import Rank, RunRanks
from tests.rewrites.models import made, moved, tokens

WORLD = 2


def check_exchange(rank: Rank) -> None:
    model = made()
    for dora in (False, True):
        new = rf.transform(model, rf.Adapters(4, sine=not dora, dora=dora))
        moved(new, seed=rank.index)
        if dora:
            module = new.get_submodule("blocks.0.up")
            assert isinstance(module, AdaptedLinear)
            assert module.lora_magnitude is not None
            with torch.no_grad():
                module.lora_magnitude.mul_(1 + rank.index)
        before = {n: p.detach().clone() for n, p in new.named_parameters() if "lora_" in n}
        sent = broadcast_adapters(new, 4, src=1)
        fmt, count = rf.QuantFormat(4).for_kind("weights"), 0
        for name, p in new.named_parameters():
            if "lora_" not in name:
                continue
            rank.assert_same(p.detach(), name)
            if "magnitude" in name:
                count += p.nbytes
            else:
                count += fmt.payload_bytes(p.numel())
            if rank.index == 1:  # the source has what the others have
                old = before[name]
                decoded = rf.dequantize(rf.quantize(old, fmt), fmt, old.shape)
                assert torch.equal(p, old if "magnitude" in name else decoded)
        assert sent == count
        rank.assert_same(new(tokens()).detach(), "the output")
        with pytest.raises(RankMismatchError):
            broadcast_adapters(new, 8 if rank.index else 4)
        with pytest.raises(OptionError, match="adapters are quantized"):
            broadcast_adapters(rf.adapters.quantize(new, 8), 4)
    with pytest.raises(OptionError, match="no adapters"):
        broadcast_adapters(model, 4)
    plain = rf.transform(model, rf.Adapters(4))
    half = rf.transform(made().bfloat16(), rf.Adapters(4, dora=True))
    for other in (new, half, rf.adapters.quantize(plain, 4), model):  # plain on rank 0 only
        with pytest.raises(RankMismatchError):
            broadcast_adapters(other if rank.index else plain, 4)
    with pytest.raises(OptionError, match="give a format"):
        broadcast_adapters(new, "exact")


def check_sharded(rank: Rank) -> None:
    """Rewrite first, then shard: it trains as it does on one rank. The other way is an error."""
    mesh = init_device_mesh("cpu", (WORLD,))
    for how in (rf.LowRank(4), rf.Adapters(4)):
        new, alone = rf.transform(made(), how), rf.transform(made(), how)
        fully_shard(new, mesh=mesh)
        torch.testing.assert_close(new(tokens()), alone(tokens()), rtol=0, atol=0)
        new(tokens()).sum().backward()
    sharded = made()
    fully_shard(sharded, mesh=mesh)
    for how in (rf.LowRank(4), rf.Adapters(4)):
        with pytest.raises(OptionError, match="DTensors of FSDP: rewrite the model first"):
            rf.transform(sharded, how)
    parallel = made()
    for block in parallel.blocks:
        parallelize_module(block, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    for how in (rf.LowRank(4), rf.Adapters(4)):
        with pytest.raises(OptionError, match="DTensor: rewrite the model first"):
            rf.transform(parallel, how)


def trained(model: nn.Module, steps: int = 3) -> nn.Module:
    """Every rank with the same tokens, so that the mean gradient is each rank's own, exactly."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.2)
    for _ in range(steps):
        optimizer.zero_grad()
        model(tokens()).square().mean().backward()
        optimizer.step()
    return model


def check_fsdp(rank: Rank, kind: str) -> None:
    """A model whose adapters are not zero: sharded it is bit for bit the one that is not."""
    how = {"plain": {}, "sine": {"sine": True}, "dora": {"dora": True}}[kind]
    alone = moved(rf.transform(made(), rf.Adapters(4, **how)))
    sharded = copy.deepcopy(alone)
    mesh = init_device_mesh("cpu", (WORLD,))
    for block in sharded.get_submodule("blocks").children():
        fully_shard(block, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    for _ in range(2):
        assert torch.equal(sharded(tokens()), alone(tokens()))
    trained(sharded)
    trained(alone)
    for name, parameter in sharded.named_parameters():
        assert isinstance(parameter, DTensor)
        assert (parameter.grad is not None) == ("lora_" in name), name  # no base is reduced
        assert torch.equal(parameter.full_tensor(), alone.get_parameter(name)), name
    expected = alone(tokens())
    assert torch.equal(sharded(tokens()), expected)
    sharded.float()
    assert torch.equal(sharded(tokens()), expected)
    sharded.load_state_dict(sharded.state_dict())
    assert torch.equal(sharded(tokens()), expected)

    full = get_model_state_dict(sharded, options=StateDictOptions(full_state_dict=True))
    assert full.keys() == alone.state_dict().keys()
    resumed = rf.transform(made(seed=3), rf.Adapters(4, **how))
    resumed.load_state_dict(full)
    assert torch.equal(resumed(tokens()), expected)
    again = rf.transform(made(seed=4), rf.Adapters(4, **how))
    fully_shard(again, mesh=mesh)
    set_model_state_dict(again, full, options=StateDictOptions(full_state_dict=True))
    assert torch.equal(again(tokens()), expected)


@pytest.mark.parametrize("kind", [pytest.param("plain", marks=pytest.mark.slow), "sine", "dora"])
def test_sharded_adapters_compute_and_train_as_they_do_alone(ranks: RunRanks, kind: str) -> None:
    ranks(WORLD, check_fsdp, kind)


def stored(place: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(place / "adapter_model.safetensors")


def check_saved(rank: Rank, kind: str, folder: Path) -> None:
    """The files are those of the model that is not sharded, written by the first rank alone."""
    how = {"plain": {}, "dora": {"dora": True}}[kind]
    alone = moved(rf.transform(made(), rf.Adapters(4, **how)))
    sharded = copy.deepcopy(alone)
    fully_shard(sharded, mesh=init_device_mesh("cpu", (WORLD,)))
    sharded(tokens())  # FSDP leaves the parameters of its root whole
    mine = folder / str(rank.index)
    assert rf.adapters.save(sharded, mine) == mine
    assert mine.exists() == (rank.index == 0)
    written = folder / "0"
    rf.adapters.save(alone, folder / f"alone{rank.index}")
    wanted, found = (stored(place) for place in (folder / f"alone{rank.index}", written))
    assert wanted.keys() == found.keys()
    assert all(torch.equal(value, found[name]) for name, value in wanted.items())
    again = rf.adapters.load(made(), written)
    assert torch.equal(again(tokens()), alone(tokens()))
    in_the_way = folder / "file"
    in_the_way.touch()
    with pytest.raises(PeerError if rank.index else FileExistsError):
        rf.adapters.save(sharded, in_the_way)


@pytest.mark.parametrize("kind", ["plain", "dora"])
def test_sharded_adapters_are_saved(ranks: RunRanks, kind: str, tmp_path: Path) -> None:
    ranks(WORLD, check_saved, kind, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("check", [check_exchange, check_sharded])
def test_adapters_on_two_ranks(ranks: RunRanks, check: Callable[[Rank], None]) -> None:
    ranks(WORLD, check)


def adapters(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for name, p in model.named_parameters() if "lora_" in name]


def check_source(rank: Rank) -> None:
    group = dist.new_group([1, 2])
    if rank.index == 0:
        return
    model = moved(rf.transform(made(), rf.Adapters(4)), seed=rank.index)
    before, fmt = adapters(model), rf.QuantFormat(8)
    broadcast_adapters(model, fmt, group, src=1)
    for old, new in zip(before, adapters(model), strict=True):
        rank.assert_same(new, "an adapter", group)
        if rank.index == 2:  # rank 1 of the group
            assert torch.equal(new, rf.dequantize(rf.quantize(old, fmt), fmt, old.shape))


def test_the_source_is_a_rank_of_the_group(ranks: RunRanks) -> None:
    ranks(3, check_source)


def check_errors(rank: Rank) -> None:
    """Of one rank only: all raise the same, and every rank has its old adapters."""
    me = rank.index
    model = moved(rf.transform(made(), rf.Adapters(4, modules=["blocks.0.up"], dora=True)), seed=me)
    before = adapters(model)
    with pytest.raises(FormatError, match="rank 1: bits=7"):
        broadcast_adapters(model, 7 if me else 8)
    with pytest.raises(OptionError, match="rank 1: src=5"):
        broadcast_adapters(model, 8, src=5 * me)
    real = dist.broadcast

    def breaks(*arguments: Any, **options: Any) -> Any:
        real(*arguments, **options)
        if me == 1:
            raise RuntimeError("the cable")

    exchange.dist.broadcast = breaks  # type: ignore[assignment]
    try:
        with pytest.raises(TransportError, match=r"^(rank 1: )?broadcast_adapters failed in"):
            broadcast_adapters(model, 4)
    finally:
        exchange.dist.broadcast = real  # type: ignore[assignment]
    assert all(map(torch.equal, before, adapters(model)))


def test_errors_of_one_rank_reach_all(ranks: RunRanks) -> None:
    # With one magnitude only the last message fails, so that the ranks stay in step.
    ranks(WORLD, check_errors, timeout=60)
