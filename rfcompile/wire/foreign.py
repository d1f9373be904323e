"""Collectives that are operators of other libraries: what each argument of theirs means.

Inference servers call collectives of their own: ``vllm::all_reduce(Tensor tensor, str group_name)``
has no wait, and names its process group in its own way. :func:`register_collective` tells this
package what such an operator does; ``find/collectives.py`` then finds it as it finds torch's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._ops import OpOverload, OpOverloadPacket

from rfcompile.errors import OptionError
from rfcompile.wire.collectives import REDUCTIONS
from rfcompile.wire.process_groups import name_of

KINDS = ("all_reduce", "reduce_scatter", "all_gather")
ToGroup = Callable[[Any], Any]


@dataclass(frozen=True)
class ForeignCollective:
    """What an operator of another library does.

    Args:
        op: the operator; kind: one of :data:`KINDS`; reduce: "sum", "avg" or "".
        sent: name of the argument that is the tensor; group: of the one that names the group.
        dim: the dimension, or the name of the argument that says it.
        mutates: name of the argument that the result is written into, None: the result is returned.
        process_group: the torch process group (or its name) that a group of theirs is; None: their
            name is the name that torch knows.
    """

    op: OpOverload[..., Any]
    kind: str
    reduce: str
    sent: str
    group: str
    dim: int | str
    mutates: str | None
    process_group: ToGroup | None

    @property
    def name(self) -> str:
        """As torch writes it: "vllm::all_reduce"."""
        return str(self.op._schema.name)

    @property
    def text(self) -> str:
        """Equal for two that are the same, in other processes too."""
        to_group = _text_of(self.process_group)
        return (
            f"{self.op._schema} kind={self.kind} reduce={self.reduce} sent={self.sent} "
            f"group={self.group} dim={self.dim} mutates={self.mutates} process_group={to_group}"
        )

    def torch_group(self, theirs: Any) -> str:
        """The name that torch has for a group of theirs; whatever ``process_group`` raises."""
        return name_of(theirs if self.process_group is None else self.process_group(theirs))

    def arguments(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of a call by name, defaults too."""
        schema = self.op._schema.arguments
        defaults = {a.name: a.default_value for a in schema if a.has_default_value()}
        return {**defaults, **dict(zip((a.name for a in schema), args, strict=False)), **kwargs}


_REGISTERED: dict[OpOverload[..., Any], ForeignCollective] = {}


def registered(op: object) -> ForeignCollective | None:
    """What was registered for an operator, None if nothing was."""
    return _REGISTERED.get(op) if isinstance(op, OpOverload) else None


def all_registered() -> tuple[ForeignCollective, ...]:
    """In the order of their names."""
    return tuple(sorted(_REGISTERED.values(), key=lambda foreign: foreign.text))


def registered_text() -> str:
    """Equal on ranks that registered the same; "" where nothing was."""
    return "; ".join(foreign.text for foreign in all_registered())


def register_collective(
    op: Any,
    *,
    kind: str,
    group: str | int,
    reduce: str | None = None,
    dim: int | str = 0,
    mutates: str | None = None,
    process_group: ToGroup | None = None,
) -> None:
    """Let the passes find an operator of another library that is a collective, and quantize it.

    Register in every process, before it compiles. Doing so again with the same facts does nothing.

    Args:
        op: the operator (``torch.ops.vllm.all_reduce``) or its name (``"vllm::all_reduce"``). Its
            first Tensor argument is what it sends, and what it returns (or writes into that
            argument) has the shape that the kind says. It waits for its result.
        kind: "all_reduce", "reduce_scatter" or "all_gather".
        group: name or position of the argument that names the process group.
        reduce: "sum" (also if it is left out) or "avg"; nothing for an all_gather.
        dim: the dimension that an all_gather joins and a reduce_scatter cuts, or the name of the
            argument that says it.
        mutates: name of the argument that the operator changes in place (an all_reduce that returns
            nothing); None: it returns a new tensor.
        process_group: takes what the argument ``group`` holds, and returns the process group of
            torch or its name. None: the argument holds torch's name.

    Raises:
        OptionError: no such operator, kind, argument or reduction; the operator is registered with
            other facts already.
    """
    overload = _overload_of(op)
    if kind not in KINDS:
        raise OptionError("kind", kind, f"use one of {', '.join(map(repr, KINDS))}.")
    arguments = {a.name: str(a.type) for a in overload._schema.arguments}
    foreign = ForeignCollective(
        overload,
        kind,
        _reduction_of(kind, reduce),
        _sent_of(overload, arguments),
        _argument_of(overload, arguments, "group", group),
        _dim_of(overload, arguments, kind, dim),
        mutates,
        process_group,
    )
    _check_result(foreign)
    if process_group is not None and not callable(process_group):
        rule = "give a function from the name of a group to a process group of torch, or None."
        raise OptionError("process_group", process_group, rule)
    before = _REGISTERED.setdefault(overload, foreign)
    if before.text != foreign.text:
        rule = f"it is registered already, otherwise ({before.text}): register it once."
        raise OptionError("op", foreign.text, rule)


