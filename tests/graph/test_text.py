"""The text of a graph, and the place and module of a node, on every kind of graph we meet."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import (  # type: ignore[attr-defined]
    make_boxed_func,
)
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import rfcompile.codec.operators
import rfcompile.graph.text
from rfcompile.codec.formats import dtype_text
from rfcompile.graph.places import module_of, source_of
from rfcompile.graph.text import graph_text, read_statement, read_statements, target_text

aten = torch.ops.aten


def expect(gm: fx.GraphModule, text: str) -> None:
    assert graph_text(gm) == dedent(text).strip("\n")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.up(x))  # line: up
        return self.down(x)  # type: ignore[no-any-return]  # line: down


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(), Block()])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)  # line: skip
        return x.relu().sum()


def line_of(marker: str) -> str:
    lines = Path(__file__).read_text().splitlines()
    (number,) = [i for i, line in enumerate(lines, 1) if line.endswith(f"# line: {marker}")]
    return f"tests/graph/test_text.py:{number}"


def trace(function: Callable[..., object], *args: object) -> fx.GraphModule:
    return make_fx(function, tracing_mode="fake")(*args)


def compiled(module: Any, *args: Tensor, dynamic: bool = False) -> dict[str, fx.GraphModule]:
    """The Dynamo graph and the AOT forward and backward graphs of a module or function."""
    graphs: dict[str, fx.GraphModule] = {}

    def keep(name: str) -> Callable[..., Any]:
        def compiler(gm: fx.GraphModule, example_inputs: object) -> Any:
            graphs[name] = gm
            return make_boxed_func(gm.forward)

        return compiler

    def backend(gm: fx.GraphModule, example_inputs: list[Tensor]) -> Any:
        graphs["dynamo"] = gm
        aot: Any = aot_autograd
        compile_both = aot(fw_compiler=keep("forward"), bw_compiler=keep("backward"))
        return compile_both(gm, example_inputs)

    torch._dynamo.reset()
    run: Any = torch.compile(module, backend=backend, fullgraph=True, dynamic=dynamic)
    run(*args).backward()
    return graphs


@pytest.fixture(scope="module")
def net_graphs() -> dict[str, fx.GraphModule]:
    graphs = compiled(Net(), torch.randn(3, 4), dynamic=True)
    graphs["export"] = torch.export.export(Net(), (torch.randn(3, 4),)).graph_module
    return graphs


# ---- the text ------------------------------------------------------------------------------


def test_text_of_an_aten_graph() -> None:
    def f(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        halves = torch.split(torch.add(x + y, y, alpha=2), 2)
        return halves[0].to(torch.bfloat16), x[1:]

    expect(
        trace(f, torch.randn(4, 8), torch.randn(8)),
        """
        x_1: f32[4, 8]
        y_1: f32[8]
        add: f32[4, 8] = aten.add.Tensor(x_1, y_1)
        add_1: f32[4, 8] = aten.add.Tensor(add, y_1, alpha=2)
        split: [f32[2, 8], f32[2, 8]] = aten.split.Tensor(add_1, 2)
        getitem: f32[2, 8] = operator.getitem(split, 0)
        getitem_1: f32[2, 8] = operator.getitem(split, 1)
        _to_copy: bf16[2, 8] = aten._to_copy.default(getitem, dtype=torch.bfloat16)
        slice_1: f32[3, 8] = aten.slice.Tensor(x_1, 0, 1, 9223372036854775807)
        return (_to_copy, slice_1)
        """.replace("slice_1", "slice"),
    )


def test_text_of_our_own_operators() -> None:
    def f(x: Tensor) -> Tensor:
        return torch.ops.rfcompile.quantize(x, "4b:g16:rise")  # type: ignore[no-any-return]

    expect(
        trace(f, torch.randn(2, 16)),
        """
        x_1: f32[2, 16]
        quantize: u8[2, 10] = rfcompile.quantize.default(x_1, '4b:g16:rise')
        return quantize
        """,
    )


def test_text_of_modules_methods_attributes_and_python_operators() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin, self.w = nn.Linear(3, 3), nn.Parameter(torch.ones(3))

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            y = self.lin(x).view(-1, x.shape)[:, 1:]
            return {"a": y @ torch.add(self.w, 1.5, out=None)}

    expect(
        fx.symbolic_trace(Odd()),
        """
        x
        lin = self.lin(x)
        getattr = getattr(x, 'shape')
        view = Tensor.view(lin, -1, getattr)
        getitem = operator.getitem(view, (slice(None, None, None), slice(1, None, None)))
        w = self.w
        add = torch.add(w, 1.5, out=None)
        matmul = operator.matmul(getitem, add)
        return {'a': matmul}
        """,
    )


def test_text_of_nested_graphs_follows_the_main_graph() -> None:
    class Branch(nn.Module):
        def forward(self, p: Tensor, x: Tensor) -> Any:
            def inner(y: Tensor) -> Any:
                return torch.cond(y.sum() > 0, torch.sin, torch.cos, (y,))

            return torch.cond(p, inner, lambda y: y + 1, (x,))

    expect(
        torch.export.export(Branch(), (torch.tensor(True), torch.ones(3))).graph_module,
        """
        p: b8[]
        x: f32[3]
        true_graph_0 = self.true_graph_0
        false_graph_0 = self.false_graph_0
        cond: (f32[3],) = higher_order.cond(p, true_graph_0, false_graph_0, (x,))
        getitem: f32[3] = operator.getitem(cond, 0)
        return (getitem,)
        self.true_graph_0:
            x_1: f32[3]
            sum: f32[] = aten.sum.default(x_1)
            gt: b8[] = aten.gt.Scalar(sum, 0)
            true_graph_0_1 = self.true_graph_0
            false_graph_0_1 = self.false_graph_0
            cond_1: (f32[3],) = higher_order.cond(gt, true_graph_0_1, false_graph_0_1, (x_1,))
            getitem_1: f32[3] = operator.getitem(cond_1, 0)
            return (getitem_1,)
            self.true_graph_0.true_graph_0:
                x_2: f32[3]
                sin: f32[3] = aten.sin.default(x_2)
                return (sin,)
            self.true_graph_0.false_graph_0:
                x_3: f32[3]
                cos: f32[3] = aten.cos.default(x_3)
                return (cos,)
        self.false_graph_0:
            x_4: f32[3]
            add: f32[3] = aten.add.Tensor(x_4, 1)
            return (add,)
        """,
    )


def test_text_of_dynamo_and_aot_graphs_with_a_dynamic_batch() -> None:
    x = torch.randn(3, 4).requires_grad_()
    graphs = compiled(lambda x: (x @ x.t()).sin().sum(), x, dynamic=True)
    expect(
        graphs["dynamo"],
        """
        s0: Sym(s0)
        s1: Sym(s1)
        L_x_: f32[s0, s1]
        t: f32[s1, s0] = Tensor.t(L_x_)
        matmul: f32[s0, s0] = operator.matmul(L_x_, t)
        sin: f32[s0, s0] = Tensor.sin(matmul)
        sum: f32[] = Tensor.sum(sin)
        return (sum,)
        """,
    )
    text, _, saved = graph_text(graphs["forward"]).rpartition("\n")
    assert text == dedent("""\
        primals_1: Sym(s0)
        primals_2: Sym(s1)
        primals_3: f32[s0, s1]
        t: f32[s1, s0] = aten.t.default(primals_3)
        mm: f32[s0, s0] = aten.mm.default(primals_3, t)
        sin: f32[s0, s0] = aten.sin.default(mm)
        sum: f32[] = aten.sum.default(sin)""")
    assert saved.startswith("return (sum, ")
    assert "aten.mm.default" in graph_text(graphs["backward"])


def test_two_traces_of_one_program_give_the_same_text(
    net_graphs: dict[str, fx.GraphModule],
) -> None:
    again = compiled(Net(), torch.randn(5, 4), dynamic=True)
    for name, gm in again.items():
        assert graph_text(gm) == graph_text(net_graphs[name])


def test_node_names_do_not_show_but_placeholders_keep_their_target() -> None:
    graph = fx.Graph()
    x, add = graph.placeholder("x"), graph.placeholder("add")
    total = graph.call_function(operator.add, (add, x))
    graph.output(graph.call_function(operator.add, (total, 1)))
    gm = fx.GraphModule(nn.Module(), graph)
    expected = """
        x
        add
        add_1 = operator.add(add, x)
        add_2 = operator.add(add_1, 1)
        return add_2
        """
    expect(gm, expected)
    total.name = "something_else"
    expect(gm, expected)


@pytest.mark.parametrize("earlier", [0, 3])
def test_symbols_are_renumbered_whatever_the_tracer_called_them(earlier: int) -> None:
    shape_env = ShapeEnv()
    *_, m, n = [shape_env.create_unbacked_symint() for _ in range(earlier + 2)]
    assert str(m) == f"u{earlier}"
    graph = fx.Graph()
    for name, value in {"a": m, str(n): n, "c": (n + 2 * m, m // 2), "d": m > n}.items():
        graph.placeholder(name).meta["val"] = value
    graph.output((m,))
    expect(
        fx.GraphModule(nn.Module(), graph),
        """
        a: Sym(u0)
        u1: Sym(u1)
        c: (Sym(2*u0 + u1), Sym((u0//2)))
        d: Sym(u0 > u1)
        return (u0,)
        """,
    )


@pytest.mark.parametrize(
    ("meta", "text"),
    [
        ({}, "x"),
        ({"val": None}, "x"),
        ({"example_value": torch.ones(2, dtype=torch.int64)}, "x: i64[2]"),
        ({"val": torch.ones(()), "example_value": torch.ones(2)}, "x: f32[]"),
        ({"val": (torch.ones(2, 0), None, [3, True])}, "x: (f32[2, 0], None, [int, bool])"),
        ({"val": (torch.ones(1),)}, "x: (f32[1],)"),
        ({"val": 2.5}, "x: float"),
        ({"val": object()}, "x"),
    ],
)
def test_types(meta: dict[str, object], text: str) -> None:
    graph = fx.Graph()
    graph.placeholder("x").meta.update(meta)
    graph.output(())
    assert graph_text(fx.GraphModule(nn.Module(), graph)) == f"{text}\nreturn ()"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "None"),
        ("it's", '"it\'s"'),
        (1e-05, "1e-05"),
        (torch.float16, "torch.float16"),
        (torch.device("cuda", 1), "'cuda:1'"),
        ((1,), "(1,)"),
        ([], "[]"),
        ({"k": [1, (2, 3)]}, "{'k': [1, (2, 3)]}"),
        (torch.contiguous_format, "torch.contiguous_format"),
        (aten.add.Tensor, "aten.add.Tensor"),
        (torch.inf, "inf"),
    ],
)
def test_arguments(value: Any, text: str) -> None:
    graph = fx.Graph()
    graph.call_function(operator.pos, (value,))
    graph.output(None)
    assert f"pos = operator.pos({text})\n" in graph_text(fx.GraphModule(nn.Module(), graph))


def test_addresses_and_line_breaks_do_not_show() -> None:
    class Opaque:
        def __repr__(self) -> str:
            return f"Opaque(\n  {object.__repr__(self)})"

    graph = fx.Graph()
    node = graph.call_function(operator.pos, (None,))
    graph.output(None)
    gm = fx.GraphModule(nn.Module(), graph)
    expect(gm, "pos = operator.pos(None)\nreturn None")
    node.update_arg(0, Opaque())  # type: ignore[arg-type]  # as tracers of scripted objects do
    text = graph_text(gm)
    assert "pos = operator.pos(Opaque( <" in text
    assert "0x" not in text
    assert text.count("\n") == 1


DTYPES = {
    torch.float32: "f32",
    torch.bfloat16: "bf16",
    torch.float16: "f16",
    torch.float64: "f64",
    torch.uint8: "u8",
    torch.int8: "i8",
    torch.int64: "i64",
    torch.uint16: "u16",
    torch.bool: "b8",
    torch.complex64: "c64",
    torch.float8_e4m3fn: "f8e4m3fn",
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtype_text_gives_the_bits(dtype: torch.dtype) -> None:
    text = dtype_text(dtype)
    assert text == DTYPES[dtype]
    bits = "".join(c if c.isdigit() else " " for c in text).split()[0]
    assert int(bits) == dtype.itemsize * 8


# ---- the text can tell graphs apart ------------------------------------------------------------


def _mutants(gm: fx.GraphModule) -> Iterator[str]:
    """Make one small edit after another, each undone by a fresh copy; yields what was edited."""
    x, y, add, relu, output = gm.graph.nodes
    yield "nothing"
    add.args = (y, x)
    yield "argument order"
    add.args = (x, y)
    add.kwargs = {"alpha": 2}
    yield "keyword"
    add.kwargs = {}
    add.target = aten.sub.Tensor
    yield "target"
    add.target = aten.add.Scalar
    yield "overload"
    add.target = aten.add.Tensor
    relu.meta["val"] = relu.meta["val"].to(torch.float16)
    yield "dtype"
    relu.meta["val"] = relu.meta["val"].float()[:1]
    yield "shape"
    relu.meta["val"] = add.meta["val"]
    output.args = ((relu, x),)
    yield "output"
    output.args = ((relu,),)
    y.append(gm.graph.call_function(aten.neg.default, (x,)))
    yield "dead node"


def test_every_small_edit_changes_the_text() -> None:
    gm = trace(lambda x, y: (torch.relu(x + y),), torch.randn(4, 8), torch.randn(4, 8))
    texts = {edit: graph_text(gm) for edit in _mutants(gm)}
    assert len(texts) == 9
    assert len(set(texts.values())) == 9, texts


def test_expect_fails_on_another_graph() -> None:
    with pytest.raises(AssertionError):
        expect(trace(lambda x: x + 1, torch.ones(2)), "x_1: f32[2]\nreturn x_1")


# ---- reading a text ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dynamo", "forward", "backward", "export"])
def test_read_statement_recovers_every_node(
    net_graphs: dict[str, fx.GraphModule], name: str
) -> None:
    gm = net_graphs[name]
    statements = list(read_statements(graph_text(gm)))
    nodes = [node for node in gm.graph.nodes if node.op != "output"]
    assert len(statements) == len(nodes) > 10
    assert len({s.name for s in statements}) == len(nodes)
    for s, node in zip(statements, nodes, strict=True):
        assert s.is_call == (node.op.startswith("call"))
        assert s.target == ("" if node.op == "placeholder" else target_text(node))
        used = [arg for arg in node.all_input_nodes if s.is_call]
        assert len(used) <= s.arguments.count(",") + 1


def test_read_statement_splits_a_line() -> None:
    line = "    add: (f32[s0 + 1, 8],) = aten.add.Tensor(x_1, 'a = b(c)', alpha=2)"
    assert read_statement(line) == (
        "add", "(f32[s0 + 1, 8],)", "aten.add.Tensor", "x_1, 'a = b(c)', alpha=2", True
    )  # fmt: skip
    assert read_statement("w: f32[8] = self.a.w") == ("w", "f32[8]", "self.a.w", "", False)
    assert read_statement("f = __main__.<lambda>()") == ("f", "", "__main__.<lambda>", "", True)
    assert read_statement("x") == ("x", "", "", "", False)
    for line in ("return (x,)", "return x", "self.true_graph_0:", ""):
        assert read_statement(line) is None


# ---- where a node comes from -----------------------------------------------------------------


def places(gm: fx.GraphModule, target: object) -> list[tuple[str, str]]:
    nodes = [node for node in gm.graph.nodes if node.target is target]
    return [(module_of(node), source_of(node)) for node in nodes]


def test_place_on_a_dynamo_graph(net_graphs: dict[str, fx.GraphModule]) -> None:
    gm = net_graphs["dynamo"]
    up, down = line_of("up"), line_of("down")
    assert places(gm, F.linear) == [
        ("layers.0.up", up), ("layers.0.down", down), ("layers.1.up", up), ("layers.1.down", down)
    ]  # fmt: skip
    assert places(gm, F.gelu) == [("layers.0", up), ("layers.1", up)]
    assert places(gm, operator.add) == [("", line_of("skip"))] * 2


def test_place_on_an_export_graph(net_graphs: dict[str, fx.GraphModule]) -> None:
    gm = net_graphs["export"]
    up, down = line_of("up"), line_of("down")
    # Here the innermost frame is the forward of nn.Linear, inside torch: it is skipped.
    assert places(gm, aten.linear.default) == [
        ("layers.0.up", up), ("layers.0.down", down), ("layers.1.up", up), ("layers.1.down", down)
    ]  # fmt: skip
    assert places(gm, aten.add.Tensor) == [("", line_of("skip"))] * 2


def test_backward_nodes_have_the_place_of_their_forward(
    net_graphs: dict[str, fx.GraphModule],
) -> None:
    forward, backward = net_graphs["forward"], net_graphs["backward"]
    up, down = line_of("up"), line_of("down")
    assert [module for module, _ in places(forward, aten.addmm.default)] == [
        "layers.0.up", "layers.0.down", "layers.1.up", "layers.1.down"
    ]  # fmt: skip
    seen = list(dict.fromkeys(places(backward, aten.mm.default)))
    assert seen == [
        ("layers.1.down", down), ("layers.1.up", up), ("layers.0.down", down), ("layers.0.up", up)
    ]  # fmt: skip
    assert places(backward, aten.gelu_backward.default) == [("layers.1", up), ("layers.0", up)]


def test_place_of_a_model_called_by_a_compiled_function() -> None:
    net = Net()
    net.layers[1] = torch.compile(net.layers[1], backend="eager")  # type: ignore[assignment]

    def step(x: Tensor) -> Tensor:
        return net(x) * 2  # type: ignore[no-any-return]

    gm = compiled(step, torch.randn(3, 4))["dynamo"]
    assert [module for module, _ in places(gm, F.gelu)] == ["layers.0", "layers.1"]
    assert [module for module, _ in places(gm, operator.mul)] == [""]


def node_with(**meta: object) -> fx.Node:
    node = fx.Graph().placeholder("x")
    node.meta.update(meta)
    return node


@pytest.mark.parametrize(
    ("path", "module"),
    [
        ("", ""),
        ("layers.0.mlp", "layers.0.mlp"),
        ("L['self']", ""),
        ("L['self'].layers.0.mlp", "layers.0.mlp"),
        ("G['model'].layers[0].mlp", "layers.0.mlp"),
        ('L["self"].experts["a-b"].up', "experts.a-b.up"),
        ("L['self']._modules['layers']._modules['0'].mlp", "layers.0.mlp"),
        ("L['self']._orig_mod.layers.0._orig_mod", "layers.0"),
        ("L['self'].layers.0._checkpoint_wrapped_module.mlp", "layers.0.mlp"),
        ("L__self__.layers.0", "layers.0"),
    ],
)
def test_module_of_cleans_the_path(path: str, module: str) -> None:
    outer = {"a": ("L['self'].outer", nn.Module)}
    assert module_of(node_with(nn_module_stack={**outer, "b": (path, nn.Linear)})) == module
    assert module_of(node_with(fwd_nn_module_stack={**outer, "b": (path, nn.Linear)})) == module


@pytest.mark.parametrize("meta", [{}, {"nn_module_stack": None}, {"fwd_nn_module_stack": {}}])
def test_module_of_is_empty_when_unknown(meta: dict[str, object]) -> None:
    assert module_of(node_with(**meta)) == ""


TORCH = str(Path(torch.__file__).parent / "nn" / "modules" / "linear.py")
OURS = str(Path(rfcompile.graph.text.__file__).parent / "text.py")
OUR_PASS = str((Path(rfcompile.__file__).parent / "passes").resolve() / "a_pass.py")


@pytest.mark.parametrize(
    ("files", "source"),
    [
        ([], ""),
        ([TORCH], ""),
        (["/home/u/train.py", "/home/u/model/mlp.py"], "model/mlp.py:11"),
        (["/home/u/model/mlp.py", TORCH], "model/mlp.py:10"),
        (["/home/u/model/mlp.py", OURS, OUR_PASS, "<eval_with_key>.7"], "model/mlp.py:10"),
        ([str(Path("a/b/c/net.py").absolute())], "a/b/c/net.py:10"),
        ([str(Path(".venv/lib/site-packages/lib/llama/net.py").absolute())], "llama/net.py:10"),
        (["/net.py"], "/net.py:10"),
    ],
)
def test_source_of_is_the_innermost_user_frame(files: list[str], source: str) -> None:
    trace = "".join(
        f'  File "{file}", line {line}, in forward\n    y = f(x)\n'
        for line, file in enumerate(files, 10)
    )
    assert source_of(node_with(stack_trace=trace)) == source
    assert source_of(node_with(stack_trace=None)) == ""
