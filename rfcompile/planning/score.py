"""The public function score: the predicted increase of the loss for every site and format.

One batch takes three forward and backward passes, whatever the number of sites and formats:

1. as the model is: the outputs ``y`` of all sites and the gradients ``g`` of the loss there;
2. and 3. with a disturbance ``+v`` and ``-v`` at all sites at once. The elements of ``v`` are as
   large as the errors of the formats, with independent random signs. Half the difference of the
   gradients is ``H v``, where ``H`` is the Hessian of the loss with respect to disturbances at all
   sites, so ``(H v)_i / v_i`` has the mean ``H_ii`` (Hutchinson; Bekas, Kokiopoulou, Saad 2007).

Each format costs one round trip of ``y``, with the error ``e``. To second order, and for errors
that are independent of one another, the loss then grows by ``g . e + 1/2 sum_i H_ii e_i^2``.

Estimates of ``H`` are noisy, and a plan that had one for each format would choose what is low by
chance (docs/measured/plan.md). Formats of one layout (group size and rotation) have errors in the
same places, because the elements of a group share their step. So what a unit of squared error costs
there is ``c = 1/2 sum_i H_ii w_i``, with ``w_i`` the mean over formats of ``e_i^2 / sum_j e_j^2``
(those without an error are left out). The second term is ``c' sum_i e_i^2``; ``c'`` is the mean of
``c`` over the layouts of the site, times a factor of the layout that all sites of the batch share.
The squared errors are exact. ``v_i^2`` is the mean over layouts of ``w_i``, times the median over
formats of ``sum_j e_j^2``.
"""

from __future__ import annotations

import hashlib
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rfcompile.codec.formats import QuantFormat, as_format, dtype_text
from rfcompile.errors import OptionError, ScoreError
from rfcompile.graph.capture import in_mode
from rfcompile.graph.models import check_module, has_collectives, uncompiled
from rfcompile.graph.modules import Modules
from rfcompile.graph.one_step import state_kept
from rfcompile.planning.progress import shown
from rfcompile.planning.scores import FormatScore, Scores, SiteScore
from rfcompile.planning.taps import Crossings, Pass, Taps
from rfcompile.planning.weights import Weights
from rfcompile.wire.fake import round_trip
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


class Sites(Protocol):
    """What is scored: places of a model that one pass may disturb."""

    model: nn.Module

    @property
    def names(self) -> list[str]: ...

    def run(self, loss: Callable[[], Tensor], given: Crossings | None, what: str) -> Pass: ...


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

    Cost: three forward and backward passes a batch, and one round trip for each site and format.
    Memory: the values of all sites four times, beside what a backward pass holds.

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
    sums = {name: _SiteSums(candidates) for name in sites.names}
    total, count = 0.0, 0
    watched = closing(shown(batches, "score", progress))
    with quiet(sites.model), torch.enable_grad(), watched as each:
        for count, batch in enumerate(each, 1):
            total += _score_batch(sites, sums, loss, (count, batch), seed)
    if not count:
        raise OptionError("batches", batches, "give one batch or more; an iterator is read once.")
    found = tuple(sums[name].result(name) for name in sites.names)
    return Scores(digest(model), kind, count, total, found)


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


def _score_batch(
    sites: Sites, sums: dict[str, _SiteSums], loss: Loss, numbered: tuple[int, Any], seed: int
) -> float:
    index, batch = numbered

    def run(disturbances: Crossings | None) -> Pass:
        value = partial(loss_of, loss, sites.model, batch, index)
        return sites.run(value, disturbances, f"batch {index}")

    exact = run(None)
    terms = {n: sums[n].terms(exact.values[n], exact.gradients[n]) for n in sites.names}
    signs = torch.Generator().manual_seed(seed + index)
    probes = {n: [_signed(v, signs) for v in found.probe] for n, found in terms.items()}
    above = run(probes).gradients
    below = run({n: [-v for v in probe] for n, probe in probes.items()}).gradients
    costs: dict[str, dict[Layout, float]] = {}
    for n, probe in probes.items():
        parts = zip(probe, above[n], below[n], strict=True)
        bent = [(up.float() - down.float()) / 4 / v.float() for v, up, down in parts]
        costs[n] = terms[n].costs([b.nan_to_num(0, 0, 0) for b in bent])
    factors = _factors(costs, terms)
    for n in sites.names:
        mean = statistics.fmean(costs[n].values())
        sums[n].add(exact.values[n], terms[n], {k: mean * f for k, f in factors.items()})
    return float(exact.value)


