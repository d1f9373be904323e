"""transform(residual=...): whole models without their residual connections, and their uses."""

from __future__ import annotations

import copy
import io
import os
import re
from collections import Counter
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

import rfcompile as rf
from rfcompile.errors import OptionError, ResidualError
from rfcompile.graph.capture import capture
from rfcompile.graph.pipeline import run
from rfcompile.nn.residual_site import ResidualSite
from rfcompile.passes.open_residuals import OpenedSite, OpenResiduals
from rfcompile.rewrites.residual.initialization import Initialization
from rfcompile.rewrites.residual.report import ResidualReport, residual_report
from rfcompile.rewrites.residual.rewrite import ResidualFree
from rfcompile.rewrites.residual.temperature import TemperatureRule
from rfcompile.wire.fake import FakeWire
from tests.zoo import GPT2, GROUPED, TRANSFORMERS, ZOO, Block, NanoGPT, pretrained, tokens

os.environ.setdefault("HF_HUB_OFFLINE", "1")

X = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))


def build(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    if name in TRANSFORMERS:
        pytest.importorskip("transformers")
    return ZOO[name].build().eval(), ZOO[name].inputs()


def sites_of(model: nn.Module) -> list[ResidualSite]:
    return [module for module in model.modules() if isinstance(module, ResidualSite)]


def first(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def storages(model: nn.Module) -> set[int]:
    return {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}


# ---- the modes ---------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("nanogpt", "anneal"),
        ("bloom", "anneal"),
        ("convnext", "free"),
        ("gpt2", "free"),
        ("mixtral", "free"),
    ],
)
def test_every_mode(name: str, mode: str) -> None:
    model, inputs = build(name)
    expected = first(model(**inputs))
    state = {key: value.clone() for key, value in model.state_dict().items()}
    classes = [type(module) for module in model.modules()]
    new = rf.transform(model, residual=mode, example_inputs=((), inputs))
    # The original is as it was, and what the new one shares with it is what the mode says.
    assert [type(module) for module in model.modules()] == classes
    assert model.state_dict().keys() == state.keys()
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key]), key
    if mode == "anneal":
        assert storages(model) <= storages(new)
        assert torch.equal(first(new(**inputs)), expected)
    else:
        assert storages(model).isdisjoint(storages(new))
        assert not rf.find_residuals(new, example_inputs=inputs)
    # The names of the state are the old ones, and documented new ones.
    added = [key for key in new.state_dict() if key not in state]
    assert {key for key in new.state_dict() if key not in added} == state.keys()
    assert all(re.search(r"(^|\.)(residual_\d+\.gain|temperature)$", key) for key in added)
    # Everything that trained trains; but what only the skip used.
    old = gradients(model, inputs)
    assert old <= gradients(new, inputs)
    assert len(sites_of(new)) == ZOO[name].kinds["block"]
    report = residual_report(new)
    assert len(report.sites) == len(sites_of(new))
    assert report.mode == mode


def gradients(model: nn.Module, inputs: dict[str, Tensor]) -> set[str]:
    """The parameters that get a gradient that is not zero."""
    model.zero_grad()
    output = first(model(**inputs))
    (
        output * torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    ).sum().backward()
    got = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    model.zero_grad()
    return got


@pytest.mark.slow
def test_mix() -> None:
    model = NanoGPT()
    new = rf.transform(model, residual="mix", example_inputs=((), tokens()))
    for site in sites_of(new):
        gram = site.weight @ site.weight.T
        assert float((gram - torch.eye(32)).detach().abs().max()) <= 32 * 32 * 2.0**-24
    assert storages(model).isdisjoint(storages(new))
    assert {f"blocks.{i}.residual_{k}.weight" for i in (0, 1) for k in (0, 1)} <= gradients(
        new, tokens()
    )
    block, x = new.get_submodule("blocks.0").eval(), torch.randn(1, 3, 32)
    mixings = [site.weight for site in sites_of(block)]
    mixed = block.attention(block.norm_1(x)) @ mixings[0].T
    expected = block.mlp(block.norm_2(mixed)) @ mixings[1].T
    torch.testing.assert_close(block(x), expected)


def test_mix_needs_channels_last() -> None:
    model, inputs = build("resnet")
    with pytest.raises(ResidualError, match=r"blocks\.0\.residual_0 .* channels .*use 'free'"):
        rf.transform(model, residual="mix", example_inputs=((), inputs))


def test_a_trained_model_by_its_gains() -> None:
    model = NanoGPT().eval()
    new = rf.transform(model, residual="anneal", example_inputs=((), tokens()))
    ids = tokens()["input_ids"]
    for site in sites_of(new):
        assert site.gain.shape == (1,)
        nn.init.zeros_(site.gain)
    x = model.tokens(ids) + model.positions(torch.arange(ids.shape[1]))
    for block in model.blocks:
        x = block.mlp(block.norm_2(block.attention(block.norm_1(x))))
    torch.testing.assert_close(new(ids), model.head(model.norm(x)))


