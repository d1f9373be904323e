"""The public function plan: a format for every scored site, under a budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any, Literal

from torch import nn

from rfcompile.codec.formats import QuantFormat
from rfcompile.errors import BudgetError, OptionError, ScoreError
from rfcompile.planning.check import PlanCheck, check
from rfcompile.planning.cost import Cost, cost_of
from rfcompile.planning.knapsack import choose
from rfcompile.planning.link import Link, sent_elements
from rfcompile.planning.page import Named, plan_page, shown_site
from rfcompile.planning.score import Loss, digest
from rfcompile.planning.scores import FormatScore, Scores, SiteScore
from rfcompile.planning.site_policy import site_policy
from rfcompile.report.page.document import Page
from rfcompile.report.page.paged import PagedReport
from rfcompile.report.table import table
from rfcompile.wire.policy import Policy

Budget = Literal["bytes", "seconds", "loss"]


@dataclass(frozen=True)
class Choice:
    """What a plan decided for one site.

    Args:
        format: the text of the format, "" for exact.
        exact_bytes, bytes: that one rank sends for one batch, as it is and in the format.
        seconds: for one batch on the link; None without a link.
        increase: predicted, of the mean loss.
        calls: ``{shape: how often}`` over all batches that were scored.
        itemsize: bytes of an element as it is.
    """

    site: str
    format: str
    exact_bytes: float
    bytes: float
    seconds: float | None
    increase: float
    calls: Mapping[tuple[int, ...], int] = field(default_factory=dict)
    itemsize: int = 0


@dataclass(frozen=True)
class Plan(PagedReport):
    """What :func:`plan` decided: ``print`` it, use its :attr:`policy`, :meth:`save` it as TOML.

    Args:
        model: the digest of the model that was scored.
        budget, limit: "bytes", "seconds" or "loss", and how much of it.
        choices: one a site, in order of the model.
        link: that carries the traffic; None: each site sends its tensor once.
        batches: how many were scored.
        kind: of traffic that was scored.
    """

    model: str
    budget: Budget
    limit: float
    choices: tuple[Choice, ...]
    link: Link | None = None
    batches: int = 1
    kind: str = "activations"

    @property
    def bytes(self) -> float:
        """That one rank sends for one batch, at all sites, forward."""
        return sum(choice.bytes for choice in self.choices)

    @property
    def seconds(self) -> float | None:
        """For one batch at all sites, forward, one after another; None without a link."""
        found = [choice.seconds for choice in self.choices if choice.seconds is not None]
        return sum(found) if len(found) == len(self.choices) else None

    @property
    def increase(self) -> float:
        """The predicted increase of the mean loss, summed over sites."""
        return sum(choice.increase for choice in self.choices)

    @property
    def policy(self) -> Policy:
        """The plan as a policy with a pattern for each site; all other traffic is exact."""
        return site_policy({choice.site: choice.format for choice in self.choices})

    @property
    def cost(self) -> Cost:
        """What the plan sends and takes, as formulas of batch, sequence, width and world size."""
        return cost_of(self.choices, self.kind, self.link, self.batches)

    def toml(self) -> str:
        """The policy as the text of a TOML file for :meth:`~rfcompile.Policy.from_file`."""
        rows = [f"# {line}" for line in list(self.lines())[:2]]
        rows += ["[sites]"]
        for pattern, fmt in self.policy.sites.items():
            rows.append(f"{_quoted(pattern)} = {_quoted(str(fmt or 'exact'))}")
        return "\n".join(rows) + "\n"

    def save(self, path: str | PathLike[str]) -> None:
        """Write :meth:`toml` to a file."""
        Path(path).write_text(self.toml(), encoding="utf-8")

    def page(
        self,
        path: str | PathLike[str],
        *,
        scores: Scores | None = None,
        model: nn.Module | None = None,
    ) -> None:
        """Write a page that needs no other file: the sites in the model, a table, plots.

        Args:
            scores: what the plan was made of; without them there is no kurtosis, SQNR or frontier.
            model: for its modules; without it those of the sites are drawn.

        Raises:
            ScoreError: the scores are those of another model. OSError: the file cannot be written.
        """
        self.as_page(scores, model).write(path)

    def as_page(self, scores: Scores | None = None, model: nn.Module | None = None) -> Page:
        """What :meth:`page` writes."""
        if scores is not None and scores.model != self.model:
            rule = f"give the scores that the plan was made of, digest {self.model}."
            raise ScoreError("the digest of the scores", scores.model, rule)
        exact = sum(choice.exact_bytes for choice in self.choices)
        time = "no link" if self.seconds is None else f"{1e3 * self.seconds:.3f} ms"
        tiles = [
            ("budget", f"{self.budget} = {self.limit:,g}"),
            ("bytes a batch", f"{exact:,.0f} -> {self.bytes:,.0f}"),
            ("predicted increase of the loss", f"{self.increase:.3g}"),
            ("time a batch", time),
        ]
        sites = [
            shown_site(
                *(self.kind, c.site, c.format, (c.exact_bytes, c.bytes), c.seconds, c.increase),
                scores,
            )
            for c in self.choices
        ]
        best = [*_best(scores, self.link, exact)] if scores else []
        uniform = [*_uniform(scores, self.link)] if scores else []
        return plan_page(tiles, sites, scores, model, self.kind, best, uniform)

    def check(self, model: nn.Module, batches: Any, *, loss: Loss, largest: int = 3) -> PlanCheck:
        """Measure what the plan costs, and compare it with the prediction.

        Args:
            model: the model that was scored. batches, loss: as in :func:`~rfcompile.score`.
            largest: of how many sites, the ones with the largest predicted increases, to measure
                the interaction; each costs one pass over the batches.

        Returns:
            A :class:`~rfcompile.planning.check.PlanCheck`. An RFCompileWarning says that measured
            over predicted is outside [0.7, 1.4].

        Raises:
            ScoreError: the model is not the one that was scored, or a loss is no finite number.
            OptionError: there are no batches, or ``largest``.
        """
        if digest(model) != self.model:
            rule = "the plan is for another model: its parameters must have the same names, "
            rule += f"shapes and dtypes (digest {self.model}). Score this model."
            raise ScoreError("the digest of the model", digest(model), rule)
        formats = {choice.site: choice.format for choice in self.choices}
        increases = {choice.site: choice.increase for choice in self.choices}
        return check(model, batches, loss, self.kind, formats, increases, largest)

    def lines(self) -> Iterator[str]:
        exact = sum(choice.exact_bytes for choice in self.choices)
        less = f" ({exact / self.bytes:.2f}x less)" if self.bytes else ""
        text = f"plan for {self.budget}={self.limit:g}: {exact:,.0f} bytes -> {self.bytes:,.0f}"
        yield f"{text}{less}, predicted loss increase {self.increase:.3g}"
        seconds = self.seconds
        yield "no link: no seconds" if seconds is None else f"{1e3 * seconds:.3f} ms a batch"
        rows = [["site", "format", "bytes before", "after", "ms", "loss increase"]]
        for c in self.choices:
            time = "" if c.seconds is None else f"{1e3 * c.seconds:.3f}"
            sizes = [f"{c.exact_bytes:,.0f}", f"{c.bytes:,.0f}", time]
            rows.append([c.site, c.format or "exact", *sizes, f"{c.increase:.3g}"])
        yield from table(rows)


def plan(
    scores: Scores,
    *,
    bytes: float | None = None,
    seconds: float | None = None,
    loss: float | None = None,
    link: Link | None = None,
) -> Plan:
    """Choose a format, or exact, for every scored site, under one budget.

    - ``bytes``: the least predicted loss increase for so many bytes a batch.
    - ``seconds``: the same for so many seconds a batch on the link.
    - ``loss``: the fewest seconds (without a link: bytes) for such a predicted loss increase.

    The choice is exact: no other choice among the scored formats has a smaller predicted loss
    (:mod:`rfcompile.planning.knapsack` has the argument). Bytes are what one rank sends forward for
    one batch, the mean over the batches that were scored, with scales and padding. With a link a
    format that is not faster than exact there is no choice: the site stays exact where sending is
    not what takes time.

    Args:
        scores: from :func:`~rfcompile.score`; the same scores serve any budget.
        bytes, seconds, loss: the budget; exactly one of them.
        link: what carries the traffic, see :class:`~rfcompile.Link`. Without one a site sends its
            tensor once, and there are no seconds.

    Raises:
        OptionError: not exactly one budget, one that is no finite number, or ``seconds`` without
            a link. BudgetError: no plan keeps the budget; its ``minimum`` is the least that can be
            reached.
    """
    budgets = {"bytes": bytes, "seconds": seconds, "loss": loss}
    name, limit = _one_budget(budgets, link)
    options = options_of(scores, link)
    cost = COSTS[name]
    numbers = [[cost(option) for option in site] for site in options]
    increases = [[option.increase for option in site] for site in options]
    if name == "loss":
        spent = COSTS["bytes" if link is None else "seconds"]
        numbers, increases = increases, [[spent(option) for option in site] for site in options]
    chosen = choose(numbers, increases, limit)
    if chosen is None:
        raise BudgetError(name, limit, sum(min(site) for site in numbers))
    picked = tuple(site[i] for site, i in zip(options, chosen, strict=True))
    return Plan(scores.model, name, limit, picked, link, scores.batches, scores.kind)


COSTS: dict[Budget, Callable[[Choice], float]] = {
    "bytes": lambda option: option.bytes,
    "seconds": lambda option: option.seconds or 0.0,
    "loss": lambda option: option.increase,
}
"""What of a choice counts against a budget."""


def _one_budget(budgets: dict[str, float | None], link: Link | None) -> tuple[Budget, float]:
    given = {name: value for name, value in budgets.items() if value is not None}
    if len(given) != 1:
        raise OptionError("budget", given, "give exactly one of bytes=, seconds= and loss=.")
    [(name, value)] = given.items()
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise OptionError(name, value, "give a finite number.")
    if name == "seconds" and link is None:
        raise OptionError(name, value, "seconds need a link=rf.Link(bandwidth, latency).")
    return name, float(value)  # type: ignore[return-value]


def options_of(scores: Scores, link: Link | None) -> list[list[Choice]]:
    """For each site exact, and each format; with a link only those that are faster than exact."""
    if link is not None and not isinstance(link, Link):
        raise OptionError("link", link, "give an rf.Link(bandwidth=125e6, latency=1e-4).")
    carrier = link or Link(bandwidth=math.inf)
    return [_options(scores, site, carrier, link is not None) for site in scores.sites]


BUDGETS = 16
"""Of the frontier that a page shows, evenly spaced on a logarithmic scale."""
UNLIMITED = 1e300


def _best(scores: Scores, link: Link | None, exact: float) -> Iterator[Named]:
    """The best plans for budgets from the fewest bytes up to those of exact sites."""
    least = plan(scores, loss=UNLIMITED, link=link).bytes
    if 0 < least < exact:
        for i in range(BUDGETS):
            limit = least * (exact / least) ** (i / (BUDGETS - 1)) * (1 + 1e-9)
            found = plan(scores, bytes=limit, link=link)
            yield "best plan", (found.bytes, found.increase)


def _uniform(scores: Scores, link: Link | None) -> Iterator[Named]:
    """Bytes and predicted increase of one format at all sites that have it, by its name."""
    sites = options_of(scores, link)
    for fmt in dict.fromkeys(score.format for site in scores.sites for score in site.formats):
        chosen = [next((o for o in site if o.format == fmt), site[0]) for site in sites]
        numbers = sum(o.bytes for o in chosen), sum(o.increase for o in chosen)
        yield f"uniform {fmt}", numbers


def _options(scores: Scores, site: SiteScore, link: Link, has_link: bool) -> list[Choice]:
    exact = _choice(scores, site, None, link, has_link)
    coded = [_choice(scores, site, score, link, has_link) for score in site.formats]
    faster = [c for c in coded if not has_link or (c.seconds or 0.0) < (exact.seconds or 0.0)]
    return [exact, *faster]


def _choice(
    scores: Scores, site: SiteScore, score: FormatScore | None, link: Link, has_link: bool
) -> Choice:
    fmt = QuantFormat.parse(score.format) if score else None

    def per_batch(cost: Callable[[int, int, QuantFormat | None], float], f: Any) -> float:
        total = 0.0
        for shape, times in site.calls.items():
            n = sent_elements(math.prod(shape), scores.kind, link.carrier, link.world)
            total += cost(n, site.itemsize, f) * times
        return total / scores.batches

    return Choice(
        site.site,
        score.format if score else "",
        per_batch(link.sent, None),
        per_batch(link.sent, fmt),
        per_batch(link.seconds, fmt) if has_link else None,
        scores.increase(site, score) if score else 0.0,
        site.calls,
        site.itemsize,
    )


def _quoted(text: str) -> str:
    """A basic string of TOML."""
    plain = "".join(c if c.isprintable() and c not in '"\\' else f"\\U{ord(c):08x}" for c in text)
    return f'"{plain}"'
