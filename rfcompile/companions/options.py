"""What users write for the companion methods, read into rewrites."""

from __future__ import annotations

from typing import Any, cast

from rfcompile.companions.polynomial_attention import PolynomialAttention
from rfcompile.companions.token_graying import TokenGraying
from rfcompile.errors import PolicyError


def attention_of(
    attention: str | PolynomialAttention, power: int | None, scale: str | None
) -> PolynomialAttention | None:
    """The rewrite that ``transform(attention=, power=, scale=)`` asks for, if any.

    Raises:
        PolicyError.
    """
    given: dict[str, Any] = {
        name: value for name, value in (("power", power), ("scale", scale)) if value is not None
    }
    if attention == "polynomial":
        return PolynomialAttention(**given)
    if attention != "softmax" and not isinstance(attention, PolynomialAttention):
        rule = "choose 'softmax' (it stays) or 'polynomial', or give a PolynomialAttention."
        raise PolicyError("attention", attention, rule)
    for name, value in given.items():
        raise PolicyError(name, value, "it goes with attention='polynomial' and nothing else.")
    return cast(PolynomialAttention | None, None if attention == "softmax" else attention)


def graying_of(graying: str | TokenGraying | None, epsilon: float | None) -> TokenGraying | None:
    """The rewrite that ``transform(token_graying=, epsilon=)`` asks for, if any.

    Raises:
        PolicyError.
    """
    if isinstance(graying, str):
        return TokenGraying(cast(Any, graying), epsilon)
    if graying is not None and not isinstance(graying, TokenGraying):
        raise PolicyError(
            "token_graying", graying, "choose 'dct' or 'svd', or give a TokenGraying."
        )
    if epsilon is not None:
        raise PolicyError("epsilon", epsilon, "it goes with token_graying='dct' or 'svd'.")
    return graying
