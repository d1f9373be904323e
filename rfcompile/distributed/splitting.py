"""split_at_boundaries: cuts a model into pipeline stages between its repeated blocks."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import fx, nn

from rfcompile.errors import BoundaryError, CaptureError, OptionError
from rfcompile.graph.boundaries import find_boundaries
from rfcompile.graph.capture import exported, inputs_of
from rfcompile.graph.models import check_module, copy_of, uncompiled
from rfcompile.rewrites.wires import place, wires_of
from rfcompile.wire.fake import FakeWire
from rfcompile.wire.policy import Policy

_MARK = torch.ops.rfcompile.fake_wire.default
_MARKING = Policy.of(bits=8, min_bytes=0)
"""Any policy that leaves an operator in the graph."""


def split_at_boundaries(
    model: nn.Module, n: int, example_inputs: Any = None
) -> tuple[fx.GraphModule, ...]:
    """Cut a model into ``n`` modules to call one after another, for as many pipeline stages.

    Where it may be cut is what :func:`rfcompile.transform` marks: the boundaries of the model that
    it returned, or for any other model those of ``Wire(modules="auto")``, its repeated blocks. The
    cuts leave each stage as many blocks as the others, or earlier ones one more. The fake wires
    themselves are left out.

    The first stage takes the model's inputs by position; each hands a tensor, or a tuple, to the
    next; the last one returns the model's outputs, flat. What depends on no parameter (positions,
    masks) is computed again where it is used, so that not it, but at most the inputs that it is
    made of travel. Parameters and buffers are the model's own, with their names.

    The stages are captured by ``torch.export``: inputs have the sizes of ``example_inputs``, and
    modules such as dropout stay in the mode that the model is in. What the graph does not use is in
    no stage.

    Args:
        model: a module.
        n: number of stages, at least 1; at most one more than there are boundaries.
        example_inputs: those of one micro-batch, as for :func:`rfcompile.transform`.

    Raises:
        OptionError: ``n``. BoundaryError: too few boundaries, a block whose output nothing uses, or
        a parameter that two stages use. CaptureError: the model cannot be captured, or changes its
        buffers, as a batch norm in training does.
    """
    check_module(model)
    if type(n) is not int or n < 1:
        raise OptionError("n", n, "give a number of stages, 1 or more.")
    model = uncompiled(model)
    twin = copy_of(model, share=True)
    _mark(twin)
    gm = _functional(exported(twin, inputs_of(twin, example_inputs)))
    cuts = _cuts(gm.graph.find_nodes(op="call_function", target=_MARK), n, type(model).__name__)
    stages = _stages(gm, cuts)
    _require_own_parameters(stages)
    saved = model.state_dict().keys()
    for module_path, module in ((p, m) for stage in stages for p, m in stage.named_modules()):
        for name in module._buffers:
            if f"{module_path}.{name}".lstrip(".") not in saved:
                module._non_persistent_buffers_set.add(name)
    return stages


def _mark(twin: nn.Module) -> None:
    """A fake wire that shows in the graph, wherever there is one, or else at every boundary."""
    marked = [wire.module for wire in wires_of(twin)]
    place(twin, {path: FakeWire(path, _MARKING) for path in marked or find_boundaries(twin)})


def _cuts(marks: list[fx.Node], n: int, model: str) -> list[fx.Node]:
    """``n - 1`` of the marks, so that as many lie before each as in equal shares."""
    if len(marks) < n - 1:
        raise BoundaryError(
            f"{model} has {len(marks)} boundaries: too few for {n} stages, which need {n - 1}. Ask "
            "for fewer stages, or mark more: rf.transform(model, rf.Wire('exact', modules=[...]))."
        )
    return [marks[-(-i * len(marks) // n) - 1] for i in range(1, n)]


def _functional(program: torch.export.ExportedProgram) -> fx.GraphModule:
    """The program without operators that write to their arguments: a part could lose them."""
    gm = program.module()
    if _writes(gm):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*LeafSpec", FutureWarning)  # torch's own
            gm = program.run_decompositions({}).module()
    if left := _writes(gm):  # to a buffer
        raise CaptureError(
            f"a model that changes its buffers ({left[0].target}) cannot be cut: a batch norm in "
            "training does; put it into eval mode, or use another norm."
        )
    assert isinstance(gm, fx.GraphModule)
    return gm


def _writes(gm: nn.Module) -> list[fx.Node]:
    assert isinstance(gm, fx.GraphModule)
    schemas = {node: getattr(node.target, "_schema", None) for node in gm.graph.nodes}
    return [node for node, schema in schemas.items() if schema is not None and schema.is_mutable]


def _stages(gm: fx.GraphModule, cuts: list[fx.Node]) -> tuple[fx.GraphModule, ...]:
    """From the last stage to the first: what one needs from before is what the one before gives."""
    users_inputs = gm.graph.find_nodes(op="placeholder")
    [end] = gm.graph.find_nodes(op="output")
    results = [value for value in end.args[0] if isinstance(value, fx.Node)]
    activations = _activations(gm)
    stages: list[fx.GraphModule] = []
    for start in reversed(cuts):
        here = (_descendants(start) | set(gm.graph.nodes) - activations) - {start, *users_inputs}
        needed = _needed(results, here)
        if start not in needed:
            raise BoundaryError(f"nothing after it uses the output of {start.args[0]}: no cut.")
        others = [node for node in gm.graph.nodes if node in needed - here - {start}]
        stages.append(_module(gm, [start, *others], needed, results))
        results = [start.all_input_nodes[0], *others]
    stages.append(_module(gm, users_inputs, _needed(results, set(gm.graph.nodes)), results))
    return tuple(reversed(stages))


def _activations(gm: fx.GraphModule) -> set[fx.Node]:
    """The nodes that one stage computes and no other: of inputs and parameters, or at random."""
    of_inputs: set[fx.Node] = set()
    of_parameters: set[fx.Node] = set()
    found: set[fx.Node] = set()
    for node in gm.graph.nodes:
        arguments = set(node.all_input_nodes)
        is_random = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
        if node.op == "placeholder" or arguments & of_inputs:
            of_inputs.add(node)
        if arguments & of_parameters or isinstance(_attribute(gm, node), nn.Parameter):
            of_parameters.add(node)
        if is_random or arguments & found or (node in of_inputs and node in of_parameters):
            found.add(node)
    return found


def _attribute(gm: fx.GraphModule, node: fx.Node) -> object:
    if node.op != "get_attr":
        return None
    value: object = gm
    for name in str(node.target).split("."):
        value = getattr(value, name)
    return value


def _descendants(start: fx.Node) -> set[fx.Node]:
    found, waiting = {start}, [start]
    while waiting:
        new = [user for user in waiting.pop().users if user not in found]
        found.update(new)
        waiting += new
    return found


def _needed(results: Iterable[fx.Node], here: set[fx.Node]) -> set[fx.Node]:
    """The results and all that they are made of, back to what is not computed ``here``."""
    found: set[fx.Node] = set()
    waiting = list(results)
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            if node in here:
                waiting += node.all_input_nodes
    return found


def _module(
    gm: fx.GraphModule, inputs: list[fx.Node], needed: set[fx.Node], results: list[fx.Node]
) -> fx.GraphModule:
    graph = fx.Graph()
    names = [(n.all_input_nodes[0] if n.target is _MARK else n).name for n in inputs]
    copies = {node: graph.placeholder(name) for node, name in zip(inputs, names, strict=True)}
    for node in gm.graph.nodes:
        if node in needed and node not in copies:
            is_mark = node.target is _MARK
            copies[node] = (
                copies[node.args[0]] if is_mark else graph.node_copy(node, copies.__getitem__)
            )
    outputs = tuple(copies[node] for node in results)
    graph.output(outputs[0] if len(outputs) == 1 else outputs)
    graph.lint()
    return fx.GraphModule(gm, graph, class_name="Stage")


def _require_own_parameters(stages: tuple[fx.GraphModule, ...]) -> None:
    owners: dict[int, tuple[int, str]] = {}
    for index, stage in enumerate(stages):
        for name, parameter in stage.named_parameters():
            first, other = owners.setdefault(id(parameter), (index, name))
            if first != index:
                raise BoundaryError(
                    f"stages {first} and {index} both use the parameter {other!r}: on two ranks "
                    "its copies would drift apart. Untie the weights (in transformers, "
                    "config.tie_word_embeddings=False), or cut elsewhere."
                )
