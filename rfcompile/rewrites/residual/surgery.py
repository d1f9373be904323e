"""Replaces the residual adds of a model by submodules, and checks the result.

1. The graph says where the residual adds are (:mod:`rfcompile.passes.find_residuals`).
2. Every add in the statements at those places becomes a call of a :class:`ResidualSite`.
3. What is added says which site stands for which add (:mod:`.matching`). Where it leaves a doubt,
   the model is captured again. Sites without a residual add are undone, and a residual add outside
   of every site is an error. So a site is where the data flow says, whatever the text suggests.
4. On the example inputs the model must compute what it did, bit for bit.
5. Where the model does something else in training mode, the same for that mode.
"""

from __future__ import annotations

import inspect
from collections import Counter, defaultdict
from collections.abc import Collection
from contextlib import suppress
from dataclasses import replace
from types import FunctionType

import torch
from torch import fx, nn

from rfcompile.errors import CaptureError, ResidualError, SourceError
from rfcompile.find.mixed_streams import find_mixed_streams, why_none
from rfcompile.graph.calls import trains_as_it_evaluates
from rfcompile.graph.capture import (
    Inputs,
    buffers_kept,
    capture,
    copied,
    in_mode,
    program_of,
    tensors_of,
)
from rfcompile.graph.models import without_nested_tensors
from rfcompile.graph.places import ModuleCall, frames_of, module_calls, module_of, short_path
from rfcompile.nn.residual_site import ResidualSite
from rfcompile.passes.find_residuals import Kind, ResidualAdd, find_residuals
from rfcompile.passes.open_residuals import OpenedSite, additions
from rfcompile.rewrites.residual.matching import matched_sites
from rfcompile.rewrites.residual.owner import Owner
from rfcompile.rewrites.residual.sources import adds_in, definition_of


def open_sites(
    model: nn.Module,
    inputs: Inputs,
    kinds: tuple[Kind, ...] = ("block",),
    notes: list[str] | None = None,
    program: torch.export.ExportedProgram | None = None,
) -> tuple[tuple[OpenedSite, ...], tuple[ResidualAdd, ...]]:
    """Make the residual adds of ``model`` into submodules, in place; it computes what it did.

    Returns the sites, and the adds of other kinds, which stay as they are. Adds of eval mode come
    first; then those that are made in training only, if the model can be captured in training.

    Args:
        model: any module that ``torch.export`` captures. Sites that it already has stay.
        inputs: (args, kwargs) to run it with, real tensors.
        kinds: which residual adds.
        notes: gets a sentence on connections over the depth that are no residual adds.
        program: the model in eval mode, by :func:`~rfcompile.graph.capture.program_of`; left out,
            it is captured.

    Raises:
        ResidualError: there is none, or one is out of reach: the model is as it was.
        SourceError, CaptureError.
    """
    owners: dict[nn.Module, Owner] = {}
    try:
        with in_mode(model, training=False):
            program = program_of(model, inputs) if program is None else program
            graph = program.graph_module
            mixed = find_mixed_streams(graph)
            opened, left = _open_sites(model, inputs, graph, kinds, owners, program)
        with in_mode(model, training=True):
            opened, left = _open_in_training(model, inputs, kinds, owners, opened, left)
    except BaseException:
        for owner in owners.values():
            owner.undo()
        raise
    for owner in owners.values():
        owner.finish()
    if not opened:
        raise ResidualError(
            f"{type(model).__name__} has no residual add of kind {', '.join(kinds)} "
            f"({len(left)} of other kinds): {why_none(mixed) or _why_none(model)}",
            left,
        )
    _leave_fast_paths(model)
    if notes is not None and mixed:
        notes.append(f"beside these, {why_none(mixed)}")
    return opened, left


