"""quantize_ddp: a DDP communication hook that quantizes the gradients of each bucket.

Private torch symbols used here, tried on torch 2.13: ``_use_python_reducer`` of a DDP module, and
its ``_get_ddp_logging_data``, which names the hook it has.
"""

# DDP compares the annotations of a hook with classes: no postponed annotations in this file.
import copy
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from rfcompile.codec.cpu_codec import load_kernels_for
from rfcompile.distributed.buckets import Part, elements_of, parts_of, path_of, site_of
from rfcompile.distributed.error_feedback import ErrorFeedback
from rfcompile.distributed.worker import Worker
from rfcompile.errors import HookError, RFCompileError, StateError
from rfcompile.report.handle import REMOVED, Handle
from rfcompile.report.report import Report
from rfcompile.wire.exchanges import all_reduce_wire
from rfcompile.wire.policy import Policy, Policyish, as_policy
from rfcompile.wire.process_groups import require_same, sole_group, transport
from rfcompile.wire.together import together


def quantize_ddp(
    ddp: DistributedDataParallel, policy: Policyish, *, error_feedback: bool = False
) -> "DDPHandle":
    """Make a DDP module average its gradients in the format of ``policy.gradients``.

    The gradients ``g`` of a bucket become ``C(mean over ranks of C(g))``, where ``C`` is the round
    trip of the codec. This is the result of :func:`rfcompile.all_reduce` with ``op="avg"``: the
    same bytes, the same error bound, bit-identical on every rank. The averaging runs while the
    backward pass runs, on a thread and in a process group of its own. Every rank of the module's
    process group must call ``quantize_ddp``, after wrapping and before ``torch.compile``. A call
    between two steps of a training works too.

    Args:
        ddp: a DDP module, wrapped as usual, without a communication hook (that of an earlier handle
            is none after its ``remove()``).
        policy: bits, a format, a mapping or a Policy; None is exact. ``sites`` takes names of
            parameters, or of their modules. Parameters of a bucket that share a format travel
            together. ``min_bytes`` counts the parameters of a bucket that ``sites`` does not name.
        error_feedback: add to each step the error that quantization made in the step before. This
            costs 4 bytes a parameter. A checkpoint should hold the handle's state_dict.

    Stochastic rounding takes another seed on each rank, for each bucket and in each step. On a CPU
    the first call on a machine builds the codec's C++ library, in some seconds.

    The backward pass raises the errors of a collective: NonFiniteError if the format asks for it,
    and TransportError if a rank died or did not answer within the timeout of the process group.

    Returns:
        A :class:`~rfcompile.distributed.DDPHandle`.

    Raises (on every rank, with the name of the rank that has the error):
        HookError: ``ddp`` is no DDP module, or has a hook already.
        PolicyError, FormatError: the policy is not understood.
        RankMismatchError: ranks use another policy or version.
        TransportError: a rank died, or did not answer in time.

    A rank whose module is not DDP can tell the other ranks only if the default process group is the
    only one. Otherwise the other ranks wait for the timeout of their process group.
    """
    chosen = together(_group_of(ddp), "quantize_ddp", lambda: _prepared(ddp, policy))
    plan = f"DDP gradients {chosen.describe()} error_feedback={error_feedback}"
    require_same(ddp.process_group, plan)
    handle = DDPHandle(ddp, chosen, error_feedback=error_feedback)
    if ddp in _PLACES:
        _PLACES[ddp].handle = handle
    else:
        place = _Place(handle)
        ddp.register_comm_hook(place, quantized_hook)
        _PLACES[ddp] = place
    return handle


@dataclass
class _Place:
    """Of a DDP module, which takes one hook, once: the handle that the hook asks."""

    handle: "DDPHandle"


_PLACES: weakref.WeakKeyDictionary[DistributedDataParallel, _Place] = weakref.WeakKeyDictionary()


def quantized_hook(
    place: _Place,
    bucket: dist.GradBucket,  # type: ignore[name-defined]
) -> torch.futures.Future[torch.Tensor]:
    """What DDP calls with each bucket as soon as its gradients are there."""
    future: torch.futures.Future[Tensor] = place.handle._reduce(bucket)
    return future


@dataclass(frozen=True)
class _Bucket:
    parameters: tuple[int, ...]
    """Their identities."""
    dtype: torch.dtype
    device: torch.device
    is_sparse: bool
    parts: tuple[Part, ...]


