"""TemperatureRule: a temperature for each attention that depends on its depth."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from rfcompile.errors import ResidualError
from rfcompile.find.attention_cores import Core, cores_of
from rfcompile.find.linears import Linear
from rfcompile.graph.capture import Inputs, Interpreter, buffers_kept, copied, in_mode, plain_graph
from rfcompile.graph.places import ModuleCall, module_calls, module_of
from rfcompile.nn.multihead import TEMPERATURE, TemperedAttention
from rfcompile.rewrites.attention.anatomy import Attention, anatomy
from rfcompile.rewrites.attention.matrices import matrix_of
from rfcompile.rewrites.residual.report import Temperature


@dataclass(frozen=True)
class TemperatureRule:
    """Attention of layer ``l`` of ``L`` becomes ``softmax(Q K^T / (tau_l sqrt(head)))``.

    ``tau_l`` is such that on the example inputs the mean weight of a token on itself is
    ``max(1/2, self_mass^(1/L))``: through all layers a share ``self_mass`` stays at its token, so
    deeper models attend more sharply. A ``learnable`` one is a parameter, else it is a buffer. An
    attention that cannot have one is an error if it is ``required``; else it keeps its own, and the
    report says why.

    Source: arXiv:2605.25880 names a depth-aware temperature without its formula. The schedule has
    the form of E-SPA's (arXiv:2302.10322); solving the temperature for it is ours. So is the
    default: colder attention hardly mixes at the start, and small language models learned more
    slowly with it.
    """

    self_mass: float = 0.01
    learnable: bool = True
    required: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.self_mass < 1:
            raise ResidualError(
                f"self_mass={self.self_mass!r} is not supported: it is a share between 0 and 1."
            )


class ScaleQueries:
    """Forward hook: divide the queries in a module's output by its temperature."""

    def __init__(self, features: Sequence[int] | None) -> None:
        self.features = None if features is None else sorted(features)

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        temperature: Tensor = getattr(module, TEMPERATURE)
        scale = temperature.reciprocal().to(output.dtype)
        if self.features is None:
            return output * scale
        index = torch.tensor(self.features, device=output.device)
        factors = output.new_ones(output.shape[-1])
        return output * factors.index_put((index,), scale.expand(len(self.features)))


def temper(
    model: nn.Module,
    inputs: Inputs,
    rule: TemperatureRule = TemperatureRule(),
    left_out: dict[str, str] | None = None,
) -> tuple[Temperature, ...]:
    """Give every self-attention of ``model`` its temperature, in place.

    It scales what the query linear gives (or the normalization after it), so every implementation
    of attention has it; ``nn.MultiheadAttention`` scales its own. Cross-attentions keep theirs.

    Args:
        left_out: where a rule that is not ``required`` puts, by the path of an attention, why it
            has none.

    Raises:
        ResidualError: an attention's queries come from no module whose output can be scaled.
        CaptureError.
    """
    with torch.no_grad(), in_mode(model, training=False), buffers_kept(model):
        module = plain_graph(model, inputs)
        attentions = anatomy(model, inputs, module).attentions
        run = _run(module, rule, attentions, inputs, frozenset())
        places, left = _places(model, run)
        for core in left if rule.required else ():
            raise ResidualError(
                f"the attention of {module_of(core.result) or 'the model'} cannot be tempered: "
                f"{left[core]}. Pass temperature=None, or scale its queries in the model."
            )
        if left_out is not None:
            left_out |= {module_of(core.result): reason for core, reason in left.items()}
        if left:
            run = _run(module, rule, attentions, inputs, left.keys())
    values: dict[str, float] = {}
    for core, place in places.items():
        if place.path not in values:
            whole = [other.features for other in places.values() if other.path == place.path]
            features = None if None in whole else sorted({f for fs in whole if fs for f in fs})
            owner = model.get_submodule(place.path)
            like = next(itertools.chain(owner.parameters(), model.parameters()))
            values[place.path] = _install(owner, rule, run.found[core].value, features, like)
    return tuple(
        replace(run.found[core], name=f"{place.path}.{TEMPERATURE}", value=values[place.path])
        for core, place in places.items()
    )


