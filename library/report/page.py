"""Puts a run's page together."""

from __future__ import annotations

import json
import logging
import re
from datetime import datetime
from pathlib import Path
from typing import Any, TypeAlias

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from library.errors import UserError
from library.files.atomic import replacing
from library.record import run_file, summary
from library.record.forgetting import WARNED
from library.record.metrics import Line, report_path, session_of_report
from library.record.run_file import Session
from library.report import charts, images
from library.report.read import Story, read_story, samples, saved_files
from library.sampling.files import Sample, some
from library.units import human_bytes, human_time

logger = logging.getLogger(__name__)

THUMBNAIL, SAMPLE, PICTURE = 160, 256, 1200  # pixels, the longer side

Row: TypeAlias = dict[str, Any]
"""What the page's template shows in one row, by the names that it uses."""


def write(metrics: Path) -> Path:
    """`NAME-report.html` beside `NAME-metrics.jsonl`. UserError if another file of that name is there."""
    path = report_path(metrics)
    if path.exists() and session_of_report(path) is None:
        raise UserError(f"{path} exists and is no report of a run: move it away")
    html = render(read_story(metrics))
    with replacing(path) as beside:
        beside.write_text(html, encoding="utf-8", errors="backslashreplace")
    logger.info("wrote %s", path)
    return path


