"""Functions and where their sources add: what rewriting reads before it writes."""

from __future__ import annotations

import ast
import hashlib
import linecache
from collections.abc import Iterator
from functools import lru_cache
from types import CellType, FunctionType, ModuleType

import torch

from rfcompile.errors import SourceError


def definition_of(function: FunctionType) -> ast.FunctionDef:
    """The syntax tree of a function's ``def``.

    Raises:
        SourceError: there is no source, or it is no ``def``.
    """
    code = function.__code__
    text = "".join(linecache.getlines(code.co_filename, function.__globals__))
    for node in _definitions(text):
        if node.name == code.co_name and _first_line(node) == code.co_firstlineno:
            return node
    raise SourceError(
        f"{function.__qualname__} ({code.co_filename}:{code.co_firstlineno}) has no readable "
        "source: define its class in a file, and load it from there unchanged."
    )


@lru_cache(maxsize=64)
def _definitions(text: str) -> tuple[ast.FunctionDef, ...]:
    tree = ast.parse(text)
    return tuple(node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))


def _first_line(node: ast.FunctionDef) -> int:
    return min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])


def digest_of(function: FunctionType) -> str:
    return hashlib.sha256(ast.unparse(definition_of(function)).encode()).hexdigest()[:16]


def wrapped_functions(value: object) -> list[FunctionType]:
    """A function and those that its decorators hold in closures, outermost first."""
    found = [value] if isinstance(value, FunctionType) else []
    for function in found:  # grows while it runs
        held = map(content_of, function.__closure__ or ())
        found += [f for f in held if isinstance(f, FunctionType) and f not in found]
    return found


def content_of(cell: CellType) -> object:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None


def functions_at(cls: type, file: str, line: int) -> tuple[str, FunctionType] | None:
    """The class's function whose ``def`` holds a line, and the attribute it is found by."""
    for name in dir(cls):
        for function in wrapped_functions(getattr(cls, name, None)):
            if function.__code__.co_filename == file:
                node = definition_of(function)
                if node.lineno <= line <= (node.end_lineno or node.lineno):
                    return name, function
    return None


def called_function(call: ast.Call, function: FunctionType) -> FunctionType | None:
    """The plain function that an expression in ``function`` calls by a global or closure name."""
    target, path = call.func, []
    while isinstance(target, ast.Attribute):
        path.append(target.attr)
        target = target.value
    if not isinstance(target, ast.Name):
        return None
    cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    if target.id in cells:
        value = content_of(cells[target.id])
    elif target.id not in function.__code__.co_varnames:
        value = function.__globals__.get(target.id)
    else:
        return None
    for name in reversed(path):
        if not isinstance(value, ModuleType):
            return None
        value = getattr(value, name, None)
    return value if isinstance(value, FunctionType) else None


# ---- expressions that add ----------------------------------------------------------------------


def adds_in(tree: ast.AST, function: FunctionType) -> Iterator[ast.AST]:
    """Every ``a + b``, ``a - b``, ``a += b``, ``torch.add(a, b)``, ``a.add(b)``, ``a.add_(b)``."""
    for node in ast.walk(tree):
        if terms_of(node, function) is not None:
            yield node


def position_of(node: ast.AST) -> tuple[int, int, int, int]:
    return (node.lineno, node.col_offset, node.end_lineno, node.end_col_offset)  # type: ignore[attr-defined]


def terms_of(node: ast.AST, function: FunctionType) -> list[ast.expr] | None:
    """The operands of an add as the site takes them, with ``alpha`` third if there is one."""
    match node:
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return [left, right]
        case ast.BinOp(left=left, op=ast.Sub(), right=right):
            return [left, ast.UnaryOp(ast.USub(), right)]
        case ast.AugAssign(target=ast.Name(id=name), op=ast.Add(), value=value):
            return [ast.Name(name, ast.Load()), value]
        case ast.AugAssign(target=ast.Name(id=name), op=ast.Sub(), value=value):
            return [ast.Name(name, ast.Load()), ast.UnaryOp(ast.USub(), value)]
        case ast.Call(func=ast.Attribute(value=owner, attr="add" | "add_"), args=args):
            is_torch = isinstance(owner, ast.Name) and function.__globals__.get(owner.id) is torch
            terms = [*args] if is_torch else [owner, *args]
            alpha = [k.value for k in node.keywords if k.arg == "alpha"]
            if len(terms) == 2 and len(alpha) == len(node.keywords):
                return terms + alpha
    return None
