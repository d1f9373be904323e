"""One rule for causal attention: a module and its captured graph get the same answer and text."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rfcompile as rf
from rfcompile.errors import GrayingError, RFCompileError
from rfcompile.experimental import GrayingReport
from rfcompile.find.attention_cores import all_cores
from rfcompile.find.causality import causality
from rfcompile.graph.capture import exported
from tests.zoo import ZOO, NanoGPT, tokens

N, WIDTH = 7, 16
Attend = Callable[..., Tensor]


def fused(mask: Callable[..., Tensor | None]) -> Attend:
    return lambda x, *given: F.scaled_dot_product_attention(x, x, x, mask(x, *given))


def written(masked: Callable[..., Tensor]) -> Attend:
    return lambda x, *given: masked(x @ x.mT, *given).softmax(-1) @ x


def positions(x: Tensor) -> Tensor:
    return torch.arange(x.shape[-2])


def distance(x: Tensor) -> Tensor:
    return positions(x)[:, None] - positions(x)


def lower(x: Tensor) -> Tensor:
    return torch.ones(x.shape[-2], x.shape[-2], dtype=torch.bool).tril()


def added_in_place(scores: Tensor) -> Tensor:
    mask = torch.zeros(scores.shape[-2:])
    mask[distance(scores) < 0] = -torch.inf
    return scores + mask


def filled_in_place(scores: Tensor) -> Tensor:
    scores.masked_fill_(~lower(scores), -torch.inf)
    return scores


def after_softmax(x: Tensor) -> Tensor:
    weights = (x @ x.mT).softmax(-1) * lower(x)
    return weights / weights.sum(-1, keepdim=True) @ x


def by_einsum(x: Tensor) -> Tensor:
    heads = x.unflatten(-1, (2, -1))
    scores = torch.einsum("bqhd,bkhd->bqhk", heads, heads)
    scores = scores.masked_fill(~lower(x)[:, None], -1e9)
    return torch.einsum("bqhk,bkhd->bqhd", scores.softmax(-1), heads).flatten(2)


def in_a_region(x: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        return F.scaled_dot_product_attention(x, x, x, is_causal=True)


def with_an_order_in_a_region(x: Tensor) -> Tensor:
    with torch.no_grad():
        mask = lower(x)
    return F.scaled_dot_product_attention(x, x, x, mask)


def across(x: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(x, x[:, :4] + 1, x[:, :4])


def across_in_order(x: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(x, x[:, :4], x[:, :4], lower(x)[:, :4])


def alibi(scores: Tensor) -> Tensor:
    return scores - distance(scores).abs() / 2


def minimal(scores: Tensor) -> Tensor:
    return torch.where(lower(scores), scores, torch.finfo(scores.dtype).min)


def prefix(x: Tensor) -> Tensor:
    return lower(x) | (positions(x) < 3)


def groups(x: Tensor) -> Tensor:
    return positions(x)[:, None] // 4 == positions(x) // 4


PADDING = torch.tensor([1] * 5 + [0] * 2)
MASK = torch.ones(2, N, dtype=torch.int64)
CAUSAL: dict[str, Attend] = {
    "is_causal": lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=True),
    "added -inf": fused(lambda x: torch.full((N, N), -math.inf).triu(1)),
    "added -100": fused(lambda x: -100.0 * (1 - lower(x).float())),
    "boolean": fused(lower),
    "masked_fill": written(lambda s: s.masked_fill(~lower(s), -math.inf)),
    "masked_fill in place": written(filled_in_place),
    "made in place": written(added_in_place),
    "where": written(minimal),
    "difference of positions": fused(lambda x: distance(x) >= 0),
    "after the softmax": after_softmax,
    "einsum": by_einsum,
    "in a region": in_a_region,
    "mask of a region": with_an_order_in_a_region,
    "causal window": fused(lambda x: lower(x) & (distance(x) < 3)),
    "prefix": fused(prefix),
    "backwards": fused(lambda x: lower(x).mT),
    "with padding": fused(lambda x, mask: lower(x) & mask.bool()[:, None]),
}
OPEN: dict[str, Attend] = {
    "bidirectional": fused(lambda x: None),
    "bidirectional, written": written(lambda s: s / 4),
    "window": fused(lambda x: distance(x).abs() < 3),
    "packed": fused(groups),
    "alibi": written(alibi),
    "padding": fused(lambda x: PADDING.bool()),
    "padding of inputs": fused(lambda x, mask: mask.bool()[:, None]),
    "added padding": written(lambda s, mask: s + (1.0 - mask.float())[:, None] * -1e9),
    "hidden by inputs": written(lambda s, hides: s.masked_fill(hides.bool()[:, None], -1e9)),
    "lengths": fused(lambda x, mask: (positions(x) < mask.sum(1, keepdim=True))[:, None]),
    "padded queries": fused(lambda x, mask: mask.bool()[:, None] & mask.bool()[:, :, None]),
    "window and padding": fused(lambda x, mask: (distance(x).abs() < 3) & mask.bool()[:, None]),
    "cross attention": across,
}
UNKNOWN: dict[str, Attend] = {
    "pairs of an input": fused(lambda x, mask: mask[:1].mT.bool() | mask.bool()[:, None]),
    "packed by an input": fused(lambda x, mask: mask[:, None] == mask[:, :, None]),
    "cross attention in order": across_in_order,
}
GIVEN = {
    name
    for cases in (CAUSAL, OPEN, UNKNOWN)
    for name in cases
    if "input" in name or name in (
        "with padding", "added padding", "lengths", "padded queries", "window and padding"
    )
}  # fmt: skip


class Attention(nn.Module):
    def __init__(self, attend: Attend) -> None:
        super().__init__()
        self.attend, self.project = attend, nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, *given: Tensor) -> Tensor:
        return self.attend(self.project(x), *given)


class Model(nn.Module):
    def __init__(self, attend: Attend) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Attention(attend) for _ in range(2))

    def forward(self, x: Tensor, *given: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x, *given)
        return x


def inputs_for(name: str) -> tuple[Tensor, ...]:
    x = torch.randn(2, N, WIDTH)
    return (x, MASK) if name in GIVEN else (x,)


def both(model: nn.Module, args: Any, where: Any = "input", **kwargs: Any) -> Any:
    """What the module and its graph say: the report's rows, or the error's text."""
    graph = exported(model, (args, kwargs)).module()
    said = []
    for route in (model, graph):
        how = rf.experimental.TokenGraying(modules=where)
        try:
            new = rf.transform(route, how, example_inputs=(args, kwargs))
        except RFCompileError as error:
            said.append(f"{type(error).__name__}: {error}")
            continue
        report = rf.rewrites_of(new)[-1]
        assert isinstance(report, GrayingReport)
        said.append(([place.module for place in report.places], report.left))
    assert said[0] == said[1]
    return said[0]


@pytest.mark.parametrize("name", CAUSAL)
def test_causal_attention_is_refused(name: str) -> None:
    text = both(Model(CAUSAL[name]), inputs_for(name))
    assert text.startswith(
        "GrayingError: the model cannot be grayed at blocks.0: its attention is causal."
    )


@pytest.mark.parametrize("name", OPEN)
def test_other_attention_is_grayed(name: str) -> None:
    assert both(Model(OPEN[name]), inputs_for(name)) == (["blocks.0"], ())


@pytest.mark.parametrize("name", UNKNOWN)
def test_attention_that_may_be_causal_is_refused(name: str) -> None:
    assert "blocks.0: its attention may be causal" in both(Model(UNKNOWN[name]), inputs_for(name))


class Mixer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Linear(N, N)

    def forward(self, x: Tensor) -> Tensor:
        return self.tokens(x.mT).mT


def test_without_attention_only_named_modules_are_grayed() -> None:
    model = Model(F.relu)
    model.blocks = nn.ModuleList(Mixer() for _ in range(2))
    text = both(model, inputs_for(""))
    assert "cannot be grayed at blocks.0: there is no attention" in text
    assert both(model, inputs_for(""), ("blocks.1",)) == (["blocks.1"], ())
    assert "has no self-attention" in both(model, inputs_for(""), "attention")


def test_a_place_reaches_the_attentions_of_its_list() -> None:
    model = Model(OPEN["bidirectional"])
    model.blocks[1] = Attention(CAUSAL["is_causal"])
    for where in ("input", "attention", ("blocks.0",)):
        assert "its attention is causal" in both(model, inputs_for(""), where)


class Called(nn.Module):
    """A layer of torch, which torch.fx calls as a whole."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


