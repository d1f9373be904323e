"""Derivatives of the package's operators, and an error where an operator has none.

``torch.library.register_autograd`` gives an operator a gradient, but no forward-mode formula. So
the tangent of an input would be lost, and a derivative would be zero without a warning. The
functions here pass a tangent straight through, or raise an error.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch._ops import OpOverload

from rfcompile.codec.on_use import defining
from rfcompile.errors import DerivativeError


class Library(torch.library.Library):
    """The operators of a namespace. One with a gradient refuses tangents, unless its name is in
    ``straight_through``: then the tangent of its first argument passes through it as it is.
    """

    def __init__(self, namespace: str) -> None:
        super().__init__(namespace, "FRAGMENT")  # type: ignore[no-untyped-call]
        self.straight_through: set[str] = set()

    def define(self, schema: str, alias_analysis: str = "", *, tags: Any = ()) -> Any:
        with defining():
            return super().define(schema, alias_analysis, tags=tags)  # type: ignore[no-untyped-call]

    def impl(
        self, op_name: Any, fn: Any, dispatch_key: str = "", *, with_keyset: bool = False, **kw: Any
    ) -> None:
        if dispatch_key == "Autograd":
            is_straight = str(op_name) in self.straight_through
            fn = _with_tangents(f"{self.ns}.{op_name}", fn, is_straight)
        super().impl(op_name, fn, dispatch_key, with_keyset=with_keyset, **kw)  # type: ignore[no-untyped-call]


def _with_tangents(name: str, kernel: Callable[..., Tensor], is_straight: bool) -> Any:
    """The kernel of a gradient, and what becomes of tangents."""

    def derived(keyset: Any, *args: Any, **kwargs: Any) -> Tensor:
        if is_straight:
            primal, tangent = forward_ad.unpack_dual(args[0])
            if tangent is not None:
                value = kernel(keyset, primal, *args[1:], **kwargs)
                dual: Tensor = forward_ad.make_dual(value, tangent)
                return dual
        else:
            refuse_tangents(name, *args)
        try:
            return kernel(keyset, *args, **kwargs)
        except RuntimeError as error:
            if "functorch" not in str(error):
                raise
            rule = "use torch.autograd.grad, or transform a module in place of its graph."
            raise DerivativeError(name, "gradient inside torch.func (grad, vjp)", rule) from error

    return derived


def has_tangent(*values: Any) -> bool:
    """Some tensor is the dual number of a forward-mode derivative."""
    for value in values:
        if isinstance(value, Tensor) and forward_ad.unpack_dual(value).tangent is not None:
            return True
    return False


def _is_dual(*values: Any) -> bool:
    try:
        return has_tangent(*values)
    except RuntimeError:  # inside vmap; the tangent, if any, is one of a transform around it
        return False


def refuse_tangents(name: str, *values: Any) -> None:
    """Let no tangent be lost.

    Raises:
        DerivativeError: some tensor has one.
    """
    if has_tangent(*values):
        raise _no_tangents(name)


def _no_tangents(name: str) -> DerivativeError:
    rule = "take a derivative in reverse mode (torch.autograd.grad, torch.func.jacrev)."
    return DerivativeError(name, "forward-mode derivative (jvp, jacfwd, dual numbers)", rule)


def differentiable(
    library: Library,
    op: OpOverload[..., Tensor],
    setup_context: Callable[..., None],
    backward: Callable[..., Any],
    *,
    straight_through: bool = False,
) -> Callable[..., Tensor]:
    """Give an operator its gradient; what is returned calls it and knows ``torch.func`` too.

    Args:
        setup_context, backward: as in ``torch.library.register_autograd``.
        straight_through: the tangent of the first argument passes as it is; else it is refused.
    """
    name = f"{op.namespace}.{op._opname}"
    if straight_through:
        library.straight_through.add(op._opname)
    torch.library.register_autograd(op, backward, setup_context=setup_context, lib=library)

    def forward(*args: Any) -> Tensor:
        return op(*args)

    def jvp(ctx: Any, tangent: Tensor | None, *_: Any) -> Tensor | None:
        if not straight_through:
            raise _no_tangents(name)
        return None if tangent is None else tangent.clone()

    parts: dict[str, Callable[..., Any]] = {
        "forward": forward,
        "setup_context": setup_context,
        "backward": backward,
        "jvp": jvp,
    }
    members: dict[str, Any] = {key: staticmethod(part) for key, part in parts.items()}
    members["generate_vmap_rule"] = True
    function: Any = type(f"{op._opname}_function", (torch.autograd.Function,), members)

    def call(*args: Any) -> Tensor:
        if torch.compiler.is_compiling() or _is_dual(*args):
            return op(*args)
        result: Tensor = function.apply(*args)
        return result

    return call
