"""Stands in for vLLM where a page of the documentation imports it: the same names and operators.

It has what the page uses and no more. Groups are process groups of torch with vLLM's names.
"""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch._inductor.custom_graph_pass import CustomGraphPass

from tests import foreign

_OPERATORS = torch.library.Library("vllm", "FRAGMENT")


class Worker:
    """Its groups exist when it loads the model."""

    def load_model(self, *, load_dummy_weights: bool = False) -> str:
        return "loaded"


def install() -> Any:
    """From now on ``vllm`` can be imported in this process; what this returns ends it."""
    foreign.GROUPS["tp:0"] = dist.group.WORLD
    tensor_parallel = SimpleNamespace(unique_name="tp:0", device_group=dist.group.WORLD)
    names: dict[str, dict[str, Any]] = {
        "vllm.compilation.passes.inductor_pass": {"InductorPass": CustomGraphPass},
        "vllm.distributed.parallel_state": {
            "_groups": {"tp:0": lambda: tensor_parallel},
            "get_tp_group": lambda: tensor_parallel,
        },
        "vllm.v1.worker.gpu_worker": {"Worker": Worker},
    }
    modules: dict[str, ModuleType] = {}
    for path, found in names.items():
        parts = path.split(".")
        for end in range(1, len(parts) + 1):
            name = ".".join(parts[:end])
            modules.setdefault(name, ModuleType(name))
            if end > 1:
                setattr(modules[".".join(parts[: end - 1])], parts[end - 1], modules[name])
        vars(modules[path]).update(found)
    if not hasattr(torch.ops.vllm, "all_reduce"):
        foreign.define(_OPERATORS, foreign.all_reduce, foreign.same_shape)
        foreign.define(_OPERATORS, foreign.all_gather, foreign.gathered_shape)
        foreign.define(_OPERATORS, foreign.reduce_scatter, foreign.scattered_shape)
    installed = patch.dict(sys.modules, modules)
    installed.start()
    return installed
