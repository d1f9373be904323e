"""fold_mixing: multiplies each mixing matrix of a trained model into the linears before it."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx, nn

from rfcompile.errors import ResidualError
from rfcompile.find.linears import Linear, linears_in, shape_of
from rfcompile.graph.capture import Inputs, in_mode, inputs_of, plain_graph
from rfcompile.graph.models import uncompiled, without_wrappers
from rfcompile.nn.residual_site import ResidualSite

aten = torch.ops.aten


def fold_mixing(model: nn.Module, *, example_inputs: Any = None) -> tuple[str, ...]:
    """Make every "mix" site of ``model`` "free", in place; in eval mode it computes what it did.

    A branch that ends in ``y = W x + b`` and is mixed by ``M`` becomes ``(M W) x + M b``, exactly
    but for rounding: the products are computed in float64 and rounded once. A branch that is a sum
    of such ends (attention and MLP side by side) has ``M`` in each of them.

    Args:
        example_inputs: as in :func:`~rfcompile.transform`.

    Returns:
        The names of the parameters that changed.

    Raises:
        ResidualError: there is no such site; or a branch does not end in a linear (a norm follows
        it, experts are summed), or its linear is used elsewhere too: nothing has changed.
        CaptureError.
    """
    model = uncompiled(model)
    sites = [m for m in model.modules() if isinstance(m, ResidualSite) and m.mode == "mix"]
    if not sites:
        raise ResidualError(
            f"{type(model).__name__} has no mixing to fold: transform it with residual='mix'."
        )
    inputs = inputs_of(model, example_inputs)
    with without_wrappers(model):
        return _fold_all(model, inputs, sites)


def _fold_all(model: nn.Module, inputs: Inputs, sites: list[ResidualSite]) -> tuple[str, ...]:
    with in_mode(model, training=False):
        module = plain_graph(model, inputs)
    linears, reads = linears_in(module.graph, model)
    ends: dict[ResidualSite, set[Linear]] = defaultdict(set)
    taken = set()
    for node, linear in linears.items():
        site = model.get_submodule(linear.module)
        if isinstance(site, ResidualSite) and site.mode == "mix":
            for end in _ends(reads[node], node, linears, linear.module):
                ends[site].add(linears[end])
                taken.add(end)
    _check_alone(ends, {node: linear for node, linear in linears.items() if node not in taken})
    _check_called(model, sites, ends)
    return tuple(name for site in sites for name in _fold(model, site, ends[site]))


# ---- which linears -----------------------------------------------------------------------------

_ALONG = {
    aten.dropout.default,
    aten.to.dtype,
    aten.contiguous.default,
    aten.clone.default,
    aten.neg.default,
    aten.alias.default,
}
"""What commutes with a matrix on the last axis."""
_RESHAPED = {aten.view.default, aten.reshape.default, aten.unsqueeze.default, aten.squeeze.dim}


def _ends(
    node: fx.Node, reader: fx.Node, linears: dict[fx.Node, Linear], site: str
) -> Iterator[fx.Node]:
    """The linears whose results, added up, are the branch."""
    first = node.args[0] if node.args else None
    linear = linears.get(node)
    if set(node.users) != {reader}:
        raise _no_end(site, f"{node.name} is read elsewhere too")
    if linear is not None and linear.scale is None and not linear.is_computed:
        yield node
    elif node.target is aten.add.Tensor and shape_of(node.args[0]) == shape_of(node.args[1]):
        for term in (node.args[0], node.args[1]):
            assert isinstance(term, fx.Node)
            yield from _ends(term, node, linears, site)
    elif isinstance(first, fx.Node) and (
        node.target in _ALONG
        or (node.target in _RESHAPED and shape_of(node)[-1:] == shape_of(first)[-1:])
        or (node.target is aten.mul.Tensor and isinstance(node.args[1], (int, float)))
    ):
        yield from _ends(first, node, linears, site)
    else:
        raise _no_end(site, f"its last operation is {node.name}")


def _no_end(site: str, why: str) -> ResidualError:
    return ResidualError(
        f"the mixing of {site} cannot be folded: its branch does not end in a linear of its own "
        f"({why}). Leave it: it is a matrix product a token."
    )


def _check_alone(ends: dict[ResidualSite, set[Linear]], others: dict[fx.Node, Linear]) -> None:
    elsewhere = Counter(name for linear in others.values() for name in _parameters(linear))
    elsewhere.update(name for found in ends.values() for one in found for name in _parameters(one))
    for found in ends.values():
        for linear in found:
            for name in _parameters(linear):
                if elsewhere[name] > 1:
                    raise _no_end(linear.module, f"{name} is used elsewhere too")


def _parameters(linear: Linear) -> list[str]:
    return [name for name in (linear.weight, linear.bias) if name]


def _check_called(
    model: nn.Module, sites: list[ResidualSite], ends: dict[ResidualSite, set[Linear]]
) -> None:
    for path, module in model.named_modules():
        if module in sites and module not in ends:
            raise _no_end(path, "it is not called with these example_inputs")


# ---- the product -------------------------------------------------------------------------------


@torch.no_grad()
def _fold(model: nn.Module, site: ResidualSite, ends: set[Linear]) -> Iterator[str]:
    mixing = site.weight.double()
    for linear in sorted(ends, key=lambda end: end.weight):
        weight = model.get_parameter(linear.weight)
        rows = weight.T if linear.is_transposed else weight
        rows.copy_(mixing @ rows.double())
        yield linear.weight
        if linear.bias:
            bias = model.get_parameter(linear.bias)
            bias.copy_(mixing @ bias.double())
            yield linear.bias
    site.become("free")
