"""Models whose residual adds stand where a rewrite of sources does not look at once."""

from __future__ import annotations

import copy
import pickle
import re
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rfcompile as rf
from rfcompile.errors import ResidualError, SourceError
from rfcompile.nn.residual_site import ResidualSite
from rfcompile.rewrites.residual.report import residual_report
from rfcompile.training import TemperatureRule
from tests.zoo import ZOO, pretrained, texts

WIDTH = 8
X = torch.randn(2, 4, WIDTH, generator=torch.Generator().manual_seed(0))


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(WIDTH, 6), nn.Tanh(), nn.Linear(6, WIDTH))


def sites_of(model: nn.Module) -> list[ResidualSite]:
    return [module for module in model.modules() if isinstance(module, ResidualSite)]


def annealed(model: nn.Module, number: int) -> nn.Module:
    """The model with a gain for each of ``number`` skips: at gain 1 it computes what it did."""
    new = rf.transform(model, residual="anneal", example_inputs=(X,))
    assert len(sites_of(new)) == number
    assert torch.equal(new(X), model(X))
    return new


# ---- key-value caches --------------------------------------------------------------------------


class Cache:
    """Tensors in an object that torch.export does not know."""

    def __init__(self, keys: list[Tensor]) -> None:
        self.keys = keys


class Cached(nn.Module):
    def __init__(self, config: Any = None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.config = config

    def forward(self, x: Tensor) -> Any:
        keys = []
        for block in self.blocks:
            keys.append(x)
            x = x + block(x)
        if self.config is not None and not self.config.text_config.use_cache:
            return (x,)
        return x, Cache(keys)


NESTED = SimpleNamespace(text_config=SimpleNamespace(use_cache=True))


@pytest.mark.parametrize("config", [None, NESTED], ids=["no switch", "a nested config"])
@pytest.mark.parametrize("mode", ["anneal", "free"])
def test_a_model_that_returns_a_cache(mode: Any, config: Any) -> None:
    model = Cached(config)
    assert len(rf.find_residuals(model, example_inputs=(X,))) == 2
    new = rf.transform(model, residual=mode, example_inputs=(X,))
    result, cache = new(X)
    expected, keys = model(X)
    assert len(cache.keys) == len(keys.keys) == 2
    assert torch.equal(result, expected) == (mode == "anneal")
    assert not model._forward_hooks
    assert not new._forward_hooks
    assert NESTED.text_config.use_cache


@pytest.mark.slow
def test_t5_with_its_own_configuration() -> None:
    """Its encoder and decoder have configurations of their own, where use_cache is True."""
    pytest.importorskip("transformers")
    config = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2}
    model = pretrained(
        "T5", config | {"num_heads": 4, "decoder_start_token_id": 0}, "ForConditionalGeneration"
    )().eval()
    inputs = texts()
    new = rf.transform(model, residual="anneal", example_inputs=((), inputs))
    assert len(sites_of(new)) == ZOO["t5"].kinds["block"]
    got, expected = new(**inputs), model(**inputs)
    assert torch.equal(got.logits, expected.logits)
    assert got.past_key_values is not None


# ---- plain objects that a module holds ---------------------------------------------------------


class Processor:
    """As diffusers' attention processors: the object is called, and adds."""

    def __call__(self, owner: Any, x: Tensor, scale: float = 1.0) -> Tensor:
        residual = x
        x = scale * owner.branch(x)
        return x + residual


class OtherProcessor(Processor):
    def __call__(self, owner: Any, x: Tensor, scale: float = 1.0) -> Tensor:
        return owner.branch(x)


class Steps:
    """A method of an object, which calls another one of it."""

    def run(self, owner: Any, x: Tensor) -> Tensor:
        return self.add(x, owner.branch(x))

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y


