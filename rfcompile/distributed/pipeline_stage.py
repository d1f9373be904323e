"""Pipeline stages that send quantized activations and gradients, under torch's schedules.

A schedule of torch asks its stage for P2P operations and posts these operations. A stage of this
file replaces the tensor of each operation by a payload. The stage decodes a received payload when
the schedule retrieves it. This file overrides or reads these parts of torch.distributed.pipelining,
private ones included, tried on torch 2.11 to 2.15: ``get_fwd_send_ops``, ``get_bwd_send_ops``,
``get_fwd_recv_ops``, ``get_bwd_recv_ops``, ``_retrieve_recv_activations``,
``_retrieve_recv_grads``, ``set_local_fwd_input``, ``get_local_bwd_output``,
``clear_runtime_states``; ``stage._PipelineStageBase``, ``stage._normalize_model_output_as_tuple``;
``args_recv_info``, ``grad_recv_info``, ``group_rank``, ``stage_index_to_group_rank`` of a stage,
and where it keeps its outputs (``torch_versions.py``); ``_stage`` and ``_stages`` of a schedule. A
new stage checks that all of them are there.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import PipelineScheduleMulti, PipelineScheduleSingle
from torch.distributed.pipelining.stage import (
    _normalize_model_output_as_tuple,
    _PipelineStageBase,
)

from rfcompile.codec.cpu_codec import load_kernels_for
from rfcompile.distributed.stage_wire import StageWire, place
from rfcompile.errors import HookError, NonFiniteError, ProcessGroupError, ShapeError
from rfcompile.report.handle import REMOVED, Handle
from rfcompile.report.report import Report
from rfcompile.torch_versions import (
    STAGE_OUTPUTS,
    promised_outputs,
    require,
    stage_outputs,
    warn_if_untried,
)
from rfcompile.wire.policy import Policy, Policyish, as_policy
from rfcompile.wire.process_groups import name_of, require_same, resolve, sole_group
from rfcompile.wire.together import resolved, together

Operations = list[Any]
"""``dist.P2POp``s, in the order in which the peer posts theirs."""


_READ = (
    *("args_recv_info", "grad_recv_info", "group", "group_rank", "group_size", STAGE_OUTPUTS),
    *("stage_index", "stage_index_to_group_rank", "num_stages", "device"),
)
_OVERRIDDEN = (
    *("get_fwd_send_ops", "get_bwd_send_ops", "get_fwd_recv_ops", "get_bwd_recv_ops"),
    *("_retrieve_recv_activations", "_retrieve_recv_grads", "clear_runtime_states"),
    *("set_local_fwd_input", "get_local_bwd_output"),
)


class _QuantizedStage(Handle, _PipelineStageBase):
    """What a stage does differently, whichever front end of torch made it."""

    _wire: StageWire
    _is_removed = False

    def report(self) -> Report:
        """Return a report: a line for each tensor of a micro-batch, with the last step's bytes.

        A schedule may hand a tensor to another stage on the same rank. Such an
        activation is in the report of the stage that receives it. Such a gradient is in the report
        of the stage that made it.
        :func:`~rfcompile.merge_reports` joins the reports of a rank's stages.
        """
        report = self._wire.report(name_of(resolve(self.group)), self.group_size)
        return replace(report, notes=(REMOVED,)) if self._is_removed else report

    def remove(self) -> None:
        """Send exactly from the next step on; every rank must call this, between two steps.

        The class of the stage does not change back. :func:`quantize_pipeline_stage` accepts the
        stage again.
        """
        self._is_removed = True
        self._wire = StageWire(Policy(), self.stage_index, self.num_stages)

    def _checked(self, policy: Policyish) -> Policy:
        warn_if_untried()
        require(self, _READ, f"pipeline stage {type(self).__name__}")
        # A method that torch no longer has would never be called: payloads would stay coded.
        require(_PipelineStageBase, _OVERRIDDEN, "torch's pipeline stage")
        chosen = as_policy(policy)
        load_kernels_for([torch.device(self.device)])
        return chosen

    def _start_wire(self, policy: Policy) -> None:
        """Every rank of the group is here at the same time."""
        plan = f"pipeline of {self.num_stages} stages {policy.describe()}"
        require_same(resolve(self.group), plan)
        self._wire = StageWire(policy, self.stage_index, self.num_stages)
        self._is_removed = False

    def clear_runtime_states(self) -> None:
        """A schedule calls this before each step."""
        super().clear_runtime_states()
        self._wire.start_step()

    # ---- sending ---------------------------------------------------------------------------

    def get_fwd_send_ops(self, fwd_chunk_id: int) -> Operations:
        self._check_outputs(fwd_chunk_id)
        sends = super().get_fwd_send_ops(fwd_chunk_id)
        return self._encoded("forward", sends, lambda: self.get_bwd_recv_ops(fwd_chunk_id))

    def get_bwd_send_ops(self, bwd_chunk_id: int) -> Operations:
        sends = super().get_bwd_send_ops(bwd_chunk_id)
        return self._encoded("backward", sends, lambda: self.get_fwd_recv_ops(bwd_chunk_id))

    def _encoded(
        self, direction: str, sends: Operations, answers: Callable[[], Operations]
    ) -> Operations:
        """The sends, with payloads. ``answers`` receives what the peer may be sending meanwhile."""
        refused = False
        for index, op in enumerate(sends):
            op.tensor, is_bad = self._wire.encode(direction, index, op.tensor)
            refused |= is_bad
        if refused:
            # The peer finds NaN in the payload and raises, too. With 1F1B it sends and receives at
            # once, and would wait for its own message to be taken.
            with contextlib.suppress(RuntimeError):  # the peer may be gone: ours is the news
                works = dist.batch_isend_irecv([*sends, *answers()])
                for work in works[: len(sends)]:
                    work.wait()
            raise NonFiniteError(place(direction, self.stage_index), [self.group_rank])
        return sends

    def _check_outputs(self, chunk: int) -> None:
        """The peer's buffers have the shapes that torch found first; 2.11 checks this itself."""
        pairs = zip(stage_outputs(self, chunk), promised_outputs(self), strict=False)
        for index, (x, meta) in enumerate(pairs):
            if type(x) is Tensor and (x.shape, x.dtype) != (meta.shape, meta.dtype):
                raise ShapeError(
                    f"output {index} ({x.dtype}) of pipeline stage {self.stage_index}",
                    x.shape,
                    f"the stages agreed on {tuple(meta.shape)} ({meta.dtype}): give every "
                    "micro-batch the same size (a batch that divides by their number).",
                )

    # ---- receiving -------------------------------------------------------------------------

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> Operations:
        receives = super().get_fwd_recv_ops(fwd_chunk_id)
        return self._expected("forward", fwd_chunk_id, receives, self.args_recv_info)

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> Operations:
        receives = super().get_bwd_recv_ops(bwd_chunk_id)
        return self._expected("backward", bwd_chunk_id, receives, self.grad_recv_info)

    def _expected(
        self, direction: str, chunk: int, receives: Operations, infos: Mapping[int, Sequence[Any]]
    ) -> Operations:
        for op in receives:
            [sender] = [
                info.source for info in infos[chunk] if getattr(info, "buffer", None) is op.tensor
            ]
            op.tensor = self._wire.expect(direction, chunk, sender, op.tensor)
        return receives

    def _retrieve_recv_activations(self, fwd_chunk_id: int) -> Any:
        self._wire.decode("forward", fwd_chunk_id, self.stage_index_to_group_rank)
        return super()._retrieve_recv_activations(fwd_chunk_id)

    def _retrieve_recv_grads(self, bwd_chunk_id: int) -> Any:
        self._wire.decode("backward", bwd_chunk_id, self.stage_index_to_group_rank)
        return super()._retrieve_recv_grads(bwd_chunk_id)

    # ---- stages on the same rank -----------------------------------------------------------

    def set_local_fwd_input(self, prev_stage_outputs: Any, mb_index: int) -> None:
        for index, x in enumerate(_normalize_model_output_as_tuple(prev_stage_outputs)):
            self._wire.note_hand_over("forward", index, x, self.stage_index - 1)
        super().set_local_fwd_input(prev_stage_outputs, mb_index)

    def get_local_bwd_output(self, mb_index: int) -> Any:
        gradients = super().get_local_bwd_output(mb_index)  # type: ignore[no-untyped-call]
        for index, x in enumerate(gradients):
            if x is not None:
                self._wire.note_hand_over("backward", index, x, self.stage_index)
        return gradients


