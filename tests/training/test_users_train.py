"""Users' own command lines and files, as tests/config has them, train: with the small model and images for theirs."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import toml
from safetensors import safe_open

from tests.config.test_users import CASES, USERS, arguments
from tests.conftest import BASE, IMAGES
from tests.quick import quick

SUPPORTED = [path for path in CASES if not toml.load(USERS / f"{path.stem}.expected.toml")["refused"]]
SDXL = [path for path in CASES if "sdxl" in path.stem]
NOT_THEIRS = {
    *("sd2_v", "flux", *(path.stem for path in SDXL)),  # of models that are not Stable Diffusion 1
    "gui_lora_easy",  # its schedule is of a package of its own
}


THEIRS = [path for path in SUPPORTED if path.stem not in NOT_THEIRS]


@pytest.mark.parametrize(
    "path",
    quick(THEIRS, *(path for path in THEIRS if path.stem in ("gui_kohya_ss", "gui_lora_scripts", "notebook"))),
    ids=lambda path: path.stem,
)
def test_it_trains(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(path, BASE, "--mixed_precision", "no", tmp_path=tmp_path, monkeypatch=monkeypatch)


@pytest.mark.parametrize("path", quick(SDXL, SDXL[0]), ids=lambda path: path.stem)
def test_it_trains_sdxl(path: Path, tiny_sdxl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(path, tiny_sdxl, tmp_path=tmp_path, monkeypatch=monkeypatch)
    with safe_open(next(Path("out").glob("*.safetensors")), framework="pt") as file:
        assert any(key.startswith("lora_unet_input_blocks_4_1_") for key in file.keys())  # noqa: SIM118
        assert file.metadata()["ss_base_model_version"] == "sdxl_base_v1-0"


def test_it_trains_flux(tiny_flux: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (path,) = (path for path in CASES if path.stem == "flux")
    nothing = [f"--{name}=" for name in ("clip_l", "t5xxl", "ae")]
    train(path, tiny_flux, *nothing, "--t5xxl_max_token_length", "16", tmp_path=tmp_path, monkeypatch=monkeypatch)
    with safe_open(next(Path("out").glob("*.safetensors")), framework="pt") as file:
        assert file.metadata()["ss_discrete_flow_shift"] == "3.1582"


def train(path: Path, base: Path, *words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The user's job with our model and images, for an epoch."""
    from train_network import main

    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "data" / "1_style"
    folder.mkdir(parents=True)
    for image in sorted((IMAGES / "train").glob("*.png"))[:3]:
        shutil.copy(image, folder)
        shutil.copy(image.with_suffix(".txt"), folder)
    Path("prompts.txt").write_text("a cat --w 64 --h 64 --s 1\n", encoding="utf-8")
    files = ["--pretrained_model_name_or_path", str(base), "--train_data_dir", "data", "--output_dir", "out"]
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
    assert main([*arguments(path), *files, *nothing, *sizes, *length, *words]) == 0
    assert list(Path("out").glob("*.safetensors"))
