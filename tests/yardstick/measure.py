"""One case at a time: run it, look at what it left, compare."""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from types import TracebackType

from tests.yardstick import arithmetic, compare
from tests.yardstick.cases import Case
from tests.yardstick.observe import Json, Layouts, case_files, observe
from tests.yardstick.plain_text import Places
from tests.yardstick.runner import Runner


class Yardstick:
    """Works in `folder`, which must be empty. `alone`: every command in a process of its own."""

    def __init__(self, folder: Path, *, alone: bool = False) -> None:
        self._runner = Runner(folder, alone=alone)
        self._places = Places(self._runner.folder)
        self.layouts = Layouts()
        self.seconds = 0.0  # of the last case's commands

    def __enter__(self) -> Yardstick:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._runner.close()

    @cached_property
    def machine(self) -> Json:
        """What the bits depend on beside the program."""
        return {"arithmetic": self._runner.canary(), "versions": arithmetic.versions()}

    @cached_property
    def other_bits(self) -> str:
        """Why bits here cannot be those of the expectations; empty if they can."""
        if not compare.MACHINE.is_file():
            return ""
        expected = json.loads(compare.MACHINE.read_text(encoding="utf-8"))
        reasons = [
            f"{name} is {self.machine['versions'].get(name) or 'missing'}, not {version}"
            for name, version in expected["versions"].items()
            if self.machine["versions"].get(name) != version
        ]
        here, there = self.machine["arithmetic"], expected["arithmetic"]
        if other := [name for name in there if here.get(name) != there[name]]:
            reasons.append(f"this machine's arithmetic differs in {', '.join(other)}")
        return "; ".join(reasons)

    def measure(self, case: Case) -> Json:
        """Run the case; all of it that is compared."""
        folder = self._runner.prepare(case)
        before = case_files(folder)
        runs = self._runner.run(case)
        self.seconds = sum(run.seconds for run in runs)
        return {
            "commands": list(case.commands),
            "runs": [
                {"code": run.code, "stdout": self._places.lines(run.stdout), "stderr": self._places.lines(run.stderr)}
                for run in runs
            ],
            "files": observe(folder, before=before, places=self._places, layouts=self.layouts),
        }

    def differences(self, case: Case, found: Json) -> list[str]:
        """What differs from the expectation, in lines."""
        expected = compare.read(case)
        if expected is None:
            return [f"there is no expectation yet: python -m tests.yardstick record {case.name}"]
        return compare.differences(expected, found, self.layouts, same_bits=not self.other_bits)
