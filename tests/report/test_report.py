"""The report of a run: complete, safe to open, and made anew from what a run leaves behind."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
from contextlib import closing
from datetime import datetime
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from library.config.parser import parse
from library.errors import UserError
from library.record.loss_history import LossHistory
from library.record.metrics import MetricsFile, lines, session_of_report
from library.record.validation_history import History, Validation
from library.report import charts, figures, loss_plot, page
from library.report.__main__ import main as report
from library.report.images import data_url
from library.report.read import MOST_POINTS, Curve, block_of, find_metrics, read_story
from library.run.about import header as run_header
from tests.conftest import PATIENCE

EVIL = "<img src=x onerror=\"console.error('caption ran')\"></script><script>console.error('caption ran')</script>&amp;"
NAME = "fox & <i>"


class Page(HTMLParser):
    """What is in a page: its text, its tags with their attributes."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self._inside: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag in ("script", "style"):
            self._inside.append(tag)

    def handle_endtag(self, tag):
        if self._inside and self._inside[-1] == tag:
            self._inside.pop()

    def handle_data(self, data):
        if not self._inside:
            self.texts.append(data.strip())

    @property
    def text(self) -> str:
        return " ".join(text for text in self.texts if text)


@pytest.fixture
def finished(train, tmp_path, image_folder) -> Path:
    """A run of four steps with samples and a caption that wants to do harm."""
    next((image_folder / "2_style").glob("*.txt")).write_text(EVIL, encoding="utf-8")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(f"emoji of cat {EVIL} --w 64 --h 64 --s 2\n", encoding="utf-8")
    samples = ("--sample_prompts", str(prompts), "--sample_every_n_steps", "2", "--save_every_n_steps", "2")
    assert train("--report", "--output_name", NAME, "--monitor_every_n_steps", "1", *samples) == 0
    return tmp_path / "out" / f"{NAME}-report.html"


def test_what_stands_in_it(finished, tmp_path):
    html = finished.read_text(encoding="utf-8")
    found = Page(html)
    for title in ("Loss", "Loss by timestep", "Learning rate", "Weight decay", "Gradient norm", "Size of the update"):
        assert ("h3", {}) in found.tags
        assert title in found.texts
    assert f"{NAME}: training report" in found.texts
    assert "Training report: all 4 steps are done." in found.texts
    assert "No warning sign was seen." in found.texts
    glance = [
        ("network", "networks.lora, dim 4, alpha 2"),
        ("images", "6"),
        ("rates", "text_encoder 0.001, unet 0.001"),
    ]
    for label, text in glance:
        assert f"{label} {text}" in found.text
    assert "decay 0.01" in found.text
    assert found.text.count(EVIL) == 2  # the caption of an example, the heading of the samples
    assert "64 × 64" in found.texts  # the bucket
    assert {"learning_rate", "0.001", "2e-06", "network_dim"} <= set(found.texts)
    pictures = [attributes["src"] for tag, attributes in found.tags if tag == "img"]
    assert len(pictures) == 6 + 2  # examples, samples
    assert all(source.startswith("data:image/webp;base64,") for source in pictures)
    for path in tmp_path.glob("out/*.safetensors"):
        assert path.name in found.texts
        assert hashlib.sha256(path.read_bytes()).hexdigest() in found.texts
    assert len(html) < 2_500_000
    run, *_, last = lines(tmp_path / "out" / f"{NAME}-metrics.jsonl")
    assert len(json.dumps(run)) < 40_000
    assert last["end"]["memory"] or os.name == "nt"
    # nothing comes from elsewhere
    sources = [attributes.get(key) for _, attributes in found.tags for key in ("src", "href", "srcset", "action")]
    assert all(source is None or source.startswith(("data:", "#")) for source in sources)
    policy = next(attributes["content"] for tag, attributes in found.tags if "http-equiv" in attributes)
    assert policy.startswith("default-src 'none'; img-src data:")


