"""Policy: which traffic travels in which format; open this file to see what the options mean."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from fnmatch import fnmatchcase
from os import PathLike
from pathlib import Path
from typing import Any

from rfcompile.errors import PolicyError
from rfcompile.formats import FORMAT_FIELDS, QuantFormat, as_format

KINDS = ("activations", "gradients", "weights", "optimizer_state")

Formatish = QuantFormat | Mapping[str, Any] | str | int | None
"""What users write for a format: a QuantFormat or its fields, a text such as "4b:g64", bits, or
"exact" or None."""


@dataclass(frozen=True)
class Policy:
    """A format for each kind of traffic, None for exact.

    Args:
        activations: collectives of the forward pass.
        gradients: collectives of the backward pass.
        weights: all-gathers of parameters.
        optimizer_state: transfers of optimizer state.
        min_bytes: collectives whose input is smaller stay exact: small messages cost latency,
            which quantization cannot save. Zero: none is too small (statistics stay exact).
        sites: overrides by module path, first match wins: ``{"layers.0.*": None, "lm_head": 8}``.
            Patterns as in a shell (``*``, ``?``, ``[...]``). An override also lifts ``min_bytes``
            and, in graphs, names statistics that would stay exact.

    Raises:
        PolicyError, FormatError: an option is not understood.
    """

    activations: Formatish = None
    gradients: Formatish = None
    weights: Formatish = None
    optimizer_state: Formatish = None
    min_bytes: int = 16 * 1024
    sites: Mapping[str, Formatish] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for kind in KINDS:
            object.__setattr__(self, kind, as_format(getattr(self, kind)))
        if type(self.min_bytes) is not int or self.min_bytes < 0:
            raise PolicyError("min_bytes", self.min_bytes, "use a number of bytes, 0 or more.")
        is_mapping = isinstance(self.sites, Mapping)
        if not (is_mapping and all(isinstance(pattern, str) for pattern in self.sites)):
            raise PolicyError("sites", self.sites, "use {module path pattern: format}.")
        object.__setattr__(self, "sites", {k: as_format(v) for k, v in self.sites.items()})

    @classmethod
    def of(cls, **options: Any) -> Policy:
        """A policy from options: those of Policy, and those of QuantFormat as a shorthand.

        ``Policy.of(bits=4, group_size=64)`` uses one format for every kind of traffic; kinds that
        are named as well (``gradients=8``) keep what they name.

        Raises:
            PolicyError, FormatError: an option is unknown or its value is not supported.
        """
        names = {f.name for f in fields(cls)}
        unknown = [name for name in options if name not in names and name not in FORMAT_FIELDS]
        if unknown:
            raise PolicyError(
                unknown[0],
                options[unknown[0]],
                f"the options are {', '.join(sorted(names | set(FORMAT_FIELDS)))}; the backend "
                "also takes policy, strict, merge, mode, and inductor={option: value}.",
            )
        shared = {name: options.pop(name) for name in FORMAT_FIELDS if name in options}
        bits = shared.pop("bits", None)
        if bits is None and shared:
            raise PolicyError(next(iter(shared)), next(iter(shared.values())), "give bits as well.")
        if bits is not None:
            options = dict.fromkeys(KINDS, as_format(bits, **shared)) | options
        return cls(**options)

    @classmethod
    def auto(cls, bits: int = 4, *, rotate: int | None = None, **options: Any) -> Policy:
        """A format for each kind of traffic that suits what it looks like; our rule.

        - activations: ``bits``, the grid of the format's default (mid-rise up to 4 bits), with a
          Hadamard rotation of ``rotate`` elements if asked for: useful where channels have
          outliers, which residual-free models have not.
        - gradients: ``bits``, mid-tread (many are almost zero) with stochastic rounding, whose
          errors cancel over steps and ranks.
        - weights and optimizer state: at least 8 bits, as their errors stay.

        ``options`` are those of Policy and win.

        Raises:
            PolicyError, FormatError: an option is not understood.
        """
        named = {
            "activations": QuantFormat(bits, rotate=rotate),
            "gradients": QuantFormat(bits, grid="mid-tread", rounding="stochastic"),
            "weights": QuantFormat(8),
            "optimizer_state": QuantFormat(8),
        }
        return cls.of(**(named | options))

    @classmethod
    def from_file(cls, path: str | PathLike[str]) -> Policy:
        """Read a policy from a TOML file with the options of :meth:`of`.

        A format is a number of bits, a text, a table of QuantFormat's fields, or ``"exact"``;
        ``auto = 4`` starts from :meth:`auto`.

        Raises:
            PolicyError: the file is no TOML, or an option is not understood. FormatError. OSError.
        """
        with Path(path).open("rb") as file:
            try:
                options = tomllib.load(file)
            except tomllib.TOMLDecodeError as error:
                raise PolicyError("file", str(path), f"write TOML: {error}.") from error
        if "auto" in options:
            return cls.auto(options.pop("auto"), **options)
        return cls.of(**options)

    @property
    def is_exact(self) -> bool:
        """It quantizes nothing at all."""
        return not any((*(getattr(self, kind) for kind in KINDS), *self.sites.values()))

    def override_for(self, module: str) -> str | None:
        """The first pattern of ``sites`` that the module path matches."""
        return next((pattern for pattern in self.sites if fnmatchcase(module, pattern)), None)

    def patterns_in_use(self, names: Iterable[str]) -> dict[str, bool]:
        """Of each pattern of ``sites``, whether it is the first match of any of the names."""
        used = {self.override_for(name) for name in names}
        return {pattern: pattern in used for pattern in self.sites}

    def format_for(self, kind: str, module: str, size_bytes: int) -> tuple[QuantFormat | None, str]:
        """The format of a site, and if it is None the reason."""
        pattern = self.override_for(module)
        if pattern is not None:
            named: QuantFormat | None = self.sites[pattern]  # type: ignore[assignment]
            return named, "" if named else f"sites[{pattern!r}] says exact"
        fmt = getattr(self, kind)
        if fmt is None:
            return None, f"the policy sends {kind} exact"
        if size_bytes < self.min_bytes:
            return None, f"{size_bytes} bytes < min_bytes={self.min_bytes}"
        return fmt, ""

    def describe(self) -> str:
        """One line that two policies share only if they put the same bytes on the wire."""
        formats = {kind: str(getattr(self, kind) or "exact") for kind in KINDS}
        same = len(set(formats.values())) == 1
        parts = (
            [f"all={self.activations or 'exact'}"]
            if same
            else [f"{kind}={fmt}" for kind, fmt in formats.items()]
        )
        parts.append(f"min_bytes={self.min_bytes}")
        parts += [f"sites[{pattern!r}]={fmt or 'exact'}" for pattern, fmt in self.sites.items()]
        return " ".join(parts)


def as_policy(policy: Policy | Formatish, **options: Any) -> Policy:
    """A policy from what users write: a Policy, or one format for every kind of traffic.

    ``options`` are those of Policy, for the latter.

    Raises:
        PolicyError, FormatError: it is none of these.
    """
    return policy if isinstance(policy, Policy) else Policy.of(bits=policy, **options)
