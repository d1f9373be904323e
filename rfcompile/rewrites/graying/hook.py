"""The hook that grays a module's tokens: finds the tokens and the padding in its arguments."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from rfcompile.errors import GrayingError, ShapeError
from rfcompile.nn.graying import gray_tokens
from rfcompile.nn.polynomial import is_masked

PADDING = ("attention_mask", "src_key_padding_mask", "key_padding_mask", "padding_mask")
"""Arguments that say which tokens are padding; other masks are about pairs of tokens."""


class TokenHook:
    """Forward pre-hook, with keywords: gray the module's tokens, its first argument.

    They are ``[batch, tokens, features]``, or ``[tokens, batch, features]`` where torch's own
    attention inside says ``batch_first=False``. Every argument that is the same tensor changes.

    Padding is what an argument of a name in :data:`PADDING` hides from all: ``[batch, tokens]``
    (bool or integer, 0 hides; torch's ``key_padding_mask``: True or a masked score hides), or
    ``[batch, heads, queries, tokens]`` (False, the integer 0 or a masked score hides).

    Raises:
        ShapeError, GrayingError: the tokens or the mask are something else, or the module is called
        with ``is_causal=True``.
    """

    def __init__(self, module: str, form: str, epsilon: float, names: tuple[str, ...]) -> None:
        self.module, self.form, self.epsilon, self.names = module, form, epsilon, names
        self.watcher: Callable[[Tensor, Tensor], None] | None = None

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        given = dict(zip(self.names, args, strict=False)) | kwargs
        tokens = args[0] if args else next(iter(given.values()), None)
        if self.names and self.names[0] in given:
            tokens = given[self.names[0]]
        if not isinstance(tokens, Tensor) or tokens.dim() not in (2, 3):
            shape = tuple(tokens.shape) if isinstance(tokens, Tensor) else ()
            raise ShapeError(
                f"the first argument of {self.module} ({type(tokens).__name__})",
                shape,
                "Token Graying takes [batch, tokens, features] there: name other modules, "
                "TokenGraying(modules=('path', ...)).",
            )
        if given.get("is_causal") is True:
            raise GrayingError(
                f"{self.module} is called with is_causal=True: graying mixes the tokens of a "
                "sequence, so that each would know those after it. Call it without, or transform "
                "the model without TokenGraying."
            )
        is_turned = tokens.dim() == 3 and _has_batch_second(module)
        x = tokens.transpose(0, 1) if is_turned else tokens
        visible = _visible(self.module, given, x)
        new = gray_tokens(x, visible, self.epsilon, self.form)
        if self.watcher is not None:
            self.watcher(x, new)
        if is_turned:
            new = new.transpose(0, 1)
        return (
            tuple(new if arg is tokens else arg for arg in args),
            {name: new if arg is tokens else arg for name, arg in kwargs.items()},
        )

    @staticmethod
    def remove_all(model: nn.Module) -> None:
        for module in model.modules():
            for key, hook in list(module._forward_pre_hooks.items()):
                if isinstance(hook, TokenHook):
                    del module._forward_pre_hooks[key]
                    module._forward_pre_hooks_with_kwargs.pop(key, None)


def _has_batch_second(module: nn.Module) -> bool:
    attentions = [m for m in module.modules() if isinstance(m, nn.MultiheadAttention)]
    return bool(attentions) and not attentions[0].batch_first


def _visible(module: str, given: Mapping[str, Any], x: Tensor) -> Tensor | None:
    """The tokens that no mask hides, ``[batch, tokens]`` as the tokens are; None: no mask."""
    total = None
    for name in PADDING:
        mask = given.get(name)
        if isinstance(mask, Tensor):
            seen = _seen(f"{name} of {module}", mask, x, hides="padding" in name)
            total = seen if total is None else total & seen
    return total


def _seen(what: str, mask: Tensor, x: Tensor, *, hides: bool) -> Tensor:
    wanted = x.shape[:-1]
    if mask.dim() == 4:
        seen = ~is_masked(mask) if mask.dtype.is_floating_point else mask != 0
        seen = seen.any(2).any(1)
    elif mask.dtype.is_floating_point and hides:
        seen = ~is_masked(mask)
    elif mask.dtype.is_floating_point:
        raise GrayingError(
            f"{what} is {mask.dtype} of shape {tuple(mask.shape)}: give bool or integers, 0 where "
            "a token is padding."
        )
    else:
        seen = ~mask if hides else mask != 0
    if seen.dim() != len(wanted) or any(
        a not in (1, b) for a, b in zip(seen.shape, wanted, strict=True)
    ):
        raise ShapeError(
            f"the mask {what}",
            mask.shape,
            f"for tokens {tuple(x.shape)} give [batch, tokens] or [batch, heads, queries, tokens].",
        )
    return seen.expand(wanted)
