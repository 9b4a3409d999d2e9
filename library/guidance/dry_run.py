"""What a run will do and cost, in words: the head of every run's log, and the whole of a dry run."""

from __future__ import annotations

import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from library.data.caches.disk import Found, caption_files, latent_files, look
from library.data.caches.files import size_of
from library.data.captions import as_written, changing_options
from library.data.dataset import Batch, Draw
from library.diffusion.process import predict_and_target
from library.guidance.estimate import human_bytes, human_time, parameter_bytes, peak_of
from library.optimizers.create import state_bytes, tensor_bytes
from library.optimizers.weight_decay_choice import weight_decay_of
from library.record import metrics
from library.run import disk
from library.run.build import pictures
from library.run.encode import latents_on_disk, texts_on_disk
from library.training import loop
from library.training.hooks.validation import Validator
from library.training.step import condition_of
from networks.base_weights import with_multipliers

if TYPE_CHECKING:
    from library.data.prepare import Prepared
    from library.data.samples import Size
    from library.run.build import Built

MEASURED_STEPS = 5  # after two that warm up


def report(built: Built, *, measure: bool) -> None:
    """Print everything that is known before training; with `measure`, time a few steps as well. Nothing is written."""
    for line in summary(built):
        print(line)
    for line in (*_memory(built), *_files(built), *_caches(built)):
        print(line)
    if measure:
        print(_time(built))
    else:
        print(_line("time", "not measured: --dry_run=measure times a few steps"))
    print("\nDry run: nothing was trained, nothing was written.")
    sys.stdout.flush()


def summary(built: Built) -> Iterator[str]:
    """Model, network, data, length, rates and weight decay: what the options were understood to mean."""
    yield _line("model", _model(built))
    if files := built.plan.options.network.base_weights:
        pairs = with_multipliers(files, built.plan.options.network.base_weights_multiplier or ())
        yield _line("", f"merged into it: {', '.join(f'{file} × {factor:g}' for file, factor in pairs)}")
    yield from _network(built)
    yield from _data(built)
    yield from _length(built)
    yield _line("rates", _rates(built))
    if base := weight_decay_of(built.plan.choice):
        steps = built.saves.total_steps
        yield _line("decay", f"{base:g}" if built.decay is None else built.decay.told(base, total_steps=steps))


def _line(label: str, text: str) -> str:
    return f"{label:<12}{text}"


def _count(number: int, what: str, plural: str = "s") -> str:
    return f"{number} {what}{plural if number != 1 else ''}"


def _model(built: Built) -> str:
    family, options = built.plan.family, built.plan.options
    vae = f", VAE {family.vae_path}" if family.vae_path else ""
    held = ", frozen weights in 8 bits" if options.precision.holds_unet_in_float8 else ""
    return (
        f"{family.path} ({family.base_model_version}, {family.process.prediction_type}){vae}; "
        f"{options.precision.mixed_precision.replace('no', 'fp32')} on {built.run.accelerator.device}{held}"
    )


def _network(built: Built) -> Iterator[str]:
    options, network = built.plan.options.network, built.run.network
    count = sum(parameter.numel() for parameter in built.run.parameters)
    size = network.describe(options.network_dim, options.network_alpha)
    made = ", ".join(filter(None, (options.network_module, size)))
    layers = "".join(f"{section} {modules} modules, " for section, modules in network.counts().items())
    yield _line("network", f"{made}: {layers}{count:,} trainable parameters")


