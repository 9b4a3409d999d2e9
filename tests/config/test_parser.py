"""Words and files to options: precedence, what counts as unset, what values may look like, --help, --output_config."""

from __future__ import annotations

import dataclasses
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import toml
from hypothesis import given
from hypothesis import strategies as st

from library.config.options import Options, declared_options, option_groups
from library.config.parser import help_parser, parse
from library.errors import UserError

REQUIRED = ["--pretrained_model_name_or_path", "base.safetensors", "--output_dir", "out"]
Parse = Callable[..., Options]


def value(options: Options, name: str) -> Any:
    groups = [getattr(options, group) for group in option_groups()]
    return next(getattr(group, name) for group in groups if hasattr(group, name))


VALUES: dict[str, tuple[str, Any]] = {
    "--resolution 512": ("resolution", (512, 512)),
    "--resolution 512,768": ("resolution", (512, 768)),
    "--resolution 512x768": ("resolution", (512, 768)),
    "--resolution 512 768": ("resolution", (512, 768)),
    "--lr_warmup_steps 500": ("lr_warmup_steps", 500),
    "--lr_warmup_steps 500.0": ("lr_warmup_steps", 500),
    "--lr_warmup_steps 0.05": ("lr_warmup_steps", 0.05),
    "--lr_warmup_steps 5%": ("lr_warmup_steps", "5%"),
    "--lr_warmup_steps 0": ("lr_warmup_steps", 0),
    "--max_token_length 75": ("max_token_length", 75),
    "--max_token_length 255": ("max_token_length", 225),
    "--text_encoder_lr 1e-5": ("text_encoder_lr", (1e-5,)),
    "--text_encoder_lr 1e-5 2e-5": ("text_encoder_lr", (1e-5, 2e-5)),
    "--text_encoder_lr": ("text_encoder_lr", None),
    "--max_train_steps 1e3": ("max_train_steps", 1000),
    "--seed -5": ("seed", -5),
    "--caption_extention .txt": ("caption_extension", ".txt"),
    "--caption_prefix=--ar,": ("caption_prefix", "--ar,"),
    "--caption_prefix -x": ("caption_prefix", "-x"),
    "--network_args conv_dim=4 alpha=-1 --seed 1": ("network_args", ("conv_dim=4", "alpha=-1")),
    "--network_args=a=b=c": ("network_args", ("a=b=c",)),
    "--cache_latents": ("cache_latents", True),
    "--cache_latents=true": ("cache_latents", True),
    "--cache_latents 0": ("cache_latents", False),
    "--cache_latents --no-cache_latents": ("cache_latents", False),
    "--no-no_metadata": ("no_metadata", False),
    "--no-loss_plot": ("loss_plot", False),
    "--seed 1 --seed 2": ("seed", 2),
    "--vae=": ("vae", None),
    "--min_snr_gamma 0": ("min_snr_gamma", None),
    "--save_every_n_epochs 0": ("save_every_n_epochs", None),
    "--max_grad_norm 0": ("max_grad_norm", 0.0),
    "--dry_run": ("dry_run", "plan"),
    "--dry_run=measure": ("dry_run", "measure"),
    "--dry_run measure": ("dry_run", "measure"),
    "--dry_run=false": ("dry_run", ""),
}

TOML_VALUES: dict[str, tuple[str, Any]] = {
    "resolution = 512": ("resolution", (512, 512)),
    "resolution = [512, 768]": ("resolution", (512, 768)),
    "resolution = '512,768'": ("resolution", (512, 768)),
    "text_encoder_lr = 5e-5": ("text_encoder_lr", (5e-5,)),
    "text_encoder_lr = [5e-5, 1e-5]": ("text_encoder_lr", (5e-5, 1e-5)),
    "learning_rate = '1e-4'": ("learning_rate", 1e-4),
    "network_dim = 32.0": ("network_dim", 32),
    "network_args = []": ("network_args", ()),
    "network_args = 'conv_dim=4'": ("network_args", ("conv_dim=4",)),
    "optimizer_args = ['betas=0.9,0.99']": ("optimizer_args", ("betas=0.9,0.99",)),
    "reg_data_dir = ''": ("reg_data_dir", None),
    "cache_latents = 1": ("cache_latents", True),
    "cache_latents = false": ("cache_latents", False),
    "output_name = 2024": ("output_name", "2024"),
    "lr_warmup_steps = '5%'": ("lr_warmup_steps", "5%"),
    "dry_run = true": ("dry_run", "plan"),
    "dry_run = 'measure'": ("dry_run", "measure"),
    "caption_prefix = '--ar 16:9'": ("caption_prefix", "--ar 16:9"),
}


