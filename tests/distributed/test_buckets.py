"""Which gradients of a bucket travel together, in which format, and why not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import rfcompile as rf
from rfcompile.distributed.buckets import Part, elements_of, parts_of, site_of
from rfcompile.errors import HookError
from rfcompile.wire.cost import sent_bytes
from rfcompile.wire.exchanges import all_reduce_sent_bytes
from rfcompile.wire.policy import Policy

SIZES = [("b.bias", 3), ("b.weight", 5), ("empty", 0), ("a.bias", 2), ("a.weight", 4)]
CPU = torch.device("cpu")


def parts(
    policy: Policy, buffer: Tensor | None = None, world: int = 2
) -> list[tuple[str | None, tuple[str, ...], str]]:
    found = parts_of(policy, SIZES, torch.arange(14.0) if buffer is None else buffer, world)
    return [(part.format and part.format.spec, part.names, part.decision.reason) for part in found]


def test_one_format_is_one_part_without_the_empty_parameters() -> None:
    names = ("b.bias", "b.weight", "a.bias", "a.weight")
    assert parts(Policy(gradients="4b", min_bytes=0)) == [("4b:g128:tread", names, "")]


def test_parameters_of_one_format_travel_together_wherever_they_lie() -> None:
    policy = Policy(gradients=4, min_bytes=0, sites={"*.bias": None, "a": 8})
    assert parts(policy) == [
        (None, ("b.bias", "a.bias"), "sites['*.bias'] says exact"),
        ("4b:g128:tread", ("b.weight",), ""),
        ("8b:g128:tread", ("a.weight",), ""),  # by the path of its module
    ]


def test_min_bytes_counts_what_no_pattern_names() -> None:
    sites = {"a.*": 8}  # lifts min_bytes for the rest of the bucket: 6 of 14 elements
    rest = ("b.bias", "b.weight")
    for buffer, size in ((torch.zeros(14), 32), (torch.zeros(14, dtype=torch.bfloat16), 16)):
        assert parts(Policy(gradients=4, min_bytes=size, sites=sites), buffer)[0] == (
            "4b:g128:tread", rest, "",
        )  # fmt: skip
        assert parts(Policy(gradients=4, min_bytes=size + 1, sites=sites), buffer)[0] == (
            None, rest, f"{size} bytes < min_bytes={size + 1}",
        )  # fmt: skip


@pytest.mark.parametrize("buffer", [torch.zeros(28), torch.zeros(13), torch.zeros(28).to_sparse()])
def test_a_buffer_that_the_parameters_do_not_cover_is_an_error(buffer: Tensor) -> None:
    with pytest.raises(HookError, match=r"holds \d+ elements, its parameters .* have 14: what is"):
        parts(Policy(gradients=4), buffer)


def test_a_complex_parameter_takes_two_elements_each() -> None:
    assert elements_of(torch.zeros(3, 2, dtype=torch.complex64)) == 12
    assert elements_of(torch.zeros(3, 2)) == 6


def test_rows_of_shards_are_named_by_their_unit_too() -> None:
    """FSDP: weights of a rank ``[14]``, gradients for all ranks ``[W, 14]``."""
    sites = {"unit": 8}
    policy = Policy(weights=4, gradients=3, min_bytes=57, sites=sites)
    weights, gradients = torch.zeros(14), torch.zeros(2, 14)
    for buffer, kind, bits in ((weights, "weights", None), (gradients, "gradients", 3)):
        [part] = parts_of(policy, SIZES, buffer, 2, kind, "other")
        assert (part.format and part.format.bits) == bits  # 56 bytes a row
        [part] = parts_of(policy, SIZES, buffer, 2, kind, "unit")
        assert part.format == rf.QuantFormat(8, grid="mid-tread")


def test_the_columns_of_a_part() -> None:
    rows = torch.arange(28.0).view(2, 14)
    policy = Policy(gradients=4, min_bytes=0, sites={"*.bias": None})
    exact, quantized = parts_of(policy, SIZES, rows, 2)
    columns = [0, 1, 2, 8, 9]
    assert torch.equal(exact.gather(rows), rows[:, columns])
    assert torch.equal(torch.cat([p.gather(rows) for p in (exact, quantized)], 1).sum(), rows.sum())
    exact.scatter(torch.zeros(2, 5), rows)
    assert not rows[:, columns].any()
    assert rows[:, 3:8].all()


@pytest.mark.parametrize(
    ("buffer", "world", "reason"),
    [
        (torch.zeros(14), 1, "one rank: nothing is sent"),
        (torch.zeros(14, dtype=torch.float64), 2, "f64 data is not quantized"),
        (torch.zeros(14).to_sparse(), 2, "sparse gradients are not quantized"),
    ],
)
def test_what_is_never_quantized(buffer: Tensor, world: int, reason: str) -> None:
    policy = Policy(gradients=4, min_bytes=0, sites={"a.*": 8})
    [part] = parts_of(policy, SIZES, buffer, world)
    assert (part.format, part.decision.reason, part.decision.eligible) == (None, reason, False)


def test_eligible_is_what_only_its_size_keeps_exact() -> None:
    def eligible(policy: Policy) -> list[bool]:
        return [part.decision.eligible for part in parts_of(policy, SIZES, torch.zeros(14), 2)]

    assert eligible(Policy(gradients=4, min_bytes=0)) == [True]
    assert eligible(Policy(gradients=4)) == [True]
    assert eligible(Policy()) == [False]
    assert eligible(Policy(gradients=4, min_bytes=0, sites={"b.*": None})) == [False, True]


def test_gather_and_scatter_are_inverse_and_copy_only_where_they_must() -> None:
    policy = Policy(gradients=4, min_bytes=0, sites={"*.bias": None})
    biases, weights = parts_of(policy, SIZES, torch.zeros(14), 2)
    buffer = torch.arange(14.0)
    assert biases.gather(buffer).tolist() == [0, 1, 2, 8, 9]
    assert weights.gather(buffer).tolist() == [3, 4, 5, 6, 7, 10, 11, 12, 13]
    assert [len(piece) for piece in weights.pieces(weights.gather(buffer))] == [5, 4]
    biases.scatter(-biases.gather(buffer).double(), buffer)
    assert buffer.tolist() == [0, -1, -2, 3, 4, 5, 6, 7, -8, -9, 10, 11, 12, 13]

    [whole] = parts_of(Policy(gradients=4, min_bytes=0), SIZES, buffer, 2)
    assert whole.gather(buffer).data_ptr() == buffer.data_ptr()


def test_the_line_of_the_report() -> None:
    policy = Policy(gradients=4, min_bytes=0, sites={"a.weight": None})
    quantized, exact = parts_of(policy, SIZES, torch.zeros(14), 4)
    site = site_of(quantized, 3, torch.bfloat16, "g", 4, CPU)
    assert (site.place, site.shape, site.dtype) == ("b.bias ... a.bias bucket 3", (10,), "bf16")
    assert site.bytes_before == sent_bytes("all_reduce", 20, 4)
    assert quantized.format is not None
    assert site.bytes_after == all_reduce_sent_bytes(10, quantized.format, 4, 1)
    site = site_of(exact, 3, torch.bfloat16, "g", 4, CPU)
    assert (site.place, site.format) == ("a.weight bucket 3", None)
    assert site.bytes_after == site.bytes_before == sent_bytes("all_reduce", 8, 4)


def test_sparse_gradients_have_no_size_before_they_are_there() -> None:
    [part] = parts_of(Policy(gradients=4), [("a", 4)], torch.zeros(4).to_sparse(), 2)
    assert isinstance(part, Part)
    site = site_of(part, 0, torch.float32, "g", 2, CPU, is_sparse=True)
    assert (site.bytes_before, site.bytes_after) == (None, None)
