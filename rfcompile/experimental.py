"""Methods that our own study does not recommend by default; each says what the study found.

They are complete and tested, and they may change or go. The figures are those of
``benchmarks/companions.md``: small models, three seeds.
"""

from rfcompile.rewrites.attention.rewrite import PolynomialAttention, PolynomialReport
from rfcompile.rewrites.graying.rewrite import GrayingReport, TokenGraying

__all__ = [
    "GrayingReport",
    "PolynomialAttention",
    "PolynomialReport",
    "TokenGraying",
]
