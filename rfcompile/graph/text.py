"""The text form of an fx graph, written and read, which diffs and reports are made of."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import sympy
import torch
from torch import fx

from rfcompile.codec.formats import dtype_text

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
        for node in gm.graph.nodes:
            yield indent + self.statement(node)
        for target, inner in nested_graphs(gm).items():
            yield f"{indent}{path}.{target}:"
            yield from self.lines(inner, f"{path}.{target}", indent + "    ")

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


def nested_graphs(gm: fx.GraphModule) -> dict[str, fx.GraphModule]:
    """The GraphModules that nodes of a graph refer to, by target, in the order of the text."""
    targets = [str(n.target) for n in gm.graph.nodes if n.op in ("get_attr", "call_module")]
    owned = {target: _resolve(gm, target) for target in targets}
    return {target: inner for target, inner in owned.items() if isinstance(inner, fx.GraphModule)}


def _value_of(node: fx.Node) -> object:
    return node.meta.get("val", node.meta.get("example_value"))


def target_text(node: fx.Node) -> str:
    """What a node calls or reads: "aten.add.Tensor", "operator.add", "Tensor.view", "self.lin"."""
    if node.op == "call_method":
        return f"Tensor.{node.target}"
    return f"self.{node.target}" if isinstance(node.target, str) else _function_text(node.target)


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
