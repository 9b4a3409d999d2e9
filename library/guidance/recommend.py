"""`--recommend`: settings for this data, model and card, each with its reason. Nothing is loaded, nothing trained.

The number of images drives most of it, and what the user says about the job (`library.config.wishes`); the tables are
in `library.guidance.rules`. Rates are those of the presets, the weight decay's numbers are what `auto` takes, and what
makes the run fit into the card is what `--fit` chooses.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from library.config import wishes
from library.config.fields import convert, declared
from library.config.options import declared_options, option_groups
from library.config.options.weight_decay import READ_BY
from library.config.presets import settings_of
from library.config.wishes import Wishes
from library.errors import UserError
from library.files.atomic import replacing
from library.guidance import rules
from library.guidance.advice import Advice, is_final
from library.guidance.card_advice import for_card
from library.guidance.lr_curve import two_digits
from library.optimizers import auto_weight_decay
from library.optimizers.weight_decay_choice import weight_decay_of
from library.run.plan import Plan

logger = logging.getLogger(__name__)

FEW = 5_000  # images: below, the weight decay falls less than usual
TASK = "image_generation"  # unless --task names another
PRESET = "stable_diffusion_lora"  # the one for anything
FAMILIES_OF_PRESET = ("sd", "sdxl")
WITHOUT_WARMUP = ("constant", "piecewise_constant", "adafactor")


def advise(plan: Plan) -> list[Advice]:
    """The recommended settings, in the order of a config file, without those for the card's memory."""
    options, images = plan.options, plan.prepared.train_images
    wanted = wishes.of(options.guidance.recommend)
    _, batch = rules.by_size(images)
    own_batch = {spec.batch_size for spec in plan.datasets} if options.data.dataset_config else set()
    if len(own_batch) == 1:
        (batch,) = own_batch
    advice = [*_network(plan, wanted), *_rates(plan)]
    if (why := plan.family.LEAVE_TEXT_ENCODERS) and not options.network.network_train_text_encoder_only:
        advice.append(Advice("network_train_unet_only", True, why))
    advice += _schedule(plan)
    if not own_batch:
        why = f"{images} images: {'few, so that there are enough steps' if batch == 2 else 'enough for steadier steps'}"
        advice.append(Advice("train_batch_size", batch, f"{why}; short of memory: 1, and accumulate"))
    per_step = batch * options.training.gradient_accumulation_steps
    steps, length = _length(plan, wanted, per_step=per_step)
    return [*advice, length, *_weight_decay(plan, steps=steps)]


def _network(plan: Plan, wanted: Wishes) -> Iterator[Advice]:
    """Method, rank and alpha; nothing for networks of another kind than LoRA, which the user has chosen."""
    network, images = plan.options.network, plan.prepared.train_images
    if network.network_module != "networks.lora":
        for word in filter(None, (wanted.subject, wanted.difficulty if wanted.difficulty != "normal" else "")):
            logger.warning(
                "--recommend %s: has no effect with --network_module %s: ranks are advised for LoRA alone",
                word,
                network.network_module,
            )
        return
    method, stays = rules.METHODS[wanted.difficulty], ""
    if method is not None and network.network_args:
        stays = f"; no {method.module} is advised beside --network_args, which are LoRA's"
    elif method is not None:
        yield Advice("network_module", method.module, method.why)
    usual, _ = rules.by_size(images)
    why = f"{images} images: {_rank_reason(images)}"
    if name := rules.preset_of(plan.family.NAME, wanted.subject):
        instead = f"; {usual} by its {images} images" if _of_preset(name)["network_dim"] != usual else ""
        usual = int(_of_preset(name)["network_dim"])
        why = f"that of {name}{instead}"
    elif wanted.subject:
        why += f"; no preset is for a {wanted.subject} and {plan.family.TITLE}"
    rank = rules.rank_for(usual, wanted.difficulty)
    if rank != usual:
        why += f"; {'twice' if rank > usual else 'half'} of {usual}, since it is {wanted.difficulty}"
    yield Advice("network_dim", rank, why + stays)
    if is_final(plan.options, "network_dim"):
        rank = network.network_dim or rank
    usual_preset = _of_preset(_preset(plan))
    share = usual_preset["network_alpha"] / usual_preset["network_dim"]
    why = f"{'the rank' if share == 1 else 'half the rank'}, which goes with the rates below"
    yield Advice("network_alpha", max(1, round(rank * share)), why)


def _schedule(plan: Plan) -> Iterator[Advice]:
    options = plan.options
    if plan.choice.schedule_free or plan.choice.relative_step or options.schedule.lr_scheduler_type:
        return
    yield Advice("lr_scheduler", "cosine", "usual where pictures are generated: fine steps at the end")
    if not (is_final(options, "lr_scheduler") and options.schedule.lr_scheduler in WITHOUT_WARMUP):
        yield Advice("lr_warmup_steps", "5%", "usual for a LoRA: the first steps are the noisiest")


