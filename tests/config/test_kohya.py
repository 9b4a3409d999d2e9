"""The table of kohya's names: complete, without contradictions, and with kohya's own kinds and defaults."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import networks
from library.config import kohya
from library.config.data.dataset_keys import NEUTRAL, NOT_YET
from library.config.fields import Declared, declared
from library.config.options import CustomAdamWOptions, Options, declared_options
from library.config.options.forgetting import ForgettingOptions
from library.config.options.monitoring import MonitoringOptions
from library.config.options.weight_decay import WeightDecayOptions
from library.config.registry import signature
from library.errors import UserError
from library.optimizers.registry import CUSTOM_ADAMW

LINES = (Path(__file__).parent / "data" / "kohya_options.tsv").read_text(encoding="utf-8").splitlines()
KOHYA = {name: (kind, json.loads(default)) for name, kind, default in (line.split("\t") for line in LINES[1:])}
OPTIONS = declared_options()
ALIASES = {alias for item in OPTIONS.values() for alias in item.details.aliases}

# Where the default differs from kohya's, on purpose
OWN_DEFAULTS = {
    "network_module": "networks.lora",
    # kohya's scripts have several, by model; here the model's own stands for not given
    **dict.fromkeys(("discrete_flow_shift", "t5xxl_max_token_length", "model_type")),
    "guidance_scale": 1.0,  # kohya's 3.5 is refused by nobody, and warned of
    **dict.fromkeys(("network_args", "optimizer_args", "lr_scheduler_args", "base_weights"), ()),
}
# Options that kohya does not have
OURS = {
    *("balance", "reg_share", "resolutions"),
    *("cache_dir", "skip_bad_images", "overwrite", "loss_plot", "compare_prompts", "compare_steps", "dry_run"),
    *("check_data", "validation_group", "validation_fold"),
    *("weight_decay", "lr_layer_decay", "resume_anyway", "on_divergence", "divergence_limit"),
    *("preset", "list_presets", "recommend", "find_lr", "find_lr_start", "find_lr_end", "find_lr_steps"),
    *("early_stopping_patience", "early_stopping_threshold", "ema_decay", "ema_for", "deterministic", "allow_tf32"),
    *("save_naming", "base_format", "text_encoder_format", "fit", "gpu_memory"),
    *("validation_dir", "validation_gap", "forgetting_dir"),
    *("embedding_lr", "train_embedding_only", "save_embedding"),
    *("slider_picture", "qwen3_tokenizer_path", "turbo", "model_version", "base_weights_off_for_samples"),
}


def kind_of(item: Declared) -> str:
    return "flag" if item.kind is bool else "list" if item.many else "value"


@pytest.mark.parametrize("name", KOHYA)
def test_every_name_of_kohya_is_known_once(name: str) -> None:
    assert (name in OPTIONS) + (name in ALIASES) + (name in kohya.rows()) == 1


def test_no_name_has_two_rows() -> None:
    tables: list[Any] = [kohya.WITHOUT_EFFECT, kohya.NOT_YET, kohya.GUI_EXTRAS, kohya.OTHER_SCRIPTS, kohya.TOOLS]
    assert [name for name, count in Counter(name for table in tables for name in table).items() if count > 1] == []


def test_implemented_options_are_kohyas_or_marked_as_ours() -> None:
    titled = (
        CustomAdamWOptions,
        WeightDecayOptions,
        MonitoringOptions,
        ForgettingOptions,
    )  # groups whose titles say it
    of_groups = {name for group in titled for name in declared(group)}
    assert {name for name in OPTIONS if name not in KOHYA} == OURS | of_groups
    assert {name for name, item in OPTIONS.items() if "(ours)" in item.details.help} == OURS


def test_a_module_that_is_not_supported_yet_is_named(options: Callable[..., Options]) -> None:
    with pytest.raises(UserError, match=r"'networks.lora_lumina' is known to kohya's scripts, not supported here yet"):
        options("--network_module", "networks.lora_lumina")
    flows = ("lora_flux", "lora_flux_2", "lora_sd3", "lora_anima", "lora_zimage")
    for kind in ("loha", "lokr", "oft", "lora_fa", "dylora", *flows):
        options("--network_module", f"networks.{kind}")


def test_the_flags_of_custom_adamw_are_its_own_arguments() -> None:
    parameters = signature(CUSTOM_ADAMW, where="test").parameters
    assert set(declared(CustomAdamWOptions)) <= set(parameters)


@pytest.mark.parametrize("name", [name for name in OPTIONS if name in KOHYA])
def test_implemented_options_have_kohyas_kind_and_default(name: str) -> None:
    item, (kind, default) = OPTIONS[name], KOHYA[name]
    assert kind_of(item) == kind
    if item.required:
        assert default is None
    elif item.kind is str and item.default == "":
        assert default in (None, "")
    else:
        assert item.default == OWN_DEFAULTS.get(name, default)


@pytest.mark.parametrize("name", [name for name in kohya.rows() if KOHYA.get(name, ("tool",))[0] != "tool"])
def test_rows_have_kohyas_kind_and_default(name: str) -> None:
    if name not in kohya.GUI_EXTRAS:
        assert (kohya.rows()[name].kind, kohya.rows()[name].default) == KOHYA[name]


@pytest.mark.parametrize("name", [name for name, (kind, _) in KOHYA.items() if kind != "tool"])
def test_kohyas_default_asks_for_nothing(name: str, options: Callable[..., Options]) -> None:
    """A file that spells out kohya's defaults is taken, whatever is supported."""
    default = KOHYA[name][1]
    word = "" if default is None else str(default).lower() if isinstance(default, bool) else str(default)
    of_one_script = ("discrete_flow_shift", "t5xxl_max_token_length", "guidance_scale", "model_type")
    if name not in ("pretrained_model_name_or_path", "output_dir", *of_one_script):
        assert options(f"--{name}={word}") == options()


