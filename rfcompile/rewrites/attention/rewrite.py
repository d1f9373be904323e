"""PolynomialAttention: the rewrite that replaces softmax by a power of the scores."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import get_args

import torch
from torch import fx, nn

from rfcompile.errors import AttentionError, CaptureError, OptionError
from rfcompile.find.attention_cores import SOFTMAX, cores_of
from rfcompile.find.dataflow import operator_name
from rfcompile.graph.capture import Inputs, flat_graph, in_mode
from rfcompile.graph.models import without_nested_tensors, without_wrappers
from rfcompile.graph.pipeline import run
from rfcompile.graph.places import module_of
from rfcompile.nn.attention_operators import GAIN
from rfcompile.nn.multihead import PolynomialMultiheadAttention, become_polynomial
from rfcompile.nn.polynomial import Form, Scale
from rfcompile.passes.replace_softmax import ReplacedAttention, ReplaceSoftmax
from rfcompile.report.table import TableReport, table
from rfcompile.rewrites.attention.forward import PolynomialForward
from rfcompile.rewrites.attention.matrices import AttentionMatrix, attention_matrices


@dataclass(frozen=True)
class PolynomialAttention:
    """Attention weights ``A_ij = c_i s_ij^p`` in place of ``softmax(s)_ij``.

    Verdict of our study (``benchmarks/companions.md``): it costs 0.11 to 0.14 nats on Shakespeare;
    on the digits it is at parity with skips and far better than softmax without.

    ``s = Q K^T / sqrt(head)`` (or what the model scales by) plus any finite bias; a masked score
    contributes zero, a row without keys is zeros. With ``N`` keys, ``n_i`` of them visible in row
    ``i``:

    - "sequence": ``c_i = 1 / sqrt(N)``, the paper's. N changes with the input's length, so a model
      that generates with a cache computes something else than the one that was trained.
    - "row": ``c_i = 1 / sqrt(n_i (2p - 1)!!)``: rows have the expected squared L2 norm 1 for scores
      of N(0, 1). For causal models: what a token gets does not depend on later ones.
    - "learned": that times a parameter ``attention_gain`` of shape (1,) a module. It starts where
      the weights have the Frobenius norm that the softmax had on the example inputs (in a graph,
      which does not run: at 1): the power makes small scores vanish and large ones explode.

    Args:
        power: p, 1 to 8. Odd powers keep the sign of the scores: weights are then negative too.
        form: "quadratic" in blocks, or "linear" in N for powers 1 and 2 without a mask or with a
            causal one; "auto" takes what multiplies less. The numbers differ by rounding.

    Frobenius norm of the weights: softmax's is at most sqrt(N). These have no bound; for scores of
    N(0, 1) the expected square is N with "row", and N (2p - 1)!! with "sequence".

    Source: arXiv:2410.18613 (x^p / sqrt(N)). Counting visible keys, the factor (2p - 1)!!, the gain
    and zero for a masked score are ours.
    """

    power: int = 3
    scale: Scale = "row"
    form: Form = "auto"

    def __post_init__(self) -> None:
        if isinstance(self.power, bool) or self.power not in range(1, 9):
            raise OptionError("power", self.power, "give a whole number from 1 to 8.")
        if self.scale not in get_args(Scale):
            raise OptionError("scale", self.scale, "choose 'sequence', 'row' or 'learned'.")
        if self.form not in get_args(Form):
            raise OptionError("form", self.form, "choose 'auto', 'quadratic' or 'linear'.")
        if self.form == "linear" and self.power > 2:
            raise OptionError("form", self.form, "only powers 1 and 2 have a linear form.")

    @property
    def keeps_parameters(self) -> bool:
        return True

    def on_module(self, model: nn.Module, inputs: Callable[[], Inputs]) -> PolynomialReport:
        """Rewrite ``model`` in place: each attention's module computes in a mode of its own.

        The graph says where attentions are, as for :meth:`on_graph`. Only a module runs, so only
        here the norms are measured and the rewrite is checked to change nothing else.

        Raises:
            AttentionError: there is no attention, or one is out of reach. CaptureError.
        """
        with without_wrappers(model):
            example = inputs()
            before = attention_matrices(model, example)
            places = [a for a in before if a.kind == "softmax"]
            if not places:
                raise AttentionError(_why_none(model, before))
            others = _softmaxes(model, example) - Counter(a.module for a in places)
            for path in dict.fromkeys(a.module for a in places):
                self._install(model.get_submodule(path))
            without_nested_tensors(model, lambda m: isinstance(m, PolynomialMultiheadAttention))
            after = attention_matrices(model, inputs())
            left = [a for a in after if a.kind == "softmax"]
            if left or _softmaxes(model, inputs()) != others or len(after) != len(before):
                raise AttentionError(_why_left(left, places), left)
            _check_training(model, inputs())
            if self.scale == "learned":
                _match(model, places, after)
                after = attention_matrices(model, inputs())
        pairs = zip(before, after, strict=True)
        rows = tuple(Frobenius.of(old, new) for old, new in pairs if old.kind == "softmax")
        replaced = tuple(ReplacedAttention(a.module, a.source, a.spelling) for a in places)
        return PolynomialReport(self.power, self.scale, replaced, rows)

    def _install(self, module: nn.Module) -> None:
        if self.scale == "learned" and not hasattr(module, GAIN):
            like = next(module.parameters(), torch.empty(0))
            module.register_parameter(GAIN, nn.Parameter(torch.ones(1, device=like.device)))
        if isinstance(module, nn.MultiheadAttention):
            become_polynomial(module, self.power, self.scale, self.form)
        else:
            forward = PolynomialForward(module, self.power, self.scale, self.form)
            module.forward = forward

    def on_graph(self, gm: fx.GraphModule) -> PolynomialReport:
        """Rewrite a graph in place.

        Raises:
            AttentionError: it has no attention.
        """
        facts = run(gm, [ReplaceSoftmax(self.power, self.scale, self.form)]).facts
        replaced = tuple(fact for fact in facts if isinstance(fact, ReplacedAttention))
        if not replaced:
            raise AttentionError(
                "the graph has no softmax attention, fused or between two products: rewrite the "
                "graph that torch.export gives, not a later one."
            )
        note = "a graph: not run, so no norms; transform the module for those"
        return PolynomialReport(self.power, self.scale, replaced, notes=(note,))


@torch.no_grad()
def _match(
    model: nn.Module, before: Sequence[AttentionMatrix], after: Sequence[AttentionMatrix]
) -> None:
    """Set each module's gain by the norms of its first attention."""
    norms = {a.module: a.frobenius for a in reversed(after)}
    for old in {a.module: a for a in reversed(before)}.values():
        ratio = old.frobenius / norms[old.module] if norms[old.module] else math.nan
        if math.isfinite(ratio):
            getattr(model.get_submodule(old.module), GAIN).mul_(ratio)


