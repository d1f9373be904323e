"""Names what no hook reaches in a model: the notes of quantize_traffic's report."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn
from torch.distributed.tensor import DTensor

from rfcompile.distributed.fsdp_units import Unit, units_of
from rfcompile.graph.models import uncompiled
from rfcompile.graph.places import without_wrappers_in


def out_of_reach(model: nn.Module) -> Iterator[str]:
    """A line for parameters in no FSDP unit, and one for collectives outside compiled modules."""
    units = units_of(model)
    ranks = {name: ranks for unit in units for name, ranks in _ranks_by_name(unit)}
    parameters = {without_wrappers_in(name): p for name, p in model.named_parameters()}
    if units:
        alone = [n for n, p in parameters.items() if p.requires_grad and n not in ranks]
        if alone:
            yield (
                f"{_listed(alone)}: in no FSDP unit, so whoever averages their gradients sends "
                "them exactly; apply fully_shard to a module that has them"
            )
    parallel = {
        name.rpartition(".")[0]
        for name, parameter in parameters.items()
        if isinstance(parameter, DTensor) and parameter.device_mesh.size() > ranks.get(name, 1)
    }
    eager = sorted(parallel - compiled_paths(model))
    if eager:
        yield (
            f"{_listed([path or '(root)' for path in eager])}: tensor parallel and in no compiled "
            "module, so exact, unless a function that calls them is compiled with backend 'rfquant'"
        )


def compiled_paths(model: nn.Module) -> set[str]:
    """The paths of the modules that ``torch.compile`` or ``Module.compile`` covers."""
    roots = [
        path
        for path, module in model.named_modules()
        if uncompiled(module) is not module or module._compiled_call_impl is not None
    ]
    return {
        without_wrappers_in(path)
        for path, _ in model.named_modules()
        if any(not root or path == root or path.startswith(f"{root}.") for root in roots)
    }


def _ranks_by_name(unit: Unit) -> Iterator[tuple[str, int]]:
    """Each parameter of a unit, and the number of ranks that the unit's collectives reach."""
    groups = [group for group in (unit.shard_group, unit.replicate_group) if group is not None]
    ranks = 1
    for group in groups:
        ranks *= group.size()
    yield from ((name, ranks) for name, _ in unit.sizes(trainable=False))


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
