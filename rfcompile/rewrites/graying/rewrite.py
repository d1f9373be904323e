"""TokenGraying: the rewrite that conditions the tokens of a model without new parameters."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, fx, nn

from rfcompile.errors import GrayingError, OptionError
from rfcompile.find.token_places import TokenPlaces, token_places
from rfcompile.graph.boundaries import find_boundaries
from rfcompile.graph.capture import Inputs, buffers_kept, copied, flat_graph, in_mode
from rfcompile.graph.models import without_nested_tensors, without_wrappers
from rfcompile.graph.modules import Modules, as_modules, patterns_of
from rfcompile.graph.pipeline import run
from rfcompile.passes.gray_tokens import GrayedInput, GrayTokens
from rfcompile.report.measures import condition_number
from rfcompile.report.table import TableReport, table
from rfcompile.rewrites.graying.hook import TokenHook

GrayingForm = Literal["dct", "svd"]


@dataclass(frozen=True)
class TokenGraying:
    """The token matrix ``X`` of each sample gets a flatter spectrum before the first block.

    Verdict of our study (``benchmarks/companions.md``): condition numbers fall; no gain in accuracy
    is beyond the spread.

    "svd": singular values become ``s_max (s / s_max)^epsilon``, so the log of the condition number
    is multiplied by ``epsilon``. "dct": the same power on the coefficients of the two-dimensional
    discrete cosine transform, which costs matrix products instead of a decomposition. Formulas,
    padding and sources: :func:`~rfcompile.nn.graying.gray_tokens_formula`.

    It mixes tokens along the sequence: in a causal model each token would know later ones. So the
    blocks of an attention that is causal, or may be, are never grayed; a model that has no others
    is an error. The rule is :func:`~rfcompile.find.causality.causality`, for modules and graphs.

    Args:
        epsilon: in (0, 1]; 1 changes nothing but rounding. The paper's: 0.95 for "dct", 0.6 to 0.7
            for "svd". Left out: 0.95 and 0.7.
        modules: "input": before the first block of each list of blocks. "attention": before each
            attention. Or any modules, as :data:`~rfcompile.graph.modules.Modules` says: before each
            of these.
    """

    form: GrayingForm = "dct"
    epsilon: float | None = None
    modules: Modules = "input"

    def __post_init__(self) -> None:
        if self.form not in get_args(GrayingForm):
            raise OptionError("form", self.form, "choose 'dct' or 'svd'.")
        if self.epsilon is None:
            object.__setattr__(self, "epsilon", 0.95 if self.form == "dct" else 0.7)
        if not isinstance(self.epsilon, (int, float)) or not 0 < self.epsilon <= 1:
            raise OptionError("epsilon", self.epsilon, "give a number above 0 and at most 1.")
        named = as_modules(self.modules)
        is_pattern = isinstance(named, str) and named not in ("input", "attention")
        object.__setattr__(self, "modules", (named,) if is_pattern else named)

    @property
    def keeps_parameters(self) -> bool:
        return True

    def on_module(self, model: nn.Module, inputs: Callable[[], Inputs]) -> GrayingReport:
        """Give modules of ``model`` a forward pre-hook, in place of those of an earlier graying.

        Raises:
            GrayingError: no place may be grayed
            (:func:`~rfcompile.find.token_places.token_places`), or none is called. BoundaryError:
            a path matches nothing, or there are no blocks. CaptureError.
        """
        TokenHook.remove_all(model)
        with without_wrappers(model):
            named = self.modules
            if not isinstance(named, str):  # a module has names also where a graph has no node
                named = tuple(find_boundaries(model, named))
            found = token_places(_graph_of(model, inputs()), named)
            places, left = found.paths, found.left
            grayed = {model.get_submodule(path) for path in places}
            without_nested_tensors(model, grayed.__contains__)
            conditions = _install(model, places, self, inputs())
        rows = tuple(Conditioned(path, *conditions[path]) for path in places if path in conditions)
        idle = tuple((path, "it was not called") for path in places if path not in conditions)
        if not rows:
            listing = ", ".join(places)
            raise GrayingError(f"the model calls none of {listing} on the example inputs.", places)
        return GrayingReport(self.form, float(self.epsilon or 1), rows, (*left, *idle))

    def on_graph(self, gm: fx.GraphModule) -> GrayingReport:
        """Rewrite a graph in place; see :class:`~rfcompile.passes.gray_tokens.GrayTokens`."""
        epsilon, named = float(self.epsilon or 1), self.modules
        if callable(named):
            raise OptionError("modules", named, "a graph has no modules to ask: give their paths.")
        named = named if isinstance(named, str) else patterns_of(named)
        facts = run(gm, [GrayTokens(self.form, epsilon, named)]).facts
        rows = tuple(
            Conditioned(fact.module, math.nan, math.nan)
            for fact in facts
            if isinstance(fact, GrayedInput)
        )
        left = tuple(pair for fact in facts if isinstance(fact, TokenPlaces) for pair in fact.left)
        note = "a graph: not run, so no condition numbers; its padding is grayed like any token"
        return GrayingReport(self.form, epsilon, rows, left, (note,))


def _graph_of(model: nn.Module, inputs: Inputs) -> fx.GraphModule:
    with torch.no_grad(), in_mode(model, training=False), buffers_kept(model):
        return flat_graph(model, inputs)


def _install(
    model: nn.Module, places: Sequence[str], how: TokenGraying, inputs: Inputs
) -> dict[str, tuple[float, float]]:
    """Condition numbers of the tokens before and after, by path, from a run on the inputs."""
    conditions: dict[str, tuple[float, float]] = {}
    hooks = {}
    for path in places:
        module = model.get_submodule(path)
        names = tuple(inspect.signature(module.forward).parameters)
        hooks[path] = TokenHook(path, how.form, float(how.epsilon or 1), names)
        module.register_forward_pre_hook(hooks[path], with_kwargs=True)

    def watch(path: str) -> Callable[[Tensor, Tensor], None]:
        def keep(before: Tensor, after: Tensor) -> None:
            conditions[path] = condition_number(before), condition_number(after)

        return keep

    args, kwargs = copied(inputs)
    modes = in_mode(model, training=False)
    try:
        for path, hook in hooks.items():
            hook.watcher = watch(path)
        with modes, buffers_kept(model), torch.no_grad(), torch.random.fork_rng():
            model(*args, **kwargs)
    finally:
        for hook in hooks.values():
            hook.watcher = None
    return conditions


# ---- the report ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Conditioned:
    """A module whose tokens are grayed: their condition number before and after on the example
    inputs, geometric means over the samples; padding counts as rows of it.
    """

    module: str
    before: float
    after: float


@dataclass(frozen=True)
class GrayingReport(TableReport):
    """Where tokens are grayed, what that does to them, and where not and why; ``print`` it."""

    form: str
    epsilon: float
    places: tuple[Conditioned, ...]
    left: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()

    def lines(self) -> Iterator[str]:
        found = len(self.places) + len(self.left)
        yield f"tokens grayed at {len(self.places)} of {found} places: {self.form}, {self.epsilon}"
        rows = [["before", "condition number was", "is"]]
        for place in self.places:
            numbers = (place.before, place.after)
            rows.append([place.module, *("" if math.isnan(x) else f"{x:.4g}" for x in numbers)])
        yield from table(rows)
        yield from (f"left at {module}: {why}" for module, why in self.left)
        yield from (f"note: {note}" for note in self.notes)
