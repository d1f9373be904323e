"""TrafficCallback: what the callbacks of all libraries share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self

from rfcompile.integrations.clients import client, derived
from rfcompile.report.report import Report
from rfcompile.training.traffic import TrafficHandle, quantize_traffic
from rfcompile.wire.default_policy import policy_of
from rfcompile.wire.policy import Policyish


class TrafficCallback:
    """Quantizes while a library trains; before and after everything is exact.

    Args:
        policy: bits, a format, a mapping or a Policy; None is the default policy.
        error_feedback, weight_delta: as in :func:`~rfcompile.quantize_traffic`.

    Raises:
        PolicyError, FormatError: the policy is not understood, or there is none.
    """

    _LIBRARY: ClassVar[tuple[str, str, str]]
    """Package, module and name of the library's own callback: each instance is one of these, too.
    """

    def __new__(cls, *_: Any, **__: Any) -> Self:
        package, module, name = cls._LIBRARY
        kind: Any = cls
        made: Self = object.__new__(derived(kind, getattr(client(package, module), name)))
        return made

    def __init__(
        self,
        policy: Policyish = None,
        *,
        error_feedback: bool = False,
        weight_delta: bool = False,
    ) -> None:
        self._policy = policy_of(policy)
        self._options: dict[str, Any] = {
            "error_feedback": error_feedback,
            "weight_delta": weight_delta,
        }
        self.handle: TrafficHandle | None = None
        """What :func:`~rfcompile.quantize_traffic` returned, while the library trains."""
        self._state: Mapping[str, Any] = {}
        self._report = Report.of(self._policy, (), names=(), notes=["training has not begun"])

    def report(self) -> Report:
        """Return the report on a step; after training that on the last one."""
        return self._report if self.handle is None else self.handle.report()

    def _start(self, thing: Any) -> None:
        """Every rank calls this, between two steps."""
        self.handle = quantize_traffic(thing, self._policy, **self._options)
        if self._state:
            self.handle.load_state_dict(self._state)

    def _current_state(self) -> Mapping[str, Any]:
        """What a checkpoint has to hold; every rank calls this."""
        return self._state if self.handle is None else self.handle.state_dict()

    def _stop(self) -> None:
        """Keep the report and the state, and make everything exact again; every rank calls this."""
        if self.handle is not None:
            self._state, self._report = self.handle.state_dict(), self.handle.report()
            self.handle.remove()
            self.handle = None
