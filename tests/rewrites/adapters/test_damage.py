"""Folders of adapters of any damage: typed errors, and the model stays as it is."""

from __future__ import annotations

import contextlib
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import rfcompile as rf
from rfcompile.errors import RFCompileError, StateError
from rfcompile.rewrites.adapters.storage import load_adapters, save_adapters
from tests.rewrites.models import made, moved

safetensors = pytest.importorskip("safetensors")
save_file: Callable[..., None] = pytest.importorskip("safetensors.torch").save_file
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
KINDS = ("plain", "dora", "kmeans", "wire")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {}
    for kind in KINDS:
        model = rf.transform(made(), rf.Adapters(4, dora=kind == "dora", sine=kind == "kmeans"))
        moved(model, seed=0)
        if kind in ("kmeans", "wire"):
            model = rf.adapters.quantize(model, 4, codebook=kind)
        found[kind] = save_adapters(model, tmp_path_factory.mktemp(kind))
    return found


def contents(folder: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safetensors.safe_open(str(folder / WEIGHTS), framework="pt") as file:
        names = list(file.keys())
        return {name: file.get_tensor(name) for name in names}, dict(file.metadata())


def refused(folder: Path) -> RFCompileError:
    with pytest.raises(RFCompileError) as caught:
        load_adapters(made(), folder)
    return caught.value


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_was_cut_is_refused(
    kind: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    data = (folders[kind] / WEIGHTS).read_bytes()
    shutil.copy(folders[kind] / CONFIG, tmp_path)
    for size in (0, 1, 7, 8, 9, 100, len(data) // 2, len(data) - 1):
        (tmp_path / WEIGHTS).write_bytes(data[:size])
        assert isinstance(refused(tmp_path), StateError)


CONFIGS = [
    b"", b"{", b"[]", b"3", b"null", b'"LORA"', b"\xff\xfe\x00", b"[" * 100_000, b"{}",
    b'{"peft_type": "LORA"}', b'{"peft_type": ["LORA"]}',
    b'{"peft_type": "LORA", "r": true, "lora_alpha": 1}',
    b'{"peft_type": "LORA", "r": NaN, "lora_alpha": 1}',
    b'{"peft_type": "LORA", "r": 1, "lora_alpha": 1e999}',
    b'{"peft_type": "LORA", "r": 1e300, "lora_alpha": 1e-300}',
    b'{"peft_type": "LORA", "r": ' + b"9" * 4000 + b', "lora_alpha": 1}',
    b'{"peft_type": "LORA", "r": ' + b"9" * 9000 + b', "lora_alpha": 1}',
    b'{"peft_type": "LORA", "r": 4, "lora_alpha": 4, "init_lora_weights": [1]}',
]  # fmt: skip


@pytest.mark.parametrize("config", CONFIGS, ids=[str(c)[:40] for c in CONFIGS])
def test_a_damaged_configuration_is_refused(
    config: bytes, folders: dict[str, Path], tmp_path: Path
) -> None:
    tensors, _ = contents(folders["plain"])
    save_file(tensors, str(tmp_path / WEIGHTS))  # as PEFT writes it
    (tmp_path / CONFIG).write_bytes(config)
    refused(tmp_path)


ODD: list[Any] = [
    None, -1, 0, True, 1.5, "x", "4b", "", [], [1], {}, [[]], 2**31, 10**400, float("inf"),
    ["4b:g64", 10**9, 10**9], [4.0, 8, 8], [True, 8, 8], [9, 8, 8], ["9b", 8, 8], [4, -8, 8],
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_description_is_refused(
    kind: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    tensors, metadata = contents(folders[kind])
    described = json.loads(metadata["rfcompile"])
    path = next(iter(described))
    for field in range(5):
        for value in ODD:
            entry = list(described[path])
            is_whole = value == entry[field] or (field < 2 and value in (1.5, 2**31))
            is_whole |= field == 0 and value is None
            is_whole |= field in (2, 3) and kind in ("plain", "dora") and value == []
            if is_whole:  # other numbers are not damage
                continue
            entry[field] = value
            text = json.dumps({**described, path: entry})
            save_file(tensors, str(tmp_path / WEIGHTS), metadata={"rfcompile": text})
            refused(tmp_path)
    for text in ("", "[", "[]", "1", "[" * 100_000, json.dumps({**described, "../../x": entry})):
        save_file(tensors, str(tmp_path / WEIGHTS), metadata={"rfcompile": text})
        refused(tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_of_another_kind_are_refused(
    kind: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    tensors, metadata = contents(folders[kind])
    changes: list[Callable[[Tensor], Tensor]] = [
        lambda x: x.to(torch.int32),
        lambda x: x.to(torch.complex64),
        lambda x: x[:-1],
        lambda x: x.flatten()[:0],
        lambda x: x[None],
        lambda x: torch.zeros(()),
    ]
    for name, tensor in list(tensors.items())[:4]:
        for change in changes:
            odd = {**tensors, name: change(tensor).contiguous()}
            if name.endswith("levels") and odd[name].shape == tensor[:-1].shape:
                odd[name] = tensor[:1].clone()  # codes beyond their levels
            save_file(odd, str(tmp_path / WEIGHTS), metadata=metadata)
            refused(tmp_path)
        fewer = {key: value for key, value in tensors.items() if key != name}
        save_file(fewer, str(tmp_path / WEIGHTS), metadata=metadata)
        refused(tmp_path)
    for name in (
        "base_model.model.../../up.lora_A.weight",
        "up",
        "base_model.model..lora_B.weight",
    ):
        odd = {**tensors, name: torch.zeros(4, 4)}
        save_file(odd, str(tmp_path / WEIGHTS), metadata=metadata)
        refused(tmp_path)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_codebook_is_finite(bad: float, folders: dict[str, Path], tmp_path: Path) -> None:
    tensors, metadata = contents(folders["kmeans"])
    name = next(name for name in tensors if name.endswith("levels"))
    tensors[name][0] = bad
    save_file(tensors, str(tmp_path / WEIGHTS), metadata=metadata)
    assert "NaN or Inf among levels" in str(refused(tmp_path))


@pytest.mark.parametrize("kind", KINDS)
def test_flipped_bytes_of_the_header_never_raise_another_error(
    kind: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    data = (folders[kind] / WEIGHTS).read_bytes()
    length = int.from_bytes(data[:8], "little")
    rng = random.Random(0)
    for _ in range(60):
        damaged = bytearray(data)
        for _ in range(rng.randint(1, 3)):
            damaged[rng.randrange(8 + length)] = rng.randrange(256)
        (tmp_path / WEIGHTS).write_bytes(damaged)
        shutil.copy(folders[kind] / CONFIG, tmp_path)
        with contextlib.suppress(RFCompileError):  # a changed digit of omega is another omega
            load_adapters(made(), tmp_path)