def _overload_of(op: Any) -> OpOverload[..., Any]:
    if isinstance(op, str):
        op = _by_name(op)
    if isinstance(op, OpOverloadPacket):
        names = op.overloads()
        if len(names) != 1:
            rule = f"it has the overloads {', '.join(names)}: name one, {op}.{names[0]}."
            raise OptionError("op", op, rule)
        op = getattr(op, names[0])
    if not isinstance(op, OpOverload):
        rule = "give an operator (torch.ops.vllm.all_reduce) or its name ('vllm::all_reduce')."
        raise OptionError("op", op, rule)
    return op


def _by_name(name: str) -> Any:
    namespace, _, rest = name.partition("::")
    found: Any = getattr(torch.ops, namespace) if namespace.isidentifier() else None
    for part in rest.split("."):
        found = getattr(found, part, None) if part else None
    if found is None:
        rule = "no operator has this name here: import the module that defines it first."
        raise OptionError("op", name, rule)
    return found


def _argument_of(
    op: OpOverload[..., Any], arguments: Mapping[str, str], option: str, value: object
) -> str:
    names = list(arguments)
    if type(value) is int and 0 <= value < len(names):
        return names[value]
    if value not in names:
        rule = f"{op._schema.name} has the arguments {', '.join(names)}: name one of them."
        raise OptionError(option, value, rule)
    return str(value)


def _sent_of(op: OpOverload[..., Any], arguments: Mapping[str, str]) -> str:
    tensors = [name for name, kind in arguments.items() if kind == "Tensor"]
    if not tensors:
        raise OptionError("op", str(op._schema), "a collective has an argument of type Tensor.")
    return tensors[0]


def _reduction_of(kind: str, reduce: str | None) -> str:
    if kind == "all_gather":
        if reduce is not None:
            raise OptionError("reduce", reduce, "an all_gather reduces nothing: leave it out.")
        return ""
    if reduce not in (None, *REDUCTIONS):
        rule = f"rounded values can be reduced by {' and '.join(map(repr, REDUCTIONS))} only."
        raise OptionError("reduce", reduce, f"{rule} Do not register other reductions.")
    return reduce or "sum"


def _dim_of(
    op: OpOverload[..., Any], arguments: Mapping[str, str], kind: str, dim: object
) -> int | str:
    if kind == "all_reduce":
        if dim != 0:
            raise OptionError("dim", dim, "an all_reduce has no dimension: leave it out.")
        return 0
    return dim if type(dim) is int else _argument_of(op, arguments, "dim", dim)


def _check_result(foreign: ForeignCollective) -> None:
    schema = foreign.op._schema
    written = [a.name for a in schema.arguments if a.alias_info and a.alias_info.is_write]
    if written != ([] if foreign.mutates is None else [foreign.mutates]):
        changed = ", ".join(written) or "no argument"
        rule = f"{schema.name} changes {changed} in place, as its schema says: name just that."
        raise OptionError("mutates", foreign.mutates, rule)
    if foreign.mutates is None and [str(r.type) for r in schema.returns] != ["Tensor"]:
        raise OptionError("op", str(schema), "a collective returns one Tensor.")
    if foreign.mutates is not None and (
        foreign.kind != "all_reduce" or foreign.mutates != foreign.sent or schema.returns
    ):
        rule = (
            "in place is only an all_reduce that writes into the tensor it sends and returns "
            "nothing. Register the form of the operator that returns its result."
        )
        raise OptionError("mutates", foreign.mutates, rule)


def _text_of(function: ToGroup | None) -> str:
    if function is None:
        return "None"
    name = f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', '')}"
    code = getattr(function, "__code__", None)
    return name if code is None else f"{name}:{code.co_firstlineno}"
