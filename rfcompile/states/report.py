"""The report on optimizer states: bytes at rest, and why a state stays exact."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from rfcompile.codec.formats import QuantFormat
from rfcompile.report.report import AT_REST, Report, Site
from rfcompile.states.moments import MOMENTS, Owner, compared_name, decide
from rfcompile.states.packed_checks import is_packed
from rfcompile.states.packing import entries_of, pack_state_dict, require_state_dict
from rfcompile.wire.policy import Decision, Policy, Policyish, as_policy


def packing_report(state_dict: Mapping[str, Any], policy: Policyish = 8) -> Report:
    """What :func:`~rfcompile.training.pack_state_dict` does to a state_dict, a line a state: the
    bytes before and after, or why it stays exact. Of a packed one: what was done.

    Raises:
        As pack_state_dict.
    """
    chosen = as_policy(policy)
    return report_of(chosen, pack_state_dict(state_dict, chosen), AT_REST)


def report_of(policy: Policy, packed: Mapping[str, Any], direction: str) -> Report:
    """The report on a packed state_dict."""
    require_state_dict(packed, "Pass what pack_state_dict returned.")
    entries = [
        (owner, key, value, found)
        for _, owner, found in entries_of(packed)
        if isinstance(found, Mapping)
        for key, value in found.items()
    ]
    sites = [
        site_of(owner, key, value, decide(policy, owner, key, value, beside=found), direction)
        for owner, key, value, found in entries
    ]
    owners = [owner for owner, *_ in entries]
    compared = [compared_name(policy, owner, key) for owner, key, *_ in entries]
    return made(policy, sites, owners, compared)


def made(
    policy: Policy, sites: Iterable[Site], owners: Iterable[Owner], compared: Iterable[str]
) -> Report:
    """A report, with a note where patterns may be idle because parameters have no names."""
    compared = list(compared)
    notes = []
    if not all(policy.patterns_in_use(compared).values()) and not all(o.name for o in owners):
        notes.append(
            "sites reach no parameter without a name: build the optimizer from names, or write "
            "'parameter 3.exp_avg'"
        )
    return Report.of(policy, sites, names=compared, notes=notes)


def names_before(policy: Policy, owner: Owner) -> Iterator[str]:
    """What patterns are compared with for a parameter that has no state yet."""
    yield from (compared_name(policy, owner, key) for key in sorted(MOMENTS))


def site_of(
    owner: Owner, key: str, value: Any, decision: Decision, direction: str = AT_REST
) -> Site:
    """The line of a state; ``decision``: why it stays exact, if it is not packed."""
    before = after = _nbytes(value)
    shape = tuple(value.shape) if isinstance(value, Tensor) else ()
    dtype = value.dtype if isinstance(value, Tensor) else type(value).__name__
    if is_packed(value):
        shape, dtype = tuple(value["shape"]), getattr(torch, value["dtype"])
        before = torch.Size(shape).numel() * dtype.itemsize
        after = value["payload"].nbytes
        decision = Decision(QuantFormat.parse(value["format"]))
    return Site.of(
        decision,
        shape,
        dtype,
        (before, after),
        collective=str(key),
        direction=direction,
        kind="optimizer_state",
        module=owner.label,
        world_size=1,
    )


def _nbytes(value: Any) -> int:
    """Bytes of the tensors in a state, which may be a list or a dict of them."""
    if isinstance(value, Tensor):
        return value.nbytes
    if isinstance(value, Mapping):
        value = list(value.values())
    return sum(map(_nbytes, value)) if isinstance(value, list | tuple) else 0
