"""Machine instructions as series."""

from __future__ import annotations

import pytest

from tilewright.autotune.verdicts import Verdict
from tilewright.codegen.triton import sass
from tilewright.compiler.regress.gates import judge, rule_of
from tilewright.compiler.regress.instructions import IN_LOOPS, access_bits, instruction_series

# Lines as the disassembler prints them for 8.0, 9.0 and 10.0, with guards of every kind.
LISTING = """
.text.kernel:
        /*0000*/                   LDC R1, c[0x0][0x37c] ;
        /*00b0*/                   LDG.E.128 R12, [R32.64] ;
        /*0190*/              @!P6 LDG.E.64 R20, desc[UR4][R16.64+0x8] ;
        /*01a0*/              @UP0 UIADD3 UR4, UR4, 0x1, URZ ;
        /*01b0*/             @!UPT UIADD3 UR4, UR4, 0x1, URZ ;
        /*01c0*/               @PT LDG.E.U16.CONSTANT R3, desc[UR8][R8.64] ;
        /*0960*/                   DEPBAR {5,4,3,2,1,0} ;
        /*1fa0*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24, gsb0 ;
        /*12340*/                  EXIT ;
.L_x_1:
        /*12350*/                  BRA `(.L_x_1);
        /*12360*/                  NOP;
"""


@pytest.mark.quick
def test_guards_and_operands_are_no_part_of_a_name():
    assert sass.instruction_counts(LISTING) == {
        "LDC": 1,
        "LDG.E.128": 1,
        "LDG.E.64": 1,
        "UIADD3": 2,
        "LDG.E.U16.CONSTANT": 1,
        "DEPBAR": 1,
        "HGMMA.64x128x16.F32.BF16": 1,
        "EXIT": 1,
        "BRA": 1,
    }


def test_what_is_no_cubin_is_refused():
    with pytest.raises(ValueError, match="no code"):
        sass.code_listing(b"junk")


def _listing(*lines):
    """Code from names of instructions, labels "L1:", and jumps "BRA L1"."""
    text = []
    for line in lines:
        name, _, label = line.partition(" ")
        if name.endswith(":"):
            text.append(f".{name}".replace(".L", ".L_x_"))
        elif label:
            target = label.replace("L", ".L_x_")
            text.append(f"        /*0010*/              @!P1 {name} `({target}) ;")
        else:
            text.append(f"        /*0010*/                   {name} R0 ;")
    return "\n".join(text)


@pytest.mark.parametrize(
    ("lines", "count"),
    [
        (["FADD", "BRA L1", "FADD", "L1:", "EXIT"], 0),  # onwards
        (["FADD", "L1:", "FADD", "FMUL", "BRA L1", "EXIT"], 3),
        (["L1:", "NOP", "FADD", "BRA L1", "EXIT"], 2),
        (["FADD", "EXIT", "L1:", "BRA L1", "NOP"], 0),  # what stands behind all code
        (["L1:", "FADD", "L2:", "FMUL", "BRA.U L2", "FADD", "BRA L1"], 2),  # the inner one
        (["L1:", "FADD", "BRA L1", "L2:", "FMUL", "FMUL", "BRA L2"], 5),  # one after the other
        (["L1:", "FADD", "BRA L1", "FMUL", "BRA L1"], 4),  # two ways back are one loop
        (["L1:", "FADD", "L2:", "FMUL", "BRA L1", "FADD", "BRA L2"], 5),  # overlapping
    ],
)
def test_instructions_of_innermost_loops(lines, count):
    assert sass.loop_instructions(_listing(*lines)) == count


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("LDG.E", 32),
        ("LDG.E.128", 128),
        ("LDG.E.64.CONSTANT", 64),
        ("LDG.E.128.CONSTANT", 128),
        ("LDG.E.U8", 8),
        ("LDG.E.S16.CONSTANT", 16),
        ("LDG.E.ENL2.256", 256),
        ("STG.E.U16", 16),
        ("LDGSTS.E.BYPASS.128", 128),
        ("LDGSTS.E.BYPASS.LTC128B.128", 128),
        ("LDGSTS.E.LTC128B", 32),
        ("LDS.U16", 16),
        ("LDSM.16.M88.4", 128),
        ("LDSM.16.MT88.2", 64),
        ("LDSM.16.M88", 32),
        ("STSM.16.MT88.4", 128),
    ],
)
def test_width_of_an_access(name, bits):
    assert access_bits(name) == bits


