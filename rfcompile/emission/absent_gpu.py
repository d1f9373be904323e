"""Lets torch and Triton find a GPU that is not there. Only in a process of its own: there is no way
back.

Inductor then writes kernels for that GPU, and Triton compiles them; nothing can run.

Private parts used here, run with torch 2.13.0 and Triton 3.7.1. torch:
``_dynamo.device_interface.{CudaInterface, get_interface_for_device,
register_interface_for_device}``, ``utils._triton`` (its caches),
``_inductor.runtime.hints.DeviceProperties.create`` (its cache),
``_inductor.runtime.triton_helpers.set_driver_to_gpu``,
``_inductor.config.use_static_triton_launcher``. Triton: ``runtime.driver.set_active``,
``backends.compiler.GPUTarget``, ``backends.driver.DriverBase``.
"""

from __future__ import annotations

from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch._dynamo import device_interface
from torch._inductor import config
from torch._inductor.runtime import triton_helpers
from torch._inductor.runtime.hints import DeviceProperties
from torch.utils import _triton

from rfcompile.emission.gpus import GPU
from rfcompile.errors import MissingPackageError

DEVICE = torch.device("cuda", 0)
"""What torch calls the GPU, an AMD one too."""


def check_triton() -> None:
    """Refuse to go on without Triton.

    Raises:
        MissingPackageError.
    """
    if find_spec("triton") is None:
        raise MissingPackageError("triton", "kernels")


def install(gpu: GPU) -> None:
    """Let torch and Triton of this process find ``gpu``, from now on."""
    import triton

    config.use_static_triton_launcher = False  # keeps the code
    if gpu.is_amd:
        torch.version.hip = "7.0.0"
        torch.version.cuda = None
    properties: Any = SimpleNamespace(**gpu.device_properties())
    interface = _interface(gpu, properties)
    device_interface.get_interface_for_device("cpu")  # registers the real ones, once
    for name in ("cuda", "cuda:0"):
        device_interface.register_interface_for_device(name, interface)
    torch.cuda.get_device_capability = lambda device=None: gpu.capability
    torch.cuda.get_device_properties = lambda device=None: properties
    torch.cuda.current_device = lambda: 0
    if not torch.backends.cuda.is_built():
        _replace_guarded_operators()
    triton.runtime.driver.set_active(_driver(gpu))
    triton_helpers.set_driver_to_gpu = lambda: None
    for cached in (*vars(_triton).values(), DeviceProperties.create):
        if hasattr(cached, "cache_clear"):
            cached.cache_clear()


def _replace_guarded_operators() -> None:
    """``~x``, ``x[...]``, ``x.copy_(y)`` on a GPU: their own code asks for a CUDA to be linked."""
    tensor: Any = Tensor
    get, copy = tensor.__getitem__, tensor.copy_

    def getitem(x: Tensor, index: Any) -> Any:
        return _indexed(x, index) if x.is_cuda else get(x, index)

    def copy_(x: Tensor, src: Tensor, non_blocking: bool = False) -> Any:
        call = torch.ops.aten.copy_.default if x.is_cuda else copy
        return call(x, src, non_blocking)

    tensor.__getitem__, tensor.copy_ = getitem, copy_
    tensor.__invert__ = lambda x: torch.bitwise_not(x)


def _indexed(x: Tensor, index: Any) -> Tensor:
    """``x[index]`` in views and one ``aten.index``."""
    parts = list(index) if isinstance(index, tuple) else [index]
    places = sum(part is not None and part is not Ellipsis for part in parts)
    if Ellipsis in [part for part in parts if not isinstance(part, Tensor)]:
        at = next(i for i, part in enumerate(parts) if part is Ellipsis)
        parts[at : at + 1] = [slice(None)] * (x.dim() - places)
    gathered: list[Tensor | None] = []
    for part in parts:
        dim = len(gathered)
        if isinstance(part, int):
            x = x.select(dim, part)
            continue
        if part is None:
            x = x.unsqueeze(dim)
        elif isinstance(part, slice):
            x = torch.ops.aten.slice.Tensor(x, dim, part.start, part.stop, part.step or 1)
        gathered.append(part if isinstance(part, Tensor) else None)
    if any(part is not None for part in gathered):
        x = torch.ops.aten.index.Tensor(x, gathered)
    return x


def _interface(gpu: GPU, properties: Any) -> type[Any]:
    major, minor = gpu.capability
    capability = gpu.target if gpu.is_amd else 10 * major + minor

    class AbsentInterface(device_interface.CudaInterface):
        class Worker(device_interface.CudaInterface.Worker):
            current_device = staticmethod(lambda: 0)
            get_device_properties = staticmethod(lambda device=None: properties)

        current_device = staticmethod(lambda: 0)
        device_count = staticmethod(lambda: 1)
        set_device = staticmethod(lambda device: None)
        exchange_device = staticmethod(lambda device: 0)
        maybe_exchange_device = staticmethod(lambda device: 0)
        synchronize = staticmethod(lambda device=None: None)
        get_raw_stream = staticmethod(lambda device: 0)
        get_device_properties = staticmethod(lambda device=None: properties)
        is_available = staticmethod(lambda: True)
        is_bf16_supported = staticmethod(lambda including_emulation=False: True)
        get_compute_capability = staticmethod(lambda device=None: capability)
        is_triton_capable = staticmethod(lambda device=None: True)
        raise_if_triton_unavailable = staticmethod(lambda device=None: None)

    return AbsentInterface


def _driver(gpu: GPU) -> Any:
    from triton.backends.compiler import GPUTarget
    from triton.backends.driver import DriverBase

    limits = {
        "max_shared_mem": gpu.shared_per_block,
        "multiprocessor_count": gpu.units,
        "warpSize": gpu.warp,
        "max_num_regs": gpu.registers,
    }
    major, minor = gpu.capability
    target = (
        GPUTarget("hip", gpu.target, gpu.warp)
        if gpu.is_amd
        else GPUTarget("cuda", 10 * major + minor, gpu.warp)
    )

    class AbsentDriver(DriverBase):  # type: ignore[misc]
        def __init__(self) -> None:
            self.utils = SimpleNamespace(get_device_properties=lambda device: limits)

        is_active = staticmethod(lambda: True)

        def map_python_to_cpp_type(self, ty: str) -> str:
            return ty

        def get_current_target(self) -> Any:
            return target

        def get_active_torch_device(self) -> torch.device:
            return DEVICE

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: object = None) -> int:
            return 0

        def get_benchmarker(self) -> Any:
            raise RuntimeError(f"{gpu.name} is not here: nothing can be measured on it")

    return AbsentDriver()
