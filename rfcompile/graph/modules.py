"""Reads ``modules=``: the paths, shell patterns or functions that choose modules."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable

from torch import nn

from rfcompile.errors import OptionError
from rfcompile.wire.policy import matches

Modules = str | Iterable[str] | Callable[[str, nn.Module], bool]
"""What ``modules=`` takes: a word that the door knows ("auto", "blocks", ...), a path or a shell
pattern, several of them, or a function of (path, module) that says yes.

A pattern that is the path of a module means that module. Any other means each module whose path it
matches, as a whole or from a dot on: "q_proj" matches ``blocks.0.q_proj``.
"""


def patterns_of(modules: str | Iterable[str]) -> tuple[str, ...]:
    """The patterns that a user wrote.

    Raises:
        OptionError: they are no texts.
    """
    given = (modules,) if isinstance(modules, str) else modules
    patterns = tuple(given) if isinstance(given, Iterable) else (given,)
    if not all(isinstance(pattern, str) for pattern in patterns):
        rule = "give paths or patterns as texts, or a function of (path, module)."
        raise OptionError("modules", modules, rule)
    return patterns


def matching(pattern: str, paths: Collection[str]) -> list[str]:
    """The paths that a pattern means, in order; see :data:`Modules`."""
    if pattern in paths:
        return [pattern]
    return [path for path in paths if matches(path, pattern)]


def matching_any(patterns: Iterable[str], paths: Collection[str]) -> list[str]:
    """The paths that some pattern means, in order, each once."""
    chosen = {path for pattern in patterns for path in matching(pattern, paths)}
    return [path for path in paths if path in chosen]
