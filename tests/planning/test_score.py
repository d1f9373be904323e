"""score: second-order predictions against measured losses, sums that merge, typed errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import rfcompile as rf
from rfcompile.errors import (
    BoundaryError,
    DtypeError,
    OptionError,
    ProcessGroupError,
    RFCompileError,
    ScoreError,
)
from rfcompile.planning.scores import FormatScore, SiteScore
from rfcompile.report.measures import excess_kurtosis, sqnr_db
from tests.ranks import Rank, RunRanks, error_of
from tests.zoo import VOCABULARY, NanoGPT

Batch = tuple[Tensor, Tensor]


class Scale(nn.Module):
    """Multiplies by a vector: disturbances of its output do not mix."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.rand(width) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gain


def chain(width: int = 64) -> nn.Sequential:
    return nn.Sequential(Scale(width), Scale(width))


def quadratic(model: nn.Module, batch: Tensor) -> Tensor:
    """Its Hessian with respect to the output of a Scale is diagonal, and its Taylor series ends."""
    return model(batch).square().mean() / 2


def language(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())


def sentences(count: int, size: int = 8) -> list[Batch]:
    pairs = [torch.randint(0, VOCABULARY, (2, size, 32)).unbind(0) for _ in range(count)]
    return [(x, y) for x, y in pairs]


def measured(model: nn.Module, loss: Any, batches: list[Any], sites: dict[str, Any]) -> float:
    """The increase of the mean loss with a fake wire."""
    policy = rf.Policy(sites=sites)
    wired = rf.transform(model, rf.Wire(policy, modules=list(sites))).eval()
    with torch.no_grad():
        pairs = [(loss(wired, b).item(), loss(model.eval(), b).item()) for b in batches]
    return sum(after - before for after, before in pairs) / len(pairs)


@pytest.mark.parametrize("fmt", ["2b", "4b:g64", "3b:g64:h64"])
@pytest.mark.parametrize("site", ["0", "1"])
def test_a_quadratic_loss_is_predicted_exactly(site: str, fmt: str) -> None:
    model, batches = chain(), [torch.randn(32, 64) for _ in range(3)]
    scores = rf.score(model, batches, loss=quadratic, formats=[fmt], modules=[site])
    [found] = scores.sites[0].formats
    # The finite difference of gradients errs by eps**(2/3) max|y| / RMS(y) < 2e-4 of an H_ii, and
    # the measured loss, 2,048 float32 numbers added in pairs, by less than 1e-6 of its value.
    loss = scores.loss / scores.batches
    expected = measured(model, quadratic, batches, {site: fmt})
    predicted = scores.first(found) + scores.second(scores.sites[0], found)
    assert predicted == pytest.approx(expected, rel=2e-4, abs=2e-6 * loss)
    assert found.noise > 0
    assert scores.second(scores.sites[0], found) > 0


@pytest.mark.parametrize("fmt", ["2b", "4b:g64", "3b:g64:h64"])
def test_errors_that_all_tokens_share_add_up(fmt: str) -> None:
    """A mean over tokens takes the chance out of their errors, unless they are the same ones."""

    def pooled(model: nn.Module, batch: Tensor) -> Tensor:
        return model(batch).mean(0).square().mean() / 2

    model, token = chain(), torch.randn(64)
    alike, others = token.expand(32, 64), torch.randn(32, 64)
    seconds = []
    for batch in (alike, others):
        scores = rf.score(model, [batch], loss=pooled, formats=[fmt], modules=["0"])
        [found] = scores.sites[0].formats
        seconds.append(scores.second(scores.sites[0], found) / found.noise)
        expected = measured(model, pooled, [batch], {"0": fmt})
        predicted = scores.first(found) + scores.second(scores.sites[0], found)
        # Bounds as above; the errors of a mean of 32 tokens are smaller than those of one.
        assert predicted == pytest.approx(expected, rel=2e-4, abs=2e-6 * scores.loss)
    assert seconds[0] > 4 * seconds[1]


def test_increases_of_sites_add_up() -> None:
    model = NanoGPT(layers=3).eval()
    batches = [(x, model(x).detach()) for x, _ in sentences(4)]

    def distance(model: nn.Module, batch: Batch) -> Tensor:  # its gradient at rest is zero
        return F.mse_loss(model(batch[0]), batch[1])

    scores = rf.score(model, batches, loss=distance, formats=[2, 4])
    assert [site.site for site in scores.sites] == ["blocks.0", "blocks.1", "blocks.2"]
    for i, bits in enumerate([2, 4]):
        predicted = sum(scores.increase(site, site.formats[i]) for site in scores.sites)
        together = measured(model, distance, batches, {site.site: bits for site in scores.sites})
        assert 0.7 < together / predicted < 1.4, bits  # what Plan.check takes for additive


