"""Adapters of low rank, with a sine or without: added, quantized, sent, stored."""
