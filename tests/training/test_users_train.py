"""Users' own command lines and files, as tests/config has them, train: with the small model and images for theirs."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import toml

from tests.config.test_users import CASES, USERS, arguments
from tests.conftest import BASE, IMAGES

SUPPORTED = [path for path in CASES if not toml.load(USERS / f"{path.stem}.expected.toml")["refused"]]
NOT_THEIRS = {
    *("sd2_v", "gui_kohya_ss_sdxl", "gui_lora_scripts_sdxl", "sdxl"),  # of models that are not Stable Diffusion 1
    "gui_lora_easy",  # its schedule is of a package of its own
}


@pytest.mark.parametrize(
    "path", [path for path in SUPPORTED if path.stem not in NOT_THEIRS], ids=lambda path: path.stem
)
def test_it_trains(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from train_network import main

    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "data" / "1_style"
    folder.mkdir(parents=True)
    for image in sorted((IMAGES / "train").glob("*.png"))[:3]:
        shutil.copy(image, folder)
        shutil.copy(image.with_suffix(".txt"), folder)
    Path("prompts.txt").write_text("a cat --w 64 --h 64 --s 1\n", encoding="utf-8")
    files = ["--pretrained_model_name_or_path", str(BASE), "--train_data_dir", "data", "--output_dir", "out"]
    files += ["--logging_dir", "logs", "--sample_prompts", "prompts.txt"]
    nothing = [f"--{name}=" for name in ("vae", "reg_data_dir", "dataset_config", "network_weights", "output_config")]
    sizes = ["--resolution", "64", "--min_bucket_reso", "64", "--max_bucket_reso", "128", "--caption_extension", ".txt"]
    length = [
        "--max_train_epochs",
        "1",
        "--lr_warmup_steps",
        "0",
        "--max_data_loader_n_workers",
        "0",
        "--persistent_data_loader_workers",
        "false",
    ]
    assert main([*arguments(path), *files, *nothing, *sizes, *length, "--mixed_precision", "no"]) == 0
    assert list(Path("out").glob("*.safetensors"))
