"""What Stable Diffusion 3 alone has in the main job, through the real command line. The job itself is in
test_flow_runs.py."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from tests.flow_families import CACHED, FLOW, Words
from tests.training.written import distance, metadata, refused, weights

Train = Callable[..., int]
SHORT = FLOW["sd3"].short()


@pytest.fixture
def train_sd3(train: Train, tiny_sd3: Path) -> Train:
    """As `train`, with the tiny Stable Diffusion 3.5 medium."""
    return partial(train, "--pretrained_model_name_or_path", str(tiny_sd3), *SHORT)


@pytest.mark.slow
def test_leaving_encoders_out_acts(train_sd3: Train, tmp_path: Path) -> None:
    common = ("--network_dropout", "0.1", "--gradient_checkpointing", *CACHED)
    assert train_sd3(*common, *FLOW["sd3"].resume_words, "--output_name", "without") == 0
    assert train_sd3(*common, "--output_name", "plain") == 0
    assert distance(weights(tmp_path, "plain"), weights(tmp_path, "without")) > 0.05
    assert metadata(tmp_path, "without")["ss_t5_dropout_rate"] == "0.4"


@pytest.mark.slow
def test_without_t5_it_trains_and_caches(train: Train, tiny_sd3: Path, tmp_path: Path) -> None:
    """Nor is its tokenizer needed; a dry run knows its parts."""
    no_t5 = shutil.ignore_patterns("text_encoder_3", "tokenizer_3")
    small = Path(shutil.copytree(tiny_sd3, tmp_path / "small", ignore=no_t5))
    words = ("--pretrained_model_name_or_path", str(small), *SHORT, "--max_train_steps", "2")
    for name, more in {"cached": CACHED, "trained": (), "fit": ("--fit", "24GB")}.items():
        assert train(*words, *more, "--output_name", name) == 0
    assert train(*words, "--dry_run", "--gpu_memory", "24GB") == 0
    assert any(key.startswith("lora_te2") for key in weights(tmp_path, "trained"))


def test_kohyas_network_args(train_sd3: Train, tmp_path: Path) -> None:
    """Ranks by kind of layer, blocks, and embedders, under kohya's names."""
    words = ("context_attn_dim=0", "context_mod_dim=0", "x_attn_dim=3", "x_mlp_dim=5", "train_block_indices=0,2")
    more = ("emb_dims=[0,2,4,0,0,6]", "split_qkv=False", "verbose=True")
    arguments = ("--network_module", "networks.lora_sd3", "--network_args", *words, *more)
    assert train_sd3("--network_train_unet_only", "--max_train_steps", "1", "--network_dim", "7", *arguments) == 0
    ranks = {
        key.removesuffix(".lora_down.weight").removeprefix("lora_unet_"): len(tensor)
        for key, tensor in weights(tmp_path).items()
        if key.endswith("lora_down.weight")
    }
    expected = {"t_embedder_mlp_0": 2, "t_embedder_mlp_2": 2, "x_embedder_proj": 4, "final_layer_linear": 6}
    for i in (0, 2):
        block = f"joint_blocks_{i}"
        # in files query, key and value are one layer, of the sum of their ranks
        expected |= {f"{block}_x_block_attn_qkv": 9, f"{block}_x_block_attn_proj": 3}
        expected |= {f"{block}_x_block_mlp_fc1": 5, f"{block}_x_block_mlp_fc2": 5}
        expected |= {f"{block}_x_block_adaLN_modulation_1": 7}
    expected |= {"joint_blocks_0_x_block_attn2_qkv": 9, "joint_blocks_0_x_block_attn2_proj": 3}
    expected |= {"joint_blocks_0_context_block_mlp_fc1": 7, "joint_blocks_0_context_block_mlp_fc2": 7}
    assert ranks == expected


SD3 = ("--network_module", "networks.lora_sd3", "--network_args")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--discrete_flow_shift", "2"), "is a Stable Diffusion 3 model; the option is for a FLUX.1 model"),
        (
            ("--timestep_sampling", "shift"),
            "--timestep_sampling shift: .*there are sigma, uniform, sigmoid; --training_s",
        ),
        (("--pos_emb_random_crop_rate", "0.5"), "pos_emb_random_crop_rate.*table of places is cropped at its centre"),
        (("--enable_scaled_pos_embed",), "enable_scaled_pos_embed.*table of places is cropped at its centre"),
        (("--clip_l_dropout_rate", "1.5"), "--clip_l_dropout_rate: must be at most 1, not 1.5"),
        ((*SD3, "split_qkv=True"), "split_qkv is known .*adapters of their own in any case"),
        ((*SD3, "train_t5xxl=True"), "train_t5xxl is known .*T5 is not trained"),
        ((*SD3, "emb_dims=1,2"), "emb_dims=1,2: 2 numbers, and there are 6 layers"),
        ((*SD3, "x_attn_dim=four"), "x_attn_dim=four: four is no rank"),
        ((*SD3, "x_attn_dim=4", "preset=full"), "preset and kohya's ranks by kind of layer each choose"),
        ((*SD3, "train_block_indices=0-3"), "train_block_indices: '0-3': .* from 0 to 2 are this model's blocks"),
        (("--network_args", "x_attn_dim=4"), "x_attn_dim"),
        (("--resolution", "160"), "has places for 128 pixels a side, and an image's bucket has 160 × 160"),
    ],
)
def test_what_has_no_meaning_for_it_is_refused(
    train_sd3: Train, capsys: pytest.CaptureFixture[str], words: Words, said: str
) -> None:
    refused(train_sd3, words, said, capsys)


def test_too_large_a_sample_is_refused(train_sd3: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("emoji of cat --w 64 --h 192\n", encoding="utf-8")
    assert train_sd3("--sample_prompts", str(prompts), "--sample_every_n_steps", "2") == 2
    assert "has places for 128 pixels a side, and a sample has 64 × 192" in capsys.readouterr().err


def test_what_guis_write_for_every_model_is_no_mistake(train: Train, tmp_path: Path) -> None:
    """Rates of 0, masks that are off, empty names of files."""
    config = tmp_path / "gui.toml"
    config.write_text(
        "clip_l_dropout_rate = 0\nclip_g_dropout_rate = 0.0\nt5_dropout_rate = 0\napply_lg_attn_mask = false\n"
        'apply_t5_attn_mask = false\nclip_l = ""\nclip_g = ""\nt5xxl = ""\n',
        encoding="utf-8",
    )
    assert train("--config_file", str(config), "--max_train_steps", "1") == 0


@pytest.mark.slow
def test_a_turbo_is_told_by_its_name(train: Train, tiny_sd3: Path, tmp_path: Path, capsys) -> None:
    named = shutil.copytree(tiny_sd3, tmp_path / "sd3.5_large_turbo")
    assert train("--pretrained_model_name_or_path", str(named), *SHORT, "--max_train_steps", "1", *CACHED) == 0
    assert "distilled to a few steps" in capsys.readouterr().err