def _length(plan: Plan, wanted: Wishes, *, per_step: int) -> tuple[int, Advice]:
    """The steps of the run as it will be, and the advice about them."""
    options, images = plan.options, plan.prepared.train_images
    of, usual = f"{images} images", max(1, round(rules.views(images) / per_step))
    steps = min(usual, wanted.most_steps or usual)
    is_short = steps < usual
    draws = sum(group.draws for group in plan.prepared.groups)
    passes = steps * per_step / draws
    epochs = max(1, int(passes) if is_short else round(passes))
    if by_epochs := options.training.max_train_epochs is not None:  # they go before steps
        steps = max(1, round(epochs * draws / per_step))
    each = f"each image about {steps * per_step / images:.0f} times"
    if is_short:
        each += f"; the time is enough for no more, where {usual} steps would be usual"
    if by_epochs:
        advice = Advice("max_train_epochs", epochs, f"{of}: {each}; {steps} steps")
        own = options.training.max_train_epochs if is_final(options, "max_train_epochs") else None
        return steps if own is None else max(1, round(own * draws / per_step)), advice
    advice = Advice("max_train_steps", steps, f"{of}, {per_step} a step: {each}; {epochs} epochs")
    return (options.training.max_train_steps if is_final(options, "max_train_steps") else steps), advice


def _rank_reason(images: int) -> str:
    if images < rules.BY_SIZE[0][0]:
        return "a higher rank would learn so few by heart"
    return (
        "enough to fill this rank, for a subject or a style"
        if images < rules.BY_SIZE[1][0]
        else "there is much to learn"
    )


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
        small, lion = plan.family.native_resolution < rules.SMALL, "lion" in choice.name.rpartition(".")[2].lower()
        usual = "ten times the usual, since the base is small" if small else "usual for a LoRA"
        plain = rules.SMALL_RATE if small else rules.RATE
        rate = plain * rules.LION if lion else plain
        if lion:
            usual = f"Lion's steps are larger than AdamW's: three tenths of {plain:g}"
        if unet:
            yield Advice(name, two_digits(rate), f"{usual}; --find_lr finds yours")
        if text:
            why = f"half of the {plan.family.PARTS['denoiser'].title}'s: the text encoder overfits sooner"
            yield Advice("text_encoder_lr", two_digits(rate * rules.TEXT), why)


def _weight_decay(plan: Plan, *, steps: int) -> Iterator[Advice]:
    """The curve, where the optimizer has a weight decay and the run is long enough to follow one."""
    choice, options, images = plan.choice, plan.options, plan.prepared.train_images
    transition, rule = auto_weight_decay.transition_steps(steps, options.weight_decay.task or TASK)
    if not weight_decay_of(choice) or choice.finds_its_rate or transition >= steps:
        return
    if is_final(options, "dynamic_weight_decay") and not options.weight_decay.dynamic_weight_decay:
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


def _of_preset(name: str) -> dict[str, Any]:
    """The values of a preset, by option."""
    known = declared_options()
    return {item.name: convert(known[item.name], item.words) for item in settings_of([name], where="--recommend")}


def _preset(plan: Plan) -> str:
    """The preset to compare with: that of the subject, else the one for anything; the families of flow matching have
    none for anything, and theirs for a style takes its place."""
    family, subject = plan.family.NAME, wishes.of(plan.options.guidance.recommend).subject
    anything = PRESET if family in FAMILIES_OF_PRESET else rules.preset_of(family, "style")
    return rules.preset_of(family, subject) or anything or PRESET


def _against_preset(advice: list[Advice], preset: str = PRESET) -> str:
    """Which of the settings a preset has otherwise, and why; "" for none."""
    values = _of_preset(preset)
    others = [
        f"{item.option} {_shown(values[item.option])}"
        for item in advice
        if item.option in values and values[item.option] not in (item.value, (item.value,))
    ]
    if not others:
        return ""
    return (
        f"The preset {preset} has {', '.join(others)}: it is for any images, any model of full size and any length, "
        "and the reasons above are about these."
    )


def report(plan: Plan) -> Path:
    """Print the data, the model and a table, and write the settings as a config file to the folder of the LoRA.

    UserError, after all is printed, if the file exists with other contents.
    """
    (advice, of_card), options = for_card(plan, advise(plan)), plan.options
    for line in _facts(plan):
        print(line)
    if of_card:
        print(f"card     {of_card}")
    width = max(len(item.option) for item in advice)
    print(f"\n{'setting':<{width}}  {'now':<10} {'advice':<10} why")
    for item in advice:
        given = " (the command line's wins)" if is_final(options, item.option) else ""
        now = _shown(_now(plan, item.option))
        print(f"{item.option:<{width}}  {now:<10} {_shown(item.value):<10} {item.why}{given}")
    output = options.output
    path = Path(output.output_dir) / f"{output.output_name or 'last'}-recommended.toml"
    text = snippet(plan, advice)
    if other := _against_preset(advice, _preset(plan)):
        print(f"\n{other}")
    if any(item.option == "network_dim" for item in advice):
        print("\nnot advised, though others do:")
        for name, why in rules.NOT_ADVISED.items():
            print(f"  {name}: {why}")
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
