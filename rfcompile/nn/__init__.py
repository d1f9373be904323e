"""Operators and modules that rewritten models contain."""