def _open_in_training(
    model: nn.Module,
    inputs: Inputs,
    kinds: tuple[Kind, ...],
    owners: dict[nn.Module, Owner],
    opened: tuple[OpenedSite, ...],
    left: tuple[ResidualAdd, ...],
) -> tuple[tuple[OpenedSite, ...], tuple[ResidualAdd, ...]]:
    if trains_as_it_evaluates(model, inputs):
        return opened, left
    try:
        graph = capture(model, inputs)
    except CaptureError:
        return opened, left
    more, also_left = _open_sites(model, inputs, graph, kinds, owners)
    known = {site.path for site in opened}
    return opened + tuple(site for site in more if site.path not in known), left or also_left


def _why_none(model: nn.Module) -> str:
    modes = {module.mode for module in model.modules() if isinstance(module, ResidualSite)}
    if modes & {"free", "mix"}:
        return "it was rewritten without them before."
    return "there is nothing to rewrite."


def _open_sites(
    model: nn.Module,
    inputs: Inputs,
    graph: fx.GraphModule,
    kinds: tuple[Kind, ...],
    owners: dict[nn.Module, Owner],
    program: torch.export.ExportedProgram | None = None,
) -> tuple[tuple[OpenedSite, ...], tuple[ResidualAdd, ...]]:
    """The same for the mode that the model is in; without any add of these kinds, ``()``.

    Args:
        program: that of the graph in eval mode, which runs to find the sites of its adds; left out,
            the model is captured again for that.
    """
    every = find_residuals(graph)
    wanted = [add for add in every if add.kind in kinds]
    left = tuple(add for add in every if add.kind not in kinds)
    frames = {node.name: frames_of(node) for node in graph.graph.nodes}
    new: dict[str, Owner] = {}
    for add in wanted:
        module = model.get_submodule(add.module)
        if not isinstance(module, ResidualSite):
            new[add.module] = owners.setdefault(module, Owner(module))
            try:
                new[add.module].consider(frames.get(add.node, ()))
            except SourceError as error:
                text = str(error).removesuffix(".")
                raise SourceError(f"{text}{_or_as_graph(graph, wanted)}.") from error
    if not new:
        return tuple(OpenedSite(add.module, add) for add in wanted), left
    expected = _outputs(model, inputs)
    for owner in new.values():
        owner.apply(owner.edits)
    opened = None if program is None else matched_sites(model, inputs, program, wanted)
    opened = opened or _opened(model, inputs, graph, wanted, kinds)
    sites = [_site_at(model, site.path) for site in opened]
    for owner in dict.fromkeys(new.values()):
        owner.keep(sites)
    for number, (site, module) in enumerate(zip(opened, sites, strict=True)):
        module.operand = site.add.operand
        path = site.path.rpartition(".")[0]
        names = {m: name for name, m in model.get_submodule(path)._modules.items()}
        opened[number] = replace(site, path=_join(path, names[module]))
    _check_equal(model, expected, _outputs(model, inputs))
    return tuple(opened), left


def _site_at(model: nn.Module, path: str) -> ResidualSite:
    module = model.get_submodule(path)
    assert isinstance(module, ResidualSite)
    return module


def _opened(
    model: nn.Module,
    inputs: Inputs,
    before: fx.GraphModule,
    wanted: list[ResidualAdd],
    kinds: Collection[Kind],
) -> list[OpenedSite]:
    """The wanted adds with their sites, from a graph of the model as it is now."""
    try:
        graph = capture(model, inputs)
    except CaptureError as error:
        raise ResidualError(
            f"{type(model).__name__} does not run once its residual adds are submodules: "
            f"{error.__cause__}. Does a module loop over all of its own submodules? Keep those "
            f"that it means in an nn.ModuleList{_or_as_graph(before, wanted)}."
        ) from error
    after = [add for add in find_residuals(graph) if add.kind in kinds]
    left = [add for add in after if not isinstance(model.get_submodule(add.module), ResidualSite)]
    if left or len(after) != len(wanted):
        places = "; ".join(f"{add.place} ({add.spelling}{_hooks_of(model, add)})" for add in left)
        raise ResidualError(
            f"{len(after) - len(left)} of {len(wanted)} residual adds of {type(model).__name__} "
            f"can be rewritten. Out of reach: {places or 'unknown'}. In reach is an add written as "
            "x + f(x), x - f(x), x += f(x), torch.add, lerp, addcmul, addmm, sum([x, f(x)]) or "
            "torch.stack([x, f(x)]).sum(0) in a method or property of a module or in a plain "
            f"function that it calls by name. Write it so{_or_as_graph(before, wanted)}.",
            left,
        )
    _check_calls(graph, after, _or_as_graph(before, wanted))
    return [
        # The site's operands may be the other way round than the graph's: f - x is f + (-x).
        OpenedSite(now.module, replace(add, operand=now.operand))
        for add, now in zip(wanted, after, strict=True)
    ]


