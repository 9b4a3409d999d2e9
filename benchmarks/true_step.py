"""One step of a large model at its true size on this machine: its peak memory and its time beside the computed ones.

    python -m benchmarks.true_step anima                       # 512 px, nf4, checkpointing, cached text; minutes
    python -m benchmarks.true_step flux --resolution 256 --base_format int8

The weights are zeros, which are computed like any others: neither bytes nor operations depend on their values. The
default precision is fp32, for CPUs without kernels for bf16.

glibc's heap keeps much of what decoded weights of a packed format leave. With MALLOC_MMAP_THRESHOLD_=4194304 in the
environment it goes back to the system, and the peak is that of loading.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from benchmarks.sdxl_memory import CACHED, CHECKPOINTED, watched
from benchmarks.step_time import image_folder
from benchmarks.true_outlines import write


def words(model: Path, data: Path, options: argparse.Namespace) -> list[str]:
    """The command line: a batch of one, rank 16, everything frozen in the format."""
    return [
        *("--pretrained_model_name_or_path", str(model), "--train_data_dir", str(data), "--caption_extension", ".txt"),
        *("--output_dir", str(data / "out"), "--network_dim", "16", "--network_alpha", "16", "--learning_rate", "1e-4"),
        *("--resolution", str(options.resolution), "--optimizer_type", "AdamW8bit", "--cache_latents", "--seed", "42"),
        *("--mixed_precision", options.mixed_precision, "--base_format", options.base_format, *CHECKPOINTED, *CACHED),
        *("--max_train_steps", "2", "--no-loss_plot", "--no-report", "--max_data_loader_n_workers", "0"),
    ]


def computed(command: list[str]) -> float:
    """GiB of a step, of the plan's device."""
    from library import log
    from library.config.parser import parse
    from library.guidance import verdict
    from library.guidance.moments import TRAINING
    from library.run.plan import make_plan

    with log.errors_only():
        plan = make_plan(parse(command))
        return verdict.estimator(plan).needs(plan.options).moment(TRAINING).total / 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", choices=("anima", "flux", "flux2", "flux2_9b", "chroma", "z_image", "sdxl"))
    parser.add_argument("--resolution", type=int, default=512)
    parser.add_argument("--base_format", default="nf4")
    parser.add_argument("--mixed_precision", default="no")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        model = write(Path(temporary, "model"), options.family)
        data = image_folder(Path(temporary, "images"), count=1)
        command = words(model, data, options)
        print(f"computed: {computed(command):.2f} GiB in a step, beside the program itself", flush=True)
        print(f"measured: {watched(command)}")


if __name__ == "__main__":
    main()