def test_each_format_has_the_cost_of_its_own_errors() -> None:
    """Nothing was probed twice, so nothing says that the costs differ by chance."""
    model, x = chain(), torch.randn(32, 64)
    formats = [2, 3, 8, "4b:g64:h64", "3b:g32"]
    scores = rf.score(model, [x], loss=quadratic, formats=formats, modules=["0"])
    for found, fmt in zip(scores.sites[0].formats, formats, strict=True):
        expected = measured(model, quadratic, [x], {"0": fmt})
        predicted = scores.first(found) + scores.second(scores.sites[0], found)
        assert predicted == pytest.approx(expected, rel=2e-4, abs=2e-6 * scores.loss)


@pytest.mark.parametrize(
    ("batches", "probes"), [(1, [1] * 9), (2, [1] * 9), (4, [2] * 7 + [1] * 2)]
)
def test_every_format_has_its_turn(batches: int, probes: list[int]) -> None:
    """Four a batch, in turn; on the last one those that never had a turn."""
    given = [torch.randn(8, 64) for _ in range(batches)]
    scores = rf.score(chain(), iter(given), loss=quadratic, modules=["0", "1"])
    for site in scores.sites:
        assert sorted(f.probes for f in site.formats) == sorted(probes)


def test_large_errors_of_one_site_do_not_drown_another() -> None:
    model, batches = chain(), [torch.randn(32, 64) for _ in range(8)]
    batches = [batch.index_fill(1, torch.tensor(3), 1e3) for batch in batches]
    with torch.no_grad():
        model[0].gain[3], model[1].gain[3] = 1.0, 1e-3  # an outlier that only the first site has
    scores = rf.score(model, batches, loss=quadratic, formats=[2, 4, 8], modules=["0", "1"])
    alone = rf.score(model, batches, loss=quadratic, formats=[2, 4, 8], modules=["1"])
    for ours, one in zip(scores.sites[1].formats, alone.sites[0].formats, strict=True):
        exact = alone.second(alone.sites[0], one)
        assert 0.7 < scores.second(scores.sites[1], ours) / exact < 1.4  # Plan.check's bounds


