"""The kernels that Inductor emits for a GPU: launches, spills, widths of loads, eager's bytes.

No GPU is needed, and no kernel is timed: ``fake_gpu.py`` says how. Needs Triton: ``make
test-kernels``.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from rfcompile.emission.machine_code import MachineCode
from tests.inductor.fake_gpu import Case, Emitted, emit, interpret

pytestmark = pytest.mark.kernels

WIDTHS = ("2b", "3b", "4b", "8b")
LARGE = 2**17
"""Elements of a large output: Inductor then gives a thread eight of them."""


def cases() -> dict[str, Case]:
    found = {}
    for width in WIDTHS:
        for case in (
            Case("quantize", f"{width}:g128", 2, 2**15),
            Case("dequantize", f"{width}:g128", 2, LARGE),
            Case("dequantize_sum", f"{width}:g128", 2, LARGE),
            Case("requantize", f"{width}:g128", 2, 2**14),
        ):
            found[f"{case.operator}-{width}"] = case
    found["quantize-4b-stoch"] = Case("quantize", "4b:g128:stoch", 2, 2**14)
    found["requantize-2b-stoch"] = Case("requantize", "2b:g128:stoch", 2, 2**14)
    found["quantize-4b-tail"] = Case("quantize", "4b:g128", 3, 3000)
    return found


CASES = cases()
TRANSPOSED = Case("quantize", "4b:g128", 4, 2**15, layout="transposed")
HEADS = Case("quantize", "4b:g128", 4, 2**15, layout="heads")


@pytest.fixture(scope="module")
def emitted() -> dict[str, Emitted]:
    named = {**CASES, "transposed": TRANSPOSED, "heads": HEADS}
    return dict(zip(named, emit(list(named.values())), strict=True))


@pytest.fixture(scope="module")
def differences(
    emitted: dict[str, Emitted], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    found = interpret(list(emitted.values()), tmp_path_factory.mktemp("interpreted"))
    return dict(zip(emitted, found, strict=True))


def the_code(emitted: Emitted) -> MachineCode:
    assert emitted.error == ""
    (code,) = emitted.codes.values()
    return code


@pytest.mark.parametrize("name", CASES)
def test_an_operator_is_one_launch(name: str, emitted: dict[str, Emitted]) -> None:
    assert emitted[name].error == ""
    emission = emitted[name].emission
    assert emission is not None
    assert len(emission.launches) == 1
    assert emission.external_calls == ()


@pytest.mark.parametrize("name", CASES)
def test_no_register_is_spilled(name: str, emitted: dict[str, Emitted]) -> None:
    code = the_code(emitted[name])
    assert "STG" in code.text, "not the code of a kernel"
    assert code.spilled == 0


@pytest.mark.parametrize("name", CASES)
def test_no_subnormal_is_flushed(name: str, emitted: dict[str, Emitted]) -> None:
    assert ".ftz" not in the_code(emitted[name]).ir


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("quantize")])
def test_quantize_reads_vectors(name: str, emitted: dict[str, Emitted]) -> None:
    assert the_code(emitted[name]).loads.keys() == {128}


@pytest.mark.parametrize("name", [name for name in CASES if not name.startswith("quantize")])
def test_codes_are_read_in_words(name: str, emitted: dict[str, Emitted]) -> None:
    """A byte at a time come only the scales: two bytes a group and row."""
    loads = the_code(emitted[name]).loads
    wide = {bits for bits in loads if bits >= 64}
    assert wide
    assert loads.keys() <= {8, *wide}
    if name.startswith("dequantize"):  # a thread has one group
        rows = CASES[name].rows if name.startswith("dequantize_sum") else 1
        assert loads[8] == 2 * rows


def test_a_transposed_input_is_copied_in_its_own_order_and_then_read(
    emitted: dict[str, Emitted],
) -> None:
    """At once it would be read twice, an element a sector of 32 bytes: 2 * 16 times its bytes."""
    made, nbytes = emitted["transposed"], 2 * TRANSPOSED.rows * TRANSPOSED.numel
    assert made.error == ""
    assert made.emission is not None
    copy, coding = made.emission.launches
    assert (copy.read, copy.written, coding.read) == (nbytes, nbytes, nbytes)
    assert coding.written < nbytes
    assert made.codes[copy.kernel].config.keys() == {"XBLOCK", "YBLOCK"}  # a tile
    for launch in (copy, coding):
        assert made.codes[launch.kernel].loads.keys() == {128}, launch.kernel


def test_permuted_heads_are_read_as_they_lie(emitted: dict[str, Emitted]) -> None:
    made = emitted["heads"]
    assert the_code(made).loads.keys() == {128}
    assert made.emission is not None
    assert len(made.emission.launches) == 1


@pytest.mark.parametrize("name", [*CASES, "transposed", "heads"])
def test_a_kernel_gives_eagers_bytes(name: str, differences: dict[str, str]) -> None:
    assert differences[name] == ""


def test_the_interpreter_sees_another_formula(emitted: dict[str, Emitted], tmp_path: Path) -> None:
    """Eager is asked for another format than the kernel was made for."""
    case = CASES["quantize-4b-tail"]
    other = Case(case.operator, "4b:g128:tread", case.rows, case.numel)
    made = emitted["quantize-4b-tail"]
    (found,) = interpret([Emitted(other, made.emission, made.codes)], tmp_path)
    assert found.endswith("elements differ")
