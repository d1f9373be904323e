"""Adapters in files: PEFT's folder and names, and the packed codes of quantized ones."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, fx, nn

from rfcompile.capture import Inputs
from rfcompile.companions.adapted_linear import AdaptedLinear, adapters_of
from rfcompile.companions.adapters import AdapterReport, NewAdapter, attach, refuse_adapted
from rfcompile.companions.factor import AnyFactor, CodebookFactor, Factor, WireFactor
from rfcompile.companions.targets import find_linears, is_linear, matrix_of
from rfcompile.errors import MissingPackageError, PolicyError, StateError
from rfcompile.models import without_wrappers
from rfcompile.rewrites import rewritten

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
_PREFIX = "base_model.model."
_FACTORS = ("lora_A", "lora_B")
_MAGNITUDE = "lora_magnitude_vector"


def save_adapters(model: nn.Module, folder: str | Path) -> Path:
    """Write the adapters of ``model``, and nothing else of it, to a folder; returns the folder.

    ``adapter_model.safetensors`` has the tensors ``base_model.model.<path>.lora_A.weight`` and so
    on, or, of quantized adapters, ``.codes`` and ``.levels`` or ``.payload``: ``numel * bits / 8``
    bytes and a codebook for each factor, and a header. ``adapter_config.json`` is PEFT's: plain
    adapters that are not quantized load there. For others it names a type that PEFT does not have,
    so that it refuses them.

    Raises:
        PolicyError: no adapters, or sharded ones. MissingPackageError: no safetensors.
    """
    safetensors = _safetensors()
    found = adapters_of(model)
    tensors: dict[str, Tensor] = {}
    modules: dict[str, Any] = {}
    for path, module in found.items():
        for name in _FACTORS:
            factor: AnyFactor = getattr(module, name)
            for key, value in factor.state_dict().items():
                tensors[f"{_PREFIX}{path}.{name}.{key}"] = value.contiguous()
        if module.lora_magnitude is not None:
            tensors[f"{_PREFIX}{path}.{_MAGNITUDE}"] = module.lora_magnitude.detach()
        modules[path] = [module.omega, module.gain, *(_described(module, n) for n in _FACTORS)]
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    metadata = {"format": "pt", "rfcompile": json.dumps(modules, separators=(",", ":"))}
    safetensors.torch.save_file(tensors, str(target / WEIGHTS), metadata=metadata)
    (target / CONFIG).write_text(json.dumps(_peft_config(found), indent=2), encoding="utf-8")
    return target


def _described(module: AdaptedLinear, name: str) -> list[Any]:
    """What of a factor is not in its tensors."""
    factor = getattr(module, name)
    if isinstance(factor, Factor):
        return []
    how = factor.format if isinstance(factor, WireFactor) else factor.bits
    return [how, *factor.shape]


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

    They compute in the dtype of the weights that they are added to.

    Raises:
        StateError: tensors that fit no linear of the model, or do not make up adapters.
        PolicyError: a configuration of PEFT that is not plain LoRA or DoRA with one rank; a graph;
        as :func:`~rfcompile.add_adapters`. MissingPackageError: safetensors is not installed.
    """
    with _safetensors().safe_open(str(Path(folder) / WEIGHTS), framework="pt") as file:
        metadata = file.metadata() or {}
        names = file.keys()
        tensors = {name.removeprefix(_PREFIX): file.get_tensor(name) for name in names}
    paths = dict.fromkeys(name.partition(".lora_")[0] for name in tensors)
    if "rfcompile" in metadata:
        described = json.loads(metadata["rfcompile"])
    else:
        config = json.loads((Path(folder) / CONFIG).read_text(encoding="utf-8"))
        described = _of_peft(paths, config)
    if described.keys() != paths.keys():
        odd = sorted(described.keys() ^ paths.keys())
        raise StateError("tensors and their description differ", odd, "Save them anew.")
    return rewritten(model, [_Stored(described, tensors)])


@dataclass(frozen=True)
class _Stored:
    """The adapters of a file, as a change of a model."""

    described: Mapping[str, list[Any]]
    tensors: Mapping[str, Tensor]

    @property
    def keeps_parameters(self) -> bool:
        return True

    def on_module(self, model: nn.Module, inputs: Callable[[], Inputs]) -> AdapterReport:
        with without_wrappers(model), torch.no_grad():
            refuse_adapted(model)
            linears = {path for path, module in model.named_modules() if is_linear(module)}
            strangers = [path for path in self.described if path not in linears]
            if strangers or not self.described:
                rule = "Load them into the model that they were made for."
                raise StateError("adapters of no linear here", strangers, rule)
            found = find_linears(model, lambda path, _: path in self.described)
            new = {path: self._adapter(path, matrix_of(m)) for path, m in found.items()}
            return attach(model, found, new)

    def on_graph(self, gm: fx.GraphModule) -> AdapterReport:
        raise PolicyError("model", type(gm).__name__, "load adapters into the module.")

    def _adapter(self, path: str, matrix: Tensor) -> NewAdapter:
        omega, gain, *described = self.described[path]
        try:
            a, b = (
                self._factor(f"{path}.{name}", how, matrix)
                for name, how in zip(_FACTORS, described, strict=True)
            )
        except KeyError as error:
            rule = "Save them anew with save_adapters."
            raise StateError("missing tensors of an adapter", [str(error.args[0])], rule) from error
        shapes = [tuple(factor().shape) for factor in (b, a)]
        (outputs, rank), (other, inputs) = shapes
        if (outputs, inputs) != tuple(matrix.shape) or rank != other:
            rule = f"The linear is {tuple(matrix.shape)}, B and A are {shapes}: another model's."
            raise StateError("adapters of another shape", [path], rule)
        magnitude = self.tensors.get(f"{path}.{_MAGNITUDE}")
        return NewAdapter(b, a, omega, gain, None if magnitude is None else magnitude.to(matrix))

    def _factor(self, name: str, described: list[Any], like: Tensor) -> AnyFactor:
        factor: AnyFactor
        if not described:
            return Factor(self.tensors[f"{name}.weight"].to(like))
        how, rows, columns = described
        size = (rows, columns)
        if isinstance(how, str):
            factor = WireFactor(self.tensors[f"{name}.payload"], how, size, like.dtype)
        else:
            codes, levels = (self.tensors[f"{name}.{part}"] for part in ("codes", "levels"))
            factor = CodebookFactor(codes, levels, how, size, like.dtype)
        return factor.to(like.device)


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
    return safetensors
