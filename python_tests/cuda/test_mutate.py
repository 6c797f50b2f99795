"""The mutations do what they say, and the decisive cases notice them."""

import os
import random

import mutate
import mutations
import pytest
from decisive_cases import CASES
from ops_under_test import ON_GPU, Ops
from ptx.parse import Instruction

interpreter_only = pytest.mark.skipif(ON_GPU, reason="mutants run in the interpreter")
SAMPLE = 300


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
        ("st.global.v2.u32 [%a]; {%b, %b}", None),
    ],
)
def test_swaps(text, want):
    assert mutations.swapped(instruction(text)) == want


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
    assert mutations.shifted(instruction(text))[1] == want


def test_table():
    text = "Title.\n\nBecause\nof this.\n    k swap x: a  b\n\nSurvivors, why:\n    k drop y: c\n"
    assert mutate.read_table(text) == {"k swap x: a  b": "Because of this."}


@pytest.mark.parametrize("name", CASES)
def test_decisive_case(name):
    """On kernels as they are."""
    CASES[name](Ops)


@interpreter_only
def test_mutants_are_killed():
    """95 % of a sample over all kinds; DSMOE_SEED in the environment repeats a run."""
    seed = int(os.environ.get("DSMOE_SEED", random.SystemRandom().randrange(2**31)))
    print(f"DSMOE_SEED={seed}")
    chosen = random.Random(seed).sample(mutate.candidates(), SAMPLE)
    survivors = mutate.report(chosen, say=lambda _: None)
    print(*survivors, sep="\n")
    assert len(survivors) <= 0.05 * SAMPLE
