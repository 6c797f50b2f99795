"""The mutations do what they say, and dropped barriers are noticed. All mutants:
`python python_tests/cuda/mutate.py`."""

import mutate
import pytest
from ops_under_test import ON_GPU
from ptx.parse import Instruction

pytestmark = pytest.mark.skipif(ON_GPU, reason="mutants run in the interpreter")


def instruction(text):
    name, _, operands = text.partition(" ")
    return Instruction(name.split("."), operands.split("; "), None, False, "")


@pytest.mark.parametrize(
    "text, want",
    [
        ("sub.s32 %a; %b; %c", ["%a", "%c", "%b"]),
        ("setp.lt.s32 %p; %b; %c", ["%p", "%c", "%b"]),
        ("setp.eq.s32 %p; %b; %c", None),
        ("add.s32 %a; %b; %c", None),
        ("mad.lo.s32 %a; %b; %c; %d", ["%a", "%b", "%d", "%c"]),
        ("sub.s32 %a; %b; %b", None),
        ("st.global.v2.u32 [%a]; {%b, %c}", ["[%a]", "{%c, %b}"]),
    ],
)
def test_swaps(text, want):
    assert mutate.swapped(instruction(text)) == want


@pytest.mark.parametrize(
    "text, want",
    [
        ("ld.global.u32 %a; [%b]", "[%b+4]"),
        ("ld.global.v4.f32 {%a, %b, %c, %d}; [%e+16]", "[%e+32]"),
        ("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%a}; [%b+-16]", "[%b+0]"),
        ("cp.async.cg.shared.global [%a]; [%b]; 16; %c", "[%b+16]"),
    ],
)
def test_shifts(text, want):
    assert mutate.shifted(instruction(text))[1] == want


def test_dropped_barriers_and_waits_are_killed():
    """A sample of them, all of which must die; what mutants.txt explains is left out.

    The score over all kinds of mutants takes `mutate.py` hours and stands in mutants.txt.
    """
    known = mutate.reasons()
    drops = [m for m in mutate.mutants() if m.kind == "drop" and m.place not in known]
    chosen = mutate.sample(drops, 20, seed=2)
    killed, survivors = mutate.report(chosen)
    assert killed == len(chosen), [m.what for m in survivors]
