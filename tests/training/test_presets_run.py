"""Every preset trains on the small base model, and the file says which it was.

The presets for other kinds of model set the optimizer's part only, so that part is what runs here; the whole of it is
run by the example scripts (tests/examples).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from library.config.presets import presets
from library.errors import CommonError
from tests.conftest import BASE
from tests.quick import quick


@pytest.mark.parametrize("name", quick(presets(), "origin", "sd15_style", "slider", "flux_style"))
def test_every_preset_trains(name: str, image_folder: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    from train_network import main

    family = name.rpartition("_")[0]
    of_flow = family in ("sd3", "flux", "flux2", "chroma", "anima", "z_image")
    base = request.getfixturevalue(f"tiny_{family}") if of_flow else BASE
    data = ("--pretrained_model_name_or_path", str(base), "--train_data_dir", str(image_folder))
    small = ("--resolution", "64", "--no-enable_bucket", "--caption_extension", ".txt", "--max_train_steps", "2")
    output = ("--output_dir", str(tmp_path), "--no-loss_plot", "--no-report")
    more = ("--seed", "1", "--max_data_loader_n_workers", "0")
    assert main(["--preset", name, *data, *small, *output, *more]) == 0
    with safe_open(tmp_path / "last.safetensors", "pt") as file:
        assert file.metadata()["ss_preset"] == name
        assert all(file.get_tensor(key).isfinite().all() for key in file.keys())  # noqa: SIM118 - not a dict


def test_a_curve_on_top_goes_with_another_optimizer(train: Any, tmp_path: Path) -> None:
    assert train("--preset", "sd15_concept", "conservative", "--optimizer_type", "AdamW", "--no-enable_bucket") == 0
    with safe_open(tmp_path / "out" / "test.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["ss_preset"] == "sd15_concept,conservative"
    assert metadata["ss_wd_transition_steps"] == "1500"
    assert metadata["ss_optimizer"].startswith("torch.optim.AdamW")


def test_what_a_preset_sets_is_named_where_it_does_not_fit(train: Any, capsys: pytest.CaptureFixture[str]) -> None:
    for optimizer, place in (
        (("AdamW",), "configs/origin.toml: [optimizer] use_spd"),
        (
            ("CustomAdamW", "--optimizer_args", "weight_decay=0"),
            "configs/origin.toml: [optimizer] dynamic_weight_decay",
        ),
    ):
        assert train("--preset", "origin", "--optimizer_type", *optimizer) == 2
        assert place in capsys.readouterr().err


def test_an_error_of_all_processes_stays_one() -> None:
    from library.config.parser import parse
    from library.job import _naming_places

    options = parse(["--preset", "aggressive", "--pretrained_model_name_or_path", "x", "--output_dir", "y"])
    said = r"--wd_schedule is wrong\n  .*aggressive.toml: \[weight_decay\] wd_schedule$"
    with pytest.raises(CommonError, match=said), _naming_places(options):
        raise CommonError("--wd_schedule is wrong")


def test_rates_by_layer_need_an_optimizer_that_takes_rates(train: Any, capsys: pytest.CaptureFixture[str]) -> None:
    for optimizer in ("Prodigy", "Adafactor"):
        assert train("--lr_layer_decay", "0.9", "--optimizer_type", optimizer) == 2
        assert f"--lr_layer_decay: {optimizer} finds its rate itself" in capsys.readouterr().err
