"""Quantized collectives inserted by the compiler into unmodified PyTorch models."""

import importlib

from rfcompile import collectives, companions, errors
from rfcompile.analyze import Analysis, analyze
from rfcompile.api import diff, transform
from rfcompile.collectives import all_gather, all_reduce, all_to_all, broadcast, reduce_scatter
from rfcompile.companions import (
    Adapters,
    PolynomialAttention,
    Rank,
    TokenGraying,
    add_adapters,
    quantize_adapters,
)
from rfcompile.default_policy import set_default_policy
from rfcompile.diff import GraphDiff
from rfcompile.errors import RFCompileError
from rfcompile.explain import explain
from rfcompile.fingerprint import package_version
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
    "transform",
]

__version__ = package_version()

# Inductor is loaded when something compiles, not when this package is imported.
collectives.BEFORE_COMPILING.append(lambda: importlib.import_module("rfcompile.lowering"))