# Behind the page's own scripts: hide the first curve, zoom, show all again; then say what came of it.
PROBE = """<script>
const canvases = (node) => [...node.querySelectorAll("*")].reduce(
  (sum, child) => sum + (child.tagName === "CANVAS") + (child.shadowRoot ? canvases(child.shadowRoot) : 0), 0);
const seen = () => { const steps = Bokeh.documents[0].get_model_by_name("steps"); return [steps.start, steps.end]; };
const wait = setInterval(() => {
  if (!window.Bokeh || !Bokeh.documents.length || !Bokeh.documents[0].is_idle) return;
  clearInterval(wait);
  const found = {before: seen(), charts: document.querySelectorAll(".chart").length};
  found.drawn = [...document.querySelectorAll(".chart")].filter((chart) => canvases(chart) > 0).length;
  document.querySelector(".keys button").click();
  found.hidden = !Bokeh.documents[0].get_model_by_name("0-0").visible;
  Bokeh.documents[0].get_model_by_name("steps").setv({start: 1, end: 2});
  found.zoomed = seen();
  document.querySelector("button.all").click();
  found.after = seen();
  found.width = [document.documentElement.scrollWidth, window.innerWidth];
  const told = document.createElement("pre");
  told.id = "told";
  told.textContent = JSON.stringify(found);
  document.body.append(told);
}, 50);
</script></body>"""


def browser() -> str:
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        pytest.skip("there is no Chromium here (Debian: apt-get install chromium)")
    return found