class QuantizedPipelineStage(_QuantizedStage, PipelineStage):
    """A PipelineStage of torch.distributed.pipelining that sends quantized tensors.

    Each tensor ``x`` of a micro-batch that goes to another rank becomes ``C(x)``, where ``C`` is
    the round trip of the codec (error bound: :class:`~rfcompile.QuantFormat`). Activations have the
    format ``policy.activations``, gradients the format ``policy.gradients``. The stage sends the
    payload of :func:`rfcompile.quantize`. The receiver decodes the same values, bit for bit, as
    :func:`rfcompile.dequantize`. Every schedule of torch works. These tensors stay exact: tensors
    of other dtypes, empty tensors, and tensors that a schedule hands to a stage on the same rank.

    Every rank of the group must create its stages at the same time, and the same number of stages,
    because the ranks compare policies and versions.

    Args:
        args, kwargs: the arguments of PipelineStage in the installed torch.
        policy: bits, a format, a mapping or a Policy; None is exact. A pattern of ``sites`` is
            compared with ``stages.N``, where N is the stage that sends: activations to the next
            stage, gradients to the stage before. ``min_bytes`` counts a tensor of one micro-batch.

    Stochastic rounding takes another seed for each tensor, micro-batch, step and stage. On a CPU
    the first stage on a machine builds the codec's C++ library, in some seconds.

    With ``nonfinite="raise"`` a step raises NonFiniteError on the rank that sends NaN or Inf, and
    on the rank that receives it. The other ranks get an error of their process group when these two
    are gone, or at its timeout. If a rank dies, all other ranks get such an error too: a
    RuntimeError from torch's schedule. In each case the processes must start again with new process
    groups.

    Raises (on every rank, with the name of the rank that has the error):
        PolicyError, FormatError: the policy is not understood.
        RankMismatchError: ranks use another policy or version.
        PeerError: another rank failed by an error of torch's own PipelineStage.
        TransportError: a rank died, or did not answer in time.
        ShapeError: in a step: a micro-batch has another size than the first.
    """

    def __init__(self, *args: Any, policy: Policyish, **kwargs: Any) -> None:
        def made() -> Policy:
            super(QuantizedPipelineStage, self).__init__(*args, **kwargs)
            return self._checked(policy)

        self._start_wire(together(_group_among(args, kwargs), "QuantizedPipelineStage", made))


