"""Compiles methods again with an expression replaced by a call of a submodule.

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
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from types import CellType, CodeType, FunctionType
from typing import Any

from torch import nn

from rfcompile.errors import SourceError
from rfcompile.nn.rebinding import content_of
from rfcompile.rewrites.residual.own_modules import OWN, listing_bases
from rfcompile.rewrites.residual.sources import (
    Method,
    Position,
    called_function,
    called_method,
    definition_of,
    digest_of,
    methods_of,
    position_of,
    site_arguments,
    wrapped_functions,
)

# ---- what is replaced: plain data, so that it can be stored ------------------------------------


@dataclass(frozen=True)
class Edit:
    """An expression, by its position in the function, and the attribute that is called instead.

    ``helper``: the expression calls a function, whose source has this ``digest``; the attribute is
    that function with these edits, as a method. ``receiver``: the function is the ``method`` of an
    object of this class, which becomes its first argument; "" if the object itself is called.
    """

    position: Position
    attribute: str
    helper: tuple[Edit, ...] = ()
    digest: str = ""
    receiver: type | None = None
    method: str = ""


@dataclass(frozen=True)
class MethodEdits:
    """The edits of one function that a class or a base of it has as (part of) an attribute."""

    owner: str
    name: str
    digest: str
    edits: tuple[Edit, ...]


Recipe = tuple[MethodEdits, ...]


def method_edits(method: Method, edits: tuple[Edit, ...]) -> MethodEdits:
    return MethodEdits(_name_of(method.owner), method.name, digest_of(method.function), edits)


def _name_of(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


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
        edit = self.edits.get(self._position(node)) if hasattr(node, "col_offset") else None
        given = None
        if edit is not None and isinstance(node, ast.Attribute) and edit.attribute.startswith(OWN):
            node.attr = edit.attribute
            return node
        if edit is not None and isinstance(node, ast.Call) and edit.helper:
            holder: list[ast.expr] = []
            if edit.receiver is not None:
                assert not edit.method or isinstance(node.func, ast.Attribute)
                holder = [node.func.value if edit.method else node.func]  # type: ignore[attr-defined]
            given = [*holder, *node.args], node.keywords
        elif edit is not None and not edit.helper:
            given = site_arguments(node, self.function)
        if edit is None or given is None:  # an Expr statement has the position of its expression
            visited: ast.AST = super().visit(node)
            return visited
        arguments: list[Any] = [self.visit(term) for term in given[0]]
        keywords: list[Any] = [self.visit(keyword) for keyword in given[1]]
        callee = ast.Attribute(ast.Name(self.self_name, ast.Load()), edit.attribute, ast.Load())
        call = ast.copy_location(ast.Call(callee, arguments, keywords), node)
        if isinstance(node, ast.AugAssign):
            return ast.copy_location(ast.Assign([node.target], call), node)
        return call

    def _position(self, node: ast.AST) -> Position:
        return position_of(node, self.function)

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
            if edit.helper and edit.position == position_of(call, function):
                helper = called_function(call, function)
                if edit.receiver is not None:
                    helper = called_method(edit.receiver, edit.method)
                if helper is None or digest_of(helper) != edit.digest:
                    raise _changed(ast.unparse(call.func))
                new = edited(helper, edit.helper, as_method=True)
                main = new.pop(helper.__name__)
                if edit.receiver is not None:
                    main = _only_for(edit.receiver, main)
                helpers[edit.attribute] = main
                helpers.update(new)
    _Editor(function, edits, self_name).visit(node)
    # Free variables must be free again, and private names be mangled as in the class.
    free = [ast.arg(name) for name in code.co_freevars if name != "__class__"]
    parts = function.__qualname__.split(".")
    body: list[ast.stmt] = [node]
    if len(parts) > 1 and parts[-2] != "<locals>":
        body = [ast.ClassDef(parts[-2], [], [], body, [])]
        if parts[-2] not in code.co_freevars:  # its own name stays what it is outside
            body.insert(0, ast.Global([parts[-2]]))
    if "__class__" in code.co_freevars and not isinstance(body[-1], ast.ClassDef):
        free.append(ast.arg("__class__"))
    factory = ast.FunctionDef("factory", ast.arguments([], free, None, [], [], None, []), body, [])
    tree = ast.fix_missing_locations(ast.Module([factory], []))
    flags = code.co_flags & _FUTURE_FLAGS
    module_code = compile(tree, code.co_filename, "exec", flags, dont_inherit=True)
    new_code = _find_code(module_code, code.co_name, node)
    cells = dict(zip(code.co_freevars, function.__closure__ or (), strict=True))
    closure = tuple(cells[name] for name in new_code.co_freevars)
    return {function.__name__: _function_like(function, new_code, closure), **helpers}


def _only_for(receiver: type, function: FunctionType) -> FunctionType:
    """The function, which was made of a method of ``receiver``, for no object of another class."""

    def call(self: nn.Module, holder: object, *args: Any, **kwargs: Any) -> Any:
        if origin_of(type(holder))[0] is not receiver:
            raise SourceError(
                f"{type(self).__name__} was rewritten with a {receiver.__name__}, which adds a "
                f"residual, and has a {type(holder).__name__} now: set it first, then transform "
                "the model."
            )
        return function(self, holder, *args, **kwargs)

    assert isinstance(call, FunctionType)
    return call


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

RECIPE = "_rfcompile_recipe"


def origin_of(cls: type) -> tuple[type, Recipe]:
    """The class before it was rewritten, and how it was."""
    origin: tuple[type, Recipe] = vars(cls).get(RECIPE, (cls, ()))
    return origin


@cache
def rewritten_class(cls: Any, recipe: Recipe) -> type[nn.Module]:
    """The subclass of ``cls`` whose methods call submodules as the recipe says.

    New functions of a base come from a class that stands before that base in the method resolution
    order, so ``super()`` finds them.
    """
    members: dict[type, dict[str, Any]] = {cls: {}}
    for edits in recipe:
        method = _find(cls, edits)
        own = members.setdefault(method.owner, {})
        outer = own.get(method.name, vars(method.owner)[method.name])
        inner = method.function
        new = edited(inner, edits.edits, as_method=method.is_static)
        if method.is_static:
            outer = outer if isinstance(outer, FunctionType) else outer.__func__
        is_property = isinstance(outer, property)
        getter = outer.fget if is_property else outer
        changed = _with_inner(getter, inner, {inner: new.pop(inner.__name__)})
        own[method.name] = outer.getter(changed) if is_property else changed
        own.update(new)
    metaclass: Any = type(cls)
    owners = [owner for owner in cls.__mro__ if owner in members and owner is not cls]
    bases = [metaclass(o.__name__, (_quiet(), o), {**_names(o), **members[o]}) for o in owners]

    def __reduce_ex__(self: nn.Module, protocol: Any) -> Any:
        reduced: Any = super(made, self).__reduce_ex__(protocol)
        make, args, *rest = reduced
        assert args[0] is made, "a class with its own __reduce__ is not rewritten"
        return (_instance, (make, cls, recipe, *args[1:]), *rest)

    own = members[cls] | {"__reduce_ex__": __reduce_ex__, RECIPE: (cls, recipe)}
    family = (_quiet(), *listing_bases(cls), cls, *bases)
    made: type[nn.Module] = metaclass(cls.__name__, family, {**_names(cls), **own})
    return made


def _quiet() -> type:
    """A base for a rewritten class, which is no new one: no ``__init_subclass__`` is asked.

    Each has its own, or they would pull the bases of several into another order.
    """

    class Quiet:
        def __init_subclass__(cls, **_: Any) -> None:
            pass

    return Quiet


def _names(cls: type) -> dict[str, Any]:
    return {name: getattr(cls, name) for name in ("__module__", "__qualname__", "__doc__")}


def _find(cls: type, edits: MethodEdits) -> Method:
    for owner in cls.__mro__:
        if _name_of(owner) == edits.owner:
            for method in methods_of(owner, edits.name):
                with suppress(SourceError):  # a decorator's function may have no source
                    if digest_of(method.function) == edits.digest:
                        return method
    raise _changed(f"{edits.owner}.{edits.name}")


def _changed(what: str) -> SourceError:
    return SourceError(
        f"{what} is not the function that was rewritten: its source has changed since. Load the "
        "model with the old source, or transform it again and load the state_dict."
    )


def _instance(make: Callable[..., Any], cls: type[nn.Module], recipe: Recipe, *args: Any) -> Any:
    return make(rewritten_class(cls, recipe), *args)  # type: ignore[arg-type]
