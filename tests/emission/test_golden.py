"""The golden table is what Inductor and Triton make today: no further launch, spill or byte.

Needs Triton: ``make test-kernels``. After a wanted change: ``python -m tests.emission.golden
--again``, and read what the diff of ``golden.jsonl`` says.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.emission import golden

pytestmark = pytest.mark.kernels


@pytest.fixture(scope="module")
def made() -> dict[tuple[str, ...], golden.Row]:
    rows = golden.rows_of(golden.SAMPLE)
    return {tuple(row[name] for name in golden.KEY): row for row in rows}


@pytest.mark.parametrize("key", golden.SAMPLE, ids="-".join)
def test_a_row_is_that_of_the_table(
    key: tuple[str, ...], made: dict[tuple[str, ...], golden.Row]
) -> None:
    now, then = made[key], golden.table()[key]
    assert "error" not in now, now["error"]
    assert worse(now, then) == []


def worse(now: golden.Row, then: golden.Row) -> list[str]:
    """In which fields a row is worse than another one."""

    def is_worse(name: str) -> bool:
        new: Any = now[name]
        old: Any = then[name]
        if name in ("loads", "stores"):
            return min(new, default=0) < min(old, default=0) or max(new) < max(old)
        slack = 1.1 if name == "instructions" else 1.0  # what a version of the compiler may add
        return bool(new > slack * old)

    names = ("launches", "spilled", "loads", "stores", "bytes_over_least", "instructions")
    return [f"{name}: {now[name]} after {then[name]}" for name in names if is_worse(name)]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("launches", 2),
        ("spilled", 8),
        ("loads", [8, 64]),
        ("stores", [64]),
        ("bytes_over_least", 1.001),
        ("instructions", 15.0),
    ],
)
def test_a_worse_row_is_found(field: str, value: Any) -> None:
    row = {
        "launches": 1, "spilled": 0, "loads": [8, 128], "stores": [64, 128],
        "bytes_over_least": 1.0, "instructions": 13.0,
    }  # fmt: skip
    assert worse(row, row) == []
    assert worse(row | {field: value}, row) == [f"{field}: {value} after {row[field]}"]


def test_no_row_is_missing() -> None:
    table = golden.table()
    assert [key for key in golden.all_keys() if key not in table] == []


def test_no_row_has_a_spill_or_a_launch_too_many() -> None:
    """One scale for a row is known only when all of it was read: coding reads it twice."""
    for key, row in golden.table().items():
        codes_rows = "tensor" in key[2] and key[1] in ("quantize", "requantize")
        assert row["spilled"] == 0, key
        assert row["launches"] == (2 if codes_rows else 1), key
        assert codes_rows or row["bytes_over_least"] == 1.0, key
        assert row["bytes_over_least"] <= 2, key


def test_the_table_has_a_key_once_and_no_error() -> None:
    lines = [json.loads(line) for line in golden.FILE.read_text().splitlines()]
    assert len(lines) == len(golden.table())
    assert {*golden.table()} <= {*golden.all_keys()}
    assert [line for line in lines if "error" in line] == []
