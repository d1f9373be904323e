"""What is read from machine code: widths, kinds, loops; on texts, so that no compiler is needed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from rfcompile.emission import machine_code
from rfcompile.emission.machine_code import Instruction

SASS = """
.text.kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/                   S2R R0, SR_TID.X ;
.L_x_1:
        /*0020*/               @!P0 LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0030*/                   FFMA R4, R5, R6, R7 ;
        /*0040*/                   LDG.E.U8 R8, desc[UR4][R2.64+0x10] ;
        /*0050*/              @P0 BRA `(.L_x_1) ;
        /*0060*/                   IMAD.MOV.U32 R9, RZ, RZ, R4 ;
        /*0070*/                   F2I.TRUNC.NTZ R9, R9 ;
        /*0080*/                   STG.E.64 desc[UR4][R2.64], R8 ;
        /*0090*/                   STL [R1], R8 ;
        /*00a0*/                   EXIT ;
.L_x_2:
        /*00b0*/                   BRA `(.L_x_2);
        /*00c0*/                   NOP;
"""
GCN = """
kernel:
	s_load_dwordx4 s[0:3], s[0:1], 0x0
.LBB0_1:
	buffer_load_dwordx4 v[0:3], v4, s[0:3], 0 offen
	global_load_ubyte v5, v6, s[2:3]
	v_pk_fma_f32 v[0:1], v[2:3], v[2:3], v[0:1]
	v_mul_lo_u32 v7, v7, v8
	s_cbranch_scc1 .LBB0_1
	v_rcp_f32_e32 v9, v9
	global_store_short v6, v5, s[2:3]
	s_endpgm
	.vgpr_count:     9
"""


def test_loads_and_stores_by_width() -> None:
    code = list(machine_code._sass(SASS))
    assert machine_code._widths(code, "LDG", machine_code._sass_bits) == {128: 1, 8: 1}
    assert machine_code._widths(code, "STG", machine_code._sass_bits) == {64: 1}
    amd = list(machine_code._gcn(GCN))
    loads = "(global|buffer|flat)_load"
    assert machine_code._widths(amd, loads, machine_code._gcn_bits) == {128: 1, 8: 1}
    stores = "(global|buffer|flat)_store"
    assert machine_code._widths(amd, stores, machine_code._gcn_bits) == {16: 1}


def test_a_loop_counts_by_its_trips() -> None:
    code = list(machine_code._sass(SASS))
    once = machine_code._counted(code, [1], machine_code._sass_kind)
    assert once == {"issue": 5, "memory": 4, "float": 1, "multiply": 1, "special": 1}
    ten = machine_code._counted(code, [10], machine_code._sass_kind)
    assert ten == once | {"issue": 14, "memory": 22, "float": 10}


def test_loops_in_loops_have_trips_of_their_own() -> None:
    # The inner loop goes back from two places.
    jumps = [Instruction("BRA", jump) for jump in (2, 3, 5)]
    code = [Instruction(name) for name in ("FADD", "LDG", "FADD")] + jumps
    found = machine_code._counted(code, [10, 7], machine_code._sass_kind)
    assert found == {"float": 10 + 70, "memory": 70, "issue": 70 + 70 + 10}


def test_a_jump_onto_itself_is_no_loop() -> None:
    """The padding behind a kernel."""
    assert [i.name for i in machine_code._sass(SASS) if i.jump] == ["BRA"]
    assert Instruction("BRA", 3) in machine_code._sass(SASS)


def test_amd_kinds() -> None:
    code = list(machine_code._gcn(GCN))
    assert machine_code._counted(code, [2], machine_code._gcn_kind) == {
        "issue": 1 + 2 + 1, "memory": 4 + 1, "float": 2, "multiply": 2, "special": 1,
    }  # fmt: skip
    assert machine_code._metadata(GCN, "vgpr_count") == 9


def config(**kwargs: int) -> Any:
    return SimpleNamespace(kwargs=kwargs)


def test_the_widest_configuration_is_taken_but_no_reduction_of_a_wide_block() -> None:
    given = [config(XBLOCK=size, R0_BLOCK=64) for size in (1, 8, 32, 128)]
    for is_reduction, block in ((True, 32), (False, 128)):
        (chosen,) = machine_code._chosen(given, is_reduction=is_reduction, every=False)
        assert chosen.kwargs["XBLOCK"] == block
    every = machine_code._chosen(given, is_reduction=True, every=True)
    assert [c.kwargs["XBLOCK"] for c in every] == [1, 8, 32]
    (only,) = machine_code._chosen([given[-1]], is_reduction=True, every=False)
    assert only.kwargs["XBLOCK"] == 128


@pytest.mark.parametrize(
    ("sizes", "numels", "programs", "trips"),
    [
        ({"XBLOCK": 256}, {"x": 1000, "r0_": 1}, 4, 1),
        ({"XBLOCK": 16, "YBLOCK": 32}, {"y": 64, "x": 17, "r0_": 1}, 4, 1),
        ({"XBLOCK": 2, "R0_BLOCK": 64}, {"x": 5, "r0_": 130}, 3, 3),
        ({}, {"x": 1, "r0_": 64}, 1, 1),
    ],
)
def test_programs_and_trips(
    sizes: dict[str, int], numels: dict[str, int], programs: int, trips: int
) -> None:
    assert machine_code._programs(sizes, numels) == programs
    assert machine_code._trips(sizes, numels) == trips