def test_companions_lead_to_what_is_not_supported() -> None:
    """A row that matters only with another option names one that is refused; else it must be supported itself."""
    for name, row in kohya.rows().items():
        for other in filter(None, (row.only_with, *row.needs)):
            main, _, choice = other.partition("=")
            refused = choice in OPTIONS[main].details.not_yet if choice else main in kohya.rows()
            assert refused, f"{name} matters with {other}, which is supported now"


def test_instead_names_what_is_supported() -> None:
    assert {other for row in kohya.rows().values() for other in row.instead} <= OPTIONS.keys()


def test_dataset_keys_that_are_not_supported_have_a_row() -> None:
    assert set(NOT_YET) - set(NEUTRAL) <= kohya.rows().keys()
    assert not set(NOT_YET) & OPTIONS.keys()


def test_network_modules_that_exist_are_not_refused() -> None:
    folder = Path(next(iter(networks.__path__)))
    refused = {name.removeprefix("networks.") for name in OPTIONS["network_module"].details.not_yet}
    assert not refused & {path.stem for path in folder.glob("*.py")}


NEUTRAL_WORDS = [
    "--noise_offset 0",
    "--noise_offset 0.0",
    "--noise_offset=",
    "--save_state=false",
    "--no-save_state",
    "--no-xformers",
    "--sample_prompts=",
    "--max_timestep 1000",
    "--lr_scheduler_args",
    "--base_weights",
    "--resume=",
    "--resume None",
    "--stop_text_encoder_training 0",
    "--train_inpainting false",
    "--network_train_text_encoder",
    "--network_train_text_encoder true",
    "--model_train_type sd-lora",
    "--lr_restart_cycles 1",
    "--discrete_flow_shift 3.0",
    # what GUIs for sd-scripts 0.11 always write
    "--compile false",
    "--compile_backend inductor",
    "--compile_mode default",
    "--compile_dynamic auto",
    "--show_timesteps=",
    "--skip_image_resolution 0",
]
WARNED_WORDS = {
    "--sdpa": "command line: --sdpa: has no effect: attention always uses PyTorch's scaled_dot_product_attention",
    "--sample_sampler dpmpp_2m": "sample_sampler dpmpp_2m: its name here is dpmsolver++",
    "--epoch 8 --max_train_epochs 8": "command line: --epoch = 8: has no effect: kohya's scripts do not read it, but "
    "max_train_epochs or max_train_steps",
    "--cuda_allow_tf32": "command line: --cuda_allow_tf32: has no effect: it only tunes speed: products of fp32 "
    "numbers keep their precision",
    "--sdxl true": "command line: --sdxl = true: has no effect: the model family is found from the weights",
}
REFUSED_WORDS = [
    "--sample_sampler eulr",
    "--train_inpainting",
    "--stop_text_encoder_training -1",
    "--network_train_text_encoder false",
    "--lr_restart_cycles 3",
    "--bucket_resolution_steps 32",
    "--model_train_type sd3-lora",
    "--noise_offset",
    "--conditioning_data_dir masks",
    "--show_timesteps console",
    "--network_module networks.lora_lumina",
    "--skip_image_resolution -1",
]


@pytest.mark.parametrize("words", NEUTRAL_WORDS)
def test_silent(words: str, options: Callable[..., Options], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        options(*words.split())
    assert caplog.records == []


@pytest.mark.parametrize("words", WARNED_WORDS)
def test_warned(words: str, options: Callable[..., Options], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        options(*words.split())
    assert [record.getMessage() for record in caplog.records] == [WARNED_WORDS[words]]


@pytest.mark.parametrize("words", REFUSED_WORDS)
def test_refused(words: str, options: Callable[..., Options]) -> None:
    with pytest.raises(UserError):
        options(*words.split())
