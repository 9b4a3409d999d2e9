"""Every kind of adapter with every feature of a run, from the command line: kinds × features.

What a kind cannot do is refused with a reason that it states itself (`Adapter.refuses`, `refuse_without`).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_models import every_kind
from safetensors.torch import load_file

from library.files.header import read_metadata
from networks.files import read
from networks.kinds import load
from tests.conftest import BASE
from train_network import main

EVERY = every_kind("lokr")
# Sizes of the tiny base's layers are multiples of 16
ARGUMENTS: dict[str, tuple[str, ...]] = {
    "adalora": ("--network_dim", "2", "--network_args", "init_r=3"),
    "boft": ("--network_dim", "6", "--network_args"),
    "full": ("--network_args",),
    "ia3": ("--network_args",),
    "norm": ("--network_args",),
    "oft": ("--network_dim", "4", "--network_args"),
}
USUAL = ("--network_dim", "2", "--network_alpha", "1", "--network_args")
WORDS = (
    *("--pretrained_model_name_or_path", str(BASE), "--caption_extension", ".txt", "--resolution", "64"),
    *("--learning_rate", "1e-2", "--train_batch_size", "2", "--seed", "1", "--network_train_unet_only"),
    *("--cache_latents", "--max_data_loader_n_workers", "0", "--no-loss_plot", "--no-report"),
)
FEATURES = (
    *(
        "--optimizer_type",
        "CustomAdamW",
        "--monitoring",
        "--max_train_steps",
        "4",
        "--ema_decay",
        "0.5",
        "--ema_for",
        "validate",
    ),
    *("--save_every_n_steps", "2", "--save_state", "--validation_split", "0.3", "--validate_every_n_steps", "2"),
    *("--sample_every_n_steps", "2"),
)


@pytest.fixture
def train(tmp_path: Path, image_folder: Path) -> Callable[..., int]:
    def run(kind: str, name: str, *words: str, more: tuple[str, ...] = ()) -> int:
        places = ("--train_data_dir", str(image_folder), "--output_dir", str(tmp_path), "--output_name", name)
        sizes = (*ARGUMENTS.get(kind, USUAL), *more)
        return main([*WORDS, *places, "--network_module", f"networks.{kind}", *sizes, *words])

    return run


@pytest.mark.parametrize("kind", EVERY)
@pytest.mark.slow
def test_a_run_with_everything_is_resumed_with_the_same_bits(kind: str, train: Any, tmp_path: Path) -> None:
    more = ("down_lr_weight=0.5,1", "network_reg_lrs=.*attn1.*=5e-3" if kind != "norm" else "preset=attn-mlp")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat --s 1 --w 64 --h 64\n", encoding="utf-8")
    features = (*FEATURES, "--sample_prompts", str(prompts))
    assert train(kind, "whole", *features, more=more) == 0
    whole = load_file(tmp_path / "whole.safetensors")
    assert any(tensor.any() for key, tensor in whole.items() if not key.endswith(".alpha"))
    metadata = read_metadata(tmp_path / "whole.safetensors")
    assert metadata["ss_network_module"] == f"networks.{kind}"
    assert "down_lr_weight" in metadata["ss_network_args"]
    (state,) = (path for path in tmp_path.iterdir() if path.is_dir() and "00000002" in path.name)
    assert train(kind, "resumed", *features, "--resume", str(state), more=more) == 0
    resumed = load_file(tmp_path / "resumed.safetensors")
    assert resumed.keys() == whole.keys()
    assert all(torch.equal(resumed[key], tensor) for key, tensor in whole.items())  # one seed, one program


@pytest.mark.slow
@pytest.mark.parametrize("kind", EVERY)
def test_its_file_starts_another_run_and_is_merged_into_an_8_bit_base(kind: str, train: Any, tmp_path: Path) -> None:
    computed = ("--mixed_precision", "bf16", "--max_train_steps", "2")
    assert train(kind, "first", *computed) == 0
    first = tmp_path / "first.safetensors"
    found = {layer.kind for layer in read(first).layers.values()}
    own = found <= set(load(kind).reads())  # else it is written as plain LoRA, with which LoRA goes on
    start = ("--network_weights", str(first), "--base_weights", str(first), "--base_weights_multiplier", "0.5")
    more = () if own else ("--dim_from_weights",)
    assert train(kind if own else "lora", "second", *start, *more, "--fp8_base", *computed) == 0
    second = load_file(tmp_path / "second.safetensors")
    assert second.keys() == load_file(first).keys()
    assert all(tensor.float().isfinite().all() for tensor in second.values())


@pytest.mark.parametrize("kind", EVERY)
@pytest.mark.slow
def test_limits_and_dropouts_work_or_are_refused_with_the_reason(kind: str, train: Any, capsys: Any) -> None:
    for name, words, more in (
        ("scale_weight_norms", ("--scale_weight_norms", "0.01"), ()),
        ("network_dropout", ("--network_dropout", "0.1"), ()),
        ("rank_dropout", (), ("rank_dropout=0.1",)),
    ):
        code = train(kind, name, *words, "--max_train_steps", "2", more=more)
        said = capsys.readouterr().err
        assert code in (0, 2)
        assert "Traceback" not in said
        if code == 2:
            assert name in said.splitlines()[-1]
            assert f"networks.{kind}" in said
