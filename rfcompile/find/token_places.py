"""Where the tokens of a model may be grayed: the places in its graph, and why others are left."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, fx

from rfcompile.errors import BoundaryError, GrayingError
from rfcompile.find.attention_cores import Core, all_cores
from rfcompile.find.causality import Causality, causality
from rfcompile.find.dataflow import operator_name
from rfcompile.graph.boundaries import blocks_of_graph
from rfcompile.graph.capture import without_regions
from rfcompile.graph.places import module_of

CAUSAL = "its attention is causal"
UNKNOWN = "its attention may be causal, by an input or by what the graph does not tell"
NO_ATTENTION = "there is no attention, which would show whether it is causal"
CROSSING = "it attends to other tokens"
_WHY: dict[Causality, str] = {"causal": CAUSAL, "unknown": UNKNOWN}
_NAME_THEM = "name the modules, TokenGraying(modules=('path', ...))"


@dataclass(frozen=True)
class TokenPlaces:
    """Paths of the modules whose tokens can be grayed, and of those to leave, each with why."""

    paths: tuple[str, ...]
    left: tuple[tuple[str, str], ...]


def token_places(
    gm: fx.GraphModule, modules: Literal["input", "attention"] | Sequence[str]
) -> TokenPlaces:
    """Find where tokens may be grayed in a captured graph, which stays as it is.

    Graying mixes the tokens of a sequence, so it must not reach a causal attention. A place reaches
    the attentions of the list of blocks that it is in; elsewhere those of the module that holds it.
    A place that reaches an attention which is causal, or may be
    (:func:`~rfcompile.find.causality.causality`), is left. A kernel or a called module with
    "attention" or "attn" in its name may be causal.

    Args:
        gm: a graph with shapes and the modules' names, of a whole model.
        modules: "input": the first block of each list of blocks; one that reaches no attention is
            left, as nothing shows whether the model is causal. "attention": each attention, except
            those with other keys than queries. Or paths of modules: these.

    Raises:
        GrayingError: no place remains, or an attention has one token. BoundaryError: "input", and
        the model has no repeated blocks.

    Source: the rule is ours; the paper has vision models only. Limits: an attention outside of the
    list of blocks that reads the same tokens is not looked at.
    """
    gm = without_regions(gm)
    cores = list(all_cores(gm))
    answers = [(module_of(core.result), causality(core)) for core in cores]
    read = {core.weights for core in cores}
    kernels = [n for n in gm.graph.nodes if n not in read and _is_kernel(n)]
    answers += [(module_of(node), "unknown") for node in kernels]
    if any(answer == "one token" for _, answer in answers):
        raise GrayingError(
            "the model has one token on the example inputs, where a causal attention looks like "
            "any other: give more."
        )
    blocks = blocks_of_graph(gm)
    places, left = _places(modules, blocks, cores)
    for path in places:
        scope = _scope(path, blocks)
        reached = [answer for module, answer in answers if _is_in(module, scope)]
        why = next((_WHY[kind] for kind in ("causal", "unknown") if kind in reached), None)
        if why is None and modules == "input" and not reached:
            why = NO_ATTENTION
        if why is not None:
            left.append((path, why))
    refused = {path for path, _ in left}
    kept = tuple(path for path in places if path not in refused)
    if not kept:
        raise GrayingError(_why_none(left), [path for path, _ in left])
    return TokenPlaces(kept, tuple(left))


def _places(
    modules: str | Sequence[str], blocks: Sequence[str], cores: Sequence[Core]
) -> tuple[list[str], list[tuple[str, str]]]:
    """The paths that ``modules`` means, and attentions that are none of self-attention."""
    if modules == "attention":
        paths = list(dict.fromkeys(module_of(core.result) for core in cores))
        squares = {module_of(core.result) for core in cores if _is_square(core)}
        crossing = [(path, CROSSING) for path in paths if path not in squares]
        return [path for path in paths if path in squares], crossing
    if modules != "input":
        return list(modules), []
    if not blocks:
        raise BoundaryError(
            "the model has no repeated blocks (two or more modules of one class in a ModuleList or "
            f"Sequential): {_NAME_THEM}."
        )
    first: dict[str, str] = {}
    for path in blocks:
        first.setdefault(path.rpartition(".")[0], path)
    return list(first.values()), []


def _is_kernel(node: fx.Node) -> bool:
    """It calls an attention of which the graph does not show the masks."""
    names = [operator_name(node)]
    if node.op == "call_module" and node.graph.owning_module is not None:
        called = node.graph.owning_module.get_submodule(str(node.target))
        names += [type(module).__name__ for module in called.modules()]
    return any(word in name.lower() for name in names for word in ("attention", "attn"))


def _is_square(core: Core) -> bool:
    if core.is_fused:
        return _shape(core.query)[-2:-1] == _shape(core.key)[-2:-1]
    return _shape(core.weights)[-2:-1] == _shape(core.weights)[-1:]


def _shape(node: fx.Node) -> tuple[Any, ...]:
    value = node.meta.get("val", node.meta.get("example_value"))
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def _scope(path: str, blocks: Sequence[str]) -> str:
    block = next((block for block in blocks if _is_in(path, block)), path)
    return block.rpartition(".")[0]


def _is_in(module: str, scope: str) -> bool:
    return not scope or module == scope or module.startswith(f"{scope}.")


def _why_none(left: Sequence[tuple[str, str]]) -> str:
    if all(why == CROSSING for _, why in left):
        return f"the model has no self-attention: {_NAME_THEM}."
    listing = "; ".join(f"{path or '(the model)'}: {why}" for path, why in left)
    text = (
        f"the model cannot be grayed at {listing}. Graying mixes the tokens of a sequence, so in a "
        "causal model each would know those after it, and the model could not generate."
    )
    has_none = any(why == NO_ATTENTION for _, why in left)
    return f"{text} If it is not causal, {_NAME_THEM}." if has_none else text
