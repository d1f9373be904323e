"""The public function analyze: measures of a model's blocks, activations and attentions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from rfcompile.errors import CaptureError
from rfcompile.graph.boundaries import find_boundaries
from rfcompile.graph.capture import Inputs, buffers_kept, copied, in_mode, inputs_of
from rfcompile.graph.models import check_module, uncompiled, without_wrappers
from rfcompile.graph.modules import Modules
from rfcompile.report.measures import condition_number, excess_kurtosis
from rfcompile.report.table import TableReport, table
from rfcompile.rewrites.attention.matrices import attention_matrices


@dataclass(frozen=True)
class BlockFacts:
    """One block: condition numbers of the tokens that enter (after a graying) and leave it,
    geometric means over samples, and the excess kurtosis of all elements that leave. NaN where
    there are no token matrices, infinite for a singular one.
    """

    module: str
    condition_in: float
    condition_out: float
    kurtosis: float


@dataclass(frozen=True)
class AttentionFacts:
    """One attention: "softmax" or "polynomial", the Frobenius norm of its weights (mean over batch
    and heads), and the bound of softmax's, the square root of the queries.
    """

    module: str
    kind: str
    frobenius: float
    bound: float


@dataclass(frozen=True)
class Analysis(TableReport):
    """What :func:`analyze` measured: ``print`` it, or read its fields."""

    blocks: tuple[BlockFacts, ...]
    attentions: tuple[AttentionFacts, ...]
    notes: tuple[str, ...] = ()

    def lines(self) -> Iterator[str]:
        rows = [["block", "condition in", "out", "excess kurtosis"]]
        for b in self.blocks:
            numbers = (b.condition_in, b.condition_out, b.kurtosis)
            rows.append([b.module, *(f"{x:.4g}" for x in numbers)])
        yield from table(rows)
        if self.attentions:
            rows = [["attention", "weights", "Frobenius", "sqrt(N)"]]
            for a in self.attentions:
                rows.append([a.module, a.kind, f"{a.frobenius:.3g}", f"{a.bound:.3g}"])
            yield from table(rows)
        yield from (f"note: {note}" for note in self.notes)


def analyze(model: nn.Module, *, modules: Modules = "auto", example_inputs: Any = None) -> Analysis:
    """Measure a model's blocks and attentions on the given inputs; ``print`` the result.

    The model runs once in eval mode, and its captured graph once; buffers, modes and random state
    stay as they are.

    Args:
        modules: which modules are blocks, as in :class:`~rfcompile.Wire`.
        example_inputs: a tuple of arguments or an (args, kwargs) pair; left out,
            ``model.dummy_inputs``.

    Raises:
        CaptureError: there are no inputs. BoundaryError: there are no blocks.

    Source: condition numbers of block inputs, arXiv:2505.01996; Frobenius norms against sqrt(N),
    arXiv:2410.18613.
    """
    check_module(model)
    model = uncompiled(model)
    inputs = inputs_of(model, example_inputs)
    with without_wrappers(model):
        blocks = _run(model, find_boundaries(model, modules), inputs)
        notes = [
            f"nothing was measured at {b.module}: it was not called with a tensor"
            for b in blocks
            if math.isnan(b.condition_in) and math.isnan(b.condition_out)
        ]
        attentions: tuple[AttentionFacts, ...] = ()
        try:
            attentions = tuple(
                AttentionFacts(a.module, a.kind, a.frobenius, math.sqrt(a.weights.shape[-2]))
                for a in attention_matrices(model, inputs)
            )
        except CaptureError as error:
            notes.append(f"attentions were not measured: {error}")
    return Analysis(blocks, attentions, tuple(notes))


def _run(
    model: nn.Module, modules: Mapping[str, nn.Module], inputs: Inputs
) -> tuple[BlockFacts, ...]:
    entering: dict[str, Tensor] = {}
    leaving: dict[str, Tensor] = {}

    def enter(path: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any, kwargs: Any) -> None:
            _keep(entering, path, (args, kwargs))

        return hook

    def leave(path: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            _keep(leaving, path, output)

        return hook

    handles = []
    for path, module in modules.items():
        handles.append(module.register_forward_pre_hook(enter(path), with_kwargs=True))
        handles.append(module.register_forward_hook(leave(path)))
    args, kwargs = copied(inputs)
    modes = in_mode(model, training=False)
    try:
        kept = buffers_kept(model)
        eager = torch.compiler.set_stance("force_eager")  # compiled code runs no hooks
        with modes, kept, eager, torch.no_grad(), torch.random.fork_rng():
            model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return tuple(
        BlockFacts(
            path,
            _condition(entering.get(path)),
            _condition(leaving.get(path)),
            excess_kurtosis(leaving[path]) if path in leaving else math.nan,
        )
        for path in modules
    )


def _keep(found: dict[str, Tensor], path: str, value: Any) -> None:
    """The first floating-point tensor, as it is now: it may be changed in place."""
    tensors = (leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor))
    first = next((tensor for tensor in tensors if tensor.is_floating_point()), None)
    if first is not None:
        found[path] = first.detach().clone()


def _condition(x: Tensor | None) -> float:
    return math.nan if x is None or x.dim() < 2 else condition_number(x)