@pytest.mark.slow
def test_free_after_anneal() -> None:
    annealed = rf.transform(NanoGPT(), residual="anneal", example_inputs=((), tokens()))
    new = rf.transform(annealed, residual="free", example_inputs=((), tokens()))
    assert [site.mode for site in sites_of(new)] == ["free"] * 4
    assert [site.mode for site in sites_of(annealed)] == ["gain"] * 4
    assert not [key for key in new.state_dict() if "gain" in key]
    assert not rf.find_residuals(new, example_inputs=tokens())


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["free", "mix"])
def test_free_already(mode: str) -> None:
    new = rf.transform(NanoGPT(), residual=mode, example_inputs=((), tokens()))
    text = r"NanoGPT has no residual add of kind block \(0 of other kinds\): it was rewritten w"
    with pytest.raises(ResidualError, match=text):
        rf.transform(new, residual="free", example_inputs=((), tokens()))


def test_a_parallel_mlp_that_is_added_later() -> None:
    """``x + attention + mlp``: both are the branch of one add."""

    class Parallel(Block):
        def forward(self, x: Tensor) -> Tensor:
            return x + self.attention(self.norm_1(x)) + self.mlp(self.norm_1(x))

    new = rf.transform(Parallel(16), residual="free", example_inputs=(X,)).eval()
    report = residual_report(new)
    done = {item.parameter for item in report.initialized}
    assert {
        "attention.qkv.weight",
        "attention.out.weight",
        "mlp.0.weight",
        "mlp.2.weight",
    } < done
    assert [site.add.branch for site in report.sites] == [
        ("attention.qkv", "attention", "attention.out", "mlp.0", "mlp.2")
    ]
    torch.testing.assert_close(
        new(X), new.attention(new.norm_1(X)) + new.mlp(new.norm_1(X)), rtol=0, atol=0
    )


def test_choices() -> None:
    how = ResidualFree(initialization=None, temperature=None)
    model = NanoGPT()
    new = rf.transform(model, how, example_inputs=((), tokens()))
    assert new.state_dict().keys() == model.state_dict().keys()
    for key, value in new.state_dict().items():
        assert torch.equal(value, model.state_dict()[key])
    report = residual_report(new)
    assert (report.initialized, report.temperatures, report.notes) == ((), (), ())
    assert ResidualFree("anneal").initialization is None
    assert ResidualFree("anneal").temperature is None
    assert ResidualFree("mix").initialization == Initialization()
    assert ResidualFree("mix").temperature == TemperatureRule(required=False)


# ---- the report --------------------------------------------------------------------------------


def test_report_text() -> None:
    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f = nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.f(x)

    new = rf.transform(One(), residual="free", example_inputs=(X,))
    line = One.forward.__code__.co_firstlineno + 1
    assert str(residual_report(new)) == "\n".join(
        [
            "1 of 1 residual adds rewritten: free",
            "site        was              at",
            f"residual_0  aten.add.Tensor  tests/rewrites/residual/test_rewrite.py:{line}",
            "2 parameters initialized anew: 1 mlp, 1 zero",
            "no temperature: no self-attention was found, a softmax between two products; scale "
            "the queries of any other kind in the model",
        ]
    )


def test_report_of_a_transformer() -> None:
    new = rf.transform(NanoGPT(1), residual="free", example_inputs=((), tokens()))
    report = residual_report(new)
    assert isinstance(report, ResidualReport)
    rules = Counter(item.rule for item in report.initialized)
    assert rules == {"query, key, value": 1, "output": 1, "mlp": 2, "zero": 4}
    lines = str(report).splitlines()
    (t,) = report.temperatures
    assert lines[0] == "2 of 2 residual adds rewritten: free"
    assert lines[-1].split() == [
        "blocks.0.attention.qkv.temperature",
        *(f"{number:.3f}" for number in (t.value, t.mass_before, t.mass_after)),
    ]


def test_a_model_without_a_report() -> None:
    with pytest.raises(ResidualError, match="NanoGPT has no residual report: pass what"):
        residual_report(NanoGPT())


# ---- uses --------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["free", "anneal"])
def test_compiled(mode: str) -> None:
    new = rf.transform(NanoGPT(1), residual=mode, example_inputs=((), tokens())).eval()
    got = torch.compile(new, backend="aot_eager", fullgraph=True)(**tokens_again())
    torch.testing.assert_close(got, new(**tokens_again()))


