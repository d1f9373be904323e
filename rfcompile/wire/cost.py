"""Counts the bytes that a collective sends; every count in this package comes from here."""

from __future__ import annotations


def sent_bytes(collective: str, input_bytes: int, world_size: int) -> int:
    """Bytes one rank sends, by the algorithm that sends least (ring, pairwise).

    With ``n`` input bytes a rank and ``W`` ranks, rounded up:

    ============== ==================
    collective     sent
    ============== ==================
    all_reduce     ``2 (W - 1) / W n``
    all_gather     ``(W - 1) n``
    reduce_scatter ``(W - 1) / W n``
    all_to_all     ``(W - 1) / W n``
    broadcast      ``n``
    ============== ==================

    A group of one sends nothing. In a broadcast every rank hands the ``n`` bytes on to the next;
    that the last one does not is left out.

    Args:
        collective: a name of the table.
        input_bytes: bytes of a rank's input tensor; a SymInt or sympy expression is fine.
        world_size: ranks in the process group.
    """
    others = world_size - 1
    parts = {  # in units of n / W
        "all_reduce": 2 * others,
        "all_gather": others * world_size,
        "reduce_scatter": others,
        "all_to_all": others,
        "broadcast": world_size if others else 0,
    }[collective]
    return -(-input_bytes * parts // world_size)
