"""Functions that run for real while Dynamo traces the code that calls them."""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

from rfcompile.codec.on_use import BEFORE_COMPILING

P = ParamSpec("P")
R = TypeVar("R")


def constant_while_compiling(function: Callable[P, R]) -> Callable[P, R]:
    """Under torch.compile the function runs for real, once, while its caller is traced."""
    marked: Callable[P, R] = torch.compiler.assume_constant_result(function)
    return marked


@constant_while_compiling
def before_compiling() -> bool:
    """Run the hooks, for real, while Dynamo traces a caller."""
    for hook in BEFORE_COMPILING:
        hook()
    return True
