"""torchtitan: a ModelSpec that sends quantized tensors, and passes for its graph_trainer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import is_dataclass, replace
from typing import Any, TypeVar, cast

from rfcompile.errors import HookError
from rfcompile.inductor.joint_pass import joint_pass
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


_BUCKETS = ("reassign_collective_pgs_pass", "joint_transformer_block_bucketing_reordering_pass")
"""The first passes of graph_trainer that move or join collectives."""


def quantized_passes(
    pipeline: Callable[..., list[Any]],
    policy: Policyish = None,
    *,
    strict: bool = False,
) -> Callable[..., list[Any]]:
    """Return a pipeline of graph_trainer's that quantizes collectives before they are bucketed.

    Args:
        pipeline: returns the other passes: ``construct_default_graph_passes``, or a pipeline that
            is registered. The new pipeline takes what this one does, and is registered the same
            way (``register_pass_pipeline("quantized")``).
        policy, strict: as in :func:`~rfcompile.joint_pass`.

    Raises:
        HookError: when graph_trainer builds its passes: ``pipeline`` returns none that joins
            collectives in buckets, so the place of the new pass is not known.
        PolicyError, FormatError: the policy is not understood, or there is none.
    """
    chosen = policy_of(policy)

    def with_quantization(traced_result: Any, *args: Any, **kwargs: Any) -> list[Any]:
        passes = list(pipeline(traced_result, *args, **kwargs))
        names = [getattr(one, "func", one).__name__ for one in passes]  # some are partials
        place = next((i for i, name in enumerate(names) if name in _BUCKETS), None)
        if place is None:
            rule = (
                f"none of its passes is one of {', '.join(_BUCKETS)}: put "
                "rfcompile.joint_pass(policy, parameters=traced_result.num_static_inputs) into "
                "the list yourself, before what joins collectives."
            )
            raise HookError(f"the pipeline of {', '.join(names) or 'no passes'}", rule)
        added = joint_pass(chosen, parameters=traced_result.num_static_inputs, strict=strict)
        return [*passes[:place], added, *passes[place:]]

    return with_quantization
