"""Handle: the base class of what a hook returns, with a report, a state and ``remove()``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Self

from rfcompile.errors import StateError
from rfcompile.report.report import Report

REMOVED = "removed: from then on everything is exact"
"""The note of a report on what was taken away."""


class Handle(ABC):
    """Every hook of this package has these methods; as a context manager it is removed at the end.

    ::

        with rf.distributed.quantize_ddp(ddp, 4) as handle:
            train(ddp)
            print(handle.report())  # afterwards everything is exact, and the report says so
    """

    @abstractmethod
    def report(self) -> Report:
        """What travels, or is kept, in which format, and why the rest stays exact."""

    @abstractmethod
    def remove(self) -> None:
        """Take away what the door put in place: from now on everything is exact."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint has to hold for training to go on exactly; {} where nothing is."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a :meth:`state_dict`.

        Raises:
            StateError: the state holds something that this handle has no place for.
        """
        if state:
            raise StateError(
                f"a {type(self).__name__} keeps no state, but the one to load has some",
                list(state),
                "Load it into the handle that it came from.",
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()