@pytest.mark.parametrize(("batches", "counts"), [(4, False), (10, False), (20, True)])
def test_a_first_order_term_counts_where_it_is_no_chance(batches: int, counts: bool) -> None:
    def score_of(terms: list[float]) -> FormatScore:
        squares = sum(term**2 for term in terms)
        return FormatScore("4b:g128:rise", sum(terms), squares, 1.0, 1, 1.0, 0.1, 0.01)

    one_sided, coins = score_of([0.5] * batches), score_of([0.5, -0.5] * (batches // 2))
    others = (one_sided, coins, *[coins] * 46)
    site = SiteScore("s", "float32", 4, {(8,): batches}, (1.0, 0.0, 1.0, 0.0, 3.0), 1.0, others)
    scores = rf.Scores("", "activations", batches, 1.0, (site,))
    assert scores.first_counts(one_sided) == counts  # of 48: 2 log(96 / 0.05) = 15.1 batches
    assert not scores.first_counts(coins)
    assert scores.increase(site, one_sided) == pytest.approx(0.1 / batches + 0.5 * counts)


def test_a_loss_that_falls_is_no_reason_for_large_errors() -> None:
    def falling(model: nn.Module, batch: Tensor) -> Tensor:
        return -quadratic(model, batch)

    model, x = chain(), torch.randn(32, 64)
    rising = rf.score(model, [x], loss=quadratic, formats=[2, 8], modules=["0"])
    scores = rf.score(model, [x], loss=falling, formats=[2, 8], modules=["0"])
    [site], [other] = rising.sites, scores.sites
    for up, down in zip(site.formats, other.formats, strict=True):
        assert down.second == -up.second < 0
        assert scores.increase(other, down) == rising.increase(site, up) > 0


def test_a_site_of_zeros_costs_nothing() -> None:
    model = chain()
    with torch.no_grad():
        model[0].gain.zero_()
    scores = rf.score(model, [torch.randn(4, 64)], loss=quadratic, formats=[2, 8], modules=["0"])
    [site] = scores.sites
    assert [scores.increase(site, score) for score in site.formats] == [0, 0]


def test_measures_of_a_site() -> None:
    model, x = chain(), torch.randn(32, 64)
    [site] = rf.score(model, [x], loss=quadratic, formats=[4], modules=["0"]).sites
    y = model[0](x).detach()
    decoded = rf.dequantize(rf.quantize(y, 4), 4, y.shape)
    assert site.kurtosis == pytest.approx(excess_kurtosis(y), abs=1e-9)
    assert site.sqnr_db(site.formats[0]) == pytest.approx(sqnr_db(y, decoded), abs=1e-5)
    rms = y.double().square().mean().sqrt()
    assert site.peak_over_rms == pytest.approx(float(y.abs().max() / rms))
    rate = 4 + 16 / 128  # bits an element, with the scale of a group
    limit = rate * 20 * torch.log10(torch.tensor(2.0)).item()
    assert site.gap_db(site.formats[0]) == pytest.approx(limit - sqnr_db(y, decoded), abs=1e-4)
    assert site.calls == {(32, 64): 1}


def test_the_model_stays_as_it_is() -> None:
    model, batches = NanoGPT().train(), sentences(1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    rf.score(model, batches, loss=language, formats=[4])
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(m._forward_hooks for m in model.modules())


def test_a_module_that_runs_twice_is_one_site() -> None:
    block = Scale(64)
    model = nn.Sequential(block, nn.Tanh(), block)
    scores = rf.score(model, [torch.randn(4, 64)], loss=quadratic, formats=[4], modules=["0"])
    assert scores.sites[0].calls == {(4, 64): 2}


# ---- ranks and progress ------------------------------------------------------------------------


def scored_together(rank: Rank) -> tuple[rf.Scores, rf.Scores]:
    torch.manual_seed(7)
    model, batches = NanoGPT(), sentences(3)
    mine = batches[:2] if rank.index == 0 else batches[2:]
    alone = rf.score(model, mine, loss=language, formats=[3], seed=rank.index << 32)
    return alone, rf.score(model, mine, loss=language, formats=[3], group=dist.group.WORLD)


def test_ranks_score_their_batches_together(ranks: RunRanks) -> None:
    (first, found), (second, same) = ranks(2, scored_together)
    assert found == same == first.merge(second)
    assert found.batches == 3


def failed_together(rank: Rank) -> RFCompileError:
    return error_of(
        lambda: rf.score(chain(), [] if rank.index else [torch.randn(2, 64)], loss=quadratic,
                         modules=["0"], formats=[4], group=dist.group.WORLD)
    )  # fmt: skip


def different_together(rank: Rank) -> RFCompileError:
    bits = 4 - rank.index
    return error_of(
        lambda: rf.score(chain(), [torch.randn(2, 64)], loss=quadratic, modules=["0"],
                         formats=[bits], group=dist.group.WORLD)
    )  # fmt: skip


def test_what_fails_on_one_rank_fails_on_all(ranks: RunRanks) -> None:
    for error in ranks(2, failed_together):
        assert isinstance(error, OptionError)
        assert "rank 1: batches=[]" in str(error)
    for error in ranks(2, different_together):
        assert isinstance(error, ScoreError)
        assert "the sites of the scores to merge" in str(error)
    with pytest.raises(ProcessGroupError, match="there is no process group"):
        rf.score(chain(), [torch.randn(2, 64)], loss=quadratic, group="world")


@pytest.mark.parametrize("has_length", [True, False])
def test_a_line_of_progress(has_length: bool, capsys: pytest.CaptureFixture[str]) -> None:
    x = torch.randn(2, 64)
    batches: Any = [x, x] if has_length else iter([x, x])
    rf.score(chain(), batches, loss=quadratic, modules=["0"], formats=[4], progress=True)
    shown = capsys.readouterr().err.split("\r")
    assert shown[-1] == ""
    assert not shown[-2].strip()
    assert ("] 1/2, " if has_length else "score: batch 2, ") in shown[-3]
    rf.score(chain(), [x], loss=quadratic, modules=["0"], formats=[4])
    assert capsys.readouterr().err == ""


# ---- data --------------------------------------------------------------------------------------


def test_saved_scores_are_the_same(tmp_path: Path) -> None:
    scores = rf.score(NanoGPT(), sentences(2), loss=language, formats=[2, "4b:g64:h32"])
    scores.save(tmp_path / "scores.json")
    assert rf.Scores.load(tmp_path / "scores.json") == scores
    assert "blocks.1" in str(scores)
    assert "not scored: gradients, weights, optimizer_state" in str(scores)


def test_merged_scores_are_those_of_all_batches() -> None:
    model, batches = NanoGPT(), sentences(3)
    whole = rf.score(model, batches, loss=language, formats=[3])
    parts = [
        rf.score(model, part, loss=language, formats=[3]) for part in (batches[:2], batches[2:])
    ]
    merged = parts[0].merge(parts[1])
    assert merged.batches == 3
    for one, other, a, b in zip(merged.sites, whole.sites, *(p.sites for p in parts), strict=True):
        assert one.calls == other.calls
        assert one.powers == pytest.approx(other.powers)
        [found], [first], [second], [expected] = one.formats, a.formats, b.formats, other.formats
        assert (found.probes, found.second) == (3, first.second + second.second)
        assert found.noise == pytest.approx(expected.noise, rel=1e-9)
    with pytest.raises(ScoreError, match="the model of the scores to merge"):
        whole.merge(rf.score(NanoGPT(width=64), batches, loss=language, formats=[3]))
    with pytest.raises(ScoreError, match="the sites of the scores to merge"):
        whole.merge(rf.score(model, batches, loss=language, formats=[4]))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("nonsense", "give a file that Scores.save wrote"),
        ("[]", "give a file that Scores.save wrote"),
        ('{"schema": "rfcompile.scores/9"}', "this version reads 'rfcompile.scores/3'"),
        ('{"schema": "rfcompile.scores/3", "sites": [{}]}', "a field is missing or unknown"),
    ],
)
def test_files_that_are_no_scores(content: str, message: str, tmp_path: Path) -> None:
    (file := tmp_path / "scores.json").write_text(content)
    with pytest.raises(ScoreError, match=message):
        rf.Scores.load(file)
    with pytest.raises(ScoreError, match="give a file"):
        rf.Scores.load(tmp_path / "nowhere.json")


# ---- errors ------------------------------------------------------------------------------------


def test_no_batches_and_no_formats() -> None:
    with pytest.raises(OptionError, match=r"batches=\[\] .* give one batch or more"):
        rf.score(chain(), [], loss=quadratic)
    with pytest.raises(OptionError, match="give one format or more beside exact"):
        rf.score(chain(), [torch.randn(2, 64)], loss=quadratic, formats=["exact"])


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda m, b: m(b), r"the loss of batch 1: \(2, 64\); return a tensor with one"),
        (lambda m, b: 3.0, "the loss of batch 1: 'float'; return a tensor"),
        (lambda m, b: m(b).sum() * float("nan"), "the loss of batch 1: nan; it must be finite"),
        (lambda m, b: m(b).detach().sum(), "it depends on no site"),
    ],
)
def test_a_loss_that_is_not_a_number(loss: Any, message: str) -> None:
    with pytest.raises(ScoreError, match=message):
        rf.score(chain(), [torch.randn(2, 64)], loss=loss)


