"""Training: without residual connections, and with quantized optimizer states."""

from rfcompile.rewrites.residual.annealing import SkipAnnealer, finalize
from rfcompile.rewrites.residual.folding import fold_mixing
from rfcompile.rewrites.residual.initialization import Initialization
from rfcompile.rewrites.residual.temperature import TemperatureRule
from rfcompile.states.at_rest import QuantizedStates, quantize_states
from rfcompile.states.packing import pack_state_dict, unpack_state_dict
from rfcompile.states.report import packing_report
from rfcompile.training.optimizers import optimizers

__all__ = [
    "Initialization",
    "QuantizedStates",
    "SkipAnnealer",
    "TemperatureRule",
    "finalize",
    "fold_mixing",
    "optimizers",
    "pack_state_dict",
    "packing_report",
    "quantize_states",
    "unpack_state_dict",
]
