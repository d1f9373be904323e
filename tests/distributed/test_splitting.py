"""split_at_boundaries in one process: the stages, called in turn, are the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import rfcompile as rf
from rfcompile.distributed import split_at_boundaries
from rfcompile.errors import BoundaryError, CaptureError, OptionError
from tests.test_examples import load


class Block(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        return x + torch.tanh(self.linear(x)) * positions


class Net(nn.Module):
    """Blocks that share positions made of a buffer; a mask, and a skip from the first block."""

    scale: Tensor

    def __init__(self, depth: int = 4) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(depth))
        self.dropout = nn.Dropout(0.0)
        self.register_buffer("scale", torch.ones(8), persistent=False)
        self.register_buffer("shift", torch.zeros(8))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        positions = torch.arange(x.shape[1])[:, None].cos() * self.scale
        first = None
        for block in self.blocks:
            x = self.dropout(block(x, positions))
            if mask is not None:
                x = x * mask[..., None].float()
            first = x if first is None else first
        assert first is not None
        return x + first + self.get_buffer("shift")


def chained(stages: tuple[fx.GraphModule, ...], *values: Any) -> Any:
    for stage in stages:
        result = stage(*values)
        values = result if isinstance(result, tuple) else (result,)
    return result


def inputs_of(stage: fx.GraphModule) -> list[str]:
    return [str(node.target) for node in stage.graph.find_nodes(op="placeholder")]


def check(model: nn.Module, stages: tuple[fx.GraphModule, ...], *args: Any) -> None:
    """The same output, gradients, parameters and saved names."""
    expected = model(*args)
    expected = getattr(expected, "logits", expected)
    gradients = torch.autograd.grad(expected.square().mean(), list(model.parameters()))
    got = chained(stages, *args)
    assert torch.equal(got, expected)
    again = torch.autograd.grad(got.square().mean(), list(model.parameters()))
    assert all(map(torch.equal, again, gradients))
    named = [item for stage in stages for item in stage.named_parameters()]
    assert len(named) == len(dict(named)) == len(list(model.parameters()))
    assert all(parameter is model.get_parameter(name) for name, parameter in named)
    saved = {name for stage in stages for name in stage.state_dict()}
    assert saved == {n for n in model.state_dict() if not n.endswith("num_batches_tracked")}


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5])
def test_the_example_gpt(root: Path, n: int) -> None:
    gpt = load(root / "examples" / "gpt.py")
    model = gpt.GPT(gpt.GPTConfig(width=32, layers=4, heads=2, context=16))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    tokens = torch.randint(256, (3, 16))
    stages = split_at_boundaries(model, n, (tokens,))
    assert len(stages) == n
    check(model, stages, tokens)
    # The angles of the rotation do not travel: every stage has the buffer that they come from.
    assert [len(inputs_of(stage)) for stage in stages] == [1] * n
    blocks = [{k.split(".")[1] for k in s.state_dict() if k.startswith("blocks")} for s in stages]
    if n == 3:
        assert blocks == [{"0", "1"}, {"2"}, {"3"}]


@pytest.mark.slow
@pytest.mark.parametrize("has_mask", [False, True])
def test_a_transformers_model(has_mask: bool) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=4,
        num_attention_heads=2, num_key_value_heads=1, use_cache=False,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    ids = torch.randint(64, (2, 12))
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[0, :3] = 0
    arguments = (ids, mask) if has_mask else (ids,)
    stages = split_at_boundaries(model, 3, arguments)
    check(model, stages, *arguments)
    # Of a mask, the integers travel: what attention makes of it is computed again.
    assert [inputs_of(stage)[1:] for stage in stages[1:]] == [["attention_mask"] * has_mask] * 2


def test_marks_of_transform_are_the_cuts() -> None:
    model = Net()
    x = torch.randn(2, 5, 8)
    marked = rf.transform(model, rf.Wire(4, modules=["blocks.0", "blocks.2"]))
    stages = split_at_boundaries(marked, 3, x)
    check(model, stages, x)  # no fake wire
    names = [sorted(n for n, _ in stage.named_parameters() if "weight" in n) for stage in stages]
    assert [[name.split(".")[1] for name in stage] for stage in names] == [["0"], ["1", "2"], ["3"]]
    assert not torch.equal(marked(x), model(x))  # its own wires are as they were
    exact = rf.transform(model, rf.Wire(rf.Policy(), modules=["blocks.1"]))
    assert len(split_at_boundaries(exact, 2, x)) == 2


def test_long_skips_and_inputs_travel_along() -> None:
    model = Net()
    x, mask = torch.randn(2, 5, 8), torch.rand(2, 5) < 0.5
    stages = split_at_boundaries(model, 3, (x, mask))
    check(model, stages, x, mask)
    assert [len(inputs_of(stage)) for stage in stages] == [2, 3, 3]
    assert inputs_of(stages[0]) == ["x", "mask"]
    assert "mask" in inputs_of(stages[1])


def test_the_mode_is_the_models() -> None:
    model = Net()
    model.dropout.p = 0.5
    x = torch.randn(2, 5, 8)
    training = split_at_boundaries(model, 2, x)
    assert not torch.equal(chained(training, x), chained(training, x))
    evaluating = split_at_boundaries(model.eval(), 2, x)
    assert torch.equal(chained(evaluating, x), model(x))


def test_operations_in_place() -> None:
    class InPlace(Net):
        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            y = super().forward(x)
            y += 1
            return y.relu_()

    model, x = InPlace(), torch.randn(2, 5, 8)
    check(model, split_at_boundaries(model, 3, x), x)


def test_what_cannot_be_cut() -> None:
    x = torch.randn(2, 5, 8)
    with pytest.raises(BoundaryError, match="Net has 4 boundaries: too few for 6 stages, which ne"):
        split_at_boundaries(Net(), 6, x)
    with pytest.raises(BoundaryError, match="has no repeated blocks"):
        split_at_boundaries(nn.Linear(8, 8), 2, x)
    for n in (0, 2.0, True):
        with pytest.raises(OptionError, match=r"n=.* give a number of stages, 1 or more"):
            split_at_boundaries(Net(), n, x)  # type: ignore[arg-type]
    with pytest.raises(CaptureError, match="no example inputs"):
        split_at_boundaries(Net(), 2)
    tied = Net()
    tied.blocks[3].linear.weight = tied.blocks[0].linear.weight  # type: ignore[union-attr]
    with pytest.raises(BoundaryError, match=r"stages 0 and 1 both use the parameter 'blocks"):
        split_at_boundaries(tied, 2, x)
    counting = nn.Sequential(Net(), nn.BatchNorm1d(5))
    with pytest.raises(CaptureError, match=r"changes its buffers .* a batch norm in training does"):
        split_at_boundaries(counting, 2, x)
    check(counting.eval(), split_at_boundaries(counting, 2, x), x)
