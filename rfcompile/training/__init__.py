"""Training: without residual connections, and with quantized optimizer states."""

from rfcompile.training.annealing import SkipAnnealer, finalize
from rfcompile.training.folding import fold_mixing
from rfcompile.training.initialization import Initialization
from rfcompile.training.optimizers import optimizers
from rfcompile.training.packing import pack_state_dict, unpack_state_dict
from rfcompile.training.quantized_states import QuantizedStates, quantize_states
from rfcompile.training.state_report import packing_report
from rfcompile.training.temperature import TemperatureRule

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