def _hooks_of(model: nn.Module, add: ResidualAdd) -> str:
    """The hooks that may have added: a graph does not tell their lines."""
    module = model.get_submodule(add.module)
    places = []
    for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values()):
        called = hook if inspect.isroutine(hook) else type(hook).__call__
        function = inspect.unwrap(getattr(called, "__func__", called))
        if isinstance(function, FunctionType):
            with suppress(SourceError):
                if any(adds_in(definition_of(function), function)):
                    code = function.__code__
                    places.append(f"{short_path(code.co_filename)}:{code.co_firstlineno}")
    return f", perhaps by the hook at {', '.join(places)}" if places else ""


def _or_as_graph(graph: fx.GraphModule, wanted: list[ResidualAdd]) -> str:
    """The other way, if it reaches all of them."""
    if not {add.node for add in wanted} <= additions(graph).keys():
        return ""
    return (
        f"; or rewrite the graph, where all {len(wanted)} are in reach: "
        "rf.transform(torch.export.export(model, args, kwargs).module(), residual=...)"
    )


def _check_calls(graph: fx.GraphModule, found: list[ResidualAdd], or_else: str) -> None:
    """A site may be called often, by a loop or a shared method: each time with the same skip."""
    calls: dict[str, set[tuple[ModuleCall, ...]]] = defaultdict(set)
    for module in graph.modules():
        for node in module.graph.nodes if isinstance(module, fx.GraphModule) else ():
            calls[module_of(node)].add(module_calls(node))
    for path, number in Counter(add.module for add in found).items():
        adds = [add for add in found if add.module == path]
        sides = sorted({("left", "right")[add.operand] for add in adds})
        if len(calls[path]) != number or len(sides) > 1:
            raise ResidualError(
                f"the addition at {adds[0].source} serves several places: it is a residual add in "
                f"{number} of its {len(calls[path])} calls, with the skip on the "
                f"{' or the '.join(sides)}. Write the residual ones out, each in its "
                f"place{or_else}.",
                adds,
            )


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


# ---- torch's own layers ------------------------------------------------------------------------


def _leave_fast_paths(model: nn.Module) -> None:
    """torch computes a TransformerEncoderLayer in eval mode as one kernel, its adds within: not one
    with hooks.
    """
    for module in model.modules():
        sites = [m for m in module.children() if isinstance(m, ResidualSite)]
        if sites and isinstance(module, nn.TransformerEncoderLayer):
            sites[0].register_forward_hook(_no_fast_path)
    without_nested_tensors(model, lambda module: isinstance(module, ResidualSite))


def _no_fast_path(*_: object) -> None:
    """A hook that does nothing."""


# ---- the check -------------------------------------------------------------------------------


def _outputs(model: nn.Module, inputs: Inputs) -> list[torch.Tensor]:
    """The tensors that a model computes in eval mode; modes, seeds and inputs stay as they are."""
    args, kwargs = copied(inputs)
    modes = in_mode(model, training=False)
    with modes, buffers_kept(model), torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        return tensors_of(model(*args, **kwargs))


def _check_equal(model: nn.Module, expected: list[torch.Tensor], got: list[torch.Tensor]) -> None:
    pairs = zip(expected, got, strict=True)
    same = all(torch.allclose(a, b, rtol=0, atol=0, equal_nan=True) for a, b in pairs)
    if not same:
        raise ResidualError(
            f"{type(model).__name__} computes something else once its residual adds are modules: "
            "an add changes a tensor in place that is read elsewhere. Write x = x + f(x) there."
        )
