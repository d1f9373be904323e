"""Reads the source of functions and finds their additions."""

from __future__ import annotations

import ast
import copy
import hashlib
import inspect
import linecache
import operator
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from types import CodeType, FunctionType, ModuleType, NoneType
from typing import Any

import torch
from torch import nn

from rfcompile.errors import SourceError
from rfcompile.nn.rebinding import content_of


def definition_of(function: FunctionType) -> ast.FunctionDef:
    """The syntax tree of a function's ``def``; of a lambda, of a ``def`` that returns the same.

    Raises:
        SourceError: there is no source, or two lambdas on a line cannot be told apart.
    """
    code = function.__code__
    text = "".join(linecache.getlines(code.co_filename, function.__globals__))
    found = [
        node
        for node in _definitions(text)
        if node.name == code.co_name and _first_line(node) == code.co_firstlineno
    ]
    if len(found) > 1 and code.co_name == LAMBDA:
        places = set(code.co_positions())
        found = [node for node in found if _place_of(node.body[0]) in places]
    if found and (code.co_name != LAMBDA or len(found) == 1):
        return found[0]
    raise SourceError(
        f"{function.__qualname__} ({code.co_filename}:{code.co_firstlineno}) has no readable "
        "source: define its class in a file, and load it from there unchanged."
    )


@lru_cache(maxsize=64)
def _definitions(text: str) -> tuple[ast.FunctionDef, ...]:
    nodes = [
        _as_def(node) if isinstance(node, ast.Lambda) else node
        for node in ast.walk(ast.parse(text))
    ]
    return tuple(node for node in nodes if isinstance(node, ast.FunctionDef))


LAMBDA = "<lambda>"


def _as_def(node: ast.Lambda) -> ast.FunctionDef:
    result = ast.copy_location(ast.Return(node.body), node.body)
    return ast.copy_location(ast.FunctionDef(LAMBDA, node.args, [result], []), node)


def _place_of(node: ast.stmt) -> tuple[int | None, ...]:
    """As ``co_positions`` has it."""
    return node.lineno, node.end_lineno, node.col_offset, node.end_col_offset


def _first_line(node: ast.FunctionDef) -> int:
    return min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])


def digest_of(function: FunctionType) -> str:
    """Of the text of the ``def``, wherever in its file it stands."""
    node, code = definition_of(function), function.__code__
    lines = linecache.getlines(code.co_filename, function.__globals__)
    text = "".join(lines[_first_line(node) - 1 : node.end_lineno])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def wrapped_functions(value: object) -> list[FunctionType]:
    """A function, or that of a property, and those that its decorators hold in closures, outermost
    first.
    """
    if isinstance(value, staticmethod):
        value = value.__func__
    if isinstance(value, property):
        value = value.fget
    found = [value] if isinstance(value, FunctionType) else []
    for function in found:  # grows while it runs
        held = map(content_of, function.__closure__ or ())
        found += [f for f in held if isinstance(f, FunctionType) and f not in found]
    return found


@dataclass(frozen=True)
class Method:
    """A function that ``owner`` has as (part of) its attribute ``name``."""

    owner: type
    name: str
    function: FunctionType

    @property
    def is_static(self) -> bool:
        return isinstance(vars(self.owner)[self.name], staticmethod)

    @property
    def self_name(self) -> str | None:
        code = self.function.__code__
        return None if self.is_static or not code.co_argcount else code.co_varnames[0]


def methods_of(owner: type, name: str) -> list[Method]:
    """The functions behind an attribute that the class itself defines."""
    return [Method(owner, name, f) for f in wrapped_functions(vars(owner).get(name))]


def with_source(methods: list[Method]) -> list[Method]:
    """Those whose ``def`` can be read: a decorator's function may have none (torch 2.15 renames
    those of ``torch.no_grad()``)."""
    found = []
    for method in methods:
        with suppress(SourceError):
            definition_of(method.function)
            found.append(method)
    return found


def methods_at(cls: type, file: str, line: int) -> list[Method]:
    """The functions of a class or its bases that hold a line: several if it has several names."""
    return [
        method
        for owner in cls.__mro__
        for name in vars(owner)
        for method in methods_of(owner, name)
        if method.function.__code__.co_filename == file and line in _lines(method.function.__code__)
    ]


def _lines(code: CodeType) -> range:
    """From a function's first line to its last, those of functions in it included."""
    last = max(line or 0 for _, _, line in code.co_lines())
    inner = (c for c in code.co_consts if isinstance(c, CodeType))
    return range(code.co_firstlineno, max([last + 1, *(_lines(c).stop for c in inner)]))


