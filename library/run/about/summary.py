"""Gathers the facts of a run that is ready to start from its options, data, model and network."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from library.data.captions import changing_options
from library.data.prepared import Prepared
from library.data.quality.check import check
from library.optimizers.weight_decay_choice import DecayChoice, weight_decay_of
from library.record import facts
from library.run import slider
from library.run.about.protections import protections_of
from library.run.base_weights import are_apart
from library.run.plan import Plan
from library.training.hooks.lr_schedule import LrSchedule
from library.training.hooks.validation import Validator
from library.training.hooks.weight_decay import WeightDecay
from library.training.run import Run
from networks import base_weights

NAMED = 10  # files of a flaw of the data


def facts_of(plan: Plan, run: Run, *, hashes: bool = False) -> facts.Facts:
    """The facts of a run. `hashes`: read the LoRA files of --base_weights again, for their hashes."""
    saves, prepared = run.saves, plan.prepared
    schedule, decay = run.hook(LrSchedule), run.hook(WeightDecay)
    return facts.Facts(
        model=_model(plan, run, hashes=hashes),
        network=_network(plan, run),
        images=() if plan.settings else tuple(_images(plan)),
        captions=_captions(plan, run),
        validation=None if prepared.validation is None else _validation(plan, run, prepared.validation),
        buckets=() if plan.settings else tuple(_buckets(prepared)),
        prompts=tuple(slider.in_words(plan.settings)),
        length=facts.Length(
            steps=saves.total_steps,
            steps_per_epoch=saves.steps_per_epoch,
            batches_per_epoch=prepared.batches_per_epoch,
        ),
        batch=facts.Batch(
            sizes=tuple(sorted({spec.batch_size for spec in plan.datasets})),
            accumulation=plan.options.training.gradient_accumulation_steps,
            processes=run.accelerator.num_processes,
        ),
        rates=facts.Rates(
            groups=tuple(facts.Rate(group=group["name"], rate=group["lr"]) for group in run.groups),
            schedule=None if schedule is None else schedule.choice.name,
            warmup=0 if schedule is None else schedule.choice.warmup,
            optimizer=plan.choice.name,
        ),
        decay=_decay(
            weight_decay_of(plan.choice), None if decay is None else decay.decay, total_steps=saves.total_steps
        ),
        flaws=tuple(_flaws(plan)),
        protections=protections_of(plan),
    )


def _model(plan: Plan, run: Run, *, hashes: bool) -> facts.Model:
    family, options = plan.family, plan.options
    return facts.Model(
        path=family.path,
        version=family.base_model_version,
        prediction_type=family.process.prediction_type,
        vae=family.vae_path,
        precision=options.precision.mixed_precision.replace("no", "fp32"),
        device=str(run.accelerator.device),
        frozen_format=options.precision.unet_format,
        base_weights=tuple(_base_weights(plan, hashes=hashes)),
    )


def _base_weights(plan: Plan, *, hashes: bool) -> list[facts.BaseWeight]:
    """The files of --base_weights."""
    wanted = plan.options.network
    apart = are_apart(wanted, plan.family)
    pairs = base_weights.with_multipliers(wanted.base_weights, wanted.base_weights_multiplier or ())
    if not hashes:
        return [facts.BaseWeight(file=file, multiplier=multiplier, apart=apart) for file, multiplier in pairs]
    files = base_weights.of_files(wanted.base_weights, wanted.base_weights_multiplier or ())
    return [
        facts.BaseWeight(
            file=file, multiplier=multiplier, sha256=read.sha256, model_hash=read.sshs_model_hash, apart=apart
        )
        for (file, multiplier), read in zip(pairs, files, strict=True)
    ]


def _network(plan: Plan, run: Run) -> facts.Network:
    network, wanted = run.network, plan.options.network
    parameters, layers = network.parameter_counts(), network.layer_counts()
    parts = plan.family.components
    sizes = {name: parts.size(name) for name in parts.names}
    by_section = {kind.section: sizes[name] for name, kind in plan.family.PARTS.items() if kind.section}
    return facts.Network(
        module="" if plan.options.embedding.train_embedding_only else wanted.network_module,
        dim=wanted.network_dim,
        ranks=network.ranks(),
        alpha=wanted.network_alpha,
        adapters=tuple(
            facts.Adapters(
                part=part,
                count=count,
                parameters=parameters[part],
                layers=tuple(layers.get(part, {}).items()),
                part_parameters=by_section.get(part, 0),
            )
            for part, count in network.counts().items()
        ),
        parameters=sum(parameter.numel() for parameter in run.parameters),
        model_parameters=sum(sizes.values()),
        embedding=_embedding(plan, run),
    )


def _embedding(plan: Plan, run: Run) -> facts.Embedding | None:
    embedding, wanted = run.network.embedding, plan.options.embedding
    if embedding is None:
        return None
    start = f"'{wanted.init_word}'" if wanted.init_word else ""
    return facts.Embedding(
        word=embedding.word,
        vectors=embedding.vectors,
        widths=tuple(embedding.widths().items()),
        start=start if wanted.weights is None else wanted.weights,
    )


def _images(plan: Plan) -> Iterator[facts.Images]:
    summaries = plan.prepared.summaries
    numbers = [number for number, spec in enumerate(plan.datasets) for _ in spec.subsets]
    sources = Counter(summary.subset.source for summary in summaries)
    of_all: dict[int, float] = {}
    for number, summary in zip(numbers, summaries, strict=True):
        of_all[number] = of_all.get(number, 0) + summary.draws
    for number, summary in zip(numbers, summaries, strict=True):
        source = summary.subset.source
        yield facts.Images(
            source=str(source),
            regularisation=summary.subset.is_reg,
            images=summary.images,
            repeats=summary.subset.num_repeats,
            draws=summary.draws,
            least=summary.least,
            most=summary.most,
            part=summary.draws / of_all[number],
            by_shares=summary.by_shares,
            resolution=plan.datasets[number].resolution if sources[source] > 1 else None,
            held_out=summary.held_out,
            too_small=summary.too_small,
            captions_found=summary.captions_found,
            captions_missing=summary.captions_missing,
            captions_empty=summary.captions_empty,
        )


def _flaws(plan: Plan) -> Iterator[facts.Flaw]:
    family = plan.family
    for one in check(plan.prepared.folders, count_tokens=family.count_tokens, token_limit=family.token_limit):
        for finding in one.findings:
            yield facts.Flaw(
                source=str(one.source),
                name=finding.name,
                level=finding.level.value,
                text=finding.text,
                advice=finding.advice,
                count=len(finding.items),
                files=tuple(item.path.name for item in finding.items[:NAMED]),
            )


def _captions(plan: Plan, run: Run) -> facts.Captions:
    family, texts = plan.family, run.data.captions()
    examples = []
    for spec in dict.fromkeys(summary.subset for summary in plan.prepared.summaries):
        if (text := run.data.example(spec)) is not None:
            changing = [(name, _value(getattr(spec, name))) for name in changing_options(spec)]
            examples.append(facts.Example(text=text, changing=tuple(changing)))
    return facts.Captions(
        different=len(texts),
        too_long=sum(family.count_tokens(text) > family.token_limit for text in texts),
        token_limit=family.token_limit,
        examples=tuple(examples),
    )


def _value(value: bool | float) -> str:
    """An option's value as text; empty for a flag that is on."""
    return "" if value is True else f"{value:g}"


