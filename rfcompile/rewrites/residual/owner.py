"""One module with residual adds: the candidates in its source, and its sites."""

from __future__ import annotations

import ast
import itertools
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import FunctionType
from typing import Any, TypeGuard

import torch
from torch import nn

from rfcompile.errors import SourceError
from rfcompile.nn.residual_site import ResidualSite
from rfcompile.rewrites.residual.edits import (
    Edit,
    MethodEdits,
    method_edits,
    origin_of,
    rewritten_class,
)
from rfcompile.rewrites.residual.own_modules import OWN, listings_in
from rfcompile.rewrites.residual.sources import (
    Method,
    adds_in,
    called_methods,
    callee_of,
    definition_of,
    digest_of,
    methods_at,
    methods_of,
    position_of,
    with_local_functions,
    with_source,
)

PREFIX = "residual_"
"""Sites are submodules ``residual_0``, ``residual_1``, ... of the module that had the add."""

CANDIDATE = "_rfcompile_candidate_"


class Owner:
    """A module, its class before the surgery, and the adds in its methods that may be residual."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.before = type(module)
        self.cls, recipe = origin_of(self.before)
        self.edits = {(e.owner, e.name, e.digest): e for e in recipe}
        self.names = itertools.count()
        self.present = set(module._modules)

    def consider(self, frames: Sequence[tuple[str, int]]) -> None:
        """The adds in the statement of the innermost frame that is in a method of the class.

        Exported graphs tell the lines of functions named forward only; if none is here, all of the
        forward's adds.
        """
        for file, line in reversed(frames):
            methods = with_source(methods_at(self.cls, file, line))
            for method in methods:
                self._add(method, _statements_at(definition_of(method.function), line))
            if methods:
                break
        else:
            self._consider_forward()
        self._hide_sites()

    def _consider_forward(self) -> None:
        owner = next(c for c in self.cls.__mro__ if "forward" in vars(c))
        methods = methods_of(owner, "forward")
        for method in with_source(methods) or methods:
            self._add(method, definition_of(method.function))

    def _hide_sites(self) -> None:
        """Where the forward, and methods that it names, go through the module's submodules."""
        owner = next(c for c in self.cls.__mro__ if "forward" in vars(c))
        methods = [m for m in methods_of(owner, "forward") if _is_readable(m.function)]
        for method in methods:  # grows while it runs
            definition = definition_of(method.function)
            for node in listings_in(definition, method.self_name):
                position = position_of(node, method.function)
                self._extend(method, [Edit(position, OWN + node.attr)])
            inner = called_methods(definition, method, self.cls)
            methods += [m for m in inner if m not in methods and _is_readable(m.function)]

    def _extend(self, method: Method, edits: Iterable[Edit]) -> None:
        empty = method_edits(method, ())
        key = (empty.owner, empty.name, empty.digest)
        before = self.edits.get(key, empty).edits
        known = {edit.position for edit in before}
        new = tuple({e.position: e for e in edits if e.position not in known}.values())
        if before + new:
            self.edits[key] = replace(empty, edits=before + new)

    def _add(self, method: Method, tree: ast.AST, depth: int = 0) -> None:
        """The adds in a tree; and, as exported graphs do not tell, in all methods that it names."""
        tree = with_local_functions(tree, definition_of(method.function))
        wrapped = methods_of(method.owner, method.name)
        outer = [inner.function for inner in wrapped]
        self._extend(method, self._edits(method.function, tree, outer, method.self_name))
        for inner in called_methods(tree, method, self.cls) if depth < MAX_DEPTH else ():
            if _is_readable(inner.function):
                self._add(inner, definition_of(inner.function), depth + 1)

    def _edits(
        self,
        function: FunctionType,
        tree: ast.AST,
        outer: list[FunctionType],
        self_name: str | None,
        holder: object = None,
    ) -> Iterator[Edit]:
        """Of a method of the module, or of another ``holder`` that the module holds."""
        module = self.module if holder is None else holder
        for node in adds_in(tree, function):
            yield Edit(position_of(node, function), f"{CANDIDATE}{next(self.names)}")
        for call in [node for node in ast.walk(tree) if isinstance(node, ast.Call)]:
            callee = callee_of(call, function, self_name, module)
            if callee is None or callee.function in outer or len(outer) > MAX_DEPTH:
                continue
            helper, receiver = callee.function, callee.receiver
            if callee.holder is self.module or not _is_readable(helper):
                continue
            first = next(iter(helper.__code__.co_varnames), None) if receiver else None
            definition = definition_of(helper)
            inner = tuple(self._edits(helper, definition, [*outer, helper], first, callee.holder))
            if inner:
                attribute = f"_rfcompile_{helper.__name__.strip('<>')}_{next(self.names)}"
                where = (position_of(call, function), attribute, inner, digest_of(helper))
                yield Edit(*where, receiver and origin_of(receiver)[0], callee.method)

    def apply(self, edits: Edits) -> None:
        """Give the module these edits, with their sites, and no others."""
        recipe = tuple(edits.values())
        self.edits = dict(edits)
        cls: Any = self.cls
        self.module.__class__ = rewritten_class(cls, recipe) if recipe else cls
        for name in _sites(edit for method in recipe for edit in method.edits):
            if name not in self.module._modules:
                self.module.add_module(name, ResidualSite())

    def keep(self, sites: Collection[nn.Module]) -> None:
        """Of the candidates, keep these sites, under their final names."""
        modules = self.module._modules
        names = (f"{PREFIX}{number}" for number in itertools.count())
        free = (name for name in names if not hasattr(self.module, name))
        new = {}
        for name in [name for name in modules if name.startswith(CANDIDATE)]:
            module = modules.pop(name)
            if module in sites:
                new[name] = next(free)
                self.module.add_module(new[name], module)
        new |= {name: name for name in modules}
        kept = {key: replace(e, edits=_only(e.edits, new)) for key, e in self.edits.items()}
        has_sites = any(_sites(edit for method in kept.values() for edit in method.edits))
        self.apply({key: m for key, m in kept.items() if m.edits} if has_sites else {})

    def finish(self) -> None:
        """The sites were made while the model was in another mode than it is."""
        for name in set(self.module._modules) - self.present:
            self.module.get_submodule(name).train(self.module.training)

    def undo(self) -> None:
        self.module.__class__ = self.before
        for name in set(self.module._modules) - self.present:
            del self.module._modules[name]


