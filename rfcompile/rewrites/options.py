"""What users write for the companion methods, read into rewrites."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

from rfcompile.errors import PolicyError
from rfcompile.rewrites.adapters.rewrite import Adapters
from rfcompile.rewrites.attention.rewrite import PolynomialAttention
from rfcompile.rewrites.graying.rewrite import TokenGraying
from rfcompile.rewrites.low_rank.rewrite import Rank
from rfcompile.rewrites.low_rank.targets import Modules


def attention_of(
    attention: str | PolynomialAttention, power: int | None, scale: str | None
) -> list[PolynomialAttention]:
    """The rewrites that ``transform(attention=, power=, scale=)`` asks for.

    Raises:
        PolicyError.
    """
    given: dict[str, Any] = {
        name: value for name, value in (("power", power), ("scale", scale)) if value is not None
    }
    if attention == "polynomial":
        return [PolynomialAttention(**given)]
    if attention != "softmax" and not isinstance(attention, PolynomialAttention):
        rule = "choose 'softmax' (it stays) or 'polynomial', or give a PolynomialAttention."
        raise PolicyError("attention", attention, rule)
    for name, value in given.items():
        raise PolicyError(name, value, "it goes with attention='polynomial' and nothing else.")
    return [attention] if isinstance(attention, PolynomialAttention) else []


def graying_of(graying: str | TokenGraying | None, epsilon: float | None) -> list[TokenGraying]:
    """The rewrites that ``transform(token_graying=, epsilon=)`` asks for.

    Raises:
        PolicyError.
    """
    if isinstance(graying, str):
        return [TokenGraying(cast(Any, graying), epsilon)]
    if graying is not None and not isinstance(graying, TokenGraying):
        raise PolicyError(
            "token_graying", graying, "choose 'dct' or 'svd', or give a TokenGraying."
        )
    if epsilon is not None:
        raise PolicyError("epsilon", epsilon, "it goes with token_graying='dct' or 'svd'.")
    return [] if graying is None else [graying]


def linears_of(
    low_rank: int | Rank | None, adapters: int | Adapters | None, modules: Modules | None
) -> list[Rank | Adapters]:
    """The rewrites that ``transform(low_rank=, adapters=, modules=)`` asks for.

    Raises:
        PolicyError.
    """
    if modules is not None and (low_rank is None) == (adapters is None):
        rule = "give it with one of low_rank and adapters, or to each: Rank(8, modules=...)."
        raise PolicyError("modules", modules, rule)
    changes: list[Rank | Adapters] = []
    if low_rank is not None:
        changes.append(low_rank if isinstance(low_rank, Rank) else Rank(low_rank))
    if adapters is not None:
        changes.append(adapters if isinstance(adapters, Adapters) else Adapters(adapters))
    return [c if modules is None else replace(c, modules=modules) for c in changes]
