"""Public names for training scripts: residual-free training, quantized optimizer states."""

from rfcompile.rewrites.residual.annealing import SkipAnnealer, finalize
from rfcompile.rewrites.residual.folding import fold_mixing
from rfcompile.rewrites.residual.initialization import Initialization
from rfcompile.rewrites.residual.report import ResidualReport, residual_report
from rfcompile.rewrites.residual.temperature import TemperatureRule
from rfcompile.states.at_rest import StatesHandle, quantize_states
from rfcompile.states.packing import pack_state_dict, unpack_state_dict
from rfcompile.states.report import packing_report
from rfcompile.training.optimizers import optimizers

__all__ = [
    "Initialization",
    "ResidualReport",
    "SkipAnnealer",
    "StatesHandle",
    "TemperatureRule",
    "finalize",
    "fold_mixing",
    "optimizers",
    "pack_state_dict",
    "packing_report",
    "quantize_states",
    "residual_report",
    "unpack_state_dict",
]