class DDPHandle(Handle):
    """What :func:`quantize_ddp` returns: the report, the state for checkpoints, ``remove()``."""

    def __init__(
        self, ddp: DistributedDataParallel, policy: Policy, *, error_feedback: bool
    ) -> None:
        # The module holds this object through its hook: nothing here may hold the module.
        parameters = {n: p for n, p in ddp.module.named_parameters() if p.requires_grad}
        self._names = {id(p): name for name, p in parameters.items()}
        self._policy = policy
        self._group = ddp.process_group
        self._world = self._group.size()
        self._rank = self._group.rank()
        self._feedback: ErrorFeedback | None = None
        if error_feedback:
            self._feedback = ErrorFeedback(parameters)
        self._buckets: dict[int, _Bucket] = {}
        self._num_sent = 0
        self._worker = Worker(self._group, next(iter(parameters.values())).device, owner=ddp)
        self._is_removed = False

    # ---- the hook ------------------------------------------------------------------------

    def _reduce(self, bucket: Any) -> Any:
        """Start averaging a bucket; a future of its buffer, where the mean takes its place."""
        known, buffer = self._bucket(bucket), bucket.buffer()
        if self._is_removed:
            return self._average_alone(known.parts, buffer)
        site = f"DDP gradient bucket {bucket.index()}"
        job = partial(self._average, site, known.parts, buffer)
        future = self._worker.submit(site, buffer.device, job)
        if bucket.is_last():
            # DDP waits for all of them next, but would turn an error into a RuntimeError. An
            # earlier bucket's error comes up here too: nothing runs after it.
            _wait(future)
        return future

    def _bucket(self, bucket: Any) -> _Bucket:
        """The parts of a bucket, found anew when DDP has rebuilt its buckets."""
        index, buffer, parameters = bucket.index(), bucket.buffer(), bucket.parameters()
        identities = tuple(map(id, parameters))
        known = self._buckets.get(index)
        if known is None or known.parameters != identities:
            sizes = [(self._names[id(p)], elements_of(p)) for p in parameters]
            what = f"DDP gradient bucket {index}"
            parts = parts_of(self._policy, sizes, buffer, self._world, what=what)
            is_sparse = buffer.layout != torch.strided
            known = _Bucket(identities, buffer.dtype, buffer.device, is_sparse, parts)
            self._buckets[index] = known
        if bucket.is_last():
            self._buckets = {i: b for i, b in self._buckets.items() if i <= index}
        return known

    def _average(self, site: str, parts: tuple[Part, ...], buffer: Tensor) -> Tensor:
        """Runs on the worker's thread."""
        for part in parts:
            if part.format is None:
                self._average_exactly(part, buffer)
            else:
                place = f"{site} ({', '.join(part.names[:3])}{', ...' * (len(part.names) > 3)})"
                part.scatter(self._average_quantized(part, buffer, place), buffer)
        return buffer

    def _average_exactly(self, part: Part, buffer: Tensor) -> None:
        is_sparse = buffer.layout != torch.strided
        gradients = buffer if is_sparse else part.gather(buffer)
        if self._feedback is not None and not is_sparse:
            self._feedback.release(part.names, part.pieces(gradients))
        gradients.mul_(1 / self._world)  # before adding, as DDP does itself
        dist.all_reduce(gradients, group=self._worker.group)
        if not is_sparse:
            part.scatter(gradients, buffer)

    def _average_quantized(self, part: Part, buffer: Tensor, site: str) -> Tensor:
        assert part.format is not None
        gradients = part.gather(buffer)
        residual: Tensor | None = None
        live: list[Tensor] = []
        if self._feedback is not None:
            gradients, live = self._feedback.corrected(part.names, part.pieces(gradients))
            residual = torch.empty_like(gradients)
        self._num_sent += 1
        mean = all_reduce_wire(
            gradients,
            part.format.spec,
            "avg",
            self._world,
            self._worker.group_name,
            segments=self._policy.segments or 0,
            site=site,
            # Coding a sum adds one to the seed: steps of two keep all of them apart.
            seed=2 * (self._num_sent * self._world + self._rank),
            residual=residual,
        )
        if self._feedback is not None and residual is not None:
            self._feedback.keep(part.names, live, part.pieces(residual))
        return mean

    def _average_alone(self, parts: tuple[Part, ...], buffer: Tensor) -> Any:
        """After :meth:`remove`: what DDP does itself, in its own process group, errors included."""
        if self._feedback is not None and buffer.layout == torch.strided:
            for part in parts:  # one, which is all of the buffer: its pieces are views
                self._feedback.release(part.names, part.pieces(part.gather(buffer)))
        buffer.mul_(1 / self._world)
        work = dist.all_reduce(buffer, group=self._group, async_op=True)
        return work.get_future().then(lambda _: buffer)

    # ---- what the user has of it ---------------------------------------------------------

    def report(self) -> Report:
        """Return a report with one line for each part of a bucket, and the bytes of one step.

        A step is one synchronized backward pass. DDP knows its final buckets after the first step.
        So the report before that is preliminary.
        """
        parts = [(i, b, part) for i, b in sorted(self._buckets.items()) for part in b.parts]
        name = self._worker.group_name
        sites = [
            site_of(
                part,
                index,
                bucket.dtype,
                name,
                self._world,
                bucket.device,
                segments=self._policy.segments or 0,
                is_sparse=bucket.is_sparse,
            )
            for index, bucket, part in parts
        ]
        quantized = sum(len(part.names) for *_, part in parts if part.format is not None)
        notes = [f"{quantized} of {len(self._names)} parameters quantized"]
        if self._is_removed:
            notes = [REMOVED]
        elif not parts:
            notes.append("no backward pass has run yet: what the buckets hold is not known")
        feedback = " error_feedback" if self._feedback is not None else ""
        names = (path_of(self._policy, name) for name in self._names.values())
        return Report.of(self._policy, sites, names=names, options=feedback, notes=notes)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the residuals of error feedback by parameter name; empty without error feedback.

        A residual is the mean over ranks of what the sent gradients still lack, float32 or
        complex64, in the shape of the parameter. The residuals are the same on every rank, and fit
        any number of ranks and any buckets. Every rank must call this, between two steps.
        """
        if self._feedback is None:
            return {}
        with transport(self._group, "the state of error feedback"):
            return self._feedback.state_dict(self._group)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue with the residuals of a :meth:`state_dict`; every rank must call this.

        Raises (on every rank, with the name of the rank that has the error):
            StateError: the model has no such parameter, or error feedback is off.
            TransportError: a rank died, or did not answer in time.
        """
        site = "loading the state of error feedback"
        together(self._group, site, lambda: self._load_residuals(state))

    def _load_residuals(self, state: Mapping[str, Tensor]) -> None:
        if self._feedback is not None:
            self._feedback.load_state_dict(state)
        elif state:
            raise StateError(
                "the state has residuals, but error feedback is off",
                list(state),
                "Pass error_feedback=True to quantize_ddp, or do not load it if what they hold may "
                "be lost.",
            )

    def remove(self) -> None:
        """Average exactly from the next step on; every rank must call this.

        The thread ends and the process group is destroyed. (Both also happen when the module is
        garbage collected.) DDP cannot unregister a hook. So the hook stays, averages in the
        module's own process group, and adds the residuals of error feedback to the first exact
        gradients. ``quantize_ddp`` takes the module again; residuals that no exact step has taken
        are then gone.
        """
        self._policy, self._is_removed = Policy(), True
        self._buckets.clear()
        self._worker.close()


