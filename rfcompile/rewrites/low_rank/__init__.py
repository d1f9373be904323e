"""Weights of low rank with a sine, fitted to the weights of a model or drawn anew."""