@pytest.mark.parametrize("words", VALUES)
def test_words(words: str, options: Parse) -> None:
    name, expected = VALUES[words]
    found = value(options(*words.split()), name)
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize("text", TOML_VALUES)
def test_toml(text: str, folder: Path, options: Parse) -> None:
    (folder / "a.toml").write_text(f"[section]\n{text}\n", encoding="utf-8")
    name, expected = TOML_VALUES[text]
    found = value(options("--config_file", "a.toml"), name)
    assert found == expected
    assert type(found) is type(expected)


def test_no_is_for_flags(options: Parse) -> None:
    with pytest.raises(UserError, match="--no-vae: unknown option"):
        options("--no-vae")


def test_command_line_wins(folder: Path, options: Parse) -> None:
    (folder / "a.toml").write_text(
        "seed = 1\n[x]\nnetwork_dim = 8\nvae = 'v'\ncache_latents = true\n", encoding="utf-8"
    )
    found = options("--network_dim", "16", "--config_file", "a", "--vae=", "--no-cache_latents")
    assert (found.training.seed, found.network.network_dim) == (1, 16)
    assert (found.model.vae, found.data.cache_latents) == (None, False)


def test_given_names_what_the_user_set_and_where(folder: Path, options: Parse) -> None:
    (folder / "a.toml").write_text("[x]\nnetwork_dim = 8\nunet_lr = 1e-4\nvae = ''\n", encoding="utf-8")
    given = options("--config_file", "a.toml", "--network_dim", "16", "--caption_extention", ".txt").given
    assert given["network_dim"] == "command line: --network_dim"
    assert given["unet_lr"] == "a.toml: [x] unet_lr"
    assert given["caption_extension"] == "command line: --caption_extention"
    assert "vae" not in given
    assert "seed" not in given


def test_the_same_key_in_two_sections_with_one_value(folder: Path, options: Parse) -> None:
    (folder / "a.toml").write_text("[x]\nresolution = '512'\n[y]\nresolution = 512\n", encoding="utf-8")
    assert options("--config_file", "a.toml").data.resolution == (512, 512)


def test_a_file_from_windows(folder: Path, options: Parse) -> None:
    (folder / "a.toml").write_bytes("\ufeff[x]\r\nseed = 3\r\nvae = 'C:\\v.pt'\r\n".encode())
    found = options("--config_file", "a.toml")
    assert (found.training.seed, found.model.vae) == (3, "C:\\v.pt")


def test_a_file_cannot_name_another(folder: Path, options: Parse, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "a.toml").write_text("config_file = 'b.toml'\noutput_config = true\n", encoding="utf-8")
    with caplog.at_level(logging.WARNING):
        assert options("--config_file", "a.toml").run.config_file == "a.toml"
    assert len(caplog.records) == 2


@pytest.mark.parametrize(
    ("words", "name"),
    [([], "AdamW"), (["--use_8bit_adam"], "AdamW8bit"), (["--use_lion_optimizer"], "Lion")],
)
def test_optimizer_name(words: list[str], name: str, options: Parse) -> None:
    assert options(*words).optimizer.optimizer_name == name
    assert options("--optimizer_type", "Prodigy").optimizer.optimizer_name == "Prodigy"


def test_prose_may_mention_options_and_hold_line_breaks(options: Parse) -> None:
    comment = "as last week, but\n\tstill with --network_dim 8"
    assert options("--training_comment", comment).output.training_comment == comment
    prompt = "a cat --w 512 --h 512 --d 1"
    assert options("--compare_prompts", prompt).output.compare_prompts == (prompt,)
    assert options("--caption_separator", "\n").data.caption_separator == "\n"
    assert options("--caption_prefix", "a --nothing --d").data.caption_prefix == "a --nothing --d"