@pytest.mark.quick
def test_counts_become_series():
    counts = {
        "LDG.E.128": 3,
        "LDG.E": 1,
        "LDGSTS.E.BYPASS.128": 4,
        "STG.E.U16": 2,
        "LDL": 5,
        "STL.64": 6,
        "HFMA2.MMA": 7,
        "MUFU.EX2": 8,
        "MUFU.RCP": 1,
        "BAR.SYNC.DEFER_BLOCKING": 2,
        "LDGDEPBAR": 9,
    }
    assert instruction_series({**counts, IN_LOOPS: 20}) == {
        "instructions": 48,
        "loop instructions": 20,
        "bits per global load": pytest.approx((128**2 * 7 + 32**2) / (128 * 7 + 32), abs=1e-3),
        "bits per global store": 16.0,
        "async loads": 1,
        "tensor cores": 0,
        "global loads 128-bit": 3,
        "global loads 32-bit": 1,
        "async copies 128-bit": 4,
        "global stores 16-bit": 2,
        "local loads": 5,
        "local stores": 6,
        "MUFU": 9,
        "barriers": 2,
    }


@pytest.mark.parametrize(
    ("name", "generation"),
    [
        ("FFMA", 0),
        ("HFMA2.MMA", 0),
        ("HMMA.16816.F32.BF16", 1),
        ("QMMA.16832.F32.E4M3.E4M3", 1),
        ("IMMA.16832.S8.S8", 1),
        ("HGMMA.64x128x16.F32.BF16", 2),
        ("QGMMA.64x128x32.F32.E4M3.E4M3", 2),
        ("UTCHMMA", 3),
        ("UTCQMMA", 3),
    ],
)
def test_which_tensor_cores(name, generation):
    found = instruction_series({name: 2, "DMMA.884": 1} if generation else {name: 2})
    assert found["tensor cores"] == generation
    if generation:
        assert found[name.split(".")[0]] == 2


def test_bulk_copies_are_loads_of_their_own_kind():
    assert instruction_series({"UTMALDG.2D": 2, "LDGSTS.E.128": 1})["async loads"] == 2
    assert instruction_series({"EXIT": 1})["async loads"] == 0
    assert "bits per global load" not in instruction_series({"EXIT": 1})


@pytest.mark.parametrize(
    ("old", "new", "regresses"),
    [
        ({"LDG.E.128": 8, "LDG.E.U16": 2}, {"LDG.E.128": 4, "LDG.E.U16": 2}, False),  # fewer
        ({"LDG.E.128": 8, "LDG.E": 1}, {"LDG.E.128": 2, "LDG.E": 1}, False),
        ({"LDG.E.128": 8}, {"LDG.E.64": 16}, True),
        ({"LDG.E.128": 8}, {"LDG.E.128": 7, "LDG.E.U16": 8}, True),
        ({"LDG.E.ENL2.256": 4}, {"LDG.E.128": 8}, True),
    ],
)
def test_narrow_loads_in_place_of_wide_ones_regress_and_fewer_wide_ones_do_not(old, new, regresses):
    before, after = instruction_series(old), instruction_series(new)
    verdicts = {
        judge(before.get(name, 0), after[name], *rule_of("add", name))
        for name in after
        if name != "instructions"
    }
    assert (Verdict.REGRESSION in verdicts) is regresses
