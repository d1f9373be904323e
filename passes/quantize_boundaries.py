"""Put a fake wire where a graph crosses from one repeated block to the next."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

import torch
from torch import fx

from rfcompile.errors import BoundaryError, CaptureError
from rfcompile.fake_wire import fake_wire
from rfcompile.graph import dtype_text, module_stack, source_of
from rfcompile.pipeline import PassResult
from rfcompile.policy import Policy
from rfcompile.report import Site


@dataclass(frozen=True)
class QuantizeBoundaries:
    """Send every float tensor that leaves a block over a fake wire, once for all its readers.

    A block is a module whose path ends in a number and that has a sibling ("layers.0" and
    "layers.1"), the outermost such; or the modules that ``boundaries`` names by path or pattern.

    Rewrites:
        add = add(x, y)  # the last of block 0; block 1 reads it
            -> add = add(x, y); fake_wire = fake_wire(add, '4b:g128:rise', '4b:g128:rise')

    The tier is "rounding"; the bound is that of one round trip of the format.

    Raises:
        BoundaryError: no block. CaptureError: the graph has no shapes.
    """

    policy: Policy
    boundaries: str | tuple[str, ...] = "auto"
    name: str = "quantize-boundaries"
    tier: Literal["rounding"] = "rounding"

    def __call__(self, gm: fx.GraphModule) -> PassResult:
        blocks = self._blocks(gm)
        sites: list[Site] = []
        changes = 0
        for node, block in blocks.items():
            leaving = [user for user in node.users if blocks.get(user) != block]
            if not leaving or any(user.target is fake_wire for user in leaving):
                continue
            value = node.meta.get("val", node.meta.get("example_value"))
            if not (isinstance(value, torch.Tensor) and value.is_floating_point()):
                continue
            site, formats = self._site(node, block, value)
            sites.append(site)
            if any(formats):
                with gm.graph.inserting_after(node):
                    wire = gm.graph.call_function(fake_wire, (node, *formats))
                wire.meta = dict(node.meta)
                for user in leaving:
                    user.replace_input_with(node, wire)
                changes += 1
        return PassResult(gm, changes, tuple(sites))

    def _site(self, node: fx.Node, block: str, value: torch.Tensor) -> tuple[Site, tuple[str, str]]:
        numel = value.numel()
        size = numel * value.element_size() if isinstance(numel, int) else None
        forward, reason = self.policy.format_for("activations", block, size or 2**62)
        backward, _ = self.policy.format_for("gradients", block, size or 2**62)
        site = Site(
            collective="boundary",
            direction="forward",
            kind="activations",
            module=block,
            source=source_of(node),
            shape=tuple(s if isinstance(s, int) else str(s) for s in value.shape),
            dtype=dtype_text(value.dtype),
            group="",
            world_size=2,
            format=forward.spec if forward else None,
            reason=reason,
            eligible=True,
            bytes_before=size,
            bytes_after=forward.payload_bytes(numel) if forward and size is not None else size,
        )
        return site, (forward.spec if forward else "", backward.spec if backward else "")

    def _blocks(self, gm: fx.GraphModule) -> dict[fx.Node, str]:
        stacks = {node: module_stack(node) for node in gm.graph.nodes if node.op != "placeholder"}
        if not any("val" in node.meta or "example_value" in node.meta for node in stacks):
            raise CaptureError(
                "the graph has no shapes in its metadata: pass example_inputs, or a graph from "
                "torch.export."
            )
        paths = {path for stack in stacks.values() for path in stack}
        blocks = {}
        for node, stack in stacks.items():
            inside = [path for path in stack if self._is_block(path, paths)]
            if inside:
                blocks[node] = inside[0]
        if not blocks:
            raise BoundaryError(
                "no node of the graph belongs to a repeated block (two modules whose paths differ "
                "in a number): name the modules whose output crosses the wire, "
                "boundaries=['path.of.module', ...]."
            )
        return blocks

    def _is_block(self, path: str, paths: Sequence[str] | set[str]) -> bool:
        if self.boundaries != "auto":
            return any(fnmatchcase(path, pattern) for pattern in self.boundaries)
        match = re.fullmatch(r"(.*?)(\d+)", path)
        if match is None or (match[1] and not match[1].endswith(".")):
            return False
        sibling = re.compile(re.escape(match[1]) + r"\d+")
        return sum(sibling.fullmatch(other) is not None for other in paths) > 1