def _data(built: Built) -> Iterator[str]:
    prepared, family = built.plan.prepared, built.plan.family
    for summary in prepared.summaries:
        kind = "regularisation images" if summary.subset.is_reg else "images"
        held = f", {summary.held_out} held back" if summary.held_out else ""
        held += f", {summary.too_small} too small and left out" if summary.too_small else ""
        yield _line(
            "images",
            f"{summary.subset.source}: {summary.images} {kind} × {summary.subset.num_repeats}{held}; captions: "
            f"{summary.captions_found} found, {summary.captions_missing} missing, {summary.captions_empty} empty",
        )
    texts = built.run.data.captions()
    too_long = sum(family.count_tokens(text) > family.token_limit for text in texts)
    yield _line("captions", f"{len(texts)} different, {too_long} cut off at {family.token_limit} tokens")
    for spec in dict.fromkeys(summary.subset for summary in prepared.summaries):
        if (text := built.run.data.example(spec)) is not None:
            changing = ", ".join(f"{name} {_value(getattr(spec, name))}".strip() for name in changing_options(spec))
            each = f" (another text each time: {changing})" if changing else ""
            yield _line("", f"trained for example: '{text}'{each}")
    if prepared.validation is not None:
        yield _line("validation", _validation(built, prepared.validation))
    for group in prepared.groups:
        width, height = group.size
        yield _line(
            "bucket",
            f"{width} × {height}: {len(group.members)} images, {group.draws} with repeats, {group.batches} batches",
        )


def _validation(built: Built, prepared: Prepared) -> str:
    """What is measured when: "3 images held back, 2 batches × 5 timesteps, 12 times"."""
    wanted, saves = built.plan.options.validation, built.saves
    batches = min(prepared.batches_per_epoch, wanted.max_validation_steps or prepared.batches_per_epoch)
    validator = built.run.validate
    assert isinstance(validator, Validator)
    times = sum(bool(validator.times.due(step)) for step in range(saves.total_steps + 1))
    patience = wanted.early_stopping_patience
    stops = f"; ends early after {_count(patience, 'validation')} without improvement" if patience else ""
    return (
        f"{_count(len(prepared.samples), 'image')} held back: {_count(batches, 'batch', 'es')} × "
        f"{_count(len(validator.timesteps), 'timestep')}, {times} times{stops}"
    )


def _value(value: bool | float) -> str:
    """An option's value behind its name; nothing for one that is just on."""
    return "" if value is True else f"{value:g}"


def _length(built: Built) -> Iterator[str]:
    saves, options = built.saves, built.plan.options
    processes = built.run.accelerator.num_processes
    accumulation = options.training.gradient_accumulation_steps
    sizes = sorted({spec.batch_size for spec in built.plan.datasets})
    yield _line(
        "length",
        f"{saves.total_steps} steps; an epoch has {saves.steps_per_epoch} of them "
        f"({built.plan.prepared.batches_per_epoch} batches), so {saves.total_steps / saves.steps_per_epoch:.4g} epochs",
    )
    a_step = " or ".join(str(size * accumulation * processes) for size in sizes)
    a_batch = " or ".join(map(str, sizes))
    on = _count(processes, "process", "es")
    yield _line("batch", f"{a_step} images a step: {a_batch} × {accumulation} accumulated × {on}")


def _rates(built: Built) -> str:
    names, values = [group["name"] for group in built.groups], [group["lr"] for group in built.groups]
    rates = ", ".join(f"{name} {rate:g}" for name, rate in zip(names, values, strict=True) if rate is not None)
    if None in values:
        rates = f"{', '.join(names)} at the optimizer's own rate"
    elif len(values) > 8:  # rates by block or layer
        rates = f"{len(values)} groups from {min(values):.3g} ({names[values.index(min(values))]}) to {max(values):.3g}"
    schedule = "the optimizer's own schedule"
    if built.schedule is not None:
        warmup = f", {_count(built.schedule.warmup, 'step')} of warm-up" if built.schedule.warmup else ""
        schedule = f"{built.schedule.name}{warmup}"
    return f"{rates}; {schedule}; {built.plan.choice.name}"


