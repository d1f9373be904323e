"""Adapters: added, trained, merged, quantized, saved, loaded; plain, with a sine, as DoRA."""

from __future__ import annotations

import copy
import json
import math
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import rfcompile as rf
from rfcompile.adapters import AdaptedLinear, AdapterReport, QuantizedReport
from rfcompile.errors import (
    FormatError,
    MissingPackageError,
    NonFiniteError,
    OptionError,
    RFCompileWarning,
    StateError,
)
from rfcompile.rewrites.adapters.factor import Factor, nbytes_of
from rfcompile.rewrites.adapters.rewrite import merge_adapters
from rfcompile.rewrites.adapters.storage import load_adapters, save_adapters
from tests.rewrites.models import WIDTH, graph_of, made, moved, tokens

UP = "blocks.0.up"
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "sine": {"sine": True},
    "dora": {"dora": True},
    "sine dora": {"sine": True, "dora": True},
}


def adapter(model: nn.Module, path: str = UP) -> AdaptedLinear:
    module = model.get_submodule(path)
    assert isinstance(module, AdaptedLinear)
    return module


# ---- adding --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_at_first_nothing_changes_and_only_adapters_train(kind: str) -> None:
    model = made()
    new = rf.transform(model, rf.Adapters(4, **KINDS[kind]))
    # DoRA's row norms divide by themselves: one rounding
    torch.testing.assert_close(new(tokens()), model(tokens()), rtol=1e-6, atol=1e-6)
    trained = {name for name, p in new.named_parameters() if p.requires_grad}
    assert len(trained) == 4 * (3 if "dora" in kind else 2)
    assert all("lora_" in name for name in trained)
    assert new.state_dict().keys() > model.state_dict().keys()
    assert all(p.requires_grad for p in model.parameters())
    weight = new.get_submodule("head").get_parameter("weight")
    assert weight.data_ptr() == model.head.weight.data_ptr()
    new(tokens()).sum().backward()
    gradient = adapter(new).lora_B.weight.grad
    assert isinstance(gradient, torch.Tensor)
    assert gradient.any()
    assert model.head.weight.grad is None


