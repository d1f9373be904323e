"""Saves and loads adapters: PEFT's folders and names, and packed codes of quantized ones."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from rfcompile.errors import MissingPackageError, OptionError, StateError
from rfcompile.graph.capture import Inputs
from rfcompile.graph.models import without_wrappers
from rfcompile.rewrites.adapters.codebooks import BITS, unpack_codes
from rfcompile.rewrites.adapters.factor import AnyFactor, CodebookFactor, Factor, WireFactor
from rfcompile.rewrites.adapters.linear import AdaptedLinear, adapters_of
from rfcompile.rewrites.adapters.rewrite import AdapterReport, NewAdapter, attach, refuse_adapted
from rfcompile.rewrites.low_rank.targets import find_linears, is_linear, matrix_of
from rfcompile.rewrites.protocol import rewritten
from rfcompile.wire.together import together

T = TypeVar("T")
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

    Of adapters that FSDP has sharded all ranks of their mesh must call: they gather the tensors,
    and the first of these ranks writes. An error of one rank is raised on all.

    Raises:
        OptionError: no adapters, or adapters on several meshes. MissingPackageError: no
        safetensors. PeerError: another rank could not write. TransportError: a rank is not there.
    """
    found = adapters_of(model, may_be_sharded=True)
    tensors = {
        f"{_PREFIX}{path}.{name}": value
        for path, module in found.items()
        for name, value in _tensors_of(module).items()
    }
    mesh = _mesh_of(tensors)
    safetensors = _together(mesh, _safetensors)
    whole = {name: _gathered(value) for name, value in tensors.items()}
    target = Path(folder)

    def write() -> None:
        target.mkdir(parents=True, exist_ok=True)
        described = json.dumps(_all_described(found), separators=(",", ":"))
        metadata = {"format": "pt", "rfcompile": described}
        safetensors.torch.save_file(whole, str(target / WEIGHTS), metadata=metadata)
        (target / CONFIG).write_text(json.dumps(_peft_config(found), indent=2), encoding="utf-8")

    is_first = mesh is None or not any(mesh.get_coordinate() or ())
    _together(mesh, write if is_first else lambda: None)
    return target


def _tensors_of(module: AdaptedLinear) -> dict[str, Tensor]:
    # FSDP shards a module that it left whole after its forward when its state_dict is asked for.
    found = {
        f"{name}.{key}": value
        for name in _FACTORS
        for key, value in getattr(module, name).state_dict().items()
    }
    magnitude = module.lora_magnitude
    return found if magnitude is None else found | {_MAGNITUDE: magnitude.detach()}


def _mesh_of(tensors: Mapping[str, Tensor]) -> DeviceMesh | None:
    """The mesh of the ranks that have parts of the tensors; None if every rank has all of them."""
    meshes = {value.device_mesh for value in tensors.values() if isinstance(value, DTensor)}
    if len(meshes) > 1:
        rule = "its adapters lie on several meshes: gather their full_tensor() first."
        raise OptionError("model", str(meshes), rule)
    return meshes.pop() if meshes else None


def _gathered(value: Tensor) -> Tensor:
    return (value.full_tensor() if isinstance(value, DTensor) else value).contiguous()


def _together(mesh: DeviceMesh | None, action: Callable[[], T]) -> T:
    """:func:`~rfcompile.wire.together.together` for all ranks of a mesh."""
    for dim in range(mesh.ndim if mesh is not None else 0):
        assert mesh is not None
        action = partial(together, mesh.get_group(dim), "save_adapters", action)
    return action()


