"""Optimizer states from one rank to all: on resume, and when ranks join."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch.optim import Optimizer

from rfcompile.policy import Policyish, as_policy
from rfcompile.process_groups import require_same
from rfcompile.training.packing import pack_state_dict, unpack_state_dict


def broadcast_states(
    optimizer: Optimizer, policy: Policyish = 8, *, src: int = 0, group: Any = None
) -> None:
    """Give every rank the optimizer's state of rank ``src``, in ``policy.optimizer_state``.

    Every rank, ``src`` too, loads what the payload decodes to, so all states are bit-identical
    afterwards. Hyperparameters (learning rates) travel along, exactly. Every rank must call, with
    an optimizer of the same parameters; sharded states (FSDP2) need no broadcast: load them by
    torch.distributed.checkpoint.

    Raises:
        RankMismatchError: ranks use another policy or version; raised on every rank.
        PolicyError, FormatError: the policy is not understood.
    """
    chosen = as_policy(policy)
    group = group if group is not None else dist.group.WORLD
    require_same(group, f"optimizer states {chosen.describe()} src={src}")
    packed = pack_state_dict(optimizer.state_dict(), chosen) if dist.get_rank() == src else None
    box = [packed]
    dist.broadcast_object_list(box, src=src, group=group)
    assert box[0] is not None
    optimizer.load_state_dict(unpack_state_dict(box[0]))
