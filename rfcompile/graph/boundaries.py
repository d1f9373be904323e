"""Finds the modules of a model at whose ends a fake wire stands."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping

from torch import fx, nn

from rfcompile.errors import BoundaryError
from rfcompile.graph.modules import Modules, as_modules, matching, matching_any, patterns_of
from rfcompile.graph.places import module_calls


def find_boundaries(model: nn.Module, modules: Modules = "auto") -> dict[str, nn.Module]:
    """The modules whose output crosses the wire, by path; one that has several paths by the first.

    Args:
        model: any module.
        modules: "blocks" or "auto": the repeated blocks, where a pipeline would be cut (beside
            other ranks ``transform`` takes "auto" for real collectives). "branches": the
            children of the repeated blocks that hold at least two matrices (attention, MLP), where
            tensor parallelism would all-reduce. Or any modules, as
            :data:`~rfcompile.graph.modules.Modules` says.

    Raises:
        BoundaryError: nothing matches, with what to do.

    Source: the rule for blocks is ours: at least two children of one class in a ModuleList or
    Sequential, the outermost such container of each path. Plain layers of torch.nn are no blocks;
    Sequentials are if there are no others. If there are none of these either: children of one class
    that hold two matrices or more, whose names differ by the number at their end (b1, b2, ...).
    """
    # Lists of modules are never called themselves: nothing leaves them.
    called = {p: m for p, m in model.named_modules(remove_duplicate=False) if _is_called(m)}
    modules = as_modules(modules)
    if isinstance(modules, str) and modules in ("auto", "blocks"):
        found = dict(_all_blocks(model))
    elif isinstance(modules, str) and modules == "branches":
        found = dict(
            branch for path, block in _all_blocks(model) for branch in _branches(path, block)
        )
    elif callable(modules):
        found = {path: module for path, module in called.items() if modules(path, module)}
    else:
        found = {path: called[path] for path in match_paths(patterns_of(modules), called)}
    if not found:
        name = type(model).__name__
        if modules not in ("auto", "blocks", "branches"):
            raise BoundaryError(
                f"modules={modules!r} chooses no module of {name}: name some, "
                "modules=['path.of.module', ...]."
            )
        if modules == "branches" and _all_blocks(model):
            raise BoundaryError(
                f"the repeated blocks of {name} have no branches (children that hold two matrices "
                "or more): use modules='blocks', or name modules, modules=['path.of.module', ...]."
            )
        raise BoundaryError(
            f"{name} has no repeated blocks (two or more modules of one class in a ModuleList or "
            "Sequential, or named b1, b2, ...): name the modules whose output crosses the wire, "
            "modules=['path.of.module', ...]."
        )
    first_path = {id(module): path for path, module in reversed(found.items())}
    return {path: module for path, module in found.items() if first_path[id(module)] == path}


def match_paths(patterns: tuple[str, ...], paths: Collection[str]) -> list[str]:
    """The paths that some pattern means; see :data:`~rfcompile.graph.modules.Modules`.

    Raises:
        BoundaryError: a pattern matches none.
    """
    for pattern in patterns:
        if not matching(pattern, paths):
            named = [path for path in paths if path]
            raise BoundaryError(
                f"modules: no module that is called matches {pattern!r}; the paths here are "
                f"those of model.named_modules(), such as {', '.join(named[:3]) or '(none)'}. Or "
                "use a word that this door knows, such as 'blocks' for a Wire."
            )
    return matching_any(patterns, paths)


# ---- blocks of a module ------------------------------------------------------------------------


def _all_blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return (
        list(_blocks(model, "", _is_block_class))
        or list(_blocks(model, "", _is_sequential))
        or list(_numbered_blocks(model, ""))
    )


def _numbered_blocks(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    children = [(name, child) for name, child in module._modules.items() if child is not None]
    families = [
        _family(name, _class_name(type(child))) if _num_matrices(child) > 1 else None
        for name, child in children
    ]
    for (name, child), family in zip(children, families, strict=True):
        if family is not None and families.count(family) > 1 and _is_called(child):
            yield f"{path}{name}", child
        else:
            yield from _numbered_blocks(child, f"{path}{name}.")


def _family(name: str, cls: str) -> tuple[str, str] | None:
    """What blocks named b1, b2, ... have in common; None: it is no block that has a number."""
    stem = name.rstrip("0123456789")
    return (stem, cls) if stem != name and stem and _is_block_class(cls) else None


def _num_matrices(module: nn.Module) -> int:
    return sum(parameter.dim() >= 2 for parameter in module.parameters())


def _blocks(
    module: nn.Module, path: str, is_block_class: Callable[[str], bool]
) -> Iterator[tuple[str, nn.Module]]:
    # named_children would leave out a block that a list holds several times.
    children = [(name, child) for name, child in module._modules.items() if child is not None]
    is_list = isinstance(module, (nn.ModuleList, nn.Sequential))
    classes = [_class_name(type(child)) for _, child in children]
    for (name, child), cls in zip(children, classes, strict=True):
        if is_list and classes.count(cls) > 1 and is_block_class(cls):
            yield f"{path}{name}", child
        else:
            yield from _blocks(child, f"{path}{name}.", is_block_class)


def _branches(path: str, block: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, child in block.named_children():
        if not _is_called(child):
            yield from _branches(f"{path}.{name}", child)
        elif _num_matrices(child) >= 2:
            yield f"{path}.{name}", child


def _is_called(module: nn.Module) -> bool:
    return getattr(module.forward, "__func__", None) is not nn.Module.forward


def _class_name(cls: type[nn.Module]) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _is_sequential(cls: str) -> bool:
    return cls == "torch.nn.modules.container.Sequential"


def _is_block_class(cls: str) -> bool:
    """Layers and lists of torch.nn in a row are no blocks, nor are sites; its transformers are."""
    is_layer = cls.startswith(("torch.nn.modules.", "rfcompile.nn."))
    return not is_layer or ".Transformer" in cls


# ---- blocks of a graph -------------------------------------------------------------------------


def blocks_of_graph(gm: fx.GraphModule) -> tuple[str, ...]:
    """The paths of the repeated blocks that a graph was traced in; none: ()."""
    calls = (call for node in gm.graph.nodes for call in module_calls(node))
    return tuple(find_blocks({call.path: call.cls for call in calls}))


def find_blocks(classes: Mapping[str, str]) -> list[str]:
    """The "auto" boundaries where only paths and class names are known: those of a graph. Of
    blocks within blocks these are the outermost.

    Args:
        classes: the name of the class, as "package.module.Class", of each module that was called.
    """
    families: dict[tuple[str, str], list[str]] = {}
    for path, cls in classes.items():
        parent, _, name = path.rpartition(".")
        if path and (name.isdigit() or _is_sequential(classes.get(parent, ""))):
            families.setdefault((parent, cls), []).append(path)
    for is_block_class in (_is_block_class, _is_sequential):
        found = {
            path
            for (_, cls), paths in families.items()
            if len(paths) > 1 and is_block_class(cls)
            for path in paths
        }
        if found:
            return _outermost(found, classes)
    numbered: dict[tuple[str, str, str], list[str]] = {}
    for path, cls in classes.items():
        parent, _, name = path.rpartition(".")
        family = _family(name, cls)
        if family is not None and _num_layers(path, classes) > 1:
            numbered.setdefault((parent, *family), []).append(path)
    found = {path for paths in numbered.values() if len(paths) > 1 for path in paths}
    return _outermost(found, classes)


def _outermost(found: set[str], paths: Iterable[str]) -> list[str]:
    inner = {path for path in found if any(path.startswith(f"{outer}.") for outer in found)}
    return [path for path in paths if path in found - inner]


def _num_layers(path: str, classes: Mapping[str, str]) -> int:
    """How many linears and convolutions were called in a module, as far as class names tell."""
    names = [cls.lower() for p, cls in classes.items() if p.startswith(f"{path}.")]
    return sum(name.rpartition(".")[2].startswith(("linear", "conv")) for name in names)
