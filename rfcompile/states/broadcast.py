"""broadcast_states: sends optimizer states from one rank to all ranks."""

from __future__ import annotations

import pickle
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from rfcompile.errors import StateError
from rfcompile.report.report import Report
from rfcompile.states.at_rest import takes_packed
from rfcompile.states.composite import parts_of
from rfcompile.states.packing import pack_state_dict, unpack_state_dict
from rfcompile.states.report import report_of
from rfcompile.states.sharded_payloads import is_sharded
from rfcompile.wire.policy import Policy, Policyish, as_policy
from rfcompile.wire.process_groups import check_source, require_same, transport
from rfcompile.wire.together import resolved, together

_SITE = "broadcast_states"
SENT = "broadcast"
"""The direction of its sites in a report."""


def broadcast_states(
    optimizer: Optimizer,
    policy: Policyish = 8,
    group: Any = None,
    *,
    src: int = 0,
) -> Report:
    """Give every rank the optimizer's state of rank ``src``, in ``policy.optimizer_state``.

    Every rank, ``src`` too, loads what the payload decodes to, so all states are bit-identical
    afterwards. Hyperparameters (learning rates) travel along, exactly, and so does what is no
    moment; see :func:`~rfcompile.training.quantize_states`. Every rank must call, with an optimizer
    of the same parameters; sharded states (FSDP2) need no broadcast: load them by
    torch.distributed.checkpoint.

    Args:
        src: a rank of the group.

    Returns:
        A line a state: the bytes before and after, or why it travels exactly; the same everywhere.

    Raises:
        On every rank, naming the one that met it: HookError: it is no optimizer. StateError: its
        states are sharded, do not fit, or cannot be pickled. PolicyError, FormatError: the policy
        or ``src`` is not understood. NonFiniteError: as the format asks for. RankMismatchError:
        ranks use another policy, ``src``, version, or optimizers of another class (below wrappers)
        or of other parameters. PeerError: another rank failed otherwise. TransportError: a rank
        died, or did not answer in time. Until all ranks have the state, nothing is changed on any.
    """
    used = resolved(group, _SITE)
    chosen, plan = together(used, _SITE, lambda: _prepared(optimizer, policy, src, used))
    require_same(used, plan)
    parameters = _parameters(optimizer)
    is_source = used.rank() == src

    def to_send() -> tuple[dict[str, Any], list[bytes | None]]:
        if not is_source:
            return {}, [None]
        packed = _packed(optimizer, chosen, parameters)
        return packed, [_pickled(packed) if used.size() > 1 else None]

    packed, box = together(used, _SITE, to_send)
    if used.size() > 1:
        with transport(used, _SITE):
            dist.broadcast_object_list(box, group=used, group_src=src)

    def received() -> tuple[dict[str, Any], dict[str, Any]]:
        sent = packed if is_source else pickle.loads(box[0] or b"")
        return sent, _to_load(optimizer, sent, parameters)

    sent, state = together(used, _SITE, received)
    together(used, _SITE, lambda: optimizer.load_state_dict(state))
    return report_of(chosen, sent, SENT)


def _prepared(optimizer: Optimizer, policy: Policyish, src: int, group: Any) -> tuple[Policy, str]:
    """The policy, and what must be the same on all ranks."""
    chosen = as_policy(policy)
    check_source(src, group.size())
    kinds = ", ".join(_class_name(type(part)) for part in parts_of(optimizer)[0])
    parameters = _parameters(optimizer)
    if any(map(is_sharded, parameters)):
        raise StateError(
            "the states are sharded: every rank has its own part, and a broadcast would mix them",
            [type(optimizer).__name__],
            "Save and load them with torch.distributed.checkpoint.",
        )
    shapes = str([(tuple(p.shape), str(p.dtype)) for p in parameters])
    described = (
        f"{len(parameters)} parameters of {sum(p.numel() for p in parameters)} elements "
        f"in {len(optimizer.param_groups)} groups (shapes {zlib.crc32(shapes.encode()):08x})"
    )
    return chosen, f"optimizer states of {kinds}, {chosen.describe()} src={src}, {described}"


def _class_name(kind: type) -> str:
    """Without the module of a script, which has another name in processes that it starts."""
    is_script = kind.__module__ in ("__main__", "__mp_main__")
    return kind.__qualname__ if is_script else f"{kind.__module__}.{kind.__qualname__}"


def _packed(optimizer: Optimizer, policy: Policy, parameters: list[Tensor]) -> dict[str, Any]:
    """What the source sends: in host memory, as the other ranks have other devices."""
    packed = pack_state_dict(optimizer.state_dict(), policy, parameters)
    sent: dict[str, Any] = _in_host_memory(packed)
    return sent


def _pickled(sent: Mapping[str, Any]) -> bytes:
    """What travels; made before anyone waits for it.

    Raises:
        StateError: something in it cannot be pickled.
    """
    try:
        return pickle.dumps(sent)
    except MemoryError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise StateError(
            "what cannot be pickled cannot be sent",
            [name for name, value in _entries(sent) if not _is_picklable(value)],
            f"Remove it from the optimizer of the source. {reason}",
        ) from error


def _entries(sent: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for index, state in sent["state"].items():
        entries = state.items() if isinstance(state, Mapping) else [("", state)]
        yield from ((f"state {key!r} of parameter {index}", value) for key, value in entries)
    for index, group in enumerate(sent["param_groups"]):
        yield from ((f"{key!r} of parameter group {index}", value) for key, value in group.items())
    yield from ((key, sent[key]) for key in sent if key not in ("state", "param_groups"))


def _is_picklable(value: Any) -> bool:
    try:
        pickle.dumps(value)
    except Exception:
        return False
    return True


def _in_host_memory(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.cpu()
    if isinstance(value, dict):
        return {key: _in_host_memory(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(_in_host_memory, value))
    return value


def _to_load(
    optimizer: Optimizer, sent: Mapping[str, Any], parameters: list[Tensor]
) -> dict[str, Any]:
    """What this rank loads: payloads as they are if it keeps such, else decoded.

    Tensors among the hyperparameters (``lr``) go where this rank has its own.
    """
    state = dict(sent) if takes_packed(optimizer) else unpack_state_dict(sent, parameters)
    groups = [
        {
            key: value.to(old.device)
            if isinstance(value, Tensor) and isinstance(old := own.get(key), Tensor)
            else value
            for key, value in group.items()
        }
        for group, own in zip(sent["param_groups"], optimizer.param_groups, strict=True)
    ]
    return {**state, "param_groups": groups}


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
