"""Checks a state_dict before an optimizer with quantized states loads it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from rfcompile.states.moments import decide
from rfcompile.states.packing import (
    Packed,
    converted,
    entries_of,
    localized,
    require_finite,
    require_state_dict,
    unpack,
)
from rfcompile.wire.policy import Policy


def to_load(
    state_dict: dict[str, Any], parameters: Sequence[Tensor], policy: Policy
) -> tuple[dict[str, Any], dict[Tensor, dict[str, Packed]]]:
    """A decoded state_dict, which torch can load, and by parameter the payloads it came from.

    Raises:
        StateError: it is no state_dict, or was sharded in another way. PayloadError: a packed state
        is damaged. NonFiniteError: a decoded state has NaN or Inf and ``policy`` says "raise".
    """
    require_state_dict(state_dict, "Pass what optimizer.state_dict() returned.")
    local = converted(state_dict, parameters, localized)
    packed = {}
    for _, owner, entries in entries_of(local):
        if owner.index < len(parameters) and isinstance(entries, Mapping):
            found = {key: value for key, value in entries.items() if isinstance(value, Packed)}
            packed[parameters[owner.index]] = found
    plain = converted(local, parameters, unpack)
    _require_finite(local, len(parameters), policy)
    return plain, packed


def _require_finite(state_dict: Mapping[str, Any], number: int, policy: Policy) -> None:
    rule = "Nothing was loaded: load another copy, or use nonfinite='propagate'."
    for _, owner, entries in entries_of(state_dict):
        if owner.index < number and isinstance(entries, Mapping):
            for key, value in entries.items():
                fmt = decide(policy, owner, key, value, beside=entries).format
                if fmt is not None:
                    require_finite(value, fmt, f"state {key!r} of {owner.label}", rule)
