"""The libraries are imported when they are used, and what is missing or new is said."""

from __future__ import annotations

import re
import sys
import warnings
from importlib import metadata
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

import rfcompile as rf
from rfcompile.errors import MissingPackageError, PolicyError, RFCompileWarning
from rfcompile.integrations import clients
from rfcompile.integrations.callback import TrafficCallback
from rfcompile.integrations.lightning import QuantizeTraffic as LightningCallback
from rfcompile.integrations.transformers import QuantizeTraffic as TrainerCallback
from rfcompile.wire import default_policy as defaults

CALLBACKS: list[tuple[type[TrafficCallback], str, str, str]] = [
    (LightningCallback, "lightning", "lightning.pytorch", "Callback"),
    (TrainerCallback, "transformers", "transformers", "TrainerCallback"),
]


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Stands for a library: a module with the class, of a version."""

    def install(package: str, module: str, base: str, version: str) -> type:
        fake = ModuleType(module)
        vars(fake)[base] = type(base, (), {})
        monkeypatch.setitem(sys.modules, package, ModuleType(package))
        monkeypatch.setitem(sys.modules, module, fake)
        monkeypatch.setattr(metadata, "version", lambda name: version)
        clients._warn_if_untried.cache_clear()
        kind: type = vars(fake)[base]
        return kind

    return install


@pytest.mark.parametrize(("callback", "package", "module", "_base"), CALLBACKS)
def test_a_library_that_is_not_installed(
    callback: type[TrafficCallback],
    package: str,
    module: str,
    _base: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingPackageError, match=rf"{package} is not installed: pip install"):
        callback(4)


@pytest.mark.parametrize(("callback", "package", "module", "base"), CALLBACKS)
def test_another_major_version_is_a_warning(
    callback: type[TrafficCallback], package: str, module: str, base: str, installed: Any
) -> None:
    tried = clients.TRIED[package]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kind = installed(package, module, base, f"{tried.split('.')[0]}.99.0")
        made = callback(4)
    assert isinstance(made, kind)
    assert isinstance(made, callback)
    assert type(made) is type(callback(8))
    installed(package, module, base, "99.1")
    message = rf"{package} 99\.1 is another major version .* \({re.escape(tried)}\)"
    with pytest.warns(RFCompileWarning, match=message):
        callback(4)


@pytest.mark.parametrize(("callback", "package", "module", "base"), CALLBACKS)
def test_the_policy_is_read_at_once(
    callback: type[TrafficCallback],
    package: str,
    module: str,
    base: str,
    installed: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    installed(package, module, base, clients.TRIED[package])
    monkeypatch.setattr(defaults._Default, "policy", None)
    monkeypatch.setattr(defaults._Default, "compiled", None)
    with pytest.raises(PolicyError, match="set a default one"):
        callback()
    rf.set_default_policy(4)
    assert "gradients=4b" in callback().report().policy
    assert callback("8b").report().notes == ("training has not begun",)


def test_trainer_that_wraps_nothing(installed: Any) -> None:
    """The error comes with the first batch; an evaluation before it is none."""
    installed(*CALLBACKS[1][1:], clients.TRIED["transformers"])
    callback: Any = TrainerCallback(4)
    model = nn.Linear(2, 2)
    state = type("State", (), {"global_step": 0})
    args = type("Arguments", (), {"fsdp": "", "output_dir": "."})
    callback.on_train_begin(args, state, None, model=model)
    model.eval()(torch.ones(2))
    nn.Linear(2, 2)(torch.ones(2))
    with pytest.raises(rf.errors.HookError, match="neither in DistributedDataParallel nor sharded"):
        model.train()(torch.ones(2))
    model(torch.ones(2))  # no hook is left
    callback.on_train_begin(args, state, None, model=model)
    callback.on_train_end(args, state, None)
    model(torch.ones(2))
