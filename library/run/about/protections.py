"""What keeps a run from forgetting, as facts."""

from __future__ import annotations

from pathlib import Path

from library.record import facts
from library.run.plan import Plan


def protections_of(plan: Plan) -> facts.Protections | None:
    """The protections of a run; None where there are none. Replay is a folder with a share, and progressive LoRAs are
    merged into the base: both are facts of their own."""
    wanted, previous = plan.options.forgetting, plan.options.network.network_weights
    preserved, consolidated = _preserved(plan), _consolidated(plan)
    distilled = None
    if wanted.distillation_weight:
        distilled = facts.Distilled(weight=wanted.distillation_weight, schedule=wanted.distillation_schedule)
    if not preserved and distilled is None and consolidated is None:
        return None
    asked = distilled is not None or any(one.prior == "previous" for one in preserved)
    return facts.Protections(
        preserved=preserved,
        distilled=distilled,
        consolidated=consolidated,
        previous=Path(previous).name if asked and previous else "",
    )


def _preserved(plan: Plan) -> tuple[facts.Preserved, ...]:
    """Each image once, whatever its resolutions and repeats."""
    paths: dict[tuple[str, str, float], set[Path]] = {}
    for sample in plan.prepared.samples:
        if (subset := sample.subset).prior:
            paths.setdefault((subset.prior, subset.prior_region, subset.prior_weight), set()).add(sample.path)
    return tuple(
        facts.Preserved(images=len(own), prior=prior, region=region, weight=weight)
        for (prior, region, weight), own in paths.items()
    )


def _consolidated(plan: Plan) -> facts.Consolidated | None:
    earlier, wanted = [one for one in plan.sets if one.use == "ewc"], plan.options.forgetting
    if not earlier:
        return None
    found = sum(one.prepared.batches_per_epoch for one in earlier)  # a batch is one image
    return facts.Consolidated(
        images=min(found, wanted.ewc_images),
        sources=tuple(one.name for one in earlier),
        strength=wanted.ewc_lambda,
    )
