"""Low-rank adapters, with a sine or without: how they are added, quantized, sent, stored."""
