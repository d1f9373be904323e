"""Quantized traffic that is in no graph: DDP gradients, pipeline stages, optimizer states."""

from rfcompile.distributed.ddp import DDPHandle, quantize_ddp
from rfcompile.distributed.optimizer_state import broadcast_states
from rfcompile.distributed.pipeline_stage import QuantizedPipelineStage, quantize_pipeline_stage
from rfcompile.distributed.splitting import split_at_boundaries

__all__ = [
    "DDPHandle",
    "QuantizedPipelineStage",
    "broadcast_states",
    "quantize_ddp",
    "quantize_pipeline_stage",
    "split_at_boundaries",
]
