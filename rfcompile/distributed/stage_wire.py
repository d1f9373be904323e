"""The payloads that a pipeline stage sends in place of tensors, and a record of each step.

This file sends nothing and touches no part of torch.distributed.pipelining; ``pipeline_stage.py``
does both.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rfcompile.codec import operators
from rfcompile.codec.formats import QuantFormat
from rfcompile.errors import NonFiniteError
from rfcompile.report.report import Report, Site
from rfcompile.wire.policy import Decision, Policy, exact

KINDS = {"forward": "activations", "backward": "gradients"}
"""The direction in which a tensor travels, and the kind of traffic that it is."""

SAME_RANK = exact("one rank", "same rank: handed over, nothing is sent")


def site_name(stage: int) -> str:
    """What a pattern of ``Policy.sites`` is compared with for all that stage ``stage`` sends."""
    return f"stages.{stage}"


def place(direction: str, stage: int) -> str:
    """What an error calls the tensors that a stage sends in one direction."""
    return f"{site_name(stage)}, {direction} send"


@dataclass(frozen=True)
class _Arrival:
    """A payload that will be there when the schedule asks for the tensor in ``buffer``."""

    payload: Tensor
    buffer: Tensor
    format: QuantFormat
    sender: int


@dataclass
class _Departure:
    """A tensor that left, once a micro-batch."""

    sender: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    decision: Decision
    times: int = 0


class StageWire:
    """The codec between a stage and its neighbours.

    Both ends choose a tensor's format from what both know: policy, direction, sending stage, dtype
    and number of elements.

    Args:
        policy: the same on every rank.
        stage: index of the stage that sends with this object, and receives with it.
        num_stages: stages of the pipeline.
    """

    def __init__(self, policy: Policy, stage: int, num_stages: int) -> None:
        self._policy, self._stage, self._num_stages = policy, stage, num_stages
        self._num_encoded = 0
        self._arrivals: dict[tuple[str, int], list[_Arrival]] = {}
        self._departures: dict[tuple[str, int, int], _Departure] = {}

    def start_step(self) -> None:
        """Forget what the last step sent."""
        self._arrivals.clear()
        self._departures.clear()

    # ---- sending ---------------------------------------------------------------------------

    def encode(self, direction: str, index: int, x: Tensor) -> tuple[Tensor, bool]:
        """What travels in place of ``x``, and whether the format refuses its NaN or Inf.

        It is the payload of :func:`rfcompile.quantize`, or ``x`` itself where it stays exact.

        Args:
            direction: "forward" or "backward".
            index: of the tensor among those of a micro-batch that go this way.
            x: any shape, stride and dtype.
        """
        fmt = self._note(direction, index, x, self._stage).decision.format
        if fmt is None:
            return x, False
        self._num_encoded += 1
        # Rounds every tensor of every stage, step and micro-batch at random in another way.
        seed = self._num_encoded * self._num_stages + self._stage
        with torch.no_grad():
            payload = operators.quantize(x.detach().reshape(1, -1), fmt.spec, seed)
            return payload.view(-1), fmt.nonfinite == "raise" and not bool(x.isfinite().all())

    def note_hand_over(self, direction: str, index: int, x: Tensor, sender: int) -> None:
        """``x`` goes from stage ``sender`` to a stage on the same rank, as it is."""
        self._note(direction, index, x, sender).decision = SAME_RANK

    def _note(self, direction: str, index: int, x: Tensor, sender: int) -> _Departure:
        key = (direction, sender, index)
        if key not in self._departures:
            decision = self._decide(direction, sender, x)
            self._departures[key] = _Departure(sender, tuple(x.shape), x.dtype, decision)
        self._departures[key].times += 1
        return self._departures[key]

    def _decide(self, direction: str, sender: int, x: Tensor) -> Decision:
        kind, path, numel = KINDS[direction], site_name(sender), x.numel()
        size = numel * x.element_size()
        return self._policy.decide(kind, path, size, dtype=x.dtype, numel=numel)

    # ---- receiving -------------------------------------------------------------------------

    def expect(self, direction: str, chunk: int, sender: int, buffer: Tensor) -> Tensor:
        """Where to receive what will fill ``buffer``: a payload, or the buffer itself if exact."""
        fmt = self._decide(direction, sender, buffer).format
        if fmt is None:
            return buffer
        size = fmt.payload_bytes(buffer.numel())
        payload = torch.empty(size, dtype=torch.uint8, device=buffer.device)
        arrival = _Arrival(payload, buffer, fmt, sender)
        self._arrivals.setdefault((direction, chunk), []).append(arrival)
        return payload

    @torch.no_grad()
    def decode(self, direction: str, chunk: int, ranks: dict[int, int]) -> None:
        """Fill the buffers of micro-batch ``chunk`` from their payloads, which have arrived.

        The values are those of :func:`rfcompile.dequantize`, on any rank.

        Raises:
            NonFiniteError: they hold NaN, and the format says "raise"; ``ranks`` tells the rank of
            the stage that sent them, which raises it too.
        """
        for arrival in self._arrivals.pop((direction, chunk), ()):
            buffer, fmt = arrival.buffer, arrival.format
            rows = arrival.payload.view(1, -1)
            values = operators.dequantize(rows, fmt.spec, buffer.dtype)
            values = values.view(-1).narrow(0, 0, buffer.numel())
            if fmt.nonfinite == "raise" and not bool(values.isfinite().all()):
                raise NonFiniteError(place(direction, arrival.sender), [ranks[arrival.sender]])
            buffer.copy_(values.view(buffer.shape))

    # ---- report ----------------------------------------------------------------------------

    def report(self, group: str, world: int) -> Report:
        """A line for each tensor of a micro-batch, with the bytes of all micro-batches."""
        forward_first = sorted(self._departures.items(), key=lambda item: item[0][0] != "forward")
        sites = [
            _site(direction, index, departure, group, world)
            for (direction, _, index), departure in forward_first
        ]
        notes = () if sites else ("no step has run yet: what the stage sends is not known",)
        names = map(site_name, range(self._num_stages))
        return Report.of(self._policy, sites, names=names, notes=notes)


def _site(direction: str, index: int, departure: _Departure, group: str, world: int) -> Site:
    fmt, times = departure.decision.format, departure.times
    size = torch.Size(departure.shape).numel()
    before = 0 if departure.decision is SAME_RANK else times * size * departure.dtype.itemsize
    return Site.of(
        departure.decision,
        departure.shape,
        departure.dtype,
        (before, times * fmt.payload_bytes(size) if fmt else before),
        collective="send",
        direction=direction,
        kind=KINDS[direction],
        module=site_name(departure.sender),
        source=f"tensor {index} of {times} micro-batch{'es' if times > 1 else ''}",
        group=group,
        world_size=world,
    )
