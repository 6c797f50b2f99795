"""The mutations do what they say, and the decisive cases notice them."""

import copy
import functools
import gzip
import hashlib
import os
import pickle
import random
import tempfile
import uuid

import mutate
import mutations
import pytest
from decisive_cases import CASES
from ops_under_test import ON_GPU, Ops, interpreter_only
from ptx import Device, Program
from ptx.machine import Machine, compile_kernel
from ptx.parse import Instruction
from replay import Run

SAMPLE, PARTS = 300, 6


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
        ("cp.async.bulk.tensor.2d [%a]; [%b, {%c, %d}]; [%e]", ["[%a]", "[%b, {%d, %c}]", "[%e]"]),
        ("wgmma.mma_async.k16 {%a, %b}; %c; %d; 1", ["{%a, %b}", "%d", "%c", "1"]),
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


@pytest.mark.parametrize(
    "text, want",
    [
        ("mbarrier.init.shared.b64 [%a]; 1", ["drop", "count"]),
        ("mbarrier.arrive.shared.b64 _; [%a]", ["drop"]),
        ("mbarrier.arrive.expect_tx.shared.b64 _; [%a]; %b", ["drop", "count"]),
        ("mbarrier.try_wait.parity.shared.b64 %p; [%a]; %b", ["drop", "flip"]),
        ("cp.async.bulk.tensor.2d [%a]; [%b, {%c, %d}]; [%e]", ["drop", "swap", "shift"]),
        ("wgmma.fence.sync.aligned", ["drop"]),
        (
            "wgmma.mma_async.k16 {%a, %b}; %c; %d; 1",
            ["drop", "swap", "shift", "right", "flip"],
        ),
        ("fence.proxy.async.shared", ["drop"]),
    ],
)
def test_kinds_of_hopper(text, want):
    assert mutations.kinds_for(instruction(text)) == want


@pytest.mark.parametrize("count", ["1", "%n"])
def test_another_value(count):
    """A number or a register's; the register holds what it did afterwards."""
    text = f"""
      .version 8.0 .target sm_90a .address_size 64
      .visible .entry k() {{
        .reg .b32 %n; .shared .align 8 .b8 buffer[8]; mov.u32 %n, 1;
        mbarrier.init.shared::cta.b64 [buffer], {count}; ret; }}"""
    kernel = Program(text).kernels["k"]
    memory = Device().memory
    compile_kernel(kernel)
    kernel.code[1] = mutations.mutated(kernel.code[1], "count", kernel)
    machine = Machine(kernel, (1, 1, 1), (32, 1, 1), 0, b"", memory)
    machine._straight(kernel.code, machine.threads == 0, 0)
    assert machine.mbarriers[0, 0].count == 2
    assert machine.registers[0][0] == 1


def test_table():
    text = "Title.\n\nBecause\nof this.\n    k swap x: a  b\n\nSurvivors, why:\n    k drop y: c\n"
    assert mutate.read_table(text) == {"k swap x: a  b": "Because of this."}


@interpreter_only
def test_the_table_names_mutants_that_exist():
    assert mutate.equivalent().keys() <= {mutant.what for mutant in mutations.mutants()}


@pytest.fixture(scope="session")
def shared_folder(request, tmp_path_factory):
    """Of the processes that pytest-xdist runs these tests in."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if hasattr(request.config, "workerinput") else base) / "mutants"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def draw():
    """(seed, mutants), the same in all processes; DSMOE_SEED in the environment repeats a run."""
    of_this_run = os.environ.get("PYTEST_XDIST_TESTRUNUID", uuid.uuid4().hex)
    seed = int(os.environ.get("DSMOE_SEED", random.Random(of_this_run).randrange(2**31)))
    return seed, random.Random(seed).sample(mutate.candidates(), SAMPLE)


@pytest.fixture(scope="session")
def first_run(shared_folder):
    """A case's name -> its Run, made in whichever process is the first to ask."""

    @functools.cache
    def of(name):
        file = shared_folder / hashlib.sha256(name.encode()).hexdigest()
        if file.exists():
            with gzip.open(file) as recording:
                return Run(CASES[name], pickle.load(recording))
        run = Run(CASES[name])
        with (
            tempfile.NamedTemporaryFile(dir=shared_folder, delete=False) as unfinished,
            gzip.open(unfinished, "wb", compresslevel=1) as recording,
        ):
            pickle.dump(run.ops, recording)
        os.replace(unfinished.name, file)
        return run

    return of


@pytest.mark.parametrize("name", CASES)
def test_decisive_case(name, first_run):
    """On kernels as they are: in the interpreter with the options of replay.py."""
    if ON_GPU:
        CASES[name](Ops)
    else:
        first_run(name)


class Unchanged(mutations.Mutant):
    def apply(self, program):
        return copy.copy(program)


@interpreter_only
@pytest.mark.parametrize(
    "name", ["sm_90a, even tiles, 4 multiprocessors", "backward, passes over neurons, exact"]
)
def test_nothing_is_noticed_where_nothing_changed(name, first_run):
    """Whichever launches are run again, and whichever are taken from the recording: at -1, all."""
    run = Run(CASES[name], pickle.loads(pickle.dumps(first_run(name).ops)))
    executed = {launch.kernel: min(launch.executed) for ops in run.ops for launch in ops}
    for kernel, at in [*executed.items(), (next(iter(executed)), -1)]:
        run.again(Unchanged(*kernel, at, "none", "", ""))


@interpreter_only
@pytest.mark.parametrize("part", range(PARTS))
def test_mutants_are_killed(part, draw, first_run, shared_folder):
    """95 % of a sample over all kinds, in parts that processes share."""
    seed, sample = draw
    print(f"DSMOE_SEED={seed}")
    runs = [first_run(name) for name in reversed(CASES)]
    survivors = mutate.report(sample[part::PARTS], runs, say=lambda _: None)
    (shared_folder / f"survivors_{part}.txt").write_text("".join(f"{m}\n" for m in survivors))
    lists = [file.read_text() for file in shared_folder.glob("survivors_*.txt")]
    survived = "".join(lists).splitlines()
    print(*survived, sep="\n")
    assert len(survived) <= 0.05 * SAMPLE
