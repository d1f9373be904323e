"""The device of these tests: a GPU, or for a dry run the CPU.

Every test runs on ``device``, so each has two forms. On a GPU it is marked ``gpu``. On the CPU it
is marked ``slow`` and shows that its own lines work: whoever has a GPU at last finds no typing
error. What a CPU has not (streams, CUDA graphs) is left out there by the helpers of ``on_gpu.py``.
"""

from __future__ import annotations

import os

import pytest
import torch

# So that asking whether there is a GPU does not start CUDA: the ranks are forked.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")


@pytest.fixture(
    params=[
        pytest.param("cuda", marks=pytest.mark.gpu),
        pytest.param("cpu", marks=pytest.mark.slow, id="dry_run"),
    ]
)
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)
