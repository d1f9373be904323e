"""Residual connections: how they are found, replaced by modules, and removed."""
