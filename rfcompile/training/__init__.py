"""Training without residual connections: initialization, temperature, annealing, optimizers."""