def test_a_gradient_that_is_not_a_number() -> None:
    model, x = chain(), torch.randn(2, 64)
    target = model(x).detach()

    def distance(model: nn.Module, batch: Tensor) -> Tensor:  # 0 / 0 where it is zero
        return (model(batch) - target).square().sum().sqrt()

    with pytest.raises(ScoreError, match=r"the gradient at '0' in .*: nan; it must be finite"):
        rf.score(model, [x], loss=distance, modules=["0"], formats=[4])


def test_a_site_that_never_ran() -> None:
    model = chain()

    def first_only(model: nn.Module, batch: Tensor) -> Tensor:
        return model.get_submodule("0")(batch).square().mean()

    with pytest.raises(ScoreError, match=r"sites that never ran: \['1'\]; nothing crossed"):
        rf.score(model, [torch.randn(2, 64)], loss=first_only)


@pytest.mark.parametrize("later", [0, 2, "shape"])
def test_a_site_that_runs_otherwise_if_disturbed(later: int | str) -> None:
    class Fickle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block, self.other, self.passes = Scale(64), Scale(64), 0

        def forward(self, x: Tensor) -> Tensor:
            self.passes += 1
            x = self.other(self.block(x))
            if self.passes == 1 or later == 2:
                x = self.block(x)
            if self.passes > 1 and later == 2:
                x = self.block(x)
            return self.block(x[:1]) if self.passes > 1 and later == "shape" else x

    with pytest.raises(ScoreError, match="a site with another course: 'block'"):
        rf.score(Fickle(), [torch.randn(4, 64)], loss=quadratic, modules=["block", "other"])


def test_a_site_that_cannot_be_coded_and_none() -> None:
    with pytest.raises(DtypeError, match="the output of module '0'"):
        rf.score(chain().double(), [torch.randn(2, 64).double()], loss=quadratic)
    with pytest.raises(BoundaryError, match="no repeated blocks"):
        rf.score(nn.Linear(3, 3), [torch.ones(2, 3)], loss=quadratic)
