"""Modules whose forward calls a submodule in place of an expression, without new source files.

A function is parsed, its chosen expressions become calls of ``self.<attribute>(a, b)``, and it is
compiled again with its own globals, closure, file name and line numbers, so that tracebacks,
debuggers and torch.compile see the user's lines. The module gets a subclass of its class that
holds the new functions: state, hooks, ``isinstance`` and ``super()`` stay. Pickling stores which
expressions were replaced and makes the subclass again where it is loaded.
"""

from __future__ import annotations

import ast
import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import CellType, CodeType, FunctionType
from typing import Any

from torch import nn

from rfcompile.errors import SourceError
from rfcompile.sources import (
    called_function,
    content_of,
    definition_of,
    digest_of,
    position_of,
    terms_of,
    wrapped_functions,
)

# ---- what is replaced: plain data, so that it can be stored ------------------------------------


@dataclass(frozen=True)
class Edit:
    """An expression, by its position in the file, and the attribute that is called instead.

    ``helper``: the expression calls a function; the attribute is that function with these edits,
    as a method.
    """

    position: tuple[int, int, int, int]
    attribute: str
    helper: tuple[Edit, ...] = ()


@dataclass(frozen=True)
class MethodEdits:
    """The edits of one function that a class has as (part of) the attribute ``name``."""

    name: str
    first_line: int
    digest: str
    edits: tuple[Edit, ...]


Recipe = tuple[MethodEdits, ...]

# ---- functions ---------------------------------------------------------------------------------


def _with_inner(
    outer: FunctionType, old: FunctionType, clones: dict[FunctionType, FunctionType]
) -> FunctionType:
    """``outer``, holding ``clones[old]`` where its decorators' closures hold ``old``."""
    if outer in clones or old not in wrapped_functions(outer):
        return clones.get(outer, outer)
    held = [(cell, content_of(cell)) for cell in outer.__closure__ or ()]
    cells = [
        CellType()
        if isinstance(content, FunctionType) and old in wrapped_functions(content)
        else cell
        for cell, content in held
    ]
    clones[outer] = clone = _function_like(outer, outer.__code__, tuple(cells))
    for cell, (before, content) in zip(cells, held, strict=True):
        if cell is not before:  # filled only now: a closure may hold itself
            assert isinstance(content, FunctionType)
            cell.cell_contents = _with_inner(content, old, clones)
    wrapped = getattr(outer, "__wrapped__", None)
    if isinstance(wrapped, FunctionType):
        clone.__wrapped__ = _with_inner(wrapped, old, clones)  # type: ignore[attr-defined]
    return clone


def _function_like(
    function: FunctionType, code: CodeType, closure: tuple[CellType, ...]
) -> FunctionType:
    clone = FunctionType(
        code, function.__globals__, function.__name__, function.__defaults__, closure
    )
    clone.__kwdefaults__ = function.__kwdefaults__
    clone.__annotations__ = function.__annotations__
    clone.__qualname__ = function.__qualname__
    clone.__module__ = function.__module__
    clone.__doc__ = function.__doc__
    clone.__dict__.update(function.__dict__)
    return clone


class _Editor(ast.NodeTransformer):
    def __init__(self, function: FunctionType, edits: tuple[Edit, ...], self_name: str) -> None:
        self.function, self.self_name = function, self_name
        self.edits = {edit.position: edit for edit in edits}

    def visit(self, node: ast.AST) -> ast.AST:
        edit = self.edits.get(position_of(node)) if hasattr(node, "col_offset") else None
        terms = None
        if edit is not None and isinstance(node, ast.Call) and edit.helper:
            terms = node.args
        elif edit is not None and not edit.helper:
            terms = terms_of(node, self.function)
        if edit is None or terms is None:  # an Expr statement has the position of its expression
            visited: ast.AST = super().visit(node)
            return visited
        arguments: list[Any] = [self.visit(term) for term in terms]
        keywords: list[Any] = []
        if isinstance(node, ast.Call) and edit.helper:
            keywords = [self.visit(keyword) for keyword in node.keywords]
        callee = ast.Attribute(ast.Name(self.self_name, ast.Load()), edit.attribute, ast.Load())
        call = ast.copy_location(ast.Call(callee, arguments, keywords), node)
        if isinstance(node, ast.AugAssign):
            return ast.copy_location(ast.Assign([node.target], call), node)
        return call

    def visit_Expr(self, node: ast.Expr) -> ast.AST:
        """``x.add_(y)`` as a statement keeps its effect: ``x = self.site(x, y)``."""
        value: Any = self.visit(node.value)
        match node.value:
            case ast.Call(func=ast.Attribute(value=ast.Name(id=name), attr="add_")):
                if value is not node.value:
                    target = ast.copy_location(ast.Name(name, ast.Store()), node)
                    return ast.copy_location(ast.Assign([target], value), node)
        node.value = value
        return node


