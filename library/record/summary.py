"""The facts of a run as lines for the console: at the start of every run's log, and in a dry run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from library.record.facts import (
    Adapters,
    Captions,
    Decay,
    DecayCurve,
    Embedding,
    Facts,
    Flaw,
    Images,
    Model,
    Network,
    Protections,
    Rates,
    Validation,
)

_MOST_FLAWS = 4
_MOST_PROMPTS = 12
_MOST_RATES = 8  # groups whose rates are listed; rates by block or layer make dozens


def lines(facts: Facts) -> Iterator[str]:
    """The lines of the console's summary of a run, each with its label."""
    return (line(label, text) for label, text in rows(facts))


def line(label: str, text: str) -> str:
    """A label in its column, and the text."""
    return f"{label:<12}{text}"


def count(number: int, what: str, plural: str = "s") -> str:
    """ "1 step", "2 steps"."""
    return f"{number} {what}{plural if number != 1 else ''}"


def rows(facts: Facts) -> Iterator[tuple[str, str]]:
    """Label and text of each line; a line without a label continues the one before."""
    yield "model", model(facts.model)
    for apart, words in ((False, "merged into it"), (True, "in training alone")):
        if files := [f"{file.file} × {file.multiplier:g}" for file in facts.model.base_weights if file.apart == apart]:
            yield "", f"{words}: {', '.join(files)}"
    yield "network", f"{network(facts.network)}: {_parameters(facts.network)}"
    if said := share(facts.network):
        yield "", said
    for item in facts.network.adapters:
        if item.layers:
            yield "", f"{item.part}: {_layers(item)}"
    if facts.network.embedding is not None:
        yield "embedding", embedding(facts.network.embedding)
    for folder in facts.images:
        yield "images", _images(folder)
    if any(folder.by_shares or {folder.least, folder.most} != {folder.repeats} for folder in facts.images):
        yield from _drawn(facts.images)
    yield from _prompts(facts) if facts.prompts else _captions(facts.captions)
    yield from flaw_rows(facts.flaws)
    if facts.validation is not None:
        yield "validation", _validation(facts.validation)
    if facts.protections is not None:
        yield "protection", protections(facts.protections)
    for bucket in facts.buckets:
        width, height = bucket.size
        how = "in the first epoch" if bucket.by_shares else "with repeats"
        drawn = f"{bucket.images} images, {bucket.draws} {how}, {bucket.batches} batches"
        yield "bucket", f"{width} × {height}: {drawn}"
    yield "length", _length(facts)
    yield "batch", _batch(facts)
    yield "rates", rates(facts.rates)
    if facts.decay is not None:
        yield "decay", decay(facts.decay)


def model(facts: Model) -> str:
    """Its path, its version and its precision."""
    vae = f", VAE {facts.vae}" if facts.vae else ""
    held = facts.frozen_format and f", frozen weights in {facts.frozen_format}"
    return f"{facts.path} ({facts.version}, {facts.prediction_type}){vae}; {facts.precision} on {facts.device}{held}"


def network(facts: Network) -> str:
    """Its module, rank and alpha: "networks.lora, dim 4, alpha 2"."""
    if not facts.module:
        return "an embedding, no LoRA"
    if facts.ranks is None:
        dim = "default" if facts.dim is None else str(facts.dim)
    else:
        lowest, highest = facts.ranks
        if not highest:  # a kind without ranks
            return facts.module
        dim = str(lowest) if lowest == highest else f"{lowest} to {highest}"
    return f"{facts.module}, dim {dim}, alpha {facts.alpha:g}"


def embedding(facts: Embedding) -> str:
    """ "'<fox>': 2 vectors of 768 (clip_l) and 1280 (clip_g), from 'fox'"."""
    widths = " and ".join(f"{width} ({key})" for key, width in facts.widths)
    start = facts.start or "random vectors"
    return f"'{facts.word}': {count(facts.vectors, 'vector')} of {widths}, from {start}"


def share(facts: Network) -> str:
    """The share of the trained parameters: "0.27 % of the unet's parameters, 0.22 % of the whole model's"; "" where the
    model's are unknown."""
    if not facts.model_parameters:
        return ""
    parts = "".join(
        f"{100 * item.parameters / item.part_parameters:.3g} % of the {item.part}'s parameters, "
        for item in facts.adapters
        if item.part_parameters
    )
    return f"{parts}{100 * facts.parameters / facts.model_parameters:.3g} % of the whole model's"


