"""Quantized traffic that is in no graph: gradients of DistributedDataParallel."""

from rfcompile.distributed.ddp import DDPHandle, quantize_ddp

__all__ = ["DDPHandle", "quantize_ddp"]
