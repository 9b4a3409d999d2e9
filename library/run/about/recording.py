"""Begins the record of a run, with the facts that are known before any model is loaded."""

from __future__ import annotations

from library.config.options import SECRETS, Options, option_groups
from library.record.run_file import HIDDEN, Given, Record, RunFile, Settings, new_session, run_path
from library.record.saves import SavePlan
from library.run.plan import Plan


def begin(record: RunFile, plan: Plan, saves: SavePlan) -> None:
    """Write `NAME-run.json`, unless the run writes nothing or --no-monitoring is given. For the main process only."""
    if not (plan.options.trains and plan.options.monitoring.monitoring):
        return
    resume = plan.resume
    session = new_session(
        started=plan.started_at if resume is None else None,
        first_step=0 if resume is None else resume.facts.step,
        command=list(plan.options.command),
    )
    about = Record(
        id=plan.session_id,
        name=saves.last_file.stem,
        steps_total=saves.total_steps,
        sessions=[session],
        settings=settings(plan.options, seed=plan.seed),
    )
    values = _values(plan.options)
    secrets = [str(values[name]) for name in SECRETS if values[name]]
    record.begin(run_path(saves.last_file), about, secrets=secrets)


def settings(options: Options, *, seed: int) -> Settings:
    """All options, with the seed in use and without secrets."""
    values = in_effect(options, seed=seed)
    return Settings(
        given={name: Given(value=values[name], place=place) for name, place in options.given.items()},
        in_effect=values,
    )


def in_effect(options: Options, *, seed: int) -> dict[str, object]:
    """The value of every option, with the seed in use and without secrets."""
    values = _values(options)
    hidden = {name: HIDDEN for name in SECRETS if values[name] is not None}
    return {**values, "seed": seed, **hidden}


def _values(options: Options) -> dict[str, object]:
    return {name: value for group in option_groups() for name, value in vars(getattr(options, group)).items()}
