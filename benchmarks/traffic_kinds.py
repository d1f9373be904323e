"""The trainings whose traffic is measured: each kind of parallelism, on each of its wires.

"float32" is plain torch. "bf16" sends bfloat16: DDP by a hook that casts, FSDP2 by its own
MixedPrecisionPolicy (which also computes in bfloat16), pipelines by casts where stages end. "torch
..." are hooks that torch has for DDP. The rest is this package.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from ranks import mean_of_ranks
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import (
    default_hooks,
    powerSGD_hook,
    quantization_hooks,
)
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
from torch.nn.parallel import DistributedDataParallel
from traffic_settings import Setting

from rfcompile import Policy
from rfcompile.distributed import (
    QuantizedPipelineStage,
    broadcast_states,
    quantize_ddp,
    quantize_fsdp,
    split_at_boundaries,
)
from rfcompile.training import optimizers, pack_state_dict, quantize_states

WIRES = {
    "ddp": [
        *("float32", "bf16", "torch bf16", "torch int8"),
        *("int8", "int4", "int4 feedback", "int4 stochastic"),
    ],
    "fsdp": ["float32", "bf16", "int8", "int4", "int4 delta"],
    "pipeline": ["float32", "bf16", "int8", "int4"],
    "pipeline narrow": ["float32", "bf16", "int8", "int4"],
    "states adamw": ["float32", "int8", "int4"],
    "states muon": ["float32", "int8", "int4"],
}
TIMED_ONLY = ("pipeline narrow",)
CHUNKS = 4
"""Micro-batches of a pipeline's step."""


@dataclass
class Trainer:
    """One model on one wire."""

    step: Callable[[], object]
    weights: Callable[[], dict[str, Tensor]]
    """All of them, exact; every rank calls."""
    predicted: Callable[[], float | None]
    """Bytes a step that the report promises, mean of the ranks; every rank calls."""
    facts: dict[str, Any] | None = None


def trainer(wire: str, setting: Setting) -> Trainer:
    make = {"ddp": ddp, "fsdp": fsdp, "pipeline": pipeline, "states": states}
    return make[setting.kind.partition(" ")[0]](wire, setting)


def bits_of(wire: str) -> int | None:
    """Of this package's wires."""
    name = wire.partition(" ")[0]
    return int(name.removeprefix("int")) if name.startswith("int") else None


def adamw(model: nn.Module, setting: Setting) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95))
    return decaying(optimizer, setting)


def decaying(optimizer: torch.optim.Optimizer, setting: Setting) -> torch.optim.Optimizer:
    """Its rate falls linearly to a twentieth: at a high one losses differ by chance alone."""
    if setting.task == "loss":
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, setting.steps)
        optimizer.register_step_post_hook(lambda *_: schedule.step())
    return optimizer


def promised(handle: Any) -> Callable[[], float | None]:
    return lambda: None if handle is None else mean_of_ranks(handle.report().bytes_after)


