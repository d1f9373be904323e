"""Residual connections: found in a model, put into its sources as modules, taken away."""
