"""Imports a training library when it is used, and derives a callback from the library's own."""

from __future__ import annotations

import warnings
from functools import cache
from importlib import import_module, metadata
from typing import Any, cast

from rfcompile.errors import MissingPackageError, RFCompileWarning

TRIED = {"lightning": "2.6", "transformers": "5.23"}
"""The versions that tests run with; constraints-clients.txt has them exactly."""
_EXTRAS = {"lightning": "lightning", "transformers": "models"}


def client(package: str, module: str) -> Any:
    """The module of a library.

    Warns (RFCompileWarning) if its major version is not the one that was tried.

    Raises:
        MissingPackageError: the library is not installed.
    """
    try:
        found = import_module(module)
    except ImportError as error:
        raise MissingPackageError(package, _EXTRAS[package]) from error
    _warn_if_untried(package, metadata.version(package))
    return found


@cache
def _warn_if_untried(package: str, version: str) -> None:
    if version.split(".")[0] != TRIED[package].split(".")[0]:
        warnings.warn(
            f"{package} {version} is another major version than the one that rfcompile was tried "
            f"with ({TRIED[package]}): check that callback.report() has the sites that you expect.",
            RFCompileWarning,
            stacklevel=5,
        )


@cache
def derived(kind: Any, base: type) -> type:
    """``kind`` as a class of the library too: its instances are of both."""
    if issubclass(kind, base):
        return cast(type, kind)
    names = {
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
        "__reduce__": lambda self: (_made, (kind,), vars(self)),  # no pickle finds this class
    }
    return type(kind.__name__, (kind, base), names)


def _made(kind: Any) -> Any:
    """An instance without its fields, for pickle."""
    return kind.__new__(kind)
