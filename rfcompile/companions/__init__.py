"""Methods that stand beside residual-free training: options of ``rfcompile.transform``."""

from rfcompile.companions.adapted_linear import AdaptedLinear
from rfcompile.companions.adapter_exchange import broadcast_adapters
from rfcompile.companions.adapter_storage import load_adapters, save_adapters
from rfcompile.companions.adapters import AdapterReport, Adapters, add_adapters, merge_adapters
from rfcompile.companions.low_rank import LowRankReport, Rank
from rfcompile.companions.low_rank_linear import LowRankLinear, merge_low_rank
from rfcompile.companions.polynomial_attention import PolynomialAttention, PolynomialReport
from rfcompile.companions.quantized_adapters import QuantizedReport, quantize_adapters
from rfcompile.companions.ranks import effective_ranks, stable_rank_bounds
from rfcompile.companions.token_graying import GrayingReport, TokenGraying

__all__ = [
    "AdaptedLinear",
    "AdapterReport",
    "Adapters",
    "GrayingReport",
    "LowRankLinear",
    "LowRankReport",
    "PolynomialAttention",
    "PolynomialReport",
    "QuantizedReport",
    "Rank",
    "TokenGraying",
    "add_adapters",
    "broadcast_adapters",
    "effective_ranks",
    "load_adapters",
    "merge_adapters",
    "merge_low_rank",
    "quantize_adapters",
    "save_adapters",
    "stable_rank_bounds",
]
