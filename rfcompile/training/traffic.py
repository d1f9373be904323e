"""quantize_traffic: one call for everything that a training step sends outside compiled graphs."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from rfcompile.distributed.ddp import quantize_ddp, require_free
from rfcompile.distributed.fsdp import quantize_fsdp
from rfcompile.distributed.pipeline_stage import quantize_pipeline_stage, stages_of
from rfcompile.errors import HookError, OptionError, StateError
from rfcompile.report.handle import REMOVED, Handle
from rfcompile.report.report import Report
from rfcompile.report.step import merge_reports
from rfcompile.states.at_rest import quantize_states
from rfcompile.states.composite import parts_of
from rfcompile.training.out_of_reach import out_of_reach
from rfcompile.wire.default_policy import policy_of
from rfcompile.wire.policy import Policy, Policyish
from rfcompile.wire.process_groups import sole_group
from rfcompile.wire.together import together


def quantize_traffic(
    things: Any,
    policy: Policyish = None,
    *,
    error_feedback: bool = False,
    weight_delta: bool = False,
) -> TrafficHandle:
    """Quantize what each of some things sends or keeps, by the door that is made for it.

    =================================  ==========================================================
    a thing                            its door
    =================================  ==========================================================
    a DistributedDataParallel module,  :func:`~rfcompile.distributed.quantize_ddp`
    or a module around one
    a module with ``fully_shard``      :func:`~rfcompile.distributed.quantize_fsdp`
    anywhere inside
    a pipeline stage, or a schedule    :func:`~rfcompile.distributed.quantize_pipeline_stage`,
    with its stages                    and the two above for the module of a stage
    an optimizer, or a wrapper of one  :func:`~rfcompile.training.quantize_states`
    =================================  ==========================================================

    A thing that is given twice (a model, and a stage that has it) is quantized once. It is all or
    nothing: if a door refuses, what was quantized before it is exact again. Every rank must call,
    with the same kinds of things in the same order, between two steps.

    Args:
        things: one of these, or a list or tuple of several.
        policy: bits, a format, a mapping or a Policy; "exact" for none of it. None is the default
            policy (:func:`~rfcompile.set_default_policy`). Its kinds say what is quantized: bits
            apply to optimizer states too, if an optimizer is given.
        error_feedback: as in quantize_ddp; it needs a DDP module among the things.
        weight_delta: as in quantize_fsdp; it needs a module with ``fully_shard``.

    Returns:
        A :class:`~rfcompile.training.traffic.TrafficHandle`, with one report, one state and one
        ``remove()`` for all of them.

    Raises (on every rank, with the name of the rank that has the error):
        HookError: a thing is of another kind, has a hook already, or sends what no hook reaches.
        PolicyError, FormatError, OptionError: the policy or an option is not understood, or there
            is no policy. StateError: the states of an optimizer are quantized already.
        RankMismatchError: ranks use another policy or version.
        TransportError: a rank died, or did not answer in time.

    Where other process groups exist than the default one, a rank tells an error only to the ranks
    of the group that the door at hand uses; the others wait for the timeout of theirs.
    """

    def found() -> tuple[Policy, _Things]:
        chosen, sorted_things = policy_of(policy), _Things.of(things)
        sorted_things.check(error_feedback=error_feedback, weight_delta=weight_delta)
        return chosen, sorted_things

    chosen, by_kind = together(sole_group(), "quantize_traffic", found)
    # DDP cannot give a hook back, so its modules, which were checked, come last.
    doors: list[tuple[str, Callable[[], Handle]]] = [
        *_named("optimizer", by_kind.optimizers, lambda x: _quantized_states(x, chosen)),
        *_named("stage", by_kind.stages, lambda x: quantize_pipeline_stage(x, chosen)),
        *_named(
            "fsdp",
            by_kind.sharded,
            lambda x: quantize_fsdp(x, chosen, weight_delta=weight_delta),
        ),
        *_named(
            "ddp",
            by_kind.ddp,
            lambda x: quantize_ddp(x, chosen, error_feedback=error_feedback),
        ),
    ]
    handles: dict[str, Handle] = {}
    try:
        for name, door in doors:
            handles[name] = door()
    except BaseException:
        for handle in reversed(handles.values()):
            handle.remove()
        raise
    return TrafficHandle(handles, by_kind.modules)


def _quantized_states(optimizer: Any, policy: Policy) -> Handle:
    """On every rank or, after an error of one, on none."""
    made: list[Handle] = []
    try:
        together(
            sole_group(),
            "quantize_states",
            lambda: made.append(quantize_states(optimizer, policy)),
        )
    except BaseException:
        for handle in made:
            handle.remove()
        raise
    return made[0]


class TrafficHandle(Handle):
    """What :func:`~rfcompile.quantize_traffic` returns: the handles of all doors as one."""

    def __init__(self, handles: Mapping[str, Handle], modules: Iterable[nn.Module]) -> None:
        self._handles = dict(handles)
        self._modules = [weakref.ref(module) for module in modules]
        self._is_removed = False

    @property
    def handles(self) -> Mapping[str, Handle]:
        """Return the handle of each door by its name ("ddp 0", "fsdp 0", "stage 0",
        "optimizer 0").
        """
        return dict(self._handles)

    def report(self) -> Report:
        """Return one report on a step: the lines of every door, and notes on what none reaches."""
        report = merge_reports(*self._handles.values())
        if self._is_removed:
            return replace(report, notes=(REMOVED,))
        alive = [module for ref in self._modules if (module := ref()) is not None]
        notes = dict.fromkeys(note for module in alive for note in out_of_reach(module))
        return replace(report, notes=(*report.notes, *notes))

    def state_dict(self) -> dict[str, Any]:
        """Return the states of the doors that have one (error feedback), by the door's name.

        Every rank must call this, between two steps.
        """
        states = {name: handle.state_dict() for name, handle in self._handles.items()}
        return {name: state for name, state in states.items() if state}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue with a :meth:`state_dict`; every rank must call this.

        Raises (on every rank, with the name of the rank that has the error):
            StateError: there is no such door, or the door refuses what is there for it.
            TransportError: a rank died, or did not answer in time.
        """
        together(sole_group(), "loading the state of traffic", lambda: self._require_doors(state))
        for name, handle in self._handles.items():
            handle.load_state_dict(state.get(name, {}))

    def _require_doors(self, state: Mapping[str, Any]) -> None:
        unknown = [name for name in state if name not in self._handles]
        if unknown:
            rule = f"Here are {', '.join(self._handles)}: give quantize_traffic the same things."
            raise StateError("the state is of other doors", unknown, rule)

    def remove(self) -> None:
        """Make everything exact again from the next step on; every rank must call this."""
        if not self._is_removed:
            self._is_removed = True
            for handle in reversed(self._handles.values()):
                handle.remove()


