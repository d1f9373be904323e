"""The default policy, from ``set_default_policy`` or else from the environment.

``RFCOMPILE_POLICY`` is the path of a TOML file. ``RFCOMPILE_BITS`` is a number of bits or a format
such as ``4b:g64``. The options of a call win over the default policy.
"""

from __future__ import annotations

import os
import warnings
from functools import lru_cache

from rfcompile.errors import PolicyError, RFCompileWarning
from rfcompile.wire.policy import Policy, Policyish, as_policy

WAYS = (
    "options (options={'bits': 4}), rfcompile.set_default_policy(4), or the environment "
    "(RFCOMPILE_BITS=4 or RFCOMPILE_POLICY=policy.toml)"
)
"""The three ways to give backend "rfquant" a policy, for messages."""


class _Default:
    policy: Policy | None = None
    compiled: Policy | None = None
    """The one that the backend used last."""


def set_default_policy(policy: Policyish) -> None:
    """Use a policy wherever none is given: by the backend "rfquant" that has no options, and by
    ``transform``, ``explain`` and the command line without bits.

    What is compiled already keeps the policy that it was compiled with, and a function that is
    compiled again may be served from there: a warning says so. Call it on every rank alike, before
    anything compiles; ranks that differ are a RankMismatchError at their first collective.

    Args:
        policy: as everywhere ("exact" for none of it), or None: only the environment counts again.

    Raises:
        PolicyError, FormatError: the policy is not understood.
    """
    chosen = None if policy is None else as_policy(policy)
    if _Default.compiled is not None and chosen != _Default.compiled:
        warnings.warn(
            "what backend 'rfquant' has compiled with the default policy so far keeps it "
            f"({_Default.compiled.describe()}): call torch.compiler.reset() to compile it anew.",
            RFCompileWarning,
            stacklevel=2,
        )
    _Default.policy = chosen


def default_policy(*, compiles: bool = False) -> Policy | None:
    """The default policy, None where there is none; the environment's file is read once.

    Args:
        compiles: something is compiled with it.

    Raises:
        PolicyError, FormatError: what the environment says is not understood.
    """
    found = _Default.policy or _of_environment(
        os.environ.get("RFCOMPILE_POLICY", ""), os.environ.get("RFCOMPILE_BITS", "")
    )
    if compiles and found is not None:
        _Default.compiled = found
    return found


@lru_cache
def _of_environment(path: str, bits: str) -> Policy | None:
    if path and bits:
        rule = f"RFCOMPILE_BITS={bits!r} is set as well: unset one of the two."
        raise PolicyError("RFCOMPILE_POLICY", path, rule)
    if path:
        try:
            return Policy.from_file(path)
        except PolicyError as error:
            if not isinstance(error.__cause__, OSError):
                raise
            raise PolicyError("RFCOMPILE_POLICY", path, error.rule) from error
    return as_policy(bits_of_text(bits)) if bits else None


def bits_of_text(text: str) -> int | str:
    """A number as one, and any other text as it is: what a shell can write for a format."""
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 10 else text


def policy_of(policy: Policyish) -> Policy:
    """The policy that a user wrote, or the default one.

    Raises:
        PolicyError, FormatError: it is not understood, or there is none.
    """
    if policy is not None:
        return as_policy(policy)
    found = default_policy()
    if found is None:
        rule = "give bits (2, 3, 4, 5, 6 or 8) or a policy, 'exact' for none, or set a default one."
        raise PolicyError("bits", None, rule)
    return found
