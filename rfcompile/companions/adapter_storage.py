"""Adapters in files: PEFT's folder and names, and the packed codes of quantized ones."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from rfcompile.companions.adapted_linear import AdaptedLinear, adapted
from rfcompile.companions.adapters import Adapters
from rfcompile.companions.factor import AnyFactor, CodebookFactor, Factor, WireFactor
from rfcompile.errors import MissingPackageError, PolicyError, StateError
from rfcompile.models import uncompiled, without_wrappers
from rfcompile.rewrites import rewritten

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
_PREFIX = "base_model.model."
_FACTORS = ("lora_A", "lora_B")


def save_adapters(model: nn.Module, folder: str | Path) -> Path:
    """Write the adapters of ``model``, and nothing else of it, to a folder; returns the folder.

    ``adapter_model.safetensors`` has the tensors ``base_model.model.<path>.lora_A.weight`` and so
    on, or, of quantized adapters, ``.codes`` and ``.levels`` or ``.payload``: ``numel * bits / 8``
    bytes and a codebook for each factor, and a header. ``adapter_config.json`` is PEFT's: plain
    adapters that are not quantized load there. For others it names a type that PEFT does not have,
    so that it refuses them.

    Raises:
        PolicyError: no adapters. MissingPackageError: safetensors is not installed.
    """
    safetensors = _safetensors()
    inner = uncompiled(model)
    with without_wrappers(inner):
        found = adapted(inner)
    if not found:
        name = type(inner).__name__
        raise PolicyError("model", name, "it has no adapters: add_adapters(model) first.")
    tensors: dict[str, Tensor] = {}
    modules: dict[str, Any] = {}
    for path, module in found.items():
        for name in _FACTORS:
            factor: AnyFactor = getattr(module, name)
            for key, value in factor.state_dict().items():
                tensors[f"{_PREFIX}{path}.{name}.{key}"] = value.contiguous()
        if module.lora_magnitude is not None:
            tensors[f"{_PREFIX}{path}.lora_magnitude_vector"] = module.lora_magnitude.detach()
        modules[path] = [module.omega, module.gain, *(_described(module, n) for n in _FACTORS)]
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    described = json.dumps(modules, separators=(",", ":"))
    metadata = {"format": "pt", "rfcompile": described}
    safetensors.save_file(tensors, str(target / WEIGHTS), metadata=metadata)
    (target / CONFIG).write_text(json.dumps(_peft_config(found), indent=2), encoding="utf-8")
    return target


def _described(module: AdaptedLinear, name: str) -> list[Any]:
    """What of a factor is not in its tensors."""
    factor = getattr(module, name)
    if isinstance(factor, Factor):
        return []
    dtype = str(factor.dtype).removeprefix("torch.")
    if isinstance(factor, WireFactor):
        return [factor.format, *factor.shape, dtype]
    return [factor.bits, *factor.shape, dtype]


def _peft_config(found: Mapping[str, AdaptedLinear]) -> dict[str, Any]:
    first = next(iter(found.values()))
    rank = first.lora_A().shape[0]
    is_plain = all(
        m.omega is None and isinstance(m.lora_A, Factor) and isinstance(m.lora_B, Factor)
        for m in found.values()
    )
    return {
        "peft_type": "LORA" if is_plain else "RFCOMPILE_LORA",
        "base_model_name_or_path": None,
        "r": rank,
        "lora_alpha": rank / first.gain if first.omega is None else None,
        "target_modules": list(found),
        "fan_in_fan_out": first.is_transposed,
        "use_dora": first.lora_magnitude is not None,
        "bias": "none",
        "task_type": None,
    }


def load_adapters(model: nn.Module, folder: str | Path) -> nn.Module:
    """A model like ``model`` with the adapters that :func:`save_adapters`, or PEFT for plain
    adapters, wrote to a folder; as :func:`~rfcompile.add_adapters` otherwise.

    Raises:
        StateError: tensors that fit no linear of the model, or do not make up adapters.
        PolicyError: a configuration of PEFT that is not plain LoRA or DoRA with one rank.
        MissingPackageError: safetensors is not installed.
    """
    safetensors = _safetensors()
    with safetensors.safe_open(str(Path(folder) / WEIGHTS), framework="pt") as file:
        metadata = file.metadata() or {}
        stored = {key.removeprefix(_PREFIX): file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    paths = dict.fromkeys(key.partition(".lora_")[0] for key in stored)
    if "rfcompile" in metadata:
        modules = json.loads(metadata["rfcompile"])
    else:
        modules = _of_peft(paths, json.loads((Path(folder) / CONFIG).read_text(encoding="utf-8")))
    known = dict(uncompiled(model).named_modules())
    strangers = [path for path in paths if path not in known or path not in modules]
    if strangers or not paths:
        raise StateError("adapters of no module here", strangers, "Load them into their own model.")
    dora = any(key.endswith(".lora_magnitude_vector") for key in stored)
    twin = rewritten(model, [Adapters(1, modules=lambda path, _: path in paths, dora=dora)])
    inner = uncompiled(twin)
    with without_wrappers(inner):
        found = adapted(inner)
    for path in paths:
        _load(path, found.get(path), modules[path], stored)
    return twin


def _load(
    path: str, module: AdaptedLinear | None, described: list[Any], stored: Mapping[str, Tensor]
) -> None:
    mine = {
        key[len(path) + 1 :]: value for key, value in stored.items() if key.startswith(f"{path}.")
    }
    if module is None:
        raise StateError("adapters of what is no linear", [path], "Load them into their own model.")
    base = module.base()
    try:
        made = [_factor(name, mine, how) for name, how in zip(_FACTORS, described[2:], strict=True)]
        shapes = [tuple(factor().shape) for factor in made]
    except KeyError as error:
        rule = "Save them anew with save_adapters."
        raise StateError(
            "tensors of an adapter are missing", [f"{path}.{error.args[0]}"], rule
        ) from error
    (rank, inputs), (outputs, other) = shapes
    if (outputs, inputs) != tuple(base.shape) or rank != other:
        rule = f"The linear is {tuple(base.shape)}, the factors are {shapes}: it is another model."
        raise StateError("adapters of another shape", [path], rule)
    module.omega, module.gain = described[0], described[1]
    for factor in made:  # computed in the dtype of the weight; codes and levels stay as they are
        factor.to(base.device)
        if isinstance(factor, Factor):
            factor.to(base.dtype)
        else:
            factor.dtype = base.dtype
    module.lora_A, module.lora_B = made
    if module.lora_magnitude is not None:
        magnitude = mine["lora_magnitude_vector"].to(base)
        module.lora_magnitude = nn.Parameter(magnitude)


def _factor(name: str, mine: Mapping[str, Tensor], described: list[Any]) -> AnyFactor:
    if not described:
        return Factor(mine[f"{name}.weight"])
    how, rows, columns, dtype_name = described
    dtype = getattr(torch, dtype_name)
    if isinstance(how, str):
        return WireFactor(mine[f"{name}.payload"], how, (rows, columns), dtype)
    codes, levels = mine[f"{name}.codes"], mine[f"{name}.levels"]
    return CodebookFactor(codes, levels, how, (rows, columns), dtype)


def _of_peft(paths: Mapping[str, None], config: Mapping[str, Any]) -> dict[str, list[Any]]:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise PolicyError("peft_type", kind, "plain LoRA and DoRA can be loaded, nothing else.")
    unusual = [k for k in ("rank_pattern", "alpha_pattern", "use_rslora") if config.get(k)]
    if unusual or config.get("bias", "none") != "none":
        names = ", ".join(unusual or ["bias"])
        raise PolicyError(names, "set", "merge such adapters with PEFT and load the merged model.")
    gain = config["r"] / config["lora_alpha"]
    return {path: [None, gain, [], []] for path in paths}


def _safetensors() -> ModuleType:
    try:
        import safetensors
        import safetensors.torch
    except ImportError as error:
        raise MissingPackageError("safetensors", "adapters") from error
    module = safetensors.torch
    module.safe_open = safetensors.safe_open  # type: ignore[attr-defined]
    return module