@pytest.mark.parametrize("name", ["vae", "logging_dir", "resume", "network_args", "base_weights", "cache_dir"])
def test_every_path_and_name_is_without_control_characters(name: str, folder: Path) -> None:
    (folder / "x.toml").write_text(f'{name} = "D:\\temp"\n')
    with pytest.raises(UserError, match=rf"^x\.toml: {name}: 'D:\\temp' contains a tab, .*; in double quotes"):
        parse([*REQUIRED, "--config_file=x.toml"])
    with pytest.raises(
        UserError, match=rf"^command line: --{name}: 'D:\\temp' contains a tab, which no name or path sh"
    ):
        parse([*REQUIRED, f"--{name}=D:\temp"])


def test_a_missing_option_in_the_text_of_another_is_found() -> None:
    with pytest.raises(UserError, match=r"--output_dir is required: .* in the value of --training_comment: look at"):
        parse(["--pretrained_model_name_or_path", "x", "--training_comment=first --output_dir=out"])


@given(st.floats(min_value=0, allow_nan=False, allow_infinity=False), st.integers(1, 10**9), st.text(min_size=1))
def test_values_survive_the_command_line(rate: float, steps: int, comment: str) -> None:
    """What a program writes with repr() is read back as it was, whatever the text."""
    words = [f"--unet_lr={rate!r}", f"--max_train_steps={steps}", f"--training_comment={comment}"]
    found = parse([*REQUIRED, *words])
    assert (found.optimizer.unet_lr, found.training.max_train_steps) == (rate, steps)
    assert found.output.training_comment == comment


def test_output_config_writes_what_differs_and_is_read_back(folder: Path) -> None:
    words = ["--resolution=512,768", "--text_encoder_lr", "1e-5", "2e-5", "--network_args", "conv_dim=4", "--seed=0"]
    words += ["--cache_latents", "--no-loss_plot", "--lr_warmup_steps=5%", "--train_batch_size=1", "--xformers"]
    with pytest.raises(SystemExit) as end:
        parse([*REQUIRED, *words, "--config_file=new", "--output_config"])
    assert end.value.code == 0
    written = toml.load(folder / "new.toml")
    assert written == {
        "pretrained_model_name_or_path": "base.safetensors",
        "output_dir": "out",
        "resolution": "512,768",
        "text_encoder_lr": [1e-5, 2e-5],
        "network_args": ["conv_dim=4"],
        "seed": 0,
        "cache_latents": True,
        "loss_plot": False,
        "lr_warmup_steps": "5%",
    }
    again, direct = parse(["--config_file", "new.toml"]), parse([*REQUIRED, *words])
    assert dataclasses.replace(again, run=direct.run) == direct
    with pytest.raises(UserError, match=r"^new.toml: exists already"):
        parse([*REQUIRED, "--config_file=new", "--output_config"])


def test_output_config_keeps_paths_of_windows_and_several_sizes(folder: Path) -> None:
    words = ["--train_data_dir=D:\\xmas", "--base_weights", "C:\\x41\\u", "b", "--resolutions", "512", "768x512"]
    with pytest.raises(SystemExit):
        parse([*REQUIRED, *words, "--config_file=new", "--output_config"])
    again, direct = parse(["--config_file", "new.toml"]), parse([*REQUIRED, *words])
    assert dataclasses.replace(again, run=direct.run) == direct


def test_help_lists_every_option() -> None:
    text = help_parser().format_help()
    assert text.isascii()  # any console can print it
    for name, item in declared_options().items():
        assert f"--{name}" in text or f"--no-{name}" in text
        assert item.details.help


def test_help_and_mistakes_load_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from library.config import parser, registry\nfrom library.config.data import dataset_config\n"
        "from library.errors import UserError\n"
        "try: parser.parse(sys.argv[1:])\n"
        "except (SystemExit, UserError): pass\n"
        "try: registry.bind('networks.lora.Sizes', ['conv_dims=4'], where='--network_args')\n"
        "except UserError: pass\n"
        "heavy = {'torch', 'numpy', 'PIL', 'diffusers', 'transformers', 'accelerate', 'bitsandbytes'}\n"
        "sys.exit(', '.join(heavy & set(sys.modules)) or 0)\n"
    )
    for words in (["--help"], ["--lerning_rate", "1"], ["--list_presets"], ["--preset", "sd15_style"]):
        done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")