def test_an_attention_without_masks_to_read_may_be_causal() -> None:
    model = nn.Sequential(Called(), Called())
    assert both(model, inputs_for("")) == (["0"], ())
    traced = torch.fx.symbolic_trace(model)
    for where in ("input", ("1",)):
        how = rf.experimental.TokenGraying(modules=where)  # type: ignore[arg-type]
        with pytest.raises(GrayingError, match="its attention may be causal"):
            rf.transform(traced, how, example_inputs=inputs_for(""))


def test_one_token_tells_nothing() -> None:
    for attend in (CAUSAL["is_causal"], OPEN["bidirectional"], CAUSAL["masked_fill"]):
        assert "one token on the example inputs" in both(Model(attend), (torch.ones(2, 1, WIDTH),))


def test_a_model_without_blocks() -> None:
    text = both(Attention(OPEN["bidirectional"]), inputs_for(""))
    assert text.startswith("BoundaryError: the model has no repeated blocks")


@pytest.mark.slow
def test_models_of_the_zoo() -> None:
    assert "causal" in both(NanoGPT(), (), **tokens())
    pytest.importorskip("transformers")
    said = {"bert": "encoder.layer.0", "vit": "layers.0", "t5": "encoder.block.0"}
    for name, place in said.items():
        paths, left = both(ZOO[name].build().eval(), (), **ZOO[name].inputs())
        assert paths == [place]
        assert left == ((("decoder.block.0", "its attention is causal"),) if name == "t5" else ())
    for name in ("gpt2", "llama"):
        assert "its attention is causal" in both(ZOO[name].build().eval(), (), **ZOO[name].inputs())


