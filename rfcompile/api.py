"""What users call on whole models: transform and diff; and the codec on any tensor."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, fx, nn
from torch._dynamo import OptimizedModule
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from rfcompile import codec, ops
from rfcompile.boundaries import Boundaries, find_boundaries
from rfcompile.capture import capture, inputs_of
from rfcompile.diff import Graph, GraphDiff
from rfcompile.diff import diff as diff_graphs
from rfcompile.errors import CaptureError, PolicyError, RFCompileWarning
from rfcompile.fake_wire import FakeWire
from rfcompile.formats import QuantFormat, as_format
from rfcompile.passes import boundary_pipeline, wire_pipeline
from rfcompile.passes.find_collectives import find_collectives
from rfcompile.pipeline import Record, run
from rfcompile.policy import Policy
from rfcompile.report import Report

ModuleT = TypeVar("ModuleT", bound=nn.Module)

# ---- the codec -------------------------------------------------------------------------------


def quantize(x: Tensor, fmt: QuantFormat | str | int, *, seed: int = 0) -> Tensor:
    """Code a tensor: its payload, uint8 ``[fmt.payload_bytes(x.numel())]``.

    Args:
        x: float32, bfloat16 or float16, any shape and stride.
        fmt: a :class:`~rfcompile.QuantFormat` (formula and error bound there), bits, or its text.
        seed: added to the format's seed; matters for stochastic rounding only.

    Raises:
        DtypeError, FormatError; NonFiniteError with ``nonfinite="raise"``.
    """
    ops.check_codec_input(x)
    format = _required(fmt)
    payload = ops.quantize(x.reshape(1, -1) if x.numel() else x.reshape(1, 0), format.spec, seed)
    if format.nonfinite == "raise":
        payload = ops.require_finite(payload, ops.nonfinite_flag(x), "quantize")
    return payload.reshape(-1)


def dequantize(
    payload: Tensor,
    fmt: QuantFormat | str | int,
    shape: Sequence[int],
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Decode what :func:`quantize` returned for a tensor of ``shape``.

    Raises:
        PayloadError: the payload's length or dtype does not fit the format and shape.
        DtypeError, FormatError.
    """
    format = _required(fmt)
    numel = math.prod(shape)
    codec.check_payload(payload, format, numel, 1)
    ops.check_codec_output(dtype)
    values = ops.dequantize(payload.reshape(1, -1), format.spec, dtype)
    return values.narrow(1, 0, numel).reshape(tuple(shape))


def _required(fmt: QuantFormat | str | int) -> QuantFormat:
    format = as_format(fmt)
    if format is None:
        raise PolicyError("fmt", fmt, "give a format; there is no payload of an exact tensor.")
    return format


# ---- transform -------------------------------------------------------------------------------


def transform(
    model: nn.Module,
    bits: int | None = None,
    *,
    example_inputs: Any = None,
    residual: str = "keep",
    boundaries: Boundaries = "auto",
    policy: Policy | None = None,
) -> nn.Module:
    """A model like ``model`` whose traffic is quantized; ``model`` itself stays as it is.

    The new model shares every parameter and buffer with the old one, has the same state_dict names,
    and trains, copies, compiles and exports like it.

    - A model with collectives (DTensor parameters) gets them quantized when it is called: it is
      compiled with backend "rfquant". (A copy of it is not: torch drops what ``Module.compile``
      sets. Transform the copy.)
    - Any other gets a fake wire at its boundaries: what leaves a boundary is quantized and
      dequantized at once, and so is the gradient that comes back. It shows on one machine what the
      wire would do.
    - An ``fx.GraphModule`` is rewritten as a graph, in the same two ways.

    Args:
        bits: bits an element for all traffic; or give a ``policy``.
        example_inputs: used for an ``fx.GraphModule`` without shapes in its metadata only: a tuple
            of arguments or an (args, kwargs) pair.
        residual: "keep". Other values come with the next release.
        boundaries: see :func:`~rfcompile.boundaries.find_boundaries`.

    Raises:
        PolicyError, FormatError: options. BoundaryError: nowhere to put the wire. CaptureError: the
        model cannot be copied, or the graph has no shapes. NotImplementedError: ``residual`` other
        than "keep". And when the new model is called, DtypeError: what leaves a boundary is neither
        float32, bfloat16 nor float16.
    """
    wanted = policy_of(bits, policy)
    check_module(model)
    if residual != "keep":
        raise NotImplementedError(
            f"residual={residual!r}: rewriting a model without its residual connections comes with "
            "rfcompile 0.2; use residual='keep'."
        )
    if isinstance(model, fx.GraphModule):
        return rewrite_graph(model, wanted, boundaries, example_inputs).gm
    twin = _twin(model)
    inner = uncompiled(twin)
    if has_collectives(inner):
        if boundaries != "auto":
            warnings.warn(
                f"boundaries={boundaries!r} has no effect on a model with collectives: these are "
                "its boundaries.",
                RFCompileWarning,
                stacklevel=2,
            )
        if inner is not twin:  # its names start with _orig_mod, and go on doing so
            return cast(nn.Module, torch.compile(inner, **_compiler(wanted)))
        _compile_in_place(twin, wanted)
        return twin
    for module in twin.modules():
        for key, hook in list(module._forward_hooks.items()):
            if isinstance(hook, FakeWire):
                del module._forward_hooks[key]
    for path, module in find_boundaries(inner, boundaries).items():
        module.register_forward_hook(FakeWire(path, wanted))
    return twin


