"""A dry run: describes a run and its costs in words, without training."""

from __future__ import annotations

import math
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from library.data.caches.disk import Found, caption_files, latent_files, look
from library.data.caches.files import size_of
from library.data.captions import as_written
from library.data.dataset import Batch, Draw, TrainingData
from library.data.samples import Size
from library.diffusion.process import predict_and_target
from library.guidance import preview, verdict
from library.guidance.autocast import gpu_autocast
from library.guidance.card import card_of
from library.guidance.estimate import parameter_bytes, peak_of
from library.models.family import ModelFamily
from library.optimizers.create import state_bytes, tensor_bytes
from library.optimizers.small_lora import has_modes
from library.record import metrics, run_file
from library.record.summary import count, line, lines
from library.run import disk
from library.run.about.summary import facts_of
from library.run.base_weights import merged
from library.run.encode import DTYPES, latents_on_disk, texts_on_disk
from library.run.plan import Plan
from library.run.start import pictures, planned_about
from library.training import loop
from library.training.hooks.ema import Ema
from library.training.hooks.ewc import Consolidation
from library.training.hooks.forgetting import ForgettingMeter
from library.training.hooks.validation import Validator
from library.training.hooks.validation_sets import ValidationSets
from library.training.run import Run
from library.training.slider import denoising_steps
from library.training.step import condition_of
from library.units import human_bytes, human_time

MEASURED_STEPS = 5  # after two that warm up
_ABOUT = {
    run_file.SUFFIX: "how the run stands",
    metrics.SUFFIX: "what each step does",
    metrics.REPORT_SUFFIX: "the whole run on one page",
}


def report(plan: Plan, run: Run, *, measure: bool, draw: bool = False) -> None:
    """Print everything that is known before training; with `measure`, time a few steps as well. Nothing is written, but
    with `draw` the picture of the curves."""
    for text in (*lines(facts_of(plan, run)), *_memory(plan, run), *_files(plan, run), *_caches(plan, run)):
        print(text)
    if measure:
        print(_time(plan, run))
    else:
        print(line("time", "not measured: --dry_run=measure times a few steps"))
    written = f"the curves are in {preview.write(plan, run)}" if draw else "nothing was written"
    print(f"\nDry run: nothing was trained, {written}.")
    sys.stdout.flush()


def _memory(plan: Plan, run: Run) -> Iterator[str]:
    """Bytes of the optimizer's state, and the verdict: by passes over tensors without contents."""
    parameters = sum(parameter.numel() for parameter in run.parameters)
    optimizer = run.optimizer.optimizer
    if has_modes(optimizer):
        optimizer.train()
    state = state_bytes(optimizer)
    yield line("optimizer", f"{human_bytes(state)} of state, {state / parameters:.2f} bytes a parameter")

    average = _average_bytes(run)
    if average:
        yield line("average", f"{human_bytes(average)}, and a copy of the weights while it replaces them")

    if verdict.is_computable(plan):
        for label, text in verdict.rows(plan, card_of(plan.options)):
            yield line(label, text)
        return
    modules = [*run.family.components.loaded(), run.network]
    with gpu_autocast() if run.accelerator.device.type == "cuda" else nullcontext():
        step = peak_of(lambda fake: dummy_loss(plan, run, fake).backward(), modules)
    run.optimizer.zero_grad(set_to_none=True)
    weights = parameter_bytes(modules)
    yield line(
        "memory",
        f"about {human_bytes(weights + state + average + step)} in a step, if all parts stay loaded: weights "
        f"{human_bytes(weights)}, state {human_bytes(state)}, activations and gradients {human_bytes(step)}; what each "
        f"option would change is not computed: {verdict.NOT_COMPUTED}",
    )


def _average_bytes(run: Run) -> int:
    """The bytes of the average of --ema_decay."""
    ema = run.hook(Ema)
    return 0 if ema is None else sum(tensor.nbytes for tensor in ema.average)