class WithProcessor(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.branch, self.processor, self.steps = mlp(), Processor(), Steps()

    def forward(self, x: Tensor) -> Tensor:
        x = self.processor(self, x, scale=0.5)
        return self.steps.run(self, x)


def test_an_object_that_adds() -> None:
    model = nn.Sequential(WithProcessor(), WithProcessor())
    new = annealed(model, 4)
    for twin in (copy.deepcopy(new), pickle.loads(pickle.dumps(new))):
        assert torch.equal(twin(X), model(X))
    for site in sites_of(new):
        site.become("free")
    x = X
    for block in model:
        x = block.get_submodule("branch")(0.5 * block.get_submodule("branch")(x))
    assert torch.equal(new(X), x)


def test_an_object_of_another_class_afterwards() -> None:
    new = annealed(nn.Sequential(WithProcessor()), 2)
    new[0].processor = OtherProcessor()  # type: ignore[index, assignment]
    with pytest.raises(
        SourceError, match=r"with a Processor, .* and has a OtherProcessor now: set"
    ):
        new(X)


class Predictor(nn.Module):
    """Its method is called, not it itself, as that of Gemma 3n's AltUp."""

    def __init__(self) -> None:
        super().__init__()
        self.branch, self.inner = mlp(), Residual(*mlp())

    def predict(self, x: Tensor) -> Tensor:
        return self.inner(self.again(x))

    def again(self, x: Tensor) -> Tensor:
        y = self.branch(x)
        y += x
        return y


class Predicted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.predictor = Predictor()

    def forward(self, x: Tensor) -> Tensor:
        return self.predictor.predict(x)


def test_a_method_of_a_submodule() -> None:
    model = nn.Sequential(Predicted(), Predicted())
    new = annealed(model, 4)
    gains = ["0.predictor.inner.residual_0.gain", "0.residual_0.gain"]
    assert sorted(n for n in new.state_dict() if n.startswith("0.") and "gain" in n) == gains
    for twin in (copy.deepcopy(new), pickle.loads(pickle.dumps(new))):
        assert torch.equal(twin(X), model(X))


# ---- modules that go through their submodules --------------------------------------------------


class Residual(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)  # type: ignore[no-untyped-call]


class Listed(nn.ModuleList):
    def forward(self, x: Tensor) -> Tensor:
        y = x
        for number in range(len(self)):
            y = self[number](y)
        for layer in self:
            y = layer(y)
        return x + y


class Named(nn.ModuleDict):
    def forward(self, x: Tensor) -> Tensor:
        y = x
        for name, layer in self.items():
            y = layer(y) if name in self.keys() else y
        for layer in self.values():
            y = layer(y)
        return x + y if len(self) == len([*self]) == 3 else x


class Loop(nn.Module):
    """transformers' VitDetResBottleneckBlock is written so."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.act, self.b = mlp()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.run(x)

    def run(self, x: Tensor) -> Tensor:
        for layer in self.children():
            x = layer(x)
        for _, layer in self.named_children():
            x = layer(x)
        for part in self._modules.values():
            x = part(x) if part is not None else x
        for name, layer in self.named_modules():
            x = layer(x) if name else x
        for layer in self.modules():
            x = layer(x) if layer is not self else x
        return x


LOOPS: dict[str, Callable[[], nn.Module]] = {
    "a Sequential": lambda: Residual(*mlp()),
    "a ModuleList": lambda: Listed(mlp()),
    "a ModuleDict": lambda: Named(dict(zip("abc", mlp(), strict=True))),
    "a loop": Loop,
}


@pytest.mark.parametrize("kind", LOOPS)
def test_a_module_that_goes_through_its_submodules(kind: str) -> None:
    model = nn.Sequential(LOOPS[kind](), LOOPS[kind]())
    new = annealed(model, 2)
    assert [*new.state_dict()] == [
        name.format(number)
        for number in (0, 1)
        for name in [*(f"{{}}.{n}" for n in model[0].state_dict()), "{}.residual_0.gain"]
    ]
    assert all(module.training is False for module in new.eval().modules())
    for twin in (copy.deepcopy(new), pickle.loads(pickle.dumps(new))):
        assert torch.equal(twin(X), model(X))


def test_a_loop_when_compiled() -> None:
    model = nn.Sequential(Residual(*mlp()), Loop())
    new = annealed(model, 2)
    compiled = torch.compile(new, backend="eager", fullgraph=True)
    assert torch.equal(compiled(X), model(X))


# ---- differences -------------------------------------------------------------------------------


class Quantizers(nn.Module):
    """Residual vector quantization, as in EnCodec: each one takes what the others left."""

    def __init__(self) -> None:
        super().__init__()
        self.quantizers = nn.ModuleList(mlp() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        rest, total = x, torch.zeros_like(x)
        for quantizer in self.quantizers:
            q = quantizer(rest)
            total = total + q
            rest = rest - q
        return total + self.quantizers[0](rest)


def test_what_is_left_of_a_difference() -> None:
    model = Quantizers().eval()
    assert len(rf.find_residuals(model, example_inputs=(X,))) == 3
    annealed(model, 1)  # a line in a loop is one site


# ---- attentions without a temperature ----------------------------------------------------------


class Attention(nn.Module):
    """``how``: the queries pass a norm without parameters, get a bias of their own, or are both
    queries and keys.
    """

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.norm = how, nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.q_norm = nn.RMSNorm(4, elementwise_affine=False)
        self.bias = nn.Parameter(torch.randn(3 * WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        qkv = F.linear(y, self.qkv.weight, self.bias) if self.how == "bias" else self.qkv(y)
        q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in qkv.chunk(3, -1))
        if self.how == "norm":
            q = self.q_norm(q)
        y = F.scaled_dot_product_attention(q, q if self.how == "shared" else k, v)
        return x + self.out(y.transpose(1, 2).flatten(2))


def test_a_norm_without_parameters_has_a_temperature() -> None:
    new = rf.transform(nn.Sequential(Attention("norm")), residual="free", example_inputs=(X,))
    assert [t.name for t in residual_report(new).temperatures] == ["0.q_norm.temperature"]


@pytest.mark.parametrize("how", ["bias", "shared"])
def test_an_attention_that_cannot_have_a_temperature(how: str) -> None:
    model = nn.Sequential(Attention(how), Attention("plain"))
    new = rf.transform(model, residual="free", example_inputs=(X,))
    report = residual_report(new)
    assert len(report.sites) == 2
    assert [t.name for t in report.temperatures] == ["1.qkv.temperature"]
    (note,) = (note for note in report.notes if "temperature" in note)
    assert note.startswith("the attention of 0 has no temperature: ")
    assert "does not scale its queries and nothing else" in note
    asked = rf.ResidualFree("free", temperature=TemperatureRule())
    with pytest.raises(ResidualError, match="the attention of 0 cannot be tempered"):
        rf.transform(model, asked, example_inputs=(X,))


# ---- kinds -------------------------------------------------------------------------------------


class Layer(nn.Module):
    """A block of three branches."""

    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleList(mlp() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for branch in self.branches:
            x = x + branch(x)
        return x


class Spatial(nn.Module):
    """A transformer in a branch, as in Stable Diffusion's U-Net."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.before, self.after = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.layers = nn.Sequential(*(Layer() for _ in range(depth)))

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.layers(self.before(x))) + x


