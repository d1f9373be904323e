"""Optimizer states: quantized at rest, packed in checkpoints, sent to other ranks."""
