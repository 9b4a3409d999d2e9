"""Scripts for one family train no other."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from tests.conftest import BASE

EXPECTED = {
    "sd3_train_network": "a Stable Diffusion 3 model",
    "flux_train_network": "a FLUX.1 model or a Chroma model",
    "flux2_train_network": "a FLUX.2 klein model",
    "anima_train_network": "an Anima model",
    "zimage_train_network": "a Z-Image model",
}


@pytest.mark.parametrize(("script", "title"), EXPECTED.items())
def test_the_door_is_for_one_family_only(
    capsys: pytest.CaptureFixture[str], image_folder: Path, tmp_path: Path, script: str, title: str
) -> None:
    main = importlib.import_module(script).main
    words = ("--pretrained_model_name_or_path", str(BASE), "--train_data_dir", str(image_folder), "--resolution", "64")
    assert main([*words, "--caption_extension", ".txt", "--output_dir", str(tmp_path / "out")]) == 2
    assert f"is a Stable Diffusion 1.x or 2.x model, where {title} is expected" in capsys.readouterr().err