def _validation(plan: Plan, run: Run, prepared: Prepared) -> facts.Validation:
    wanted, validator = plan.options.validation, run.hook(Validator)
    assert validator is not None, "images are held out"
    return facts.Validation(
        images=len({(sample.key, sample.caption) for sample in prepared.samples}),  # once, whatever the resolutions
        batches=min(prepared.batches_per_epoch, wanted.max_validation_steps or prepared.batches_per_epoch),
        timesteps=len(validator.timesteps),
        times=sum(bool(validator.times.due(step)) for step in range(run.saves.total_steps + 1)),
        patience=wanted.early_stopping_patience,
    )


def _buckets(prepared: Prepared) -> Iterator[facts.Bucket]:
    for group in prepared.groups:
        yield facts.Bucket(
            dataset=group.dataset + 1,
            size=group.size,
            images=len(group.members),
            draws=group.draws,
            batches=group.batches,
            by_shares=group.in_first_epoch is not None,
        )


def _decay(base: float | None, choice: DecayChoice | None, *, total_steps: int) -> facts.Decay | None:
    if not base:
        return None
    return facts.Decay(base=base, curve=None if choice is None else decay_curve(choice, base, total_steps=total_steps))


def decay_curve(choice: DecayChoice, base: float, *, total_steps: int) -> facts.DecayCurve:
    """The curve in numbers, from `base` to the end of a run of this length."""
    curve = choice.curve
    return facts.DecayCurve(
        schedule=curve.schedule,
        held=choice.held,
        changes=choice.changes(total_steps),
        at_end=base * curve.factor(total_steps),
        transition_steps=curve.transition_steps,
        decay_factor=curve.decay_factor,
        min_ratio=curve.min_ratio,
        max_progress=None if curve.max_progress == float("inf") else curve.max_progress,
        stages=tuple((start, ratio) for start, ratio in curve.stages),
        interpolate=curve.interpolate,
        by_gradient=choice.pace.by_gradient,
        with_rate=choice.pace.with_rate,
    )
