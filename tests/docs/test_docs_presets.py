"""What docs/presets.md tells a user to type works, and its tables say what the presets say."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import toml
from PIL import Image

from benchmarks import rate_finder
from docs import pictures
from library.config.presets import presets
from library.guidance import rules
from library.optimizers import auto_weight_decay
from tests.conftest import ROOT

PAGE = (ROOT / "docs" / "presets.md").read_text(encoding="utf-8")
ALL = {name: preset.path for name, preset in presets().items()}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.DOTALL)


COMMANDS = [shlex.split(line)[1:] for block in blocks("sh") for line in block.replace("\\\n", " ").splitlines()]


@pytest.mark.parametrize("command", [words for words in COMMANDS if words[0] == "train_network.py"], ids=" ".join)
def test_every_command_trains(command: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from train_network import main

    monkeypatch.chdir(ROOT)
    words = [*command[1:], "--max_train_epochs", "0", "--max_train_steps", "1", "--output_dir", str(tmp_path)]
    words += ["--no-enable_bucket", "--resolution", "64", "--compare_prompts="]
    if "--find_lr" in command:
        words += ["--find_lr_start", "1e-4", "--find_lr_steps", "20"]
    assert main(words) == 0
    written = {"--find_lr": "*-find-lr.png", "--recommend": "*-recommended.toml"}
    assert list(tmp_path.glob(next((written[word] for word in command if word in written), "*.safetensors")))


def test_the_scripts_are_those_that_are_tested() -> None:
    named = {words[0] for words in COMMANDS} - {"train_network.py"}
    assert named == {path.relative_to(ROOT).as_posix() for path in (ROOT / "examples").glob("*.py")}


def test_the_program_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (program,) = blocks("python")
    exec(program, {})
    assert capsys.readouterr().out == "5e-05 1500\n"


def test_the_pictures_are_there() -> None:
    shown = re.findall(r"\(images/(.*?)\)", PAGE)
    assert shown == ["weight-decay.png", "quickstart-find-lr.png"]
    assert all((pictures.IMAGES / name).is_file() for name in shown)


def test_the_curves_are_drawn_as_they_are(tmp_path: Path) -> None:
    pictures.weight_decay(tmp_path / "new.png")
    new, old = (
        np.asarray(Image.open(file).convert("RGB"), np.float32)
        for file in (tmp_path / "new.png", pictures.IMAGES / "weight-decay.png")
    )
    assert new.shape == old.shape
    assert np.abs(new - old).mean() < 2, "python -m docs.pictures makes it anew"


def test_the_advice_is_what_the_program_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from train_network import main

    (command,) = [words for words in COMMANDS if "--recommend" in words]
    (shown,) = [block for block in blocks("text") if "advice" in block]
    assert main([*command[1:], "--output_dir", str(tmp_path)]) == 0
    assert shown in capsys.readouterr().out


def test_the_table_of_sizes() -> None:
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in PAGE.splitlines()]
    table = [row for row in cells if len(row) == 6 and re.fullmatch(r"[\d,]+", row[0])]
    assert len(table) == 5
    for row in table:
        images, rank, batch, together, each = (int(cell.replace(",", "")) for cell in row[:5])
        factor, least = (float(cell) for cell in row[5].split(","))
        assert rules.by_size(images) == (rank, batch)
        assert (rules.views(images), int(rules.views(images) / images)) == (together, each)
        assert auto_weight_decay.decay_factor(images, None)[0] == factor
        assert auto_weight_decay.min_ratio(images)[0] == least


def values(name: str) -> dict[str, object]:
    return {key: value for section in toml.load(ALL[name]).values() for key, value in section.items()}


def rows(section: str) -> dict[str, list[str]]:
    """The table of a section, by preset."""
    (text,) = re.findall(rf"^##+ {section}$(.*?)(?=^##|\Z)", PAGE, flags=re.MULTILINE | re.DOTALL)
    lines = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("| `")]
    return {cells[0].strip(" `"): [cell.strip() for cell in cells[1:]] for cells in lines}


def test_the_curves() -> None:
    found = rows("Curves of the weight decay")
    assert len(found) == 7
    for name, (held, factor, least, end, rate) in found.items():
        said = values(name)
        assert (int(held), float(factor)) == (said["wd_transition_steps"], said["wd_decay_factor"])
        assert float(least) == said["wd_min_ratio"]
        assert float(end) == round(float(factor) ** 2, 2)
        if "learning_rate" in said:
            assert float(rate) == said["learning_rate"]
        else:
            assert rate == "that of the layer below"


def test_the_presets_for_image_models() -> None:
    found = rows("For image models")
    assert len(found) == 20
    for name, (_, sizes, rates, optimizer, _) in found.items():
        said = values(name)
        assert sizes == f"{said['network_dim']}, {said['network_alpha']}"
        of_transformers = ("sd3", "flux", "chroma", "anima", "z_image")
        alone = "transformer only" if name.startswith(of_transformers) else "UNet only"
        implied = name == "slider"  # by its prompts
        text_rate = alone if implied or said.get("network_train_unet_only") else said["text_encoder_lr"]
        unet, _, text = rates.partition(", ")
        assert [float(unet), text if text == alone else float(text)] == [said["learning_rate"], text_rate]
        assert optimizer.startswith(str(said["optimizer_type"]))


def test_the_study_of_the_rate_finder() -> None:
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in PAGE.splitlines()]
    table = {int(row[0]): [float(cell) for cell in row[1:]] for row in cells if len(row) == 7 and row[0].isdecimal()}
    rows = {(row.seed, row.rule, row.multiple): row for row in rate_finder.read_rows(rate_finder.RESULTS)}
    assert table.keys() == {seed for seed, _, _ in rows} == {1, 2, 3}
    for seed, (fastest, loss, more, less, tenth, tenth_loss) in table.items():
        best, other = rows[seed, "steepest", 1.0], rows[seed, "tenth", 1.0]
        assert [fastest, tenth] == pytest.approx([best.rate, other.rate], rel=0.05)
        assert [loss, less, tenth_loss] == pytest.approx(
            [best.loss, rows[seed, "steepest", 0.1].loss, other.loss], abs=5e-5
        )
        assert more == pytest.approx(rows[seed, "steepest", 10.0].loss, abs=5e-4)