def _install(
    owner: nn.Module,
    rule: TemperatureRule,
    factor: float,
    features: Sequence[int] | None,
    like: Tensor,
) -> float:
    is_hooked = any(isinstance(hook, ScaleQueries) for hook in owner._forward_hooks.values())
    if is_hooked or isinstance(owner, TemperedAttention):  # it was tempered before
        value = getattr(owner, TEMPERATURE).detach() * factor
        delattr(owner, TEMPERATURE)
    else:
        value = torch.full((1,), factor, device=like.device)
        if isinstance(owner, nn.MultiheadAttention):
            owner.__class__ = TemperedAttention
        else:
            owner.register_forward_hook(ScaleQueries(features))
    if rule.learnable:
        owner.register_parameter(TEMPERATURE, nn.Parameter(value))
    else:
        owner.register_buffer(TEMPERATURE, value)
    return float(value)


# ---- how hot -----------------------------------------------------------------------------------


class _Calibration(Interpreter):
    """Runs a graph, and on the way gives each self-attention the temperature that it needs."""

    def __init__(
        self,
        module: fx.GraphModule,
        rule: TemperatureRule,
        attentions: Sequence[Attention],
        without: Collection[Core],
    ) -> None:
        super().__init__(module)
        self.graph = module.graph
        self.cores = {core.weights: core for core in cores_of(module.graph)}
        pairs = zip(self.cores.values(), attentions, strict=True)
        self.layers = {
            core: found
            for core, found in pairs
            if found.is_self and _is_square(core) and core.kind == "softmax"
        }
        self.target = max(0.5, rule.self_mass ** (1 / max(1, len(self.layers))))
        self.without = without
        self.found: dict[Core, Temperature] = {}
        self.values: dict[Linear | None, float] = {}
        self.ways: dict[tuple[fx.Node, fx.Node], list[fx.Node]] = {}

    def run_node(self, n: fx.Node) -> Any:
        core = self.cores.get(n)
        if core in self.layers and core not in self.without:
            node = core.query
            heads = self.layers[core].query
            query = heads.linear if heads else None
            if query not in self.values:  # a linear that is read again keeps its temperature
                self.values[query] = self._solve(core)
            value = self.values[query]
            attention = module_of(core.result)
            self.found[core] = Temperature(
                "", attention, value, self._mass(core, 1.0), self._mass(core, value)
            )
            self.env |= self.again(node, self.env[node] / value, n)
        return super().run_node(n)

    def again(self, start: fx.Node, value: Tensor, end: fx.Node) -> dict[fx.Node, Any]:
        """The values before ``end`` that change if ``start`` has another value."""
        env, changed = self.env, {start: value}
        self.env = {**env, start: value}
        try:
            for node in self._between(start, end):
                changed[node] = self.env[node] = super().run_node(node)
        finally:
            self.env = env
        return changed

    def _between(self, start: fx.Node, end: fx.Node) -> list[fx.Node]:
        """The nodes before ``end`` that are made of ``start``."""
        if (start, end) not in self.ways:
            found = {start}
            way = self.ways[start, end] = []
            for node in itertools.takewhile(lambda n: n is not end, self.graph.nodes):
                if not found.isdisjoint(node.all_input_nodes):
                    found.add(node)
                    way.append(node)
        return self.ways[start, end]

    def _solve(self, core: Core) -> float:
        low, high = -math.log(LIMIT), math.log(LIMIT)
        for _ in range(30):
            middle = (low + high) / 2
            if self._mass(core, math.exp(middle)) > self.target:
                low = middle
            else:
                high = middle
        return math.exp((low + high) / 2)

    def _mass(self, core: Core, temperature: float) -> float:
        """Mean weight of a token on itself."""
        node = core.query
        values = {**self.env, **self.again(node, self.env[node] / temperature, core.weights)}
        return float(matrix_of(core, values).diagonal(dim1=-2, dim2=-1).mean())


