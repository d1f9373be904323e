"""Policy: which kind of traffic travels in which format, and what its options mean."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from fnmatch import fnmatchcase
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import torch

from rfcompile.codec.formats import DTYPES, FORMAT_FIELDS, QuantFormat, as_format, dtype_text
from rfcompile.errors import PolicyError
from rfcompile.wire import crossover

KINDS = ("activations", "gradients", "weights", "optimizer_state")

DEFAULT_MIN_BYTES = 16 * 1024
"""4,096 elements of float32: what 8-bit optimizers leave alone, too."""

Formatish = QuantFormat | Mapping[str, Any] | str | int | None
"""What users write for a format: a QuantFormat or its fields, a text such as "4b:g64", bits, or
"exact" or None."""

Why = Literal[
    "",
    "policy",
    "site",
    "min_bytes",
    "dtype",
    "empty",
    "one rank",
    "statistic",
    "not traffic",
    "no place",
    "out of reach",
    "merged",
]


@dataclass(frozen=True)
class Decision:
    """How one tensor travels: in a format, or exactly and why.

    Args:
        format: None is exact.
        why: the rule that keeps it exact, for programs; "" for a format.

            - "policy": the policy has no format for this kind; "site": a pattern says exact;
              "min_bytes": the tensor is too small.
            - "dtype": it cannot be coded; "empty": it has no elements; "one rank": nobody receives.
            - "statistic": it is one; "not traffic": it was coded before, or is of another use.
            - "no place": torch offers no place to code it; "out of reach": this version cannot.
            - "merged": another site carries it.
        reason: the same for people, with the numbers.
    """

    format: QuantFormat | None
    why: Why = ""
    reason: str = ""

    @property
    def eligible(self) -> bool:
        """It is quantized, or could be and nobody asked by name to leave it."""
        return self.why in ("", "min_bytes", "out of reach")

    @property
    def spec(self) -> str | None:
        """The text of the format."""
        return self.format.spec if self.format else None


def exact(why: Why, reason: str) -> Decision:
    """A tensor stays exact."""
    return Decision(None, why, reason)


def matches(path: str, pattern: str) -> bool:
    """The shell pattern matches the path as a whole, or from a dot on: "lm_head" matches
    ``model.lm_head``.
    """
    return fnmatchcase(path, pattern) or fnmatchcase(path, f"*.{pattern}")


@dataclass(frozen=True)
class Policy:
    """A format for each kind of traffic, or None where the traffic stays exact.

    If a format names no grid, the kind of traffic chooses the grid: see
    :meth:`QuantFormat.for_kind <rfcompile.QuantFormat.for_kind>`. On the chosen grids zeros stay
    exact in every kind of traffic but activations.

    Args:
        activations: format of the collectives of the forward pass.
        gradients: format of the collectives of the backward pass.
        weights: format of the all-gathers of parameters.
        optimizer_state: format of optimizer states, at rest and when they are sent.
        min_bytes: a collective whose input has fewer bytes stays exact, because small messages cost
            latency and quantization does not reduce latency. 0: no collective is too small
            (statistics still stay exact). None: :data:`DEFAULT_MIN_BYTES` for tensors that are sent
            or kept, and 0 for a fake wire, which sends nothing and often runs on tiny inputs.
            "auto": what :func:`~rfcompile.measure_crossover` found in this process before; the
            policy has the number from then on.
        sites: formats for single modules: ``{"layers.0.*": None, "lm_head": 8}``. A key is a shell
            pattern (``*``, ``?``, ``[...]``) that matches the path of a module as a whole, or from
            a dot on. The first pattern that matches wins. ``min_bytes`` does not apply to a module
            that a pattern matches. In graphs a pattern with a format also quantizes the statistics
            of its module, which otherwise stay exact.
        segments: number of segments of a quantized all-reduce, so that one segment is coded while
            another is sent. None: on a CPU by size (1 to 8, from payloads of 512 KiB on), elsewhere
            1, because there a segment costs launches. Values differ only for formats that round by
            place: stochastic rounding, and one scale for a tensor.

    Raises:
        PolicyError, FormatError: an option is not understood.
    """

    activations: Formatish = None
    gradients: Formatish = None
    weights: Formatish = None
    optimizer_state: Formatish = None
    min_bytes: int | Literal["auto"] | None = None
    sites: Mapping[str, Formatish] = field(default_factory=dict)
    segments: int | None = None

    def __post_init__(self) -> None:
        for kind in KINDS:
            fmt = as_format(getattr(self, kind))
            object.__setattr__(self, kind, fmt and fmt.for_kind(kind))
        size = crossover.measured() if self.min_bytes == "auto" else self.min_bytes
        if size is not None and (type(size) is not int or not 0 <= size < 2**63):
            raise PolicyError("min_bytes", size, 'use a number of bytes, 0 or more, or "auto".')
        object.__setattr__(self, "min_bytes", size)
        if self.segments is not None and (type(self.segments) is not int or self.segments < 1):
            raise PolicyError("segments", self.segments, "use a number of 1 or more, or None.")
        is_mapping = isinstance(self.sites, Mapping)
        if not (is_mapping and all(isinstance(pattern, str) for pattern in self.sites)):
            raise PolicyError("sites", self.sites, "use {module path pattern: format}.")
        object.__setattr__(self, "sites", {k: as_format(v) for k, v in self.sites.items()})

    @classmethod
    def of(cls, /, **options: Any) -> Policy:
        """Make a policy from the options of Policy and, as a shorthand, of QuantFormat.

        ``Policy.of(bits=4, group_size=64)`` uses one format for every kind of traffic. A kind that
        is named as well (``gradients=8``) keeps its own format. A rotation in the shorthand
        (``rotate=32``, ``bits="4b:h32"``) applies to activations only, because a rotation turns the
        zeros of the other kinds into numbers. To rotate another kind, name that kind
        (``gradients="4b:h32"``). ``auto=4`` or ``auto={"bits": 4, "rotate": 32}`` starts from
        :meth:`auto` instead.

        Raises:
            PolicyError, FormatError: an option is unknown, or its value is not supported.
        """
        if "auto" in options:
            return _auto(options)
        names = {f.name for f in fields(cls)}
        unknown = [name for name in options if name not in names and name not in FORMAT_FIELDS]
        if unknown:
            raise PolicyError(
                unknown[0],
                options[unknown[0]],
                f"the options are {', '.join(sorted(names | set(FORMAT_FIELDS)))}, auto; the "
                "backend also takes policy, strict, merge, mode, and inductor={option: value}.",
            )
        shared = {name: options.pop(name) for name in FORMAT_FIELDS if name in options}
        bits = shared.pop("bits", None)
        if bits is None and shared:
            raise PolicyError(next(iter(shared)), next(iter(shared.values())), "give bits as well.")
        if bits is not None:
            fmt = as_format(bits, **shared)
            unrotated = fmt and replace(fmt, rotate=None)
            options = dict.fromkeys(KINDS, unrotated) | {"activations": fmt} | options
        return cls(**options)

    @classmethod
    def auto(cls, bits: Formatish = 4, *, rotate: int | None = None, **options: Any) -> Policy:
        """Choose a format that suits each kind of traffic; the rule is ours.

        - activations: ``bits``. If ``rotate`` is given, also a Hadamard rotation of blocks of
          ``rotate`` elements. A rotation is useful where channels have outliers (residual-free
          models have none).
        - gradients: ``bits`` with stochastic rounding, whose errors cancel over steps and ranks.
        - weights and optimizer state: 8 bits, because their errors do not cancel.

        Args:
            bits: a number of bits, or any format. A format also sets the other fields for
                activations and gradients.
            rotate: size of the Hadamard block for activations; None: no rotation.
            options: options of Policy; they replace the choices above.

        Raises:
            PolicyError, FormatError: an option is not understood.
        """
        base = as_format(bits)
        if base is None:
            raise PolicyError("auto", bits, "give bits; an exact policy is Policy().")
        if named := [name for name in FORMAT_FIELDS if name in options]:
            rule = "auto chooses the formats: name them by kind of traffic, activations='4b:g64'."
            raise PolicyError(named[0], options[named[0]], rule)
        suited = {
            "activations": base if rotate is None else replace(base, rotate=rotate),
            "gradients": replace(base, grid="mid-tread", rounding="stochastic", rotate=None),
            "weights": QuantFormat(8),
            "optimizer_state": QuantFormat(8),
        }
        return cls.of(**(suited | options))

    @classmethod
    def from_file(cls, path: str | PathLike[str]) -> Policy:
        """Read a policy from a TOML file with the options of :meth:`of`.

        In the file a format is a number of bits, a text, a table of the fields of QuantFormat, or
        ``"exact"``.

        Raises:
            PolicyError: the file cannot be read or is no TOML, or an option is not understood.
            FormatError: a format is not understood.
        """
        try:
            content = Path(path).read_bytes()
        except (OSError, ValueError, TypeError) as error:  # no file, no path
            raise PolicyError("file", str(path), f"it cannot be read: {error}.") from error
        try:
            options = tomllib.loads(content.decode())
        except (ValueError, RecursionError) as error:  # no UTF-8, no TOML, too long, too deep
            raise PolicyError("file", str(path), f"write TOML: {error}.") from error
        return as_policy(options)

    @property
    def smallest(self) -> int:
        """``min_bytes``, or the default of it for what is sent or kept."""
        return DEFAULT_MIN_BYTES if self.min_bytes is None else int(self.min_bytes)

    def for_fake_wire(self) -> Policy:
        """The same policy where nothing is sent: only a ``min_bytes`` that is named applies."""
        return replace(self, min_bytes=0) if self.min_bytes is None else self

    @property
    def is_exact(self) -> bool:
        """It quantizes nothing at all."""
        return not any((*(getattr(self, kind) for kind in KINDS), *self.sites.values()))

    def override_for(self, module: str) -> str | None:
        """The first pattern of ``sites`` that the module path matches."""
        return next((pattern for pattern in self.sites if matches(module, pattern)), None)

    def patterns_in_use(self, names: Iterable[str]) -> dict[str, bool]:
        """Of each pattern of ``sites``, whether it is the first match of any of the names."""
        used = {self.override_for(name) for name in names}
        return {pattern: pattern in used for pattern in self.sites}

    def decide(
        self,
        kind: str,
        path: str,
        size_bytes: int | None,
        *,
        dtype: torch.dtype | None = None,
        numel: object = None,
        world: int | None = None,
    ) -> Decision:
        """How a tensor travels.

        Args:
            kind: of the traffic, one of :data:`KINDS`.
            path: what the patterns of ``sites`` are compared with.
            size_bytes: what ``min_bytes`` is compared with; None: symbolic, and large.
            dtype, numel, world: of the tensor and its group, where they are known: a dtype that
                cannot be coded, an empty tensor and a lone rank stay exact under any policy.
        """
        if world == 1:
            return exact("one rank", "one rank: nothing is sent")
        if dtype is not None and dtype not in DTYPES:
            return exact("dtype", f"{dtype_text(dtype)} data is not quantized")
        if isinstance(numel, int) and numel == 0:
            return exact("empty", "empty tensor")
        pattern = self.override_for(path)
        if pattern is not None:
            named: QuantFormat | None = self.sites[pattern]  # type: ignore[assignment]
            if named is None:
                return exact("site", f"sites[{pattern!r}] says exact")
            return Decision(named.for_kind(kind))
        fmt: QuantFormat | None = getattr(self, kind)
        if fmt is None:
            return exact("policy", f"the policy sends {kind} exact")
        if size_bytes is not None and size_bytes < self.smallest:
            return exact("min_bytes", f"{size_bytes} bytes < min_bytes={self.smallest}")
        return Decision(fmt)

    def describe(self) -> str:
        """One line that two policies share only if they put the same bytes on the wire."""
        formats = {kind: str(getattr(self, kind) or "exact") for kind in KINDS}
        same = len(set(formats.values())) == 1
        parts = (
            [f"all={self.activations or 'exact'}"]
            if same
            else [f"{kind}={fmt}" for kind, fmt in formats.items()]
        )
        parts.append(f"min_bytes={self.smallest}")
        parts += [f"segments={self.segments}"] if self.segments is not None else []
        parts += [f"sites[{pattern!r}]={fmt or 'exact'}" for pattern, fmt in self.sites.items()]
        return " ".join(parts)


Policyish = Policy | Formatish | PathLike[str]
"""What users write for a policy, at every door: a Policy, a mapping of its options, the path of a
TOML file (a text that ends in ".toml", or a Path), or one format for every kind of traffic."""


def as_policy(policy: Policyish) -> Policy:
    """A policy from what users write; None is exact.

    Raises:
        PolicyError, FormatError: it is none of these, or a file cannot be read.
    """
    if isinstance(policy, Policy):
        return policy
    if isinstance(policy, PathLike) or (isinstance(policy, str) and policy.endswith(".toml")):
        return Policy.from_file(policy)
    if not isinstance(policy, Mapping):
        return Policy.of(bits=policy)
    if not policy or not all(isinstance(name, str) for name in policy):
        rule = "name options, such as {'bits': 4}; an exact policy is 'exact'."
        raise PolicyError("policy", dict(policy), rule)
    return Policy.of(**policy)


def _auto(options: Mapping[str, Any]) -> Policy:
    """:meth:`Policy.auto` from options that hold ``auto``: bits, any format, or its arguments."""
    given, others = options["auto"], {k: v for k, v in options.items() if k != "auto"}
    if "bits" in others:
        rule = "give auto or bits, not both; auto = 4 has bits."
        raise PolicyError("bits", others["bits"], rule)
    if not isinstance(given, Mapping):
        return Policy.auto(given, **others)
    base = {name: given[name] for name in given if name != "rotate"}
    return Policy.auto(base, **{name: given[name] for name in given if name == "rotate"} | others)
