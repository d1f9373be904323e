"""Quantized collectives for PyTorch: the public names of the package.

Importing this package loads next to nothing: a public name is loaded when it is first used.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch

from rfcompile.codec.on_use import BEFORE_COMPILING, Operators

if TYPE_CHECKING:  # for type checkers and editors; a test compares it with _HOMES
    from rfcompile import adapters, distributed, errors, experimental, low_rank, training
    from rfcompile.analyze import analyze
    from rfcompile.api import diff, transform
    from rfcompile.codec.formats import QuantFormat
    from rfcompile.codec.functions import dequantize, quantize
    from rfcompile.explain import explain
    from rfcompile.inductor.custom_pass import inductor_pass
    from rfcompile.kernels import kernels
    from rfcompile.planning.crossover import measure_crossover
    from rfcompile.planning.link import Link, measure_link
    from rfcompile.planning.plan import plan
    from rfcompile.planning.score import score
    from rfcompile.planning.scores import Scores
    from rfcompile.report.journal import reports
    from rfcompile.report.report import Report, Site
    from rfcompile.report.step import measure_step, merge_reports
    from rfcompile.rewrites.adapters.rewrite import Adapters
    from rfcompile.rewrites.low_rank.rewrite import LowRank
    from rfcompile.rewrites.protocol import rewrites_of
    from rfcompile.rewrites.residual.find import find_residuals
    from rfcompile.rewrites.residual.rewrite import ResidualFree
    from rfcompile.rewrites.wires import Wire
    from rfcompile.training.traffic import quantize_traffic
    from rfcompile.wire.collectives import (
        all_gather,
        all_reduce,
        all_to_all,
        broadcast,
        reduce_scatter,
    )
    from rfcompile.wire.default_policy import set_default_policy
    from rfcompile.wire.foreign import register_collective
    from rfcompile.wire.policy import Policy

    __version__: str

_HOMES = {
    "analyze": "analyze",
    "api": "diff transform",
    "codec.formats": "QuantFormat",
    "codec.functions": "dequantize quantize",
    "explain": "explain",
    "inductor.custom_pass": "inductor_pass",
    "kernels": "kernels",
    "planning.crossover": "measure_crossover",
    "planning.link": "Link measure_link",
    "planning.plan": "plan",
    "planning.score": "score",
    "planning.scores": "Scores",
    "report.journal": "reports",
    "report.report": "Report Site",
    "report.step": "measure_step merge_reports",
    "rewrites.adapters.rewrite": "Adapters",
    "rewrites.low_rank.rewrite": "LowRank",
    "rewrites.protocol": "rewrites_of",
    "rewrites.residual.find": "find_residuals",
    "rewrites.residual.rewrite": "ResidualFree",
    "rewrites.wires": "Wire",
    "training.traffic": "quantize_traffic",
    "wire.collectives": "all_gather all_reduce all_to_all broadcast reduce_scatter",
    "wire.default_policy": "set_default_policy",
    "wire.foreign": "register_collective",
    "wire.policy": "Policy",
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names.split()}
_DEFINING = (
    *("codec.operators", "wire.by_size", "wire.collectives", "wire.fake", "wire.transfers"),
    *("nn.attention_operators", "nn.graying"),
)
"""The modules that define operators of torch.ops.rfcompile."""
_PACKAGES = ("adapters", "distributed", "errors", "experimental", "low_rank", "training")

__all__ = [
    "Adapters",
    "Link",
    "LowRank",
    "Policy",
    "QuantFormat",
    "Report",
    "ResidualFree",
    "Scores",
    "Site",
    "Wire",
    "adapters",
    "all_gather",
    "all_reduce",
    "all_to_all",
    "analyze",
    "broadcast",
    "dequantize",
    "diff",
    "distributed",
    "errors",
    "experimental",
    "explain",
    "find_residuals",
    "inductor_pass",
    "kernels",
    "low_rank",
    "measure_crossover",
    "measure_link",
    "measure_step",
    "merge_reports",
    "plan",
    "quantize",
    "quantize_traffic",
    "reduce_scatter",
    "register_collective",
    "reports",
    "rewrites_of",
    "score",
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
    return sorted([*__all__, "__version__"])


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
