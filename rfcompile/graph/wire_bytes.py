"""Counts the bytes that the collectives of a graph send, from the graph's text."""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Iterator, Mapping

from torch.distributed.distributed_c10d import (  # type: ignore[attr-defined]  # not public
    _resolve_process_group,
)

from rfcompile.graph.text import read_statement
from rfcompile.wire.cost import sent_bytes
from rfcompile.wire.foreign import all_registered

BY_SIZE = "rfcompile.by_size.default"
_COLLECTIVES = {
    "all_reduce": "all_reduce",
    "all_gather_into_tensor": "all_gather",
    "reduce_scatter_tensor": "reduce_scatter",
    "all_to_all_single": "all_to_all",
    "broadcast": "broadcast",
}
_SENDS_NOTHING = ("wait_tensor", "_wrap_tensor_autograd")
_GROUP_SIZE = {"all_gather": 1, "reduce_scatter": 2}
"""Place of the argument with the number of ranks; the others have only the group's name, last."""
_TENSOR = re.compile(r"[a-z]+(\d+)\w*\[(.*)\]")


def wire_bytes(text: str) -> int | None:
    """Bytes one rank sends in all functional collectives of a graph text.

    None where a size is symbolic, a process group is not known here, or a collective is none of
    :func:`sent_bytes`, as those of other libraries.
    """
    total = 0
    for sent in sent_by_line(text):
        if sent is None:
            return None
        total += sent
    return total


def sent_by_line(text: str) -> Iterator[int | None]:
    """What each line of a graph text sends, as :func:`wire_bytes` counts it: 0 for most."""
    others = {BY_SIZE, *(str(foreign.op) for foreign in all_registered())}
    types: dict[str, str] = {}
    for line in text.splitlines():
        s = read_statement(line)
        if s is None:
            yield 0
            continue
        types[s.name] = s.type
        namespace, _, op = s.target.partition(".")
        op = op.split(".")[0]
        if s.target in others or any(name in s.arguments for name in others):
            yield None
        elif not namespace.startswith("_c10d_functional") or op in _SENDS_NOTHING:
            yield 0
        else:
            base = op.removesuffix("_").removesuffix("_out").removesuffix("_coalesced")
            yield _sent_by(_COLLECTIVES.get(base), s.arguments, types)


def _sent_by(collective: str | None, arguments: str, types: Mapping[str, str]) -> int | None:
    call = ast.parse(f"f({arguments})", mode="eval").body
    assert isinstance(call, ast.Call)
    if collective is None:
        return None
    names = [node.id for node in ast.walk(call.args[0]) if isinstance(node, ast.Name)]
    sizes = [tensor_bytes(types[name]) for name in names]  # one, or several coalesced
    world_size = _world_size(call.args[_GROUP_SIZE.get(collective, -1)])
    if world_size is None or None in sizes:
        return None
    return sum(sent_bytes(collective, size, world_size) for size in sizes if size is not None)


def tensor_bytes(type_text: str) -> int | None:
    """Bytes of a tensor by its type in a graph text, "f32[4, 8]"; None for other types."""
    match = _TENSOR.fullmatch(type_text)
    sizes = match[2].split(", ") if match and match[2] else []
    if match is None or not all(size.isdigit() for size in sizes):
        return None
    return math.prod(map(int, sizes)) * -(-int(match[1]) // 8)


def _world_size(argument: ast.expr) -> int | None:
    value = argument.value if isinstance(argument, ast.Constant) else None
    if not isinstance(value, str):
        return value if isinstance(value, int) else None
    try:
        group = _resolve_process_group(value)  # type: ignore[arg-type]  # a NewType of str
        return int(group.size())
    except (RuntimeError, ValueError):  # no such group in this process
        return None