@pytest.mark.parametrize("kind", KINDS)
def test_the_formula(kind: str) -> None:
    new = moved(rf.transform(made(), rf.Adapters(4, alpha=2.0, **KINDS[kind])))
    module = adapter(new)
    a, b = module.lora_A().double(), module.lora_B().double()
    base = module.base_layer.weight
    if "sine" in kind:
        delta = 2.0 / 4 * torch.sin(30 * WIDTH**0.5 * b @ a) / WIDTH**0.5
    else:
        delta = 2.0 / 4 * b @ a
    weight = base.double() + delta
    if "dora" in kind:
        weight = weight * (base.double().norm(dim=1) / weight.norm(dim=1)).unsqueeze(1)
    x = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(0))
    assert module.bias is not None
    expected = F.linear(x.double(), weight, module.bias.double())
    # float32 with sums of 16 terms of order 1, and phases of order 1
    torch.testing.assert_close(module(x).double(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(module.weight.double(), weight, rtol=1e-4, atol=1e-5)


class Reader(nn.Module):
    """Takes the weights of its linears and calls none of them."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = F.linear(x, block.weight, block.bias)
        return x


@pytest.mark.parametrize("kind", KINDS)
def test_code_that_reads_the_weight_sees_the_adapter(kind: str) -> None:
    new = moved(rf.transform(Reader(), rf.Adapters(4, modules="*", **KINDS[kind])))
    x = torch.randn(3, WIDTH)
    called = x
    for block in new.get_submodule("blocks").children():
        called = block(called)
    torch.testing.assert_close(new(x), called, rtol=1e-5, atol=1e-5)
    new(x).sum().backward()
    for name, parameter in new.named_parameters():
        assert (parameter.grad is not None) == ("lora_" in name), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("quantized", [False, True])
def test_no_name_stands_for_two_tensors(kind: str, quantized: bool) -> None:
    """FSDP and others look parameters up by name: a property must not give them another tensor."""
    new = rf.transform(made(), rf.Adapters(4, **KINDS[kind]))
    if quantized:
        new = rf.adapters.quantize(new, 4)
    check_names(new)


@pytest.mark.slow
def test_no_name_stands_for_two_tensors_of_a_rewritten_model() -> None:
    check_names(rf.transform(made(), rf.LowRank(4), residual="free", example_inputs=(tokens(),)))


def check_names(model: nn.Module) -> None:
    for path, module in model.named_modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            assert getattr(module, name) is tensor, (path, name)


@pytest.mark.parametrize("kind", KINDS)
def test_the_state_dict_has_the_names_of_the_linear(kind: str) -> None:
    model = made()
    new = moved(rf.transform(model, rf.Adapters(4, **KINDS[kind])))
    state = new.state_dict()
    kept = [name for name in state if "lora_" not in name and "extra_state" not in name]
    assert set(kept) == set(model.state_dict())
    again = rf.transform(made(seed=1), rf.Adapters(4, **KINDS[kind]))
    again.load_state_dict(state)
    assert torch.equal(again(tokens()), new(tokens()))
    assigned = rf.transform(made(seed=1), rf.Adapters(4, **KINDS[kind]))
    assigned.load_state_dict(state, assign=True)
    assert torch.equal(assigned(tokens()), new(tokens()))
    assert adapter(assigned).base_layer.weight.data_ptr() == state["blocks.0.up.weight"].data_ptr()
    copied = pickle.loads(pickle.dumps(new))
    assert torch.equal(copied(tokens()), new(tokens()))

    left = again.load_state_dict(model.state_dict(), strict=False)  # of the model without adapters
    assert not left.unexpected_keys
    assert all("lora_" in name or "extra_state" in name for name in left.missing_keys)
    by_parameter = {n: p.detach() for n, p in new.named_parameters()}
    left = again.load_state_dict(by_parameter, strict=False)
    assert not left.unexpected_keys
    assert all("extra_state" in name for name in left.missing_keys)
    del state["blocks.0.up.weight"]
    assert again.load_state_dict(state, strict=False).missing_keys == ["blocks.0.up.weight"]
    both = new.state_dict() | {"blocks.0.up.base_layer.weight": torch.zeros(1)}
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"blocks\.0\.up\.base_layer\.weight"'):
        again.load_state_dict(both)


def test_merged_parameters_keep_their_order() -> None:
    new = rf.transform(made(), rf.Adapters(4))
    merge_adapters(new)
    assert [n for n, _ in new.named_parameters()] == [n for n, _ in made().named_parameters()]


@pytest.mark.parametrize("kind", KINDS)
def test_merging(kind: str) -> None:
    model = made()
    new = moved(rf.transform(model, rf.Adapters(4, **KINDS[kind])))
    expected = new(tokens())
    assert not torch.allclose(expected, model(tokens()), atol=1e-3)
    assert len(merge_adapters(new)) == 4
    assert type(new.get_submodule(UP)) is nn.Linear
    assert new.state_dict().keys() == model.state_dict().keys()
    torch.testing.assert_close(new(tokens()), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model(tokens()), made()(tokens()), rtol=0, atol=0)
    assert merge_adapters(new) == ()


def test_an_ordinary_model() -> None:
    new = moved(rf.transform(made(), rf.Adapters(4, sine=True)))
    expected = new(tokens())
    for twin in (copy.deepcopy(new), pickle.loads(pickle.dumps(new))):
        assert torch.equal(twin(tokens()), expected)
    exported = torch.export.export(new, (tokens(),)).module()
    assert torch.equal(exported(tokens()), expected)
    assert "omega" in repr(adapter(new))
    with torch.autocast("cpu", torch.bfloat16):
        assert adapter(new)(torch.randn(2, WIDTH)).dtype is torch.bfloat16
    assert copy.deepcopy(new).bfloat16()(tokens()).dtype is torch.bfloat16


@pytest.mark.slow
def test_compiled_in_one_graph_quantized_too() -> None:
    new = moved(rf.transform(made(), rf.Adapters(4, sine=True, omega=10.0, modules=["up"])))
    for model in (new, rf.adapters.quantize(new, 3)):
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        # float32 sums in another order
        torch.testing.assert_close(compiled(tokens()), model(tokens()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("how", ["export", "symbolic"])
def test_a_graph_gets_the_same_adapters(how: str) -> None:
    model = made()
    x = tokens()
    graph = moved(rf.transform(graph_of(model, how), rf.Adapters(4, sine=True)))
    module = moved(rf.transform(model, rf.Adapters(4, sine=True)))
    for name, p in module.named_parameters():  # the same values under the graph's names
        if "lora_" in name:
            graph.get_parameter(name.removesuffix(".weight")).data.copy_(p)
    torch.testing.assert_close(graph(x), module(x), rtol=1e-6, atol=1e-6)
    assert {n for n, p in graph.named_parameters() if p.requires_grad} == {
        f"blocks.{i}.{part}.{lora}"
        for i in range(2) for part in ("up", "down") for lora in ("lora_A", "lora_B")
    }  # fmt: skip


def test_with_everything_else_in_one_call() -> None:
    model = rf.transform(
        made(),
        rank_of_up(),
        rf.Adapters(2, sine=True, modules=["down"]),
        residual="free",
        bits=4,
        example_inputs=(tokens(),),
    )
    names = [type(report).__name__ for report in rf.rewrites_of(model)]
    assert names == ["ResidualReport", "LowRankReport", "AdapterReport"]
    model(tokens()).sum().backward()
    assert adapter(model, "blocks.0.down").lora_A.weight.grad is not None
    assert "aten.sin.default" in str(rf.diff(made(), model, example_inputs=(tokens(),)))


def rank_of_up() -> rf.LowRank:
    return rf.LowRank(4, start="fresh", modules=["up"])


def test_the_report() -> None:
    report = rf.rewrites_of(rf.transform(made(), rf.Adapters(4)))[0]
    assert isinstance(report, AdapterReport)
    assert sum(site.parameters for site in report.sites) == 4 * 4 * 3 * WIDTH
    assert report.parameters == sum(p.numel() for p in made().parameters())
    assert "4 adapters: 768 parameters to train" in str(report)


@pytest.mark.slow
def test_names_as_peft_has_them_and_conv1d() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=2, n_embd=WIDTH, n_head=2, vocab_size=11)
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config).eval()
    new = moved(rf.transform(model, rf.Adapters(2, modules=["c_attn", "c_proj"])))
    assert len(rf.rewrites_of(new)[0].sites) == 6  # type: ignore[attr-defined]
    expected = new(tokens()).logits
    assert not torch.allclose(expected, model(tokens()).logits)
    merge_adapters(new)
    torch.testing.assert_close(new(tokens()).logits, expected, rtol=1e-4, atol=1e-5)


def test_what_cannot_be() -> None:
    with pytest.raises(OptionError, match=r"rank=17 .* at most 16"):
        rf.transform(made(), rf.Adapters(17))
    with pytest.raises(OptionError, match=r"'q_proj'.* no linear has this path"):
        rf.transform(made(), rf.Adapters(2, modules=["q_proj"]))
    with pytest.raises(OptionError, match="tied"):
        rf.transform(made(tied=True), rf.Adapters(2, modules=["head"]))
    with pytest.raises(OptionError, match="merge them first"):
        rf.transform(rf.transform(made(), rf.Adapters(2)), rf.Adapters(2))
    with pytest.raises(OptionError, match="without sine=True"):
        rf.transform(made(), rf.Adapters(2, omega=3.0))
    with pytest.raises(OptionError, match=r"alpha=-1"):
        rf.transform(made(), rf.Adapters(2, alpha=-1))
    zeros = made()
    nn.init.zeros_(zeros.get_submodule(UP).weight)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="rows of zeros"):
        rf.transform(zeros, rf.Adapters(2, dora=True))
    empty = nn.Linear(1, 4)
    empty.weight = nn.Parameter(torch.empty(4, 0))
    with pytest.raises(OptionError, match="is 4 x 0: the rank is at most 0"):
        rf.transform(nn.Sequential(empty), rf.Adapters(1, modules=["0"]))
    gm = torch.fx.symbolic_trace(made())
    with pytest.raises(OptionError, match="dora=True"):
        rf.transform(gm, rf.Adapters(2, dora=True))


def test_what_is_not_finite_becomes_no_number() -> None:
    for bad in (math.nan, math.inf):
        new = moved(rf.transform(made(), rf.Adapters(2, sine=True)))
        adapter(new).lora_B.weight.data[0, 0] = bad  # type: ignore[index, operator]
        assert new(tokens()).isnan().any()
        with pytest.raises(NonFiniteError, match="codebook 'wire' carries it as NaN"):
            rf.adapters.quantize(new, 4)
        with pytest.warns(RFCompileWarning, match=r"phase of blocks\.0\.up is off by nan"):
            wire = rf.adapters.quantize(new, 4, codebook="wire")
        assert wire(tokens()).isnan().any()


# ---- quantizing ----------------------------------------------------------------------------------


def report_of(model: nn.Module) -> QuantizedReport:
    report = rf.rewrites_of(model)[-1]
    assert isinstance(report, QuantizedReport)
    return report


@pytest.mark.parametrize("codebook", ["kmeans", "uniform", "wire", rf.QuantFormat(4, rotate=16)])
def test_the_sine_comes_after_quantization(codebook: Any) -> None:
    new = moved(rf.transform(made(), rf.Adapters(4, sine=True, omega=10.0)))
    before = copy.deepcopy(new.state_dict())
    packed = rf.adapters.quantize(new, 4, codebook=codebook)
    module = adapter(packed)
    a, b = module.lora_A(), module.lora_B()
    assert len(a.unique()) <= 16 or codebook not in ("kmeans", "uniform")
    assert module.omega is not None
    assert torch.equal(module.delta(), torch.sin(torch.mm(module.omega * b, a)) / module.gain)
    for name, value in new.state_dict().items():
        assert torch.equal(value, before[name])
    assert not [name for name, p in packed.named_parameters() if p.requires_grad]
    site = report_of(packed).sites[0]
    old = adapter(new)
    error = b @ a - old.lora_B() @ old.lora_A()
    expected = module.omega * float(error.detach().std(correction=0))
    assert math.isclose(site.phase_error, expected, rel_tol=1e-4)
    off = float((module.delta() - old.delta()).detach().norm() / old.delta().detach().norm())
    assert math.isclose(site.error, off, rel_tol=1e-4)
    assert pickle.loads(pickle.dumps(packed))(tokens()).equal(packed(tokens()))


def test_an_omega_too_large_for_the_bits_warns_with_the_figure() -> None:
    new = moved(rf.transform(made(), rf.Adapters(4, sine=True, omega=2000.0)))
    with pytest.warns(RFCompileWarning, match=r"at 2 bits .* off by \d+\.\d\d radians .* 4 of 4"):
        packed = rf.adapters.quantize(new, 2)
    assert max(site.phase_error for site in report_of(packed).sites) > 0.3
    rf.adapters.quantize(
        moved(rf.transform(made(), rf.Adapters(4, sine=True, omega=2.0))), 2
    )  # no warning


def test_more_bits_are_nearer_and_eight_are_near() -> None:
    new = moved(rf.transform(made(), rf.Adapters(4)))
    packed = [rf.adapters.quantize(new, bits, codebook="uniform") for bits in (1, 3, 5, 8)]
    errors = [report_of(model).sites[0].error for model in packed]
    assert errors == sorted(errors, reverse=True)
    # each factor is off by half of a 255th of its range at most: far below a hundredth
    assert errors[-1] < 0.02


def test_bits_and_codebooks_outside_their_rule() -> None:
    new = moved(rf.transform(made(), rf.Adapters(4)))
    for bits in (0, 9, 4.0):
        with pytest.raises(OptionError, match="bits"):
            rf.adapters.quantize(new, bits)  # type: ignore[arg-type]
    with pytest.raises(FormatError, match="bits=7"):
        rf.adapters.quantize(new, 7, codebook="wire")
    with pytest.raises(OptionError, match="codebook='mean'"):
        rf.adapters.quantize(new, 4, codebook="mean")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="has others"):
        rf.adapters.quantize(new, 3, codebook=rf.QuantFormat(4))
    with pytest.raises(OptionError, match="no adapters"):
        rf.adapters.quantize(made(), 4)
    with pytest.raises(OptionError, match="quantized before"):
        rf.adapters.quantize(rf.adapters.quantize(new, 4), 4)


def test_a_state_dict_resumes_quantized_adapters() -> None:
    """An untrained factor of zeros has one level, a trained one has many."""
    new = rf.transform(made(), rf.Adapters(4, sine=True))
    fresh = rf.adapters.quantize(new, 4)
    packed = rf.adapters.quantize(moved(rf.transform(made(), rf.Adapters(4, sine=True))), 4)
    fresh.load_state_dict(packed.state_dict())
    assert torch.equal(fresh(tokens()), packed(tokens()))
    assert "codes are not trained" in str(report_of(packed))
    with pytest.raises(RuntimeError, match="size mismatch"):
        rf.adapters.quantize(new, 2).load_state_dict(packed.state_dict())


@pytest.mark.parametrize("codebook", ["kmeans", "wire"])
@pytest.mark.parametrize("kind", KINDS)
def test_quantized_adapters_follow_the_model_to_a_dtype(kind: str, codebook: Any) -> None:
    new = moved(rf.transform(made(), rf.Adapters(4, **KINDS[kind])))
    packed = rf.adapters.quantize(new, 8, codebook=codebook)
    for dtype in (torch.bfloat16, torch.float64):
        assert copy.deepcopy(packed).to(dtype)(tokens()).dtype is dtype


# ---- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [None, 4])
def test_saved_and_loaded(tmp_path: Path, kind: str, bits: int | None) -> None:
    new = moved(rf.transform(made(), rf.Adapters(4, **KINDS[kind])))
    if bits:
        new = rf.adapters.quantize(new, bits)
    save_adapters(new, tmp_path / "adapter")
    back = load_adapters(made(), tmp_path / "adapter")
    assert torch.equal(back(tokens()), new(tokens()))
    half = load_adapters(made().bfloat16(), tmp_path / "adapter")
    assert half(tokens()).dtype is torch.bfloat16


@pytest.mark.parametrize("bits", range(1, 9))
def test_the_file_is_as_small_as_the_codes(tmp_path: Path, bits: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(512, 384), nn.ReLU(), nn.Linear(384, 512))
    new = moved(rf.transform(model, rf.Adapters(16, modules="*")))
    packed = rf.adapters.quantize(new, bits)
    save_adapters(packed, tmp_path)
    file = (tmp_path / "adapter_model.safetensors").read_bytes()
    header = int.from_bytes(file[:8], "little")
    numel = 2 * 16 * (512 + 384)
    assert len(file) == 8 + header + numel * bits // 8 + 4 * (4 * 2**bits)
    assert header < 1500
    found = [m for m in packed.modules() if isinstance(m, AdaptedLinear)]
    nbytes = sum(nbytes_of(m.lora_A) + nbytes_of(m.lora_B) for m in found)
    assert report_of(packed).nbytes[1] == nbytes == len(file) - 8 - header
    x = torch.ones(1, 512)
    assert torch.equal(load_adapters(model, tmp_path)(x), packed(x))


def test_files_of_another_model(tmp_path: Path) -> None:
    save_adapters(moved(rf.transform(made(), rf.Adapters(4))), tmp_path)
    with pytest.raises(StateError, match=r"no linear here: 'blocks\.0\.up'"):
        load_adapters(nn.Sequential(nn.Linear(4, 4)), tmp_path)
    wider = made()
    wider.blocks[0].up = nn.Linear(WIDTH, 8)  # type: ignore[union-attr]
    with pytest.raises(StateError, match="another model's"):
        load_adapters(wider, tmp_path)
    with pytest.raises(OptionError, match="no adapters"):
        save_adapters(made(), tmp_path)
    with pytest.raises(OptionError, match="merge them first"):
        load_adapters(rf.transform(made(), rf.Adapters(4)), tmp_path)
    with pytest.raises(OptionError, match="into the module"):
        load_adapters(graph_of(made(), "symbolic"), tmp_path)
    assert rf.rewrites_of(load_adapters(made(), tmp_path))[0].sites[0].rank == 4


def test_damaged_files(tmp_path: Path) -> None:
    """Each is an error that names what is wrong; none loads as another function."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    a = f"base_model.model.{UP}.lora_A"
    dora, packed = (
        {"dora": True},
        rf.adapters.quantize(moved(rf.transform(made(), rf.Adapters(2))), 4),
    )
    cases: list[tuple[nn.Module, Callable[[dict[str, Any]], Any], str]] = [
        (
            rf.transform(made(), rf.Adapters(2, **dora)),
            lambda t: t.pop(f"{a[:-2]}_magnitude_vector"),
            "miss",
        ),
        (
            rf.transform(made(), rf.Adapters(2)),
            lambda t: t.update({f"{a}.bias": torch.ones(2)}),
            "left out",
        ),
        (
            rf.transform(made(), rf.Adapters(2)),
            lambda t: t.update({f"{a}.weight": torch.ones(2)}),
            "of nxn",
        ),
        (packed, lambda t: t.update({f"{a}.codes": t[f"{a}.codes"].repeat(2)}), "not torch.uint8"),
        (packed, lambda t: t.update({f"{a}.codes": t[f"{a}.codes"].float()}), "not torch.uint8"),
        (packed, lambda t: t.update({f"{a}.levels": t[f"{a}.levels"][:1]}), "beyond their levels"),
        (packed, lambda t: t.update(meta=t["meta"].replace("[4,", "[9,")), "damaged desc"),
        (packed, lambda t: t.update(meta=t["meta"].replace("0.5", "0")), "damaged desc"),
        (packed, lambda t: t.update(meta="[]"), "no description"),
        (packed, lambda t: t.update(meta="{"), "damaged file"),
    ]
    for model, damage, message in cases:
        save_adapters(model, tmp_path)
        file = tmp_path / "adapter_model.safetensors"
        with safe_open(file, "pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            tensors["meta"] = opened.metadata()["rfcompile"]
        damage(tensors)
        save_file(tensors, file, {"rfcompile": tensors.pop("meta")})
        with pytest.raises(StateError, match=message):
            load_adapters(made(), tmp_path)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(StateError, match="damaged file"):
        load_adapters(made(), tmp_path)


def test_without_safetensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(MissingPackageError, match=r"pip install 'rfcompile\[adapters\]'"):
        save_adapters(rf.transform(made(), rf.Adapters(4)), tmp_path)


def test_the_configuration_says_what_peft_may_load(tmp_path: Path) -> None:
    ours = "RFCOMPILE_LORA"
    for kind, bits, expected in (("plain", None, "LORA"), ("sine", None, ours), ("plain", 4, ours)):
        new = rf.transform(made(), rf.Adapters(4, alpha=6.0, **KINDS[kind]))
        save_adapters(rf.adapters.quantize(new, bits) if bits else new, tmp_path)
        config = json.loads((tmp_path / "adapter_config.json").read_text())
        assert config["peft_type"] == expected
        assert config["r"] == 4
        assert kind != "plain" or config["lora_alpha"] == 6.0


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["plain", "dora"])
def test_peft_reads_ours_and_we_read_peft(tmp_path: Path, kind: str) -> None:
    peft = pytest.importorskip("peft")
    model = made()
    new = moved(rf.transform(model, rf.Adapters(4, alpha=6.0, modules=["up"], **KINDS[kind])))
    save_adapters(new, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(made(), str(tmp_path / "ours"))
    # the same sums in another order
    torch.testing.assert_close(theirs(tokens()), new(tokens()), rtol=1e-4, atol=1e-5)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    back = load_adapters(model, tmp_path / "theirs")
    torch.testing.assert_close(back(tokens()), new(tokens()), rtol=1e-4, atol=1e-5)
    sine = moved(rf.transform(model, rf.Adapters(4, sine=True)))
    save_adapters(sine, tmp_path / "sine")
    with pytest.raises((KeyError, ValueError)):
        peft.PeftModel.from_pretrained(made(), str(tmp_path / "sine"))


def test_peft_configurations_that_mean_more_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    tensors = {
        f"base_model.model.{UP}.lora_A.weight": torch.ones(2, WIDTH),
        f"base_model.model.{UP}.lora_B.weight": torch.ones(2 * WIDTH, 2),
    }
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}
    cases: list[tuple[dict[str, Any], str]] = [
        ({"peft_type": "LOHA"}, "peft_type='LOHA'"),
        ({"use_rslora": True}, "use_rslora"),
        ({"bias": "all"}, "bias"),
        ({"init_lora_weights": "pissa"}, "it changed the weights, too"),
        ({"lora_alpha": None}, "lora_alpha=None"),
    ]
    for more, message in cases:
        save_file(tensors, tmp_path / "adapter_model.safetensors")
        (tmp_path / "adapter_config.json").write_text(json.dumps(config | more))
        with pytest.raises(OptionError, match=message):
            load_adapters(made(), tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    module = adapter(load_adapters(made(), tmp_path))
    assert torch.equal(module.delta(), torch.full((2 * WIDTH, WIDTH), 4.0))
    assert isinstance(module.lora_A, Factor)
    tensors.popitem()
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(StateError, match="missing"):
        load_adapters(made(), tmp_path)
