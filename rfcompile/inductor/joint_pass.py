"""The rewrite as a pass on joint graphs: forward, loss and backward in one.

torchtitan's graph_trainer and AutoParallel capture such graphs, and run a list of passes
``(gm, example_inputs) -> gm`` on them before anything compiles.

Private parts of torch used here, tried on torch 2.13: ``is_param()`` of the descriptor that
``aot_export_joint_with_descriptors`` puts into ``meta["desc"]`` of each input.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence

from torch import fx

from rfcompile.errors import CaptureError, OptionError
from rfcompile.find.collectives import find_collectives
from rfcompile.find.directions import Directions
from rfcompile.graph.pipeline import run
from rfcompile.graph.places import module_of
from rfcompile.inductor import lowering as _lowering  # noqa: F401  # registers the lowerings
from rfcompile.inductor.agreement import agree_on, foreign_operators
from rfcompile.passes import wire_pipeline
from rfcompile.report.journal import new_entry
from rfcompile.report.report import Site
from rfcompile.wire.default_policy import policy_of
from rfcompile.wire.policy import Policy, Policyish

log = logging.getLogger(__name__)
_PLACE = "rfcompile.joint_pass"


def joint_pass(
    policy: Policyish = None,
    *,
    parameters: int | Iterable[int] | None = None,
    strict: bool = False,
    merge: bool = True,
) -> JointPass:
    """A pass that quantizes the collectives of a graph with forward, loss and backward in one.

    What torch noted while it traced says which nodes are the backward pass: the marks
    ``autograd_backward`` (``make_fx`` under ``torch.compiler._patch_engine_backward()``, as in
    torchtitan's graph_trainer) or ``partitioner_tag`` (``aot_export_joint_with_descriptors``, as in
    AutoParallel). Run the pass before passes that join collectives in buckets.

    Args:
        policy: in any spelling; None: the default policy. Collectives of the backward pass send
            gradients, all-gathers of parameters weights, and all others activations.
        parameters: which inputs of the graph are parameters (or shards of such): a number, so many
            from the first on, or their places. None: what the inputs' descriptors say; where no
            descriptor names a parameter, an all-gather of an input stays exact, and the report
            says so.
        strict: a site that could be quantized and stays exact is an error.
        merge: sum tensors before reducing them where only their sum is used.

    Raises:
        PolicyError, FormatError: the policy is not understood, or there is none.
        OptionError: ``parameters`` is no number and no places.
    """
    return JointPass(policy_of(policy), _places(parameters), strict=strict, merge=merge)


def _places(parameters: object) -> tuple[int, ...] | None:
    if parameters is None:
        return None
    is_number = type(parameters) is int and parameters >= 0
    found = range(parameters) if is_number else parameters  # type: ignore[call-overload]
    places = tuple(found) if isinstance(found, Iterable) else (None,)
    if not all(type(place) is int and place >= 0 for place in places):
        raise OptionError(
            "parameters",
            parameters,
            "give the number of leading inputs that are parameters, or the places of those that "
            "are, counted from 0.",
        )
    return places


class JointPass:
    """Quantizes the collectives of a joint graph; made by :func:`~rfcompile.joint_pass`.

    Each graph that it rewrote has a report in :func:`~rfcompile.reports`.
    """

    def __init__(
        self,
        policy: Policy,
        parameters: Sequence[int] | None = None,
        *,
        strict: bool = False,
        merge: bool = True,
    ) -> None:
        self.policy, self.parameters = policy, parameters
        self.strict, self.merge = strict, merge
        self.__name__ = "quantize_collectives_pass"  # lists of passes name them

    def __call__(self, gm: fx.GraphModule, example_inputs: object = None) -> fx.GraphModule:
        """Rewrite the graph in place and return it.

        Every rank must call it, on the graph of the same program: the ranks compare policies.

        Raises:
            CaptureError: the graph has collectives, and nothing says which nodes are the backward
                pass.
            OptionError: ``parameters`` names more inputs than the graph has.
            UnquantizedSiteError: ``strict`` and an eligible collective stays exact.
            RankMismatchError: ranks differ, on every rank. TransportError: a rank is not there.
        """
        collectives = find_collectives(gm)
        if collectives and not Directions(gm, "joint").has_marks:
            raise CaptureError(
                f"none of the nodes of this graph, with {len(collectives)} collectives, has a mark "
                "of torch's that tells the backward pass from the forward pass. Trace the step "
                "under torch.fx.traceback.preserve_node_meta(), "
                "torch.compiler._non_strict_tracing_context() and "
                "torch.compiler._patch_engine_backward(), with torch.autograd.grad or backward() "
                "inside; or use aot_export_joint_with_descriptors."
            )
        _note_places(gm)
        foreign = foreign_operators(gm)
        passes = wire_pipeline(self.policy, "joint", self._names(gm), merge=self.merge)
        record = run(gm, passes)
        entry = new_entry(self.policy, _PLACE, strict=self.strict, is_counted=False)
        entry.add("joint", record)
        sites = [fact for fact in record.facts if isinstance(fact, Site)]
        plan = f"joint graph {self.policy.describe()} merge={self.merge} of {self.parameters}"
        agree_on(plan, sites, foreign)
        report = entry.report()
        if self.strict:
            report.require_all()
        log.info("joint graph: %s", report.summary())
        return record.gm

    def _names(self, gm: fx.GraphModule) -> frozenset[str] | None:
        """Of the inputs that are parameters; None where nothing says so."""
        inputs = gm.graph.find_nodes(op="placeholder")
        if self.parameters is None:
            # Of a module that Dynamo made no descriptor says which of its inputs are parameters.
            described = [node for node in inputs if "desc" in node.meta]
            return frozenset(n.name for n in described if n.meta["desc"].is_param()) or None
        if any(place >= len(inputs) for place in self.parameters):
            raise OptionError(
                "parameters", max(self.parameters) + 1, f"the graph has {len(inputs)} inputs."
            )
        return frozenset(inputs[place].name for place in self.parameters)


def _note_places(gm: fx.GraphModule) -> None:
    """Backward nodes get the place of their forward, where the tracer left that out: autograd
    numbers operations, and both have the number of the same one."""
    first: dict[int, fx.Node] = {}
    for node in gm.graph.nodes:
        number = node.meta.get("seq_nr")
        if number is None or node.op in ("placeholder", "output"):
            continue
        if not node.meta.get("autograd_backward"):
            first.setdefault(number, node)
        elif number in first and not module_of(node):
            known = {key: first[number].meta.get(key) for key in _PLACES}
            node.meta |= {key: value for key, value in known.items() if value}


_PLACES = ("nn_module_stack", "custom", "stack_trace")
