"""Are the tests able to see a wrong kernel? Breaks one PTX instruction at a time and runs the
decisive cases that execute it until one fails.

    python python_tests/cuda/mutate.py                               every mutant
    python python_tests/cuda/mutate.py --sample 300 --seed 7         300 of them, drawn at random
    python python_tests/cuda/mutate.py --only "down_kernel"          those whose line contains this
    python python_tests/cuda/mutate.py --unexecuted                  what no case executes

What a mutation is, says mutations.py. A mutant is killed by a Trap (race, wild or uninitialised
access, deadlock, endless loop) or by the check that the tests use, with their tolerances. One that
no case executes survives. Mutants that are the same program as the kernel are listed in mutants.txt
with a proof, and left out; other survivors are listed there too, and count.
"""

import argparse
import collections
import functools
import pathlib
import random
import sys
import time

from decisive_cases import CASES
from interpreted import Failed
from mutations import mutants
from ptx import Trap
from replay import Run

TABLE = pathlib.Path(__file__).with_name("mutants.txt")


tried, killed = collections.Counter(), collections.Counter()  # (kernel, case): adaptive order


def verdict(mutant, runs):
    """(was it killed, how)"""
    able = [run for run in runs if run.seconds_of(mutant.place)]

    def worth(run):  # kills per second that it may bring, by what it brought for this kernel
        key = (mutant.mangled, run)
        return (killed[key] + 1) / (tried[key] + 1) / run.seconds_of(mutant.place)

    for run in sorted(able, key=worth, reverse=True):
        tried[mutant.mangled, run] += 1
        if how := noticed(run, mutant):
            killed[mutant.mangled, run] += 1
            return True, how
    return False, "SURVIVED" if able else "SURVIVED, never executed"


def noticed(run, mutant):
    """How a case notices the mutant, or None."""
    try:
        return run.again(mutant)
    except Trap as trap:
        return f"trap: {trap}"
    except (AssertionError, Failed) as error:
        return f"result: {(str(error) or 'differs').strip().splitlines()[0]}"
    except Exception as error:
        return f"error: {type(error).__name__}: {error}"


def read_table(text):
    """mutants.txt -> {line of a mutant: proof that it is the same program}. An indented line is a
    mutant, the paragraph before it the proof; from the line "Survivors" on there are none."""
    out, proof = {}, []
    for line in text.partition("\nSurvivors")[0].splitlines():
        if line.startswith("    "):
            out[line.strip()] = " ".join(proof)
        elif not line:
            proof = []
        else:
            proof.append(line)
    return out


@functools.cache
def equivalent():
    return read_table(TABLE.read_text())


def candidates():
    """The mutants that are not proven to be the same program."""
    return [m for m in mutants() if m.what not in equivalent()]


def report(chosen, runs, say=print):
    """Tries the mutants on the cases' runs; the survivors."""
    survivors, started = [], time.process_time()
    for i, mutant in enumerate(chosen, 1):
        was_killed, how = verdict(mutant, runs)
        if not was_killed:
            survivors.append(mutant)
        say(f"[{i}/{len(chosen)} {time.process_time() - started:.0f} s] {mutant}: {how}")
    return survivors


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sample", type=int, default=0, help="so many, drawn at random")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="only mutants whose line contains this")
    parser.add_argument("--all", action="store_true", help="also those proven to be the same")
    parser.add_argument("--unexecuted", action="store_true", help="list what no case executes")
    arguments = parser.parse_args()
    chosen = [m for m in (mutants() if arguments.all else candidates()) if arguments.only in str(m)]
    if arguments.sample:
        chosen = random.Random(arguments.seed).sample(chosen, min(arguments.sample, len(chosen)))
    runs = [Run(case) for case in CASES.values()]
    if arguments.unexecuted:
        print(*(m for m in chosen if not any(r.seconds_of(m.place) for r in runs)), sep="\n")
        return 0
    survivors = report(chosen, runs, say=functools.partial(print, flush=True))
    killed = len(chosen) - len(survivors)
    print(f"\n{killed} of {len(chosen)} killed, {killed / max(len(chosen), 1):.1%}")
    for kind in sorted({m.kind for m in chosen}):
        print(f"    {kind:6} {sum(m.kind == kind for m in chosen)}", end="")
        print(f", survivors {sum(m.kind == kind for m in survivors)}")
    print(*survivors, sep="\n")
    return 0 if killed >= 0.95 * len(chosen) else 1


if __name__ == "__main__":
    sys.exit(main())