def _softmaxes(model: nn.Module, inputs: Inputs) -> Counter[str]:
    """How many softmaxes and fused attentions each module has, attention or not."""
    with torch.no_grad(), in_mode(model, training=False):
        graph = flat_graph(model, inputs).graph
    names = SOFTMAX | {"scaled_dot_product_attention"}
    return Counter(module_of(node) for node in graph.nodes if operator_name(node) in names)


def _check_training(model: nn.Module, inputs: Inputs) -> None:
    """Nor is there any in training mode, if the model can be captured so."""
    try:
        with torch.no_grad(), in_mode(model, training=True):
            graph = flat_graph(model, inputs).graph
    except CaptureError:
        return
    left = [module_of(core.weights) for core in cores_of(graph) if core.kind == "softmax"]
    if left:
        raise AttentionError(
            f"in training mode a softmax attention is left in {', '.join(sorted(set(left)))}: "
            "write it the same way in both modes.",
            left,
        )


def _why_none(model: nn.Module, found: Sequence[AttentionMatrix]) -> str:
    name = type(model).__name__
    if found:
        return f"{name} has polynomial attention already: transform the model that it was made of."
    return (
        f"{name} has no softmax attention: scaled_dot_product_attention, or a softmax between two "
        "products, is what can be replaced. Custom kernels (flash_attn, flex_attention) cannot; a "
        "transformers model takes attn_implementation='sdpa' or 'eager'."
    )


def _why_left(left: Sequence[AttentionMatrix], places: Sequence[AttentionMatrix]) -> str:
    if left:
        listing = ", ".join(sorted({a.module or "(the model)" for a in left}))
        return (
            f"{len(places) - len(left)} of {len(places)} attentions can be replaced; not: "
            f"{listing}. In reach is what calls F.scaled_dot_product_attention, or a softmax over "
            "the last axis, from the forward of the attention's module."
        )
    return (
        "a module of the model has both an attention and another softmax, which would change too: "
        f"one of {', '.join(sorted({a.module or '(the model)' for a in places}))}. Give the "
        "attention a module of its own."
    )


# ---- the report ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Frobenius:
    """Frobenius norms of one attention's matrix on the example inputs, means over batch and heads:
    before, after, and softmax's bound, the square root of its rows.
    """

    module: str
    before: float
    after: float
    bound: float

    @staticmethod
    def of(old: AttentionMatrix, new: AttentionMatrix) -> Frobenius:
        bound = math.sqrt(old.weights.shape[-2])
        return Frobenius(old.module, old.frobenius, new.frobenius, bound)


@dataclass(frozen=True)
class PolynomialReport(TableReport):
    """Which attentions are polynomial now, and their Frobenius norms; ``print`` it."""

    power: int
    scale: str
    attentions: tuple[ReplacedAttention, ...]
    norms: tuple[Frobenius, ...] = ()
    notes: tuple[str, ...] = ()

    def lines(self) -> Iterator[str]:
        yield f"{len(self.attentions)} attentions: s^{self.power}, scale {self.scale}"
        if self.norms:
            yield "Frobenius norm of the weights on the example inputs:"
            rows = [["module", "was", "softmax", "now", "sqrt(N)"]]
            for attention, norm in zip(self.attentions, self.norms, strict=True):
                numbers = (f"{x:.3g}" for x in (norm.before, norm.after, norm.bound))
                rows.append([attention.module, attention.spelling, *numbers])
            yield from table(rows)
        else:
            rows = [["module", "was", "at"]]
            yield from table(rows + [[a.module, a.spelling, a.source] for a in self.attentions])
        yield from (f"note: {note}" for note in self.notes)
