"""The command `evaluate`, on the quickstart's base."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import safe_open

from library.config.command import run
from library.evaluation.evaluate import main
from tests.conftest import BASE, BASE_STYLE_IMAGES, PATIENCE, forget_accelerator, run_training
from tests.evaluation.conftest import SEED, Trained


def evaluate(out: Path, *words: str) -> dict[tuple[str, str, str], dict[str, str]]:
    """The rows of the CSV by (LoRA, folder, noise)."""
    assert run(main, [*words, *_base(out)]) == 0
    with (out / "evaluation.csv").open(encoding="utf-8") as file:
        return {(row["lora"], row["folder"], row["noise"]): row for row in csv.DictReader(file)}


def _base(out: Path) -> list[str]:
    return [
        *("--pretrained_model_name_or_path", str(BASE), "--resolution", "64", "--batch_size", "2"),
        *("--output_dir", str(out), "--seed", str(SEED)),
    ]


def test_it_measures_what_validation_measures(trained: Trained, tmp_path: Path) -> None:
    """The same loss, images, noise and noise levels: 1e-5 is the rounding of fp32 sums in other orders."""
    rows = evaluate(tmp_path, str(trained.both), "--images", str(trained.held_out))
    lines = (trained.folder / "out" / "both-metrics.jsonl").read_text().splitlines()
    validations = {line["step"]: line["validation"] for text in lines if "validation" in (line := json.loads(text))}
    before, after = validations[0], validations[max(validations)]
    row = rows["both", "held_out", "all"]
    assert float(row["base"]) == pytest.approx(before["loss"], rel=1e-5)
    assert float(row["loss"]) == pytest.approx(after["loss"], rel=1e-5)
    assert float(row["loss"]) != pytest.approx(before["loss"], rel=1e-3)
    by_level = [float(rows["both", "held_out", noise]["loss"]) for noise in _ranges(rows)]
    assert by_level == pytest.approx([value for name, value in after.items() if name != "loss"], rel=1e-5)
    assert (tmp_path / "evaluation.png").stat().st_size > 5000


def _ranges(rows: dict[tuple[str, str, str], dict[str, str]]) -> list[str]:
    return [noise for noise in dict.fromkeys(noise for *_, noise in rows) if noise != "all"]


@pytest.mark.slow
def test_files_act_together_and_the_base_is_restored(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    twin = tmp_path / "twin.safetensors"
    twin.write_bytes(trained.both.read_bytes())
    together = [f"{trained.both}:0.5+{twin}:0.5", f"{trained.both}:0", str(trained.unet), str(trained.both)]
    other = tmp_path / "other"
    other.mkdir()
    for name in ("anger-symbol.png", "anger-symbol.txt"):
        (other / name).write_bytes((BASE_STYLE_IMAGES / name).read_bytes())
    (other / "copy.png").write_bytes(next(trained.held_out.glob("*.png")).read_bytes())
    (other / "copy.txt").write_text("a copy")
    folders = ("--images", str(trained.held_out), f"noto={other}", "--train_images", f"again={trained.held_out}")
    rows = evaluate(tmp_path / "out", *together, *folders)
    whole = float(rows["both", "held_out", "all"]["percent"])
    assert float(rows["both × 0.5 + twin × 0.5", "held_out", "all"]["percent"]) == pytest.approx(whole, rel=1e-3)
    assert {float(row["percent"]) for (name, *_), row in rows.items() if name == "both × 0"} == {0.0}
    assert abs(whole) > 0.1
    alone = evaluate(tmp_path / "alone", str(trained.unet), "--images", str(trained.held_out))
    assert alone["unet", "held_out", "all"] == rows["unet", "held_out", "all"]
    said = capsys.readouterr()
    lines = said.out.splitlines()
    assert lines[1].split() == ["again", "(trained", "on)", "held_out", "noto", "mean", "worst"]
    assert lines[2].split() == ["images", "3", "3", "2"]
    zero = next(line for line in lines if line.startswith("both × 0 "))
    assert zero.split()[3:] == ["+0.00", "±", "0.00", "%"] * 4 + ["held_out"]
    assert "3 images of held_out are in again as well, which was trained on" in said.err
    assert "1 images of noto are in again as well" in said.err


@pytest.mark.slow
def test_more_draws_change_the_noise(trained: Trained, tmp_path: Path) -> None:
    one = evaluate(tmp_path / "1", str(trained.unet), "--images", str(trained.held_out))
    two = evaluate(tmp_path / "2", str(trained.unet), "--images", str(trained.held_out), "--draws", "2")
    assert one["unet", "held_out", "all"]["base"] != two["unet", "held_out", "all"]["base"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["{lora}", "--imges", "{images}"], "--imges: unknown option, did you mean 'images'?"),
        (["{lora}x", "--images", "{images}"], "no such file: {lora}x, did you mean '{lora}'?"),
        (["{lora}"], "no images are given: --images FOLDER"),
        (["--images", "{images}"], "LORA is required, before the options"),
        (["{lora}", "--images", "{images}x"], "--images {images}x: no such folder"),
        (["{lora}", "--images", "{images}", "--train_images", "{images}"], "two folders are called held_out"),
        (["{lora}", "--images", "{images}", "--batch_size", "0"], "--batch_size: must be at least 1, not 0"),
    ],
)
def test_mistakes_are_named_before_torch(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    places = {"lora": trained.both, "images": trained.held_out}
    assert run(main, [*(word.format(**places) for word in words), *_base(tmp_path)[:4], *_base(tmp_path)[6:]]) == 2
    assert said.format(**places) in capsys.readouterr().err


def test_nothing_is_overwritten_unasked(trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "evaluation.csv").write_text("mine")
    assert run(main, [str(trained.both), "--images", str(trained.held_out), *_base(tmp_path)]) == 2
    assert "--overwrite to replace them" in capsys.readouterr().err
    assert (tmp_path / "evaluation.csv").read_text() == "mine"


def test_a_lora_of_another_model_is_refused(
    trained: Trained, tiny_sdxl: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(trained.both), "--images", str(trained.held_out), *_base(tmp_path)]
    words[words.index(str(BASE))] = str(tiny_sdxl)
    assert run(main, words) == 2
    assert str(trained.both) in capsys.readouterr().err


def test_help_needs_no_torch() -> None:
    code = "import sys; from library.evaluation.evaluate import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    code += "assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    assert "--train_images" in done.stdout


@pytest.mark.slow
def test_an_sdxl_model_and_bf16(tiny_sdxl: Path, image_folder: Path, tmp_path: Path) -> None:
    """Two text encoders, sizes in the condition; the same file at the multiplier 0 is the base, in bf16 too."""
    from library.evaluation import draw

    base = ("--pretrained_model_name_or_path", str(tiny_sdxl), "--output_dir", str(tmp_path / "out"))
    words = (*base, "--output_name", "xl", "--network_train_unet_only=false", "--learning_rate", "1e-1")
    assert run_training(tmp_path, *words, "--max_train_steps", "2") == 0
    forget_accelerator()
    lora = tmp_path / "out" / "xl.safetensors"
    with safe_open(lora, framework="pt") as file:
        assert {name.partition("_text")[0].partition("_unet")[0] for name in file.keys()} == {  # noqa: SIM118
            "lora",
            "lora_te1",
            "lora_te2",
        }
    given = (str(lora), f"{lora}:0", *base, "--mixed_precision", "bf16")
    assert run(main, [*given, "--images", str(image_folder / "2_style"), "--resolution", "64"]) == 0
    with (tmp_path / "out" / "evaluation.csv").open(encoding="utf-8") as table:
        rows = {row["lora"]: row for row in csv.DictReader(table) if row["noise"] == "all"}
    assert float(rows["xl × 0"]["percent"]) == 0
    assert abs(float(rows["xl"]["percent"])) > 1e-3
    forget_accelerator()
    assert run(draw.main, [*given, "--prompt", "a fox --w 64 --h 64 --s 1", "--seeds", "1", "--singles"]) == 0
    plain, changed, at_zero = (path.read_bytes() for path in sorted((tmp_path / "out" / "grid").glob("*.png")))
    assert plain == at_zero
    assert plain != changed
