"""Which modules of a model end at a communication boundary."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase

from torch import nn

from rfcompile.errors import BoundaryError

Boundaries = str | Iterable[str] | Callable[[str, nn.Module], bool]


def find_boundaries(model: nn.Module, boundaries: Boundaries = "auto") -> dict[str, nn.Module]:
    """The modules whose output crosses the wire, by path.

    Args:
        model: any module.
        boundaries: "auto": the repeated blocks, where a pipeline would be cut. "branches": the
            children of the repeated blocks that hold at least two matrices (attention, MLP), where
            tensor parallelism would all-reduce. A list of module paths (shell patterns are fine),
            or a function of (path, module) that says yes.

    Raises:
        BoundaryError: nothing matches, with what to do.

    Source: the rule for blocks is ours: at least two children of one class in a ModuleList or
    Sequential, the outermost such container of each path.
    """
    modules = dict(model.named_modules())
    if boundaries == "auto":
        found = dict(_blocks(model))
    elif boundaries == "branches":
        found = {
            f"{path}.{name}": child
            for path, block in _blocks(model)
            for name, child in block.named_children()
            if sum(p.dim() >= 2 for p in child.parameters()) >= 2
        }
    elif isinstance(boundaries, str):
        raise BoundaryError(
            f"boundaries={boundaries!r} is not known: use 'auto', 'branches', a list of module "
            "paths, or a function of (path, module)."
        )
    elif callable(boundaries):
        found = {path: module for path, module in modules.items() if boundaries(path, module)}
    else:
        patterns = tuple(boundaries)
        found = {
            path: module
            for path, module in modules.items()
            if any(fnmatchcase(path, pattern) for pattern in patterns)
        }
        unused = [p for p in patterns if not any(fnmatchcase(path, p) for path in found)]
        if unused:
            raise BoundaryError(
                f"boundaries: no module matches {unused[0]!r}; the paths of this model are those "
                f"of model.named_modules(), such as {', '.join(list(modules)[1:4])}."
            )
    if not found:
        raise BoundaryError(
            f"{type(model).__name__} has no repeated blocks (two or more modules of one class in a "
            "ModuleList or Sequential): name the modules whose output crosses the wire, "
            "boundaries=['path.of.module', ...]."
        )
    return found


def _blocks(module: nn.Module, path: str = "") -> Iterable[tuple[str, nn.Module]]:
    children = list(module.named_children())
    if isinstance(module, (nn.ModuleList, nn.Sequential)):
        classes = [type(child) for _, child in children]
        repeated = {cls for cls in classes if classes.count(cls) > 1 and not _is_leaf_class(cls)}
        for name, child in children:
            if type(child) in repeated:
                yield f"{path}{name}", child
            else:
                yield from _blocks(child, f"{path}{name}.")
        return
    for name, child in children:
        yield from _blocks(child, f"{path}{name}.")


def _is_leaf_class(cls: type[nn.Module]) -> bool:
    """Plain layers of torch.nn (Linear, ...) in a row are not blocks; its transformers are."""
    is_torch = cls.__module__.startswith("torch.nn.modules")
    return is_torch and not cls.__name__.startswith("Transformer")
