"""The list of optimizer states that are moments, and the format of each.

A moment is an average of gradients: a rounding error of it fades, and moves a weight by a part of a
learning rate. Other states are not so patient. Weights (ASGD's ``ax``, schedule-free's ``z``, slow
and averaged weights, float32 masters) keep their errors; step sizes and running sums multiply or
add them up; preconditioners are inverted. So a state is quantized only if its key is known to be a
moment's, or if ``sites`` names it, and everything else stays exact with its reason.

Some optimizers keep weights under a moment's name (pytorch-optimizer's AccSGD, in
``momentum_buffer``): :func:`holds_weights` looks at the values, too.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from rfcompile.codec.formats import DTYPES
from rfcompile.states.sharded_payloads import largest_shard
from rfcompile.wire.policy import Decision, Policy, exact, matches

MOMENTS = frozenset(
    {
        # torch.optim
        "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf", "square_avg", "grad_avg",
        "acc_delta", "sum", "momentum_buffer", "row_var", "col_var", "variance",
        # transformers, pytorch-optimizer and others
        "exp_avg_sq_row", "exp_avg_sq_col", "exp_avg_res_row", "exp_avg_res_col", "exp_avg_slow",
        "exp_avg_diff", "exp_avg_var", "max_exp_avg_var", "momentum",
    }
)  # fmt: skip
"""Keys of moments, elementwise averages of gradients or of their squares."""

_CENTERED = frozenset({"square_avg", "grad_avg"})
"""Of these two an optimizer takes the root of ``square_avg - grad_avg**2``, a small difference."""

_TIMES = 3
_NEAR = 0.25
"""A state this near to its parameter, as a share of the parameter's norm, holds weights."""


@dataclass(frozen=True)
class Owner:
    """A parameter of an optimizer: its name, "" if the optimizer knows none, and its place."""

    name: str
    index: int

    @property
    def label(self) -> str:
        return self.name or f"parameter {self.index}"

    def names(self, key: str) -> tuple[str, ...]:
        """What patterns of ``sites`` are compared with for a state; the parameter comes last."""
        alone = () if self.name else (key,)
        return (f"{self.label}.{key}", *alone, self.label)


def compared_name(policy: Policy, owner: Owner, key: str) -> str:
    """The name of a state that the first matching pattern of ``sites`` matches, else its owner."""
    names = owner.names(key)
    for pattern in policy.sites:
        for name in names:
            if matches(name, pattern):
                return name
    return owner.label


def decide(
    policy: Policy,
    owner: Owner,
    key: str,
    value: object,
    *,
    beside: Collection[str] = (),
    like: Tensor | None = None,
    is_weight: bool = False,
) -> Decision:
    """How a state is kept or sent.

    A pattern of ``sites`` that matches ``parameter.key`` but not the parameter names the state, and
    lifts every rule but that it can be coded. One that matches the parameter is for its moments.

    Args:
        beside: the keys of the parameter's states.
        like: the parameter, where it is known.
        is_weight: what :func:`holds_weights` found.
    """
    problem = _why_not_codable(key, value, like)
    if problem is not None or not isinstance(value, Tensor):
        return problem or exact("not traffic", "no tensor")
    name = compared_name(policy, owner, key)
    pattern = policy.override_for(name)
    chosen = policy.decide("optimizer_state", name, size_bytes(value))
    names_state = pattern is not None and not matches(owner.label, pattern)
    if names_state or (pattern is not None and chosen.format is None):
        return chosen
    to_name = f"name it in sites as '{owner.label}.{key}' to quantize it"
    if value.dim() == 0:
        return exact("not traffic", f"a single number, whose errors would add up: {to_name}")
    if key not in MOMENTS:
        return exact("not traffic", f"an unknown state, maybe weights and not a moment: {to_name}")
    if is_weight:
        what = "it holds the parameter's values and is not a moment"
        return exact("not traffic", f"{what}: {to_name}")
    if key in _CENTERED and _CENTERED.issubset(beside):
        what = "centered: rounded, square_avg - grad_avg**2 may be negative, and its root NaN"
        return exact("not traffic", f"{what}: {to_name}")
    return chosen


def _why_not_codable(key: str, value: object, like: Tensor | None) -> Decision | None:
    """Why no format can code the state; None if one can."""
    if not isinstance(value, Tensor):
        return exact("not traffic", f"no tensor but a {type(value).__name__}")
    if key == "step":
        return exact("not traffic", "counts steps")
    local = _local(value)
    if type(local) not in (Tensor, nn.Parameter):
        name = type(local).__name__
        return exact("out of reach", f"a {name}, which may have a coding of its own")
    if local.dtype not in DTYPES:
        return exact("dtype", f"{str(local.dtype).removeprefix('torch.')} data is not quantized")
    if local.is_meta:
        return exact("empty", "on the meta device")
    if local.layout != torch.strided:
        return exact("dtype", "sparse data is not quantized")
    if like is not None and not _is_sharded_like(value, like):
        return exact("out of reach", "sharded in another way than its parameter")
    return None


def _is_sharded_like(value: Tensor, like: Tensor) -> bool:
    if not isinstance(value, DTensor) or not isinstance(like, DTensor):
        return isinstance(value, DTensor) == isinstance(like, DTensor)
    places = [(x.device_mesh, x.placements, x.shape) for x in (value, like)]
    return places[0] == places[1]


def _local(x: Tensor) -> Tensor:
    return x.to_local() if isinstance(x, DTensor) else x


def size_bytes(value: Tensor) -> int:
    """Bytes of a state here; of a sharded one those of the largest shard, the same on all ranks."""
    if isinstance(value, DTensor):
        return largest_shard(value) * value.dtype.itemsize
    return value.nbytes


def holds_weights(pairs: Iterable[tuple[Tensor, Tensor]]) -> bool | None:
    """Whether states of one key are the parameters' own values; None if nothing shows it.

    A state ``x`` of a parameter ``p`` speaks for it if ``|x - p| <= 0.25 |p|``, with the weight of
    its elements: a copy of the weights is that near for many steps, a moment hardly ever.
    """
    votes = {True: 0, False: 0}
    for state, parameter in pairs:
        x, p = (_local(t).detach() for t in (state, parameter))
        if x.shape != p.shape or x.device != p.device or not x.is_floating_point():
            continue
        size = float(p.float().norm())
        if size > 0:
            votes[float((x.float() - p.float()).norm()) <= _NEAR * size] += p.numel()
    return votes[True] > votes[False] if any(votes.values()) else None


@dataclass(frozen=True)
class Verdict:
    """What is known of a key: how often its states were near the parameters, and whether that is
    final. A gradient may look like its parameter once; what does three times is taken for weights.
    """

    times: int = 0
    is_final: bool = False

    @property
    def is_weight(self) -> bool:
        return self.times > 0

    def after(self, is_near: bool | None) -> Verdict:
        """The verdict after one more look; None shows nothing."""
        if is_near is None:
            return self
        return Verdict(self.times + 1, self.times + 1 == _TIMES) if is_near else Verdict(0, True)