def edited(
    function: FunctionType, edits: tuple[Edit, ...], *, as_method: bool = False
) -> dict[str, FunctionType]:
    """The function with its edits under its own name, and its edited helpers under theirs.

    ``as_method`` puts the module in front of its parameters.
    """
    code = function.__code__
    node = copy.deepcopy(definition_of(function))
    node.decorator_list = []
    arguments = node.args.posonlyargs + node.args.args
    if as_method:
        self_name = "_rfcompile_self"
        (node.args.posonlyargs or node.args.args).insert(0, ast.arg(self_name))
    elif arguments:
        self_name = arguments[0].arg
    else:
        raise SourceError(f"{function.__qualname__} has no self, so it cannot call a submodule.")
    helpers: dict[str, FunctionType] = {}
    for call in [n for n in ast.walk(node) if isinstance(n, ast.Call)]:
        for edit in edits:
            if edit.helper and edit.position == position_of(call):
                helper = called_function(call, function)
                if helper is None:
                    raise SourceError(f"{ast.unparse(call.func)} is no plain function any more.")
                new = edited(helper, edit.helper, as_method=True)
                helpers[edit.attribute] = new.pop(helper.__name__)
                helpers.update(new)
    _Editor(function, edits, self_name).visit(node)
    # Free variables must be free again, and private names be mangled as in the class.
    free = [ast.arg(name) for name in code.co_freevars if name != "__class__"]
    parts = function.__qualname__.split(".")
    body: list[ast.stmt] = [node]
    if len(parts) > 1 and parts[-2] != "<locals>":
        body = [ast.ClassDef(parts[-2], [], [], body, [])]
    if "__class__" in code.co_freevars and not isinstance(body[0], ast.ClassDef):
        free.append(ast.arg("__class__"))
    factory = ast.FunctionDef("factory", ast.arguments([], free, None, [], [], None, []), body, [])
    tree = ast.fix_missing_locations(ast.Module([factory], []))
    flags = code.co_flags & _FUTURE_FLAGS
    module_code = compile(tree, code.co_filename, "exec", flags, dont_inherit=True)
    new_code = _find_code(module_code, code.co_name, node)
    cells = dict(zip(code.co_freevars, function.__closure__ or (), strict=True))
    closure = tuple(cells[name] for name in new_code.co_freevars)
    return {function.__name__: _function_like(function, new_code, closure), **helpers}


_FUTURE_FLAGS = 0x1FF0000
"""The bits of ``co_flags`` that ``from __future__`` sets."""


def _find_code(code: CodeType, name: str, node: ast.FunctionDef) -> CodeType:
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            if constant.co_name == name and constant.co_firstlineno == node.lineno:
                return constant
            if constant.co_name in ("factory",) or not constant.co_flags & 0x2:  # a class body
                return _find_code(constant, name, node)
    raise AssertionError(f"the code of {name} was not compiled")


# ---- classes -----------------------------------------------------------------------------------


def method_edits(name: str, function: FunctionType, edits: tuple[Edit, ...]) -> MethodEdits:
    return MethodEdits(name, function.__code__.co_firstlineno, digest_of(function), edits)


@cache
def rewritten_class(cls: Any, recipe: Recipe) -> type[nn.Module]:
    """The subclass of ``cls`` whose methods call submodules as the recipe says."""
    members: dict[str, Any] = {}
    for method in recipe:
        outer = members.get(method.name, getattr(cls, method.name))
        inner = _function_at(outer, method, cls)
        new = edited(inner, method.edits)
        members[method.name] = _with_inner(outer, inner, {inner: new.pop(inner.__name__)})
        members.update(new)

    def __reduce_ex__(self: nn.Module, protocol: Any) -> Any:
        reduced: Any = super(made, self).__reduce_ex__(protocol)
        make, args, *rest = reduced
        assert args[0] is made, "a class with its own __reduce__ is not rewritten"
        return (_instance, (make, cls, recipe, *args[1:]), *rest)

    members |= {
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
        "__reduce_ex__": __reduce_ex__,
        "_rfcompile_recipe": recipe,
    }
    metaclass: Any = type(cls)
    made: type[nn.Module] = metaclass(cls.__name__, (cls,), members)
    return made


def _function_at(outer: object, method: MethodEdits, cls: type) -> FunctionType:
    for function in wrapped_functions(outer):
        same_line = function.__code__.co_firstlineno == method.first_line
        if same_line and digest_of(function) == method.digest:
            return function
    raise SourceError(
        f"{cls.__qualname__}.{method.name} is not the function that was rewritten: its source has "
        "changed since. Load the model with the old source, or transform it again and load the "
        "state_dict."
    )


def _instance(make: Callable[..., Any], cls: type[nn.Module], recipe: Recipe, *args: Any) -> Any:
    return make(rewritten_class(cls, recipe), *args)  # type: ignore[arg-type]