def with_local_functions(tree: ast.AST, definition: ast.FunctionDef) -> ast.Module:
    """A part of a function and the functions in that function that it names."""
    parts: list[Any] = [tree]
    local = [n for n in ast.walk(definition) if isinstance(n, ast.FunctionDef)]
    for part in parts:  # grows while it runs
        names = {n.id for n in ast.walk(part) if isinstance(n, ast.Name)}
        parts += [f for f in local if f.name in names and f not in parts and f is not definition]
    return ast.Module(parts, [])


def called_methods(tree: ast.AST, method: Method, cls: type) -> Iterator[Method]:
    """The methods that code of ``method`` names as ``self.x`` or ``super().x``."""
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(value=ast.Name(id=name), attr=attribute) if name == method.self_name:
                order = cls.__mro__
            case ast.Attribute(value=ast.Call(func=ast.Name(id="super")), attr=attribute):
                order = cls.__mro__[cls.__mro__.index(method.owner) + 1 :]
            case _:
                continue
        if attribute.startswith("__") and not attribute.endswith("__"):  # private to the class
            attribute = f"_{method.owner.__name__.lstrip('_')}{attribute}"
        owner = next((c for c in order if attribute in vars(c)), None)
        yield from methods_of(owner, attribute) if owner else ()


def called_function(call: ast.Call, function: FunctionType) -> FunctionType | None:
    """The plain function that an expression in ``function`` calls by a global or closure name."""
    target, path = call.func, []
    while isinstance(target, ast.Attribute):
        path.append(target.attr)
        target = target.value
    if not isinstance(target, ast.Name):
        return None
    value = _value_of(target.id, function)
    for name in reversed(path):
        if not isinstance(value, ModuleType):
            return None
        value = getattr(value, name, None)
    return value if isinstance(value, FunctionType) else None


@dataclass(frozen=True)
class Callee:
    """What a call calls: a plain function by a global name; or a ``method`` of a ``holder``, "" if
    the holder itself is called, which is no module then.
    """

    function: FunctionType
    holder: object = None
    method: str = ""

    @property
    def receiver(self) -> type | None:
        return None if self.holder is None else type(self.holder)


def callee_of(
    call: ast.Call, function: FunctionType, self_name: str | None, module: object
) -> Callee | None:
    """What an expression in ``function`` calls, ``self_name`` being ``module``; None if it is not
    known or a module.
    """
    plain = called_function(call, function)
    if plain is not None:
        return Callee(plain)
    places: list[tuple[ast.expr, str]] = [(call.func, "")]
    if isinstance(call.func, ast.Attribute):
        places.append((call.func.value, call.func.attr))
    for place, method in places:
        holder = _attribute(place, self_name, module)
        is_called = isinstance(holder, nn.Module) and not method  # the graph tells its adds apart
        if not is_called and not isinstance(holder, (NoneType, type, FunctionType)):
            found = called_method(type(holder), method)
            if found is not None:
                return Callee(found, holder, method)
    return None


def called_method(receiver: type, method: str) -> FunctionType | None:
    """A method of plain objects of a class, "" if they are called themselves."""
    found = inspect.getattr_static(receiver, method or "__call__", None)
    # super() without arguments asks the first one, which would be another.
    is_plain = isinstance(found, FunctionType) and "__class__" not in found.__code__.co_freevars
    return found if is_plain else None


def _attribute(node: ast.expr, self_name: str | None, module: object) -> object:
    """What ``self.x.y`` is, or None; no property runs."""
    if isinstance(node, ast.Name):
        return module if node.id == self_name else None
    if not isinstance(node, ast.Attribute):
        return None
    holder = _attribute(node.value, self_name, module)
    if isinstance(holder, nn.Module) and node.attr in holder._modules:
        return holder._modules[node.attr]
    return getattr(holder, "__dict__", {}).get(node.attr)


def _value_of(name: str, function: FunctionType) -> object:
    """What a global or closure variable of a function is now."""
    code = function.__code__
    cells = dict(zip(code.co_freevars, function.__closure__ or (), strict=True))
    if name in cells:
        return content_of(cells[name])
    return None if name in code.co_varnames + code.co_cellvars else function.__globals__.get(name)


# ---- expressions that add ----------------------------------------------------------------------