def steps_of(model: nn.Module, task: Any, optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    def step() -> None:
        optimizer.zero_grad()
        task.loss(model, task.batch()).backward()
        optimizer.step()

    return step


def ddp(wire: str, setting: Setting) -> Trainer:
    """Data parallel: the gradients are averaged."""
    model, task = setting.start(dist.get_rank())
    module, handle = DistributedDataParallel(model), None
    option = wire.partition(" ")[2]
    if wire == "bf16":
        module.register_comm_hook(None, bf16_hook)
    elif wire == "torch bf16":
        module.register_comm_hook(None, default_hooks.bf16_compress_hook)
    elif wire == "powersgd":
        state = powerSGD_hook.PowerSGDState(None, matrix_approximation_rank=4)
        state.start_powerSGD_iter = 2
        module.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
    elif wire == "torch int8":
        module.register_comm_hook(None, quantization_hooks.quantization_pertensor_hook)
    elif bits := bits_of(wire):
        fmt = f"{bits}b:tread:stoch" if option == "stochastic" else f"{bits}b"
        handle = quantize_ddp(module, fmt, error_feedback=option == "feedback")
    step = steps_of(module, task, adamw(model, setting))
    return Trainer(step, model.state_dict, promised(handle))


def bf16_hook(_, bucket):  # type: ignore[no-untyped-def]  # DDP rejects annotations as texts
    """The average in bfloat16, as torch's hook does where it runs."""
    buffer = bucket.buffer()
    halves = buffer.to(torch.bfloat16).div_(dist.get_world_size())
    future = dist.all_reduce(halves, async_op=True).get_future()
    return future.then(lambda done: buffer.copy_(done.value()[0]))


def fsdp(wire: str, setting: Setting) -> Trainer:
    """Sharded data parallel: weights are gathered, twice, and gradients reduced."""
    model, task = setting.start(dist.get_rank())
    policy = MixedPrecisionPolicy()
    if wire == "bf16":
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.bfloat16)
    for block in model.blocks:
        fully_shard(block, mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    handle = None
    if bits := bits_of(wire):
        delta = wire.endswith("delta")
        wanted = Policy(weights=bits if delta else 8, gradients=bits)
        handle = quantize_fsdp(model, wanted, weight_delta=delta)

    def weights() -> dict[str, Tensor]:
        return {name: p.full_tensor().detach() for name, p in model.named_parameters()}

    return Trainer(steps_of(model, task, adamw(model, setting)), weights, promised(handle))


def pipeline(wire: str, setting: Setting) -> Trainer:
    """Stages: activations go one way, gradients the other, and every rank has the same text."""
    rank, world = dist.get_rank(), dist.get_world_size()
    model, task = setting.start(0)
    size = setting.size
    example = task.batch()[0][: size.batch // CHUNKS]
    part = split_at_boundaries(model, world, (example,))[rank]
    module = Casts(part, rank == 0, rank == world - 1) if wire == "bf16" else part
    place = (module, rank, world, torch.device("cpu"))
    stage: Any = None
    if bits := bits_of(wire):
        stage = QuantizedPipelineStage(*place, policy=bits)
    loss_fn = F.mse_loss if size.inner else cross_entropy
    schedule = ScheduleGPipe(stage or PipelineStage(*place), CHUNKS, loss_fn=loss_fn)
    optimizer = adamw(module, setting)

    def step() -> None:
        tokens, following = task.batch()
        optimizer.zero_grad()
        inputs = (tokens,) if rank == 0 else ()
        schedule.step(*inputs, target=following if rank == world - 1 else None)
        optimizer.step()

    def weights() -> dict[str, Tensor]:
        parts: list[Any] = [None] * world
        dist.all_gather_object(parts, {n: p.detach() for n, p in part.named_parameters()})
        return {name: value for part in parts for name, value in part.items()}

    return Trainer(step, weights, promised(stage))


def cross_entropy(logits: Tensor, following: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), following.flatten())


class Casts(nn.Module):
    """A stage between whose neighbours bfloat16 travels, in both directions."""

    def __init__(self, part: nn.Module, is_first: bool, is_last: bool) -> None:
        super().__init__()
        self.part, self.is_first, self.is_last = part, is_first, is_last

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.part(x if self.is_first else x.float())
        return y if self.is_last else y.bfloat16()


def states(wire: str, setting: Setting) -> Trainer:
    """An optimizer's states: quantized between steps; or, timed, sent from rank 0 to all."""
    model, task = setting.start(0)
    if setting.kind.endswith("adamw"):
        optimizer = adamw(model, setting)
    else:
        muon = optimizers(model, example_inputs=(task.batch()[0],))
        optimizer = decaying(muon, setting)
    policy = Policy(optimizer_state=bits_of(wire), min_bytes=4096)
    step = steps_of(model, task, optimizer)
    if setting.task == "loss":
        if bits_of(wire):
            quantize_states(optimizer, policy)
        return Trainer(step, model.state_dict, lambda: None)
    step()  # from here on there are states
    handle = quantize_states(optimizer, policy)
    at_rest = sum(site.bytes_after or 0 for site in handle.report().sites)
    handle.remove()
    parts = getattr(optimizer, "optimizers", [optimizer])

    def send() -> None:
        for part in parts:
            broadcast_states(part, policy)

    file = io.BytesIO()
    torch.save([pack_state_dict(part.state_dict(), policy) for part in parts], file)
    world = dist.get_world_size()
    handed_on = at_rest * (world - 1) / world  # mean of the ranks: all but one pass it on
    return Trainer(send, model.state_dict, lambda: handed_on, {"file_bytes": file.tell()})