# ---- which thing is what -------------------------------------------------------------------------


@dataclass
class _Things:
    """Things by their kind, each once, in the order in which they were given."""

    optimizers: list[Any] = field(default_factory=list)
    stages: list[Any] = field(default_factory=list)
    sharded: list[nn.Module] = field(default_factory=list)
    ddp: list[DistributedDataParallel] = field(default_factory=list)
    modules: list[nn.Module] = field(default_factory=list)
    """All that a report looks through."""

    @classmethod
    def of(cls, things: Any) -> _Things:
        """Raises:
        HookError: a thing is of no known kind. OptionError: there is none.
        """
        found = cls()
        given = list(_flat(things))
        if not given:
            rule = "give a DDP or FSDP2 module, a pipeline stage or schedule, or an optimizer."
            raise OptionError("things", things, rule)
        for thing in given:
            found._add(thing)
        return found

    def check(self, *, error_feedback: bool, weight_delta: bool) -> None:
        """Refuse, before anything is changed, what no door would refuse in time."""
        for module in self.ddp:
            require_free(module)
        if error_feedback and not self.ddp:
            rule = "it is for the gradients of DDP, and no DistributedDataParallel is given."
            raise OptionError("error_feedback", error_feedback, rule)
        if weight_delta and not self.sharded:
            rule = "it is for the weights of FSDP2, and no module with fully_shard is given."
            raise OptionError("weight_delta", weight_delta, rule)

    def _add(self, thing: Any) -> None:
        if isinstance(thing, nn.Module):
            if not self._add_module(thing):
                raise HookError(type(thing).__name__, _why_not(thing))
        elif stages := stages_of(thing):
            for stage in stages:
                _append(self.stages, stage)
                self._add_module(stage.submod)
        else:
            try:
                parts_of(thing)
            except HookError as error:
                raise HookError(type(thing).__name__, _KINDS) from error
            _append(self.optimizers, thing)

    def _add_module(self, module: nn.Module) -> bool:
        """Whether there is traffic of the module outside of graphs."""
        parts = list(module.modules())
        if any(isinstance(part, FullyShardedDataParallel) for part in parts):
            rule = "FSDP1 takes no quantized communication: use fully_shard (FSDP2)."
            raise HookError(type(module).__name__, rule)
        ddp = [part for part in parts if isinstance(part, DistributedDataParallel)]
        for part in ddp:
            _append(self.ddp, part)
        is_sharded = any(isinstance(part, FSDPModule) for part in parts)
        if is_sharded:
            _append(self.sharded, module)
        _append(self.modules, module)
        return bool(ddp) or is_sharded


_KINDS = (
    "give a module that is wrapped in DistributedDataParallel or sharded by fully_shard, a stage "
    "or a schedule of torch.distributed.pipelining, or an optimizer."
)


def _why_not(module: nn.Module) -> str:
    """Why a module has no traffic outside of graphs."""
    if any(isinstance(parameter, DTensor) for parameter in module.parameters()):
        return (
            "its parameters are DTensors, whose collectives are in graphs: "
            "torch.compile(model, backend='rfquant') quantizes them."
        )
    return (
        "it is neither in DistributedDataParallel nor sharded by fully_shard, so it sends nothing "
        "outside of graphs. Give what wraps it, after wrapping; for collectives inside of the "
        "model use torch.compile(model, backend='rfquant')."
    )


def _flat(things: Any) -> Iterator[Any]:
    if isinstance(things, list | tuple):
        for thing in things:
            yield from _flat(thing)
    else:
        yield things


def _append(found: list[Any], thing: Any) -> None:
    if not any(thing is other for other in found):
        found.append(thing)


def _named(
    kind: str, things: Iterable[Any], door: Callable[[Any], Any]
) -> Iterator[tuple[str, Callable[[], Handle]]]:
    for number, thing in enumerate(things):
        yield f"{kind} {number}", partial(door, thing)
