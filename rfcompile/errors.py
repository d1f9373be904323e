"""Every error that this package raises, and the facts that each error carries.

Each message gives the value, the rule and the way out. Each class also derives from the builtin it
resembles, so ``except ValueError`` works, and keeps its facts as fields.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


class RFCompileError(Exception):
    """Base of every error of this package."""

    def __reduce__(self) -> tuple[Any, ...]:
        # The default would call the class with the message; ours are made from facts.
        return _restore, (type(self), str(self), vars(self))

    def on_rank(self, rank: int) -> RFCompileError:
        """The same error for other ranks; the message names the rank (of the group) that met it."""
        return _restore(type(self), f"rank {rank}: {self}", vars(self))

    def bare(self) -> RFCompileError:
        """The same error without its fields."""
        return _restore(type(self), str(self), {})


def _restore(kind: type[RFCompileError], message: str, facts: dict[str, Any]) -> RFCompileError:
    error = kind.__new__(kind, message)
    vars(error).update(facts)
    return error


def _shown(value: object) -> str:
    """What a message says of a value that may be anything: its repr, if there is one, in short."""
    try:
        text = repr(value)
    except Exception:  # a number of too many digits, too deep a list, a class of the user's
        text = f"<{type(value).__name__}>"
    return text if len(text) <= 300 else f"{text[:300]}..."


class RFCompileWarning(UserWarning):
    """A setting had no effect, or a result needs a second look."""


class SourceError(RFCompileError, RuntimeError):
    """A function's source cannot be read, or is not the one that was rewritten."""


class ResidualError(RFCompileError, ValueError):
    """A model's residual adds cannot be rewritten as asked; ``left`` are those that remain."""

    def __init__(self, message: str, left: Sequence[Any] = ()) -> None:
        super().__init__(message)
        self.left = tuple(left)


class AttentionError(RFCompileError, ValueError):
    """A model's attentions cannot be rewritten as asked; ``left`` are those that remain."""

    def __init__(self, message: str, left: Sequence[Any] = ()) -> None:
        super().__init__(message)
        self.left = tuple(left)


