"""ResidualFree: the rewrite that removes, mixes or anneals residual connections."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Literal, get_args

from torch import fx, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils.parametrize import is_parametrized

from rfcompile.errors import OptionError, ResidualError
from rfcompile.find.mixed_streams import find_mixed_streams, why_none
from rfcompile.graph.capture import Inputs, in_mode, plain_graph_of, program_of
from rfcompile.graph.models import without_wrappers
from rfcompile.graph.pipeline import run
from rfcompile.nn.residual_site import Mode, ResidualSite
from rfcompile.passes.find_residuals import Kind, ResidualAdd
from rfcompile.passes.open_residuals import OpenedSite, OpenResiduals
from rfcompile.rewrites.attention.anatomy import anatomy
from rfcompile.rewrites.residual.initialization import Initialization, initialize
from rfcompile.rewrites.residual.report import Initialized, ResidualReport, Temperature
from rfcompile.rewrites.residual.surgery import open_sites
from rfcompile.rewrites.residual.temperature import TemperatureRule, temper

Change = Literal["free", "mix", "anneal"]
_SITE_MODES: dict[Change, Mode] = {"free": "free", "mix": "mix", "anneal": "gain"}


@dataclass(frozen=True)
class ResidualFree:
    """How a model loses its residual connections.

    Args:
        mode: "free": the skips are dropped. "mix": a trainable orthogonal matrix mixes the branch
            in place of the skip. "anneal": the skip has a gain, 1 at first, that
            :class:`~rfcompile.training.SkipAnnealer` drives to 0: for trained models.
        initialization: of the blocks' linears; None leaves them. Default: for "free" and "mix".
        temperature: of the attentions; None leaves them. Default: for "free" and "mix", of those
            that can have one.
        kinds: which residual adds; see :class:`~rfcompile.passes.find_residuals.ResidualAdd`.
    """

    mode: Change = "free"
    initialization: Initialization | Literal["auto"] | None = "auto"
    temperature: TemperatureRule | Literal["auto"] | None = "auto"
    kinds: tuple[Kind, ...] = ("block",)

    def __post_init__(self) -> None:
        if self.mode not in get_args(Change):
            rule = (
                "choose 'free', 'mix' or 'anneal'. A ResidualFree is a change: "
                "rf.transform(model, rf.ResidualFree(...))."
            )
            raise OptionError("residual", self.mode, rule)
        fresh = self.mode != "anneal"
        if self.initialization == "auto":
            object.__setattr__(self, "initialization", Initialization() if fresh else None)
        if self.temperature == "auto":
            possible = TemperatureRule(required=False)
            object.__setattr__(self, "temperature", possible if fresh else None)
        if not isinstance(self.initialization, Initialization | None):
            rule = "give rf.training.Initialization(...), 'auto', or None for none."
            raise OptionError("initialization", self.initialization, rule)
        if not isinstance(self.temperature, TemperatureRule | None):
            rule = "give rf.training.TemperatureRule(...), 'auto', or None for none."
            raise OptionError("temperature", self.temperature, rule)
        kinds = (self.kinds,) if isinstance(self.kinds, str) else tuple(self.kinds)
        if not kinds or not set(kinds) <= set(get_args(Kind)):
            rule = f"name some of {', '.join(map(repr, get_args(Kind)))}."
            raise OptionError("kinds", self.kinds, rule)
        object.__setattr__(self, "kinds", kinds)

    @property
    def keeps_parameters(self) -> bool:
        return self.mode == "anneal"

    def on_module(self, model: nn.Module, inputs: Callable[[], Inputs]) -> ResidualReport:
        """Rewrite ``model`` in place.

        The graph says which adds are residual, as for :meth:`on_graph`. Only a module has sources,
        so only here the rewrite looks for the add in them.

        Raises:
            ResidualError: there is nothing to rewrite, or something that cannot be. SourceError,
            CaptureError.
        """
        _check_parameters(model)
        with without_wrappers(model):
            return _removed(model, inputs(), self)

    def on_graph(self, gm: fx.GraphModule) -> ResidualReport:
        """Rewrite a graph in place; its parameters stay as they are.

        Raises:
            ResidualError: as :meth:`on_module`.
        """
        facts = run(gm, [OpenResiduals(self.kinds)]).facts
        opened = tuple(fact for fact in facts if isinstance(fact, OpenedSite))
        left = tuple(fact for fact in facts if isinstance(fact, ResidualAdd))
        if not opened:
            kinds, why = ", ".join(self.kinds), why_none(find_mixed_streams(gm))
            raise ResidualError(
                f"the graph has no residual add of kind {kinds}. {why}".strip(), left
            )
        for site in opened:
            _become(gm, site, _SITE_MODES[self.mode])
        note = (
            "a graph: parameters and temperatures stay as they are; transform the module for those"
        )
        return ResidualReport(self.mode, opened, left, notes=(note,))


def _check_parameters(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor):
            raise ResidualError(
                f"{name} is a DTensor: rewrite the model first, then parallelize or shard it."
            )
        if parameter.is_meta:
            raise ResidualError(f"{name} is on the meta device: give the model values first.")


def _removed(model: nn.Module, inputs: Inputs, how: ResidualFree) -> ResidualReport:
    notes: list[str] = []
    with in_mode(model, training=False):
        program = program_of(model, inputs)
    opened, left = open_sites(model, inputs, how.kinds, notes, program)
    initialized: tuple[Initialized, ...] = ()
    temperatures: tuple[Temperature, ...] = ()
    if isinstance(how.initialization, Initialization):
        branches = {path for site in opened for path in site.add.branch}
        parts = anatomy(model, inputs, plain_graph_of(program))
        initialized = initialize(model, parts, branches, how.initialization)
        kept = list(_not_initialized(model, branches, initialized))
        if kept:
            notes.append(f"not initialized anew, as they are no linears to us: {', '.join(kept)}")
    for site in opened:
        _become(model, site, _SITE_MODES[how.mode])
    if isinstance(how.temperature, TemperatureRule):
        reasons: dict[str, str] = {}
        temperatures = temper(model, inputs, how.temperature, reasons)
        for path, reason in reasons.items():
            notes.append(f"the attention of {path or 'the model'} has no temperature: {reason}")
        if not temperatures and not reasons:
            notes.append(
                "no temperature: no self-attention was found, a softmax between two products; "
                "scale the queries of any other kind in the model"
            )
    return ResidualReport(how.mode, opened, left, initialized, temperatures, tuple(notes))


def _not_initialized(
    model: nn.Module, modules: Collection[str], done: tuple[Initialized, ...]
) -> Iterator[str]:
    """The parameters in the branches that are matrices, but of no linear."""
    known = {model.get_parameter(item.parameter) for item in done}
    for path in sorted(modules):
        module = model.get_submodule(path)
        own = [*module.named_parameters(recurse=False)]
        if is_parametrized(module):  # weight_norm and the like: the weight is computed
            held = module.get_submodule("parametrizations")
            own += held.named_parameters("parametrizations")
        for name, parameter in own:
            if parameter.dim() > 1 and parameter not in known:
                known.add(parameter)
                yield f"{path}.{name}".lstrip(".")


def _has_channels_first(model: nn.Module, add: ResidualAdd) -> bool:
    """A convolution of the branch has these channels."""
    weights = [
        module.weight
        for path in add.branch
        if isinstance(module := model.get_submodule(path), (nn.Conv1d, nn.Conv2d, nn.Conv3d))
    ]
    return any(len(w.shape) == len(add.shape) and add.shape[1] in w.shape[:2] for w in weights)


def _become(model: nn.Module, site: OpenedSite, mode: Mode) -> None:
    module = model.get_submodule(site.path)
    assert isinstance(module, ResidualSite)
    if mode == "mix" and _has_channels_first(model, site.add):
        raise ResidualError(
            f"{site.path} adds tensors of shape {site.add.shape}, their channels in axis 1, and "
            "residual='mix' mixes the last axis: use 'free' or 'anneal' here."
        )
    width = site.add.shape[-1] if site.add.shape else None
    owner = model.get_submodule(site.path.rpartition(".")[0])
    like = next(itertools.chain(owner.parameters(), model.parameters()), None)
    module.become(mode, width=width if isinstance(width, int) else None, like=like)
