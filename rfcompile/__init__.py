"""Quantized collectives inserted by the compiler into unmodified PyTorch models.

Importing this package loads next to nothing: a public name is loaded when it is first used.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch

from rfcompile.codec.on_use import BEFORE_COMPILING, Operators

if TYPE_CHECKING:  # for type checkers and editors; a test compares it with _HOMES
    from rfcompile import companions, distributed, errors, training
    from rfcompile.analyze import Analysis, analyze
    from rfcompile.api import diff, transform
    from rfcompile.codec.formats import QuantFormat
    from rfcompile.codec.functions import dequantize, quantize
    from rfcompile.errors import RFCompileError
    from rfcompile.explain import explain
    from rfcompile.graph.diff import GraphDiff
    from rfcompile.passes.find_residuals import ResidualAdd
    from rfcompile.report.journal import reports
    from rfcompile.report.measure import measure_step
    from rfcompile.report.report import Report, Site
    from rfcompile.report.step import merge_reports
    from rfcompile.rewrites.adapters.quantize import quantize_adapters
    from rfcompile.rewrites.adapters.rewrite import Adapters, add_adapters
    from rfcompile.rewrites.attention.rewrite import PolynomialAttention
    from rfcompile.rewrites.graying.rewrite import TokenGraying
    from rfcompile.rewrites.low_rank.rewrite import Rank
    from rfcompile.rewrites.protocol import rewrites_of
    from rfcompile.rewrites.residual.find import find_residuals
    from rfcompile.rewrites.residual.report import ResidualReport, residual_report
    from rfcompile.rewrites.residual.rewrite import ResidualFree
    from rfcompile.wire.collectives import (
        all_gather,
        all_reduce,
        all_to_all,
        broadcast,
        reduce_scatter,
    )
    from rfcompile.wire.default_policy import set_default_policy
    from rfcompile.wire.policy import Policy

    __version__: str

_HOMES = {
    "analyze": "Analysis analyze",
    "api": "diff transform",
    "codec.formats": "QuantFormat",
    "codec.functions": "dequantize quantize",
    "errors": "RFCompileError",
    "explain": "explain",
    "graph.diff": "GraphDiff",
    "passes.find_residuals": "ResidualAdd",
    "report.journal": "reports",
    "report.measure": "measure_step",
    "report.report": "Report Site",
    "report.step": "merge_reports",
    "rewrites.adapters.quantize": "quantize_adapters",
    "rewrites.adapters.rewrite": "Adapters add_adapters",
    "rewrites.attention.rewrite": "PolynomialAttention",
    "rewrites.graying.rewrite": "TokenGraying",
    "rewrites.low_rank.rewrite": "Rank",
    "rewrites.protocol": "rewrites_of",
    "rewrites.residual.find": "find_residuals",
    "rewrites.residual.report": "ResidualReport residual_report",
    "rewrites.residual.rewrite": "ResidualFree",
    "wire.collectives": "all_gather all_reduce all_to_all broadcast reduce_scatter",
    "wire.default_policy": "set_default_policy",
    "wire.policy": "Policy",
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names.split()}
_DEFINING = (
    *("codec.operators", "wire.collectives", "wire.fake", "wire.transfers"),
    *("nn.attention_operators", "nn.graying"),
)
"""The modules that define operators of torch.ops.rfcompile."""
_PACKAGES = ("companions", "distributed", "errors", "training")

__all__ = [
    "Adapters",
    "Analysis",
    "GraphDiff",
    "Policy",
    "PolynomialAttention",
    "QuantFormat",
    "RFCompileError",
    "Rank",
    "Report",
    "ResidualAdd",
    "ResidualFree",
    "ResidualReport",
    "Site",
    "TokenGraying",
    "add_adapters",
    "all_gather",
    "all_reduce",
    "all_to_all",
    "analyze",
    "broadcast",
    "companions",
    "dequantize",
    "diff",
    "distributed",
    "errors",
    "explain",
    "find_residuals",
    "measure_step",
    "merge_reports",
    "quantize",
    "quantize_adapters",
    "reduce_scatter",
    "reports",
    "residual_report",
    "rewrites_of",
    "set_default_policy",
    "training",
    "transform",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        value: Any = import_module("rfcompile.codec.fingerprint").package_version()
    elif name in _HOME_OF:
        value = getattr(import_module(f"rfcompile.{_HOME_OF[name]}"), name)
    elif name in _PACKAGES:
        value = import_module(f"rfcompile.{name}")
    else:
        raise AttributeError(f"module 'rfcompile' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})


class _Package(ModuleType):
    """``rfcompile.diff`` is the function, whoever imports the module of that name."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _HOME_OF and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


def _define_operators() -> None:
    for name in _DEFINING:
        import_module(f"rfcompile.{name}")


sys.modules[__name__].__class__ = _Package
torch.ops.rfcompile = Operators("rfcompile", _define_operators)  # type: ignore[attr-defined]

# Inductor is loaded when something compiles, not when this package is imported.
BEFORE_COMPILING.append(lambda: import_module("rfcompile.inductor.lowering"))
