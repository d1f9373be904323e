"""Hooks for traffic that is in no graph: DDP, FSDP2, pipeline stages, optimizer states."""

from rfcompile.distributed.ddp import DDPHandle, quantize_ddp
from rfcompile.distributed.fsdp import FSDPHandle, quantize_fsdp
from rfcompile.distributed.pipeline_stage import QuantizedPipelineStage, quantize_pipeline_stage
from rfcompile.distributed.splitting import split_at_boundaries
from rfcompile.states.broadcast import broadcast_states

__all__ = [
    "DDPHandle",
    "FSDPHandle",
    "QuantizedPipelineStage",
    "broadcast_states",
    "quantize_ddp",
    "quantize_fsdp",
    "quantize_pipeline_stage",
    "split_at_boundaries",
]