def _compiler(policy: Policy) -> dict[str, Any]:
    return {"backend": "rfquant", "options": {"policy": policy}}


def _compile_in_place(module: nn.Module, policy: Policy) -> None:
    """``module.compile``, but in one graph also if the module is torch's own (a Sequential).

    Dynamo starts at no frame of torch.nn, only further in, at those of the user's modules.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        return module._call_impl(*args, **kwargs)

    module._compiled_call_impl = torch.compile(call, **_compiler(policy))


def policy_of(bits: int | None, policy: Policy | None) -> Policy:
    """The policy that ``bits`` or ``policy`` stands for."""
    if policy is not None and bits is not None:
        raise PolicyError("bits", bits, "give bits or a policy, not both.")
    if policy is None and bits is None:
        raise PolicyError("bits", None, "give bits (2, 3, 4, 5, 6 or 8) or a policy.")
    return policy if policy is not None else Policy.of(bits=bits, min_bytes=0)


def check_module(model: object) -> None:
    if not isinstance(model, nn.Module):
        rule = "give a torch.nn.Module or fx.GraphModule; an ExportedProgram has one, .module()."
        raise PolicyError("model", model, rule)


def _twin(model: ModuleT) -> ModuleT:
    """A copy of the modules that shares their tensors."""
    tensors = [*model.parameters(), *model.buffers()]
    # torch does not copy what has a history, such as the weight that an old weight_norm computed.
    held = [value for module in model.modules() for value in vars(module).values()]
    tensors += [value for value in held if isinstance(value, Tensor) and not value.is_leaf]
    with warnings.catch_warnings():
        # An exported module holds a structure of torch whose own copying warns.
        warnings.filterwarnings("ignore", ".*LeafSpec", FutureWarning)
        try:
            return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
        except Exception as error:
            raise CaptureError(
                f"{type(model).__name__} cannot be copied: {error}. transform changes a copy of "
                "the modules: set what cannot be copied after it, or give its class a __deepcopy__."
            ) from error


def uncompiled(model: nn.Module) -> nn.Module:
    """The module inside what ``torch.compile`` returned."""
    while isinstance(model, OptimizedModule):
        model = model._orig_mod
    return model


def has_collectives(model: nn.Module) -> bool:
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def rewrite_graph(
    gm: fx.GraphModule, policy: Policy, boundaries: Boundaries, example_inputs: Any
) -> Record:
    """:func:`transform` for a graph, with the record of what was done."""
    gm = with_shapes(gm, example_inputs)
    if _has_shapes(gm) and find_collectives(gm):
        return run(gm, wire_pipeline(policy, "forward"))
    if callable(boundaries) or (isinstance(boundaries, str) and boundaries != "auto"):
        rule = "a graph has no modules to ask: use 'auto' or give the paths of the modules."
        raise PolicyError("boundaries", boundaries, rule)
    if isinstance(boundaries, str):
        return run(gm, boundary_pipeline(policy))
    return run(gm, boundary_pipeline(policy, tuple(boundaries)))


def with_shapes(gm: fx.GraphModule, example_inputs: Any) -> fx.GraphModule:
    """A copy of the graph, the same nodes with shapes, if it has them or there are inputs."""
    gm = _twin(gm)
    if example_inputs is not None and not _has_shapes(gm):
        _propagate_shapes(gm, example_inputs)
    return gm


def _has_shapes(gm: fx.GraphModule) -> bool:
    return any("val" in node.meta or "example_value" in node.meta for node in gm.graph.nodes)


def _propagate_shapes(gm: fx.GraphModule, example_inputs: Any) -> None:
    args, kwargs = inputs_of(gm, example_inputs)
    placeholders = gm.graph.find_nodes(op="placeholder")
    # A placeholder's own argument is its default.
    later = [kwargs.get(str(node.target), *node.args) for node in placeholders[len(args) :]]
    try:
        FakeTensorProp(gm, FakeTensorMode(allow_non_fake_inputs=True)).propagate(*args, *later)
    except Exception as error:
        raise CaptureError(
            f"the graph does not run on example_inputs: {error}. Its inputs are "
            f"{', '.join(str(node.target) for node in placeholders)}."
        ) from error


# ---- diff --------------------------------------------------------------------------------------


def diff(
    before: Graph | nn.Module | Report,
    after: Graph | nn.Module | None = None,
    *,
    example_inputs: Any = None,
) -> GraphDiff:
    """What changed between two graphs; ``print`` it, or take ``.html()`` or ``.json()``.

    Args:
        before, after: modules (captured with ``torch.export``), graphs, graph texts; or one
            :class:`~rfcompile.Report` of a compiled model, which holds both sides.
        example_inputs: for modules, as in :func:`~rfcompile.capture.inputs_of`.

    Raises:
        CaptureError: a module cannot be captured.
    """
    if isinstance(before, Report):
        if after is not None or not before.graphs:
            raise CaptureError(
                "a report is compared with itself and must hold graphs: pass one report of a "
                "compiled model, such as rfcompile.reports()[-1]."
            )
        return diff_graphs(
            "\n\n".join(graph.before for graph in before.graphs),
            "\n\n".join(graph.after for graph in before.graphs),
        )
    if after is None:
        raise CaptureError("diff needs two graphs: diff(before, after), or one report.")
    return diff_graphs(_graph(before, example_inputs), _graph(after, example_inputs))


def _graph(value: Graph | nn.Module, example_inputs: Any) -> Graph:
    return capture(value, example_inputs) if isinstance(value, nn.Module) else value
