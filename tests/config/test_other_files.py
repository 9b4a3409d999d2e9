"""Files that are given to another option than the one they are for: one message says which."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import toml

from library.config.data.dataset_config import load_datasets
from library.config.options import Options
from library.config.other_files import refuse_other_file
from library.config.parser import parse
from library.errors import UserError

REQUIRED = ["--pretrained_model_name_or_path", "base.safetensors", "--output_dir", "out"]
HELD: dict[str, tuple[Any, str, str]] = {
    "config_file": (
        {"pretrained_model_name_or_path": "x", "my_own": 1, "a": {"learning_rate": 1e-4, "xformers": True}},
        "options of training",
        "give it as --config_file",
    ),
    "dataset_config": (
        {"general": {"shuffle_caption": True}, "datasets": [{"subsets": [{"image_dir": "x"}]}]},
        "the description of a data set",
        "give it as --dataset_config",
    ),
    "sample_prompts": (
        {"prompt": {"width": 512, "subset": [{"prompt": "a cat", "seed": 1}]}},
        "prompts for samples",
        "give it as --sample_prompts",
    ),
    "log_tracker_config": ({"wandb": {"project": "x"}}, "settings of trackers", "give it as --log_tracker_config"),
    "in_json": (
        {"a.png": {"caption": "a cat"}, "b.png": {"tags": "b"}},
        "a list of images with captions",
        "give it as --in_json, or as metadata_file in a data set",
    ),
    "lycoris_preset": (
        {"enable_conv": True, "unet_target_module": ["Transformer2DModel"]},
        "a preset of LyCORIS",
        "give it as --network_args preset=FILE",
    ),
}
WANTED = tuple(option for option in HELD if option != "lycoris_preset")


@pytest.mark.parametrize("held", HELD)
@pytest.mark.parametrize("wanted", WANTED)
def test_a_file_is_refused_where_it_does_not_belong(held: str, wanted: str) -> None:
    content, what, instead = HELD[held]
    if held == wanted:
        refuse_other_file(content, "x", wanted)
        return
    with pytest.raises(UserError) as caught:
        refuse_other_file(content, "x", wanted)
    assert str(caught.value) == f"--{wanted} x: holds {what}, not {HELD[wanted][1]}: {instead}"


@pytest.mark.parametrize(
    "content",
    [
        {}, [], [1], "x", {"seed": "x", "sed": 1, "lerning_rate": 1}, {"general": {"resolution": 512}},
        {"a": {"b": {}}}, {"prompt": "a cat", "seed": 1}, {"caption": "x"}, {"wandb": 1},
        {"wandb": {}, "tensorbord": {}}, ["a cat", {"prompt": "a dog"}],
    ],
    ids=str,
)  # fmt: skip
def test_what_is_not_plain_is_left_to_the_reader(content: Any) -> None:
    for wanted in WANTED:
        refuse_other_file(content, "x", wanted)


def test_every_reader_asks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: Callable[..., Options]) -> None:
    from library.data.sources.metadata import scan
    from library.run.trackers import plan_trackers
    from library.sampling.prompts import read_prompts

    monkeypatch.chdir(tmp_path)
    for held, (content, *_) in HELD.items():
        Path(f"{held}.toml").write_text(toml.dumps(content))
        Path(f"{held}.json").write_text(json.dumps(content))

    def by_in_json(file: str) -> None:
        subset = load_datasets(options("--in_json", file, "--train_data_dir", ".", "--resolution", "64"))[0].subsets[0]
        scan(subset, 0)

    readers: dict[str, Callable[[str], object]] = {
        "config_file": lambda file: parse([*REQUIRED, "--config_file", file]),
        "dataset_config": lambda file: load_datasets(options("--dataset_config", file)),
        "sample_prompts": lambda file: read_prompts(Path(file)),
        "log_tracker_config": lambda file: plan_trackers(options("--logging_dir", "l", "--log_tracker_config", file)),
        "in_json": by_in_json,
    }
    assert readers.keys() == set(WANTED)
    for wanted, read in readers.items():
        for held in HELD:
            for ending in ("toml", *(["json"] if wanted in ("dataset_config", "sample_prompts", "in_json") else [])):
                if held != wanted:
                    with pytest.raises(UserError, match=rf"--{wanted} {held}\.{ending}: holds {HELD[held][1]}, not"):
                        read(f"{held}.{ending}")


def test_a_gui_saves_no_config_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("gui.json").write_text("{}")
    with pytest.raises(UserError, match=r"--config_file gui\.json: a config file is TOML, .* let it print the command"):
        parse([*REQUIRED, "--config_file", "gui.json"])
    Path("gui.json.toml").write_text("seed = 3")  # kohya's scripts leave the ending out
    assert parse([*REQUIRED, "--config_file", "gui.json"]).training.seed == 3
