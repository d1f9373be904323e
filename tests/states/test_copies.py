"""What people do with optimizers whose states are quantized: copies, wrappers, new groups."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn, optim
from torch.optim import AdamW, Optimizer

from rfcompile.errors import HookError, StateError
from rfcompile.states.composite import Optimizers
from rfcompile.states.packing import is_packed
from rfcompile.training import StatesHandle, quantize_states
from rfcompile.wire.policy import Policy

POLICY = Policy(optimizer_state="4b:stoch", min_bytes=0)


def step(made: Any, seed: int) -> None:
    for group in made.param_groups:
        for p in group["params"]:
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(seed))
    made.step()


def parameters(made: Any) -> list[nn.Parameter]:
    return [p for group in made.param_groups for p in group["params"]]


def are_packed(made: Any) -> bool:
    moments = [v for s in made.state.values() for k, v in s.items() if k != "step"]
    return bool(moments) and all(map(is_packed, moments))


def one() -> Optimizer:
    return AdamW([nn.Parameter(torch.randn(20, 30)), nn.Parameter(torch.randn(30))], lr=0.1)


def several() -> Optimizer:
    muon = optim.Muon([nn.Parameter(torch.randn(20, 30))])
    return Optimizers(muon, AdamW([nn.Parameter(torch.randn(30))], lr=0.1))


def saved(made: Optimizer) -> Any:
    file = io.BytesIO()
    torch.save(made, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[Optimizer], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda made: pickle.loads(pickle.dumps(made)),
    "torch.save": saved,
    "a copy of a copy": lambda made: copy.deepcopy(copy.deepcopy(made)),
}


@pytest.mark.parametrize("made_by", [one, several])
@pytest.mark.parametrize("how", COPIES)
def test_a_copy_steps_as_the_original_does(how: str, made_by: Callable[[], Optimizer]) -> None:
    made = made_by()
    handle = quantize_states(made, POLICY)
    step(made, 0)
    step(made, 1)
    twin = COPIES[how](made)
    for seed in (2, 3):
        assert are_packed(twin)
        step(made, seed)
        step(twin, seed)
    for p, q in zip(parameters(made), parameters(twin), strict=True):
        assert p is not q
        assert torch.equal(p, q)
    its = StatesHandle.of(twin)
    assert its is not handle
    assert str(its.report()) == str(handle.report())
    its.remove()
    assert not are_packed(twin)
    assert are_packed(made)
    step(twin, 4)
    with pytest.raises(StateError, match="not quantized"):
        StatesHandle.of(twin)


def test_a_model_and_its_optimizer_are_copied_together() -> None:
    model = nn.Linear(30, 20)
    made = AdamW(model.parameters())
    handle = quantize_states(made, POLICY)
    step(made, 0)
    twin, other, its = copy.deepcopy((model, made, handle))
    assert other.param_groups[0]["params"][0] is twin.weight
    assert StatesHandle.of(other) is its
    assert its.report().num_quantized == 4


class Wrapper:
    """As Lightning's: not an optimizer itself."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer

    @property
    def param_groups(self) -> Any:
        return self._optimizer.param_groups

    def step(self) -> None:
        self._optimizer.step()


