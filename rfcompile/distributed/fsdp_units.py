"""The units (parameter groups) of FSDP2, and every private part of FSDP2 that we read.

Private torch symbols used here, tried on torch 2.11 to 2.15:

- ``torch.distributed.fsdp._fully_shard._fsdp_api``: ``AllGather``, ``ReduceScatter`` (the protocol
  of ``FSDPModule.set_custom_all_gather`` and ``set_custom_reduce_scatter``);
- ``..._fsdp_common.TrainingState``;
- ``FSDPModule._get_fsdp_state()._fsdp_param_groups`` (``_fsdp_param_group`` in 2.11);
- of such a group: ``modules``, ``mesh_info.shard_process_group`` and ``replicate_process_group``,
  ``_training_state``, ``all_reduce_grads``, ``_all_gather_comm``, ``_reduce_scatter_comm`` (the
  public setters refuse a module with several groups), and ``fsdp_params``;
- of each of these: ``_module_info.module``, ``.param_name``, ``sharded_param``,
  ``padded_sharded_param_size``.

:func:`units_of` checks that all of them are there. See also ``torch_versions.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_api import AllGather, ReduceScatter
from torch.distributed.fsdp._fully_shard._fsdp_common import TrainingState

from rfcompile.graph.places import without_wrappers_in
from rfcompile.torch_versions import gradient_order, require

__all__ = ["AllGather", "ReduceScatter", "Unit", "units_of"]


@dataclass(frozen=True)
class Unit:
    """Parameters that one all-gather and one reduce-scatter of FSDP carry.

    Args:
        path: of the module that was wrapped, "" for the root.
        label: the path for people, different for each unit.
    """

    path: str
    label: str
    _group: Any = field(repr=False)
    _modules: Mapping[nn.Module, str] = field(repr=False)

    def sizes(self, trainable: bool) -> tuple[tuple[str, int], ...]:
        """Name and elements of a rank's shard, padding included, in the order of the buffers.

        Gradients come only from ``trainable`` parameters, in an order of their own; nothing if
        that order is not known.
        """
        found = []
        params = gradient_order(self._group) if trainable else self._group.fsdp_params
        for p in params:
            if p.sharded_param.requires_grad or not trainable:
                path, name = self._modules[p._module_info.module], p._module_info.param_name
                found.append(
                    (f"{path}.{name}" if path else name, p.padded_sharded_param_size.numel())
                )
        return tuple(found)

    @property
    def in_backward(self) -> bool:
        """FSDP gathers weights for the backward pass now."""
        return bool(self._group._training_state == TrainingState.PRE_BACKWARD)

    @property
    def shard_group(self) -> Any:
        """The process group that the parameters are sharded over, None if they are not."""
        return getattr(self._group.mesh_info, "shard_process_group", None)

    @property
    def replicate_group(self) -> Any:
        """The process group that FSDP all-reduces the gradients of shards over, None if there is
        none."""
        return getattr(self._group.mesh_info, "replicate_process_group", None)

    @property
    def all_reduces(self) -> bool:
        """The next reduce-scatter is followed by an all-reduce."""
        return self.replicate_group is not None and bool(self._group.all_reduce_grads)

    @property
    def comms(self) -> tuple[AllGather, ReduceScatter]:
        return self._group._all_gather_comm, self._group._reduce_scatter_comm

    def set_comms(self, all_gather: AllGather, reduce_scatter: ReduceScatter) -> None:
        """What ``set_custom_all_gather`` and ``set_custom_reduce_scatter`` do, for one group."""
        self._group._all_gather_comm = all_gather
        self._group._reduce_scatter_comm = reduce_scatter


def units_of(root: nn.Module) -> tuple[Unit, ...]:
    """Every unit of ``root`` and of the modules inside, in the order of ``root.modules()``."""
    modules = {module: without_wrappers_in(path) for path, module in root.named_modules()}
    found: dict[int, Unit] = {}
    for module, path in modules.items():
        if not isinstance(module, FSDPModule):
            continue
        groups = _groups_of(module)
        for index, group in enumerate(groups):
            _require_known(group, type(module).__name__)
            label = path or "(root)"
            label += f" group {index}" if len(groups) > 1 else ""
            found.setdefault(id(group), Unit(path, label, group, modules))
    return tuple(found.values())


def _groups_of(module: FSDPModule) -> list[Any]:
    require(module, ["_get_fsdp_state"], type(module).__name__)
    state: Any = module._get_fsdp_state()
    require(state, ["_fsdp_param_groups|_fsdp_param_group"], f"{type(module).__name__}'s state")
    if hasattr(state, "_fsdp_param_groups"):
        return list(state._fsdp_param_groups)
    return [] if state._fsdp_param_group is None else [state._fsdp_param_group]


_GROUP = (
    *("modules", "mesh_info", "_training_state", "all_reduce_grads", "fsdp_params"),
    *("_all_gather_comm", "_reduce_scatter_comm"),
)
_PARAM = ("_module_info", "sharded_param", "padded_sharded_param_size")


def _require_known(group: Any, name: str) -> None:
    """Raise HookError if this torch keeps something elsewhere: not in the middle of a step."""
    require(group, _GROUP, f"the FSDP2 group of {name}")
    for param in group.fsdp_params:
        require(param, _PARAM, f"an FSDP2 parameter of {name}")
        require(param._module_info, ("module", "param_name"), f"an FSDP2 parameter of {name}")
