"""Training without residual connections: initialization, temperature, annealing, optimizers."""

from rfcompile.training.folding import fold_mixing

__all__ = ["fold_mixing"]
