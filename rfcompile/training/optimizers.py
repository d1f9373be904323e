"""The optimizers for residual-free models: spectral steps for matrices, AdamW for the rest."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import Any, Literal

from torch import nn
from torch.optim import AdamW, Muon, Optimizer

from rfcompile.errors import ResidualError
from rfcompile.graph.capture import capture, inputs_of
from rfcompile.graph.models import uncompiled, without_wrappers
from rfcompile.nn.low_rank import FactoredLinear
from rfcompile.nn.residual_site import ResidualSite
from rfcompile.passes.find_residuals import find_residuals
from rfcompile.rewrites.attention.anatomy import anatomy
from rfcompile.rewrites.residual.report import residual_report
from rfcompile.states.composite import Optimizers


def optimizers(
    model: nn.Module,
    *,
    lr: float = 1e-3,
    matrix_lr: float = 5e-3,
    weight_decay: float = 0.01,
    betas: tuple[float, float] = (0.9, 0.95),
    matrices: Literal["muon", "soap", "adamw"] = "muon",
    example_inputs: Any = None,
) -> Optimizers:
    """One optimizer for a model: ``matrices`` for the blocks' linears, AdamW for everything else.

    The blocks' linears are those in a branch of a residual add: as the report of
    ``rfcompile.transform`` names them, else as ``example_inputs`` show. So embeddings, heads,
    norms, biases, gains and temperatures get AdamW, whatever their shape; only the blocks' linears
    get weight decay. The factors of low-rank weights and adapters get AdamW without decay: a step
    that is orthogonal in a factor is not so in the weight.

    Args:
        lr: of AdamW. matrix_lr: of "muon" (``torch.optim.Muon``) or "soap" (of the package
            pytorch-optimizer: ``pip install 'rfcompile[optimizers]'``).
        matrices: "adamw" is a control: the same groups, with ``lr``.
        example_inputs: for a model that ``transform`` has not rewritten; as there.

    Raises:
        ResidualError: the blocks are not known, or ``matrices`` is none of these.
        CaptureError: the model cannot be captured.

    Source: arXiv:2605.25880 names spectral and second-order optimizers (Muon, Shampoo); which
    parameters get which is common practice with Muon.
    """
    hidden = _hidden(model, example_inputs)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    parameters = [p for p in trained if p in hidden and p.dim() == 2]
    decayed = [p for p in trained if p in hidden and p.dim() != 2]  # stacks of matrices
    plain = [p for p in trained if p not in hidden]
    other = [
        {"params": params, "weight_decay": decay}
        for params, decay in ((decayed, weight_decay), (plain, 0.0))
        if params
    ]
    first: list[Optimizer] = []
    if matrices not in ("muon", "soap", "adamw"):
        raise ResidualError(
            f"matrices={matrices!r} is not supported: choose 'muon', 'soap' or 'adamw'."
        )
    if parameters and matrices == "adamw":
        first = [AdamW(parameters, lr=lr, betas=betas, weight_decay=weight_decay)]
    elif parameters and matrices == "muon":
        first = [Muon(parameters, lr=matrix_lr, weight_decay=weight_decay)]
    elif parameters:
        first = [_soap(parameters, matrix_lr, betas, weight_decay)]
    return Optimizers(*first, *([AdamW(other, lr=lr, betas=betas)] if other else []))


def _hidden(model: nn.Module, example_inputs: Any) -> set[nn.Parameter]:
    """The weights of the blocks' linears, and mixing."""
    model = uncompiled(model)
    with without_wrappers(model):
        names: set[str] = set()
        branches: set[str] | None = None
        with contextlib.suppress(ResidualError):
            report = residual_report(model)
            names = {item.parameter for item in report.initialized if item.rule != "zero"}
            branches = {path for site in report.sites for path in site.add.branch}
        names = names or _weights_in(model, branches, example_inputs)
        parameters = dict(model.named_parameters(remove_duplicate=False))
        mixing = {
            module.weight
            for module in model.modules()
            if isinstance(module, ResidualSite) and module.mode == "mix"
        }
        factors = {
            factor
            for module in model.modules()
            if isinstance(module, FactoredLinear)
            for factor in module.parameters()
        }
        return (mixing | {parameters[name] for name in names if name in parameters}) - factors


def _weights_in(model: nn.Module, branches: set[str] | None, example_inputs: Any) -> set[str]:
    """Weights of the linears in these modules; None: in the branches that the model adds now."""
    inputs = inputs_of(model, example_inputs)
    if branches is None:
        branches = {path for add in find_residuals(capture(model, inputs)) for path in add.branch}
    sites = {path for path, module in model.named_modules() if isinstance(module, ResidualSite)}
    linears = anatomy(model, inputs).linears
    found = {linear.weight for linear in linears if linear.module in branches - sites}
    if not found:
        raise ResidualError(
            f"{type(model).__name__} has no linear in a branch of a residual add: make a plain "
            "optimizer, or pass what rfcompile.transform returned."
        )
    return found


def _soap(
    parameters: Iterable[nn.Parameter], lr: float, betas: tuple[float, float], weight_decay: float
) -> Optimizer:
    try:
        from pytorch_optimizer import SOAP
    except ImportError as error:
        raise ResidualError(
            "matrices='soap' needs the package pytorch-optimizer: pip install "
            "'rfcompile[optimizers]', or choose 'muon'."
        ) from error
    made: Optimizer = SOAP(list(parameters), lr=lr, betas=betas, weight_decay=weight_decay)
    return made