@pytest.mark.slow
def test_padding_given_to_a_public_model() -> None:
    pytest.importorskip("transformers")
    given = tokens() | {"attention_mask": torch.ones(2, 12, dtype=torch.int64)}
    assert both(ZOO["bert"].build().eval(), (), **given) == (["encoder.layer.0"], ())
    assert "its attention is causal" in both(ZOO["llama"].build().eval(), (), **given)


@pytest.mark.parametrize(("name", "answer"), [("boolean", "causal"), ("alibi", "open")])
def test_symbolic_sizes_are_taken_for_their_hints(name: str, answer: str) -> None:
    model = Model((CAUSAL | OPEN)[name])
    auto = ({1: torch.export.Dim.AUTO},)
    graph = torch.export.export(model, inputs_for(name), dynamic_shapes=auto).module()
    assert [causality(core) for core in all_cores(graph)] == [answer, answer]  # type: ignore[arg-type]


def test_masks_of_buffers_are_read_and_stay_as_they_are() -> None:
    class Held(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Attention(self.attend) for _ in range(2))
            self.register_buffer("bias", torch.ones(32, 32).tril())

        def attend(self, x: Tensor) -> Tensor:
            n = x.shape[-2]
            scores = (x @ x.mT).masked_fill(self.get_buffer("bias")[:n, :n] == 0, -torch.inf)
            return scores.softmax(-1) @ x

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = x + block(x)
            return x

    model = Held()
    assert "its attention is causal" in both(model, inputs_for(""))
    assert torch.equal(model.get_buffer("bias"), torch.ones(32, 32).tril())


def test_random_numbers_stay_as_they_are() -> None:
    graph: Any = torch.export.export(
        Model(OPEN["padding of inputs"]), inputs_for("padding of inputs")
    ).module()
    state = torch.get_rng_state()
    assert {causality(core) for core in all_cores(graph)} == {"open"}
    assert torch.equal(torch.get_rng_state(), state)
