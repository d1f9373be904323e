"""A model whose residual adds are submodules: found in its graph, put into its modules' sources.

1. The graph says where the residual adds are (:mod:`rfcompile.passes.find_residuals`).
2. Every add in the statements at those places becomes a call of a :class:`ResidualSite`.
3. The model is captured again: sites without a residual add are undone, and a residual add outside
   of every site is an error. So a site is where the data flow says, whatever the text suggests.
4. On the example inputs the model must compute what it did, bit for bit.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Collection, Iterator
from dataclasses import replace
from pathlib import Path
from types import FunctionType
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from rfcompile.capture import Inputs, capture
from rfcompile.errors import ResidualError
from rfcompile.passes.find_residuals import Kind, ResidualAdd, find_residuals
from rfcompile.passes.open_residuals import OpenedSite
from rfcompile.residual_site import ResidualSite
from rfcompile.rewriting import (
    Edit,
    MethodEdits,
    method_edits,
    rewritten_class,
)
from rfcompile.sources import adds_in, called_function, definition_of, functions_at, position_of

PREFIX = "residual_"
"""Sites are submodules ``residual_0``, ``residual_1``, ... of the module that had the add."""


def open_sites(
    model: nn.Module, inputs: Inputs, kinds: tuple[Kind, ...] = ("block",)
) -> tuple[tuple[OpenedSite, ...], tuple[ResidualAdd, ...]]:
    """Make the residual adds of ``model`` into submodules, in place; it computes what it did.

    Returns the sites, and the adds of other kinds, which stay as they are.

    Args:
        model: any module that ``torch.export`` captures. Sites that it already has stay.
        inputs: (args, kwargs) to run it with, real tensors.
        kinds: which residual adds.

    Raises:
        ResidualError: there is none, or one is out of reach: the model is as it was.
        SourceError, CaptureError.
    """
    graph = capture(model, inputs)
    every = find_residuals(graph)
    wanted = [add for add in every if add.kind in kinds]
    if not wanted:
        raise ResidualError(
            f"{type(model).__name__} has no residual add of kind {', '.join(kinds)} "
            f"({len(every)} of other kinds): there is nothing to rewrite.",
            every,
        )
    expected = _outputs(model, inputs)
    frames = {node.name: _frames(node.meta.get("stack_trace")) for node in graph.graph.nodes}
    owners: dict[str, _Owner] = {}
    for add in wanted:
        module = model.get_submodule(add.module)
        if not isinstance(module, ResidualSite):
            owner = owners.setdefault(add.module, _Owner(module))
            owner.consider(frames.get(add.node, []))
    try:
        for owner in owners.values():
            owner.apply(owner.candidates)
        opened = _opened(model, inputs, wanted, kinds)
        paths = {}
        for path, owner in owners.items():
            used = [s.path.rpartition(".")[2] for s in opened if s.path.rpartition(".")[0] == path]
            for old, new in owner.keep(used).items():
                paths[_join(path, old)] = _join(path, new)
        opened = tuple(replace(site, path=paths.get(site.path, site.path)) for site in opened)
        for site in opened:
            module = model.get_submodule(site.path)
            assert isinstance(module, ResidualSite)
            module.operand = site.add.operand
        _check_equal(model, expected, _outputs(model, inputs))
    except BaseException:
        for owner in owners.values():
            owner.apply({})
        raise
    return opened, tuple(add for add in every if add.kind not in kinds)


def _opened(
    model: nn.Module, inputs: Inputs, wanted: list[ResidualAdd], kinds: Collection[Kind]
) -> tuple[OpenedSite, ...]:
    """The wanted adds with their sites, from a graph of the model as it is now."""
    after = [add for add in find_residuals(capture(model, inputs)) if add.kind in kinds]
    left = [add for add in after if not isinstance(model.get_submodule(add.module), ResidualSite)]
    if left or len(after) != len(wanted):
        places = "; ".join(f"{add.place} ({add.spelling})" for add in left)
        raise ResidualError(
            f"{len(after) - len(left)} of {len(wanted)} residual adds of {type(model).__name__} "
            f"can be rewritten. Out of reach: {places or 'unknown'}. In reach is an add written as "
            "x + f(x), x - f(x), x += f(x), torch.add or Tensor.add in a method of a module or in "
            "a plain function that it calls by name. Write it so, or pass an fx.GraphModule.",
            left,
        )
    return tuple(
        # The site's operands may be the other way round than the graph's: f - x is f + (-x).
        OpenedSite(now.module, replace(add, operand=now.operand))
        for add, now in zip(wanted, after, strict=True)
    )


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


# ---- one module that has residual adds ---------------------------------------------------------

Candidates = dict[tuple[str, int], MethodEdits]


class _Owner:
    """A module, its class before the surgery, and the adds in its methods that may be residual."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.cls = type(module)
        self.candidates: Candidates = {}
        self.first = sum(name.startswith(PREFIX) for name in module._modules)
        self.names = self.first

    def consider(self, frames: list[tuple[str, int]]) -> None:
        """The adds in the statement of the innermost frame that is in a method of the class."""
        for file, line in reversed(frames):
            found = functions_at(self.cls, file, line)
            if found is None:
                continue
            name, function = found
            statement = _statements_at(definition_of(function), line)
            self._add(name, function, statement)
            # Exported graphs do not tell the methods that a forward calls: look into all of them.
            for attribute in _attributes_of_self(statement):
                for inner in (getattr(self.cls, attribute, None),):
                    if isinstance(inner, FunctionType) and not _is_torch(inner):
                        self._add(attribute, inner, definition_of(inner))
            return

    def _add(self, name: str, function: FunctionType, tree: ast.AST) -> None:
        key = (name, function.__code__.co_firstlineno)
        before = self.candidates[key].edits if key in self.candidates else ()
        known = {edit.position for edit in before}
        new = tuple(e for e in self._edits(function, tree) if e.position not in known)
        if before + new:
            self.candidates[key] = method_edits(name, function, before + new)

    def _edits(self, function: FunctionType, tree: ast.AST, depth: int = 0) -> Iterator[Edit]:
        for node in adds_in(tree, function):
            yield Edit(position_of(node), self._name(PREFIX))
        for call in [node for node in ast.walk(tree) if isinstance(node, ast.Call)]:
            helper = called_function(call, function)
            if helper is not None and depth < MAX_DEPTH and not _is_torch(helper):
                inner = tuple(self._edits(helper, definition_of(helper), depth + 1))
                if inner:
                    attribute = self._name(f"_rfcompile_{helper.__name__}_")
                    yield Edit(position_of(call), attribute, inner)

    def _name(self, prefix: str) -> str:
        self.names += 1
        return f"{prefix}{self.names - 1}"

    def apply(self, candidates: Candidates) -> None:
        """Give the module the sites of these candidates and no others."""
        for name in [n for n in self.module._modules if n.startswith(PREFIX)][self.first :]:
            del self.module._modules[name]
        recipe = tuple(candidates.values())
        cls: Any = self.cls
        self.module.__class__ = rewritten_class(cls, recipe) if recipe else cls
        for name in _sites(edit for method in recipe for edit in method.edits):
            self.module.add_module(name, ResidualSite())

    def keep(self, used: list[str]) -> dict[str, str]:
        """Keep these sites only; their new names, in order."""
        new = {name: f"{PREFIX}{self.first + i}" for i, name in enumerate(dict.fromkeys(used))}
        kept = {
            key: replace(method, edits=edits)
            for key, method in self.candidates.items()
            if (edits := _only(method.edits, new))
        }
        self.apply(kept)
        return new


