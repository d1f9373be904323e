"""Finds the optimizers inside wrappers, and treats several optimizers as one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from rfcompile.errors import HookError, StateError
from rfcompile.states.packing import require_state_dict


class Optimizers(Optimizer):
    """Several optimizers as one: steps, gradients, ``state`` and a state_dict like any optimizer's.

    ``param_groups`` are those of all of them, and the state_dict counts parameters in that order,
    so torch.distributed.checkpoint, schedulers and :func:`~rfcompile.training.quantize_states` take
    it as one optimizer. ``load_state_dict`` also takes ``{"optimizers": [...]}``, which earlier
    versions wrote.
    """

    def __init__(self, *optimizers: Optimizer) -> None:
        self.optimizers: tuple[Optimizer, ...] = ()
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        super().__init__([_nameless(group) for group in groups], {})
        self.optimizers = optimizers
        self.param_groups = groups  # the very dicts that the optimizers read

    @property
    def state(self) -> Any:
        """The states of all optimizers by parameter; what is written goes to the parameter's."""
        return _States(self.optimizers)

    @state.setter
    def state(self, value: Any) -> None:
        """torch.optim.Optimizer makes an empty one at first."""
        for parameter, entries in value.items():
            self.state[parameter] = entries

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """A new group is the last optimizer's: that of what is no hidden matrix."""
        if not self.optimizers:
            super().add_param_group(param_group)
            return
        held = {p for group in self.param_groups for p in group["params"]}
        given = param_group["params"]
        listed = [given] if isinstance(given, Tensor) else [*given]
        if any((p[1] if isinstance(p, tuple) else p) in held for p in listed):
            raise ValueError("some parameters appear in more than one parameter group")
        self.optimizers[-1].add_param_group({**param_group, "params": listed})
        self.param_groups.append(self.optimizers[-1].param_groups[-1])

    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for optimizer in self.optimizers:
            optimizer.step()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        state: dict[Any, Any] = {}
        groups: list[dict[str, Any]] = []
        for optimizer in self.optimizers:
            part, start = optimizer.state_dict(), sum(len(group["params"]) for group in groups)
            state |= {_moved(key, start): value for key, value in part["state"].items()}
            for group in part["param_groups"]:
                groups.append({**group, "params": [_moved(i, start) for i in group["params"]]})
        return {"state": state, "param_groups": groups}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load all or, after an error, nothing.

        Raises:
            StateError: it is no state_dict of these optimizers. ValueError: its groups are others.
        """
        before = [
            {"state": optimizer.state, "param_groups": optimizer.param_groups}
            for optimizer in self.optimizers
        ]
        try:
            for optimizer, part in zip(self.optimizers, self._parts_of(state_dict), strict=True):
                optimizer.load_state_dict(part)
        except Exception:
            for optimizer, old in zip(self.optimizers, before, strict=True):
                optimizer.__setstate__(old)
            raise
        finally:
            self.param_groups = [group for o in self.optimizers for group in o.param_groups]

    def _parts_of(self, state_dict: dict[str, Any]) -> list[dict[str, Any]]:
        """A state_dict for each optimizer."""
        if isinstance(state_dict, Mapping) and "optimizers" in state_dict:
            parts = list(state_dict["optimizers"])
            if len(parts) != len(self.optimizers):
                rule = f"It has {len(parts)} of them, here are {len(self.optimizers)}."
                raise StateError("a state of other optimizers", ["optimizers"], rule)
            return parts
        require_state_dict(state_dict, "Pass what state_dict() of such optimizers returned.")
        groups = list(state_dict["param_groups"])
        if len(groups) != len(self.param_groups):
            raise ValueError(
                f"the state_dict has {len(groups)} parameter groups, the optimizers have "
                f"{len(self.param_groups)}"
            )
        parts = []
        for optimizer in self.optimizers:
            number = len(optimizer.param_groups)
            mine, groups = groups[:number], groups[number:]
            held = {index for group in mine for index in group["params"]}
            state = {key: value for key, value in state_dict["state"].items() if key in held}
            parts.append({"state": state, "param_groups": mine})
        return parts

    def __getstate__(self) -> dict[str, Any]:
        return {"optimizers": self.optimizers, "defaults": self.defaults}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.param_groups = [group for o in self.optimizers for group in o.param_groups]


def _nameless(group: dict[str, Any]) -> dict[str, Any]:
    """Torch refuses groups of which some have names and some have none."""
    return {key: value for key, value in group.items() if key != "param_names"}


def _moved(index: Any, start: int) -> Any:
    return index + start if isinstance(index, int) else index


class _States(MutableMapping[Any, Any]):
    """The states of several optimizers; like torch's, a parameter without one gets an empty one."""

    def __init__(self, optimizers: tuple[Optimizer, ...]) -> None:
        self._optimizers = optimizers

    def _of(self, parameter: Any) -> MutableMapping[Any, Any]:
        for optimizer in self._optimizers:
            if parameter in optimizer.state:
                return optimizer.state
        for optimizer in self._optimizers:
            if any(parameter is p for group in optimizer.param_groups for p in group["params"]):
                return optimizer.state
        raise KeyError(parameter)

    def __getitem__(self, parameter: Any) -> Any:
        return self._of(parameter)[parameter]

    def __setitem__(self, parameter: Any, value: Any) -> None:
        self._of(parameter)[parameter] = value

    def __delitem__(self, parameter: Any) -> None:
        del self._of(parameter)[parameter]

    def __contains__(self, parameter: object) -> bool:
        return any(parameter in optimizer.state for optimizer in self._optimizers)

    def get(self, parameter: Any, default: Any = None) -> Any:
        for optimizer in self._optimizers:
            if parameter in optimizer.state:
                return optimizer.state[parameter]
        return default

    def __iter__(self) -> Iterator[Any]:
        for optimizer in self._optimizers:
            yield from optimizer.state

    def __len__(self) -> int:
        return sum(len(optimizer.state) for optimizer in self._optimizers)


_INNER = ("optimizer", "_optimizer", "optim", "base_optimizer")
"""Where wrappers keep the optimizer that has the states."""


def parts_of(optimizer: Any) -> tuple[list[Optimizer], list[Optimizer]]:
    """The optimizers that hold and step the states, and the wrappers around them.

    Raises:
        HookError: there is none.
    """
    if isinstance(optimizer, Optimizers):
        found = [parts_of(part) for part in optimizer.optimizers]
        return [p for parts, _ in found for p in parts], [w for _, outer in found for w in outer]
    if isinstance(optimizer, Optimizer) or hasattr(optimizer, "param_groups"):
        for name in _INNER:
            inner = getattr(optimizer, name, None)
            if inner is not optimizer and (isinstance(inner, Optimizer) or _is_wrapper(inner)):
                parts, wrappers = parts_of(inner)
                return parts, [optimizer, *wrappers]
    if not isinstance(optimizer, Optimizer):
        raise HookError(
            type(optimizer).__name__,
            "pass a torch.optim.Optimizer, or a wrapper that has one as .optimizer.",
        )
    return [optimizer], []


def _is_wrapper(x: Any) -> bool:
    return hasattr(x, "param_groups") and hasattr(x, "step")
