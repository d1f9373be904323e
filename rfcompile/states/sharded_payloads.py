"""Packed states of sharded parameters in a state_dict: all ranks' payloads in one DTensor.

Each rank's payload is a row of bytes: 64 with its root and its format, which may differ between
ranks (:func:`rfcompile.states.packing.pack`), then the payload, then zeros up to the length of
the largest shard's. The rows are a DTensor uint8 ``[ranks
along each sharded dimension of the mesh (1 where it replicates), ..., bytes]``, so that
torch.distributed.checkpoint stores every rank's row and gives each rank its own back. A mesh of
another size has another shape and is an error.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from rfcompile.codec.formats import QuantFormat
from rfcompile.errors import StateError

IN_ROWS = 0
"""The ``root`` of a packed state whose payload is in rows."""
_HEADER = 64


def largest_shard(x: DTensor) -> int:
    """Elements of the largest shard of ``x``: the same number on every rank, without a message."""
    sizes = list(x.shape)
    for dim, placement in enumerate(x.placements):
        if not placement.is_replicate():
            place = placement.dim  # type: ignore[attr-defined]
            sizes[place] = -(-sizes[place] // x.device_mesh.size(dim))
    return math.prod(sizes)


def to_rows(packed: dict[str, Any], like: DTensor) -> dict[str, Any]:
    """This rank's packed state as a row of all ranks'; ``like``: its parameter, or the state."""
    payload: Tensor = packed["payload"]
    common = _common(packed["format"])
    text = packed["format"].encode()
    header = bytes([packed["root"], len(text)]) + text
    row = payload.new_zeros(_HEADER + common.row_bytes(largest_shard(like)))
    row[: len(header)] = torch.tensor(list(header), dtype=torch.uint8)
    row[_HEADER : _HEADER + len(payload)] = payload
    mesh = like.device_mesh
    placements = [
        Replicate() if placement.is_replicate() else Shard(dim)
        for dim, placement in enumerate(like.placements)
    ]
    rows = DTensor.from_local(row.view(*[1] * mesh.ndim, -1), mesh, placements, run_check=False)
    shared = {"format": common.spec, "shape": list(like.shape), "root": IN_ROWS}
    return {**packed, "payload": rows, **shared}


def _common(spec: str) -> QuantFormat:
    """What of a format all ranks share, and what the length of a payload depends on."""
    fmt = QuantFormat.parse(spec)
    return QuantFormat(fmt.bits, fmt.group_size, grid="mid-tread")


def from_rows(packed: dict[str, Any], like: Tensor | None, name: str) -> dict[str, Any]:
    """What :func:`to_rows` was given, out of the rows of all ranks, or of this rank's.

    Raises:
        StateError: ``like``, the parameter, is not sharded as it was when the state was saved.
    """
    payload: Tensor = packed["payload"]
    if not isinstance(like, DTensor):
        raise StateError(
            "a packed state of a sharded parameter, which needs that parameter to be decoded",
            [name],
            "Load it into the sharded optimizer, or give unpack_state_dict its parameters.",
        )
    mesh = like.device_mesh
    is_sharded = [not placement.is_replicate() for placement in like.placements]
    grid = [mesh.size(dim) if cut else 1 for dim, cut in enumerate(is_sharded)]
    fmt = QuantFormat.parse(packed["format"])
    wanted = [*grid, _HEADER + fmt.row_bytes(largest_shard(like))]
    if list(payload.shape) != wanted or packed["shape"] != list(like.shape):
        saved = "x".join(map(str, payload.shape[:-1]))
        raise StateError(
            "a packed state that was saved on another number of ranks, or for another parameter",
            [name],
            f"It is of shape {packed['shape']} on {saved} ranks, the parameter of shape "
            f"{list(like.shape)} on {'x'.join(map(str, grid))}. Load it on as many ranks, or save "
            "decoded states (packed_state_dict=False), which any number of ranks can load.",
        )
    if isinstance(payload, DTensor):
        row = payload.to_local().reshape(-1)
    else:
        coordinate = mesh.get_coordinate() or [0] * mesh.ndim
        cuts = zip(coordinate, is_sharded, strict=True)
        row = payload[tuple(at if cut else 0 for at, cut in cuts)]
    local = like.to_local()
    if len(row) != wanted[-1]:  # a DTensor that is not sharded by rows
        raise StateError(
            "a packed state whose rows lie elsewhere",
            [name],
            "Keep the placements of what state_dict returned.",
        )
    size = fmt.row_bytes(local.numel())
    return {
        "payload": row[_HEADER : _HEADER + size].clone(),
        "format": bytes(row[2 : 2 + int(row[1])].tolist()).decode("ascii", "replace"),
        "shape": list(local.shape),
        "dtype": packed["dtype"],
        "root": int(row[0]),
    }


def is_in_rows(packed: dict[str, Any]) -> bool:
    return type(packed["root"]) is int and packed["root"] == IN_ROWS


def is_sharded(x: object) -> bool:
    """A DTensor of which ranks hold different parts."""
    return isinstance(x, DTensor) and not all(p.is_replicate() for p in x.placements)
