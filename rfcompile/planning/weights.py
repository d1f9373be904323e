"""Weights: the parameters of a model as sites, which one pass may disturb."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from rfcompile.codec import operators
from rfcompile.errors import BoundaryError, ScoreError
from rfcompile.graph.models import copy_of
from rfcompile.graph.modules import Modules, matching_any, patterns_of
from rfcompile.planning.taps import Crossings, Pass, check_depends


class Weights:
    """Parameters of a copy of a model, by name. A tied parameter has its first name.

    Args:
        modules: "auto": all of them. Else names or shell patterns of parameters or their modules.

    Raises:
        BoundaryError: there is none of that name. DtypeError: one cannot be coded. OptionError:
        ``modules`` is a function. CaptureError: the model cannot be copied.
    """

    def __init__(self, model: nn.Module, modules: Modules) -> None:
        self.model = copy_of(model, share=False)
        parameters = dict(self.model.named_parameters())
        patterns = patterns_of(modules)  # type: ignore[arg-type]  # it refuses functions
        named = [p for pattern in patterns for p in (pattern, f"{pattern}.*")]
        chosen = list(parameters) if modules == "auto" else matching_any(named, parameters)
        if not chosen:
            rule = f"its parameters are {', '.join(list(parameters)[:5])}, ..."
            raise BoundaryError(f"the model has no parameter {list(patterns)}: {rule}")
        self.parameters = {name: parameters[name].requires_grad_() for name in chosen}
        for name, parameter in self.parameters.items():
            operators.check_codec_input(parameter, f"parameter {name!r}")
        self.exact = {name: p.detach().clone() for name, p in self.parameters.items()}

    @property
    def names(self) -> list[str]:
        return list(self.parameters)

    def run(self, loss: Callable[[], Tensor], given: Crossings | None, what: str) -> Pass:
        """As :meth:`~rfcompile.planning.taps.Taps.run`.

        Raises:
            ScoreError: the loss does not depend on a parameter.
        """
        self.set({} if given is None else {n: self.exact[n] + v for n, [v] in given.items()})
        value = loss()
        check_depends(value, what)
        leaves = list(self.parameters.values())
        found = dict(
            zip(self.names, torch.autograd.grad(value, leaves, allow_unused=True), strict=True)
        )
        idle = [name for name, gradient in found.items() if gradient is None]
        if idle:
            rule = f"the loss of {what} does not depend on them: name the others in modules=."
            raise ScoreError("parameters that had no part", idle, rule)
        values = {name: [exact] for name, exact in self.exact.items()}
        return Pass(value.detach(), values, {name: [g] for name, g in found.items()})

    @torch.no_grad()
    def set(self, values: dict[str, Tensor]) -> None:
        """Give parameters these values, and all others their exact ones."""
        for name, parameter in self.parameters.items():
            parameter.copy_(values.get(name, self.exact[name]))
