"""Adapters of low rank, with a sine or without: added, trained, quantized, sent, stored.

``rf.transform(model, rf.Adapters(8))`` adds them; here is what comes after.
"""

from rfcompile.rewrites.adapters.exchange import broadcast_adapters as broadcast
from rfcompile.rewrites.adapters.linear import AdaptedLinear
from rfcompile.rewrites.adapters.quantize import QuantizedReport
from rfcompile.rewrites.adapters.quantize import quantize_adapters as quantize
from rfcompile.rewrites.adapters.rewrite import AdapterReport
from rfcompile.rewrites.adapters.rewrite import merge_adapters as merge
from rfcompile.rewrites.adapters.storage import load_adapters as load
from rfcompile.rewrites.adapters.storage import save_adapters as save

__all__ = [
    "AdaptedLinear",
    "AdapterReport",
    "QuantizedReport",
    "broadcast",
    "load",
    "merge",
    "quantize",
    "save",
]
