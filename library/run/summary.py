"""What a run will do, in words: the head of its log, its report and a dry run."""

from __future__ import annotations

from collections.abc import Iterator

from library.data.captions import changing_options
from library.data.prepare import Prepared
from library.optimizers.weight_decay_choice import weight_decay_of
from library.run.plan import Plan
from library.training.hooks.lr_schedule import LrSchedule
from library.training.hooks.validation import Validator
from library.training.hooks.weight_decay import WeightDecay
from library.training.run import Run
from networks.base_weights import with_multipliers
from networks.network import AdapterNetwork


def summary(plan: Plan, run: Run) -> Iterator[str]:
    """Model, network, data, length, rates and weight decay: what the options were understood to mean."""
    yield line("model", _model(plan, run))
    if files := plan.options.network.base_weights:
        pairs = with_multipliers(files, plan.options.network.base_weights_multiplier or ())
        yield line("", f"merged into it: {', '.join(f'{file} × {factor:g}' for file, factor in pairs)}")
    yield from _network(plan, run)
    yield from _data(plan, run)
    yield from _length(plan, run)
    yield line("rates", _rates(plan, run))
    if base := weight_decay_of(plan.choice):
        steps = run.saves.total_steps
        hook = run.hook(WeightDecay)
        yield line("decay", f"{base:g}" if hook is None else hook.decay.told(base, total_steps=steps))


def line(label: str, text: str) -> str:
    return f"{label:<12}{text}"


def counted(number: int, what: str, plural: str = "s") -> str:
    return f"{number} {what}{plural if number != 1 else ''}"


def _model(plan: Plan, run: Run) -> str:
    family, options = plan.family, plan.options
    vae = f", VAE {family.vae_path}" if family.vae_path else ""
    held = ", frozen weights in 8 bits" if options.precision.holds_unet_in_float8 else ""
    return (
        f"{family.path} ({family.base_model_version}, {family.prediction_type}){vae}; "
        f"{options.precision.mixed_precision.replace('no', 'fp32')} on {run.accelerator.device}{held}"
    )


def _network(plan: Plan, run: Run) -> Iterator[str]:
    options = plan.options.network
    trainable = sum(parameter.numel() for parameter in run.parameters)
    yield line(
        "network",
        f"{options.network_module}, dim {_dim(plan, run)}, alpha {options.network_alpha:g}: {_modules(run)}"
        f"{trainable:,} trainable parameters",
    )


def _dim(plan: Plan, run: Run) -> str:
    """The ranks of our own networks as they are; of others as they were asked for."""
    network, wanted = run.network, plan.options.network.network_dim
    if not isinstance(network, AdapterNetwork):
        return "default" if wanted is None else str(wanted)
    ranks = sorted({adapter.rank for adapter in network.adapters})
    return str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"


def _modules(run: Run) -> str:
    """ "UNet 192 modules, ": how many layers each part of our own networks sits on."""
    network = run.network
    counts = network.module_counts() if isinstance(network, AdapterNetwork) else {}
    return "".join(f"{section} {count} modules, " for section, count in counts.items())


def _data(plan: Plan, run: Run) -> Iterator[str]:
    prepared, family = plan.prepared, plan.family
    for summary in prepared.summaries:
        kind = "regularisation images" if summary.subset.is_reg else "images"
        held = f", {summary.held_out} held back" if summary.held_out else ""
        held += f", {summary.too_small} too small and left out" if summary.too_small else ""
        yield line(
            "images",
            f"{summary.subset.source}: {summary.images} {kind} × {summary.subset.num_repeats}{held}; captions: "
            f"{summary.captions_found} found, {summary.captions_missing} missing, {summary.captions_empty} empty",
        )
    texts = run.data.captions()
    too_long = sum(family.count_tokens(text) > family.token_limit for text in texts)
    yield line("captions", f"{len(texts)} different, {too_long} cut off at {family.token_limit} tokens")
    for spec in dict.fromkeys(summary.subset for summary in prepared.summaries):
        if (text := run.data.example(spec)) is not None:
            changing = ", ".join(f"{name} {_value(getattr(spec, name))}".strip() for name in changing_options(spec))
            each = f" (another text each time: {changing})" if changing else ""
            yield line("", f"trained for example: '{text}'{each}")
    if prepared.validation is not None:
        yield line("validation", _validation(plan, run, prepared.validation))
    for group in prepared.groups:
        width, height = group.size
        yield line(
            "bucket",
            f"{width} × {height}: {len(group.members)} images, {group.draws} with repeats, {group.batches} batches",
        )


def _validation(plan: Plan, run: Run, prepared: Prepared) -> str:
    """What is measured when: "3 images held back, 2 batches × 5 timesteps, 12 times"."""
    wanted, saves = plan.options.validation, run.saves
    batches = min(prepared.batches_per_epoch, wanted.max_validation_steps or prepared.batches_per_epoch)
    validator = run.hook(Validator)
    assert validator is not None, "images are held out"
    times = sum(bool(validator.times.due(step)) for step in range(saves.total_steps + 1))
    patience = wanted.early_stopping_patience
    stops = f"; ends early after {counted(patience, 'validation')} without improvement" if patience else ""
    return (
        f"{counted(len(prepared.samples), 'image')} held back: {counted(batches, 'batch', 'es')} × "
        f"{counted(len(validator.timesteps), 'timestep')}, {times} times{stops}"
    )


def _value(value: bool | float) -> str:
    """An option's value behind its name; nothing for one that is just on."""
    return "" if value is True else f"{value:g}"


def _length(plan: Plan, run: Run) -> Iterator[str]:
    saves, options = run.saves, plan.options
    processes = run.accelerator.num_processes
    accumulation = options.training.gradient_accumulation_steps
    sizes = sorted({spec.batch_size for spec in plan.datasets})
    yield line(
        "length",
        f"{saves.total_steps} steps; an epoch has {saves.steps_per_epoch} of them "
        f"({plan.prepared.batches_per_epoch} batches), so {saves.total_steps / saves.steps_per_epoch:.4g} epochs",
    )
    a_step = " or ".join(str(size * accumulation * processes) for size in sizes)
    a_batch = " or ".join(map(str, sizes))
    on = counted(processes, "process", "es")
    yield line("batch", f"{a_step} images a step: {a_batch} × {accumulation} accumulated × {on}")


def _rates(plan: Plan, run: Run) -> str:
    names, values = [group["name"] for group in run.groups], [group["lr"] for group in run.groups]
    rates = ", ".join(f"{name} {rate:g}" for name, rate in zip(names, values, strict=True) if rate is not None)
    if None in values:
        rates = f"{', '.join(names)} at the optimizer's own rate"
    elif len(values) > 8:  # rates by block or layer
        rates = f"{len(values)} groups from {min(values):.3g} ({names[values.index(min(values))]}) to {max(values):.3g}"
    schedule = "the optimizer's own schedule"
    if (hook := run.hook(LrSchedule)) is not None:
        warmup = f", {counted(hook.choice.warmup, 'step')} of warm-up" if hook.choice.warmup else ""
        schedule = f"{hook.choice.name}{warmup}"
    return f"{rates}; {schedule}; {plan.choice.name}"