@pytest.mark.parametrize("mode", ["free", "anneal"])
@pytest.mark.slow
def test_exported_with_another_batch(mode: str) -> None:
    new = rf.transform(NanoGPT(), residual=mode, example_inputs=((), tokens())).eval()
    auto = torch.export.Dim.AUTO
    shapes = {"input_ids": {0: auto, 1: auto}}
    program = torch.export.export(new, (), tokens(), dynamic_shapes=shapes)
    other = {"input_ids": torch.randint(0, 64, (3, 7))}
    torch.testing.assert_close(program.module()(**other), new(**other))


@pytest.mark.parametrize("name", [pytest.param("Llama", marks=pytest.mark.slow), "GPT2"])
@pytest.mark.parametrize("mode", ["free", "anneal"])
def test_generate_with_a_cache(name: str, mode: str) -> None:
    pytest.importorskip("transformers")
    config = (GPT2 if name == "GPT2" else GROUPED) | {"bos_token_id": 1, "eos_token_id": None}
    kind = "LMHeadModel" if name == "GPT2" else "ForCausalLM"
    model = pretrained(name, config | {"use_cache": True, "pad_token_id": 0}, kind)().eval()
    new = rf.transform(model, residual=mode, example_inputs=((), tokens()))
    for site in sites_of(new):
        if mode == "anneal":
            nn.init.constant_(site.gain, 0.5)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    ids = tokens()["input_ids"]
    cached = new.generate(ids, use_cache=True, **options)
    assert torch.equal(cached, new.generate(ids, use_cache=False, **options))
    assert cached.shape == (2, 20)


@pytest.mark.slow
def test_copies_and_files() -> None:
    new = rf.transform(NanoGPT(), residual="free", example_inputs=((), tokens())).eval()
    file = io.BytesIO()
    torch.save(new, file)
    file.seek(0)
    for twin in (copy.deepcopy(new), torch.load(file, weights_only=False)):
        assert torch.equal(twin(**tokens_again()), new(**tokens_again()))
        assert str(residual_report(twin)) == str(residual_report(new))
    again = rf.transform(NanoGPT(), residual="free", example_inputs=((), tokens())).eval()
    again.load_state_dict(new.state_dict())
    assert torch.equal(again(**tokens_again()), new(**tokens_again()))


def tokens_again() -> dict[str, Tensor]:
    return {"input_ids": torch.arange(12).view(2, 6)}


@pytest.mark.slow
def test_with_a_wire() -> None:
    new = rf.transform(NanoGPT(), bits=4, residual="free", example_inputs=((), tokens())).eval()
    wires = [m for m in new.modules() for h in m._forward_hooks.values() if isinstance(h, FakeWire)]
    assert wires == list(new.blocks)
    exact = rf.transform(NanoGPT(), residual="free", example_inputs=((), tokens())).eval()
    exact.load_state_dict(new.state_dict())
    assert not torch.equal(new(**tokens_again()), exact(**tokens_again()))
    assert not rf.find_residuals(new, example_inputs=tokens_again())


def test_a_compiled_model_stays_compiled() -> None:
    compiled = torch.compile(NanoGPT(1), backend="eager")
    new = rf.transform(compiled, residual="free", example_inputs=((), tokens()))
    assert type(new) is type(compiled)
    assert len(sites_of(new)) == 2
    assert new(**tokens_again()).shape == (2, 6, 64)


