"""Methods that stand beside residual-free training: each an option of ``rfcompile.transform``."""

from rfcompile.companions.polynomial_attention import PolynomialAttention, PolynomialReport
from rfcompile.companions.token_graying import GrayingReport, TokenGraying

__all__ = ["GrayingReport", "PolynomialAttention", "PolynomialReport", "TokenGraying"]