def _memory(built: Built) -> Iterator[str]:
    """Bytes of the optimizer's state and of a step; the latter by a pass over tensors without contents."""
    run, data = built.run, built.plan.options.data
    count = sum(parameter.numel() for parameter in run.parameters)
    if built.plan.choice.has_modes:
        run.optimizer.optimizer.train()
    state = state_bytes(run.optimizer.optimizer)
    yield _line("optimizer", f"{human_bytes(state)} of state, {state / count:.2f} bytes a parameter")

    average = _average_bytes(built)
    if average:
        yield _line("average", f"{human_bytes(average)}, and the weights once more while it is in their place")

    family = run.family
    names = ["denoiser"]
    names += [] if data.cache_text_encoder_outputs else family.components.text_encoders
    names += [] if data.cache_latents else ["vae"]
    weights = parameter_bytes([*family.components.loaded(*names), run.network])
    step = peak_of(lambda fake: dummy_loss(built, fake).backward())
    run.optimizer.zero_grad(set_to_none=True)
    yield _line(
        "memory",
        f"about {human_bytes(weights + state + average + step)} in a step, beside the program itself: weights "
        f"{human_bytes(weights)}, state {human_bytes(state)}, activations and gradients {human_bytes(step)}",
    )
    if data.cache_latents:
        encoding = peak_of(lambda fake: family.encode_images(fake(_pixels(built, data.vae_batch_size))))
        encoding += parameter_bytes([family.components["vae"]])
        yield _line("", f"about {human_bytes(encoding)} while images are encoded, {data.vae_batch_size} at a time")


def _average_bytes(built: Built) -> int:
    """What --ema_decay keeps."""
    return 0 if built.run.ema is None else sum(tensor.nbytes for tensor in built.run.ema.average)


def dummy_loss(built: Built, fake: Callable[[Tensor], Tensor]) -> Tensor:
    """The loss of a dummy batch on the run's device: the parts of a step that take memory. Random draws, which need
    contents, are left out."""
    run, batch = built.run, synthetic_batch(built)
    device = run.accelerator.device
    with run.accelerator.autocast():
        if batch.moments is not None:
            latents = fake(batch.moments[0]).to(device)
        else:
            assert batch.pixels is not None
            with torch.no_grad():
                latents, _ = run.family.encode_images(fake(batch.pixels).to(device))
        condition = condition_of(batch, run.family, device, train_text=run.train_text)
        level = fake(run.objective.process.at(torch.zeros(len(latents), dtype=torch.long)))
        seen = predict_and_target(run.objective.process, run.family.predict, latents, latents, level, condition)
        return run.objective.main.unweighted(seen, None).mean()


def synthetic_batch(built: Built) -> Batch:
    """A full batch of the bucket that takes most memory, with its real captions and images of nothing."""
    run, data = built.run, built.plan.options.data
    group = max(built.plan.prepared.groups, key=lambda group: group.size[0] * group.size[1] * group.batch_size)
    members = [(index, repeat) for index, repeats in group.members for repeat in range(repeats)][: group.batch_size]
    draws = [Draw(run.data.samples[index], 0, repeat) for index, repeat in members]
    captions = [as_written(draw.sample.caption, draw.sample.subset)[0] for draw in draws]
    pixels = _pixels(built, len(draws))
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


def _pixels(built: Built, count: int) -> Tensor:
    width, height = max((group.size for group in built.plan.prepared.groups), key=lambda size: size[0] * size[1])
    return torch.zeros(count, 3, height, width)


def _time(built: Built) -> str:
    """The time of a step, measured on the network itself: a dry run saves nothing."""
    run = built.run
    batch = synthetic_batch(built)
    item = loop.StepBatches(step=1, epoch=0, batches=[batch] * run.accumulation, count=run.accumulation)
    seconds = []
    for _ in range(2 + MEASURED_STEPS):
        start = time.perf_counter()
        loop.optimizer_step(run, item)
        seconds.append(time.perf_counter() - start)
    step = statistics.median(seconds[2:])
    total = step * built.saves.total_steps
    return _line("time", f"{step:.2f} s a step, measured; {human_time(total)} for {built.saves.total_steps} steps")


