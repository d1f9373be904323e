"""transform on models of every kind: the wire's numbers, what stays untouched; diff; the codec."""

from __future__ import annotations

import copy
import io
import threading
from collections import OrderedDict, defaultdict, namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch import Tensor, fx, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.utils.checkpoint import checkpoint

import rfcompile as rf
from rfcompile.errors import (
    BoundaryError,
    CaptureError,
    DtypeError,
    FormatError,
    NonFiniteError,
    OptionError,
    PayloadError,
    PolicyError,
    ResidualError,
    RFCompileError,
    RFCompileWarning,
)
from rfcompile.graph.text import graph_text
from rfcompile.report.diff import GraphDiff
from rfcompile.wire.fake import FakeWire
from rfcompile.wire.process_groups import simulated

EVERY_SIZE = rf.Policy.of(bits=4, min_bytes=0)
POLICY = rf.Policy(activations=4, gradients="6b:g32", min_bytes=0)
FMT = rf.QuantFormat(3, 32, rotate=16)
X = torch.randn(4, 8, 32)


# ---- models -----------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, dim: int = 32, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.up = nn.Linear(dim, 2 * dim)
        self.down = nn.Linear(2 * dim, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        h: Tensor = self.down(torch.tanh(self.up(self.norm(x))))
        return x + scale * self.dropout(h)


class Net(nn.Module):
    """Blocks in a list; ``wrap`` changes what a block returns, ``unwrap`` takes it apart again."""

    def __init__(
        self,
        wrap: Callable[[Any], Any] = lambda y: y,
        unwrap: Callable[[Any], Any] = lambda y: y,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Wrapped(wrap, dropout) for _ in range(3))
        self.head = nn.Linear(32, 5)
        self.unwrap = unwrap

    def forward(self, x: Tensor) -> Any:
        for layer in self.layers:
            x = self.unwrap(layer(x))
        return self.head(x)


class Wrapped(Block):
    def __init__(self, wrap: Callable[[Any], Any], dropout: float) -> None:
        super().__init__(dropout=dropout)
        self.wrap = wrap

    def forward(self, x: Tensor, scale: float = 1.0) -> Any:
        return self.wrap(super().forward(x, scale))


class Plain(nn.Module):
    """Matrix products, relu and additions only: compiled code computes the same bits as eager."""

    def __init__(self, num_layers: int = 2) -> None:
        super().__init__()
        self.layers = nn.ModuleList(PlainBlock() for _ in range(num_layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class PlainBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(32, 48, bias=False)
        self.down = nn.Linear(48, 32, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


class Parallel(nn.Module):
    """A block with tensor-parallel linears."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(64, 128, bias=False)
        self.down = nn.Linear(128, 64, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


def tensor_parallel() -> nn.Module:
    plan = {"*.up": ColwiseParallel(), "*.down": RowwiseParallel()}
    mesh = init_device_mesh("cpu", (4,))
    return parallelize_module(nn.Sequential(Parallel(), Parallel()), mesh, plan)


def llama() -> tuple[nn.Module, dict[str, Tensor]]:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=50,
        use_cache=False,
    )
    return transformers.LlamaForCausalLM(config), {"input_ids": torch.randint(0, 50, (2, 8))}


def gpt2() -> tuple[nn.Module, dict[str, Tensor]]:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=16,
        vocab_size=50,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
    )
    return transformers.GPT2LMHeadModel(config), {"input_ids": torch.randint(0, 50, (2, 8))}


def bert() -> tuple[nn.Module, dict[str, Tensor]]:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=16,
        vocab_size=50,
    )
    return transformers.BertForMaskedLM(config), {"input_ids": torch.randint(0, 50, (2, 8))}


def t5() -> tuple[nn.Module, dict[str, Tensor]]:
    transformers = pytest.importorskip("transformers")
    config = transformers.T5Config(
        d_model=32,
        d_ff=64,
        d_kv=8,
        num_layers=2,
        num_heads=4,
        vocab_size=50,
        decoder_start_token_id=0,
        use_cache=False,
    )
    ids = torch.randint(0, 50, (2, 8))
    inputs = {"input_ids": ids, "decoder_input_ids": ids.flip(0)}
    return transformers.T5ForConditionalGeneration(config), inputs


# ---- the wire, by hand ------------------------------------------------------------------------


class HandWire(torch.autograd.Function):
    """A round trip of the codec forward, and one of the gradient backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return sent(x, POLICY.activations)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return sent(grad, POLICY.gradients)


def sent(x: Tensor, fmt: Any) -> Tensor:
    return rf.dequantize(rf.quantize(x, fmt), fmt, x.shape, x.dtype)


def with_hand_wires(model: nn.Module, paths: list[str]) -> nn.Module:
    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return HandWire.apply(output[0]), *output[1:]  # type: ignore[no-untyped-call]
        return HandWire.apply(output)  # type: ignore[no-untyped-call]

    model = copy.deepcopy(model)
    for path in paths:
        model.get_submodule(path).register_forward_hook(hook)
    return model


def gradients(model: nn.Module) -> list[Tensor | None]:
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    return grads


def assert_same(left: Any, right: Any) -> None:
    torch.testing.assert_close(left, right, rtol=0, atol=0)


def distance(x: Tensor, exact: Tensor) -> float:
    x, exact = x.detach(), exact.detach()
    return float((x - exact).norm() / exact.norm())


def wires(model: nn.Module) -> list[str]:
    """The modules with a fake wire, once for each wire."""
    return [
        path
        for path, module in model.named_modules()
        for hook in module._forward_hooks.values()
        if isinstance(hook, FakeWire)
    ]


def wire_nodes(gm: fx.GraphModule) -> list[tuple[Any, ...]]:
    """The formats of each fake wire in a graph."""
    target = torch.ops.rfcompile.fake_wire.default
    return [node.args[1:] for node in gm.graph.find_nodes(op="call_function", target=target)]


def test_assert_same_can_fail() -> None:
    with pytest.raises(AssertionError, match="not equal"):
        assert_same([X], [X + 1e-6])


# ---- numbers ----------------------------------------------------------------------------------


def test_values_and_gradients_are_those_of_the_wire_by_hand() -> None:
    model = Net()
    wired = rf.transform(model, rf.Wire(POLICY))

    y = wired(X)
    y.square().sum().backward()
    got = gradients(model)  # the parameters are shared
    x: Any = X
    for layer in model.layers:
        x = HandWire.apply(layer(x))  # type: ignore[no-untyped-call]
    expected = model.head(x)
    expected.square().sum().backward()

    assert_same(y, expected)
    assert_same(got, gradients(model))
    assert 0.01 < distance(y, model(X)) < 0.5


def test_the_gradient_passes_straight_through_an_exact_backward() -> None:
    x = torch.randn(3, 200, requires_grad=True)
    model = nn.Sequential(nn.Identity())
    wired = rf.transform(model, rf.Wire(rf.Policy(activations=2, min_bytes=0), modules=["0"]))
    weight = torch.randn(3, 200)

    (wired(x) * weight).sum().backward()

    assert_same(x.grad, weight)


def test_only_the_directions_of_the_policy_are_rounded() -> None:
    model = Net()
    wired = rf.transform(model, rf.Wire(rf.Policy(gradients=4, min_bytes=0)))
    assert_same(wired(X), model(X))
    wired(X).sum().backward()
    rounded = gradients(model)
    model(X).sum().backward()
    assert any(not torch.equal(a, b) for a, b in zip(rounded, gradients(model), strict=True))


@pytest.mark.parametrize("zoo", [llama, gpt2, bert, t5])
def test_transformers_models(zoo: Callable[[], tuple[nn.Module, dict[str, Tensor]]]) -> None:
    model, inputs = zoo()
    model.train()
    wired = rf.transform(model, rf.Wire(POLICY))
    by_hand = with_hand_wires(model, wires(wired))
    exact = model(**inputs).logits

    results = []
    for each in (wired, by_hand):
        torch.manual_seed(1)  # dropout
        logits = each(**inputs).logits
        logits.square().sum().backward()
        results.append((logits, gradients(each)))

    assert_same(results[0], results[1])
    assert 0.01 < distance(results[0][0], exact) < 2
    assert list(wired.state_dict()) == list(model.state_dict())

    # The same on the graph.
    exported = torch.export.export(model.eval(), (), inputs, strict=False).module()
    assert_same(rf.transform(exported, rf.Wire(POLICY))(**inputs), wired.eval()(**inputs))


@pytest.mark.slow
def test_compiled_values_and_gradients_are_the_eager_ones() -> None:
    check_compiled((4, 7), backend="inductor", dynamic=True)


@pytest.mark.usefixtures("rfquant_without_inductor")
def test_values_and_gradients_in_graphs_of_rfquant_are_the_eager_ones() -> None:
    check_compiled((4,), backend="rfquant", options={"bits": 4})


def check_compiled(batches: tuple[int, ...], **how: Any) -> None:
    model = Plain(1)
    policy = rf.Policy(activations=8, gradients="8b:g32", min_bytes=0)  # the least to compile
    wired = rf.transform(model, rf.Wire(policy, modules=["layers.0"]))
    compiled = torch.compile(wired, fullgraph=True, **how)
    for batch in batches:
        x = torch.randn(batch, 32)
        results = []
        for each in (compiled, wired):
            y = each(x)
            y.square().sum().backward()
            results.append((y, gradients(model)))
        assert_same(results[0], results[1])


@pytest.mark.slow
def test_a_compiled_transformers_model_is_the_eager_one() -> None:
    model, inputs = llama()
    wired = rf.transform(model, rf.Wire(POLICY))
    compiled = torch.compile(wired, fullgraph=True, backend="aot_eager")
    assert_same(compiled(**inputs).logits, wired(**inputs).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_models_keep_their_dtype(dtype: torch.dtype) -> None:
    model = Net().to(dtype)
    wired = rf.transform(model, bits=8)
    y = wired(X.to(dtype))
    y.float().sum().backward()
    assert y.dtype == dtype
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    # 8 bits round to 1 / 254 of a group's peak, three times
    assert distance(y.float(), model(X.to(dtype)).float()) < 3 * 0.02


def test_autocast() -> None:
    model = Net()
    wired = rf.transform(model, rf.Wire(POLICY))
    with torch.autocast("cpu", torch.bfloat16):
        y, by_hand = wired(X), with_hand_wires(model, wires(wired))(X)
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16
    assert_same(y, by_hand)
    assert all(p.grad is not None for p in model.parameters())


def test_train_and_eval_mode() -> None:
    model = Net(dropout=0.5)
    wired = rf.transform(model, bits=4)
    assert wired.training
    assert not torch.equal(wired(X), wired(X))
    wired.eval()
    assert_same(wired(X), wired(X))
    assert model.training, "the modules are not shared"
    assert not rf.transform(model.eval(), bits=4).training


def test_without_gradients() -> None:
    wired = rf.transform(Net(), bits=4)
    expected = wired(X).detach()
    with torch.no_grad():
        assert_same(wired(X), expected)
    with torch.inference_mode():
        y = wired(X)
    assert_same(y.clone(), expected)


def test_an_empty_batch() -> None:
    wired = rf.transform(Net(), bits=4)
    y = wired(X[:0])
    y.sum().backward()
    assert y.shape == (0, 8, 5)


def test_second_derivatives_pass_straight_through() -> None:
    wired = rf.transform(Plain(), bits=8)
    x = torch.randn(4, 32, requires_grad=True)
    (grad,) = torch.autograd.grad(wired(x).square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(grad.sum(), x)
    assert second.isfinite().all()
    assert second.norm() > 0


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(use_reentrant: bool) -> None:
    class Checkpointed(Net):
        def forward(self, x: Tensor) -> Any:
            for layer in self.layers:
                x = checkpoint(layer, x, use_reentrant=use_reentrant)
            return self.head(x)

    model = Checkpointed()
    wired = rf.transform(model, rf.Wire(POLICY))
    x = X.clone().requires_grad_()
    wired(x).square().sum().backward()
    got = gradients(model)
    Net.forward(wired, x).square().sum().backward()  # type: ignore[arg-type]
    assert_same(got, gradients(model))


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated")
def test_gradient_checkpointing_of_transformers() -> None:
    model, inputs = llama()
    wired = rf.transform(model, rf.Wire(POLICY))
    wired(**inputs).logits.sum().backward()
    expected = gradients(model)
    model.gradient_checkpointing_enable()  # type: ignore[operator]
    rf.transform(model.train(), rf.Wire(POLICY))(**inputs).logits.sum().backward()
    assert_same(gradients(model), expected)


# ---- what stays as it is ----------------------------------------------------------------------


def test_the_original_is_untouched_and_its_tensors_are_shared() -> None:
    model = Net()
    model.register_buffer("table", torch.randn(3))
    before = model(X)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    wired = rf.transform(model, bits=4)
    wired(X).sum().backward()

    assert_same(model(X), before)
    assert_same(dict(model.state_dict()), state)
    assert wires(model) == []
    assert wires(wired) == ["layers.0", "layers.1", "layers.2"]
    assert list(wired.state_dict()) == list(state)
    pairs = zip(wired.parameters(), model.parameters(), strict=True)
    assert all(mine is theirs for mine, theirs in pairs)
    assert wired.table is model.table
    assert type(wired) is Net


def test_copies_and_files() -> None:
    model = rf.transform(zoo_like(), bits=4)
    expected = model(X)

    twin = copy.deepcopy(model)
    assert_same(twin(X), expected)
    assert all(
        a is not b and torch.equal(a, b)
        for a, b in zip(twin.parameters(), model.parameters(), strict=True)
    )
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert_same(torch.load(file, weights_only=False)(X), expected)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    fresh = rf.transform(zoo_like(), bits=4)
    assert not torch.equal(fresh(X), expected)
    fresh.load_state_dict(torch.load(file))
    assert_same(fresh(X), expected)


def zoo_like() -> nn.Module:
    """Picklable: no functions of a test."""
    return nn.Sequential(Block(), Block())


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict: bool) -> None:
    wired = rf.transform(zoo_like(), rf.Wire(POLICY))
    program = torch.export.export(wired, (X,), strict=strict)
    assert wire_nodes(program.graph_module) == [("4b:g128:rise", "6b:g32:tread")] * 2
    assert_same(program.module()(X), wired(X))


def test_a_second_transform_replaces_the_first() -> None:
    model = Net()
    once = rf.transform(model, bits=8)
    twice = rf.transform(rf.transform(model, rf.Wire(2, modules=["head", "layers.*.up"])), bits=8)
    assert wires(twice) == wires(once)
    assert_same(twice(X), once(X))


def test_hooks_of_the_user_run_before_the_wire() -> None:
    model = Net()
    seen: list[Tensor] = []
    model.layers[0].register_forward_hook(lambda module, args, output: seen.append(output))
    model.layers[1].register_forward_hook(lambda module, args, output: output * 0)

    wired = rf.transform(model, bits=2)
    y = wired(X)

    assert_same(seen[0], model.layers[0](X))
    assert_same(y, model.head(sent(model.layers[2](torch.zeros_like(X)), 2)))


# ---- models of every kind ---------------------------------------------------------------------

Pair = namedtuple("Pair", ["number", "values"])
OUTPUTS: dict[str, tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]] = {
    "tuple": (lambda y: (y, y.mean()), lambda o: o[0] + 0 * o[1]),
    "list after None and int": (lambda y: [None, torch.ones(2).long(), y], lambda o: o[2]),
    "named tuple": (lambda y: Pair(3, y), lambda o: o.values),
    "torch's own": (lambda y: torch.max(y[None], 0), lambda o: o.values),
    "dict": (lambda y: {"n": 3, "h": y}, lambda o: o["h"]),
    "dict with numbers": (lambda y: {0: y}, lambda o: o[0]),
    "ordered dict": (lambda y: OrderedDict(n=3, h=y), lambda o: o.popitem()[1]),
    "default dict": (lambda y: defaultdict(list, h=y), lambda o: (o["new"], o["h"])[1]),
    "not contiguous": (lambda y: y.transpose(1, 2), lambda o: o.transpose(1, 2)),
    "expanded": (lambda y: y.mean(-1, True).expand_as(y), lambda o: o),
}


@pytest.mark.parametrize("kind", OUTPUTS)
def test_what_blocks_return(kind: str) -> None:
    wrap, unwrap = OUTPUTS[kind]
    model = Net(wrap, unwrap)
    wired = rf.transform(model, rf.Wire(POLICY))

    y = wired(X)
    y.sum().backward()

    x: Any = X
    for layer in model.layers:
        output = layer(x)
        value = unwrap(output)
        is_view = kind == "not contiguous"
        x = sent(output, 4).transpose(1, 2) if is_view else sent(value, 4)
    assert_same(y, model.head(x))
    assert type(wired.get_submodule("layers.0")(X)) is type(model.layers[0](X))


def test_a_model_output() -> None:
    transformers = pytest.importorskip("transformers")
    kind = transformers.modeling_outputs.BaseModelOutputWithPast
    model = Net(lambda y: kind(last_hidden_state=y), lambda o: o.last_hidden_state)
    wired = rf.transform(model, bits=4)
    assert not torch.equal(wired(X), model(X))
    output = wired.get_submodule("layers.0")(X)
    assert type(output) is kind
    assert output.last_hidden_state is output["last_hidden_state"] is output[0]


@pytest.mark.parametrize("kind", ["None", "int", "nested"])
def test_a_block_that_sends_nothing_says_so(kind: str) -> None:
    wrap: Callable[[Tensor], Any] = {
        "None": lambda y: None,
        "int": lambda y: y.long(),
        "nested": lambda y: ((y, 1), 2),
    }[kind]
    model = Net(wrap, lambda o: X)
    with pytest.warns(RFCompileWarning, match="nothing travels at 'layers") as warned:
        y = rf.transform(model, bits=4)(X)
    assert [str(w.message).split("'")[1] for w in warned] == ["layers.0", "layers.1", "layers.2"]
    assert_same(y, model(X))


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64])
def test_dtypes_that_cannot_travel_are_errors_unless_the_policy_leaves_them(
    dtype: torch.dtype,
) -> None:
    model = Net(lambda y: y.to(dtype), lambda o: o.real.float())
    for each in (model, torch.export.export(model, (X,)).module()):
        with pytest.raises(DtypeError, match=r"the output of module 'layers\.0'") as caught:
            rf.transform(each, bits=4)(X)
        assert caught.value.dtype == dtype
        allowed = rf.Policy.of(bits=4, min_bytes=0, sites={"layers.*": None})
        assert_same(rf.transform(each, rf.Wire(allowed))(X), model(X))


def test_a_compiled_dtype_error_keeps_its_type() -> None:
    compiled = torch.compile(rf.transform(Net().double(), bits=4), backend="aot_eager")
    with pytest.raises(DtypeError, match="a fake wire has dtype"):
        compiled(X.double())


def test_keyword_arguments() -> None:
    class ByKeyword(Net):
        def forward(self, *, inputs: Tensor) -> Any:  # type: ignore[override]
            for layer in self.layers:
                inputs = layer(x=inputs, scale=0.5)
            return self.head(inputs)

    model = ByKeyword()
    wired = rf.transform(model, rf.Wire(POLICY))
    assert_same(wired(inputs=X), with_hand_wires(model, wires(wired))(inputs=X))


def test_blocks_that_are_called_twice() -> None:
    class Twice(Net):
        def forward(self, x: Tensor) -> Any:
            for layer in self.layers:
                x = layer(layer(x))
            return self.head(x)

    model = Twice()
    wired = rf.transform(model, rf.Wire(POLICY))
    expected = with_hand_wires(model, wires(wired))(X)
    assert_same(wired(X), expected)
    for graph in (torch.export.export(model, (X,)).module(), fx.symbolic_trace(model)):
        rewritten = rf.transform(graph, rf.Wire(POLICY), example_inputs=(X,))
        assert len(wire_nodes(rewritten)) == 6  # type: ignore[arg-type]
        assert_same(rewritten(X), expected)


def test_one_block_many_times_in_a_list_and_weights_that_are_tied() -> None:
    model = Net()
    model.layers = nn.ModuleList([model.layers[0]] * 3)
    wired = rf.transform(model, rf.Wire(POLICY))
    assert wires(wired) == ["layers.0"]
    assert_same(wired(X), with_hand_wires(model, ["layers.0"])(X))

    tied = Plain()
    tied.layers[1].up.weight = tied.layers[0].up.weight  # type: ignore[union-attr]
    wired = rf.transform(tied, bits=4)
    layers = [wired.get_submodule(f"layers.{i}.up") for i in range(2)]
    assert layers[0].weight is layers[1].weight is tied.layers[0].up.weight  # type: ignore[union-attr]


def test_encoder_and_decoder_in_nested_containers() -> None:
    model = nn.Transformer(32, 4, 2, 2, 64, dropout=0.0, batch_first=True)
    wired = rf.transform(model, rf.Wire(POLICY))
    paths = [f"{side}coder.layers.{i}" for side in ("en", "de") for i in range(2)]
    assert wires(wired) == paths
    assert_same(wired(X, X[:, :3]), with_hand_wires(model, paths)(X, X[:, :3]))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_padded_encoder_in_inference_has_nested_tensors() -> None:
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 2)
    encoder.eval()
    padding = torch.tensor([[False] * 8, [False] * 5 + [True] * 3] * 2)
    wired = rf.transform(encoder, bits=8)
    with torch.no_grad():
        y, exact = (each(X, src_key_padding_mask=padding) for each in (wired, encoder))
    assert wires(wired) == ["layers.0", "layers.1"]
    assert 0 < distance(y, exact) < 0.05


def test_models_that_hold_what_cannot_be_copied() -> None:
    model = Net()
    model.cache = model(X)  # type: ignore[assignment]  # it has a history
    assert rf.transform(model, bits=4)(X).shape == (4, 8, 5)
    model.lock = threading.Lock()  # type: ignore[assignment]
    with pytest.raises(CaptureError, match="Net cannot be copied: cannot pickle"):
        rf.transform(model, bits=4)


def test_parametrized_weights_are_shared() -> None:
    model = Net()
    for layer in model.layers:
        nn.utils.parametrizations.weight_norm(layer.get_submodule("up"))
    wired = rf.transform(model, rf.Wire(POLICY))
    assert_same(wired(X), with_hand_wires(model, wires(wired))(X))
    assert [id(p) for p in wired.parameters()] == [id(p) for p in model.parameters()]


def test_a_compiled_model_stays_compiled() -> None:
    calls = []

    def backend(gm: fx.GraphModule, inputs: Any) -> fx.GraphModule:
        calls.append(gm)
        return gm

    model = Net()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    wired = rf.transform(compiled, rf.Wire(POLICY))
    assert list(wired.state_dict()) == list(compiled.state_dict())
    assert_same(wired(X), with_hand_wires(model, ["layers.0", "layers.1", "layers.2"])(X))
    assert len(calls) == 1

    model.layers[0].compile(backend=backend)
    assert_same(rf.transform(model, rf.Wire(POLICY))(X), wired(X))


def test_sites_and_min_bytes() -> None:
    policy = rf.Policy.of(bits=4, min_bytes=10**6, sites={"layers.1": 8, "layers.2": None})
    model = Net()
    wired = rf.transform(model, rf.Wire(policy))
    first = model.layers[0](X)
    assert_same(wired(X), model.head(model.layers[2](sent(model.layers[1](first), 8))))


def test_nonfinite_values_travel_or_raise() -> None:
    broken = X.clone()
    broken[0, 0, 0] = torch.inf
    assert rf.transform(Net(), bits=4)(broken)[0].isnan().any()
    wired = rf.transform(Net(), rf.Wire(rf.Policy.of(bits=4, nonfinite="raise", min_bytes=0)))
    assert wired(X).isfinite().all()
    with pytest.raises(NonFiniteError, match=r"fake wire at 'layers\.0'") as caught:
        wired(broken)
    assert caught.value.site == "the fake wire at 'layers.0'"
    with pytest.raises(NonFiniteError, match=r"fake wire at 'layers\.2', backward\."):
        (wired(X) * torch.inf).sum().backward()


# ---- graphs -----------------------------------------------------------------------------------


def test_a_graph_of_dynamo_can_be_rewritten() -> None:
    rewritten = []

    def backend(gm: fx.GraphModule, inputs: Any) -> Any:
        rewritten.append(rf.transform(gm, rf.Wire(POLICY)))
        return rewritten[0]

    model = nn.Sequential(Block(), Block())
    y = torch.compile(lambda x: model(x), backend=backend, fullgraph=True)(X)
    assert_same(y, rf.transform(model, rf.Wire(POLICY))(X))
    assert len(wire_nodes(rewritten[0])) == 2  # type: ignore[arg-type]


@pytest.mark.parametrize("trace", ["export", "strict export", "symbolic trace"])
def test_the_rewritten_graph_is_the_hooked_module(trace: str) -> None:
    model = nn.Sequential(nn.Linear(32, 32), Block(), Block(), nn.Linear(32, 32))
    if trace == "symbolic trace":
        graph = fx.symbolic_trace(model)
    else:
        graph = torch.export.export(model, (X,), strict=trace == "strict export").module()
    text = graph_text(graph)

    rewritten = rf.transform(graph, rf.Wire(POLICY), example_inputs=(X,))
    results = []
    for each in (rewritten, rf.transform(model, rf.Wire(POLICY))):
        y = each(X)
        y.square().sum().backward()
        results.append((y, gradients(each)))

    assert_same(results[0], results[1])
    assert graph_text(graph) == text
    assert isinstance(rewritten, fx.GraphModule)
    assert len(wire_nodes(rewritten)) == 2
    again = rf.transform(rewritten, bits=2)
    assert wire_nodes(again) == [("2b:g128:rise", "2b:g128:tread")] * 2  # type: ignore[arg-type]


def test_a_graph_takes_the_paths_of_modules() -> None:
    model = Net()
    graph = torch.export.export(model, (X,)).module()
    for paths in (["layers.1"], ["layers.*"], ["layers.0", "layers.0.up", "head"]):
        wired = rf.transform(model, rf.Wire(POLICY, modules=paths))
        assert_same(rf.transform(graph, rf.Wire(POLICY, modules=paths))(X), wired(X))
    with pytest.raises(BoundaryError, match="no module that is called matches 'nope'"):
        rf.transform(graph, rf.Wire(4, modules=["layers.0", "nope"]))
    for unknown in ("branches", lambda path, module: True):
        with pytest.raises(OptionError, match="a graph has no modules to ask"):
            rf.transform(graph, rf.Wire(4, modules=unknown))


def test_example_inputs_of_a_traced_graph() -> None:
    class Scaled(Net):
        def forward(self, x: Tensor, scale: float = 2.0, shift: Any = None) -> Any:
            shifted = x * scale if shift is None else x * scale + shift
            return super().forward(shifted)

    graph = fx.symbolic_trace(Scaled(), concrete_args={"shift": None})
    for given in ((X,), {"x": X}, ((X,), {"scale": 3.0}), X):
        rewritten = rf.transform(graph, bits=4, example_inputs=given)
        assert len(wire_nodes(rewritten)) == 3  # type: ignore[arg-type]
    with pytest.raises(CaptureError, match="the graph has no shapes in its metadata"):
        rf.transform(graph, bits=4)
    with pytest.raises(CaptureError, match=r"does not run on example_inputs(.|\n)*are x, scale"):
        rf.transform(graph, bits=4, example_inputs=(X[:, :, :3],))


def test_a_graph_with_collectives_gets_them_quantized() -> None:
    class Reduced(Net):
        def forward(self, x: Tensor) -> Any:
            return funcol.all_reduce(super().forward(x), "sum", dist.group.WORLD)

    with simulated(4):
        exported = torch.export.export(Reduced(), (X,), strict=False).module()
        assert isinstance(exported, fx.GraphModule)
        text = graph_text(rf.transform(exported, rf.Wire(EVERY_SIZE)))  # type: ignore[arg-type]
        assert "_c10d_functional.all_reduce" in graph_text(exported)
        for node in exported.graph.nodes:
            node.meta.pop("val", None)
        with pytest.raises(CaptureError, match="the graph has no shapes"):
            rf.transform(exported, rf.Wire(EVERY_SIZE))
    assert "_c10d_functional.all_reduce" not in text
    assert "rfcompile.requantize" in text
    assert "fake_wire" not in text


# ---- models with collectives ------------------------------------------------------------------


@pytest.mark.usefixtures("rfquant_without_inductor")
def test_a_tensor_parallel_model_is_compiled_with_quantized_collectives() -> None:
    x = torch.randn(16, 64)
    with simulated(4):
        model = tensor_parallel()
        rf.reports(clear=True)
        with pytest.warns(RFCompileWarning, match=r"modules=\('0',\) has no effect"):
            wired = rf.transform(model, rf.Wire(EVERY_SIZE, modules=["0"]))
        wired(x).sum().backward()
        (report,) = rf.reports(clear=True)  # one graph, though Sequential is torch's own
        assert report.num_quantized == report.num_sites == 3
        assert list(wired.state_dict()) == list(model.state_dict())
        assert all(p.grad is not None for p in model.parameters())

        torch._dynamo.reset()
        compiled = torch.compile(model)
        wired = rf.transform(compiled, rf.Wire(EVERY_SIZE))
        assert list(wired.state_dict()) == list(compiled.state_dict())
        wired(x).sum().backward()
        (report,) = rf.reports(clear=True)
        assert report.num_quantized == 3


# ---- errors -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "field", "pattern"),
    [
        ({}, PolicyError, ("option", "bits"), "give bits .* or a policy"),
        ({"bits": 7}, FormatError, ("field", "bits"), "bits=7 is not supported: choose one of"),
        ({"bits": True}, FormatError, ("value", True), "bits=True is not supported"),
        ({"bits": 4.0}, FormatError, ("value", 4.0), "format=4.0 is not supported"),
    ],
)
def test_options_that_are_errors(
    options: dict[str, Any],
    error: type[RFCompileError],
    field: tuple[str, object] | None,
    pattern: str,
) -> None:
    with pytest.raises(error, match=pattern) as caught:
        rf.transform(Net(), **options)
    if field:
        assert getattr(caught.value, field[0]) == field[1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ([4], r"changes=4 is not supported: a change is rf\.Wire\(4\)"),
        ([rf.Wire], "a change is rf.Wire"),
        ([rf.Wire(4), rf.Wire(4)], "a Wire is given twice: give one"),
        ([rf.ResidualFree(), rf.ResidualFree("mix")], "a ResidualFree is given twice: give one"),
        ([rf.Wire(4), rf.Adapters(2)], "give it as the last change"),
    ],
)
def test_changes_that_are_errors(changes: list[Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        rf.transform(Net(), *changes)


def test_a_word_that_no_module_has_is_an_error() -> None:
    with pytest.raises(BoundaryError, match="no module that is called matches 'all'"):
        rf.transform(Net(), rf.Wire(4, modules="all"))


def test_a_model_without_residual_adds_cannot_lose_them() -> None:
    with pytest.raises(ResidualError, match=r"Linear has no residual add of kind block"):
        rf.transform(nn.Linear(32, 32), bits=4, residual="free", example_inputs=(X,))
    with pytest.raises(CaptureError, match="Net has no example inputs"):
        rf.transform(Net(), residual="free")


def test_only_modules_are_transformed() -> None:
    program = torch.export.export(zoo_like(), (X,))
    for thing in (program, torch.relu, None):
        with pytest.raises(OptionError, match=r"give a torch\.nn\.Module or fx\.GraphModule"):
            rf.transform(thing, bits=4)  # type: ignore[arg-type]


# ---- the codec as functions -------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (5, 7), (2, 3, 100)])
@pytest.mark.parametrize(
    ("fmt", "format"),
    [(4, rf.QuantFormat(4)), ("8b:tensor", rf.QuantFormat(8, None)), (FMT, FMT)],
)
def test_quantize_and_dequantize(shape: tuple[int, ...], fmt: Any, format: rf.QuantFormat) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = torch.randn(shape).to(dtype)
        payload = rf.quantize(x, fmt)
        assert payload.dtype == torch.uint8
        assert payload.shape == (format.payload_bytes(x.numel()),)
        y = rf.dequantize(payload, fmt, shape, dtype)
        assert (y.shape, y.dtype) == (x.shape, dtype)


def test_errors_of_the_codec() -> None:
    with pytest.raises(DtypeError, match=r"dtype torch\.int64; the codec takes"):
        rf.quantize(torch.arange(5), 4)
    with pytest.raises(PayloadError, match="needs 66 bytes for 1 x 10 elements") as caught:
        rf.dequantize(torch.zeros(5, dtype=torch.uint8), 4, (10,))
    assert caught.value.got == "5 elements of torch.uint8"
    with pytest.raises(PayloadError, match="float32"):
        rf.dequantize(torch.zeros(66), 4, (10,))
    with pytest.raises(DtypeError, match="the output of dequantize"):
        rf.dequantize(rf.quantize(X, 4), 4, X.shape, torch.int32)
    with pytest.raises(OptionError, match="no payload of an exact tensor"):
        rf.quantize(X, None)  # type: ignore[arg-type]
    with pytest.raises(NonFiniteError, match="in the input of quantize"):
        rf.quantize(torch.tensor([torch.nan]), "4b:raise")


# ---- diff -------------------------------------------------------------------------------------


def test_diff_of_modules_shows_the_wires() -> None:
    model = zoo_like()
    result = rf.diff(model, rf.transform(model, bits=4), example_inputs=(X,))
    assert isinstance(result, GraphDiff)
    assert result.changed
    assert result.added == {"rfcompile.fake_wire.default": 2}
    assert result.removed == {}
    assert "+fake_wire: f32[4, 8, 32] = rfcompile.fake_wire.default(add, '4b:g128:rise'" in str(
        result
    )
    graph = torch.export.export(model, (X,), strict=False)
    assert not rf.diff(model, graph, example_inputs=(X,)).changed
    assert not rf.diff(graph, graph_text(graph.graph_module)).changed


def test_diff_takes_dummy_inputs_and_leaves_the_random_state() -> None:
    model, _ = llama()
    state = torch.get_rng_state()
    result = rf.diff(model, rf.transform(model, bits=4))
    assert result.added == {"rfcompile.fake_wire.default": 2}
    assert_same(torch.get_rng_state(), state)


def test_diff_of_a_report() -> None:
    graph = torch.export.export(zoo_like(), (X,)).module()
    report = rf.explain(graph, bits=4)
    assert rf.diff(report).added == {"rfcompile.fake_wire.default": 2}
    without_graphs = rf.explain(zoo_like(), bits=4, example_inputs=(X,))
    for wrong in ((report, graph), (without_graphs, None)):
        with pytest.raises(CaptureError, match="a report is compared with itself"):
            rf.diff(*wrong)


def test_errors_of_diff(tmp_path: Path) -> None:
    with pytest.raises(CaptureError, match="diff needs two graphs"):
        rf.diff(Net())
    with pytest.raises(CaptureError, match="Net has no example inputs"):
        rf.diff(Net(), Net())
    with pytest.raises(CaptureError, match="Path, which holds no graph"):
        rf.diff(tmp_path, "x: f32[8]")  # type: ignore[arg-type]

    class Branching(Net):
        def forward(self, x: Tensor) -> Any:
            return x if x.sum() > 0 else -x

    with pytest.raises(CaptureError, match="Branching cannot be captured by") as e:
        rf.diff(Branching(), Branching(), example_inputs=(X,))
    assert e.value.__cause__ is not None