def render(story: Story) -> str:
    """The whole page. Everything from users is escaped by the template."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    drawn, script = charts.draw(story)
    run = story.run
    return environment.get_template("page.html").render(
        story=story,
        run=run,
        state=_state(story),
        glance=_glance(story),
        facts=_facts(story),
        held_back=any(subset.get("held_out") for subset in run.get("subsets", ())),
        flaws=story.facts.flaws if story.facts is not None else (),
        changed=[row for row in _options(run) if row["changed"]],
        options=_groups(_options(run)),
        examples=[
            {**example, "image": images.data_url(Path(example["path"]), side=THUMBNAIL)}
            for example in run.get("examples", ())
        ],
        pictures=_pictures(story),
        samples=_samples(samples(story), run.get("prompts", [])),
        files=saved_files(story),
        forgetting=_forgetting(story),
        charts=drawn,
        bokeh=Markup(charts.library()),
        script=Markup(script),
        human_bytes=human_bytes,
    )


def _state(story: Story) -> str:
    """Whether all steps of the run are done, and if not, why."""
    total = story.run.get("total_steps", 0)
    if story.last_step >= total:
        return f"all {total} steps are done"
    return f"{story.last_step} of {total} steps are done: {_why(story)}"


def _why(story: Story) -> str:
    """The reason why a run has not reached its last step."""
    early = "it ended early, because validation no longer improved"
    if story.record is None:
        if not story.end:
            return "it is still running, or was killed"
        return f"stopped by {story.end['stopped_by']}" if story.end["stopped_by"] else early
    session = story.record.session
    reasons = {
        run_file.RUNNING: "it is still running",
        run_file.FINISHED: early,
        run_file.STOPPED: f"stopped by {session.reason}",
        run_file.FAILED: f"it failed: {session.reason}",
        run_file.LOST: "it ended without a message (killed, or the machine went down), "
        f"last heartbeat {_moment(session.heartbeat)}",
    }
    return reasons[run_file.standing(story.record)]


def _glance(story: Story) -> list[tuple[str, str]]:
    """The run in a few words."""
    facts = story.facts
    if facts is None:
        model, network, rates = _glance_of_words(story)
    else:
        model, network, rates = facts.model.path, summary.network(facts.network), summary.rates(facts.rates)
        if share := summary.share(facts.network):
            network = f"{network}: {share}"
    subsets = story.run.get("subsets", ())
    shown = [
        ("base model", model),
        ("network", network),
        ("images", f"{sum(subset['images'] for subset in subsets):,}" if subsets else ""),
        ("training took", human_time(story.seconds) if story.seconds else ""),
        ("rates", rates),
    ]
    return [(label, text) for label, text in shown if text]


def _glance_of_words(story: Story) -> tuple[str, str, str]:
    """Base model, network and rates of a run without a record: its metrics have them only as sentences."""
    said = {label: text for label, text in story.summary if label}
    return said.get("model", "").partition(" (")[0], said.get("network", "").partition(":")[0], said.get("rates", "")


def _facts(story: Story) -> list[tuple[str, str]]:
    """When, how long, how much memory, on what."""
    facts = []
    if started := story.run.get("started_at"):
        facts.append(("begun", _moment(started)))
    if story.record is not None and len(story.record.sessions) > 1:
        facts += [("a session", _session(session)) for session in story.record.sessions]
    if story.seconds:
        facts.append(("training took", human_time(story.seconds)))
        facts.append(
            ("a step took", f"{story.seconds / max(story.last_step, 1):.2f} s on average, including saving and samples")
        )
    for name, value in story.end.get("memory", {}).items():
        facts.append((f"most memory, {name}", human_bytes(value)))
    return facts + [(name, value) for name, value in story.run.get("machine", ())]


def _moment(time: float) -> str:
    return datetime.fromtimestamp(time).strftime("%Y-%m-%d %H:%M")


def _session(session: Session) -> str:
    """One process of a run that was resumed."""
    end = f" ({session.reason})" if session.reason else ""
    until = _moment(session.heartbeat if session.ended is None else session.ended)
    steps = f"steps {session.first_step} to {session.steps_done}"
    return f"{_moment(session.started)} to {until} on {session.host}, {steps}: {session.status}{end}"


def _forgetting(story: Story) -> Row | None:
    """The last measurement of forgetting: a row a folder, the rate at all noise levels first, then by level."""
    if story.forgetting is None:
        return None
    step, folders = story.forgetting
    levels = [name for name in next(iter(folders.values())) if re.fullmatch(r"t\d+", name)]
    rows = []
    for name, own in folders.items():
        rates = [own[key] for key in ("rate", *levels)]
        shown = ["not a number" if rate is None else f"{100 * rate:+.1f}" for rate in rates]
        rows.append({"name": name, "rates": shown, "level": rates[0] is None or rates[0] > WARNED})
    return {"step": step, "levels": levels, "rows": rows}


def _options(run: Line) -> list[Row]:
    return [
        {"group": group, "name": name, "value": _shown(value), "default": _shown(default), "changed": value != default}
        for group, name, value, default in run.get("options", ())
    ]


def _groups(options: list[Row]) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = {}
    for option in options:
        groups.setdefault(option["group"], []).append(option)
    return groups


def _shown(value: object) -> str:
    if value is None or value == []:
        return ""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, list):
        items = [str(item) for item in value]
        return ("\n" if any("," in item for item in items) else ", ").join(items)
    return value if isinstance(value, str) else json.dumps(value)


def _pictures(story: Story) -> list[tuple[str, str]]:
    """The pictures that the run rendered at its end."""
    path = story.path.with_name(f"{story.name}-compare.png")
    url = images.data_url(path, side=PICTURE) if path.is_file() else None
    return [("Without and with the LoRA", url)] if url else []


def _samples(found: list[Sample], prompts: list[str]) -> list[Row]:
    """One row a prompt: the pictures at some moments, the first and the last among them."""
    rows: dict[int, list[Sample]] = {}
    for sample in found:
        rows.setdefault(sample.prompt, []).append(sample)
    shown = []
    for number, row in rows.items():
        chosen = some(row)
        pictures = [(sample.moment, images.data_url(sample.path, side=SAMPLE)) for sample in chosen]
        shown.append(
            {
                "prompt": prompts[number] if number < len(prompts) else f"prompt {number + 1}",
                "pictures": [(moment, url) for moment, url in pictures if url],
                "left_out": len(row) - len(chosen),
            }
        )
    return shown
