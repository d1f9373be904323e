"""The graph rewrites, one in each file, and the pipelines that run them in order."""

if __name__ != "rfcompile.passes":
    # A second copy under another name would hold other objects than the first: its rewrites
    # would silently match nothing.
    raise ImportError(f"passes/ was imported as {__name__!r}; import it as 'rfcompile.passes'")

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch

from rfcompile.find.origins import Origin
from rfcompile.graph.pipeline import GraphPass
from rfcompile.passes.find_residuals import FindResiduals
from rfcompile.passes.merge_collectives import MergeCollectives
from rfcompile.passes.quantize_boundaries import QuantizeBoundaries
from rfcompile.passes.quantize_collectives import QuantizeCollectives
from rfcompile.passes.quantize_transfers import QuantizeTransfers
from rfcompile.wire.policy import Policy


def wire_pipeline(
    policy: Policy,
    direction: str,
    parameters: frozenset[str] | None = frozenset(),
    decompositions: Mapping[Any, Callable[..., Any]] | None = None,
    *,
    merge: bool = True,
    saved: Mapping[str, Origin] | None = None,
    device: torch.device | None = None,
) -> tuple[GraphPass, ...]:
    """The passes on a forward, backward or joint graph: merge, then quantize what is left.

    ``saved``: what the forward graph returned (``Statistics.returned``), for its backward graph.
    ``device``: where the graph is to run, if not where its tensors are.
    """
    known, origins = decompositions or {}, saved or {}
    return (
        *([MergeCollectives(direction, policy, parameters, origins)] if merge else []),
        QuantizeCollectives(policy, direction, parameters, known, origins, device),
        QuantizeTransfers(policy, direction, known, origins),
    )


def boundary_pipeline(
    policy: Policy, boundaries: Literal["auto"] | tuple[str, ...] = "auto"
) -> tuple[GraphPass, ...]:
    """The passes on a graph without collectives: a fake wire at each boundary."""
    return (QuantizeBoundaries(policy, boundaries),)


def residual_pipeline() -> tuple[GraphPass, ...]:
    """The analysis of a forward graph: where it adds what it skipped."""
    return (FindResiduals(),)
