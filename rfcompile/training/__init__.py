"""Training without residual connections: initialization, temperature, annealing, optimizers."""

from rfcompile.training.annealing import SkipAnnealer, finalize
from rfcompile.training.folding import fold_mixing
from rfcompile.training.initialization import Initialization
from rfcompile.training.optimizers import optimizers
from rfcompile.training.temperature import TemperatureRule

__all__ = [
    "Initialization",
    "SkipAnnealer",
    "TemperatureRule",
    "finalize",
    "fold_mixing",
    "optimizers",
]
