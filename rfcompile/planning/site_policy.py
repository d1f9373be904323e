"""The policy that gives each of some sites a format of its own."""

from __future__ import annotations

from collections.abc import Mapping
from glob import escape

from rfcompile.wire.policy import Policy


def site_policy(formats: Mapping[str, str]) -> Policy:
    """A policy with one pattern for each site, which means this site; all else is exact.

    A pattern matches a path from a dot on, too: of the sites "a.b" and "b" the pattern "b" matches
    both. The first pattern that matches wins, so longer paths come first.

    Args:
        formats: the text of a format, or "" for exact, by path of a module.
    """
    longest_first = sorted(formats, key=lambda path: -path.count("."))
    return Policy(sites={escape(path): formats[path] or None for path in longest_first})