def _files(built: Built) -> Iterator[str]:
    saves, run = built.saves, built.run
    tensors = run.network.state_dict()
    of_file = disk.file_bytes(run.network.tensors(), built.plan.options.output.save_precision)
    of_state = disk.file_bytes(tensors, None) + tensor_bytes(run.optimizer.optimizer.state)  # `_memory` has made it
    of_state += _average_bytes(built)
    files, states = saves.planned_files(after_step=run.done), saves.planned_states(after_step=run.done)
    most = disk.most_at_once(saves, after_step=run.done, of_file=of_file, of_state=of_state)
    room = human_bytes(shutil.disk_usage(_existing(saves.folder)).free)
    yield _line("disk", f"{human_bytes(most)} at one time at most, {room} are free; in all:")
    yield from _paths(f"{_count(len(files), 'file')} of {human_bytes(of_file)}", files)
    if states:
        yield from _paths(f"{_count(len(states), 'state')} of {human_bytes(of_state)}", states)
    drawn = list(pictures(built.plan.options, saves).values())
    if drawn:
        yield from _paths(_count(len(drawn), "picture"), drawn)
    for path in metrics.planned_files(built.plan.options, saves):
        what = "the whole run on one page" if path.name.endswith(metrics.REPORT_SUFFIX) else "what each step does"
        yield from _paths(what, [path])


def _paths(what: str, paths: Sequence[Path]) -> Iterator[str]:
    yield _line("", f"{what}:")
    shown: list[Path | None] = [*paths] if len(paths) <= 6 else [*paths[:3], None, *paths[-2:]]
    for path in shown:
        there = " (exists: --overwrite replaces it)" if path is not None and os.path.exists(path) else ""
        yield _line("", f"  {path}{there}" if path is not None else f"  … {len(paths) - 5} more …")


def _existing(folder: Path) -> Path:
    """The folder, or that above it which is there: the one will lie on the other's disk."""
    return folder if os.path.exists(folder) else _existing(folder.absolute().parent)


def _caches(built: Built) -> Iterator[str]:
    """What the caches on disk will take, and how much of that is there. Reads the images and what is there."""
    run, options = built.run, built.plan.options
    cached = [run.data, *([run.validate.data] if isinstance(run.validate, Validator) else [])]
    if place := latents_on_disk(run.family, options, run.accelerator):
        views = [view for data in cached for view in data.cached_views()]
        files, _ = latent_files(views, place)
        sizes = {path: view.size for view, path in files.items()}
        found = look(sizes, place)
        to_come = sum(_latents_size(built, sizes[path]) for path in found.missing)
        yield _cache("latents", found, to_come)
    if place := texts_on_disk(run.family, built.base_weights, options, run.accelerator):
        captions = {text: folder for data in cached for text, folder in data.caption_folders().items()}
        files_of_captions = caption_files(captions, place)
        found = look(files_of_captions.values(), place)
        with torch.no_grad():
            example = run.family.encode_prompts([""])
        to_come = len(found.missing) * size_of({name: output[0] for name, output in example.items()})
        yield _cache("text encoder outputs", found, to_come)


def _latents_size(built: Built, size: Size) -> int:
    width, height = (side // built.run.family.latents.factor for side in size)
    latents = torch.zeros(built.run.family.latents.channels, height, width)
    return size_of({"mean": latents, "std": latents})


def _cache(what: str, found: Found, to_come: int) -> str:
    files = [*found.sizes, *found.missing]
    folders = list(dict.fromkeys(str(path.parent) for path in files))
    more = f" and {_count(len(folders) - 1, 'more folder')}" if len(folders) > 1 else ""
    broken = f", {len(found.broken)} of them broken" if found.broken else ""
    return _line(
        "cache",
        f"{what}: {_count(len(files), 'file')}, {human_bytes(found.nbytes + to_come)}, in {folders[0]}{more}; "
        f"{len(found.sizes)} ({human_bytes(found.nbytes)}) are there, "
        f"{len(found.missing)} ({human_bytes(to_come)}) to be made{broken}",
    )
