"""What users call on whole models: transform, explain, diff; and the codec on any tensor."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from rfcompile import codec, journal, ops
from rfcompile.analysis import excess_kurtosis, sqnr_db
from rfcompile.boundaries import Boundaries, find_boundaries
from rfcompile.capture import capture, inputs_of
from rfcompile.diff import Graph, GraphDiff
from rfcompile.diff import diff as diff_graphs
from rfcompile.errors import CaptureError, PolicyError
from rfcompile.fake_wire import Crossing, FakeWire, round_trip, watch
from rfcompile.formats import QuantFormat, as_format
from rfcompile.graph import dtype_text
from rfcompile.passes import boundary_pipeline, wire_pipeline
from rfcompile.passes.find_collectives import find_collectives
from rfcompile.pipeline import run
from rfcompile.policy import Policy
from rfcompile.report import Report, Site, merge_reports

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
      compiled with backend "rfquant".
    - Any other gets a fake wire at its boundaries: what leaves a boundary is quantized and
      dequantized at once, and so is the gradient that comes back. It shows on one machine what the
      wire would do.
    - An ``fx.GraphModule`` is rewritten as a graph, in the same two ways.

    Args:
        bits: bits an element for all traffic; or give a ``policy``.
        example_inputs: needed for an ``fx.GraphModule`` without shapes in its metadata only: a
            tuple of arguments or an (args, kwargs) pair.
        residual: "keep". Other values come with the next release.
        boundaries: see :func:`~rfcompile.boundaries.find_boundaries`.

    Raises:
        PolicyError, FormatError: options. BoundaryError: nowhere to put the wire.
        NotImplementedError: ``residual`` other than "keep".
    """
    wanted = _policy(bits, policy)
    if residual != "keep":
        raise NotImplementedError(
            f"residual={residual!r}: rewriting a model without its residual connections comes with "
            "rfcompile 0.2; use residual='keep'."
        )
    twin = _twin(model)
    if isinstance(twin, fx.GraphModule):
        return _transform_graph(twin, wanted, boundaries, example_inputs)
    if _has_collectives(twin):
        twin.compile(backend="rfquant", options={"policy": wanted})
        return twin
    for module in twin.modules():
        for key, hook in list(module._forward_hooks.items()):
            if isinstance(hook, FakeWire):
                del module._forward_hooks[key]
    for path, module in find_boundaries(twin, boundaries).items():
        module.register_forward_hook(FakeWire(path, wanted))
    return twin


def _policy(bits: int | None, policy: Policy | None) -> Policy:
    if policy is not None and bits is not None:
        raise PolicyError("bits", bits, "give bits or a policy, not both.")
    if policy is None and bits is None:
        raise PolicyError("bits", None, "give bits (2, 3, 4, 5, 6 or 8) or a policy.")
    return policy if policy is not None else Policy.of(bits=bits, min_bytes=0)


def _twin(model: nn.Module) -> nn.Module:
    """A copy of the modules that shares their tensors."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def _has_collectives(model: nn.Module) -> bool:
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def _transform_graph(
    gm: fx.GraphModule, policy: Policy, boundaries: Boundaries, example_inputs: Any
) -> fx.GraphModule:
    if example_inputs is not None:
        _propagate_shapes(gm, example_inputs)
    if find_collectives(gm):
        return run(gm, wire_pipeline(policy, "forward")).gm
    if callable(boundaries):
        raise PolicyError("boundaries", boundaries, "a graph has no modules to ask; give paths.")
    places = boundaries if isinstance(boundaries, str) else tuple(boundaries)
    if places == "branches":
        raise PolicyError("boundaries", places, "give the paths of the branches for a graph.")
    return run(gm, boundary_pipeline(policy, places)).gm


def _propagate_shapes(gm: fx.GraphModule, example_inputs: Any) -> None:
    args, kwargs = inputs_of(gm, example_inputs)
    names = [node.target for node in gm.graph.find_nodes(op="placeholder")]
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    FakeTensorProp(gm, mode).propagate(*args, *(kwargs[str(name)] for name in names[len(args) :]))


# ---- explain -----------------------------------------------------------------------------------


def explain(
    model: nn.Module,
    *args: Any,
    kwargs: Mapping[str, Any] | None = None,
    bits: int | None = None,
    policy: Policy | None = None,
    boundaries: Boundaries = "auto",
) -> Report:
    """What would be quantized, where, why not the rest, and what it saves; ``print`` the result.

    The model runs once on the given inputs, forward and (if it has trainable parameters) backward.
    Gradients, random state and the model itself stay as they are; buffers that a forward pass
    updates are updated. A model with collectives is compiled with backend "rfquant" and the report
    lists them; any other is reported as :func:`transform` would change it, with SQNR and excess
    kurtosis measured at each boundary.

    Args:
        args, kwargs: the model's inputs; none: ``model.dummy_inputs``.
        bits, policy, boundaries: as in :func:`transform`.

    Raises:
        as :func:`transform`, and CaptureError when there are no inputs.
    """
    wanted = _policy(bits, policy)
    if not args and not kwargs:
        args, kwargs = inputs_of(model, None)
    kwargs = dict(kwargs or {})
    with torch.random.fork_rng(devices=[]):
        if _has_collectives(model) or (dist.is_available() and dist.is_initialized()):
            report = _explain_compiled(model, args, kwargs, wanted)
            if report.sites:
                return report
        twin = transform(model, policy=wanted, boundaries=boundaries)
        with watch() as crossings:
            _forward_backward(twin, args, kwargs)
    sites = [site for crossing in crossings for site in _boundary_sites(crossing, wanted)]
    return Report(tuple(sites), wanted.describe())


def _explain_compiled(
    model: nn.Module, args: Any, kwargs: dict[str, Any], policy: Policy
) -> Report:
    earlier = len(journal.reports())
    torch._dynamo.reset()  # a graph that is compiled already would not be reported again
    options: dict[str, Any] = {"policy": policy}
    compiled = torch.compile(model, backend="rfquant", options=options, dynamic=False)
    _forward_backward(compiled, args, kwargs)
    return merge_reports(journal.reports()[earlier:])


def _forward_backward(model: Any, args: Any, kwargs: dict[str, Any]) -> None:
    outputs = model(*args, **kwargs)
    leaves = torch.utils._pytree.tree_leaves((outputs,))
    floats = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.requires_grad]
    parameters = [p for p in model.parameters() if p.requires_grad]
    if floats and parameters:
        loss = torch.stack([leaf.float().mean() for leaf in floats]).sum()
        torch.autograd.grad(loss, parameters, allow_unused=True)


def _boundary_sites(crossing: Crossing, policy: Policy) -> list[Site]:
    x = crossing.tensor
    sites = []
    for direction, kind in (("forward", "activations"), ("backward", "gradients")):
        fmt, reason = policy.format_for(kind, crossing.module, x.nbytes)
        measured = direction == "forward"
        decoded = round_trip(x, fmt.spec if fmt else "") if measured else None
        sites.append(
            Site(
                collective="boundary",
                direction=direction,
                kind=kind,
                module=crossing.module,
                source="",
                shape=tuple(x.shape),
                dtype=dtype_text(x.dtype),
                group="",
                world_size=2,
                format=fmt.spec if fmt else None,
                reason=reason,
                eligible=True,
                bytes_before=x.nbytes,
                bytes_after=fmt.payload_bytes(x.numel()) if fmt else x.nbytes,
                sqnr_db=sqnr_db(x, decoded) if decoded is not None else None,
                kurtosis=excess_kurtosis(x) if measured else None,
            )
        )
    return sites


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
