"""Quantized collectives inserted by the compiler into unmodified PyTorch models."""

import importlib

from rfcompile import collectives, errors
from rfcompile.collectives import all_gather, all_reduce, all_to_all, broadcast, reduce_scatter
from rfcompile.errors import RFCompileError
from rfcompile.formats import QuantFormat
from rfcompile.journal import reports
from rfcompile.policy import Policy
from rfcompile.report import Report, Site

collectives.BEFORE_COMPILING.append(lambda: importlib.import_module("rfcompile.lowering"))