@pytest.mark.parametrize("depth", [1, 3])
def test_the_kind_of_an_add_does_not_depend_on_how_many_there_are(depth: int) -> None:
    model = nn.Sequential(*(nn.Sequential(Residual(*mlp()), Spatial(depth)) for _ in range(3)))
    found = rf.find_residuals(model, example_inputs=(X,))
    assert Counter(add.kind for add in found) == {"block": 3 + 9 * depth, "long": 3}


# ---- what is no residual add -------------------------------------------------------------------


class HyperConnections(nn.Module):
    """Parallel streams that a matrix mixes beside each branch, as in DeepSeek-V4."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(mlp() for _ in range(layers))
        self.mixing = nn.Parameter(torch.eye(3) + 0.1 * torch.randn(3, 3))
        self.spread = nn.Parameter(torch.rand(3, 1))

    def forward(self, x: Tensor) -> Tensor:
        streams = x.unsqueeze(-2).expand(-1, -1, 3, -1)
        for layer in self.layers:
            branch = layer(streams.mean(-2)).unsqueeze(-2)
            streams = self.spread * branch + torch.matmul(self.mixing, streams)
        return streams.mean(-2)


class DepthAttention(nn.Module):
    """Each layer reads the results of all layers before, weighted by an attention over them."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(mlp() for _ in range(layers))
        self.query = nn.Parameter(torch.randn(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        results = [x]
        for layer in self.layers:
            depth = torch.stack(results)
            weights = (depth @ self.query).softmax(0).unsqueeze(-1)
            results.append(layer((weights * depth).sum(0)))
        return results[-1]


class Beside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = HyperConnections(2), Residual(*mlp())

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (
            HyperConnections,
            r"it has 3 times hyper-connection \(the first at .*test_reach\.py:\d+\)",
        ),
        (DepthAttention, r"it has 2 times attention over depth \(the first at .*test_reach\.py"),
    ],
)
def test_other_connections_over_the_depth_are_named(make: Any, text: str) -> None:
    model = make(3)
    with pytest.raises(ResidualError, match=text):
        rf.transform(model, residual="free", example_inputs=(X,))
    graph = torch.export.export(model, (X,)).module()
    with pytest.raises(ResidualError, match=text):
        rf.transform(graph, residual="free")
    with pytest.raises(ResidualError, match="there is nothing to rewrite"):
        rf.transform(mlp(), residual="free", example_inputs=(X,))


def test_other_connections_beside_residual_adds() -> None:
    new = rf.transform(Beside(), residual="anneal", example_inputs=(X,))
    (note,) = residual_report(new).notes
    assert note.startswith("beside these, it has 2 times hyper-connection (the first at first ")


# ---- lambdas and properties --------------------------------------------------------------------

plus: Callable[[Any, Any], Tensor]
minus: Callable[[Any, Any], Tensor]
plus, minus = lambda x, y: x + y, lambda x, y: x - y


class ByName(nn.Module):
    """A lambda that a forward calls by name; the line has two."""

    def __init__(self) -> None:
        super().__init__()
        self.branch = mlp()

    def forward(self, x: Tensor) -> Tensor:
        return minus(plus(x, self.branch(x)), 0.5)


