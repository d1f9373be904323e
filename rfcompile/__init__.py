"""Quantized collectives inserted by the compiler into unmodified PyTorch models.

Importing this package loads next to nothing: a public name is loaded when it is first used.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch

from rfcompile.on_use import BEFORE_COMPILING, Operators

if TYPE_CHECKING:  # for type checkers and editors; a test compares it with _HOMES
    from rfcompile import companions, distributed, errors, training
    from rfcompile.analyze import Analysis, analyze
    from rfcompile.api import diff, transform
    from rfcompile.collectives import all_gather, all_reduce, all_to_all, broadcast, reduce_scatter
    from rfcompile.companions.adapters import Adapters, add_adapters
    from rfcompile.companions.low_rank import Rank
    from rfcompile.companions.polynomial_attention import PolynomialAttention
    from rfcompile.companions.quantized_adapters import quantize_adapters
    from rfcompile.companions.token_graying import TokenGraying
    from rfcompile.default_policy import set_default_policy
    from rfcompile.diff import GraphDiff
    from rfcompile.errors import RFCompileError
    from rfcompile.explain import explain
    from rfcompile.formats import QuantFormat
    from rfcompile.journal import reports
    from rfcompile.measure import measure_step
    from rfcompile.passes.find_residuals import ResidualAdd
    from rfcompile.policy import Policy
    from rfcompile.report import Report, Site
    from rfcompile.residual_free import ResidualFree
    from rfcompile.residual_report import ResidualReport, residual_report
    from rfcompile.residuals import find_residuals
    from rfcompile.rewrites import rewrites
    from rfcompile.step_report import merge_reports
    from rfcompile.tensors import dequantize, quantize

    __version__: str

_HOMES = {
    "analyze": "Analysis analyze",
    "api": "diff transform",
    "collectives": "all_gather all_reduce all_to_all broadcast reduce_scatter",
    "companions.adapters": "Adapters add_adapters",
    "companions.low_rank": "Rank",
    "companions.polynomial_attention": "PolynomialAttention",
    "companions.quantized_adapters": "quantize_adapters",
    "companions.token_graying": "TokenGraying",
    "default_policy": "set_default_policy",
    "diff": "GraphDiff",
    "errors": "RFCompileError",
    "explain": "explain",
    "formats": "QuantFormat",
    "journal": "reports",
    "measure": "measure_step",
    "passes.find_residuals": "ResidualAdd",
    "policy": "Policy",
    "report": "Report Site",
    "residual_free": "ResidualFree",
    "residual_report": "ResidualReport residual_report",
    "residuals": "find_residuals",
    "rewrites": "rewrites",
    "step_report": "merge_reports",
    "tensors": "dequantize quantize",
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names.split()}
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
    "rewrites",
    "set_default_policy",
    "training",
    "transform",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        value: Any = import_module("rfcompile.fingerprint").package_version()
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
    for name in ("attention_ops", "collectives", "fake_wire", "graying", "ops", "transfers"):
        import_module(f"rfcompile.{name}")


sys.modules[__name__].__class__ = _Package
torch.ops.rfcompile = Operators("rfcompile", _define_operators)  # type: ignore[attr-defined]

# Inductor is loaded when something compiles, not when this package is imported.
BEFORE_COMPILING.append(lambda: import_module("rfcompile.lowering"))
