"""Every error: its place in the hierarchy, its text (value, rule, way out) and its fields."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch

from rfcompile import errors
from rfcompile.codec import arithmetic, formats, operators
from rfcompile.codec.formats import QuantFormat
from rfcompile.errors import (
    DerivativeError,
    DtypeError,
    FormatError,
    HookError,
    NonFiniteError,
    OptionError,
    PayloadError,
    PolicyError,
    RankMismatchError,
    ReportError,
    RFCompileError,
    ShapeError,
    StateError,
    TransportError,
    UnquantizedSiteError,
)

Case = tuple[Callable[[], RFCompileError], type[Exception], str, dict[str, Any]]

CASES: dict[str, Case] = {
    "FormatError": (
        lambda: FormatError("bits", 7, "choose one of (2, 4)."),
        ValueError,
        "bits=7 is not supported: choose one of (2, 4).",
        {"field": "bits", "value": 7, "rule": "choose one of (2, 4)."},
    ),
    "PolicyError": (
        lambda: PolicyError("bitz", 4, "did you mean 'bits'?"),
        ValueError,
        "bitz=4 is not supported: did you mean 'bits'?",
        {"option": "bitz", "value": 4, "rule": "did you mean 'bits'?"},
    ),
    "OptionError": (
        lambda: OptionError("bitz", 4, "did you mean 'bits'?"),
        ValueError,
        "bitz=4 is not supported: did you mean 'bits'?",
        {"option": "bitz", "value": 4, "rule": "did you mean 'bits'?"},
    ),
    "DtypeError": (
        lambda: DtypeError("the input", torch.int32, ["torch.float32", "torch.float16"]),
        TypeError,
        "the input has dtype torch.int32; the codec takes torch.float32, torch.float16. Convert "
        "the tensor first, or leave it exact (format None).",
        {"what": "the input", "dtype": torch.int32, "allowed": ("torch.float32", "torch.float16")},
    ),
    "ShapeError": (
        lambda: ShapeError("the input", torch.Size([3, 4]), "give one dimension."),
        ValueError,
        "the input has shape (3, 4): give one dimension.",
        {"what": "the input", "shape": (3, 4), "rule": "give one dimension."},
    ),
    "DerivativeError": (
        lambda: DerivativeError("an operator", "derivative of a kind", "take another."),
        NotImplementedError,
        "an operator has no derivative of a kind: take another.",
        {"operator": "an operator", "kind": "derivative of a kind", "rule": "take another."},
    ),
    "ReportError": (
        lambda: ReportError(3.5),
        TypeError,
        "float has no report: give reports, or what quantize_ddp, quantize_fsdp, "
        "quantize_pipeline_stage or quantize_states returned.",
        {"source": 3.5},
    ),
    "PayloadError": (
        lambda: PayloadError("65 bytes", "66 bytes", "4b:g128:rise", "pass it whole."),
        ValueError,
        "the payload is 65 bytes, but format '4b:g128:rise' needs 66 bytes: pass it whole.",
        {"got": "65 bytes", "expected": "66 bytes", "format": "4b:g128:rise"},
    ),
    "TransportError": (
        lambda: TransportError("bucket 2", "dp", "RuntimeError: timed out"),
        RuntimeError,
        "bucket 2 failed in process group 'dp': RuntimeError: timed out. Ranks may be out of step, "
        "so nothing more is sent there; start again from a checkpoint with new process groups.",
        {"site": "bucket 2", "group": "dp", "reason": "RuntimeError: timed out"},
    ),
    "PeerError": (
        lambda: errors.PeerError("broadcast_states", 2, "MemoryError: no more"),
        RuntimeError,
        "broadcast_states: rank 2 failed with MemoryError: no more. All ranks stop here, none "
        "waits for it; mend it there and call again on every rank.",
        {"site": "broadcast_states", "rank": 2, "reason": "MemoryError: no more"},
    ),
    "HookError": (
        lambda: HookError("Linear", "wrap it first."),
        ValueError,
        "Linear cannot be quantized: wrap it first.",
        {"module": "Linear", "rule": "wrap it first."},
    ),
    "EmissionError": (
        lambda: errors.EmissionError("aten.nonzero", "model.py:3", "its size is not known"),
        RuntimeError,
        "aten.nonzero at model.py:3 has no kernels without a GPU: its size is not known. Leave it "
        "out of the model, or read TORCH_LOGS=output_code on the GPU.",
        {"what": "aten.nonzero", "place": "model.py:3", "reason": "its size is not known"},
    ),
    "StateError": (
        lambda: StateError("residuals of nothing", list("abcdef"), "Load it elsewhere."),
        ValueError,
        "residuals of nothing: 'a', 'b', 'c', 'd', 'e', ... Load it elsewhere.",
        {"what": "residuals of nothing", "names": tuple("abcdef"), "rule": "Load it elsewhere."},
    ),
    "MissingPackageError": (
        lambda: errors.MissingPackageError("safetensors", "adapters"),
        ImportError,
        "safetensors is not installed: pip install 'rfcompile[adapters]', or safetensors by "
        "itself.",
        {"package": "safetensors", "extra": "adapters"},
    ),
    "RankMismatchError": (
        lambda: RankMismatchError("tp", {2: "8b", 0: "4b", 1: "4b"}),
        RuntimeError,
        "the ranks of process group 'tp' disagree on the wire: ranks 0, 1: 4b; rank 2: 8b. Every "
        "rank must use the same formats, options and rfcompile version.",
        {"group": "tp", "plans": {0: "4b", 1: "4b", 2: "8b"}},
    ),
    "NonFiniteError": (
        lambda: NonFiniteError("layer 1", [1]),
        ArithmeticError,
        "NaN or Inf in the input of layer 1 on rank 1. The format says nonfinite='raise'; use "
        "nonfinite='propagate' to carry it as NaN instead.",
        {"site": "layer 1", "ranks": (1,)},
    ),
    "UnquantizedSiteError": (
        lambda: UnquantizedSiteError([("a", "integers"), ("b", "too small")]),
        RuntimeError,
        "strict=True, but 2 eligible sites would stay exact (a: integers; b: too small). Lower "
        "min_bytes, name them in sites={pattern: None} to accept it, or drop strict.",
        {"sites": (("a", "integers"), ("b", "too small"))},
    ),
    "RecompileLimitError": (
        lambda: errors.RecompileLimitError("m.py:3", "recompile_limit", 8),
        UnquantizedSiteError,
        "strict=True, but Dynamo compiled the function at m.py:3 8 times, which is its "
        "recompile_limit: calls that fit none of these graphs run exact. Raise "
        "torch._dynamo.config.recompile_limit, or compile with dynamic=True, or drop strict.",
        {"sites": (("m.py:3", "recompile_limit 8"),)},
    ),
    "ScoreError": (
        lambda: errors.ScoreError("the loss of batch 1", 3, "return a tensor."),
        ValueError,
        "the loss of batch 1: 3; return a tensor.",
        {"what": "the loss of batch 1", "value": 3, "rule": "return a tensor."},
    ),
    "BudgetError": (
        lambda: errors.BudgetError("bytes", 100, 340),
        ValueError,
        "bytes=100 is below the minimum that can be reached, 340: give a larger budget, or score "
        "formats of fewer bits, rf.score(formats=...).",
        {"budget": "bytes", "value": 100, "minimum": 340},
    ),
    "ProcessGroupError": (lambda: errors.ProcessGroupError("m"), RuntimeError, "m", {}),
    "BoundaryError": (lambda: errors.BoundaryError("m"), ValueError, "m", {}),
    "CaptureError": (lambda: errors.CaptureError("m"), RuntimeError, "m", {}),
    "SourceError": (lambda: errors.SourceError("m"), RuntimeError, "m", {}),
    "AttentionError": (
        lambda: errors.AttentionError("m", ["an attention"]),
        ValueError,
        "m",
        {"left": ("an attention",)},
    ),
    "GrayingError": (
        lambda: errors.GrayingError("m", ["blocks.0"]),
        ValueError,
        "m",
        {"modules": ("blocks.0",)},
    ),
    "ResidualError": (
        lambda: errors.ResidualError("m", ["an add"]),
        ValueError,
        "m",
        {"left": ("an add",)},
    ),
    "TargetError": (lambda: errors.TargetError("m"), ValueError, "m", {}),
}


@pytest.mark.parametrize("name", CASES)
def test_type_text_and_fields(name: str) -> None:
    make, builtin, text, fields = CASES[name]
    error = make()
    assert type(error).__name__ == name
    assert isinstance(error, RFCompileError)
    assert isinstance(error, builtin)
    assert str(error) == text
    for field, value in fields.items():
        assert getattr(error, field) == value, field


def test_every_error_is_listed_here_and_derives_from_a_builtin() -> None:
    defined = {
        name
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, RFCompileError)
    }
    assert defined - {"RFCompileError"} == set(CASES)
    assert issubclass(errors.RFCompileWarning, UserWarning)


@pytest.mark.parametrize("name", CASES)
def test_an_error_survives_the_way_from_a_worker_process(name: str) -> None:
    error = CASES[name][0]()
    back = pickle.loads(pickle.dumps(error))
    assert type(back) is type(error)
    assert str(back) == str(error)
    assert vars(back) == vars(error)


def test_one_of_a_kind_is_singular() -> None:
    assert "on rank 3." in str(NonFiniteError("x", [3]))
    assert "input of x. The format" in str(NonFiniteError("x"))
    assert NonFiniteError("x").ranks is None
    assert "1 eligible site would" in str(UnquantizedSiteError([("a", "b")]))


def test_bits_7() -> None:
    with pytest.raises(FormatError, match=r"bits=7 .* choose one of \(2, 3, 4, 5, 6, 8\)") as e:
        QuantFormat(7)
    assert (e.value.field, e.value.value) == ("bits", 7)


def test_group_size_100() -> None:
    with pytest.raises(FormatError, match=r"group_size=100 .* power of two from 16 to 1024") as e:
        QuantFormat(4, group_size=100)
    assert (e.value.field, e.value.value) == ("group_size", 100)


def test_an_integer_tensor() -> None:
    with pytest.raises(DtypeError, match=r"torch\.int64; .* leave it exact \(format None\)") as e:
        operators.quantize(torch.arange(256).view(1, 256), "4b")
    assert e.value.dtype is torch.int64
    assert e.value.allowed == tuple(str(dtype) for dtype in formats.DTYPES)


@pytest.mark.parametrize("length", [0, 65, 67, 132])
def test_a_payload_of_the_wrong_length(length: int) -> None:
    fmt = QuantFormat(4)
    payload = torch.zeros(length, dtype=torch.uint8)
    with pytest.raises(
        PayloadError, match=rf"{length} elements .* needs 66 bytes for 1 x 128"
    ) as e:
        arithmetic.check_payload(payload, fmt, row_numel=128, rows=1)
    assert (e.value.format, e.value.rule.split()[0]) == (fmt.spec, "pass")
    arithmetic.check_payload(torch.zeros(66, dtype=torch.uint8), fmt, row_numel=128, rows=1)
    with pytest.raises(PayloadError, match=r"66 elements of torch\.int8"):
        arithmetic.check_payload(torch.zeros(66, dtype=torch.int8), fmt, row_numel=128, rows=1)
