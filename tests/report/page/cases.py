"""Pages of real models, for tests in a browser; as a script it writes them into a folder.

python -m tests.report.page.cases FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._functorch.aot_autograd import make_boxed_func
from torch.distributed.device_mesh import init_device_mesh

import rfcompile as rf
from rfcompile.inductor import backend
from rfcompile.report.diff import GraphDiff
from rfcompile.report.report import Report
from rfcompile.wire.process_groups import simulated
from tests.pages import ROOT
from tests.test_examples import load

GPT = load(ROOT / "examples" / "gpt.py")
SMALL = GPT.GPTConfig(width=64, layers=2, heads=2, context=64)


def gpt(layers: int = 2) -> nn.Module:
    """A GPT of random weights, with some outliers in the later layers."""
    torch.manual_seed(0)
    model: nn.Module = GPT.GPT(GPT.GPTConfig(width=64, layers=layers, heads=2, context=64))
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, std=0.08)
        if name.endswith("down.weight"):
            with torch.no_grad():
                parameter[:2] *= 1 + int(name.split(".")[1])
    return model


def tokens() -> Tensor:
    return torch.randint(256, (4, 64))


def parallel_report() -> Report:
    """Two simulated ranks, tensor parallel: forward and backward graphs with collectives.

    The graphs run as they are: Inductor would make kernels of them for a minute.
    """
    wire = rf.Wire(rf.Policy.of(bits=4, min_bytes=0))
    with simulated(2), mock.patch.object(backend, "compile_fx_inner", interpreted):
        model = GPT.parallelize(gpt(), init_device_mesh("cpu", (2,)))
        return rf.explain(model, wire, example_inputs=(tokens(),))


def interpreted(gm: fx.GraphModule, inputs: object, **_: object) -> object:
    return make_boxed_func(gm.forward)


def explained(layers: int = 12) -> Report:
    policy = rf.Policy.of(bits=4, gradients=8, sites={"blocks.3": None, "blocks.5": 8})
    return rf.explain(gpt(layers), rf.Wire(policy), example_inputs=(tokens(),))


def llama(layers: int = 48) -> nn.Module:
    """A model of transformers with as many layers as the large ones have, and narrow ones."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model: nn.Module = LlamaForCausalLM(config)
    return model


def deep_diff(layers: int = 48) -> GraphDiff:
    model = llama(layers).eval()
    after = rf.transform(model, bits=4)
    x = torch.randint(64, (2, 12))
    return rf.diff(model, after, example_inputs=((), {"input_ids": x}))


def planned(layers: int = 6) -> tuple[Any, rf.Scores, nn.Module]:
    """A plan, its scores, its model."""
    model = gpt(layers)

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        return F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())

    batches = [torch.randint(256, (4, 33)) for _ in range(3)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(30):
        optimizer.zero_grad()
        loss(model, torch.cat(batches)).backward()
        optimizer.step()
    scores = rf.score(model, batches, loss=loss, modules="branches")
    exact = sum(choice.exact_bytes for choice in rf.plan(scores, loss=1e9).choices)
    return rf.plan(scores, bytes=exact / 8), scores, model


def write_all(folder: Path) -> None:
    report = parallel_report()
    report.page(folder / "parallel_report.html")
    rf.diff(report).page(folder / "parallel_diff.html")
    explained().page(folder / "explain.html")
    plan, scores, model = planned()
    plan.page(folder / "plan.html", scores=scores, model=model)
    deep_diff().page(folder / "deep_diff.html")


if __name__ == "__main__":
    write_all(Path(sys.argv[1]))
