"""The same rewrite as a pass for Inductor, for compilers that call Inductor themselves.

vLLM and SGLang compile with a backend of their own, and take passes from their users in Inductor's
option ``post_grad_custom_post_pass``. The pass runs on graphs that Inductor has decomposed and
fused already.

Private torch symbols used here, tried on torch 2.13:
``_inductor.custom_graph_pass.CustomGraphPass``, ``_inductor.decomposition.select_decomp_table``.
"""

from __future__ import annotations

from typing import Any

from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.decomposition import select_decomp_table

from rfcompile.codec.fingerprint import package_version, source_digest
from rfcompile.errors import CaptureError, ProcessGroupError
from rfcompile.graph.pipeline import run
from rfcompile.inductor import lowering as _lowering  # noqa: F401  # registers the lowerings
from rfcompile.passes.quantize_collectives import QuantizeCollectives
from rfcompile.report.journal import new_entry
from rfcompile.wire.default_policy import policy_of
from rfcompile.wire.foreign import all_registered, registered_text
from rfcompile.wire.policy import Policy, Policyish
from rfcompile.wire.process_groups import agree, has_agreed, name_of, resolve

_AGREED: set[tuple[str, str, str]] = set()
"""A plan, the name of a group that :meth:`InductorPass.agree` was given, torch's name of it."""


def inductor_pass(policy: Policyish = None) -> InductorPass:
    """A pass that quantizes collectives, for Inductor's option ``post_grad_custom_post_pass``.

    The pass sends nothing while a graph compiles: a rank that finds its graph in a cache compiles
    nothing, and would be waited for. So call its method ``agree`` once at start, on every rank;
    until then the pass leaves everything exact.

    Args:
        policy: in any spelling; None: the default policy.

    Raises:
        PolicyError, FormatError: the policy is not understood, or there is none.
    """
    return InductorPass(policy_of(policy))


class InductorPass(CustomGraphPass):
    """Quantizes the collectives of a graph; made by :func:`~rfcompile.inductor_pass`.

    It finds torch's own collectives and those that :func:`~rfcompile.register_collective` got. Of
    a graph that it rewrote :func:`~rfcompile.reports` has a report; of a graph from a cache, which
    no pass sees, there is none. It can be pickled, and copies of it act alike.
    """

    def __init__(self, policy: Policy) -> None:
        self.policy = policy

    def agree(self, *groups: Any) -> InductorPass:
        """Let all ranks of these groups compare policy, registered operators and sources; returns
        the pass.

        Every rank of a group must call, in the same order of groups, when the groups exist and all
        operators are registered, and before anything compiles. A later call for the same sends
        nothing.

        Args:
            groups: each as the registered operators name it ("tp:0"); for torch's own collectives
                a process group, its name, or None for the default group.

        Raises:
            ProcessGroupError: no registered operator and not torch knows the group.
            RankMismatchError: ranks differ, on every rank. TransportError: a rank is not there.
        """
        for group in groups:
            for name in _torch_names(group):
                agree(name, self._plan)
                _AGREED.add((self._plan, group if isinstance(group, str) else name, name))
        return self

    def __call__(self, graph: fx.Graph) -> None:
        """Rewrite the graph in place."""
        gm = graph.owning_module
        if gm is None:
            raise CaptureError("the graph has no module: give the graph of a GraphModule.")
        record = run(
            gm,
            [
                QuantizeCollectives(
                    self.policy,
                    _direction_of(graph),
                    decompositions=select_decomp_table(),
                    groups=self._groups(),
                )
            ],
        )
        if record.facts:
            new_entry(self.policy, _PLACE, is_counted=False).add(_direction_of(graph), record)

    def uuid(self) -> tuple[str, ...]:
        """What the rewrite depends on, for Inductor's cache: version, sources, policy, registered
        operators, and the groups whose ranks have agreed."""
        groups = (
            f"{given}={name} of {resolve(name).size()}" for given, name in sorted(self._groups())
        )
        return ("rfcompile", package_version(), source_digest(), self._plan, *groups)

    def __reduce__(self) -> tuple[Any, ...]:
        return InductorPass, (self.policy,)

    @property
    def _plan(self) -> str:
        return f"inductor pass {self.policy.describe()}; {registered_text()}"

    def _groups(self) -> frozenset[tuple[str, str]]:
        """The groups that agreed on this plan and live on: the name given, and torch's."""
        plan = self._plan
        return frozenset(
            (given, name)
            for agreed, given, name in _AGREED
            if agreed == plan and has_agreed(name, plan)
        )


_PLACE = "Inductor's post_grad_custom_post_pass"


def _direction_of(graph: fx.Graph) -> str:
    """A backward graph takes tangents, as AOTAutograd names them."""
    inputs = graph.find_nodes(op="placeholder")
    has_tangents = any(str(node.target).startswith("tangents_") for node in inputs)
    return "backward" if has_tangents else "forward"


def _of_torch(group: Any) -> str:
    return name_of(resolve(group))


def _torch_names(group: Any) -> list[str]:
    """The names that torch has for a group: one, unless operators name groups differently."""
    names: dict[str, None] = {}
    error: Exception | None = None
    for to_name in (*(foreign.torch_group for foreign in all_registered()), _of_torch):
        try:
            names[name_of(resolve(to_name(group)))] = None
        except Exception as raised:  # of a function of the user's: another operator may know it
            error = raised
    if not names:
        raise ProcessGroupError(
            f"{group!r} is no process group that a registered operator or torch knows: make the "
            "groups and register the operators (rfcompile.register_collective) first."
        ) from error
    return list(names)
