"""Presets: found, layered below a file and the command line, named in messages, commented, and without data."""

from __future__ import annotations

import logging
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import toml

from library.config import presets
from library.config.fields import convert
from library.config.options import Options, declared_options
from library.config.parser import parse
from library.errors import UserError
from tests.conftest import PATIENCE, ROOT

Parse = Callable[..., Options]
ALL = presets.presets()

# transition, factor, minimum, rate
TABLE = {
    "stable_diffusion_lora": (800, 0.65, 0.12, 1e-4),
    "language_model_finetune": (1200, 0.75, 0.15, 5e-5),
    "vision_transformer_adapt": (1000, 0.70, 0.10, 2e-4),
    "image_classification": (1100, 0.70, 0.10, 2e-4),
    "default": (1000, 0.70, 0.10, 1e-4),
    "aggressive": (800, 0.60, 0.15, None),
    "conservative": (1500, 0.80, 0.05, None),
}
FOR_KOHYAS_USERS = {f"{model}_{task}" for model in ("sd15", "sdxl") for task in ("style", "character", "concept")} | {
    f"{model}_{task}"
    for model in ("sd3", "flux", "flux2", "chroma", "anima", "z_image")
    for task in ("style", "character")
}


def values(name: str) -> dict[str, object]:
    found = toml.load(ALL[name].path)
    return {key: value for section in found.values() for key, value in section.items()}


def test_there_are_those_that_are_documented() -> None:
    assert set(ALL) == {*TABLE, *FOR_KOHYAS_USERS, "origin", "slider", "muon"}
    assert all(40 < len(preset.description) < 120 for preset in ALL.values())


@pytest.mark.parametrize("name", TABLE)
def test_the_numbers(name: str) -> None:
    found = values(name)
    numbers = tuple(found.get(f"wd_{key}") for key in ("transition_steps", "decay_factor", "min_ratio"))
    assert (*numbers, found.get("learning_rate")) == TABLE[name]
    assert found["dynamic_weight_decay"] is True


@pytest.mark.parametrize("name", ALL)
def test_each_key_is_an_option_with_its_reason_above_it(name: str) -> None:
    lines = ALL[name].path.read_text(encoding="utf-8").splitlines()
    keys = [number for number, line in enumerate(lines) if re.match(r"\w+ = ", line)]
    assert len(keys) == len(values(name))
    for number in keys:
        assert re.match(r"# \S+", lines[number - 1]), f"{name}: {lines[number]} has no comment"


@pytest.mark.parametrize("name", ALL)
def test_no_preset_names_data_files_or_the_machine(name: str) -> None:
    """Nor how long to train: kohya's epochs go before steps, so an epoch count here would undo --max_train_steps; nor
    unet_lr, which would undo --learning_rate. Numbers are numbers: CustomAdamW is made of them in other programs."""
    found = values(name)
    assert not [value for value in found.values() if isinstance(value, str) and ("/" in value or "\\" in value)]
    named = re.compile(
        r"_(dir|path|file|config|weights|name|json)$|^(vae|resume|preset|mixed_precision|max_train|unet_lr)"
    )
    assert not [key for key in found if named.search(key)]
    assert all(not isinstance(value, str) for key, value in found.items() if key[:3] == "wd_" and key != "wd_schedule")


def test_muon_goes_on_top_and_keeps_the_rate(options: Parse) -> None:
    below, found = options("--preset", "sdxl_style"), options("--preset", "sdxl_style", "muon")
    assert (below.optimizer.optimizer_type, found.optimizer.optimizer_type) == ("AdamW8bit", "CustomAdamW")
    assert found.custom_adamw.orthogonalize
    assert found.optimizer.learning_rate == below.optimizer.learning_rate


def test_the_shipped_presets_keep_the_measured_techniques() -> None:
    techniques = re.compile(r"use_|alora|spd|tam|orthogonalize")
    assert [name for name in ALL if any(techniques.match(key) for key in values(name))] == ["muon", "origin"]


@pytest.mark.parametrize("name", ALL)
def test_it_is_what_its_file_says(name: str, options: Parse) -> None:
    found = options("--preset", name)
    declared = declared_options()
    groups = [group for group in vars(found).values() if hasattr(group, "__dataclass_fields__")]
    for key, value in values(name).items():
        words = tuple(str(item) for item in value) if isinstance(value, list) else (str(value),)
        (actual,) = [getattr(group, key) for group in groups if hasattr(group, key)]
        assert actual == convert(declared[key], words), key
        assert found.given[key].startswith(str(presets.shown_path(ALL[name].path))), key
    assert found.guidance.preset == (name,)


def test_preset_file_command_line(folder: Path, options: Parse) -> None:
    (folder / "a.toml").write_text("[x]\nlearning_rate = 3e-4\nwd_decay_factor = 0.9\n", encoding="utf-8")
    words = ("--config_file", "a.toml", "--preset", "stable_diffusion_lora", "--learning_rate", "5e-4")
    found = options(*words)
    assert found.weight_decay.wd_transition_steps == 800  # the preset's
    assert found.weight_decay.wd_decay_factor == 0.9  # the file's
    assert found.optimizer.learning_rate == 5e-4  # the command line's
    assert found.given["wd_decay_factor"] == "a.toml: [x] wd_decay_factor"


