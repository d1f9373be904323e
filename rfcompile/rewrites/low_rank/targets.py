"""Chooses the linears that low rank and adapters change, and names those they cannot."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from difflib import get_close_matches
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parameter import is_lazy

from rfcompile.errors import BoundaryError, OptionError
from rfcompile.graph.boundaries import find_boundaries
from rfcompile.graph.modules import Modules, matching, matching_any, patterns_of
from rfcompile.nn.low_rank import FactoredLinear
from rfcompile.nn.rebinding import runs_its_class

_WHY = "its forward is its own, its weight computed or integer, or changed already (merge it first)"


def is_linear(module: nn.Module) -> bool:
    """A multiplication by a matrix that is a parameter: ``nn.Linear`` or transformers' ``Conv1D``,
    and what derives from them and keeps their forward; no computed or integer weight.
    """
    weight = module._parameters.get("weight")
    forward = type(module).forward
    if weight is None or (forward is not nn.Linear.forward and not is_conv1d(module)):
        return False
    if not runs_its_class(module):
        return False
    return is_lazy(weight) or weight.is_floating_point()


def is_conv1d(module: nn.Module) -> bool:
    """GPT-2's linear, whose weight is [in, out]."""
    named: list[Any] = [cls for cls in type(module).__mro__ if cls.__name__ == "Conv1D"]
    return bool(named) and type(module).forward is named[0].forward and hasattr(module, "nf")


def matrix_of(module: nn.Module) -> Tensor:
    """The weight of a linear as [out, in], without history."""
    weight = module.get_parameter("weight").detach()
    return weight.t() if is_conv1d(module) else weight


def find_linears(model: nn.Module, modules: Modules) -> dict[str, nn.Module]:
    """The chosen linears by path; one that has several paths by the first.

    The rules are those of graphs (:func:`choose_linears`, :func:`check_weight`). The list of all
    linears is not: modules need no example inputs, and only they have classes and shared paths.

    Raises:
        OptionError: a pattern matches no linear, or one that has a forward of its own, a computed
            or integer weight, or is changed already; or one that matches has a weight that is tied
            to another parameter, sharded, or without values.
    """
    paths = {p: m for p, m in model.named_modules(remove_duplicate=False) if is_linear(m)}
    if not callable(modules) and modules != "auto":
        _refuse_odd(model, patterns_of(modules), paths)
    chosen = choose_linears(model, modules, paths, lambda: blocks_of(model))
    first: dict[int, str] = {}
    for path in chosen:
        first.setdefault(id(paths[path]), path)
    found = {path: paths[path] for path in first.values()}
    _check(model, found)
    return found


def choose_linears(
    model: nn.Module,
    modules: Modules,
    paths: Collection[str],
    blocks: Callable[[], Collection[str]],
) -> list[str]:
    """The paths of linears that ``modules`` means, in a module or a graph.

    Args:
        paths: of every linear there is. blocks: of the repeated blocks, which "auto" asks for.

    Raises:
        OptionError: there are no such linears.
    """
    name = type(model).__name__
    if modules == "auto":
        within = blocks()
        if not within:
            rule = f"{name} has no repeated blocks: name them, modules=['*.up']. "
            raise OptionError("modules", modules, rule + _some(paths))
        chosen = [path for path in paths if any(path.startswith(f"{b}.") for b in within)]
    elif callable(modules):
        chosen = [path for path in paths if modules(path, model.get_submodule(path))]
    else:
        chosen = match_linears(patterns_of(modules), paths)
    if not chosen:
        raise OptionError("modules", modules, f"it chooses no linear of {name}. {_some(paths)}")
    return chosen


def blocks_of(model: nn.Module) -> tuple[str, ...]:
    """The paths of a module's repeated blocks; none: ()."""
    try:
        return tuple(find_boundaries(model, "auto"))
    except BoundaryError:
        return ()


def _refuse_odd(
    model: nn.Module, patterns: Collection[str], paths: Mapping[str, nn.Module]
) -> None:
    for path, module in model.named_modules():
        is_odd = isinstance(module, (nn.Linear, FactoredLinear))
        if (
            path not in paths
            and is_odd
            and any(path in matching(p, [*paths, path]) for p in patterns)
        ):
            rule = f"it is a {type(module).__name__}: {_WHY}, so it stays: leave it out."
            raise OptionError("modules", path, rule)


def match_linears(patterns: Collection[str], paths: Collection[str]) -> list[str]:
    """The paths that a pattern means; see :data:`~rfcompile.graph.modules.Modules`.

    Raises:
        OptionError: a pattern matches none.
    """
    for pattern in patterns:
        if not matching(pattern, paths):
            raise OptionError(
                "modules", pattern, f"no linear has this path. {_some(paths, pattern)}"
            )
    return matching_any(patterns, paths)


def _some(paths: Iterable[str], like: str = "") -> str:
    names = [path or "(the model itself)" for path in paths]
    listing = get_close_matches(like, names, n=3) or names[:3]
    return (
        f"Linears here are {', '.join(listing) or '(none)'}; patterns such as '*.mlp.*' are fine."
    )


def _check(model: nn.Module, found: dict[str, nn.Module]) -> None:
    names: dict[int, list[str]] = {}
    owners = {id(m): m for m in model.modules()}  # a shared module is no tie
    places = {id(m): path for path, m in model.named_modules()}
    for key, module in owners.items():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                names.setdefault(id(parameter), []).append(f"{places[key]}.{name}".lstrip("."))
    for path, module in found.items():
        weight = module.get_parameter("weight")
        check_weight(path, weight, names[id(weight)])


def check_weight(path: str, weight: Tensor, names: Collection[str]) -> None:
    """Refuse a weight that cannot be changed; ``names`` are all that it has.

    Raises:
        OptionError: it is tied, sharded or without values.
    """
    if len(names) > 1:
        rule = f"the weight is tied, {' = '.join(names)}: leave it out, or untie it first."
        raise OptionError("modules", path, rule)
    if isinstance(weight, DTensor):
        rule = "the weight is a DTensor: rewrite the model first, then parallelize or shard it."
        raise OptionError("modules", path, rule)
    if is_lazy(weight) or weight.is_meta:
        rule = "the weight is on the meta device or lazy: give the model values first."
        raise OptionError("modules", path, rule)


def matrices_left(
    model: nn.Module,
    modules: Modules,
    found: Collection[str],
    blocks: Callable[[], Collection[str]],
) -> tuple[str, ...]:
    """The matrices in the repeated blocks that are in none of the modules found, in a module or
    graph; () where the user named the modules. ``blocks`` as in :func:`choose_linears`.
    """
    left: list[str] = []
    for block in blocks() if modules == "auto" else ():
        own: dict[Tensor, str] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if name.startswith(f"{block}.") and parameter.dim() > 1:
                own.setdefault(parameter, name)
        left += [name for name in own.values() if name.rpartition(".")[0] not in found]
    return tuple(left)
