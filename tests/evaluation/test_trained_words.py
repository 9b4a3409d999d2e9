"""Trained embeddings in `evaluate` and `draw`, on the quickstart's base. The vectors of these are those of the word
"cat", so that the new word must do exactly what "cat" does."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from library.config.command import run
from library.evaluation import draw, evaluate
from library.models.opening import open_family
from tests.conftest import BASE, forget_accelerator
from tests.evaluation.conftest import PROMPT, Trained

WORD = "zcat"
MODEL = ("--pretrained_model_name_or_path", str(BASE))


@pytest.fixture(scope="module")
def cat() -> Tensor:
    """The vector of "cat", [1, 64]."""
    family = open_family(str(BASE))
    (token,) = family.token_ids("cat")
    family.components.load_all(family.components.text_encoders, torch.float32, "cpu")
    encoder = family.components["text_encoder"]
    return encoder.get_input_embeddings().weight[[token]].clone()  # type: ignore[operator]


@pytest.fixture(scope="module")
def files(cat: Tensor, trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An embedding alone, and one in the file of a LoRA of UNet and text encoder."""
    folder = tmp_path_factory.mktemp("words")
    alone, bundle = folder / f"{WORD}.safetensors", folder / "bundle.safetensors"
    save_file({"emb_params": cat}, alone)
    save_file({**load_file(trained.both), f"bundle_emb.{WORD}.emb_params": cat}, bundle)
    return {"alone": alone, "bundle": bundle}


def pixels(out: Path, *words: str) -> list[np.ndarray]:
    """The images of the columns of one prompt."""
    assert run(draw.main, [*words, *MODEL, "--output_dir", str(out), "--singles"]) == 0
    forget_accelerator()
    return [np.asarray(Image.open(path)) for path in sorted((out / "grid").glob("*.png"))]


@pytest.mark.slow
def test_a_prompt_with_the_word_draws_what_its_vectors_mean(
    trained: Trained, files: dict[str, Path], tmp_path: Path
) -> None:
    """The base alone reads the word as letters, before and after a column with the embedding."""
    prompt = f"{PROMPT} --d 3"
    assert prompt.count("cat") == 1
    new = prompt.replace("cat", WORD)
    base, as_cat = pixels(tmp_path / "cat", str(trained.both), "--prompt", prompt)
    given = (str(files["alone"]), str(files["bundle"]), str(trained.both))
    found = pixels(tmp_path / "new", *given, "--prompt", new)
    assert np.array_equal(found[1], base)
    assert np.array_equal(found[2], as_cat)
    letters = pixels(tmp_path / "letters", str(trained.both), "--prompt", new)
    assert np.array_equal(found[0], letters[0])
    assert np.array_equal(found[3], letters[1])
    assert not np.array_equal(letters[0], base)


@pytest.mark.slow
def test_captions_with_the_word_are_measured_with_its_vectors(
    trained: Trained, files: dict[str, Path], tmp_path: Path
) -> None:
    def losses(word: str, *loras: str, more: tuple[str, ...] = ()) -> list[str]:
        images = tmp_path / word
        images.mkdir()
        for image in sorted(trained.held_out.glob("*.png")):
            (images / image.name).write_bytes(image.read_bytes())
            (images / image.with_suffix(".txt").name).write_text(f"emoji of {word}")
        out = tmp_path / f"out-{word}"
        words = (*loras, *MODEL, "--images", str(images), "--resolution", "64", "--output_dir", str(out), *more)
        assert run(evaluate.main, words) == 0
        forget_accelerator()
        with (out / "evaluation.csv").open(encoding="utf-8") as table:
            rows = [row for row in csv.DictReader(table) if row["noise"] == "all"]
        return [rows[0]["base"], *(row["loss"] for row in rows)]

    base, _, adapted = losses("cat", f"{trained.both}:0", str(trained.both))
    letters, alone, bundle = losses(WORD, str(files["alone"]), str(files["bundle"]))
    assert (alone, bundle) == (base, adapted)
    assert letters != base
    other = losses("zzother", str(files["alone"]), more=("--token_string", "zzother"))
    assert other[1] == base


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["{alone}:0.5"], f"{WORD} × 0.5: an embedding has no multiplier"),
        (["{alone}+{bundle}"], "have an embedding each, and one can be read at a time"),
        (["{lora}", "--token_string", WORD], f"--token_string {WORD}: none of the files has an embedding"),
        (["{alone}", "--token_string", "cat"], "the tokenizer has this word already"),
        (["{xl}"], "zxl.safetensors: has no emb_params, but clip_g, clip_l: it is an embedding for SDXL"),
    ],
)
def test_mistakes_are_named(
    words: list[str],
    said: str,
    trained: Trained,
    files: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    save_file({"clip_l": torch.ones(1, 4), "clip_g": torch.ones(1, 6)}, tmp_path / "zxl.safetensors")
    places = {"lora": trained.unet, "xl": tmp_path / "zxl.safetensors", **files}
    given = [word.format(**places) for word in words]
    assert run(draw.main, [*given, *MODEL, "--output_dir", str(tmp_path / "out"), "--prompt", "a fox"]) == 2
    assert said in capsys.readouterr().err


def test_what_has_no_effect_is_named(
    files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A word that no prompt has; and several embeddings in one file, of which none is chosen."""
    several = tmp_path / "several.safetensors"
    content = load_file(files["bundle"])
    save_file({**content, "bundle_emb.zdog.emb_params": content[f"bundle_emb.{WORD}.emb_params"].clone()}, several)
    prompt = ("--prompt", "a fox --w 64 --h 64 --s 1")
    pixels(tmp_path / "out", str(files["alone"]), str(several), *prompt)
    said = capsys.readouterr().err
    assert f"{files['alone']}: no prompt has '{WORD}', the word of its embedding, which changes nothing" in said
    assert f"{several}: has embeddings of {WORD}, zdog, of which one can be read: --token_string {WORD}" in said