class GrayingError(RFCompileError, ValueError):
    """Tokens cannot be grayed as asked; ``modules`` are the places that it is about."""

    def __init__(self, message: str, modules: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.modules = tuple(modules)


class FormatError(RFCompileError, ValueError):
    """A field of a :class:`~rfcompile.QuantFormat` has a value outside its rule."""

    def __init__(self, field: str, value: object, rule: str) -> None:
        super().__init__(f"{field}={_shown(value)} is not supported: {rule}")
        self.field, self.value, self.rule = field, value, rule


class OptionError(RFCompileError, ValueError):
    """An argument has a value that it cannot have."""

    def __init__(self, option: str, value: object, rule: str) -> None:
        super().__init__(f"{option}={_shown(value)} is not supported: {rule}")
        self.option, self.value, self.rule = option, value, rule


class PolicyError(OptionError):
    """A policy is not understood: a field of a :class:`~rfcompile.Policy`, or where it is given."""


class DtypeError(RFCompileError, TypeError):
    """A tensor's dtype cannot be quantized."""

    def __init__(self, what: str, dtype: object, allowed: Sequence[str]) -> None:
        super().__init__(
            f"{what} has dtype {dtype}; the codec takes {', '.join(allowed)}. "
            "Convert the tensor first, or leave it exact (format None)."
        )
        self.what, self.dtype, self.allowed = what, dtype, tuple(allowed)


class ShapeError(RFCompileError, ValueError):
    """A tensor's shape does not fit what the operation does with it."""

    def __init__(self, what: str, shape: Sequence[Any], rule: str) -> None:
        super().__init__(f"{what} has shape {tuple(shape)}: {rule}")
        self.what, self.shape, self.rule = what, tuple(shape), rule


class PayloadError(RFCompileError, ValueError):
    """A payload's length or type is not what the format and shape ask for."""

    def __init__(self, got: object, expected: object, format: str, rule: str) -> None:
        super().__init__(f"the payload is {got}, but format {format!r} needs {expected}: {rule}")
        self.got, self.expected, self.format, self.rule = got, expected, format, rule


class ProcessGroupError(RFCompileError, RuntimeError):
    """There is no usable process group for a collective."""


class TransportError(RFCompileError, RuntimeError):
    """A collective outside a graph failed: a rank died, did not answer in time, or is elsewhere."""

    def __init__(self, site: str, group: str, reason: str) -> None:
        super().__init__(
            f"{site} failed in process group {group!r}: {reason}. Ranks may be out of step, so "
            "nothing more is sent there; start again from a checkpoint with new process groups."
        )
        self.site, self.group, self.reason = site, group, reason


class PeerError(RFCompileError, RuntimeError):
    """Another rank failed before or after a collective, by no error of this package."""

    def __init__(self, site: str, rank: int, reason: str) -> None:
        super().__init__(
            f"{site}: rank {rank} failed with {reason}. All ranks stop here, none waits for it; "
            "mend it there and call again on every rank."
        )
        self.site, self.rank, self.reason = site, rank, reason


class HookError(RFCompileError, ValueError):
    """A module cannot be given the hook that quantizes its traffic."""

    def __init__(self, module: str, rule: str) -> None:
        super().__init__(f"{module} cannot be quantized: {rule}")
        self.module, self.rule = module, rule


class StateError(RFCompileError, ValueError):
    """A state_dict does not fit what it is loaded into; ``names`` are its entries that do not."""

    def __init__(self, what: str, names: Sequence[str], rule: str) -> None:
        listing = ", ".join(map(repr, names[:5])) + (", ..." if len(names) > 5 else ".")
        super().__init__(f"{what}: {listing} {rule}")
        self.what, self.names, self.rule = what, tuple(names), rule


class MissingPackageError(RFCompileError, ImportError):
    """A package that only this feature needs is not installed."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(
            f"{package} is not installed: pip install 'rfcompile[{extra}]', or {package} by itself."
        )
        self.package, self.extra = package, extra


class RankMismatchError(RFCompileError, RuntimeError):
    """Ranks of one process group would speak different formats or package versions."""

    def __init__(self, group: str, plans: Mapping[int, str]) -> None:
        sides: dict[str, list[int]] = {}
        for rank, plan in sorted(plans.items()):
            sides.setdefault(plan, []).append(rank)
        listing = "; ".join(
            f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}: {plan}"
            for plan, ranks in sides.items()
        )
        super().__init__(
            f"the ranks of process group {group!r} disagree on the wire: {listing}. Every rank "
            "must use the same formats, options and rfcompile version."
        )
        self.group, self.plans = group, dict(plans)


class NonFiniteError(RFCompileError, ArithmeticError):
    """A tensor at a site with ``nonfinite="raise"``, or that has to be finite, holds NaN or Inf."""

    def __init__(
        self,
        site: str,
        ranks: Sequence[int] | None = None,
        rule: str = "The format says nonfinite='raise'; use nonfinite='propagate' to carry it as "
        "NaN instead.",
    ) -> None:
        where = (
            ""
            if ranks is None
            else f" on rank{'s' if len(ranks) > 1 else ''} " + ", ".join(map(str, ranks))
        )
        super().__init__(f"NaN or Inf in the input of {site}{where}. {rule}")
        self.site, self.ranks = site, None if ranks is None else tuple(ranks)


class UnquantizedSiteError(RFCompileError, RuntimeError):
    """``strict=True`` and an eligible site stayed exact."""

    def __init__(self, sites: Sequence[tuple[str, str]]) -> None:
        listing = "; ".join(f"{where}: {why}" for where, why in sites)
        super().__init__(
            f"strict=True, but {len(sites)} eligible site{'s' if len(sites) > 1 else ''} would "
            f"stay exact ({listing}). Lower min_bytes, name them in sites={{pattern: None}} to "
            "accept it, or drop strict."
        )
        self.sites = tuple(sites)


class DerivativeError(RFCompileError, NotImplementedError):
    """An operator has no derivative of the kind that was asked for; none is taken for zero."""

    def __init__(self, operator: str, kind: str, rule: str) -> None:
        super().__init__(f"{operator} has no {kind}: {rule}")
        self.operator, self.kind, self.rule = operator, kind, rule


class RecompileLimitError(UnquantizedSiteError):
    """``strict=True`` and Dynamo would run a function exact, as it compiled it too often."""

    def __init__(self, place: str, limit: str, value: int) -> None:
        self.rule = (
            f"Dynamo compiled the function at {place or 'an unknown place'} {value} times, which "
            f"is its {limit}: calls that fit none of these graphs run exact. Raise "
            f"torch._dynamo.config.{limit}, or compile with dynamic=True"
        )
        Exception.__init__(self, f"strict=True, but {self.rule}, or drop strict.")
        self.sites = ((place, f"{limit} {value}"),)


class ReportError(RFCompileError, TypeError):
    """:func:`~rfcompile.merge_reports` was given something that has no report."""

    def __init__(self, source: object) -> None:
        super().__init__(
            f"{type(source).__name__} has no report: give reports, or what quantize_ddp, "
            "quantize_fsdp, quantize_pipeline_stage or quantize_states returned."
        )
        self.source = source


class ScoreError(RFCompileError, ValueError):
    """A model cannot be scored, or scores or a plan do not fit: ``what`` has a wrong ``value``."""

    def __init__(self, what: str, value: object, rule: str) -> None:
        super().__init__(f"{what}: {_shown(value)}; {rule}")
        self.what, self.value, self.rule = what, value, rule


class BudgetError(RFCompileError, ValueError):
    """No plan keeps a budget; ``minimum`` is the smallest that some plan keeps."""

    def __init__(self, budget: str, value: float, minimum: float) -> None:
        super().__init__(
            f"{budget}={value:g} is below the minimum that can be reached, {minimum:.6g}: give a "
            "larger budget, or score formats of fewer bits, rf.score(formats=...)."
        )
        self.budget, self.value, self.minimum = budget, value, minimum


class BoundaryError(RFCompileError, ValueError):
    """``transform`` found no place to put the wire."""


class CaptureError(RFCompileError, RuntimeError):
    """A model could not be captured as a graph."""


class EmissionError(RFCompileError, RuntimeError):
    """GPU kernels could not be generated without the GPU; ``place`` is the line of the model."""

    def __init__(self, what: str, place: str, reason: str) -> None:
        where = f" at {place}" if place else ""
        super().__init__(
            f"{what}{where} has no kernels without a GPU: {reason}. Leave it out of the model, or "
            "read TORCH_LOGS=output_code on the GPU."
        )
        self.what, self.place, self.reason = what, place, reason


class TargetError(RFCompileError, ValueError):
    """A command line target MODULE:FACTORY could not be loaded or called."""
