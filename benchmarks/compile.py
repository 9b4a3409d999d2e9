"""Compiled against uncompiled training steps, in turns in one process: seconds of compiling, graphs, and the ratio.

    python -m benchmarks.compile [--pairs 10] [--backend inductor] [--dynamic auto] [--precision bf16]

256 px, batch 1, rank 8, AdamW, cached latents and text. `--model quickstart/base` takes the quickstart's small model;
the default, of the true SD 1.5 size with random weights, is made at the first call (4.3 GB).
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from itertools import cycle
from pathlib import Path

from benchmarks.common import header, interleaved, row, sd15_folder
from benchmarks.step_time import image_folder, words


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--backend", default="inductor")
    parser.add_argument("--dynamic", default="auto")
    parser.add_argument("--precision", default="bf16", choices=("no", "bf16"))
    parser.add_argument("--model", type=Path, default=Path("output/sd15"))
    options = parser.parse_args()
    model = sd15_folder(options.model)

    with tempfile.TemporaryDirectory() as temporary:
        data = image_folder(Path(temporary) / "data", count=2)
        shared = [
            *words(model, data, Path(temporary), options.resolution),
            *("--network_train_unet_only", "--cache_text_encoder_outputs", "--mixed_precision", options.precision),
        ]
        plain = _stepping(shared)
        compiled = _stepping(
            [*shared, "--compile", "--compile_backend", options.backend, "--compile_dynamic", options.dynamic]
        )
        start = time.perf_counter()
        compiled()
        first = time.perf_counter() - start
        print(f"first step {first:.1f} s; {_graphs()}", flush=True)
        comparison = interleaved(compiled, plain, pairs=options.pairs)
    print(header("compiled, s", "uncompiled, s"))
    print(row(f"{options.backend}, dynamic {options.dynamic}, {options.precision}", comparison))
    print(f"after all steps: {_graphs()}")


def _stepping(command: list[str]) -> Callable[[], object]:
    """The next step of a run with this command line."""
    from accelerate.state import AcceleratorState

    from library.config.parser import parse
    from library.run.build import build
    from library.run.plan import make_plan
    from library.training import loop

    AcceleratorState._reset_state(reset_partial_state=True)
    run = build(make_plan(parse(command)))
    steps = cycle([item for item, _ in zip(loop.step_batches(run), range(2), strict=False)])
    return lambda: loop.optimizer_step(run, next(steps))


def _graphs() -> str:
    from torch._dynamo.utils import counters

    return f"{counters['stats']['unique_graphs']} graphs, {sum(counters['graph_break'].values())} graph breaks"


if __name__ == "__main__":
    main()