def _parameters(facts: Network) -> str:
    parts = "".join(f"{item.part} {item.count} modules, " for item in facts.adapters)
    return f"{parts}{facts.parameters:,} trainable parameters"


def _layers(facts: Adapters) -> str:
    """ "16 each of attn1.to_q, attn1.to_k; 1 of conv_in"."""
    names: dict[int, list[str]] = {}
    for name, number in facts.layers:
        names.setdefault(number, []).append(name)
    each = (f"{number}{' each' * (len(own) > 1)} of {', '.join(own)}" for number, own in names.items())
    return "; ".join(each)


def _images(facts: Images) -> str:
    kind = "regularisation images" if facts.regularisation else "images"
    held = f", {facts.held_out} held out" if facts.held_out else ""
    held += f", {facts.too_small} too small and left out" if facts.too_small else ""
    repeats = "" if facts.by_shares else f" × {facts.repeats}"
    return (
        f"{_place(facts)}: {facts.images} {kind}{repeats}{held}; captions: "
        f"{facts.captions_found} found, {facts.captions_missing} missing, {facts.captions_empty} empty"
    )


def _place(facts: Images) -> str:
    size = "" if facts.resolution is None else " at {} × {}".format(*facts.resolution)
    return f"{facts.source}{size}"


def _drawn(folders: Sequence[Images]) -> Iterator[tuple[str, str]]:
    """How often each folder's images are drawn in an epoch."""
    for folder in folders:
        each = _times(folder.most)
        if folder.least != folder.most:
            each = f"{folder.least:.3g} to {each}"
        if folder.by_shares and folder.least % 1:
            each += " on average"
        part, draws = f"{100 * folder.part:.3g} % of its data set", f"{folder.draws:.4g} an epoch"
        yield "drawn", f"{_place(folder)}: {part}, {draws}, each image {each}"
    drawn = [folder for folder in folders if folder.images]
    rarest, commonest = min(drawn, key=lambda folder: folder.least), max(drawn, key=lambda folder: folder.most)
    if rarest.least < commonest.most:
        rare = f"least often an image of {_place(rarest)}, {_times(rarest.least)} an epoch"
        yield "", f"{rare}; most often one of {_place(commonest)}, {_times(commonest.most)}"


def _times(draws: float) -> str:
    return "once" if draws == 1 else f"{draws:.3g} times"


def _captions(facts: Captions) -> Iterator[tuple[str, str]]:
    yield "captions", f"{facts.different} different, {facts.too_long} cut off at {facts.token_limit} tokens"
    for example in facts.examples:
        changing = ", ".join(f"{name} {value}".strip() for name, value in example.changing)
        each = f" (changes each time: {changing})" if changing else ""
        yield "", f"trained for example: '{example.text}'{each}"


def _prompts(facts: Facts) -> Iterator[tuple[str, str]]:
    """What a slider is trained on."""
    captions = facts.captions
    yield "prompts", f"{captions.different} different, {captions.too_long} cut off at {captions.token_limit} tokens"
    yield from (("", text) for text in facts.prompts[:_MOST_PROMPTS])
    if (more := len(facts.prompts) - _MOST_PROMPTS) > 0:
        yield "", f"and {more} more"


def flaw_rows(flaws: Sequence[Flaw]) -> Iterator[tuple[str, str]]:
    """Those that matter, with the first files of each."""
    serious = [flaw for flaw in flaws if flaw.level != "to know"]
    for number, flaw in enumerate(serious[:_MOST_FLAWS]):
        names = ", ".join(flaw.files[:3]) + (" …" if flaw.count > 3 else "")
        yield "" if number else "data check", f"{flaw.source}: {flaw.text}" + (f" ({names})" if names else "")
    if len(serious) > _MOST_FLAWS:
        yield "", f"{len(serious) - _MOST_FLAWS} more to look at; --check_data shows everything, with pictures"
    elif serious:
        yield "", "--check_data shows everything, with pictures"
    elif flaws:
        names = ", ".join(dict.fromkeys(flaw.name for flaw in flaws))
        yield "data check", f"nothing to fix; to know: {names} (--check_data shows them, with pictures)"


