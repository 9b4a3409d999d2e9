"""The first line of `NAME-metrics.jsonl`: everything that a report needs beside the lines of the steps."""

from __future__ import annotations

import platform
from importlib.metadata import version

import torch

from library.config.options import Options, declared_options, option_groups
from library.data.prepared import Prepared
from library.diffusion.process import BINS
from library.record.facts import Facts
from library.record.metrics import Line
from library.record.summary import rows
from library.run.about.recording import in_effect
from library.run.plan import Plan
from library.training.run import Run

EXAMPLES = 24  # the number of images that it lists
PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "bitsandbytes")


def describe(plan: Plan, run: Run, facts: Facts) -> Line:
    """The line as JSON values, with paths as text."""
    saves = run.saves
    sampling = plan.samples
    return {
        "session_id": plan.session_id,
        "name": saves.last_file.stem,
        "output_name": saves.name,
        "ending": saves.ending,
        "started_at": int(plan.started_at),
        "total_steps": run.position.total,
        "steps_per_epoch": saves.steps_per_epoch,
        "timesteps": run.objective.process.bins(BINS),
        "adapters": run.network.layers(),
        "summary": [list(row) for row in rows(facts)],
        "options": _options(plan.options, seed=plan.seed),
        "subsets": [
            {
                "source": summary.subset.source,
                "regularisation": summary.subset.is_reg,
                "images": summary.images,
                "repeats": round(summary.least, 3) if summary.by_shares else summary.subset.num_repeats,
                "held_out": summary.held_out,
                "captions": summary.captions_found,
                "captions_missing": summary.captions_missing,
            }
            for summary in plan.prepared.summaries
        ],
        "buckets": [
            {
                "dataset": group.dataset + 1,
                "size": group.size,
                "images": len(group.members),
                "draws": group.draws,
                "batches": group.batches,
            }
            for group in plan.prepared.groups
            if not plan.settings
        ],
        "examples": [] if plan.settings else _examples(plan.prepared),
        "prompts": [] if sampling is None else [item.prompt for item in sampling.prompts],
        "machine": _machine(run.accelerator.device, run.accelerator.num_processes),
    }


def _options(options: Options, *, seed: int) -> list[list[object]]:
    """[group, name, value, default] of each option, with the seed in use and without secrets."""
    known, values, rows = declared_options(), in_effect(options, seed=seed), []
    for group_name, group in option_groups().items():
        title = (group.__doc__ or group_name).splitlines()[0]
        for name in vars(getattr(options, group_name)):
            default = None if known[name].required else known[name].default
            rows.append([title, name, values[name], default])
    return rows


def _examples(prepared: Prepared) -> list[dict[str, object]]:
    """Images from all over the data."""
    count = len(prepared.samples)
    chosen = sorted({index * count // min(EXAMPLES, count) for index in range(min(EXAMPLES, count))})
    return [
        {
            "path": prepared.samples[index].path.resolve(),
            "caption": prepared.samples[index].caption,
            "size": prepared.samples[index].size,
            "bucket": prepared.placements[index].bucket,
        }
        for index in chosen
    ]


def _machine(device: torch.device, processes: int) -> list[list[str]]:
    """[what, which] of hardware and programs."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return [
        ["device", f"{device.type}: {name}" + (f", {processes} processes" if processes > 1 else "")],
        ["system", f"{platform.system()} {platform.release()}, Python {platform.python_version()}"],
        ["packages", ", ".join(f"{package} {version(package)}" for package in PACKAGES)],
    ]