def dummy_loss(plan: Plan, run: Run, fake: Callable[[Tensor], Tensor]) -> Tensor:
    """The loss of a dummy batch: the parts of a step that take memory. Random draws, which need contents, are left
    out."""
    batch = synthetic_batch(plan, run)
    dtype = DTYPES[run.accelerator.mixed_precision]
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        if batch.moments is not None:
            latents = fake(batch.moments[0])
        else:
            assert batch.pixels is not None
            with torch.no_grad():
                latents, _ = run.family.encode_images(fake(batch.pixels))
        condition = condition_of(batch, run.family, torch.device("cpu"), train_text=run.train_text)
        level = fake(run.objective.process.at(torch.zeros(len(latents), dtype=torch.long)))
        seen = predict_and_target(run.objective.process, run.family.predict, latents, latents, level, condition)
        return run.objective.main.unweighted(seen, None).mean()


def synthetic_batch(plan: Plan, run: Run) -> Batch:
    """A full batch of the bucket that needs most memory, with its real captions and dummy images; of a slider, a
    batch that is denoised for a usual number of steps."""
    if plan.settings:
        return _usual_batch(plan, run)
    data = plan.options.data
    group = max(plan.prepared.groups, key=lambda group: group.size[0] * group.size[1] * group.batch_size)
    draws = [Draw(run.data.samples[index], 0, repeat) for index, repeat in group.example()]
    captions = [as_written(draw.sample.caption, draw.sample.subset)[0] for draw in draws]
    width, height = group.size
    pixels = torch.zeros(len(draws), 3, height, width)
    height, width = (side // run.family.latents.factor for side in pixels.shape[2:])
    latents = torch.zeros(len(draws), run.family.latents.channels, height, width)
    condition = None
    if data.cache_text_encoder_outputs:
        with torch.no_grad():
            condition = run.family.encode_prompts(captions)
    return Batch(
        samples=draws,
        pixels=None if data.cache_latents else pixels,
        moments=(latents, torch.ones_like(latents)) if data.cache_latents else None,
        captions=captions,
        condition=condition,
        loss_weights=torch.ones(len(draws)),
        original_sizes=[draw.sample.size for draw in draws],
        crops=[(0, 0)] * len(draws),
        target_size=group.size,
    )


def _usual_batch(plan: Plan, run: Run) -> Batch:
    """A batch of a slider's largest setting, denoised for the mean number of steps, as nearly as an epoch has one."""
    most = plan.options.slider.max_denoising_steps
    batches = list(run.data.batches(run.data.plan(0), epoch=0, loader=run.loader))
    largest = max(math.prod(batch.target_size) * len(batch.samples) for batch in batches)
    full = [batch for batch in batches if math.prod(batch.target_size) * len(batch.samples) == largest]
    chosen = min(full, key=lambda batch: abs(denoising_steps(plan.seed, batch.samples[0], most) - most / 2))
    height, width = (side // run.family.latents.factor for side in reversed(chosen.target_size))
    latents = torch.zeros(len(chosen.samples), run.family.latents.channels, height, width)
    with torch.no_grad():
        condition = run.family.encode_prompts(chosen.captions)
    return replace(chosen, moments=(latents, torch.ones_like(latents)), condition=condition)


def _time(plan: Plan, run: Run) -> str:
    """The time of a step, measured on the network itself: a dry run saves nothing."""
    batch = synthetic_batch(plan, run)
    item = loop.StepBatches(step=1, epoch=0, batches=[batch] * run.accumulation, count=run.accumulation)
    seconds = []
    for _ in range(2 + MEASURED_STEPS):
        start = time.perf_counter()
        loop.optimizer_step(run, item)
        seconds.append(time.perf_counter() - start)
    step = statistics.median(seconds[2:])
    total = step * run.saves.total_steps
    plainly = ", without --compile" if plan.options.compile.is_asked_for else ""
    return line(
        "time", f"{step:.2f} s a step, measured{plainly}; {human_time(total)} for {run.saves.total_steps} steps"
    )


def _files(plan: Plan, run: Run) -> Iterator[str]:
    saves = run.saves
    tensors = run.network.state_dict()
    of_file = disk.file_bytes(run.network.tensors(), plan.options.output.save_precision)
    of_state = disk.file_bytes(tensors, None) + tensor_bytes(run.optimizer.optimizer.state)  # `_memory` has made it
    of_state += _average_bytes(run)
    files, states = (
        saves.planned_files(after_step=run.position.done),
        saves.planned_states(after_step=run.position.done),
    )
    most = disk.most_at_once(saves, after_step=run.position.done, of_file=of_file, of_state=of_state)
    room = human_bytes(shutil.disk_usage(_existing(saves.folder)).free)
    yield line("disk", f"{human_bytes(most)} at one time at most, {room} are free; in all:")
    yield from _paths(f"{count(len(files), 'file')} of {human_bytes(of_file)}", files)
    apart = [path for file in files for path in saves.beside(file)]
    if apart and run.network.embedding is not None:
        each = disk.file_bytes(run.network.embedding.tensors(), plan.options.output.save_precision)
        yield from _paths(f"{count(len(apart), 'embedding')} of {human_bytes(each)}", apart)
    if states:
        yield from _paths(f"{count(len(states), 'state')} of {human_bytes(of_state)}", states)
    drawn = list(pictures(plan.options, saves).values())
    if drawn:
        yield from _paths(count(len(drawn), "picture"), drawn)
    for path in planned_about(plan.options, saves):
        yield from _paths(next(what for suffix, what in _ABOUT.items() if path.name.endswith(suffix)), [path])


def _paths(what: str, paths: Sequence[Path]) -> Iterator[str]:
    yield line("", f"{what}:")
    shown: list[Path | None] = [*paths] if len(paths) <= 6 else [*paths[:3], None, *paths[-2:]]
    for path in shown:
        there = " (exists: --overwrite replaces it)" if path is not None and os.path.exists(path) else ""
        yield line("", f"  {path}{there}" if path is not None else f"  … {len(paths) - 5} more …")


def _existing(folder: Path) -> Path:
    """The folder, or its nearest parent that exists, which is on the same disk."""
    return folder if os.path.exists(folder) else _existing(folder.absolute().parent)


def _caches(plan: Plan, run: Run) -> Iterator[str]:
    """The size of the caches on disk, and how much of that exists. Reads the images and the existing files."""
    options = plan.options
    cached = [run.data, *_measured(run)]
    if place := latents_on_disk(run.family, options, run.accelerator):
        views = [view for data in cached for view in data.cached_views()]
        files, _ = latent_files(views, place)
        sizes = {path: view.size for view, path in files.items()}
        found = look(sizes, place)
        to_come = sum(_latents_size(run, sizes[path]) for path in found.missing)
        yield _cache("latents", found, to_come)
    if place := texts_on_disk(run.family, merged(options.network, run.family), options, run.accelerator):
        captions = {text: folder for data in cached for text, folder in data.caption_folders().items()}
        files_of_captions = caption_files(captions, place)
        found = look(files_of_captions.values(), place)
        to_come = _texts_size(run.family, [text for text, path in files_of_captions.items() if path in found.missing])
        yield _cache("text encoder outputs", found, to_come)


def _measured(run: Run) -> list[TrainingData]:
    """The images that are measured beside training."""
    validator, sets, forgetting, ewc = map(run.hook, (Validator, ValidationSets, ForgettingMeter, Consolidation))
    found: list[TrainingData] = [] if validator is None else [validator.data]
    found += [*(sets.data if sets else ()), *(forgetting.folders.values() if forgetting else ())]
    return [*found, *(ewc.earlier if ewc else ())]


def _latents_size(run: Run, size: Size) -> int:
    width, height = (side // run.family.latents.factor for side in size)
    latents = torch.zeros(run.family.latents.channels, height, width)
    return size_of({"mean": latents, "std": latents})


def _texts_size(family: ModelFamily, captions: Sequence[str]) -> int:
    """As if all had as many tokens as one of middle length."""
    if not captions:
        return 0
    with torch.no_grad():
        example = family.encode_prompts([sorted(captions, key=len)[len(captions) // 2]])
    return len(captions) * size_of({name: output[0] for name, output in example.items()})


def _cache(what: str, found: Found, to_come: int) -> str:
    files = [*found.sizes, *found.missing]
    folders = list(dict.fromkeys(str(path.parent) for path in files))
    more = f" and {count(len(folders) - 1, 'more folder')}" if len(folders) > 1 else ""
    broken = f", {len(found.broken)} of them broken" if found.broken else ""
    return line(
        "cache",
        f"{what}: {count(len(files), 'file')}, {human_bytes(found.nbytes + to_come)}, in {folders[0]}{more}; "
        f"{len(found.sizes)} ({human_bytes(found.nbytes)}) are there, "
        f"{len(found.missing)} ({human_bytes(to_come)}) to be made{broken}",
    )
