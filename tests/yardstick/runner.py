"""Running cases: a folder each, their commands in the worker's forks or in processes of their own."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.yardstick import arithmetic, worker
from tests.yardstick.bases import QUICKSTART
from tests.yardstick.cases import Case
from tests.yardstick.world import WORLDS


@dataclass(frozen=True)
class Finished:
    """One command: its words behind `python -m`, the exit code, what it wrote, the CPU seconds that it took."""

    command: str
    code: int
    stdout: str
    stderr: str
    seconds: float


class Runner:
    """Works in `folder`, which must be empty. `alone`: every command in a process of its own, as a user's is."""

    def __init__(self, folder: Path, *, alone: bool = False) -> None:
        self.folder = folder.resolve()
        self._alone = alone
        self._worker: subprocess.Popen[str] | None = None
        (self.folder / "bases").mkdir(parents=True)

    def close(self) -> None:
        """End the worker."""
        if self._worker is not None:
            with self._worker:  # which closes its streams and waits
                pass

    def prepare(self, case: Case) -> Path:
        """The case's folder, with what it begins with."""
        place = self.folder / case.name
        place.mkdir()
        WORLDS[case.data](place)
        return place

    def run(self, case: Case) -> list[Finished]:
        """Run the commands of a prepared case."""
        bases = {name: str(self._base(name)) for name in case.bases}
        return [self._command(case, command, bases, number) for number, command in enumerate(case.commands)]

    def canary(self) -> dict[str, str]:
        """`canary.canary` of this machine."""
        file = self.folder / "canary.json"
        self._order(canary=str(file), stderr=str(self.folder / "canary.txt"))
        found: dict[str, str] = json.loads(file.read_text(encoding="utf-8"))
        return found

    def _base(self, name: str) -> Path:
        if name == "quickstart":
            return QUICKSTART
        place = self.folder / "bases" / name
        if not place.exists():
            log = self.folder / "bases" / f"{name}.txt"
            answer = self._order(prepare=name, folder=str(place), stderr=str(log))
            if answer["code"] != 0:
                raise RuntimeError(f"the base {name} could not be made:\n{log.read_text(encoding='utf-8')}")
        return place

    def _command(self, case: Case, command: str, bases: dict[str, str], number: int) -> Finished:
        place = self.folder / case.name
        module, *words = case.words(number, bases)
        streams = [self.folder / f"{case.name}.{number}.{name}" for name in ("stdout", "stderr")]
        if self._alone or case.processes > 1 or case.environment:
            code, seconds = self._process(case, module, words, place, streams)
        else:
            out, err = map(str, streams)
            answer = self._order(module=module, words=words, folder=str(place), stdout=out, stderr=err)
            code, seconds = answer["code"], answer["seconds"]
        stdout, stderr = (path.read_text(encoding="utf-8") for path in streams)
        return Finished(command, code, stdout, stderr, seconds)

    def _process(
        self, case: Case, module: str, words: list[str], place: Path, streams: list[Path]
    ) -> tuple[int, float]:
        launcher = [sys.executable, "-m"]
        if case.processes > 1:
            launcher += ["torch.distributed.run", "--standalone", "--nproc_per_node", str(case.processes), "-m"]
        began = time.monotonic()
        with streams[0].open("wb") as out, streams[1].open("wb") as err:
            done = subprocess.run(
                [*launcher, "tests.yardstick.worker", module, *words],
                cwd=place,
                env=arithmetic.environment() | dict(case.environment),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                timeout=worker.LONGEST,
                check=False,
            )
        return done.returncode, time.monotonic() - began

    def _order(self, **order: Any) -> dict[str, Any]:
        """Have the worker do something."""
        if self._worker is None:
            self._worker = subprocess.Popen(
                [sys.executable, "-m", "tests.yardstick.worker"],
                cwd=self.folder,
                env=arithmetic.environment(),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                encoding="utf-8",
            )
        assert self._worker.stdin is not None
        assert self._worker.stdout is not None
        print(json.dumps(order), file=self._worker.stdin, flush=True)
        answer = self._worker.stdout.readline()
        if not answer:
            raise RuntimeError(f"the yardstick's worker ended with code {self._worker.wait()}")
        found: dict[str, Any] = json.loads(answer)
        return found


def lacks(case: Case) -> str:
    """What this machine has not got that the case needs; empty if nothing."""
    if case.package and importlib.util.find_spec(case.package) is None:
        return f"the package {case.package}"
    if case.compiler and not any(shutil.which(name) for name in ("c++", "g++", "clang++")):
        return "a C++ compiler"
    return ""