def _all_described(found: Mapping[str, AdaptedLinear]) -> dict[str, list[Any]]:
    return {
        path: [
            module.omega,
            module.gain,
            *(_described(module, name) for name in _FACTORS),
            module.lora_magnitude is not None,
        ]
        for path, module in found.items()
    }


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
    adapters, wrote to a folder; as :class:`~rfcompile.Adapters` otherwise.

    They compute in the dtype of the weights that they are added to.

    Raises:
        StateError: a damaged file; tensors that fit no linear of the model, are of another shape or
        dtype, are missing or too many. OptionError: a configuration of PEFT that is not plain LoRA
        or DoRA with one rank; a graph; as :class:`~rfcompile.Adapters`. MissingPackageError:
        safetensors is not installed. FileNotFoundError.
    """
    safetensors = _safetensors()
    place = Path(folder) / WEIGHTS
    try:
        with safetensors.safe_open(str(place), framework="pt") as file:
            metadata = file.metadata() or {}
            names = file.keys()
            tensors = {name.removeprefix(_PREFIX): file.get_tensor(name) for name in names}
        paths = dict.fromkeys(name.partition(".lora_")[0] for name in tensors)
        if "rfcompile" in metadata:
            described = _checked(_parsed(metadata["rfcompile"]))
        else:
            config = _parsed((Path(folder) / CONFIG).read_bytes())
            described = _of_peft(paths, config)
    except (safetensors.SafetensorError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise StateError("a damaged file", [str(place)], f"({error}) Save it anew.") from error
    if described.keys() != paths.keys():
        odd = sorted(described.keys() ^ paths.keys())
        raise StateError("tensors and their description differ", odd, "Save them anew.")
    return rewritten(model, [_Stored(described, tensors)])


def _parsed(text: str | bytes) -> Any:
    """JSON of any damage.

    Raises:
        JSONDecodeError, UnicodeDecodeError.
    """
    try:
        return json.loads(text)
    except (RecursionError, ValueError) as error:  # too deep, or numbers of too many digits
        if isinstance(error, json.JSONDecodeError | UnicodeDecodeError):
            raise
        raise json.JSONDecodeError(str(error) or type(error).__name__, "", 0) from error


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
        raise OptionError("model", type(gm).__name__, "load adapters into the module.")

    def _adapter(self, path: str, matrix: Tensor) -> NewAdapter:
        omega, gain, of_a, of_b, has_magnitude = self.described[path]
        found = {n: t for n, t in self.tensors.items() if n.startswith(f"{path}.lora_")}
        a, b = (
            _factor(f"{path}.{name}", how, found, matrix)
            for name, how in zip(_FACTORS, (of_a, of_b), strict=True)
        )
        shapes = [tuple(factor().shape) for factor in (b, a)]
        (outputs, rank), (other, inputs) = shapes
        if (outputs, inputs) != tuple(matrix.shape) or rank != other:
            rule = f"The linear is {tuple(matrix.shape)}, B and A are {shapes}: another model's."
            raise StateError("adapters of another shape", [path], rule)
        magnitude = None
        if has_magnitude:
            magnitude = _taken(found, f"{path}.{_MAGNITUDE}", matrix.dtype, (outputs,)).to(matrix)
        if found:
            rule = "No adapter here has them; merge such adapters where they were made."
            raise StateError("tensors of an adapter that would be left out", list(found), rule)
        return NewAdapter(b, a, omega, gain, magnitude)


def _factor(name: str, described: list[Any], found: dict[str, Tensor], like: Tensor) -> AnyFactor:
    factor: AnyFactor
    if not described:
        return Factor(_taken(found, f"{name}.weight", like.dtype, (None, None)).to(like))
    how, rows, columns = described
    size = (rows, columns)
    if isinstance(how, str):
        payload = _taken(found, f"{name}.payload", torch.uint8, (None,))
        factor = WireFactor(payload, how, size, like.dtype)
    else:
        number = (rows * columns * how + 7) // 8
        codes = _taken(found, f"{name}.codes", torch.uint8, (number,))
        levels = _taken(found, f"{name}.levels", torch.float32, (None,)).float()
        if not bool(levels.isfinite().all()):
            raise StateError("NaN or Inf among levels", [f"{name}.levels"], "Save them anew.")
        if rows * columns and int(unpack_codes(codes, how, rows * columns).max()) >= len(levels):
            raise StateError("codes beyond their levels", [f"{name}.codes"], "Save them anew.")
        factor = CodebookFactor(codes, levels, how, size, like.dtype)
    return factor.to(like.device)


def _taken(
    found: dict[str, Tensor], name: str, dtype: torch.dtype, shape: tuple[int | None, ...]
) -> Tensor:
    """A tensor out of ``found``; None in ``shape`` is any size, a floating dtype any other."""
    if name not in found:
        raise StateError("missing tensors of an adapter", [name], "Save them anew.")
    tensor = found.pop(name)
    fits = len(tensor.shape) == len(shape)
    fits &= all(want in (None, size) for want, size in zip(shape, tensor.shape, strict=False))
    are_floating = tensor.dtype.is_floating_point and dtype.is_floating_point
    if not fits or not (are_floating or tensor.dtype == dtype):
        wanted = "x".join("n" if size is None else str(size) for size in shape)
        rule = f"It is {tensor.dtype} {list(tensor.shape)}, not {dtype} of {wanted}. Save it anew."
        raise StateError("a tensor of another shape or dtype", [name], rule)
    return tensor


def _checked(described: Any) -> dict[str, list[Any]]:
    """The description that :func:`save_adapters` wrote.

    Raises:
        StateError: it is none.
    """

    def is_factor(how: Any) -> bool:
        if how == []:
            return True
        if not isinstance(how, list) or len(how) != 3:
            return False
        is_kind = isinstance(how[0], str) or (type(how[0]) is int and how[0] in BITS)
        return is_kind and all(type(size) is int and 0 <= size < 2**31 for size in how[1:])

    def fits(entry: Any) -> bool:
        return (
            isinstance(entry, list)
            and len(entry) == 5
            and (entry[0] is None or _is_positive(entry[0]))
            and _is_positive(entry[1])
            and is_factor(entry[2])
            and is_factor(entry[3])
            and isinstance(entry[4], bool)
        )

    if not isinstance(described, dict):
        raise StateError("no description of adapters", [WEIGHTS], "Save them anew.")
    if odd := [path for path, entry in described.items() if not fits(entry)]:
        raise StateError("damaged descriptions of adapters", odd, "Save them anew.")
    return described


def _is_positive(value: Any) -> bool:
    """A positive number that a float can hold."""
    return type(value) in (int, float) and 0 < value <= sys.float_info.max


def _of_peft(paths: Mapping[str, None], config: Any) -> dict[str, list[Any]]:
    if not isinstance(config, dict):
        raise StateError("no configuration of adapters", [CONFIG], "Save them anew.")
    kind = config.get("peft_type")
    if kind != "LORA":
        raise OptionError("peft_type", kind, "plain LoRA and DoRA can be loaded, nothing else.")
    unusual = [k for k in ("rank_pattern", "alpha_pattern", "use_rslora") if config.get(k)]
    if unusual or config.get("bias", "none") != "none":
        names = ", ".join(unusual or ["bias"])
        raise OptionError(names, "set", "merge such adapters with PEFT and load the merged model.")
    start = config.get("init_lora_weights", True)
    if start not in (True, False, "gaussian", "eva", "orthogonal"):
        rule = "it changed the weights, too: convert it with PEFT to plain LoRA, or merge it there."
        raise OptionError("init_lora_weights", start, rule)
    for name in ("r", "lora_alpha"):
        value = config.get(name)
        if not _is_positive(value):
            raise OptionError(name, value, f"{CONFIG} needs a positive number.")
    gain = config["r"] / config["lora_alpha"]
    if not _is_positive(gain):
        rule = f"{CONFIG} needs numbers whose ratio is one."
        raise OptionError("r / lora_alpha", gain, rule)
    return {path: [None, gain, [], [], bool(config.get("use_dora"))] for path in paths}


def _safetensors() -> ModuleType:
    try:
        import safetensors
        import safetensors.torch
    except ImportError as error:
        raise MissingPackageError("safetensors", "adapters") from error
    return safetensors