def _factors(
    costs: Mapping[str, Mapping[Layout, float]], terms: Mapping[str, _Terms]
) -> dict[Layout, float]:
    """What a unit of squared error costs in each layout over the mean of all layouts.

    Sums over sites, weighted by their typical squared error; 1 where a sum is not positive.
    """
    layouts = list(next(iter(costs.values())))
    sums = {k: sum(costs[n][k] * terms[n].typical for n in costs) for k in layouts}
    mean = statistics.fmean(sums.values())
    return {k: sums[k] / mean if min(sums[k], mean) > 0 else 1.0 for k in layouts}


def _signed(v: Tensor, generator: torch.Generator) -> Tensor:
    """``v`` with an independent random sign for each element."""
    signs = torch.randint(0, 2, v.shape, generator=generator, dtype=torch.int8)
    return v * (2 * signs - 1).to(v.device, v.dtype)


Layout = tuple[int | None, int | None]
"""Group size and rotation of a format: where its errors are."""


@dataclass
class _Terms:
    """Of one site and batch: by format ``g . e`` and ``sum_i e_i^2``, by layout the shares of the
    elements in the squared error, which sum to 1, and what to disturb the site by.
    """

    first: dict[str, float]
    noise: dict[str, float]
    shares: dict[Layout, list[Tensor]]
    probe: list[Tensor]

    @property
    def typical(self) -> float:
        """The median squared error of the formats that have one; 0 if none has."""
        noises = [noise for noise in self.noise.values() if noise]
        return statistics.median(noises) if noises else 0.0

    def costs(self, bent: Sequence[Tensor]) -> dict[Layout, float]:
        """Of a unit of squared error, by layout; ``bent`` estimates ``1/2 H_ii`` of each call."""
        pairs = {k: zip(bent, shares, strict=True) for k, shares in self.shares.items()}
        return {k: sum(_dot(b, share) for b, share in pair) for k, pair in pairs.items()}


class _SiteSums:
    """The sums of one site over batches; each is one float64 number."""

    def __init__(self, candidates: Sequence[QuantFormat]) -> None:
        self.sums = {fmt.spec: [0.0] * 4 for fmt in candidates}
        self.layouts: dict[Layout, list[str]] = {}
        for fmt in candidates:
            self.layouts.setdefault((fmt.group_size, fmt.rotate), []).append(fmt.spec)
        self.powers = [0.0] * 5
        self.peak, self.dtype, self.itemsize = 0.0, "", 0
        self.calls: dict[tuple[int, ...], int] = {}

    def terms(self, values: Sequence[Tensor], gradients: Sequence[Tensor]) -> _Terms:
        """Quantize what crossed, in all formats."""
        found = _Terms({}, {}, {}, [])
        for layout, specs in self.layouts.items():
            shares = [torch.zeros_like(y, dtype=torch.float32) for y in values]
            for spec in specs:
                errors = [round_trip(y, spec).float() - y.float() for y in values]
                pairs = zip(gradients, errors, strict=True)
                found.first[spec] = sum(_dot(g.float(), e) for g, e in pairs)
                found.noise[spec] = noise = sum(_dot(e, e) for e in errors)
                for share, error in zip(shares, errors, strict=True):
                    share += error.square() / noise if noise else 0.0
            coded = sum(found.noise[spec] > 0 for spec in specs)
            found.shares[layout] = [share / max(coded, 1) for share in shares]
        scale = found.typical / len(self.layouts)
        for y, *parts in zip(values, *found.shares.values(), strict=True):
            found.probe.append((scale * torch.stack(parts).sum(0)).sqrt().to(y.dtype))
        return found

    def add(self, values: Sequence[Tensor], terms: _Terms, costs: Mapping[Layout, float]) -> None:
        """One batch; ``costs`` of a unit of squared error."""
        for y in values:
            self._add_values(y)
        for layout, specs in self.layouts.items():
            for spec in specs:
                first, noise = terms.first[spec], terms.noise[spec]
                added = first, first**2, costs[layout] * noise, noise
                self.sums[spec] = [a + b for a, b in zip(self.sums[spec], added, strict=True)]

    def _add_values(self, y: Tensor) -> None:
        self.dtype, self.itemsize = str(y.dtype).removeprefix("torch."), y.element_size()
        shape = tuple(y.shape)
        self.calls[shape] = self.calls.get(shape, 0) + 1
        exact = y.double()
        power = torch.ones_like(exact)
        for i in range(5):
            self.powers[i] += float(power.sum())
            power *= exact
        if y.numel():
            self.peak = max(self.peak, float(exact.abs().max()))

    def result(self, path: str) -> SiteScore:
        formats = tuple(FormatScore(spec, *sums) for spec, sums in self.sums.items())
        return SiteScore(
            path, self.dtype, self.itemsize, self.calls, tuple(self.powers), self.peak, formats
        )


def _dot(a: Tensor, b: Tensor) -> float:
    """``sum_i a_i b_i``: products in float32, their sum in float64."""
    return float((a * b).sum(dtype=torch.float64))
