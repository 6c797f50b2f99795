"""The machine code of every kernel: no spills, no stack, and what machine_code.txt says."""

import functools

import pytest
from machine_code import TABLE, ctas_per_sm, measure, read_report, to_text
from nvcc import nvcc, version
from sass import Code, last_register


@functools.cache
def rows():
    return measure()


def test_no_kernel_spills_or_has_a_stack():
    wrong = [(f, k, r["arch"]) for f, k, r in rows() if r["stack"] or r["spills"]]
    assert wrong == []


def test_table_is_up_to_date():
    committed = TABLE.read_text()
    made_by, ours = committed.partition("\n")[0].rpartition(" ")[2], version(nvcc())
    assert ours == made_by, (
        f"machine_code.txt was made by nvcc {made_by}, but CUDACXX is nvcc {ours}: unset CUDACXX, "
        "and the tests install theirs"
    )
    assert to_text(rows()) == committed, "run python python_tests/cuda/machine_code.py --write"


def test_tensor_core_kernels_keep_their_pipeline():
    """A main loop multiplies more often than it loads fragments by ldmatrix, and copies
    asynchronously."""
    for source, kernel, row in rows():
        if row["arch"] == "90a":  # an HGMMA takes 16 of a step's 64 terms
            assert row["hmma"] == 2 * 4 and row["ldgsts"] >= 16, kernel  # two blocks of rows
            gathers_both = "weights" in kernel  # which the copy engine cannot
            assert (row["utmaldg"] > 0) != gathers_both, kernel
        elif row["hmma"] and source != "decode.cu":  # fragments come straight from global memory
            assert row["ldgsts"] > 0 and row["bar"] > 0, (kernel, row)
            if "weights_kernel<float" in kernel:  # its fragments are single numbers
                assert row["hmma"] >= 64 and row["ldsm"] == 0, (kernel, row)
            else:
                assert row["hmma"] >= 2 * row["ldsm"] > 0, (kernel, row)


def test_products_of_a_step_do_not_wait_for_each_other():
    assert [k for _, k, row in rows() if row.get("is_serialised", row["arch"] == "90a")] == []


def test_both_roles_get_by_on_their_registers():
    """setmaxnreg's, which ptxas need not check: it reports those at the start of the kernel."""
    for _, kernel, row in rows():
        for role in ("fetch", "multiply") if row["arch"] == "90a" else ():
            used, left = map(int, row[role].split("/"))
            assert used <= left, (kernel, role)


def test_counts_of_a_loop_by_hand():
    body = """
.L_x_0:
        /*0000*/                   LDSM.16.M88.4 R4, [R2] ;
        /*0010*/              @!P0 LDGSTS.E.BYPASS.128 [R8], [R2.64] ;
.L_x_1:
        /*0020*/                   HMMA.16816.F32.BF16 R4, R4, R8, R4 ;
        /*0030*/              @P1 BRA `(.L_x_1) ;
        /*0040*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0050*/              @P2 BRA `(.L_x_0) ;
        /*0060*/                   EXIT ;
.L_x_2:
        /*0070*/                   BRA `(.L_x_2);
        /*0080*/                   NOP;
"""
    assert Code(body).counts() == {
        "sass": 7, "loop": 2, "hmma": 1, "ldsm": 0, "ldgsts": 0, "bar": 0, "depbar": 0,
    }  # fmt: skip


HOPPER = """
        /*0000*/                   BRA.DIV UR4, `(.L_x_3) ;
        /*0010*/              @!P0 BRA `(.L_x_4) ;
        /*0020*/                   USETMAXREG.DEALLOC.CTAPOOL 0x38 ;
        /*0028*/                   BRA.DIV UR4, `(.L_x_5) ;
        /*0030*/                   LDG.E.64 R50, desc[UR4][R52.64] ;
        /*0040*/                   EXIT ;
.L_x_4:
        /*0050*/                   USETMAXREG.TRY_ALLOC.CTAPOOL UP0, 0xe0 ;
.L_x_1:
        /*0060*/                   HGMMA.64x192x16.F32.BF16 R24, gdesc[UR8], R24, gsb0 ;
        /*0070*/                   WARPGROUP.DEPBAR.LE gsb0, 0x1 ;
        /*0080*/               @P1 BRA `(.L_x_1) ;
.L_x_2:
        /*0090*/                   HGMMA.64x192x16.F32.BF16 R24, gdesc[UR8], R24 ;
        /*00a0*/                   HGMMA.64x192x16.F32.BF16 R120, gdesc[UR12], R120, gsb0 ;
        /*00b0*/                   WARPGROUP.DEPBAR.LE gsb0, 0x1 ;
        /*00c0*/               @P1 BRA `(.L_x_2) ;
        /*00d0*/                   EXIT ;
.L_x_3:
        /*00e0*/                   MOV R230, R2 ;
        /*00f0*/                   BRA `(.L_x_1) ;
.L_x_5:
        /*0100*/                   MOV R54, R2 ;
        /*0110*/                   EXIT ;
"""


def test_loops_and_roles_of_hopper_by_hand():
    """The way back from behind the end is no loop, and no role reaches what stands there."""
    code = Code(HOPPER)
    assert [len(code.ops[loop]) for loop in code.main_loops()] == [3, 4]
    assert code.roles() == [(0x38, 55), (0xE0, 216)]
    assert not code.is_serialised()
    waiting = HOPPER.replace(
        "R24 ;", "R24, gsb0 ;\n        /*0098*/ WARPGROUP.DEPBAR.LE gsb0, 0x0 ;"
    )
    assert Code(waiting).is_serialised()


@pytest.mark.parametrize(
    "op, operands, last",
    [
        ("HGMMA.64x160x16.F32.BF16", " R24, gdesc[UR8], R24, gsb0 ;", 103),
        ("STG.E.128.STRONG.GPU", " desc[UR4][R8.64+0x40], R12 ;", 15),
        ("STG.E", " desc[UR4][R20.64], R12 ;", 21),
        ("IMAD.WIDE", " R4, R3, 0x2, R6 ;", 7),
        ("LDGSTS.E.BYPASS.128", " [R9+0x80], desc[UR6][R30.64], !P1 ;", 31),
        ("SYNCS.ARRIVE.TRANS64", " RZ, [UR4], RZ ;", -1),
    ],
)
def test_registers_of_an_instruction_by_hand(op, operands, last):
    assert last_register(op, operands) == last


def test_report_by_hand():
    text = (
        "ptxas info    : Compiling entry function '_Z1kv' for 'sm_80'\n"
        "ptxas info    : Function properties for _Z1kv\n"
        "    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads\n"
        "ptxas info    : Used 41 registers, used 1 barriers, 34852 bytes smem, 448 bytes cmem[0]\n"
    )
    assert read_report(text) == {
        "_Z1kv": {"registers": 41, "shared": 34852, "stack": 8, "spills": 16}
    }


@pytest.mark.parametrize(
    "registers, shared, ctas", [(128, 0, 4), (129, 0, 3), (32, 0, 16), (64, 49152, 3)]
)
def test_occupancy_by_hand(registers, shared, ctas):
    assert ctas_per_sm("80", 128, registers, shared) == ctas
