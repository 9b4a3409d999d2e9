"""`--recommend`: settings for this data and this model, each with its reason. Nothing is loaded, nothing trained.

The number of images drives nearly all of it. Rank, length and batch are rules of thumb of this project's own, in the
range of what kohya's users write; rates are those of the presets; the weight decay's numbers are what `auto` takes.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.config.fields import convert, declared
from library.config.options import Options, declared_options, option_groups
from library.config.options.weight_decay import READ_BY
from library.config.presets import settings_of
from library.config.settings import COMMAND_LINE
from library.errors import UserError
from library.files.atomic import replacing
from library.guidance.lr_curve import two_digits
from library.optimizers import auto_weight_decay
from library.optimizers.weight_decay_choice import weight_decay_of
from library.run.plan import Plan

logger = logging.getLogger(__name__)

# images below → rank, images a step
BY_SIZE = ((50, 16, 2), (1_000, 32, 4), (5_000, 64, 8), (float("inf"), 128, 8))
FEW = 5_000  # images: below, the weight decay falls less than usual
TASK = "image_generation"  # unless --task names another
PRESET = "stable_diffusion_lora"  # the one for anything
WITHOUT_WARMUP = ("constant", "piecewise_constant", "adafactor")


@dataclass(frozen=True)
class Advice:
    """`value` as the option has it."""

    option: str
    value: int | float | str | bool
    why: str


def views(images: int) -> int:
    """How often images are shown in a whole run, together: 400 images ** 0.6.

    The more images there are, the less often each is shown: 20 images 120 times, 100 63, 1,000 25, 10,000 10 times.
    """
    return round(400 * images**0.6)


def advise(plan: Plan) -> list[Advice]:
    """The recommended settings, in the order of a config file."""
    options, images = plan.options, plan.prepared.train_images
    rank, batch = _by_size(images)
    own_batch = {spec.batch_size for spec in plan.datasets} if options.data.dataset_config else set()
    if len(own_batch) == 1:
        (batch,) = own_batch
    per_step = batch * options.training.gradient_accumulation_steps
    steps = max(1, round(views(images) / per_step))
    of = f"{images} images"
    advice = []
    if options.network.network_module == "networks.lora":
        advice.append(Advice("network_dim", rank, f"{of}: {_rank_reason(images)}"))
        advice.append(Advice("network_alpha", rank // 2, "half the rank, which goes with the rates below"))
    advice += _rates(plan)
    if (why := plan.family.LEAVE_TEXT_ENCODERS) and not options.network.network_train_text_encoder_only:
        advice.append(Advice("network_train_unet_only", True, why))
    if not (plan.choice.schedule_free or plan.choice.relative_step or options.schedule.lr_scheduler_type):
        advice.append(Advice("lr_scheduler", "cosine", "usual where pictures are generated: fine steps at the end"))
        if not (_is_final(options, "lr_scheduler") and options.schedule.lr_scheduler in WITHOUT_WARMUP):
            advice.append(Advice("lr_warmup_steps", "5%", "usual for a LoRA: the first steps are the noisiest"))
    if not own_batch:
        why = f"{of}: {'few, so that there are enough steps' if batch == 2 else 'enough for steadier steps'}"
        advice.append(Advice("train_batch_size", batch, f"{why}; short of memory: 1, and accumulate"))
    epochs = max(1, round(steps * per_step / sum(group.draws for group in plan.prepared.groups)))
    each = f"each image about {views(images) / images:.0f} times"
    if options.training.max_train_epochs is not None:  # it goes before steps
        advice.append(Advice("max_train_epochs", epochs, f"{of}: {each}; {steps} steps"))
    else:
        advice.append(Advice("max_train_steps", steps, f"{of}, {per_step} a step: {each}; {epochs} epochs"))
    if _is_final(options, "max_train_steps") and options.training.max_train_epochs is None:
        steps = options.training.max_train_steps
    return [*advice, *_weight_decay(plan, steps=steps)]


def _is_final(options: Options, name: str) -> bool:
    """Whether the command line sets this option: it wins over the file that is written."""
    return options.given.get(name, "").startswith(COMMAND_LINE)


def _by_size(images: int) -> tuple[int, int]:
    return next((rank, batch) for most, rank, batch in BY_SIZE if images < most)


def _rank_reason(images: int) -> str:
    if images < BY_SIZE[0][0]:
        return "a higher rank would learn so few by heart"
    return "enough to fill this rank, for a subject or a style" if images < BY_SIZE[1][0] else "there is much to learn"


def _rates(plan: Plan) -> Iterator[Advice]:
    choice, network = plan.choice, plan.options.network
    unet, text = not network.network_train_text_encoder_only, not network.network_train_unet_only
    text = text and not (plan.family.LEAVE_TEXT_ENCODERS and unet)
    name = "learning_rate" if plan.options.optimizer.unet_lr is None else "unet_lr"
    if choice.finds_its_rate:
        if unet:
            yield Advice(name, 1.0, f"{choice.name} finds the rate; this is a factor on it")
        if text:
            of = "" if choice.has_a_rate_a_group else ", which is one for all parts"
            yield Advice("text_encoder_lr", 1.0, f"a factor on the rate that it finds{of}")
    elif not choice.relative_step:
        small, lion = plan.family.native_resolution < 256, "lion" in choice.name.rpartition(".")[2].lower()
        usual = "ten times the usual, since the base is small" if small else "usual for a LoRA of Stable Diffusion"
        rate = (1e-3 if small else 1e-4) * (0.3 if lion else 1)
        if lion:
            usual = f"Lion's steps are larger than AdamW's: three tenths of {rate / 0.3:g}"
        if unet:
            yield Advice(name, two_digits(rate), f"{usual}; --find_lr finds yours")
        if text:
            why = f"half of the {plan.family.PARTS['denoiser'].title}'s: the text encoder overfits sooner"
            yield Advice("text_encoder_lr", two_digits(rate / 2), why)


def _weight_decay(plan: Plan, *, steps: int) -> Iterator[Advice]:
    """The curve, where the optimizer has a weight decay and the run is long enough to follow one."""
    choice, options, images = plan.choice, plan.options, plan.prepared.train_images
    transition, rule = auto_weight_decay.transition_steps(steps, options.weight_decay.task or TASK)
    if not weight_decay_of(choice) or choice.finds_its_rate or transition >= steps:
        return
    if _is_final(options, "dynamic_weight_decay") and not options.weight_decay.dynamic_weight_decay:
        return
    factor, of_factor = auto_weight_decay.decay_factor(images, options.weight_decay.task)
    least, of_least = auto_weight_decay.min_ratio(images)
    few = "fewer need longer regularisation" if images < FEW else "so many need little regularisation"
    advice = [
        Advice("wd_transition_steps", transition, rule.removeprefix("auto: ")),
        Advice("wd_decay_factor", factor, _rule(of_factor, few)),
        Advice("wd_min_ratio", least, _rule(of_least, few)),
    ]
    yield Advice("dynamic_weight_decay", True, f"{steps} steps are enough for it to fall")
    schedule = options.weight_decay.wd_schedule or "exponential"
    yield from (item for item in advice if schedule in READ_BY[item.option])


def _rule(rule: str, few: str) -> str:
    """A rule of auto as a reason: one by the number of images with `few`, that of a task as it is."""
    rule = rule.removeprefix("auto: ")
    return rule if rule.startswith("task") else f"{rule}: {few}"


def _against_preset(advice: list[Advice]) -> str:
    """Which of the settings the preset for anything has otherwise, and why; "" for none."""
    of_preset = {setting.name: setting.words for setting in settings_of([PRESET], where="--recommend")}
    known = declared_options()
    values = {
        item.option: convert(known[item.option], of_preset[item.option]) for item in advice if item.option in of_preset
    }
    others = [
        f"{item.option} {_shown(values[item.option])}"
        for item in advice
        if item.option in values and values[item.option] not in (item.value, (item.value,))
    ]
    if not others:
        return ""
    return (
        f"The preset {PRESET} has {', '.join(others)}: it is for any images, any model of full size and any length, "
        "and the reasons above are about these."
    )


def report(plan: Plan) -> Path:
    """Print the data, the model and a table, and write the settings as a config file to the folder of the LoRA.

    UserError, after all is printed, if the file exists with other contents.
    """
    advice, options = advise(plan), plan.options
    for line in _facts(plan):
        print(line)
    width = max(len(item.option) for item in advice)
    print(f"\n{'setting':<{width}}  {'now':<10} {'advice':<10} why")
    for item in advice:
        given = " (the command line's wins)" if _is_final(options, item.option) else ""
        now = _shown(_now(plan, item.option))
        print(f"{item.option:<{width}}  {now:<10} {_shown(item.value):<10} {item.why}{given}")
    output = options.output
    path = Path(output.output_dir) / f"{output.output_name or 'last'}-recommended.toml"
    text = snippet(plan, advice)
    if other := _against_preset(advice):
        print(f"\n{other}")
    print(f"\n{text}")
    if os.path.isfile(path) and path.read_bytes() != text.encode() and not output.overwrite:  # it may have been edited
        raise UserError(f"{path} exists with other contents: --overwrite replaces it, or give another --output_name")
    with replacing(path) as beside:
        beside.write_text(text, encoding="utf-8", newline="\n")
    print(f"written: {path}")
    if options.run.config_file is None:
        print(f"to use it: the same command with --config_file {path} instead of --recommend")
    else:
        print(f"to use it: put these lines into {options.run.config_file}, instead of those of the same names")
    print("These are rules of thumb to start from. Nothing was trained.", flush=True)
    return path


def snippet(plan: Plan, advice: list[Advice]) -> str:
    """The advice as a TOML file, each line with its reason above it."""
    lines = [f"# Recommended for {plan.prepared.train_images} images and {plan.family.path}"]
    for item in advice:
        lines += [f"# {item.why}", f"{item.option} = {_toml(item.value)}"]
    return "\n".join(lines) + "\n"


def _facts(plan: Plan) -> Iterator[str]:
    prepared = plan.prepared
    found, missing = (
        sum(getattr(summary, name) for summary in prepared.summaries) for name in ("captions_found", "captions_missing")
    )
    draws = sum(group.draws for group in prepared.groups)
    sizes = sorted({group.size for group in prepared.groups})
    shapes = f"{sizes[0][0]} × {sizes[0][1]}" if len(sizes) == 1 else f"{len(sizes)} sizes"
    yield f"data     {prepared.train_images} images, {draws} an epoch with repeats, {shapes}; {found} have captions"
    yield f"model    {plan.family.path} ({plan.family.base_model_version})"
    yield f"trained  {plan.options.network.network_module} with {plan.choice.name}"
    if missing:
        logger.warning("%d images have no caption: all of them are learnt as the same thing", missing)


def _now(plan: Plan, name: str) -> Any:
    group = next(group for group, kind in option_groups().items() if name in declared(kind))
    return getattr(getattr(plan.options, group), name)


def _shown(value: object) -> str:
    if isinstance(value, tuple):
        return " ".join(map(_shown, value))
    if isinstance(value, bool) or value is None:
        return {True: "on", False: "off", None: "-"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)


def _toml(value: int | float | str | bool) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str) else f"{value:g}" if isinstance(value, float) else str(value)