class Bare(Optimizer):
    """As accelerate's: an optimizer whose constructor ran none of torch's."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer

    param_groups = property(lambda self: self.optimizer.param_groups)  # type: ignore[assignment]
    state = property(lambda self: self.optimizer.state)  # type: ignore[assignment]

    def step(self, closure: Any = None) -> Any:
        return self.optimizer.step(closure)


@pytest.mark.parametrize("wrap", [Wrapper, Bare, lambda o: Wrapper(Bare(o))])
@pytest.mark.parametrize("made_by", [one, several])
def test_a_wrapper_stands_for_its_optimizer(
    wrap: Callable[[Optimizer], Any], made_by: Callable[[], Optimizer]
) -> None:
    made = made_by()
    wrapped = wrap(made)
    handle = quantize_states(wrapped, POLICY)
    step(wrapped, 0)
    assert are_packed(made)
    assert StatesHandle.of(wrapped) is handle is StatesHandle.of(made)
    with pytest.raises(StateError, match="quantized already"):
        quantize_states(made, 8)


def test_accelerate() -> None:
    accelerate = pytest.importorskip("accelerate")
    model = nn.Linear(64, 64)
    model, made = accelerate.Accelerator(cpu=True).prepare(model, AdamW(model.parameters()))
    handle = quantize_states(made, POLICY)
    model(torch.randn(8, 64)).sum().backward()
    made.step()
    assert handle.report().num_quantized == 4


def test_what_is_no_optimizer_is_refused() -> None:
    schedule = optim.lr_scheduler.LambdaLR(one(), lambda n: 1.0)
    for other in (schedule, None, nn.Linear(2, 2), [one()]):
        with pytest.raises(HookError, match=r"pass a torch\.optim\.Optimizer"):
            quantize_states(other)  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", ["none", "reset", "pullback"])
def test_lookahead_reads_states_after_the_inner_step(mode: str) -> None:
    package = pytest.importorskip("pytorch_optimizer")
    p = nn.Parameter(torch.randn(20, 30))
    inner = optim.SGD([p], lr=0.1, momentum=0.9)
    made = package.Lookahead(inner, k=2, pullback_momentum=mode)
    handle = quantize_states(made, POLICY)
    for seed in range(1, 5):
        step(made, seed)
        assert are_packed(inner)
    assert isinstance(made.state[p]["slow_params"], torch.Tensor)
    assert handle.report().num_quantized == 1


def test_a_state_that_is_read_between_steps_is_a_clear_error() -> None:
    made = one()
    quantize_states(made, POLICY)
    step(made, 0)
    p = parameters(made)[0]
    for use in (
        torch.abs,
        lambda x: p.detach().lerp_(x, 0.5),
        lambda x: torch._foreach_mul([x], 2),
    ):
        with pytest.raises(StateError, match="used as a tensor between two steps"):
            use(made.state[p]["exp_avg"])
    with pytest.raises(AttributeError, match="a tensor only while the optimizer steps"):
        made.state[p]["exp_avg"].abs()


def test_a_group_that_is_added_later_is_quantized() -> None:
    for made in (one(), several()):
        handle = quantize_states(made, POLICY)
        step(made, 0)
        made.add_param_group({"params": [nn.Parameter(torch.randn(40))], "lr": 0.5})
        step(made, 1)
        assert are_packed(made)
        assert len({site.module for site in handle.report().sites}) == len(parameters(made))


def test_a_closure_and_a_scheduler_and_a_skipped_step() -> None:
    p = nn.Parameter(torch.randn(300))
    made = AdamW([p], lr=0.1)
    quantize_states(made, POLICY)
    schedule = optim.lr_scheduler.ExponentialLR(made, 0.5)

    def closure() -> torch.Tensor:
        made.zero_grad()
        loss = (p - 1).square().sum()
        loss.backward()
        return loss

    made.step(closure)
    schedule.step()
    assert are_packed(made)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    before, kept = p.detach().clone(), made.state[p]["exp_avg"]
    p.grad = torch.full_like(p, float("inf"))
    scaler.scale(torch.ones(()))
    scaler.step(made)
    assert torch.equal(p, before)
    assert made.state[p]["exp_avg"] is kept


def test_lbfgs_steps_with_its_closure() -> None:
    weights = [nn.Parameter(torch.full((300,), 0.5)) for _ in range(2)]
    for p, quantized in zip(weights, (True, False), strict=True):
        made = optim.LBFGS([p], max_iter=3)
        if quantized:
            quantize_states(made, POLICY)

        def closure(made: Any = made, p: nn.Parameter = p) -> torch.Tensor:
            made.zero_grad()
            loss = (p.cos() * torch.arange(300)).sum()
            loss.backward()
            return loss

        made.step(closure)
        made.step(closure)
    assert torch.equal(*weights)