def test_training_goes_down() -> None:
    new = rf.transform(NanoGPT(1), residual="free", example_inputs=((), tokens()))
    optimizer = torch.optim.AdamW(new.parameters(), 3e-3)
    ids = tokens()["input_ids"]
    losses = []
    for _ in range(20):
        loss = F.cross_entropy(new(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5


# ---- graphs ------------------------------------------------------------------------------------


def traced(model: nn.Module) -> fx.GraphModule:
    return fx.symbolic_trace(model)


class Chain(nn.Module):
    """Blocks that symbolic tracing takes."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.g = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.f(x)
        return torch.add(self.g(x), x, alpha=0.5)


@pytest.mark.parametrize("source", ["traced", "exported"])
def test_a_graph(source: str) -> None:
    model = Chain()
    gm = traced(model) if source == "traced" else torch.export.export(model, (X,)).module()
    assert isinstance(gm, fx.GraphModule)
    nodes = len(gm.graph.nodes)
    annealed = rf.transform(gm, residual="anneal", example_inputs=(X,))
    assert torch.equal(annealed(X), model(X))
    free = rf.transform(gm, residual="free", example_inputs=(X,))
    torch.testing.assert_close(free(X), model.g(model.f(X)))
    assert len(gm.graph.nodes) == nodes
    assert torch.equal(gm(X), model(X))
    report = residual_report(free)
    assert [site.path for site in report.sites] == ["residual_0", "residual_1"]
    assert [site.add.operand for site in report.sites] == [0, 1]
    assert report.notes[0].startswith("a graph: parameters and temperatures stay as they are")
    if source == "traced":  # copying an exported module warns, in torch
        assert torch.equal(copy.deepcopy(free)(X), free(X))


def test_the_graph_pass_counts() -> None:
    gm = capture(Chain(), (X,))
    record = run(gm, [OpenResiduals()])
    assert [step.changes for step in record.steps] == [2]
    assert all(isinstance(fact, OpenedSite) for fact in record.facts)
    again = run(record.gm, [OpenResiduals()])
    assert [step.changes for step in again.steps] == [0]


def test_a_graph_with_another_spelling() -> None:
    class Lerp(Chain):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            return torch.lerp(y, self.g(y), 0.5)

    gm = traced(Lerp())
    with pytest.raises(
        ResidualError, match=r"^1 residual adds of the graph cannot .*torch\.lerp"
    ) as e:
        rf.transform(gm, residual="free", example_inputs=(X,))
    assert [add.spelling for add in e.value.left] == ["torch.lerp"]


def test_a_graph_without_residual_adds() -> None:
    gm = traced(nn.Sequential(nn.Linear(16, 16), nn.ReLU()))
    with pytest.raises(ResidualError, match=r"^the graph has no residual add of kind block"):
        rf.transform(gm, residual="free", example_inputs=(X,))


# ---- errors ------------------------------------------------------------------------------------


def test_an_unknown_mode() -> None:
    with pytest.raises(
        OptionError, match=r"residual='drop' .*choose 'free', 'mix' or 'anneal'"
    ) as error:
        rf.transform(NanoGPT(), residual="drop", example_inputs=((), tokens()))
    assert (error.value.option, error.value.value) == ("residual", "drop")


@pytest.mark.slow
def test_frozen_parameters() -> None:
    model = NanoGPT().requires_grad_(False)
    with pytest.raises(ResidualError, match=r"is frozen, .* residual='anneal' on a trained"):
        rf.transform(model, residual="free", example_inputs=((), tokens()))
    assert rf.transform(model, residual="anneal", example_inputs=((), tokens()))


def test_parallel_parameters() -> None:
    model = NanoGPT()
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    try:
        weight = distribute_tensor(model.head.weight, init_device_mesh("cpu", (1,)))
        model.head.weight = nn.Parameter(weight)
        with pytest.raises(ResidualError, match=r"^head\.weight is a DTensor: rewrite the model f"):
            rf.transform(model, residual="free", example_inputs=((), tokens()))
    finally:
        dist.destroy_process_group()


def test_parameters_without_values() -> None:
    with torch.device("meta"):
        model = NanoGPT()
    with pytest.raises(ResidualError, match=r"^tokens\.weight is on the meta device: give the m"):
        rf.transform(model, residual="free", example_inputs=((), tokens()))


@pytest.mark.slow
def test_convolutions_are_reported() -> None:
    model, inputs = build("resnet")
    new = rf.transform(model, residual="free", example_inputs=((), inputs))
    first, second = residual_report(new).notes
    assert first.startswith(
        "not initialized anew, as they are no linears to us: blocks.0.body.0.we"
    )
    assert second.startswith("no temperature: no self-attention was found")


def test_torchs_own_encoder() -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2)
    new = rf.transform(model, residual="free", example_inputs=(X,)).eval()
    assert [item.name for item in residual_report(new).temperatures] == [
        f"layers.{layer}.self_attn.temperature" for layer in (0, 1)
    ]
    with torch.no_grad():
        kernel = new(X)
    torch.testing.assert_close(kernel, new(X))
    assert len(sites_of(new)) == 4


@pytest.mark.parametrize(("option", "value"), [("mode", "none"), ("width", None)])
def test_a_site_knows_its_modes(option: str, value: Any) -> None:
    site = ResidualSite()
    with pytest.raises(OptionError, match=f"{option}={value!r} is not supported") as error:
        site.become("mix" if option == "width" else value)
    assert (error.value.option, error.value.value) == (option, value)
    assert site.mode == "keep"


def test_a_block_of_the_zoo_is_residual_free() -> None:
    block = Block(16).eval()
    new = rf.transform(block, ResidualFree(temperature=None), example_inputs=(X,))
    expected = new.mlp(new.norm_2(new.attention(new.norm_1(X))))
    assert torch.equal(new(X), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "keep"}, "choose 'free', 'mix' or 'anneal'"),
        ({"initialization": 3}, "initialization=3 is not supported: give rf.training.Init"),
        ({"temperature": "x"}, "temperature='x' is not supported: give rf.training.Temp"),
        ({"kinds": ["zzz"]}, "is not supported: name some of 'block'"),
        ({"kinds": ()}, "is not supported: name some of 'block'"),
    ],
)
def test_wrong_options_are_errors_at_once(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        ResidualFree(**options)


def test_one_kind_may_be_a_text() -> None:
    assert ResidualFree(kinds="block") == ResidualFree()  # type: ignore[arg-type]
