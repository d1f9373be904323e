"""Public functions for low-rank adapters: merge, quantize, send, save and load them.

``rf.transform(model, rf.Adapters(8))`` adds adapters to a model. The functions here take such a
model.
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
