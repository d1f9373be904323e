"""The differences between torch 2.11 and 2.15 that matter here; no other file knows them.

Each difference is told apart by what the installed torch has, not by its number.

==================  =======  ===========================================  ==========================
what                changed  how                                          told apart by
==================  =======  ===========================================  ==========================
order of FSDP2's    2.15     an FSDP2 unit packs gradients by their       the group has
gradients                    dtype; before, in the order of parameters    ``_reduce_scatter_param_
                                                                          indices``
reduction of FSDP2  2.15     without ``reduce_dtype`` gradients reduce    no need: FSDP2 says dtype
                             in the parameter's dtype, not in             and reduction in each call
                             ``param_dtype``; float32 and bfloat16
                             then ask for "avg", not for "sum"
outputs of a        2.15     ``_forward_chunk_states[i].live_outputs``;   the stage has
pipeline stage               before, ``fwd_cache[i][0]``                  ``_forward_chunk_states``
shapes of a stage   2.13     ``_stage_meta.outputs``; 2.11 checks them    the stage has
                             itself                                       ``_stage_meta``
waits of a batch    2.15     Dynamo joins the waits of one                the graph has
                             ``batch_isend_irecv``, torch those of        ``wait_tensors``
                             coalesced collectives, into one
                             ``wait_tensors``
ranks in graphs     2.14     ``isend``, ``irecv`` and ``batch_p2p_ops``   ``isend_inplace`` does not
                             hold ranks of the group; before, global      require ``dst``
                             ranks
reductions          2.15     ``reduce_op`` may be a ``ReduceOp``; before, its type
                             a text
names of gather     2.13     ``dist.all_gather_into_tensor`` and           it has the new names
and reduce-scatter           ``dist.reduce_scatter_tensor`` are
                             deprecated for ``all_gather_single`` and
                             ``reduce_scatter_single``
captured graphs     2.15     Dynamo empties a graph whose backend         no need: ``find.py`` keeps
                             raises                                       a copy
decorators          2.15     torch renames the code of what               no need: ``owner.py``
                             ``torch.no_grad()`` makes of a function, so  skips decorators without a
                             the source has no function of that name      source
==================  =======  ===========================================  ==========================

Private torch symbols used here: those of the table, and ``_functional_collectives.isend_inplace``.
"""

from __future__ import annotations

import inspect
import operator
import warnings
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import fx
from torch.distributed import _functional_collectives

from rfcompile.errors import HookError, RFCompileWarning

TRIED = ("2.11", "2.13", "2.14", "2.15")
"""The versions that tests or types were checked with; docs/limits.md says what on which."""


def warn_if_untried() -> None:
    """Warn once in a process that this torch is newer than all that were tried.

    The doors that read private parts of torch call it: a new version may have changed those.
    """
    _warn_if_untried(torch.__version__)


@cache
def _warn_if_untried(installed: str) -> None:
    newest = max(_release(version) for version in TRIED)
    if _release(installed) > newest:
        warnings.warn(
            f"torch {installed} is newer than those that rfcompile was tried with "
            f"({', '.join(TRIED)}). It reads private parts of torch: compare a step with an exact "
            "one, or install a torch that was tried.",
            RFCompileWarning,
            stacklevel=4,
        )


def _release(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def require(thing: object, names: Sequence[str], what: str) -> None:
    """Check that a private part of torch has what is read of it later.

    Args:
        thing: an object of torch; names: its attributes, ``"a|b"`` for one of two.
        what: what the error calls it.

    Raises:
        HookError: it lacks one of them; the error names the versions of torch.
    """
    missing = [name for name in names if not any(hasattr(thing, n) for n in name.split("|"))]
    if missing:
        rule = (
            f"in torch {torch.__version__} it has no {', no '.join(missing)}. rfcompile was tried "
            f"with torch {', '.join(TRIED)}: install one of these."
        )
        raise HookError(what, rule)


all_gather_single: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
"""``torch.distributed.all_gather_into_tensor`` under the name that is not deprecated."""

reduce_scatter_single: Any = (
    getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
)
"""``torch.distributed.reduce_scatter_tensor`` under the name that is not deprecated."""


# ---- FSDP2 -------------------------------------------------------------------------------------


def gradient_order(group: Any) -> list[Any]:
    """The parameters of an FSDP2 group in the order in which their gradients lie in its buffer.

    Empty if that is not known.
    """
    params = list(group.fsdp_params)
    order = getattr(group, "_reduce_scatter_param_indices", None)
    if order is None:
        return params
    return [params[i] for i in order] if sorted(order) == list(range(len(params))) else []


# ---- pipelines ---------------------------------------------------------------------------------

STAGE_OUTPUTS = "_forward_chunk_states|fwd_cache"
"""Where a stage keeps its outputs, for :func:`require`."""


def stage_outputs(stage: Any, chunk: int) -> Sequence[Any]:
    """What a pipeline stage computed for micro-batch ``chunk``, before its sends are waited for."""
    states = getattr(stage, "_forward_chunk_states", None)
    outputs: Sequence[Any] = (
        stage.fwd_cache[chunk][0] if states is None else states[chunk].live_outputs
    )
    return outputs


def promised_outputs(stage: Any) -> Sequence[Any]:
    """Shapes and dtypes that the next stage expects, empty where torch compares them itself."""
    return getattr(getattr(stage, "_stage_meta", None), "outputs", None) or ()


# ---- graphs ------------------------------------------------------------------------------------


def is_joined_wait(node: fx.Node) -> bool:
    """It waits for several tensors at once."""
    target: Any = node.target
    return (
        node.op == "call_function"
        and getattr(target, "namespace", "") == "_c10d_functional"
        and target._opname == "wait_tensors"
    )


def split_joined_waits(graph: fx.Graph) -> None:
    """Put a ``wait_tensor`` for each tensor in the place of every ``wait_tensors``."""
    wait = torch.ops._c10d_functional.wait_tensor.default
    for node in filter(is_joined_wait, list(graph.nodes)):
        parts = []
        for tensor in node.args[0]:
            with graph.inserting_before(node):
                part = graph.call_function(wait, (tensor,))
            part.meta = {**node.meta, "val": tensor.meta.get("val")}
            parts.append(part)
        for user in list(node.users):
            if user.target is operator.getitem:
                user.replace_all_uses_with(parts[user.args[1]])
                graph.erase_node(user)
        if not node.users:
            graph.erase_node(node)


@cache
def _peers_are_local() -> bool:
    write: Any = getattr(_functional_collectives, "isend_inplace", None)
    parameters = inspect.signature(write).parameters if write else {}
    return "dst" not in parameters or parameters["dst"].default is not inspect.Parameter.empty


def global_rank(peer: int, group: Any) -> int:
    """The rank in the default group that a send or receive in a graph of ``group`` names."""
    return int(dist.get_global_rank(group, peer)) if _peers_are_local() else peer


def reduction_name(op: object) -> str:
    """ "sum", "avg", ..., of what a collective in a graph has as its reduction."""
    if isinstance(op, str):
        return op.lower()
    kind: Any = getattr(op, "op", op)  # a ReduceOp holds one, a RedOpType is one
    return str(getattr(kind, "name", kind)).lower()