class AsMethod(nn.Module):
    """Its method is a lambda, and its forward another one."""

    def __init__(self) -> None:
        super().__init__()
        self.branch = mlp()

    added: Any = lambda self, x: x + self.branch(x)
    forward = lambda self, x: self.added(x)  # noqa: E731


class InProperty(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.branch, self.memory = mlp(), nn.Parameter(torch.randn(4, WIDTH))

    @property
    def keys(self) -> Tensor:
        """The docstring stays."""
        return self.memory + self.branch(self.memory)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.keys


@pytest.mark.parametrize("kind", [ByName, AsMethod, InProperty])
def test_an_add_in_a_lambda_or_a_property(kind: type[nn.Module]) -> None:
    model = nn.Sequential(kind(), kind())
    new = annealed(model, 2)
    for twin in (copy.deepcopy(new), pickle.loads(pickle.dumps(new))):
        assert torch.equal(twin(X), model(X))
    compiled = torch.compile(new, backend="eager", fullgraph=True)
    assert torch.equal(compiled(X), model(X))
    for site in sites_of(new):
        site.become("free")
    assert not rf.find_residuals(new, example_inputs=(X,))


def test_a_property_stays_one() -> None:
    new = annealed(nn.Sequential(InProperty()), 1)
    keys = type(new[0]).keys  # type: ignore[index]
    assert isinstance(keys, property)
    assert keys.__doc__ == "The docstring stays."


# ---- the other way -----------------------------------------------------------------------------


def add_input(_: nn.Module, args: tuple[Tensor], result: Tensor) -> Tensor:
    return result + args[0]


class AddInput:
    def __call__(self, _: nn.Module, args: tuple[Tensor], result: Tensor) -> Tensor:
        return result + args[0]


def hooked(hook: Callable[..., Tensor]) -> nn.Module:
    model = mlp()
    model.register_forward_hook(hook)
    return model


class InLambda(nn.Module):
    """The instance has the lambda: no class can be rewritten."""

    def __init__(self) -> None:
        super().__init__()
        self.branch = mlp()
        self.add: Callable[[Tensor, Tensor], Tensor] = lambda x, y: x + y

    def forward(self, x: Tensor) -> Tensor:
        return self.add(x, self.branch(x))


class InClassMethod(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.branch = mlp()

    @classmethod
    def add(cls, x: Tensor, y: Tensor) -> Tensor:
        return x + y

    def forward(self, x: Tensor) -> Tensor:
        return self.add(x, self.branch(x))


def generated() -> nn.Module:
    space: dict[str, Any] = {"Base": InLambda}
    exec(
        "class Made(Base):\n def forward(self, x):\n  return self.branch(x) + x\n", space
    )  # its source is in no file
    model: nn.Module = space["Made"]()
    return model


HOOK = r"reach: 0 \(aten\.add\.Tensor, perhaps by the hook at .*reach\.py:\d+\)"
ELSEWHERE: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "a hook": (lambda: hooked(add_input), HOOK),
    "an object as a hook": (lambda: hooked(AddInput()), HOOK),
    "a lambda of the instance": (InLambda, r"test_reach\.py:\d+ \(aten\.add\.Tensor\)"),
    "a class method": (InClassMethod, r"test_reach\.py:\d+ \(aten\.add\.Tensor\)"),
    "no file": (generated, "Made.* has no readable source"),
}


@pytest.mark.parametrize("where", ELSEWHERE)
def test_the_graph_is_offered_where_it_reaches_all(where: str) -> None:
    make, text = ELSEWHERE[where]
    model = nn.Sequential(make(), make()).eval()
    with pytest.raises((ResidualError, SourceError), match=text) as error:
        rf.transform(model, residual="anneal", example_inputs=(X,))
    offer = r"or rewrite the graph, where all 2 are in reach: (rf\.transform\(.*\))\.$"
    found = re.search(offer, str(error.value))
    assert found is not None
    code = found[1].replace("residual=...", 'residual="anneal"')
    new: nn.Module = eval(
        code, {"rf": rf, "torch": torch, "model": model, "args": (X,), "kwargs": {}}
    )
    assert len(sites_of(new)) == 2
    assert torch.equal(new(X), model(X))
    assert torch.equal(new(X + 1), model(X + 1))
    for site in sites_of(new):
        site.become("free")
    assert not torch.equal(new(X), model(X))


def test_sites_are_no_blocks() -> None:
    """A wire after a rewrite stands where it would stand without one."""

    class Twice(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            x = x + self[0](x)
            return x + self[1](x)

    model = Twice(mlp(), mlp())
    new = rf.transform(model, rf.ResidualFree("anneal"), rf.Wire(4), example_inputs=(X,))
    plain = rf.transform(model, rf.Wire(4))
    hooked = [[n for n, m in twin.named_modules() if m._forward_hooks] for twin in (new, plain)]
    assert hooked[0] == hooked[1] == ["", "0", "1"]
