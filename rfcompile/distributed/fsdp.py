"""Quantized weights and gradients for FSDP2, ``torch.distributed.fsdp.fully_shard``."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

from torch import nn

from rfcompile.codec.operators import Coder
from rfcompile.distributed.buckets import path_of
from rfcompile.distributed.coders import CoderName, coder_of
from rfcompile.distributed.fsdp_comms import QuantizedAllGather, QuantizedReduceScatter
from rfcompile.distributed.fsdp_units import Unit, units_of
from rfcompile.errors import HookError, RankMismatchError, TransportError
from rfcompile.report.handle import Handle
from rfcompile.report.report import Report
from rfcompile.torch_versions import warn_if_untried
from rfcompile.wire.policy import Policy, Policyish, as_policy
from rfcompile.wire.process_groups import require_same, sole_group
from rfcompile.wire.together import together

T = TypeVar("T")


def quantize_fsdp(
    module: nn.Module,
    policy: Policyish,
    *,
    weight_delta: bool = False,
    coder: CoderName = "eager",
) -> FSDPHandle:
    """Let every FSDP2 unit of a module gather weights and reduce gradients as the policy says.

    All-gathers take ``policy.weights``: each rank's shard ``w`` becomes ``C(w)``, ``C`` the codec's
    round trip, on every rank alike, its owner included. Optimizers keep updating the exact shards.
    Reduce-scatters take ``policy.gradients`` and give what :func:`rfcompile.reduce_scatter` gives,
    averaged or divided as FSDP asks. Ranks of every mesh of the module must call this, after
    ``fully_shard`` and between two steps.

    Args:
        module: a module with ``fully_shard`` applied to it or to modules inside, in any nesting.
        policy: as everywhere: bits, a format, a mapping, a Policy; bits or a format are for weights
            and gradients both, None is exact. ``sites`` takes names of parameters, of their
            modules, or of the units. Parameters of a unit that share a format travel together;
            ``min_bytes`` counts the input of a unit's collective, as far as ``sites`` does not
            name it.
        weight_delta: send the quantized difference of each shard to what was last sent, so that
            errors do not add up and 4 bits suffice. Each rank then keeps a copy of the decoded
            weights, in the dtype they are gathered in, and backward gathers nothing. The first
            gather is exact. See ``weight_delta.py``.
        coder: "eager", or "compiled": kernels that Inductor generates, once a format for all sizes,
            are faster, after half a minute or less in the first step. Same bytes. Stochastic
            rounding stays eager. See ``coders.py``.

    Stochastic rounding of gradients takes another seed on each rank and in each step; that of
    weights one seed, so that backward sees the weights of forward.

    Forward and backward raise the errors of a collective: NonFiniteError as the format asks for,
    and TransportError when a rank died or did not answer within the timeout of the process group.

    Raises:
        On every rank, naming the one that met it: HookError: nothing in ``module`` is sharded by
        ``fully_shard``, a unit has replicas of a single shard (its all-reduce is FSDP's own), or a
        unit has another custom communication. PolicyError, FormatError: the policy is not
        understood. RankMismatchError: ranks use another policy or version. TransportError: a rank
        died, or did not answer in time. A rank without any unit can tell the others only while the
        default process group is the only one; else they wait for the timeout of theirs.
    """
    groups = _groups_of(module)
    chosen, units, codes = _everywhere(groups, lambda: _prepared(module, policy, coder))
    plan = f"FSDP {len(units)} units {chosen.describe()} weight_delta={weight_delta}"
    _agree(groups, plan)
    return FSDPHandle(module, units, chosen, weight_delta, codes)


class FSDPHandle(Handle):
    """What :func:`quantize_fsdp` returns: the report, and the way back."""

    def __init__(
        self,
        module: nn.Module,
        units: tuple[Unit, ...],
        policy: Policy,
        weight_delta: bool,
        coder: Coder,
    ) -> None:
        self._policy = policy
        self._weight_delta = weight_delta
        self._comms: list[tuple[QuantizedAllGather, QuantizedReduceScatter]] = []
        for unit in units:
            all_gather, reduce_scatter = unit.comms
            quantized = (
                QuantizedAllGather(all_gather, unit, policy, coder, weight_delta),
                QuantizedReduceScatter(reduce_scatter, unit, policy, coder),
            )
            unit.set_comms(*quantized)
            self._comms.append(quantized)
        self._hook: Any = module.register_load_state_dict_post_hook(lambda *_: self.reset())

    def report(self) -> Report:
        """A line for each part of a unit's collectives, with the bytes of one run of each.

        A unit whose gradients come at different times reduces several buffers a step: each size
        has its lines.

        A step runs each line once; with gradient accumulation, gathers once a pass. What a pass
        needs is known when one has run: before, the report is empty.
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
        if units and all(unit.shard_group.size() == 1 for unit in units):
            return "every unit has one rank: nothing is sent"
        return "no pass has run yet: what the units send is not known"

    def reset(self) -> None:
        """With weight_delta: send the weights exactly in the next forward pass.

        ``load_state_dict`` of the module does it. Without, weights that were replaced reach the
        other ranks within a few steps, as differences do not accumulate errors, but training does
        not go on exactly as from the checkpoint. A run that resets after saving one goes on as the
        run that loads it.
        """
        for all_gather, _ in self._comms:
            all_gather.reset()

    def remove(self) -> None:
        """Give the units their exact communication back; every rank must call, between steps."""
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


def _prepared(
    module: Any, policy: Policyish, coder: CoderName
) -> tuple[Policy, tuple[Unit, ...], Coder]:
    warn_if_untried()
    chosen = as_policy(policy)
    if not isinstance(module, nn.Module):
        raise HookError(type(module).__name__, "give a module that fully_shard was applied to.")
    units = units_of(module)
    _require_free(module, units)
    return chosen, units, coder_of(coder)


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
