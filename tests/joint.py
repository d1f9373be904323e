"""Joint graphs of two small models, captured in the two ways in which training libraries do it.

``StepGraph`` traces forward, loss and backward with ``make_fx``, as torchtitan's graph_trainer
does; ``exported`` gives AOTAutograd's joint graph, as AutoParallel has it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._functorch.aot_autograd import (
    aot_compile_joint_with_descriptors,
    aot_export_joint_with_descriptors,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.traceback import annotate_fn, preserve_node_meta

FEATURES, ROWS = 32, 8


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(FEATURES, 2 * FEATURES)
        self.down = nn.Linear(2 * FEATURES, FEATURES, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.relu(self.up(x)))


def net() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(Block(), Block())
    for path, module in model.named_modules():
        if path:  # as torchtitan notes paths
            module.forward = annotate_fn({"module_fqn": path})(module.forward)
    return model


def tensor_parallel(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    plan = {"*.up": ColwiseParallel(), "*.down": RowwiseParallel()}
    return parallelize_module(model, mesh, plan)


def sharded(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """FSDP of DTensors: a parameter is a shard; who reads it gathers it, and its gradient is
    averaged and scattered."""
    for module in model.modules():
        names = list(module._parameters)
        for name in names:
            whole = getattr(module, name)
            if whole is not None:
                shard = nn.Parameter(distribute_tensor(whole.detach(), mesh, [Shard(0)]))
                module.register_parameter(name, shard)
        readers = {name: property(lambda self, name=name: _gathered(self, name)) for name in names}
        module.__class__ = type(f"Sharded{type(module).__name__}", (type(module),), readers)
    return model


def _gathered(module: nn.Module, name: str) -> Tensor | None:
    shard = module._parameters[name]
    if not isinstance(shard, DTensor):
        return shard
    whole = shard.redistribute(placements=[Replicate()])
    return whole.to_local(grad_placements=[Partial("avg")])


def loss_of(model: nn.Module, state: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
    return F.mse_loss(functional_call(model, state, (x,)), y)


def local(x: Tensor) -> Tensor:
    """The part of a tensor that this rank has."""
    x = x.detach()
    return x.to_local() if isinstance(x, DTensor) else x


class StepGraph:
    """Loss and gradients of a model as one graph of plain tensors, the parameters first.

    Args:
        change: what is done with the gradients at the end of the step.
        preserve: trace as torchtitan does; else as a plain ``make_fx`` does.
    """

    def __init__(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        *,
        change: Callable[[Tensor], Tensor] = lambda gradient: gradient,
        preserve: bool = True,
    ) -> None:
        self.names = [name for name, _ in model.named_parameters()]
        self.parameters = [parameter for _, parameter in model.named_parameters()]

        def step(*inputs: Tensor) -> list[Tensor]:
            plain, (x, y) = inputs[:-2], inputs[-2:]
            pairs = zip(plain, self.parameters, strict=True)
            state = dict(zip(self.names, (_like(*pair) for pair in pairs), strict=True))
            with ExitStack() as stack:
                if preserve:
                    stack.enter_context(torch.compiler._patch_engine_backward())
                loss = loss_of(model, state, x, y)
                gradients = torch.autograd.grad(loss, list(state.values()))
            return [loss, *(change(local_gradient(g)) for g in gradients)]

        with ExitStack() as stack:
            stack.enter_context(torch.autograd.set_multithreading_enabled(False))
            if preserve:
                stack.enter_context(preserve_node_meta())
                stack.enter_context(torch.compiler._non_strict_tracing_context())
            inputs = [local(p).requires_grad_() for p in self.parameters]
            self.gm: fx.GraphModule = make_fx(step, tracing_mode="fake")(*inputs, x, y)

    def __call__(self, x: Tensor, y: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The loss, and this rank's part of each gradient."""
        with torch.no_grad():
            loss, *gradients = self.gm(*map(local, self.parameters), x, y)
        return loss, gradients


def local_gradient(g: Tensor) -> Tensor:
    return g._local_tensor if isinstance(g, DTensor) else g


def _like(plain: Tensor, parameter: Tensor) -> Tensor:
    """The parameter, with ``plain`` as the part of this rank."""
    if not isinstance(parameter, DTensor):
        return plain
    return DTensor.from_local(
        plain,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.size(),
        stride=parameter.stride(),
    )


def exported(
    model: nn.Module, x: Tensor, change: Callable[[fx.GraphModule], Any]
) -> Callable[..., Tensor]:
    """The model as AOTAutograd's joint graph, after ``change`` of it, as a function of ``x``."""
    with ExitStack() as stack:
        joint = aot_export_joint_with_descriptors(stack, model, (x,))
        change(joint.graph_module)
        compiled = aot_compile_joint_with_descriptors(joint)
    state = dict(model.named_parameters())
    parameters = [state[name] for name in joint.params_spec]
    return lambda x: compiled(*parameters, x)