Edits = dict[tuple[str, str, str], MethodEdits]

MAX_DEPTH = 4
"""How many functions may lie between a forward and the add."""


def _sites(edits: Iterator[Edit] | tuple[Edit, ...]) -> Iterator[str]:
    for edit in edits:
        if edit.helper:
            yield from _sites(edit.helper)
        elif not edit.attribute.startswith(OWN):
            yield edit.attribute


def _only(edits: tuple[Edit, ...], new: dict[str, str]) -> tuple[Edit, ...]:
    kept = []
    for edit in edits:
        if edit.helper and (helper := _only(edit.helper, new)):
            kept.append(replace(edit, helper=helper))
        elif not edit.helper and edit.attribute in new:
            kept.append(replace(edit, attribute=new[edit.attribute]))
        elif edit.attribute.startswith(OWN):
            kept.append(edit)
    return tuple(kept)


# ---- sources ---------------------------------------------------------------------------------


def _statements_at(tree: ast.AST, line: int) -> ast.Module:
    """The innermost statements that hold a line."""
    held = [n for n in ast.walk(tree) if isinstance(n, ast.stmt) and _holds(n, line)]
    inner = [n for n in held if not any(m is not n and m in held for m in ast.walk(n))]
    return ast.Module(list(inner), [])


def _holds(statement: ast.stmt, line: int) -> bool:
    return statement.lineno <= line <= (statement.end_lineno or statement.lineno)


def _is_readable(function: FunctionType | None) -> TypeGuard[FunctionType]:
    """It has a source that is not torch's."""
    if function is None or Path(function.__code__.co_filename).is_relative_to(_TORCH):
        return False
    try:
        definition_of(function)
    except SourceError:
        return False
    return True


_TORCH = Path(torch.__file__).parent
