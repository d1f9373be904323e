"""Reads ``modules=``: the paths, shell patterns or functions that choose modules."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping

from torch import nn

from rfcompile.errors import OptionError
from rfcompile.wire.policy import matches

Chooser = Callable[[str, nn.Module], bool]
Modules = str | Iterable[str] | Chooser
"""What ``modules=`` takes: a word that the door knows ("auto", "blocks", ...), a path or a shell
pattern, several of them, or a function of (path, module) that says yes.

A pattern that is the path of a module means that module. Any other means each module whose path it
matches, as a whole or from a dot on: "q_proj" matches ``blocks.0.q_proj``.
"""


def as_modules(modules: Modules) -> str | tuple[str, ...] | Chooser:
    """What a user wrote, in a form that can be read twice: a text, texts, or a function.

    Raises:
        OptionError: it is none of these.
    """
    is_chooser = callable(modules) and not isinstance(modules, (type, nn.Module))
    if isinstance(modules, str) or is_chooser:
        return modules  # type: ignore[return-value]
    is_several = isinstance(modules, Iterable) and not isinstance(modules, (nn.Module, Mapping))
    patterns = tuple(modules) if is_several else (modules,)  # type: ignore[arg-type]
    if not all(isinstance(pattern, str) for pattern in patterns):
        rule = "give paths or patterns as texts, or a function of (path, module)."
        raise OptionError("modules", modules, rule)
    return patterns  # type: ignore[return-value]


def patterns_of(modules: str | Iterable[str]) -> tuple[str, ...]:
    """The patterns among what :func:`as_modules` takes.

    Raises:
        OptionError: they are no texts.
    """
    given = as_modules(modules)
    if callable(given):
        rule = "a function cannot choose here: give paths or patterns as texts."
        raise OptionError("modules", modules, rule)
    return (given,) if isinstance(given, str) else given


def matching(pattern: str, paths: Collection[str]) -> list[str]:
    """The paths that a pattern means, in order; see :data:`Modules`."""
    if pattern in paths:
        return [pattern]
    return [path for path in paths if matches(path, pattern)]


def matching_any(patterns: Iterable[str], paths: Collection[str]) -> list[str]:
    """The paths that some pattern means, in order, each once."""
    chosen = {path for pattern in patterns for path in matching(pattern, paths)}
    return [path for path in paths if path in chosen]
