"""The first steps of every process of a run: the accelerator, and the plan of the files to write."""

from __future__ import annotations

import logging
import math
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin, InitProcessGroupKwargs

from library import cpus, gpu
from library.config.options import Options
from library.errors import CommonError, UserError
from library.parallel import shard, together, zero
from library.record import about, trackers
from library.record import saves as save
from library.record.metadata import belongs_to
from library.run import compiled
from library.run.plan import Plan

logger = logging.getLogger(__name__)

LARGE = 10**8
"""Parameters of a denoiser from which on a step without kernels for its precision takes minutes."""


def make_accelerator(plan: Plan) -> Accelerator:
    """Start torch's process group and the trackers. `UserError` for options that the launcher or the device does not
    support, `CommonError` if some processes would have no batch."""
    options = plan.options
    shard.refuse_what_cannot_be(options)
    if zero.is_asked_for():
        zero.refuse_what_cannot_be(options, plan.choice, plan.network_arguments)
    try:
        with shard.without_accelerates_own():
            accelerator = Accelerator(
                mixed_precision=options.precision.mixed_precision,
                # a number in the environment would make accelerate divide the losses, which this program does itself
                gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
                log_with=list(plan.trackers.names) or None,
                project_dir=plan.trackers.folder,
                kwargs_handlers=[InitProcessGroupKwargs(timeout=together.patience(options.run.ddp_timeout))],
            )
    except ValueError as error:  # fp16 on a CPU, bf16 on a device without it
        raise UserError(f"--mixed_precision {options.precision.mixed_precision}: {error}") from error
    for format, name in options.precision.formats.items():
        if format.startswith("fp8") and accelerator.device.type == "mps":
            raise UserError(f"--{name}: Apple's GPUs have no 8-bit floats; leave it out")
    if options.precision.full_fp16 and accelerator.scaler is not None:
        gpu.unscale_fp16(accelerator.scaler)
    if accelerator.device.type == "cuda":
        gpu.settle(deterministic=options.precision.deterministic, allow_tf32=options.precision.allow_tf32)
    else:
        for name in ("deterministic", "allow_tf32"):
            if name in options.given:
                logger.warning("%s: has no effect on %s", options.given[name], accelerator.device)
    _warn_of_slow_bf16(plan, accelerator)
    compiled.refuse_what_cannot_be(options, accelerator.device)
    if options.trains:
        trackers.start(accelerator, plan.trackers)
    _refuse_idle_processes(accelerator.num_processes, plan.prepared.batches_per_epoch)
    return accelerator


def _warn_of_slow_bf16(plan: Plan, accelerator: Accelerator) -> None:
    slow = accelerator.device.type == "cpu" and plan.options.precision.mixed_precision == "bf16"
    if slow and not cpus.computes_bf16() and plan.family.components.size("denoiser") >= LARGE:
        logger.warning(
            "--mixed_precision bf16: torch has no kernels for bf16 on this CPU, and plain loops take up to 200 times "
            "as long as fp32: --mixed_precision no is faster"
        )


def _refuse_idle_processes(processes: int, batches: int) -> None:
    if batches < processes:
        raise CommonError(
            f"{processes} processes, and an epoch has only {batches} batches: some would get none. Start fewer, "
            "lower --train_batch_size, or give more images or repeats"
        )


def plan_saves(plan: Plan, accelerator: Accelerator, *, batches_per_step: int) -> save.SavePlan:
    """The length of the run and the files that it writes, checked against existing files. Raises UserError."""
    options, output = plan.options, plan.options.output
    steps_per_epoch = math.ceil(plan.prepared.batches_per_epoch / batches_per_step)
    total_steps = options.training.max_train_steps
    if options.training.max_train_epochs is not None:
        total_steps = options.training.max_train_epochs * steps_per_epoch
    every_n_epochs = output.save_every_n_epochs
    if output.save_n_epoch_ratio:
        every_n_epochs = save.epochs_from_ratio(math.ceil(total_steps / steps_per_epoch), output.save_n_epoch_ratio)
    saves = save.SavePlan(
        folder=Path(output.output_dir),
        name=output.output_name,
        total_steps=total_steps,
        steps_per_epoch=steps_per_epoch,
        every_n_steps=output.save_every_n_steps,
        every_n_epochs=every_n_epochs,
        last_n_steps=output.save_last_n_steps,
        last_n_epochs=output.save_last_n_epochs,
        states=output.save_state,
        state_at_end=output.save_state_on_train_end,
        last_n_steps_state=output.save_last_n_steps_state,
        last_n_epochs_state=output.save_last_n_epochs_state,
        ending=output.save_model_as,
        best=plan.prepared.validation is not None,
        embedding_apart=options.embedding.is_apart,
    )
    if accelerator.is_main_process and options.trains:
        _check_free(plan, saves)
        save.prepare_folder(saves.folder)
    accelerator.wait_for_everyone()
    return saves


def _check_free(plan: Plan, saves: save.SavePlan) -> None:
    """Without --overwrite only a resumed run may replace files, and only its own."""
    resume = plan.resume
    planned = saves.planned_files(after_step=resume.facts.step if resume else 0)
    files = [path for file in planned for path in (file, *saves.beside(file))]
    drawn = list(pictures(plan.options, saves).values())
    if resume is not None:
        files = [file for file in files if not belongs_to(file, session_id=plan.session_id)]
        drawn = drawn if saves.last_file in files else []  # the pictures of a file are its run's
    told = about.in_the_way(
        planned_about(plan.options, saves),
        resumed=None if resume is None else plan.session_id,
        left_anything=saves.left_anything(),
    )
    save.check_free([*files, *drawn, *told], overwrite=plan.options.output.overwrite)


def planned_about(options: Options, saves: save.SavePlan) -> list[Path]:
    """The files about the run: its record, its metrics, and the report."""
    wanted = options.monitoring
    return about.planned_files(saves.last_file, monitoring=wanted.monitoring, report=wanted.writes_report)


def pictures(options: Options, saves: save.SavePlan) -> dict[str, Path]:
    """The pictures that the run renders at its end, beside its last file: "loss", "compare" and "slider"."""
    wanted = {"loss": options.output.loss_plot, "compare": bool(options.output.compare_prompts)}
    wanted["slider"] = options.slider.draws
    stem = saves.last_file.stem
    return {kind: saves.last_file.with_name(f"{stem}-{kind}.png") for kind, asked in wanted.items() if asked}
