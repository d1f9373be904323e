"""The public function score: the predicted increase of the loss for every site and format.

A batch takes one forward and backward pass as the model is, and one for each format that is probed
on it (:mod:`~rfcompile.planning.probes`), whatever the number of sites. Each format costs one round
trip of what crosses, whose squared error is exact. What a unit of squared error costs is estimated
from all probes together (:mod:`~rfcompile.planning.pooled`).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import partial
from itertools import chain, pairwise
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rfcompile.codec.formats import QuantFormat, as_format, dtype_text
from rfcompile.errors import OptionError, ScoreError
from rfcompile.graph.capture import in_mode
from rfcompile.graph.models import check_module, has_collectives, uncompiled
from rfcompile.graph.modules import Modules
from rfcompile.graph.one_step import state_kept
from rfcompile.planning.probes import Probes, Sites
from rfcompile.planning.progress import shown
from rfcompile.planning.scores import Scores
from rfcompile.planning.taps import Taps
from rfcompile.planning.weights import Weights
from rfcompile.wire.policy import Formatish
from rfcompile.wire.process_groups import transport
from rfcompile.wire.together import resolved, together

Loss = Callable[[nn.Module, Any], Tensor]
"""A function of (model, batch) that returns one number, the loss as a mean over the batch, such as
``lambda model, batch: cross_entropy(model(batch[0]), batch[1])``."""

FORMATS: tuple[Formatish, ...] = (2, 3, 4, 5, 6, 8, "2b:h128", "3b:h128", "4b:h128")
"""The candidates, if none are named: groups of 128, up to 4 bits also with a rotation."""

Kind = Literal["activations", "weights"]
"""The kinds of traffic that are scored."""


_SITES: dict[str, Callable[[nn.Module, Modules], Sites]] = {
    "activations": Taps, "weights": Weights
}  # fmt: skip


def score(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    loss: Loss,
    formats: Sequence[Formatish] = FORMATS,
    kind: Kind = "activations",
    modules: Modules = "auto",
    seed: int = 0,
    group: Any = None,
    progress: bool | None = None,
) -> Scores:
    """Predict for every site and format by how much the loss grows if the site travels in it.

    With ``kind="activations"`` a site is a module whose output crosses the wire, with the name that
    :func:`~rfcompile.explain` gives it. With ``kind="weights"`` a site is a parameter, which FSDP2
    gathers. The model runs in eval mode. Its parameters, gradients, buffers, modes and random state
    stay as they are; fake wires of an earlier transform are left out.

    Gradients and optimizer states are not scored: their errors change the next step and not this
    loss.

    Cost: five forward and backward passes a batch (the exact one and four of the formats in turn;
    formats that then never had a turn have it on the last batch), and one round trip for each site
    and format. Memory: the values of all sites four times, beside what a backward pass holds.

    Args:
        batches: whatever ``loss`` takes, one after another; they are read once.
        loss: a function of (model, batch); see :data:`~rfcompile.planning.score.Loss`.
        formats: the candidates beside "exact".
        kind: "activations" or "weights".
        modules: which modules are sites, as in :class:`~rfcompile.Wire`; for weights "auto" (all
            parameters), or names or shell patterns of parameters or of their modules.
        seed: of the random disturbances.
        group: a process group, or its name, whose ranks all call, each with batches of its own:
            every rank gets the scores of all batches, and disturbances of its own. None: this
            process scores alone.
        progress: show a line of progress on stderr; None: if that is a terminal.

    Raises:
        OptionError: there are no batches or formats, no such kind, or the model has collectives.
        ScoreError: the loss of a batch is no finite number or depends on no site, or a site never
            ran. BoundaryError: the model has no sites. DtypeError: a site cannot be coded. With a
            group every rank raises the error of one. PeerError: it is another one, of another
            rank. TransportError: a rank died, or did not answer in time.
    """
    mine = partial(_score, model, batches, loss, formats, kind, modules)
    if group is None:
        return mine(seed, progress)
    used = resolved(group, SITE)
    rank = used.rank()
    shows = progress if rank == 0 else False
    scores = together(used, SITE, lambda: mine(seed + (rank << 32), shows))
    everyone: list[Any] = [None] * used.size()
    with transport(used, SITE):
        dist.all_gather_object(everyone, scores, group=used)
    first: Scores = everyone[0]
    others: list[Scores] = everyone[1:]
    return together(used, SITE, lambda: first.merge(*others))


SITE = "score"
"""What errors of other ranks call it."""


def _score(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Loss,
    formats: Sequence[Formatish],
    kind: str,
    modules: Modules,
    seed: int,
    progress: bool | None,
) -> Scores:
    check_module(model)
    if kind not in _SITES:
        raise OptionError("kind", kind, f"choose one of {', '.join(map(repr, _SITES))}.")
    model = uncompiled(model)
    if has_collectives(model):
        rule = "score the model before it is parallelized, with modules= the paths of the sites."
        raise OptionError("model", type(model).__name__, rule)
    candidates = _candidates(formats, kind)
    sites = _SITES[kind](model, modules)
    probes = Probes(sites, candidates, seed)
    total, count = 0.0, 0
    watched = closing(shown(batches, "score", progress))
    with quiet(sites.model), torch.enable_grad(), watched as each:
        for count, (batch, is_last) in enumerate(_with_last(each), 1):
            value = partial(loss_of, loss, sites.model, batch, count)
            total += probes.add(value, count, is_last)
    if not count:
        raise OptionError("batches", batches, "give one batch or more; an iterator is read once.")
    return Scores(digest(model), kind, count, total, probes.result())


def _with_last(batches: Iterable[Any]) -> Iterator[tuple[Any, bool]]:
    """Each batch, and whether it is the last one."""
    end = object()
    for batch, following in pairwise(chain(batches, [end])):
        yield batch, following is end


def digest(model: nn.Module) -> str:
    """16 hexadecimal digits of the names, shapes and dtypes of a model's parameters."""
    text = ";".join(
        f"{name} {tuple(p.shape)} {dtype_text(p.dtype)}" for name, p in model.named_parameters()
    )
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@contextmanager
def quiet(model: nn.Module) -> Iterator[None]:
    """The model runs eagerly and in eval mode, and is afterwards as before."""
    modes, kept = in_mode(model, training=False), state_kept(model)
    with kept, modes, torch.compiler.set_stance("force_eager"):
        yield


def loss_of(loss: Loss, model: nn.Module, batch: Any, index: int) -> Tensor:
    """The loss of batch number ``index``, from 1.

    Raises:
        ScoreError: it is not one finite number.
    """
    value = loss(model, batch)
    what = f"the loss of batch {index}"
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.is_floating_point():
        shown = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ScoreError(what, shown, "return a tensor with one floating-point number, a mean.")
    if not math.isfinite(value.item()):
        raise ScoreError(what, value.item(), "it must be finite: leave this batch out, or mend it.")
    return value.reshape(())


def _candidates(formats: Sequence[Formatish], kind: str) -> list[QuantFormat]:
    found = [fmt.for_kind(kind) for fmt in map(as_format, formats) if fmt is not None]
    if not found:
        raise OptionError("formats", formats, "give one format or more beside exact.")
    return list(dict.fromkeys(found))
