"""Bases of rewritten classes that hide the sites from code that goes through a module's submodules.

A residual block may call ``for layer in self.children()``, or be an ``nn.Sequential`` that has a
forward of its own. A site in such a block is one more submodule, which that loop must not call.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from typing import Any

from torch import nn

from rfcompile.nn.residual_site import ResidualSite

OWN = "_rfcompile_own_"
"""``self.children`` becomes ``self._rfcompile_own_children``, and so the other LISTINGS."""

LISTINGS = ("children", "named_children", "modules", "named_modules", "_modules")
"""Attributes of a module that tell its submodules."""


def listings_in(tree: ast.AST, self_name: str | None) -> Iterator[ast.Attribute]:
    """Where code of a method reads one of the LISTINGS of its own module."""
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(value=ast.Name(id=name), attr=attribute, ctx=ast.Load()):
                if name == self_name and attribute in LISTINGS:
                    yield node


class _Own(nn.Module):
    """The LISTINGS without the sites."""

    @property
    def _rfcompile_own__modules(self) -> dict[str, nn.Module | None]:
        modules = self._modules.items()
        return {name: m for name, m in modules if not isinstance(m, ResidualSite)}

    def _rfcompile_own_children(self) -> Iterator[nn.Module]:
        return iter([m for m in self.children() if not isinstance(m, ResidualSite)])

    def _rfcompile_own_named_children(self) -> Iterator[tuple[str, nn.Module]]:
        named = self.named_children()
        return iter([(name, m) for name, m in named if not isinstance(m, ResidualSite)])

    def _rfcompile_own_modules(self) -> Iterator[nn.Module]:
        return iter([m for m in self.modules() if not isinstance(m, ResidualSite)])

    def _rfcompile_own_named_modules(
        self, *args: Any, **kwargs: Any
    ) -> Iterator[tuple[str, nn.Module]]:
        named = self.named_modules(*args, **kwargs)
        return iter([(name, m) for name, m in named if not isinstance(m, ResidualSite)])


class _OwnItems(_Own):
    """An ``nn.Sequential`` or ``nn.ModuleList`` without the sites."""

    def __iter__(self) -> Iterator[nn.Module | None]:
        return iter(list(self._rfcompile_own__modules.values()))

    def __len__(self) -> int:
        return len(self._rfcompile_own__modules)


class _OwnNames(_Own):
    """An ``nn.ModuleDict`` without the sites."""

    def __iter__(self) -> Iterator[str]:
        return iter(self._rfcompile_own__modules)

    def __len__(self) -> int:
        return len(self._rfcompile_own__modules)

    def keys(self) -> Any:
        return self._rfcompile_own__modules.keys()

    def items(self) -> Any:
        return self._rfcompile_own__modules.items()

    def values(self) -> Any:
        return self._rfcompile_own__modules.values()


def listing_bases(cls: type) -> tuple[type, ...]:
    """The bases of a rewritten ``cls`` that stand before it."""
    if issubclass(cls, (nn.Sequential, nn.ModuleList)):
        return (_OwnItems,)
    return (_OwnNames,) if issubclass(cls, nn.ModuleDict) else (_Own,)
