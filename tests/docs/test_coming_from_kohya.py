"""What docs/coming-from-kohya.md shows works, on the small base model."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest

from library.config.options import declared_options
from library.sampling.prompts import read_prompts
from tests.conftest import BASE, IMAGES, ROOT

PAGE = (ROOT / "docs" / "coming-from-kohya.md").read_text(encoding="utf-8")
SMALL = ("--resolution", "64", "--max_train_epochs", "0", "--max_train_steps", "2", "--max_data_loader_n_workers", "0")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.DOTALL)


def words(block: str) -> list[str]:
    return shlex.split(block.replace("\\\n", " ").replace("models/sd15.safetensors", str(BASE)))[2:]


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with all that the page names; start.safetensors is what a first run writes."""
    from train_network import main

    monkeypatch.chdir(tmp_path)
    Path("train/2_mycat").mkdir(parents=True)
    for image in sorted((IMAGES / "train").glob("*.png"))[:2]:
        shutil.copy(image, "train/2_mycat")
        shutil.copy(image.with_suffix(".txt"), "train/2_mycat")
    (toml,) = blocks("toml")
    Path("mycat.toml").write_text(toml.replace("models/sd15.safetensors", str(BASE)), encoding="utf-8")
    (prompts,) = blocks("text")
    Path("prompts.txt").write_text(prompts, encoding="utf-8")
    start = ("--output_dir", ".", "--output_name", "start", "--max_train_steps", "1", "--no-loss_plot")
    assert main(["--config_file", "mycat.toml", *SMALL, *start]) == 0
    return tmp_path


@pytest.mark.slow
def test_the_examples_run(workplace):
    from train_network import main

    assert [prompt.seed for prompt in read_prompts(Path("prompts.txt"))] == [7, None]
    Path("prompts.txt").write_text("a photo of mycat --n blurry --w 64 --h 64 --d 7 --s 1\n", encoding="utf-8")
    command, merged = map(words, blocks("sh"))
    assert main([*command, *SMALL, "--sample_every_n_steps", "2"]) == 0
    assert main([*merged, *SMALL]) == 0
    found = {re.sub(r"\d{14}", "T", path.relative_to("out").as_posix()) for path in Path("out").rglob("*.*")}
    assert found >= {
        "mycat.safetensors", "mycat-loss.png", "mycat-on-top.safetensors", "sample/mycat_000002_00_T_7.png",
    }  # fmt: skip
    assert next(Path("logs").rglob("events*")).parent.name == "network_train"


def test_the_options_that_are_named_exist():
    prompts = {"n", "w", "h", "d", "s", "l", "ss", "am", "g", "fs"}
    named = set(re.findall(r"--(?:no-)?(\w+)", PAGE)) - prompts - {"xformers"}
    assert named <= declared_options().keys()
