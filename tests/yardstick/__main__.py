"""Compare what the program does with what it did, or record what it does.

python -m tests.yardstick compare [NAME …]      what differs from the expectations, case by case
python -m tests.yardstick record [NAME …]       makes what happens now the expectation
python -m tests.yardstick list                  the cases and their commands
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests.yardstick import compare
from tests.yardstick.cases import CASES, Case
from tests.yardstick.measure import Yardstick
from tests.yardstick.runner import lacks


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 1 if anything differs, 2 for a wrong command."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.yardstick", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("compare", "record", "list"))
    parser.add_argument("names", nargs="*", metavar="NAME", help="cases (default: all)")
    parser.add_argument("--fast", action="store_true", help="only those that `make test` compares")
    parser.add_argument("--alone", action="store_true", help="each command in a process of its own, as a user's is")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="an empty folder to work in, which stays")
    options = parser.parse_args(argv)
    for name in options.names:
        if name not in CASES:
            near = difflib.get_close_matches(name, CASES, 1)
            parser.error(f"no case '{name}'" + (f", did you mean '{near[0]}'?" if near else ""))
    cases = [CASES[name] for name in options.names or CASES if CASES[name].fast or not options.fast]
    if options.what == "list":
        for case in cases:
            print(f"{case.name}{' (fast)' if case.fast else ''}", *case.commands, sep="\n    ")
        return 0
    with contextlib.ExitStack() as stack:
        folder = options.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        yardstick = stack.enter_context(Yardstick(folder, alone=options.alone))
        if options.what == "record":
            return record(yardstick, cases)
        return show(yardstick, cases)


def record(yardstick: Yardstick, cases: Sequence[Case]) -> int:
    if missing := [f"{case.name} needs {lacks(case)}" for case in cases if lacks(case)]:
        print(*missing, sep="\n", file=sys.stderr)
        return 2
    if yardstick.other_bits and len(cases) < len(CASES):
        print(f"{yardstick.other_bits}: record all cases, or none", file=sys.stderr)
        return 2
    compare.EXPECTED.mkdir(exist_ok=True)
    compare.MACHINE.write_text(json.dumps(yardstick.machine, indent=1) + "\n", encoding="utf-8")
    for case in cases:
        compare.write(case, yardstick.measure(case), yardstick.layouts)
        print(f"{case.name}: recorded, {yardstick.seconds:.1f} s", flush=True)
    compare.drop_unused()
    return 0


def show(yardstick: Yardstick, cases: Sequence[Case]) -> int:
    if yardstick.other_bits:
        print(f"bits are not compared, losses within {compare.BOUND:.0%}: {yardstick.other_bits}")
    different = 0
    for case in cases:
        if reason := lacks(case):
            print(f"{case.name}: left out, it needs {reason}")
            continue
        lines = yardstick.differences(case, yardstick.measure(case))
        different += bool(lines)
        print(f"{case.name}: {'DIFFERS' if lines else 'same'}, {yardstick.seconds:.1f} s", flush=True)
        for line in lines:
            print(f"    {line}")
    print(f"{different} of {len(cases)} cases differ" if different else f"{len(cases)} cases are the same")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