def quantize_pipeline_stage(stage: Any, policy: Policyish) -> Any:
    """Make an existing stage send quantized tensors, as :class:`QuantizedPipelineStage` does.

    Use this for the stage that ``pipeline(...).build_stage(...)`` returns, and for other stages
    than PipelineStage. Every rank must call this, between two steps. The function changes the stage
    itself: its new class derives from its old class and adds ``report()`` and ``remove()``.

    Args:
        stage: the stage.
        policy: as in :class:`QuantizedPipelineStage`.

    Returns:
        ``stage``.

    Raises:
        HookError: ``stage`` is no stage, or is quantized already. And every error of
            QuantizedPipelineStage.

    A rank without any stage can tell the other ranks only if the default process group is the only
    one. Otherwise the other ranks wait for the timeout of their process group.
    """
    kind, site = type(stage), "quantize_pipeline_stage"

    def changed() -> Policy:
        stage.__class__ = _quantized_kind(stage)
        return stage._checked(policy)  # type: ignore[no-any-return]

    is_stage = isinstance(stage, _PipelineStageBase) and hasattr(stage, "group")
    group = resolved(stage.group, site) if is_stage else sole_group()
    try:
        chosen = together(group, site, changed)
        stage._start_wire(chosen)
    except BaseException:
        if type(stage) is not kind:
            stage.__class__ = kind
        raise
    return stage


def stages_of(thing: object) -> list[Any]:
    """The stages of a schedule, a stage by itself, or nothing where ``thing`` is neither.

    Raises:
        HookError: this torch keeps the stages of a schedule elsewhere.
    """
    if isinstance(thing, PipelineScheduleSingle):
        require(thing, ["_stage"], f"schedule {type(thing).__name__}")
        return [thing._stage]
    if isinstance(thing, PipelineScheduleMulti):
        require(thing, ["_stages"], f"schedule {type(thing).__name__}")
        return list(thing._stages)
    return [thing] if isinstance(thing, _PipelineStageBase) else []


def _quantized_kind(stage: object) -> type:
    """The class that a stage will have."""
    kind = type(stage)
    if not isinstance(stage, _PipelineStageBase):
        rule = "pass a PipelineStage, or what pipeline(...).build_stage(...) returned."
        raise HookError(kind.__name__, rule)
    if isinstance(stage, _QuantizedStage):
        if stage._is_removed:
            return kind
        raise HookError(kind.__name__, "it is quantized already: call its remove() on every rank.")
    return type(f"Quantized{kind.__name__.lstrip('_')}", (_QuantizedStage, kind), {})


def _group_among(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The process group among the arguments of a PipelineStage, which may be wrong ones."""
    try:
        signature = inspect.signature(PipelineStage)
        known = {name: value for name, value in kwargs.items() if name in signature.parameters}
        return resolve(signature.bind_partial(*args, **known).arguments.get("group"))
    except (TypeError, ProcessGroupError):
        return sole_group()