@pytest.mark.slow
def test_a_browser_without_network_opens_it_without_an_error(finished, tmp_path):
    program, page = browser(), tmp_path / "probed.html"
    page.write_text(finished.read_text(encoding="utf-8").replace("</body>", PROBE), encoding="utf-8")
    for width in (1200, 500):
        done = subprocess.run(
            [
                *(program, "--headless=new", "--no-sandbox", "--disable-gpu", "--host-resolver-rules=MAP * ~NOTFOUND"),
                *("--enable-logging=stderr", "--virtual-time-budget=10000", f"--window-size={width},3000"),
                *(f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", page.as_uri()),
            ],
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
        said = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
        assert said, done.stderr
        assert all("[bokeh" in line and "INFO" in line for line in said), said
        told = re.search(r'<pre id="told">(.*?)</pre>', done.stdout)
        assert told, done.stdout[-3000:]
        found = json.loads(told[1])
        assert found["charts"] == found["drawn"] == 7
        assert found["before"] == found["after"] == [0, 4]
        assert found["zoomed"] == [1, 2]
        assert found["hidden"]
        assert found["width"][0] <= found["width"][1]  # nothing sticks out to the side


@pytest.mark.slow
def test_it_is_made_anew_from_what_is_there(finished, tmp_path, capsys):
    before = finished.read_text(encoding="utf-8")
    finished.unlink()
    assert report([str(finished.parent)]) == 0
    after = finished.read_text(encoding="utf-8")
    assert Page(after).texts == Page(before).texts
    # of a run that was killed, whose images and files are gone
    as_killed(finished.parent / f"{NAME}-run.json")
    metrics = finished.parent / f"{NAME}-metrics.jsonl"
    text = metrics.read_bytes()
    metrics.write_bytes(text[: text.index(b'{"step":4,')] + b'{"step":4,"lo')
    shutil.rmtree(tmp_path / "data")
    for path in finished.parent.glob("*.safetensors"):
        path.unlink()
    assert report([str(metrics)]) == 0
    found = Page(finished.read_text(encoding="utf-8"))
    state = "it ended without a message (killed, or the machine went down), last heartbeat 2026-01-02"
    assert f"Training report: 3 of 4 steps are done: {state}" in found.text
    assert found.texts.count("file no longer exists") == 6


def as_killed(path: Path) -> None:
    """Make a run's record one that a process left behind which was killed."""
    table = json.loads(path.read_text(encoding="utf-8"))
    beat = datetime(2026, 1, 2, 3, 4).timestamp()
    table["sessions"][-1] |= {"status": "running", "ended": None, "heartbeat": beat, "steps_done": 3}
    path.write_text(json.dumps(table), encoding="utf-8")


@pytest.mark.slow
def test_a_run_of_a_version_without_records(finished, tmp_path):
    """Its metrics are as they are now: what it is stands in their first line, as sentences. The share of trained
    parameters and the data check, which are younger, are not there."""
    texts = Page(finished.read_text(encoding="utf-8")).texts
    first = texts.index("data check")
    del texts[first : texts.index(next(text for text in texts[first:] if "of the images, with their captions" in text))]
    before = [text.partition(": 0.417 % of")[0] for text in texts]
    (finished.parent / f"{NAME}-run.json").unlink()
    assert report([str(finished.parent)]) == 0
    assert Page(finished.read_text(encoding="utf-8")).texts == before
    metrics = finished.parent / f"{NAME}-metrics.jsonl"
    text = metrics.read_bytes()
    metrics.write_bytes(text[: text.index(b'{"step":4,')])
    assert report([str(metrics)]) == 0
    found = Page(finished.read_text(encoding="utf-8"))
    assert "Training report: 3 of 4 steps are done: it is still running, or was killed." in found.texts


@pytest.mark.slow
def test_a_report_is_made_of_the_record_and_not_of_sentences(finished, tmp_path):
    """A name with a bracket was cut off there."""
    path = finished.parent / f"{NAME}-run.json"
    table = json.loads(path.read_text(encoding="utf-8"))
    table["facts"]["model"]["path"] = "models/fox (final: v2)"
    path.write_text(json.dumps(table), encoding="utf-8")
    assert report([str(finished.parent)]) == 0
    found = Page(finished.read_text(encoding="utf-8"))
    assert re.search(
        r"base model models/fox \(final: v2\) network networks\.lora, dim 4, alpha 2: [^:]* the whole model's images 6",
        found.text,
    )
    assert "model models/fox (final: v2) (sd_v1, epsilon); fp32 on cpu" in found.text
    table["id"] = 5  # of another run
    path.write_text(json.dumps(table), encoding="utf-8")
    assert report([str(finished.parent)]) == 0
    assert "(final: v2)" not in Page(finished.read_text(encoding="utf-8")).text


@pytest.mark.slow
def test_a_run_that_goes_on_and_one_that_failed(train, tmp_path, monkeypatch):
    from library.training import loop

    seen, step = [], loop.optimizer_step

    def failing(run: Any, item: Any) -> float:
        if item.step == 3:
            assert report([str(tmp_path / "out")]) == 0
            seen.append(Page((tmp_path / "out" / "test-report.html").read_text(encoding="utf-8")).text)
            raise UserError("no more memory")
        return step(run, item)

    monkeypatch.setattr(loop, "optimizer_step", failing)
    assert train("--report") == 2
    assert "2 of 4 steps are done: it is still running." in seen[0]
    text = Page((tmp_path / "out" / "test-report.html").read_text(encoding="utf-8")).text
    assert "2 of 4 steps are done: it failed: no more memory." in text


@pytest.mark.slow
def test_a_run_that_was_stopped_has_one_and_goes_on(train, tmp_path, monkeypatch):
    from tests.training.test_resume import stop_after

    words = ("--report", "--max_train_steps", "6")
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        assert train(*words) == 130
    path = tmp_path / "out" / "test-report.html"
    assert "3 of 6 steps are done: stopped by SIGINT" in Page(path.read_text(encoding="utf-8")).text
    assert train(*words, "--resume", "latest") == 0  # its own report may be replaced
    text = Page(path.read_text(encoding="utf-8")).text
    assert "all 6 steps are done" in text
    for steps, end in (("steps 0 to 3", "stopped (SIGINT)"), ("steps 3 to 6", "finished")):
        assert re.search(rf"a session [-\d: ]+ to [-\d: ]+ on \S+, {steps}: {re.escape(end)}", text)


def write_metrics(path: Path, run: dict[str, Any], *lines: tuple[int, dict[str, Any]]) -> None:
    with closing(MetricsFile(path, run, done=0)) as file:
        for step, values in lines:
            file.write(step, values)


def test_somebody_elses_file_is_not_replaced(train, tmp_path, capsys):
    path = tmp_path / "out" / "test-report.html"
    path.parent.mkdir()
    path.write_text("<p>mine")
    assert train("--report") == 2
    assert "test-report.html" in capsys.readouterr().err
    write_metrics(tmp_path / "out" / "test-metrics.jsonl", {"session_id": 1}, (1, {"loss": 1.0}))
    assert report([str(tmp_path / "out")]) == 2
    assert "is no report of a run" in capsys.readouterr().err
    assert path.read_text() == "<p>mine"


def test_warnings_stand_in_it_with_their_advice(tmp_path):
    end = {"stopped_by": "", "conclusion": "validation was lowest at step 1", "memory": {"of the process": 2**30}}
    write_metrics(
        tmp_path / "fox-metrics.jsonl",
        {"session_id": 5, "name": "fox", "total_steps": 3},
        (1, {"loss": None, "rates": {"unet</script>": 1e-4}, "gradient_norm": 1.0}),
        (2, {"warning": {"sign": "divergence", "text": f"the loss is NaN, of {EVIL}"}}),
        (2, {"validation": {"loss": 0.5, "t100": 0.4}}),
        (2, {"end": {**end, "stopped_by": "SIGINT"}}),
        (2, {"loss": 0.3}),
        (2, {"end": end}),
    )
    found = Page(page.write(tmp_path / "fox-metrics.jsonl").read_text(encoding="utf-8"))
    assert "Step 2, divergence." in found.texts
    assert f"The loss is NaN, of {EVIL}." in found.texts
    assert "1.0 GiB" in found.texts
    assert "Validation was lowest at step 1." in found.texts
    assert "2 of 3 steps are done: it ended early, because validation no longer improved" in found.text
    assert "Validation loss by timestep" in found.texts
    assert session_of_report(tmp_path / "fox-report.html") == 5


def test_images_that_are_held_back_and_captions_that_are_missing(tmp_path):
    subset = {"source": "cats", "regularisation": False, "images": 7, "repeats": 3, "captions": 6}
    run = {"session_id": 5, "name": "fox", "total_steps": 1, "buckets": []}
    path = tmp_path / "fox-metrics.jsonl"
    write_metrics(path, {**run, "subsets": [{**subset, "held_out": 2, "captions_missing": 3}]}, (1, {}))
    texts = [text for text in Page(page.render(read_story(path))).texts if text]
    heads = ["images from", "images", "held out for validation", "repeats", "captions found", "missing"]
    start = texts.index("images from")
    assert texts[start : start + 12] == [*heads, "cats", "7", "2", "3", "6", "3"]
    path.unlink()
    write_metrics(path, {**run, "subsets": [subset]}, (1, {}))  # as earlier versions wrote it
    assert "held out for validation" not in Page(page.render(read_story(path))).texts


def test_a_list_of_sentences_has_a_line_each():
    assert page._shown(["a cat, grey", "a dog"]) == "a cat, grey\na dog"
    assert page._shown(["conv_dim=4", "conv_alpha=1"]) == "conv_dim=4, conv_alpha=1"


def test_what_cannot_be_reported(tmp_path, capsys):
    (tmp_path / "x-metrics.jsonl").write_text("{}\n")
    for where, said in (
        (tmp_path / "x-metrics.jsonl", "its first line does not describe a run"),
        (tmp_path / "nowhere", "no such file or folder"),
        (tmp_path / "fox.safetensors", "give a run's folder"),
    ):
        if where.suffix == ".safetensors":
            where.write_bytes(b"")
        assert report([str(where)]) == 2
        assert said in capsys.readouterr().err
    with pytest.raises(UserError, match=r"there is no …-metrics\.jsonl in it"):
        find_metrics(next(path for path in (tmp_path, tmp_path.parent) if not list(path.glob("*-metrics.jsonl"))))


def test_a_report_without_monitoring_is_a_contradiction(train, tmp_path):
    with pytest.raises(UserError, match="--report needs the files of monitoring"):
        parse([*("--pretrained_model_name_or_path", "x", "--output_dir", "y"), "--no-monitoring", "--report"])


def test_a_long_run_has_curves_of_a_few_points():
    curve = Curve()
    for step in range(1, 20_001):
        curve.add(step, float(step % 2))
    assert MOST_POINTS / 2 <= len(curve.steps) < MOST_POINTS
    assert set(curve.values) == {0.5}
    assert curve.steps[:2] == [8.5, 24.5]
    curve.add(20_001, None)


def test_a_chart_of_many_groups_shows_some(tmp_path):
    many = {f"unet_block{n:02d}": 1e-4 * 0.9**n for n in range(26)}
    write_metrics(
        tmp_path / "fox-metrics.jsonl", {"session_id": 5, "total_steps": 3}, (1, {"loss": 1.0, "rates": many})
    )
    story = read_story(tmp_path / "fox-metrics.jsonl")
    (rates,) = [chart for chart in charts.charts(story) if chart.title == "Learning rate"]
    labels = [line.label for line in rates.lines]
    assert len(labels) == 8
    assert rates.note.endswith("8 of the 26 groups, from the highest to the lowest.")
    assert (labels[0], labels[-1]) == ("unet_block00", "unet_block25")


def test_a_weight_decay_of_nothing_has_no_chart(tmp_path):
    for decay, shown in ((0.0, False), (0.01, True)):
        path = tmp_path / f"{decay}-metrics.jsonl"
        values = {"loss": 1.0, "weight_decay": {"all": decay}}
        write_metrics(path, {"session_id": 5, "total_steps": 3}, (1, values))
        titles = [chart.title for chart in charts.charts(read_story(path))]
        assert ("Weight decay" in titles) is shown


@pytest.mark.parametrize(
    ("values", "ticks"),
    [
        ([], []),
        ([0.006, 0.04], [0.007, 0.01, 0.015, 0.02, 0.03]),
        ([0.012, 0.9], [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1]),
        ([1e-6, 0.01], [1e-6, 1e-5, 1e-4, 1e-3, 0.01]),
    ],
)
def test_a_logarithmic_axis_can_be_read(values, ticks):
    found = figures.log_ticks(values)
    assert set(ticks) <= set(found)
    assert len(found) <= 18
    if values:
        assert sum(min(values) <= tick <= max(values) for tick in found) >= 2


@pytest.mark.parametrize(
    ("adapter", "block"),
    [
        ("lora_unet_down_blocks_0_attentions_1_proj_in", "down 0"),
        ("lora_unet_mid_block_attentions_0_proj_in", "middle"),
        ("lora_unet_output_blocks_3_1_proj_in", "output 3"),
        ("lora_unet_joint_blocks_3_x_block_attn_to_q", "joint 3"),
        ("lora_unet_blocks_3_self_attn_q_proj", "block 3"),
        ("lora_unet_layers_3_attention_to_q", "block 3"),
        ("lora_te_text_model_encoder_layers_0_mlp_fc1", "text encoder"),
        ("lora_te2_text_model_encoder_layers_0_mlp_fc1", "text encoder 2"),
        ("something_else", "other"),
    ],
)
def test_blocks(adapter, block):
    assert block_of(adapter) == block


def test_secrets_are_not_written():
    options = parse([*("--pretrained_model_name_or_path", "x", "--output_dir", "y"), "--wandb_api_key", "topsecret"])
    rows = run_header._options(options, seed=7)
    assert "topsecret" not in str(rows)
    assert ["wandb_api_key", "(given)", None] in [row[1:] for row in rows]
    assert ["seed", 7, None] in [row[1:] for row in rows]


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "L", "I;16"])
def test_thumbnails_of_any_picture(tmp_path, mode):
    Image.new(mode, (400, 100)).save(tmp_path / "a.png")
    assert data_url(tmp_path / "a.png", side=64).startswith("data:image/webp;base64,")
    assert data_url(tmp_path / "none.png", side=64) is None
    (tmp_path / "b.png").write_bytes(b"no picture")
    assert data_url(tmp_path / "b.png", side=64) is None


