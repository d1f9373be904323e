"""Attention: what its linears do, its matrices, and a power in place of softmax."""
