"""Weights of low rank with a sine, fitted to those of a model or drawn anew."""
