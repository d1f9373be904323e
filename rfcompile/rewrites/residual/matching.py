"""Tells which site stands for which residual add by what is added, without a second capture.

The captured graph runs, and so does the model whose candidates are sites already, both with random
numbers for parameters of zeros. A site stands for an add if the same skip enters it and the same
sum leaves it, bit for bit. Where that leaves a doubt there is no answer, and the caller captures
the model again.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export.graph_signature import InputKind
from torch.utils import _pytree as pytree

from rfcompile.graph.capture import Inputs, buffers_kept, copied, in_mode
from rfcompile.nn.residual_site import ResidualSite
from rfcompile.passes.find_residuals import ResidualAdd
from rfcompile.passes.open_residuals import OpenedSite


@dataclass(frozen=True)
class _Sum:
    """An addition that was run: digests of what was added, and of the result."""

    operands: tuple[bytes, ...]
    result: bytes


def matched_sites(
    model: nn.Module,
    inputs: Inputs,
    program: torch.export.ExportedProgram,
    wanted: list[ResidualAdd],
) -> list[OpenedSite] | None:
    """The sites of the wanted adds, in their order; None where values do not tell.

    They tell if in each module every sum leaves as many calls of sites as wanted adds, and is not
    the skip itself; and if every call of such a site is a wanted add with the skip on one side.

    Args:
        model: with candidates in the places of its adds, which compute what they did.
        program: the model before, in eval mode.
    """
    try:
        in_eval_mode = in_mode(model, training=False)
        with torch.no_grad(), in_eval_mode, buffers_kept(model), torch.random.fork_rng():
            state = _without_zeros(program.state_dict)
            sums = _sums_in(program, state, inputs, {add.node for add in wanted})
            calls = _calls_in(model, state, inputs)
    except Exception:  # the capture that follows says what does not run
        return None
    adds: dict[tuple[nn.Module, bytes], list[ResidualAdd]] = defaultdict(list)
    for add in wanted:
        if add.node not in sums:
            return None
        adds[model.get_submodule(add.module), sums[add.node].result].append(add)
    found: dict[ResidualAdd, OpenedSite] = {}
    sides: dict[ResidualSite, list[int]] = defaultdict(list)
    for (module, result), same in adds.items():
        names = {m: name for name, m in module._modules.items() if isinstance(m, ResidualSite)}
        names |= {module: ""} if isinstance(module, ResidualSite) else {}
        here = [(site, call) for site, call in calls if site in names and call.result == result]
        if len(here) != len(same):
            return None
        for add, (site, call) in zip(same, here, strict=True):
            terms = sums[add.node].operands  # of a stack there is one
            skip = terms[add.operand] if add.operand < len(terms) else result
            if skip == result or call.operands.count(skip) != 1:
                return None
            sides[site].append(call.operands.index(skip))
            path = ".".join(part for part in (add.module, names[site]) if part)
            found[add] = OpenedSite(path, replace(add, operand=sides[site][-1]))
    number = Counter(site for site, _ in calls)
    if any(len(side) != number[site] or len({*side}) > 1 for site, side in sides.items()):
        return None
    return [found[add] for add in wanted]


def _without_zeros(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state in which no tensor is zero everywhere: a branch of zeros would tell nothing."""
    generator = torch.Generator().manual_seed(0)
    held: dict[Tensor, Tensor] = {}
    for tensor in dict.fromkeys(state.values()):
        held[tensor] = tensor
        if tensor.is_floating_point() and not tensor.any():
            held[tensor] = (0.1 * torch.randn(tensor.shape, generator=generator)).to(tensor)
    return {name: held[tensor] for name, tensor in state.items()}


def _digest(value: Any) -> bytes:
    if not isinstance(value, Tensor):
        return repr(value).encode()
    data = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
    facts = f"{value.dtype} {tuple(value.shape)}".encode()
    return hashlib.blake2b(data, digest_size=16, key=facts[:64]).digest()


# ---- the graph ---------------------------------------------------------------------------------


def _sums_in(
    program: torch.export.ExportedProgram,
    state: Mapping[str, Tensor],
    inputs: Inputs,
    names: set[str],
) -> dict[str, _Sum]:
    run = _Sums(program.graph_module, names)
    torch.manual_seed(0)
    run.run(*_arguments(program, state, inputs))
    return run.found


class _Sums(fx.Interpreter):
    """Runs a graph and notes some of its additions, by the names of their nodes."""

    def __init__(self, gm: fx.GraphModule, names: set[str]) -> None:
        super().__init__(gm)
        self.names = names
        self.found: dict[str, _Sum] = {}

    def run_node(self, n: fx.Node) -> Any:
        if n.name not in self.names:
            return super().run_node(n)
        args, _ = self.fetch_args_kwargs_from_env(n)
        operands = tuple(map(_digest, args))  # now: it may change one of them
        result = super().run_node(n)
        self.found[n.name] = _Sum(operands, _digest(result))
        return result


def _arguments(
    program: torch.export.ExportedProgram, state: Mapping[str, Tensor], inputs: Inputs
) -> list[Any]:
    """The inputs of a program's graph: parameters, buffers, constants, and what a user gives."""
    given = iter(pytree.tree_leaves(copied(inputs)))
    held = {**state, **program.constants}
    return [
        next(given) if spec.kind is InputKind.USER_INPUT else held[str(spec.target)]
        for spec in program.graph_signature.input_specs
    ]


# ---- the model ---------------------------------------------------------------------------------


def _calls_in(
    model: nn.Module, state: Mapping[str, Tensor], inputs: Inputs
) -> list[tuple[ResidualSite, _Sum]]:
    """The calls of sites when the model runs, in order."""
    calls: list[tuple[ResidualSite, _Sum]] = []

    def note(site: ResidualSite, args: Any, result: Any) -> None:
        calls.append((site, _Sum(tuple(map(_digest, args)), _digest(result))))

    sites = [module for module in model.modules() if isinstance(module, ResidualSite)]
    hooks = [site.register_forward_hook(note) for site in sites]
    try:
        torch.manual_seed(0)
        torch.func.functional_call(model, dict(state), *copied(inputs))
    finally:
        for hook in hooks:
            hook.remove()
    return calls
