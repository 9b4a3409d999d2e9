"""Compiles a C++ file with the machine's own compiler, once, into the user's cache."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

logger = logging.getLogger(__name__)

FLAGS = ("-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-pthread", "-fopenmp-simd")
FLOATS = ("-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off")  # may be vectorised, may not change a result


COMPILERS = ("c++", "g++", "clang++")


def find_compiler() -> str | None:
    """The path of a C++ compiler."""
    return next((path for name in COMPILERS if (path := shutil.which(name))), None)


class Unavailable(Exception):
    """There is no compiled library; the message is the reason, in one line."""


def shared_library(source: Path, headers: Mapping[str, str] | None = None) -> ctypes.CDLL:
    """The loaded library, compiled first if the cache does not have it. `source` includes only files beside it and
    `headers`, names to texts. Raises `Unavailable`."""
    headers = headers or {}
    compiler = find_compiler()
    if sys.platform == "win32" or compiler is None:
        raise Unavailable(f"no C++ compiler ({', '.join(COMPILERS)}) found")
    # the compiler's version and this CPU are part of the key: different machines may share a home directory
    macros = run([compiler, *FLAGS, "-dM", "-E", "-x", "c++", os.devnull])
    if "__FMA__" not in macros and "__ARM_FEATURE_FMA" not in macros:
        raise Unavailable("this CPU has no fused multiply-add")
    sources = (file.read_text(encoding="utf-8") for file in sorted(source.parent.iterdir()) if file.is_file())
    text = "\n".join((*sources, *headers.values(), compiler, *FLAGS, *FLOATS, macros))
    name = f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.so"
    trouble: OSError | None = None
    for folder in folders():
        try:
            if not (folder / name).exists():
                compile_into(folder / name, source, compiler, headers)
            return ctypes.CDLL(str(folder / name))
        except OSError as error:
            trouble = error
    raise Unavailable(f"the compiled kernel cannot be stored or loaded: {trouble}")


def folders() -> Iterator[Path]:
    """The possible folders of the library: the user's cache, or for a read-only home a folder for this process."""
    base = os.environ.get("XDG_CACHE_HOME")
    yield (Path(base) if base else Path.home() / ".cache") / "custom-adamw"
    yield Path(tempfile.mkdtemp(prefix="custom-adamw-"))


def compile_into(file: Path, source: Path, compiler: str, headers: Mapping[str, str]) -> None:
    """Compile beside `file` and rename: other processes see a whole file or none."""
    began = time.monotonic()
    file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        built = Path(folder) / file.name
        for name, text in headers.items():
            (Path(folder) / name).write_text(text, encoding="utf-8")
        run([compiler, *FLAGS, *FLOATS, "-I", folder, str(source), "-o", str(built)])
        os.replace(built, file)
    logger.info("CustomAdamW: compiled its CPU kernel in %.1f s into %s", time.monotonic() - began, file.parent)


def run(command: list[str]) -> str:
    """The output of a command. Raises `Unavailable` with its first error."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"{command[0]} cannot be run: {error}") from error
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise Unavailable(f"{command[0]} failed: {next((line for line in lines if 'error' in line), lines[0])}")
    return done.stdout
