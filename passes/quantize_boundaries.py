"""A pass that puts a fake wire between the repeated blocks of a graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import fx

from rfcompile.codec import operators
from rfcompile.errors import BoundaryError, CaptureError
from rfcompile.find.axes import bytes_of, value_of
from rfcompile.graph.boundaries import find_blocks, match_paths
from rfcompile.graph.pipeline import PassResult
from rfcompile.graph.places import ModuleCall, module_calls, source_of
from rfcompile.graph.text import graph_text
from rfcompile.report.report import Site
from rfcompile.wire.fake import fake_wire, wire_arguments
from rfcompile.wire.policy import Policy, exact


@dataclass(frozen=True)
class QuantizeBoundaries:
    """Send the hidden state that leaves a block over a fake wire, once for all its readers.

    A block is a module that ``find_boundaries`` would find, as far as the graph tells; or those
    that ``boundaries`` names by path or pattern. Its hidden state is the float tensor of at least
    two dimensions that it computes last among those that others read; what else it hands on
    (position biases, router scores) stays exact. Fake wires that are in the graph already go.

    Rewrites:
        add = add(x, y)  # the last of block 0; block 1 reads it
            -> add = add(x, y); fake_wire = fake_wire(add, '4b:g128:rise', '4b:g128:rise')

    The tier is "rounding"; the bound is that of one round trip of the format.

    Raises:
        BoundaryError: no block. CaptureError: the graph has no shapes. DtypeError: a hidden state
        cannot be quantized and the policy does not leave it exact.
    """

    policy: Policy
    boundaries: Literal["auto"] | tuple[str, ...] = "auto"
    name: str = "quantize-boundaries"
    tier: Literal["rounding"] = "rounding"

    def __call__(self, gm: fx.GraphModule) -> PassResult:
        before = graph_text(gm)
        changes = _remove_wires(gm)
        inside = self._blocks(gm)
        depths = {call: depth for stack in inside.values() for depth, call in enumerate(stack)}
        sites: list[Site] = []
        for call in sorted(depths, key=lambda call: -depths[call]):  # inner blocks first
            leaving = _leaving(gm, inside, call)
            matrices = [node for node in leaving if value_of(node).dim() >= 2]
            hidden = next(reversed(matrices or list(leaving)), None)
            if hidden is None:
                continue
            sites += [self._site(node, call.path, node is hidden) for node in leaving]
            if arguments := self._arguments(hidden, call.path):
                operators.check_codec_input(value_of(hidden), f"the output of module {call.path!r}")
                wire = _insert_wire(hidden, arguments, leaving[hidden])
                inside[wire] = inside[hidden][: depths[call]]
                changes += 1
        return PassResult(gm, changes if graph_text(gm) != before else 0, tuple(sites))

    def _arguments(self, node: fx.Node, block: str) -> tuple[str, ...]:
        size = bytes_of(value_of(node))
        return wire_arguments(self.policy.for_fake_wire(), block, size)

    def _site(self, node: fx.Node, block: str, is_hidden_state: bool) -> Site:
        value = value_of(node)
        size = bytes_of(value)
        decision = self.policy.for_fake_wire().decide("activations", block, size)
        if not is_hidden_state:
            decision = exact("not traffic", "it is not the hidden state of the block")
        fmt = decision.format
        return Site.of(
            decision,
            value.shape,
            value.dtype,
            (size, fmt.payload_bytes(value.numel()) if fmt and size is not None else size),
            collective="boundary",
            direction="forward",
            kind="activations",
            module=block,
            source=source_of(node),
        )

    def _blocks(self, gm: fx.GraphModule) -> dict[fx.Node, list[ModuleCall]]:
        """The calls of blocks that each node belongs to, outermost first; only nodes in blocks."""
        given = ("placeholder", "get_attr")  # inputs and weights are not computed in a block
        calls = {node: module_calls(node) for node in gm.graph.nodes if node.op not in given}
        if not any("val" in node.meta or "example_value" in node.meta for node in calls):
            raise CaptureError(
                "the graph has no shapes in its metadata: pass example_inputs, or a graph from "
                "torch.export."
            )
        classes = {call.path: call.cls for stack in calls.values() for call in stack}
        if self.boundaries == "auto":
            paths = set(find_blocks(classes))
        else:
            paths = set(match_paths(self.boundaries, classes))
        if not paths:
            raise BoundaryError(
                "no node of the graph belongs to a repeated block (two modules of one class in a "
                "list): name the modules whose output crosses the wire, "
                "modules=['path.of.module', ...]."
            )
        inside = {n: [call for call in stack if call.path in paths] for n, stack in calls.items()}
        if self.boundaries == "auto":  # a block within a block is no boundary
            inside = {node: stack[:1] for node, stack in inside.items()}
        return {node: stack for node, stack in inside.items() if stack}


def _leaving(
    gm: fx.GraphModule, inside: Mapping[fx.Node, Sequence[ModuleCall]], call: ModuleCall
) -> dict[fx.Node, list[fx.Node]]:
    """The float tensors that a call of a block hands on, each with its readers outside."""
    found = {}
    for node in gm.graph.nodes:
        readers = [user for user in node.users if call not in inside.get(user, ())]
        if readers and call in inside.get(node, ()) and _travels(value_of(node)):
            found[node] = readers
    return found


def _insert_wire(node: fx.Node, arguments: tuple[str, ...], readers: Sequence[fx.Node]) -> fx.Node:
    with node.graph.inserting_after(node):
        wire = node.graph.call_function(fake_wire, (node, *arguments))
    wire.meta = dict(node.meta)
    for reader in readers:
        reader.replace_input_with(node, wire)
    return wire


def _remove_wires(gm: fx.GraphModule) -> int:
    wires = gm.graph.find_nodes(op="call_function", target=fake_wire)
    for wire in wires:
        wire.replace_all_uses_with(wire.args[0])
        gm.graph.erase_node(wire)
    return len(wires)


def _travels(value: object) -> bool:
    return isinstance(value, torch.Tensor) and (value.is_floating_point() or value.is_complex())