LIMIT = 16.0
"""Temperatures are between 1 / LIMIT and LIMIT."""


def _is_square(core: Core) -> bool:
    q, k = core.query.meta["val"], core.key.meta["val"]
    return bool(q.shape[-2] == k.shape[core.key_axes[0]])


# ---- where -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Place:
    """A call of a module whose output is to be scaled, and its features; None: all of them."""

    call: tuple[ModuleCall, ...]
    features: tuple[int, ...] | None

    @property
    def path(self) -> str:
        return self.call[-1].path


def _run(
    module: fx.GraphModule,
    rule: TemperatureRule,
    attentions: Sequence[Attention],
    inputs: Inputs,
    without: Collection[Core],
) -> _Calibration:
    run = _Calibration(module, rule, attentions, without)
    run.run(*pytree.tree_leaves(copied(inputs)), enable_io_processing=False)
    return run


def _places(model: nn.Module, run: _Calibration) -> tuple[dict[Core, _Place], dict[Core, str]]:
    """Where the temperature of an attention goes, or why nowhere."""
    found = {core: _place(model, run, core) for core in run.found}
    places = {core: place for core, place in found.items() if isinstance(place, _Place)}
    left = {core: reason for core, reason in found.items() if isinstance(reason, str)}
    for path in _called_elsewhere(run.graph, places.values()):
        for core in [core for core, place in places.items() if place.path == path]:
            del places[core]
            left[core] = (
                f"{path} makes the queries of an attention, but is also called elsewhere, so it "
                "cannot have its temperature"
            )
    return places, left


def _place(model: nn.Module, run: _Calibration, core: Core) -> _Place | str:
    """The query linear, unless a normalization after it would undo the scale; or why none."""
    attention = run.layers[core]
    if attention.query is None:
        return "no linear makes its queries"
    features = tuple(sorted(itertools.chain(*attention.query.features)))
    linear = attention.query.linear.module
    if type(model.get_submodule(linear)) in (nn.MultiheadAttention, TemperedAttention):
        return _Place(module_calls(core.query), None)
    last: dict[str, fx.Node] = {}
    for n in _before(core.query):
        path = module_of(n)
        if path not in last and path not in ("", attention.module):
            last[path] = n
    width = run.env[last[linear]].shape[-1] if linear in last else 0
    for n in sorted(last.values(), key=lambda n: module_of(n) != linear):
        output = run.env[n]
        if not (isinstance(output, Tensor) and output.is_floating_point()):
            continue
        factors = torch.full_like(output[..., :1], 0.5).expand_as(output)
        chosen = None
        if len(features) < output.shape[-1] == width:  # also where a LoRA adds to the linear
            chosen = features
            factors = torch.ones_like(output).index_fill(-1, torch.tensor(features), 0.5)
        whole = run.again(n, output, core.result)
        scaled = run.again(n, output * factors, core.result)
        if core.query in whole and all(
            torch.allclose(scaled[node], whole[node] * factor, rtol=1e-3)
            for node, factor in ((core.query, 0.5), (core.key, 1.0), (core.value, 1.0))
            if node in whole
        ):
            return _Place(module_calls(n), chosen)
    return (
        f"scaling the output of {linear or 'its query linear'} does not scale its queries and "
        "nothing else"
    )


def _called_elsewhere(graph: fx.Graph, places: Iterable[_Place]) -> set[str]:
    """A module's temperature is there whenever it is called: each time, for queries."""
    tempered: dict[str, set[tuple[ModuleCall, ...]]] = {}
    for place in places:
        tempered.setdefault(place.path, set()).add(place.call)
    calls = [call for node in graph.nodes if (call := module_calls(node))]
    return {call[-1].path for call in calls if call not in tempered.get(call[-1].path, {call})}


def _before(node: fx.Node) -> Iterator[fx.Node]:
    """The node and what it is computed from, nearest first, some steps back."""
    reached = [node]
    for n in itertools.islice(reached, 256):  # grows while it runs
        yield n
        reached += [i for i in n.all_input_nodes if i not in reached]