def _validation(facts: Validation) -> str:
    """ "3 images held out: 2 batches × 5 noise levels, 12 times"."""
    stops = ""
    if facts.patience:
        stops = f"; ends early after {count(facts.patience, 'validation')} without improvement"
    return (
        f"{count(facts.images, 'image')} held out: {count(facts.batches, 'batch', 'es')} × "
        f"{count(facts.timesteps, 'noise level')}, {facts.times} times{stops}"
    )


def protections(facts: Protections) -> str:
    """What keeps the network from forgetting: "79 images keep the base model's prediction; EWC for 20 images of noto,
    lambda computed"."""
    said = []
    for one in facts.preserved:
        whose = "the base model's prediction" if one.prior == "base" else f"the prediction of {facts.previous}"
        where = "" if one.region == "all" else " outside of their masks"
        weight = "" if one.weight == 1 else f", weight {one.weight:g}"
        said.append(f"{count(one.images, 'image')} keep{'s' * (one.images == 1)} {whose}{where}{weight}")
    if (distilled := facts.distilled) is not None:
        falls = "" if distilled.schedule == "constant" else f", {distilled.schedule} to 0"
        said.append(f"distillation from {facts.previous}, weight {distilled.weight:g}{falls}")
    if (held := facts.consolidated) is not None:
        strength = "computed" if held.strength is None else f"{held.strength:g}"
        said.append(f"EWC for {count(held.images, 'image')} of {', '.join(held.sources)}, lambda {strength}")
    return "; ".join(said)


def _length(facts: Facts) -> str:
    length = facts.length
    return (
        f"{length.steps} steps; an epoch has {length.steps_per_epoch} of them "
        f"({length.batches_per_epoch} batches), so {length.steps / length.steps_per_epoch:.4g} epochs"
    )


def _batch(facts: Facts) -> str:
    batch = facts.batch
    a_step = " or ".join(str(size * batch.accumulation * batch.processes) for size in batch.sizes)
    a_batch = " or ".join(map(str, batch.sizes))
    on = count(batch.processes, "process", "es")
    what = "latents" if facts.prompts else "images"
    return f"{a_step} {what} a step: {a_batch} × {batch.accumulation} accumulated × {on}"


def rates(facts: Rates) -> str:
    """The rate of each group, the schedule and the optimizer."""
    names = [item.group for item in facts.groups]
    given = [item.rate for item in facts.groups if item.rate is not None]
    shown = ", ".join(f"{item.group} {item.rate:g}" for item in facts.groups if item.rate is not None)
    if len(given) < len(names):
        shown = f"{', '.join(names)} at the optimizer's own rate"
    elif len(given) > _MOST_RATES:
        shown = f"{len(given)} groups from {min(given):.3g} ({names[given.index(min(given))]}) to {max(given):.3g}"
    schedule = "the optimizer's own schedule"
    if facts.schedule is not None:
        schedule = facts.schedule + (f", {count(facts.warmup, 'step')} of warm-up" if facts.warmup else "")
    return f"{shown}; {schedule}; {facts.optimizer}"


def decay(facts: Decay) -> str:
    """The weight decay as configured, and its curve to the end of the run."""
    if facts.curve is None:
        return f"{facts.base:g}"
    text = _curve(f"{facts.base:g}", facts.curve)
    if facts.curve.by_gradient:
        text += " at a steady speed, and its speed follows the gradient norm"
    if facts.curve.with_rate:
        text += "; the weights shrink by the lower of this curve and the rate's"
    return text


def _curve(base: str, curve: DecayCurve) -> str:
    if curve.schedule == "adaptive":
        return (
            f"{base} until the loss is flat, at step {curve.held} or later; then times {curve.decay_factor:g} in "
            f"every {curve.transition_steps} steps"
        )
    if not curve.changes:
        return f"{base}, {curve.schedule}: it does not change within this run"
    end = f"{curve.at_end:.3g} at the last step"
    if curve.schedule == "multi_stage":
        stages = ",".join(f"{step}:{ratio:g}" for step, ratio in curve.stages)
        return f"{base} times {stages}{' in straight lines' * curve.interpolate}; {end}"
    return f"{base} until step {curve.held}, then {curve.schedule}; {end}"
