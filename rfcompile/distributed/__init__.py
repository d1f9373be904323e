"""Quantized traffic that is in no graph: gradients of DistributedDataParallel, optimizer states."""

from rfcompile.distributed.ddp import DDPHandle, quantize_ddp
from rfcompile.distributed.optimizer_state import broadcast_states

__all__ = ["DDPHandle", "broadcast_states", "quantize_ddp"]
