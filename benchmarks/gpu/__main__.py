"""Speed and memory on one GPU, against a bare loop and peft on the same card: one table and one JSON.

    python -m benchmarks.gpu --out FOLDER [--parts sd15,sdxl] [--seconds 330]

Models of true size with random weights are made on the card (9 GB in --work). A part that FOLDER/gpu.json has already,
of the same card and versions, is not measured again; none is started after --seconds. --tiny runs the same code with
tiny models, on a CPU if there is no GPU: its figures mean nothing.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import platform
import sys
import time
import traceback
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TypedDict

import torch

from benchmarks.gpu.models import Bench
from benchmarks.gpu.parts import PARTS, Row
from library.gpu import WORKSPACE

COLUMNS = (
    *("ms", "a second", "ours takes", "data wait, %", "peak, GiB", "computed, GiB", "s", "first, s"),
    *("state, bytes a number", "the VAE alone"),
)
PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "peft", "bitsandbytes", "triton")


class Found(TypedDict):
    """What gpu.json holds."""

    environment: dict[str, str | bool | None]
    parts: dict[str, list[Row]]
    failed: dict[str, str]


def environment(*, tiny: bool) -> dict[str, str | bool | None]:
    """The machine and the versions that the figures are for."""
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    versions = {name: installed(name) for name in PACKAGES}
    return {"card": card, "cuda": torch.version.cuda, "python": platform.python_version(), "tiny": tiny, **versions}


def installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def table(found: Found) -> str:
    """All rows in one Markdown table, with the columns that any of them has; those of one name are one row."""
    named: dict[str, Row] = {}
    for row in (row for part in PARTS for row in found["parts"].get(part, [])):
        named.setdefault(str(row["name"]), {}).update(row)
    rows = list(named.values())
    columns = [column for column in COLUMNS if any(column in row for row in rows)]
    lines = [f"| | {' | '.join(columns)} |", "|---|" + "---|" * len(columns)]
    for row in rows:
        lines.append(f"| {row['name']} | {' | '.join(shown(row.get(column)) for column in columns)} |")
    environment = ", ".join(f"{name} {value}" for name, value in found["environment"].items() if value is not None)
    failed = [f"{part}: {reason}" for part, reason in found["failed"].items()]
    return "\n".join([environment, "", *lines, *([""] if failed else []), *failed]) + "\n"


def shown(value: str | float | None) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.2f}"


def measure(bench: Bench, part: str) -> list[Row]:
    rows = []
    for row in PARTS[part](bench):
        rows.append(row)
        numbers = ", ".join(f"{name} {shown(value)}" for name, value in row.items() if name != "name")
        print(f"{row['name']}: {numbers}", flush=True)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("output/gpu"), help="for gpu.json and gpu.md")
    parser.add_argument("--work", type=Path, default=Path("output/gpu-models"), help="for models and images")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"of {', '.join(PARTS)}")
    parser.add_argument("--seconds", type=float, default=330, help="after which no part is started")
    parser.add_argument("--tiny", action="store_true", help="only to see whether it runs")
    options = parser.parse_args()
    chosen = options.parts.split(",")
    if unknown := [part for part in chosen if part not in PARTS]:
        parser.error(f"--parts: no part is named {unknown[0]}; there are {', '.join(PARTS)}")
    if not options.tiny and not torch.cuda.is_available():
        parser.error("there is no NVIDIA GPU that torch can use; --tiny runs the code on a CPU")
    began = time.monotonic()
    logging.getLogger("library").setLevel(logging.ERROR)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bench = Bench(options.work, device, options.tiny)
    options.out.mkdir(parents=True, exist_ok=True)
    file, now = options.out / "gpu.json", environment(tiny=options.tiny)
    found: Found = {"environment": now, "parts": {}, "failed": {}}
    if file.exists() and (before := json.loads(file.read_text(encoding="utf-8"))).get("environment") == now:
        found = before
    for part in chosen:
        if part in found["parts"]:
            continue
        if time.monotonic() - began > options.seconds:
            print(f"{part}: not started, --seconds {options.seconds:g} are over", flush=True)
            continue
        try:
            found["parts"][part] = measure(bench, part)
            found["failed"].pop(part, None)
        except Exception as error:  # the other parts can still be measured
            traceback.print_exc()
            found["failed"][part] = f"{type(error).__name__}: {error}"
        gc.collect()
        file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        (options.out / "gpu.md").write_text(table(found), encoding="utf-8")
        print(f"  {part}: {time.monotonic() - began:.0f} s since the start", flush=True)
    print(f"\n{table(found)}")
    return 1 if found["failed"] else 0


if __name__ == "__main__":
    import os

    os.environ.setdefault(WORKSPACE, ":4096:8")  # before the first product of matrices
    sys.exit(main())
