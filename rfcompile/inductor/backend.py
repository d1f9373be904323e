"""The backend "rfquant" of torch.compile: rewrites the collectives, then calls Inductor.

The rewrite runs on AOTAutograd's forward and backward graphs just before Inductor gets them, so
Inductor's own passes and those the user configured all still run, and its cache sees the rewritten
graph. AOTAutograd's cache is bypassed: on a hit no pass would run and there would be no report.

Private torch symbols used here, tried on torch 2.11 to 2.15:
``_inductor.compile_fx.{compile_fx, compile_fx_inner}`` and its ``inner_compile`` argument,
``_inductor.decomposition.select_decomp_table``,
``_functorch.config.enable_autograd_cache``.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch._functorch import config as functorch_config
from torch._inductor import list_mode_options
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from torch._inductor.decomposition import select_decomp_table

from rfcompile.errors import OptionError, PolicyError, RFCompileError, UnquantizedSiteError
from rfcompile.find.origins import Origin
from rfcompile.find.statistics import Statistics
from rfcompile.graph.pipeline import run
from rfcompile.inductor.agreement import agree_on, foreign_operators
from rfcompile.inductor.lowering import tag_caches  # importing it registers the lowerings
from rfcompile.passes import wire_pipeline
from rfcompile.report import left_out
from rfcompile.report.journal import Entry, forget_frames, new_entry
from rfcompile.report.report import Site
from rfcompile.report.runs import counted
from rfcompile.torch_versions import warn_if_untried
from rfcompile.wire.default_policy import WAYS, default_policy
from rfcompile.wire.policy import Policy, as_policy

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """The backend's options, checked.

    Args:
        policy: from every option of Policy and QuantFormat.
        strict: raise UnquantizedSiteError when an eligible collective stays exact.
        merge: sum tensors before reducing them where only their sum is used.
        inductor: options for Inductor, as ``torch.compile(options=...)`` takes them.
    """

    policy: Policy
    strict: bool = False
    merge: bool = True
    inductor: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, options: Mapping[str, Any] | None) -> Settings:
        left = dict(options or {})
        if "residual" in left:
            rule = "a backend has no modules to change: rfcompile.transform(model, residual=...)."
            raise OptionError("residual", left["residual"], rule)
        inductor = _inductor_options(left.pop("mode", None))
        given = left.pop("inductor", {})
        if not isinstance(given, Mapping):
            raise OptionError("inductor", given, "use {Inductor option: value}.")
        flags = {"strict": left.pop("strict", False), "merge": left.pop("merge", True)}
        for name, value in flags.items():
            if not isinstance(value, bool):
                raise OptionError(name, value, "use True or False.")
        return cls(_policy_of(left, options), **flags, inductor=inductor | dict(given))


def _policy_of(left: dict[str, Any], options: Mapping[str, Any] | None) -> Policy:
    """The policy of the options that are left, or the default one."""
    policy = left.pop("policy", None)
    if policy is not None:
        if left:
            rule = "use no other option that a policy takes beside it."
            raise PolicyError("policy", policy, rule)
        return as_policy(policy)
    if left:
        return as_policy(left)
    found = default_policy(compiles=True)
    if found is None:
        rule = f"there is no policy; use {WAYS}. bits=None is all exact."
        raise PolicyError("options", dict(options or {}), rule)
    return found


def _inductor_options(mode: str | None) -> dict[str, Any]:
    if mode is None:
        return {}
    modes = list_mode_options()
    if not isinstance(mode, str) or mode not in modes:
        raise OptionError("mode", mode, f"Inductor has {', '.join(map(repr, modes))}.")
    return dict(modes[mode])


def rfquant(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """Compile a Dynamo graph with quantized collectives; ``torch.compile`` calls this.

    Args:
        gm, example_inputs: from Dynamo.
        options: everything :class:`~rfcompile.Policy` takes (``bits`` and the other fields of
            QuantFormat as a shorthand) or a ``policy``, in any spelling; ``strict``, ``merge``,
            ``inductor``, and ``mode``, one of Inductor's ("max-autotune", ...). Without a policy
            the default one: see :func:`~rfcompile.set_default_policy`.
        mode: one of Inductor's, beside a default policy: torch takes a mode or options.

    Raises (when the compiled function is first called):
        PolicyError, FormatError: an option is not understood.
        UnquantizedSiteError: ``strict`` and an eligible collective stays exact.
        RankMismatchError: the ranks of a process group have different options or package versions.
    """
    given = options if mode is None else {"mode": mode, **(options or {})}
    return rewritten(gm, example_inputs, given, compile_fx_inner)


def rewritten(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    options: Mapping[str, Any] | None,
    inner: Callable[..., Any],
    device: torch.device | None = None,
) -> Callable[..., Any]:
    """:func:`rfquant` with another last step: what the passes made goes to ``inner``.

    Args:
        inner: called as Inductor's ``compile_fx_inner``, once a graph.
        device: where the wire takes the graph to run; None: where its tensors are.
    """
    try:
        warn_if_untried()
        tag_caches()
        settings = Settings.of(options)
        left_out.check_settings(strict=settings.strict)
        left_out.watch_recompile_limit()
        entry = _entry(gm, settings)
        with functorch_config.patch(enable_autograd_cache=False):
            compiled = compile_fx(
                gm,
                list(example_inputs),
                inner_compile=_Inner(settings, entry, inner, device),
                config_patches=dict(settings.inductor) or None,
            )
    except (RFCompileError, NotImplementedError) as error:
        # Raised here it would reach the user as BackendCompilerFailed; raised by the compiled
        # function it keeps its type.
        return _failing(error)
    assert callable(compiled)
    return compiled


def _forget() -> None:
    forget_frames()
    left_out.forget_breaks()


rfquant.reset = _forget  # type: ignore[attr-defined]  # torch._dynamo.reset() calls it


def _entry(gm: fx.GraphModule, settings: Settings) -> Entry:
    place, frame = left_out.place_of(gm), left_out.frame_of_compile()
    entry = new_entry(settings.policy, place, frame, strict=settings.strict)
    breaks = left_out.new_breaks()
    if breaks:
        entry.notes.append(left_out.note_on_breaks(breaks))
    if settings.strict and (lost := [found for found in breaks if found.is_collective]):
        raise UnquantizedSiteError([(str(found), "it breaks the graph") for found in lost])
    return entry


class _Inner:
    """Rewrites the forward and the backward graph of one compile, then calls ``inner``."""

    def __init__(
        self,
        settings: Settings,
        entry: Entry,
        inner: Callable[..., Any],
        device: torch.device | None,
    ) -> None:
        self.settings, self.entry = settings, entry
        self.inner, self.device = inner, device
        self.parameters: frozenset[str] = frozenset()
        self.saved: dict[str, Origin] = {}

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any], **kwargs: Any) -> Any:
        direction = "backward" if kwargs.get("is_backward") else "forward"
        static = tuple(kwargs.get("static_input_idxs") or ())
        if direction == "forward":
            inputs = gm.graph.find_nodes(op="placeholder")
            self.parameters = frozenset(inputs[i].name for i in static)
        passes = wire_pipeline(
            self.settings.policy,
            direction,
            self.parameters,
            select_decomp_table(),
            merge=self.settings.merge,
            saved=self.saved,
            device=self.device,
        )
        if direction == "forward":
            self.saved = Statistics(gm, direction, self.parameters).returned()
        foreign = foreign_operators(gm)
        record = run(gm, passes)
        runs = self.entry.add(direction, record)
        sites = [fact for fact in record.facts if isinstance(fact, Site)]
        plan = f"rfquant {self.settings.policy.describe()} merge={self.settings.merge}"
        agree_on(plan, sites, foreign)
        if self.settings.strict:
            self.entry.report().require_all()
        log.info("%s graph: %s", direction, self.entry.report().summary())
        compiled = self.inner(record.gm, example_inputs, **kwargs)
        return counted(compiled, runs, static if direction == "forward" else ())


def _failing(error: BaseException) -> Callable[..., Any]:
    def raise_it(*args: Any) -> Any:
        # A copy: an exception that is raised again keeps the frames of every time.
        raise copy.copy(error) from error.__cause__

    return raise_it


left_out.warn_if_disabled()
