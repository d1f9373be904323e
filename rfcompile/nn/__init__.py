"""Operators and modules that stand in rewritten models."""
