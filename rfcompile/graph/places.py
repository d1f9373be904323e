"""Tells where a node of a graph comes from in the user's model: line, module, call."""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import fx

_FRAME = re.compile(r'File "([^"]+)", line (\d+)')
_PARTIAL = re.compile(r"^L\[['\"]fn['\"]\]\.(?:func|args\[\d+\]|keywords\[['\"]\w+['\"]\])")
"""A functools.partial that was compiled, up to what it holds."""
_ROOT = re.compile(r"^(?:[LG]\[['\"][^'\"]*['\"]\]|L__self__)")
_ITEM = re.compile(r"(?:\._modules)?\[['\"]?([^\]'\"]*)['\"]?\]")
WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
"""Where torch.compile, activation checkpointing and FSDP1 keep the module that they wrap."""
_INSIDE_FUNCTION = (
    r"\.(?:__closure__\.\d+\.cell_contents|__(?:kw)?defaults__\.\w+|__func__|__wrapped__"
    r"|_torchdynamo_inline|_torchdynamo_orig_callable)"
)
_INSIDE_PARTIAL = r"\.(?:func|args\.\d+|keywords\.\w+)"
_OWNER = re.compile(rf"(?:\.[^.]+)?(?:{_INSIDE_FUNCTION}|{_INSIDE_PARTIAL})*\.__self__(?=\.|$)")
"""A bound method, or what is wrapped around one, up to the module that it is a method of."""
_HELD = re.compile(
    rf"^(?:{_INSIDE_FUNCTION})+"
    rf"|\.forward(?:{_INSIDE_FUNCTION}|{_INSIDE_PARTIAL})+"
    rf"|(?:\.[^.]+)(?:{_INSIDE_FUNCTION})+"
)
"""A function that was put on a module, up to the module that it holds: taken for the same."""


def frames_of(node: fx.Node) -> tuple[tuple[str, int], ...]:
    """File and line of each frame a node was traced in, outermost first."""
    return _frames_in(node.meta.get("stack_trace") or "")


@lru_cache(maxsize=4096)
def _frames_in(stack_trace: str) -> tuple[tuple[str, int], ...]:
    return tuple((file, int(line)) for file, line in _FRAME.findall(stack_trace))


def source_of(node: fx.Node) -> str:
    """The user's line a node was traced from, as "file.py:12"; "" when unknown.

    That is the innermost frame outside torch and this package. The path is relative to the
    working directory if the file lies below it; an installed or distant file keeps two components.
    A backward node carries the line of its forward.
    """
    for file, line in reversed(frames_of(node)):
        if not file.startswith("<") and not _is_internal(file):
            return f"{short_path(file)}:{line}"
    return ""


def module_of(node: fx.Node) -> str:
    """Dotted path of the module a node was traced in, as ``named_modules`` of the outermost
    traced module writes it; "" for that module itself and when unknown.

    A backward node gives the module of its forward. Wrappers (``_orig_mod`` and the like) are
    left out. Where no calls of modules were recorded, ``torch.fx.traceback.annotate`` may have
    noted the path as "module_fqn", as torchtitan does.
    """
    if calls := module_calls(node):
        return calls[-1].path
    annotated = (node.meta.get("custom") or {}).get("module_fqn", "")
    return without_wrappers_in(annotated) if isinstance(annotated, str) else ""


class ModuleCall(NamedTuple):
    """A call of a module: its path, its class as "package.module.Class", which call it is."""

    path: str
    cls: str
    number: str


def module_calls(node: fx.Node) -> tuple[ModuleCall, ...]:
    """The calls that a node was traced in, outermost first; paths as in :func:`module_of`."""
    stack = node.meta.get("nn_module_stack") or node.meta.get("fwd_nn_module_stack") or {}
    return tuple(
        ModuleCall(
            _module_path(path),
            cls if isinstance(cls, str) else f"{cls.__module__}.{cls.__qualname__}",
            str(key).partition("@")[2],  # "layers.0@1" is the second call
        )
        for key, (path, cls) in stack.items()
    )


def _module_path(path: str) -> str:
    """The path in a name that Dynamo gave to a module: how it got from what it compiles to there.

    Where a module's forward was replaced (compiled, bound, wrapped by a function or a partial), it
    leads through that function:
    ``L['self'].layers.0.forward.__closure__[0].cell_contents.__self__`` is layers.0.
    """
    path = _ITEM.sub(r".\1", _ROOT.sub("", _PARTIAL.sub("", path))).replace(".__dict__", "")
    return without_wrappers_in(_HELD.sub("", _OWNER.sub("", path)))


def without_wrappers_in(path: str) -> str:
    """A module's path as the user wrote it: without the modules that torch wraps around others."""
    return ".".join(part for part in path.split(".") if part and part not in WRAPPERS)


@lru_cache(maxsize=4096)
def _is_internal(file: str) -> bool:
    here = Path(__file__).parents[1]
    homes = (Path(torch.__file__).parent, here, (here / "passes").resolve())
    return any(Path(file).is_relative_to(home) for home in homes)


def short_path(file: str) -> str:
    """A file as reports name it; see :func:`source_of`."""
    path = Path(file)
    if path.is_relative_to(Path.cwd()) and "site-packages" not in path.parts:
        return path.relative_to(Path.cwd()).as_posix()
    return Path(*path.parts[-2:]).as_posix()
