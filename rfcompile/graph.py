"""THE text form of an fx graph, and where a node comes from: what diffs and reports are made of."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import sympy
import torch
from torch import fx

_SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)

# ---- the text ------------------------------------------------------------------------------


def graph_text(gm: fx.GraphModule) -> str:
    """One statement a line: two traces of the same program give the same text.

    ::

        x_1: f32[s0, 8]
        weight: f32[8] = self.weight
        add: f32[s0, 8] = aten.add.Tensor(x_1, weight, alpha=2)
        relu: f32[s0, 8] = Tensor.relu(add)
        return (relu,)

    Names come from the operator and count up in order of appearance; placeholders keep their
    target. Symbolic sizes are renumbered the same way. A name is defined once in a text, also when
    graphs are nested: a GraphModule that a node refers to follows the main graph, indented, under
    ``self.path.to.it:``. The type is that of ``meta["val"]``, or of ``meta["example_value"]``.
    """
    return "\n".join(_Printer().lines(gm, "self", ""))


class _Printer:
    def __init__(self) -> None:
        self.names: dict[fx.Node, str] = {}
        self.counts: dict[str, int] = {}
        self.symbols: dict[sympy.Symbol, sympy.Symbol] = {}

    def lines(self, gm: fx.GraphModule, path: str, indent: str) -> Iterator[str]:
        for node in gm.graph.find_nodes(op="placeholder"):  # they have the first claim to a name
            self.names[node] = self.free_name(self.placeholder_name(node))
        nested: dict[str, fx.GraphModule] = {}
        for node in gm.graph.nodes:
            yield indent + self.statement(node)
            if node.op in ("get_attr", "call_module"):
                owned = _resolve(gm, node.target)
                if isinstance(owned, fx.GraphModule):
                    nested[f"{path}.{node.target}"] = owned
        for inner_path, inner in nested.items():
            yield f"{indent}{inner_path}:"
            yield from self.lines(inner, inner_path, indent + "    ")

    def statement(self, node: fx.Node) -> str:
        if node.op == "output":
            return f"return {self.argument(node.args[0])}"
        kind = self.type_of(_value_of(node))
        if node.op == "placeholder":
            return f"{self.names[node]}: {kind}" if kind else self.names[node]
        arguments = [self.argument(arg) for arg in node.args]
        arguments += [f"{key}={self.argument(value)}" for key, value in node.kwargs.items()]
        target = target_text(node)
        self.names[node] = self.free_name(_operator_name(node))
        call = target if node.op == "get_attr" else f"{target}({', '.join(arguments)})"
        return f"{self.names[node]}: {kind} = {call}" if kind else f"{self.names[node]} = {call}"

    def placeholder_name(self, node: fx.Node) -> str:
        value = _value_of(node)
        kind = self.type_of(value)  # numbers the symbols, in order
        if isinstance(value, torch.SymInt) and node.target == str(value):
            return kind[4:-1]  # Dynamo named the input after the symbol
        return str(node.target)

    def free_name(self, base: str) -> str:
        name = base = re.sub(r"\W", "_", base)
        while name in self.counts:
            self.counts[base] += 1
            name = f"{base}_{self.counts[base]}"
        self.counts[name] = 0
        return name

    def type_of(self, value: object) -> str:
        """The short type of a fake value, "" for what has none."""
        if isinstance(value, torch.Tensor):
            sizes = ", ".join(self.argument(size) for size in value.shape)
            return f"{dtype_text(value.dtype)}[{sizes}]"
        if isinstance(value, _SYMBOLIC):
            return f"Sym({self.symbolic(value)})"
        if isinstance(value, (bool, int, float)):
            return type(value).__name__
        if isinstance(value, (tuple, list)):
            return _sequence(value, [self.type_of(item) or "None" for item in value])
        return ""

    def argument(self, value: Any) -> str:
        if isinstance(value, fx.Node):
            return self.names[value]
        if isinstance(value, (tuple, list)):
            return _sequence(value, [self.argument(item) for item in value])
        if isinstance(value, dict):
            items = (f"{key!r}: {self.argument(item)}" for key, item in value.items())
            return "{" + ", ".join(items) + "}"
        if isinstance(value, slice):
            parts = (value.start, value.stop, value.step)
            return f"slice({', '.join(self.argument(part) for part in parts)})"
        if isinstance(value, _SYMBOLIC):
            return self.symbolic(value)
        if isinstance(value, torch.Tensor):
            return self.type_of(value)
        if isinstance(value, torch.device):
            return repr(str(value))
        if isinstance(value, torch.nn.Module):
            return type(value).__name__
        if isinstance(value, torch._ops.OperatorBase):
            return _function_text(value)
        if isinstance(value, str):
            return repr(value)
        return " ".join(re.sub(r" at 0x[0-9a-f]+", "", repr(value)).split())

    def symbolic(self, value: torch.SymInt | torch.SymFloat | torch.SymBool) -> str:
        expr = getattr(value.node, "expr", None)
        if not isinstance(expr, sympy.Basic):
            return str(value)
        for symbol in sorted(expr.free_symbols, key=str):
            if symbol not in self.symbols:
                prefix = str(symbol).rstrip("0123456789")  # s: a size, u: unbacked, zf: a float
                number = sum(str(s).rstrip("0123456789") == prefix for s in self.symbols)
                # Same assumptions, else sympy would order a sum differently.
                self.symbols[symbol] = sympy.Symbol(f"{prefix}{number}", **symbol.assumptions0)
        return str(expr.xreplace(self.symbols))


def _value_of(node: fx.Node) -> object:
    return node.meta.get("val", node.meta.get("example_value"))


def target_text(node: fx.Node) -> str:
    """What a node calls or reads: "aten.add.Tensor", "operator.add", "Tensor.view", "self.lin"."""
    if node.op == "call_method":
        return f"Tensor.{node.target}"
    return f"self.{node.target}" if isinstance(node.target, str) else _function_text(node.target)


def dtype_text(dtype: torch.dtype) -> str:
    """Short name of a dtype; its first number is its bits: f32, bf16, i64, u8, b8, f8e4m3fn."""
    text = str(dtype).removeprefix("torch.").replace("bool", "b8").replace("_", "")
    return re.sub(r"float|uint|int|complex", lambda match: match[0][0], text)


def _function_text(function: Any) -> str:
    if isinstance(function, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        return str(function)
    name = getattr(function, "__name__", type(function).__name__)
    if isinstance(function, torch._ops.HigherOrderOperator):
        return f"higher_order.{name}"
    owner = "torch.Tensor" if hasattr(function, "__objclass__") else "torch"
    module = getattr(function, "__module__", None) or owner
    return name if module == "builtins" else f"{module.removeprefix('_')}.{name}"


def _operator_name(node: fx.Node) -> str:
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.name.split("::")[1]
    return str(node.target) if isinstance(node.target, str) else target_text(node).split(".")[-1]


def _sequence(value: tuple[Any, ...] | list[Any], items: list[str]) -> str:
    text = ", ".join(items)
    if isinstance(value, list):
        return f"[{text}]"
    return f"({text},)" if len(items) == 1 else f"({text})"


def _resolve(owner: Any, path: Any) -> Any:
    for name in str(path).split("."):
        owner = getattr(owner, name, None)
    return owner


# ---- reading a text ------------------------------------------------------------------------

_STATEMENT = re.compile(r"\s*(\w+)(?:: (.+?))?(?: = ([\w.<>]+)(?:\((.*)\))?)?")


class Statement(NamedTuple):
    """``name: type = target(arguments)``; a part that a line does not have is ""."""

    name: str
    type: str
    target: str
    arguments: str
    is_call: bool


def read_statement(line: str) -> Statement | None:
    """A line of a graph text; None for ``return`` and for the head of a nested graph."""
    match = _STATEMENT.fullmatch(line)
    if match is None:
        return None
    name, kind, target, arguments = match.groups("")
    return Statement(name, kind, target, arguments, match[4] is not None)


def read_statements(text: str) -> Iterator[Statement]:
    return filter(None, map(read_statement, text.splitlines()))


# ---- where a node comes from -----------------------------------------------------------------

_FRAME = re.compile(r'File "([^"]+)", line (\d+)')
_PARTIAL = re.compile(r"^L\[['\"]fn['\"]\]\.(?:func|args\[\d+\]|keywords\[['\"]\w+['\"]\])")
"""A functools.partial that was compiled, up to what it holds."""
_ROOT = re.compile(r"^(?:[LG]\[['\"][^'\"]*['\"]\]|L__self__)")
_ITEM = re.compile(r"(?:\._modules)?\[['\"]?([^\]'\"]*)['\"]?\]")
WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
"""Where torch.compile, activation checkpointing and FSDP1 keep the module that they wrap."""
_INSIDE_FUNCTION = (
    r"\.(?:__closure__\.\d+\.cell_contents|__(?:kw)?defaults__\.\w+|__func__|__wrapped__"
    r"|_torchdynamo_inline|_torchdynamo_orig_callable)"
)
_INSIDE_PARTIAL = r"\.(?:func|args\.\d+|keywords\.\w+)"
_OWNER = re.compile(rf"(?:\.[^.]+)?(?:{_INSIDE_FUNCTION}|{_INSIDE_PARTIAL})*\.__self__(?=\.|$)")
"""A bound method, or what is wrapped around one, up to the module that it is a method of."""
_HELD = re.compile(
    rf"^(?:{_INSIDE_FUNCTION})+"
    rf"|\.forward(?:{_INSIDE_FUNCTION}|{_INSIDE_PARTIAL})+"
    rf"|(?:\.[^.]+)(?:{_INSIDE_FUNCTION})+"
)
"""A function that was put on a module, up to the module that it holds: taken for the same."""


def frames_of(node: fx.Node) -> list[tuple[str, int]]:
    """File and line of each frame a node was traced in, outermost first."""
    found = _FRAME.findall(node.meta.get("stack_trace") or "")
    return [(file, int(line)) for file, line in found]


def source_of(node: fx.Node) -> str:
    """The user's line a node was traced from, as "file.py:12"; "" when unknown.

    That is the innermost frame outside torch and this package. The path is relative to the
    working directory if the file lies below it; an installed or distant file keeps two components.
    A backward node carries the line of its forward.
    """
    for file, line in reversed(frames_of(node)):
        if not file.startswith("<") and not _is_internal(file):
            return f"{short_path(file)}:{line}"
    return ""


def module_of(node: fx.Node) -> str:
    """Dotted path of the module a node was traced in, as ``named_modules`` of the outermost
    traced module writes it; "" for that module itself and when unknown.

    A backward node gives the module of its forward. Wrappers (``_orig_mod`` and the like) are
    left out.
    """
    calls = module_calls(node)
    return calls[-1].path if calls else ""


class ModuleCall(NamedTuple):
    """A call of a module: its path, its class as "package.module.Class", which call it is."""

    path: str
    cls: str
    number: str


def module_calls(node: fx.Node) -> tuple[ModuleCall, ...]:
    """The calls that a node was traced in, outermost first; paths as in :func:`module_of`."""
    stack = node.meta.get("nn_module_stack") or node.meta.get("fwd_nn_module_stack") or {}
    return tuple(
        ModuleCall(
            _module_path(path),
            cls if isinstance(cls, str) else f"{cls.__module__}.{cls.__qualname__}",
            str(key).partition("@")[2],  # "layers.0@1" is the second call
        )
        for key, (path, cls) in stack.items()
    )


def _module_path(path: str) -> str:
    """The path in a name that Dynamo gave to a module: how it got from what it compiles to there.

    Where a module's forward was replaced (compiled, bound, wrapped by a function or a partial), it
    leads through that function:
    ``L['self'].layers.0.forward.__closure__[0].cell_contents.__self__`` is layers.0.
    """
    path = _ITEM.sub(r".\1", _ROOT.sub("", _PARTIAL.sub("", path))).replace(".__dict__", "")
    return without_wrappers_in(_HELD.sub("", _OWNER.sub("", path)))


def without_wrappers_in(path: str) -> str:
    """A module's path as the user wrote it: without the modules that torch wraps around others."""
    return ".".join(part for part in path.split(".") if part and part not in WRAPPERS)


@lru_cache(maxsize=4096)
def _is_internal(file: str) -> bool:
    here = Path(__file__).parent
    homes = (Path(torch.__file__).parent, here, (here / "passes").resolve())
    return any(Path(file).is_relative_to(home) for home in homes)


def short_path(file: str) -> str:
    """A file as reports name it; see :func:`source_of`."""
    path = Path(file)
    if path.is_relative_to(Path.cwd()) and "site-packages" not in path.parts:
        return path.relative_to(Path.cwd()).as_posix()
    return Path(*path.parts[-2:]).as_posix()
