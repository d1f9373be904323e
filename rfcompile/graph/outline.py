"""The outline of a model: which modules it calls, in which order, and what they return."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from rfcompile.codec.formats import dtype_text
from rfcompile.graph.capture import tensors_of
from rfcompile.graph.places import without_wrappers_in


@dataclass(frozen=True)
class Called:
    """A module that ran.

    Args:
        module: dotted path, "" for the model itself.
        cls: the name of its class.
        output: the type of the first tensor that its first call returned, such as "f32[4, 64]"; ""
            where it returned none, or where nobody ran it.
    """

    module: str
    cls: str
    output: str = ""


class Outline:
    """The modules called so far: each once, in the order in which the first calls began."""

    def __init__(self) -> None:
        self._outputs: dict[str, str] = {}
        self._classes: dict[str, str] = {}

    def enter(self, path: str, module: nn.Module) -> None:
        self._classes.setdefault(path, type(module).__name__)

    def leave(self, path: str, output: Any) -> None:
        if path not in self._outputs:
            tensors = tensors_of(output)
            shape = ", ".join(map(str, tensors[0].shape)) if tensors else ""
            self._outputs[path] = f"{dtype_text(tensors[0].dtype)}[{shape}]" if tensors else ""

    @property
    def calls(self) -> tuple[Called, ...]:
        classes = self._classes.items()
        return tuple(Called(path, cls, self._outputs.get(path, "")) for path, cls in classes)


@contextmanager
def outlined(model: nn.Module) -> Iterator[Outline]:
    """Note the modules of a model that run eagerly inside the ``with`` block."""
    outline = Outline()
    handles = [handle for path, m in model.named_modules() for handle in _hooked(outline, path, m)]
    try:
        yield outline
    finally:
        for handle in handles:
            handle.remove()


def _hooked(outline: Outline, path: str, module: nn.Module) -> Iterator[Any]:
    path = without_wrappers_in(path)
    yield module.register_forward_pre_hook(lambda m, _: outline.enter(path, m))
    yield module.register_forward_hook(lambda m, _, output: outline.leave(path, output))


def outline_of(model: nn.Module) -> tuple[Called, ...]:
    """The modules of a model that nobody ran, in the order in which it holds them."""
    modules = model.named_modules()
    return tuple(Called(without_wrappers_in(path), type(m).__name__) for path, m in modules)