def test_a_thumbnail_is_read_as_images_are_in_training(tmp_path, monkeypatch):
    """16-bit greys are scaled, and no other program is started for what is called a PNG."""
    Image.fromarray(np.full((8, 8), 100 * 257, np.uint16)).save(tmp_path / "a.png")
    packed = base64.b64decode(data_url(tmp_path / "a.png", side=64).partition(",")[2])
    assert abs(np.asarray(Image.open(io.BytesIO(packed)), int) - 100).max() < 4
    started = []
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *given, **named: started.append(given))
    (tmp_path / "b.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n%%EOF\n")
    assert data_url(tmp_path / "b.png", side=64) is None
    assert not started


def test_what_was_measured_beside_training(tmp_path):
    """The best step is marked; sets, gap and forgetting have charts, the last measurement of forgetting a table."""
    forgotten = {"loss": 0.12, "base": 0.1, "rate": 0.2, "t100": 0.05, "t900": None}
    write_metrics(
        tmp_path / "fox-metrics.jsonl",
        {"session_id": 5, "name": "fox", "total_steps": 3},
        (0, {"validation": {"loss": 0.3, "t100": 0.3}}),
        *((step, {"loss": 0.5}) for step in (1, 2, 3)),
        (1, {"validation": {"loss": 0.5}}),
        (2, {"validation": {"loss": 0.4}}),
        (2, {"validation_sets": {"more <i>": {"loss": 0.6}}}),
        (2, {"gap": {"gap": 0.25, "trained": 0.32}}),
        (1, {"forgetting": {"noto": {**forgotten, "rate": 0.01}}}),
        (2, {"forgetting": {"noto": forgotten, "fine": {**forgotten, "rate": -0.1}}}),
        (3, {"validation": {"loss": None}}),
    )
    story = read_story(tmp_path / "fox-metrics.jsonl")
    assert story.best == (2, 0.4)
    drawn = {chart.title: chart for chart in charts.charts(story)}
    assert drawn["Loss"].marks.steps == (2,)
    assert "Dashed: the best validation, 0.4000 after step 2." in drawn["Loss"].note
    assert drawn["Forgetting"].marks.values == (10, 30)
    values = {line.label: line.curve.values for line in drawn["Forgetting"].lines}
    assert values == {"noto": [1.0, 20.0], "fine": [-10.0]}
    assert [line.label for line in drawn["Validation loss by set"].lines] == ["validation", "more <i>"]
    assert drawn["Gap between validation and training"].lines[0].curve.values == [25.0]
    found = Page(page.render(story))
    assert "Forgetting after step 2, in % of the base model's loss" in found.texts
    start = found.texts.index("noto", found.texts.index("images of"))
    row = [text for text in found.texts[start:] if text][:4]
    assert row == ["noto", "+20.0", "+5.0", "not a number"]
    bad = [attributes for tag, attributes in found.tags if tag == "td" and "bad" in (attributes.get("class") or "")]
    assert len(bad) == 1


def test_the_loss_picture_marks_the_best_validation(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    figures_drawn = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **b: figures_drawn.append(self) or save(self, *a, **b))
    losses = LossHistory()
    for _ in range(4):
        losses.add(0.5)
    history = History(validations=[Validation(step, loss, {}) for step, loss in ((0, 0.4), (2, 0.3), (4, 0.35))])
    loss_plot.plot(tmp_path / "a.png", losses, steps_per_epoch=10, title="fox", validation=history)
    (axes,) = figures_drawn[0].axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    assert lines["validation"] == [[0, 0.4], [2, 0.3], [4, 0.35]]
    assert lines["best validation: 0.3000, step 2"] == [[2, 0], [2, 1]]
    loss_plot.plot(tmp_path / "b.png", losses, steps_per_epoch=10, title="fox")
    assert len(figures_drawn[1].axes[0].lines) == 2