MAX_DEPTH = 3
"""How many plain functions may lie between a method and the add."""


def _sites(edits: Iterator[Edit] | tuple[Edit, ...]) -> Iterator[str]:
    for edit in edits:
        if edit.helper:
            yield from _sites(edit.helper)
        else:
            yield edit.attribute


def _only(edits: tuple[Edit, ...], new: dict[str, str]) -> tuple[Edit, ...]:
    kept = []
    for edit in edits:
        if edit.helper and (helper := _only(edit.helper, new)):
            kept.append(replace(edit, helper=helper))
        elif not edit.helper and edit.attribute in new:
            kept.append(replace(edit, attribute=new[edit.attribute]))
    return tuple(kept)


# ---- sources ---------------------------------------------------------------------------------

_FRAME = re.compile(r'File "([^"]+)", line (\d+)')


def _frames(stack_trace: str | None) -> list[tuple[str, int]]:
    return [(file, int(line)) for file, line in _FRAME.findall(stack_trace or "")]


def _statements_at(tree: ast.AST, line: int) -> ast.Module:
    """The innermost statements that hold a line."""
    held = [n for n in ast.walk(tree) if isinstance(n, ast.stmt) and _holds(n, line)]
    inner = [n for n in held if not any(m is not n and m in held for m in ast.walk(n))]
    return ast.Module(list(inner), [])


def _holds(statement: ast.stmt, line: int) -> bool:
    return statement.lineno <= line <= (statement.end_lineno or statement.lineno)


def _attributes_of_self(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(value=ast.Name(id="self"), attr=name):
                yield name


def _is_torch(function: FunctionType) -> bool:
    return Path(function.__code__.co_filename).is_relative_to(Path(torch.__file__).parent)


# ---- the check -------------------------------------------------------------------------------


def _outputs(model: nn.Module, inputs: Inputs) -> list[object]:
    """What the model computes in eval mode; its modes, seeds and buffers stay as they are."""
    args, kwargs = inputs
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(0)
            return pytree.tree_leaves(model(*args, **kwargs))
    finally:
        for module in training:
            module.training = True


def _check_equal(model: nn.Module, expected: list[object], got: list[object]) -> None:
    pairs = zip(expected, got, strict=True)
    same = all(
        torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)
        for a, b in pairs
        if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)
    )
    if not same:
        raise ResidualError(
            f"{type(model).__name__} computes something else once its residual adds are modules: "
            "an add changes a tensor in place that is read elsewhere. Write x = x + f(x) there."
        )