@pytest.mark.parametrize(
    "words",
    [
        ("--preset", "stable_diffusion_lora", "conservative"),
        ("--preset", "stable_diffusion_lora", "--preset", "conservative"),
        ("--preset=stable_diffusion_lora", "--seed", "1", "--preset=conservative"),
    ],
)
def test_layers(words: tuple[str, ...], options: Parse) -> None:
    found = options(*words)
    assert found.weight_decay.wd_transition_steps == 1500
    assert found.network.network_dim == 16
    assert found.guidance.preset == ("stable_diffusion_lora", "conservative")
    reverse = options("--preset", "conservative", "stable_diffusion_lora")
    assert reverse.weight_decay.wd_transition_steps == 800


def test_a_file_may_name_presets_and_the_command_line_others_instead(folder: Path, options: Parse) -> None:
    (folder / "a.toml").write_text("preset = ['sd15_style']\nnetwork_dim = 8\n", encoding="utf-8")
    assert options("--config_file", "a.toml").data.flip_aug
    assert options("--config_file", "a.toml").network.network_dim == 8
    other = options("--config_file", "a.toml", "--preset", "conservative")
    assert (other.data.flip_aug, other.weight_decay.wd_transition_steps) == (False, 1500)
    assert options("--config_file", "a.toml", "--preset=").guidance.preset == ()


def test_a_flag_of_a_preset_can_be_taken_back(options: Parse) -> None:
    assert options("--preset", "sd15_style", "--no-flip_aug", "--noise_offset=").data.flip_aug is False


def test_an_unknown_preset(folder: Path, options: Parse) -> None:
    with pytest.raises(UserError, match=r"--preset: no preset 'sd15_styl', did you mean 'sd15_style'\?"):
        options("--preset", "default", "sd15_styl")
    with pytest.raises(UserError, match="--preset: needs the name of a preset; --list_presets says which there are"):
        options("--preset", "--seed", "1")
    with pytest.raises(UserError, match=r"'zzz'; there are aggressive, anima_character, anima_style, chroma_character"):
        options("--preset", "zzz")
    (folder / "a.toml").write_text("[x]\npreset = 'defalt'\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"^a\.toml: \[x\] preset: no preset 'defalt', did you mean 'default'\?"):
        options("--config_file", "a.toml")


def test_messages_name_the_preset(tmp_path: Path, options: Parse, monkeypatch: pytest.MonkeyPatch) -> None:
    """A value that cannot be read, and one that does not go with what the user gave."""
    monkeypatch.setattr(presets, "FOLDER", tmp_path)
    (tmp_path / "odd.toml").write_text("# Preset: odd\n[network]\nnetwork_dim = 'two'\nnetwrk_alpha = 1\n", "utf-8")
    (tmp_path / "plain.toml").write_text("# Preset: plain\n[a]\nnetwork_train_unet_only = true\n", "utf-8")
    (tmp_path / "data.toml").write_text("# just an example\nnetwork_dim = 2\n", "utf-8")
    with pytest.raises(UserError) as caught:
        options("--preset", "odd")
    dim, alpha = str(caught.value).splitlines()
    assert dim == f"{tmp_path / 'odd.toml'}: [network] network_dim: 'two' is not a whole number"
    assert alpha.startswith(f"{tmp_path / 'odd.toml'}: [network] netwrk_alpha: unknown option, did you mean")
    with pytest.raises(UserError, match=r"leave nothing to train\n  .*plain\.toml: \[a\] network_train_unet_only$"):
        options("--preset", "plain", "--network_train_text_encoder_only")
    with pytest.raises(UserError, match="no preset 'data'"):
        options("--preset", "data")


def test_output_config_writes_what_the_presets_set(folder: Path) -> None:
    words = ["--pretrained_model_name_or_path", "b", "--output_dir", "o", "--preset", "default", "--seed", "3"]
    with pytest.raises(SystemExit):
        parse([*words, "--config_file", "new.toml", "--output_config"])
    written = toml.load(folder / "new.toml")
    assert (written["wd_transition_steps"], written["seed"], "preset" in written) == (1000, 3, False)


def test_list_presets_needs_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse(["--list_presets"])
    assert stop.value.code == 0
    said = capsys.readouterr().out
    for preset in ALL.values():
        assert re.search(rf"^{preset.name} +{re.escape(preset.description)}$", said, flags=re.MULTILINE)


def test_list_presets_has_no_effect_in_a_file(folder: Path, options: Parse, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "a.toml").write_text("list_presets = true\n", encoding="utf-8")
    with caplog.at_level(logging.WARNING):
        options("--config_file", "a.toml")
    assert "a.toml: list_presets: has no effect" in caplog.text


def test_presets_are_found_where_the_program_is_installed(tmp_path: Path) -> None:
    """The wheel, unpacked where no checkout is."""
    pytest.importorskip("setuptools", minversion="77", reason="building a wheel needs it")
    source, site = tmp_path / "source", tmp_path / "site"
    kept = shutil.ignore_patterns("__pycache__", "assets")
    for name in ("library", "networks", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=kept)
    (source / "quickstart").mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "train_network.py", "quickstart/LICENSES.md"):
        shutil.copy(ROOT / name, source / name)
    build = "from setuptools import build_meta; build_meta.build_wheel('../dist')"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True, timeout=PATIENCE)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        file.extractall(site)
    shutil.rmtree(source)
    command = [sys.executable, "-c", "import train_network, sys; sys.exit(train_network.main())", "--list_presets"]
    done = subprocess.run(
        command, cwd=site, capture_output=True, text=True, timeout=PATIENCE, check=False, env={"PYTHONPATH": str(site)}
    )
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in ALL)
    assert str(site) in done.stdout
