"""Methods that our own study does not recommend by default.

They are complete and tested, and they may change or go.

The study (``benchmarks/companions.md``; small models, three seeds) found:

- :class:`PolynomialAttention` costs 0.11 to 0.14 nats on Shakespeare. On the digits it is at parity
  with skips, and far better than softmax without (95.2 against 77.8 %). In its linear form it takes
  0.3 of the time of fused attention at 8,192 tokens and head width 16, 1.2 at width 64.
- :class:`TokenGraying` lowers the condition number of what the first block reads. No gain in
  accuracy is beyond the spread.
"""

from rfcompile.rewrites.attention.rewrite import PolynomialAttention, PolynomialReport
from rfcompile.rewrites.graying.rewrite import GrayingReport, TokenGraying

__all__ = [
    "GrayingReport",
    "PolynomialAttention",
    "PolynomialReport",
    "TokenGraying",
]
