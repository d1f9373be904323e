"""quantize_fsdp: quantized weights and gradients for FSDP2 (``fully_shard``)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

from torch import nn

from rfcompile.codec.cpu_codec import load_kernels_for
from rfcompile.distributed.buckets import path_of
from rfcompile.distributed.fsdp_comms import QuantizedAllGather, QuantizedReduceScatter
from rfcompile.distributed.fsdp_units import Unit, units_of
from rfcompile.errors import HookError, RankMismatchError, TransportError
from rfcompile.report.handle import REMOVED, Handle
from rfcompile.report.report import Report
from rfcompile.torch_versions import warn_if_untried
from rfcompile.wire.policy import Policy, Policyish, as_policy
from rfcompile.wire.process_groups import require_same, sole_group
from rfcompile.wire.together import together

T = TypeVar("T")


def quantize_fsdp(
    module: nn.Module, policy: Policyish, *, weight_delta: bool = False
) -> FSDPHandle:
    """Make every FSDP2 unit of a module gather weights and reduce gradients in quantized form.

    All-gathers use ``policy.weights``: each shard ``w`` becomes ``C(w)``, where ``C`` is the round
    trip of the codec. Every rank computes with ``C(w)``, also the rank that owns ``w``. Optimizers
    update the exact shards. Reduce-scatters use ``policy.gradients`` and give the result of
    :func:`rfcompile.reduce_scatter`, averaged or divided as FSDP asks. All ranks of every mesh of
    the module must call ``quantize_fsdp``, after ``fully_shard`` and between two steps.

    Args:
        module: a module with ``fully_shard`` applied to it or to modules inside, in any nesting.
        policy: bits, a format, a mapping or a Policy; None is exact. Bits or a format apply to
            weights and to gradients. ``sites`` takes names of parameters, of their modules, or of
            the units. Parameters of a unit that share a format travel together. ``min_bytes``
            counts the input of a unit's collective, without the parameters that ``sites`` names.
        weight_delta: send the quantized difference between each shard and the values that all ranks
            decoded last time. So errors do not add up, and 4 bits are enough. Each rank then keeps
            a copy of the decoded weights, in the dtype in which they are gathered, and the backward
            pass gathers nothing. The first gather is exact. See ``weight_delta.py``.

    Stochastic rounding of gradients takes another seed on each rank and in each step. Stochastic
    rounding of weights takes one seed, so that the backward pass sees the weights of the forward
    pass. On a CPU the first call on a machine builds the codec's C++ library, in some seconds.

    Forward and backward raise the errors of a collective: NonFiniteError if the format asks for it,
    and TransportError if a rank died or did not answer within the timeout of the process group.

    Returns:
        A :class:`~rfcompile.distributed.FSDPHandle`.

    Raises (on every rank, with the name of the rank that has the error):
        HookError: nothing in ``module`` is sharded by ``fully_shard``, a unit has replicas of a
            single shard (FSDP itself all-reduces them), or a unit has another custom communication.
        PolicyError, FormatError: the policy is not understood.
        RankMismatchError: ranks use another policy or version.
        TransportError: a rank died, or did not answer in time.

    A rank without any unit can tell the other ranks only if the default process group is the only
    one. Otherwise the other ranks wait for the timeout of their process group.
    """
    groups = _groups_of(module)
    chosen, units = _everywhere(groups, lambda: _prepared(module, policy))
    plan = f"FSDP {len(units)} units {chosen.describe()} weight_delta={weight_delta}"
    _agree(groups, plan)
    return FSDPHandle(module, units, chosen, weight_delta)


class FSDPHandle(Handle):
    """What :func:`quantize_fsdp` returns: the report, ``reset()`` and ``remove()``."""

    def __init__(
        self,
        module: nn.Module,
        units: tuple[Unit, ...],
        policy: Policy,
        weight_delta: bool,
    ) -> None:
        self._policy = policy
        self._weight_delta = weight_delta
        self._comms: list[tuple[QuantizedAllGather, QuantizedReduceScatter]] = []
        for unit in units:
            all_gather, reduce_scatter = unit.comms
            quantized = (
                QuantizedAllGather(all_gather, unit, policy, weight_delta),
                QuantizedReduceScatter(reduce_scatter, unit, policy),
            )
            unit.set_comms(*quantized)
            self._comms.append(quantized)
        self._hook: Any = module.register_load_state_dict_post_hook(lambda *_: self.reset())

    def report(self) -> Report:
        """Return a report: a line for each part of a unit's collectives, with the bytes of one run.

        A step runs each line once. With gradient accumulation each pass runs the gathers once. If
        the gradients of a unit come at different times, the unit reduces several buffers a step,
        and each size of a buffer has lines of its own. Before the first pass the report is empty.
        """
        sites = [
            site
            for comms in self._comms
            for comm in comms
            for sent in comm.seen.values()
            for site in sent.sites(comm.unit)
        ]
        notes = [] if sites else [self._why_empty()]
        if self._weight_delta:
            notes.append("weight_delta: the first gather, and the first after a reset, is exact")
        delta = " weight_delta" if self._weight_delta else ""
        names = (
            path_of(self._policy, name, all_gather.unit.path)
            for all_gather, _ in self._comms
            for name, _ in all_gather.unit.sizes(trainable=False)
        )
        return Report.of(self._policy, sites, names=names, options=delta, notes=notes)

    def _why_empty(self) -> str:
        units = [all_gather.unit for all_gather, _ in self._comms]
        if not units:
            return REMOVED
        if all(unit.shard_group.size() == 1 for unit in units):
            return "every unit has one rank: nothing is sent"
        return "no pass has run yet: what the units send is not known"

    def reset(self) -> None:
        """With weight_delta: send the weights exactly in the next forward pass.

        ``load_state_dict`` of the module calls this. Without a reset the other ranks get replaced
        weights within a few steps, because the errors of differences do not add up. But without a
        reset training does not continue exactly as from the checkpoint. If a run resets after it
        saved a checkpoint, the run continues exactly like a run that loads this checkpoint.
        """
        for all_gather, _ in self._comms:
            all_gather.reset()

    def remove(self) -> None:
        """Communicate exactly again; every rank must call this, between two steps."""
        for all_gather, reduce_scatter in self._comms:
            all_gather.unit.set_comms(all_gather.inner, reduce_scatter.inner)
        self._comms, self._policy, self._weight_delta = [], Policy(), False
        self._hook.remove()


def _groups_of(module: object) -> list[Any]:
    """The process groups of all meshes of the units, in the same order on every rank.

    None of them known: the one that other ranks may wait in.
    """
    units: tuple[Unit, ...] = ()
    if isinstance(module, nn.Module):
        with contextlib.suppress(Exception):  # it comes up again in _prepared
            units = units_of(module)
    groups = [unit.shard_group for unit in units] + [unit.replicate_group for unit in units]
    return list(dict.fromkeys(group for group in groups if group is not None)) or [sole_group()]


def _everywhere(groups: Sequence[Any], action: Callable[[], T]) -> T:
    """:func:`together` over meshes of up to two dimensions: those of the first tell the second."""
    for group in groups:
        try:
            done = together(group, "quantize_fsdp", action)
        except TransportError:
            raise
        except Exception as error:
            action = partial(_raise, error)
        else:
            action = partial(_return, done)
    return action()


def _raise(error: Exception) -> Any:
    raise error


def _return(value: T) -> T:
    return value


def _prepared(module: Any, policy: Policyish) -> tuple[Policy, tuple[Unit, ...]]:
    warn_if_untried()
    chosen = as_policy(policy)
    if not isinstance(module, nn.Module):
        raise HookError(type(module).__name__, "give a module that fully_shard was applied to.")
    units = units_of(module)
    _require_free(module, units)
    load_kernels_for(parameter.device for parameter in module.parameters())
    return chosen, units


def _require_free(module: nn.Module, units: tuple[Unit, ...]) -> None:
    """Raise HookError unless every unit can be given other collectives."""
    name = type(module).__name__
    if not units:
        raise HookError(name, "apply torch.distributed.fsdp.fully_shard to it first.")
    for unit in units:
        if unit.shard_group is None:
            rule = f"unit {unit.label} is replicated, not sharded: it gathers nothing."
            raise HookError(name, rule)
        replicas = unit.replicate_group
        if unit.shard_group.size() == 1 and replicas is not None and replicas.size() > 1:
            rule = (
                f"unit {unit.label} has {replicas.size()} replicas of one shard each: FSDP gathers "
                "nothing and all-reduces the gradients itself, which no hook replaces. Wrap the "
                "model in DistributedDataParallel and call quantize_ddp, or shard over 2 or more."
            )
            raise HookError(name, rule)
        for comm in unit.comms:
            if not type(comm).__module__.startswith("torch."):
                rule = (
                    f"unit {unit.label} has the custom communication {type(comm).__name__!r}. Set "
                    "torch's default again (remove() of an earlier handle does), then call this."
                )
                raise HookError(name, rule)


def _agree(groups: Sequence[Any], plan: str) -> None:
    """Compare plans over all meshes of the units, so that either every rank raises or none.

    A mesh has up to two dimensions: those who disagree in the first tell the second about it.
    """
    failure: RankMismatchError | None = None
    for group in groups:
        try:
            require_same(group, plan)
        except RankMismatchError as error:
            failure = failure or error
            plan += f" (ranks of {error.group!r} disagree)"
    if failure is not None:
        raise failure