def adds_in(tree: ast.AST, function: FunctionType) -> Iterator[ast.AST]:
    """Every ``a + b``, ``a += b``, ``torch.add(a, b)``, ``a.add(b)``, ``a.add_(b)``; also sub, the
    FUNCTIONS, and sums of a pair.
    """
    unused = {node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        is_call = isinstance(node, ast.Call) and not ast.unparse(node.func).endswith("_")
        if site_arguments(node, function) is not None and not (
            is_call and node in unused
        ):  # set.add(x)
            yield node


Position = tuple[int, int, int, int]


def position_of(node: ast.AST, function: FunctionType) -> Position:
    """Lines, counted from the function's first, and columns."""
    first = function.__code__.co_firstlineno
    line, column, end_line, end_column = (
        getattr(node, name) for name in ("lineno", "col_offset", "end_lineno", "end_col_offset")
    )
    return line - first, column, end_line - first, end_column


FUNCTIONS = ("lerp", "addcmul", "addcdiv", "addmm", "baddbmm")
"""Functions of torch, and methods of tensors, that are sums of more than two arguments."""


def site_arguments(
    node: ast.AST, function: FunctionType
) -> tuple[list[ast.expr], list[ast.keyword]] | None:
    """How the site in an addition's place is called: with its operands, and ``alpha`` third if
    there is one; or with all that one of FUNCTIONS takes, and its name. None: no addition.
    """
    keywords: list[ast.keyword] = []
    operation: ast.operator = ast.Add()
    match node:
        case ast.BinOp(left=left, op=ast.Add() | ast.Sub() as operation, right=right):
            terms = [left, right]
        case ast.AugAssign(target=target, op=ast.Add() | ast.Sub() as operation, value=value):
            loaded = copy.deepcopy(target)
            loaded.ctx = ast.Load()
            terms = [loaded, value]
        case ast.Call(func=ast.Attribute(attr="add" | "add_" | "sub" | "sub_" as name)):
            operation = ast.Add() if name.startswith("add") else ast.Sub()
            terms = _operands(node, function)
        case ast.Call(func=ast.Attribute(attr=name)) if name in FUNCTIONS:
            terms = _positional(node, function)
            keywords = [*node.keywords, ast.keyword("function", ast.Constant(name))]
        case ast.Call():
            terms = _pair(node)
        case _:
            return None
    literals = (ast.List, ast.Tuple, ast.ListComp, ast.JoinedStr, ast.Starred)
    if len(terms) < 2 or any(isinstance(term, literals) for term in terms):
        return None
    if isinstance(operation, ast.Sub):
        terms[1] = ast.UnaryOp(ast.USub(), terms[1])
    return terms, keywords


def _pair(call: ast.Call) -> list[ast.expr]:
    """``a, b`` of ``sum([a, b])``, ``stack([a, b], d).sum(d)``, ``sum(stack([a, b], d), d)``."""
    match call:
        case ast.Call(
            func=ast.Name(id="sum"),
            args=[ast.List(elts=[_, _] as pair) | ast.Tuple(elts=[_, _] as pair)],
            keywords=[],
        ):
            return pair
        case ast.Call(func=ast.Attribute(value=ast.Call() as stack, attr="sum"), args=axes):
            pass
        case ast.Call(func=ast.Attribute(attr="sum"), args=[ast.Call() as stack, *axes]):
            pass
        case _:
            return []
    match stack:
        case ast.Call(
            func=ast.Attribute(attr="stack"),
            args=[ast.List(elts=[_, _] as pair) | ast.Tuple(elts=[_, _] as pair), *places],
        ):
            along = _axis(places, stack.keywords, default="0")
            return pair if along and along == _axis(axes, call.keywords, default="") else []
    return []


def _axis(arguments: list[ast.expr], keywords: list[ast.keyword], default: str) -> str:
    """The text of the only argument, called dim; "" if there are others."""
    given = arguments + [keyword.value for keyword in keywords if keyword.arg == "dim"]
    if len(given) != len(arguments) + len(keywords) or len(given) > 1:
        return ""
    return ast.unparse(given[0]) if given else default


def _operands(call: ast.Call, function: FunctionType) -> list[ast.expr]:
    """Of ``a.add(b, alpha=c)``, ``torch.add(a, other=b)``, ``operator.add(a, b)``; else none."""
    terms = _positional(call, function)
    named = {keyword.arg: keyword.value for keyword in call.keywords}
    for name in ("input", "other"):
        terms += [named.pop(name)] if name in named and len(terms) < 2 else []
    terms += [named.pop("alpha")] if "alpha" in named and len(terms) == 2 else []
    return [] if named or len(terms) > 2 + ("alpha" in {k.arg for k in call.keywords}) else terms


def _positional(call: ast.Call, function: FunctionType) -> list[ast.expr]:
    """The arguments without a name, a method's tensor first; none of another module's function."""
    assert isinstance(call.func, ast.Attribute)
    owner = call.func.value
    holder = _value_of(owner.id, function) if isinstance(owner, ast.Name) else None
    if holder is torch or holder is operator:
        return [*call.args]
    return [] if isinstance(holder, ModuleType) else [owner, *call.args]
