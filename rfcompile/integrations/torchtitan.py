"""quantized: a ModelSpec of torchtitan whose model and pipeline send quantized tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import is_dataclass, replace
from typing import Any, TypeVar, cast

from rfcompile.errors import HookError
from rfcompile.training.traffic import TrafficHandle, quantize_traffic
from rfcompile.wire.default_policy import policy_of
from rfcompile.wire.policy import Policyish

Spec = TypeVar("Spec")


def quantized(
    model_spec: Spec,
    policy: Policyish = None,
    *,
    weight_delta: bool = False,
    on_start: Callable[[TrafficHandle], object] | None = None,
) -> Spec:
    """Return a ModelSpec whose FSDP2 units and pipeline stages send quantized tensors.

    ``parallelize_fn`` and ``pipelining_fn`` do what they did, then
    :func:`~rfcompile.quantize_traffic` gets what they made: the model, or the schedule with its
    stages and their modules. Collectives of tensor parallelism are in graphs: for these set
    torchtitan's ``compile.backend`` to "rfquant" and a default policy.

    Args:
        model_spec: torchtitan's ModelSpec; it stays as it is.
        policy, weight_delta: as in :func:`~rfcompile.quantize_traffic`.
        on_start: is called with the handle when it is there (``handles.append``), for its report.

    Raises:
        HookError: ``model_spec`` is no ModelSpec; later, where the model is made: it has no FSDP2
            units (``data_parallel_shard_degree=1``), or only replicas.
        PolicyError, FormatError: the policy is not understood, or there is none.
    """
    chosen = policy_of(policy)
    if not (is_dataclass(model_spec) and hasattr(model_spec, "parallelize_fn")):
        rule = "give a ModelSpec of torchtitan: model_registry(...) of a model returns one."
        raise HookError(type(model_spec).__name__, rule)
    spec: Any = model_spec

    def start(thing: Any, **options: Any) -> None:
        handle = quantize_traffic(thing, chosen, **options)
        if on_start is not None:
            on_start(handle)

    def parallelize_fn(*args: Any, **kwargs: Any) -> Any:
        model = spec.parallelize_fn(*args, **kwargs)
        start(model, weight_delta=weight_delta)
        return model

    def pipelining_fn(*args: Any, **kwargs: Any) -> Any:
        # The trainer passes the new parallelize_fn: stages get theirs with the schedule, once.
        made = spec.pipelining_fn(*args, **{**kwargs, "parallelize_fn": spec.parallelize_fn})
        start(made[0], weight_delta=weight_delta)
        return made

    pipelined = {} if spec.pipelining_fn is None else {"pipelining_fn": pipelining_fn}
    return cast(Spec, replace(spec, parallelize_fn=parallelize_fn, **pipelined))