def _wait(future: Any) -> None:
    """Raise a copy of the error of a future: DDP holds the future, and so it would hold all frames
    that the error passes on its way up, DDP itself among them.
    """
    raised: RFCompileError | None = None
    try:
        future.wait()
    except RFCompileError as error:
        error.__traceback__ = None
        raised, cause = copy.copy(error), error.__cause__
    if raised is not None:
        raise raised from cause


def _group_of(ddp: object) -> Any:
    """The process group of a DDP module, which others may be around."""
    modules = ddp.modules() if isinstance(ddp, torch.nn.Module) else ()
    found = (m.process_group for m in modules if isinstance(m, DistributedDataParallel))
    return next(found, sole_group())


def _prepared(ddp: DistributedDataParallel, policy: Policyish) -> Policy:
    chosen = as_policy(policy)
    require_free(ddp)
    load_kernels_for(parameter.device for parameter in ddp.parameters())
    return chosen


def require_free(ddp: object) -> None:
    """Raise HookError unless ``ddp`` is a DDP module that can take a hook."""
    name = type(ddp).__name__
    if not isinstance(ddp, DistributedDataParallel):
        raise HookError(
            name,
            "pass the torch.nn.parallel.DistributedDataParallel itself, before torch.compile.",
        )
    if ddp._use_python_reducer:
        raise HookError(
            name,
            "with optimize_ddp='python_reducer' its all-reduces are in the compiled graph. Compile "
            "with backend='rfquant' instead, or choose another optimize_ddp.",
        )
    hook = ddp._get_ddp_logging_data().get("comm_hook", "")
    if hook and not (ddp in _PLACES and _PLACES[ddp].handle._is_removed):
        raise HookError(
            name,
            f"it has the communication hook {hook!r}, and DDP takes one, once. Wrap the module in "
            "a new DistributedDataParallel (without mixed_precision, which is a hook too).",
        )
