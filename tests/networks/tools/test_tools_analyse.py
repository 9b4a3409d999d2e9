"""The tools that read: ranks, inspect, compare; and the average of saved files."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import pytest
import toml
import torch
from safetensors.torch import load_file
from tool_files import LINEAR, SHAPES, TEXT, deltas, tensors_of, write

from library.files.hashes import safetensors_hashes
from library.files.header import read_metadata
from networks import base_weights
from networks.tools.__main__ import main
from networks.tools.blocks import block_of, order
from networks.tools.inspect import settings
from networks.tools.ranks import spectrum_of
from networks.tools.result import origins


def test_measures_of_singular_values() -> None:
    """Of 2, 1, 1: energies 4, 1, 1 of 6; shares 1/2, 1/4, 1/4 with an entropy of 1.5 ln 2."""
    one = spectrum_of("layer", 3, torch.tensor([2.0, 1.0, 1.0]))
    assert one.norm == pytest.approx(6**0.5)
    assert one.effective_rank == pytest.approx(2**1.5)
    assert one.stable_rank == pytest.approx(1.5)
    assert (one.rank_90, one.rank_99) == (3, 3)
    even = spectrum_of("layer", 4, torch.ones(4))
    assert (even.effective_rank, even.stable_rank) == (pytest.approx(4), pytest.approx(4))
    none = spectrum_of("layer", 4, torch.zeros(4))
    assert (none.norm, none.effective_rank, none.rank_99) == (0, 0, 0)


def test_ranks_are_those_of_the_dense_differences(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path / "a.safetensors", tensors_of(1))
    table, picture = tmp_path / "ranks.csv", tmp_path / "ranks.png"
    assert main(["ranks", str(file), "--csv", str(table), "--plot", str(picture)]) == 0
    rows = {row["layer"]: row for row in csv.DictReader(table.read_text().splitlines())}
    for name, delta in deltas(load_file(file)).items():
        values = torch.linalg.svdvals(delta)[:3]
        assert [float(rows[name][f"sigma_{n}"]) for n in (1, 2, 3)] == pytest.approx(values.tolist(), rel=1e-4)
        shares = values / values.sum()
        effective = math.exp(-float((shares * shares.log()).sum()))
        assert float(rows[name]["effective_rank"]) == pytest.approx(effective, rel=1e-4)
    assert "rank 3 is used to" in capsys.readouterr().out
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert main(["ranks", str(file), "--csv", str(table)]) == 2
    assert "--csv" in capsys.readouterr().err


def test_comparing_a_file_with_itself_and_its_opposite(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = tensors_of(1)
    file = write(tmp_path / "a.safetensors", own)
    ups = {key: -tensor / 2 if key.endswith("up.weight") else tensor for key, tensor in own.items()}
    other = write(tmp_path / "b.safetensors", ups)
    assert main(["compare", str(file), str(file)]) == 0
    assert capsys.readouterr().out.splitlines()[-1].split()[:3] == ["all", "1.0000", "0"]
    assert main(["compare", str(file), str(other)]) == 0
    assert capsys.readouterr().out.splitlines()[-1].split()[:3] == ["all", "-1.0000", "1.5"]


def test_comparing_is_that_of_the_dense_differences(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = {name: shape for name, shape in SHAPES.items() if name != TEXT}
    files = [
        write(tmp_path / "a.safetensors", tensors_of(1)),
        write(tmp_path / "b.safetensors", tensors_of(2, rank=4, names=names)),
    ]
    assert main(["compare", *map(str, files), "--layers"]) == 0
    text = capsys.readouterr().out
    assert "3 layers in both, 1 only in the first, 0 only in the second" in text
    assert f"{TEXT}: only in the first" in text
    a, b = (deltas(load_file(file))[LINEAR] for file in files)
    (row,) = [line.split() for line in text.splitlines() if line.startswith(f"{LINEAR} ")]
    assert float(row[1]) == pytest.approx(float((a * b).sum() / a.norm() / b.norm()), abs=1e-4)
    assert float(row[2]) == pytest.approx(float((b - a).norm() / a.norm()), rel=1e-3)


@pytest.mark.parametrize(
    ("layer", "block"),
    [
        (LINEAR, "unet down_blocks_0"),
        ("lora_unet_mid_block_attentions_0_proj_in", "unet mid_block"),
        ("lora_unet_input_blocks_11_1_proj_in", "unet input_blocks_11"),
        ("lora_unet_conv_in", "unet"),
        ("lora_te2_text_model_encoder_layers_31_mlp_fc1", "te2 encoder_layers_31"),
    ],
)
def test_blocks(layer: str, block: str) -> None:
    assert block_of(layer) == block


def test_blocks_are_ordered_as_in_the_model() -> None:
    names = ["te encoder_layers_2", "te encoder_layers_10", "unet down_blocks_0", "unet mid_block", "unet up_blocks_1"]
    assert sorted(set(names), key=order) == names


def test_settings_of_the_metadata() -> None:
    """Those that are not the defaults, in the trainer's types."""
    metadata = {
        "ss_learning_rate": "0.0005",
        "ss_unet_lr": "None",
        "ss_network_module": "networks.loha",
        "ss_network_dim": "16",
        "ss_network_alpha": "8.0",
        "ss_network_args": '{"conv_dim": "4"}',
        "ss_optimizer": "torch.optim.adamw.AdamW(weight_decay=0.1,betas=(0.9, 0.99))",
        "ss_max_train_steps": "100",
        "ss_seed": "7",
        "ss_noise_offset": "0.05",
        "ss_datasets": '[{"resolution": [512, 640], "batch_size_per_device": 2}]',
        "ss_gradient_checkpointing": "True",
        "ss_cache_latents": "False",
    }
    assert settings(metadata) == {
        "gradient_checkpointing": True,
        "learning_rate": 0.0005,
        "max_train_steps": 100,
        "network_alpha": 8.0,
        "network_args": ["conv_dim=4"],
        "network_dim": 16,
        "network_module": "networks.loha",
        "noise_offset": 0.05,
        "optimizer_args": ["weight_decay=0.1", "betas=(0.9, 0.99)"],
        "optimizer_type": "torch.optim.adamw.AdamW",
        "resolution": "512,640",
        "seed": 7,
        "train_batch_size": 2,
    }


def test_inspecting(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = tensors_of(1)
    file = write(tmp_path / "a.safetensors", own, {"ss_steps": "120", "ss_network_dim": "3", "ss_seed": "5"})
    target = tmp_path / "a.toml"
    assert main(["inspect", str(file), "--toml", str(target)]) == 0
    text = capsys.readouterr().out
    norm = float(deltas(own)[TEXT].norm())
    assert "LoRA, 4 layers, names in kohya's style" in text
    assert "steps         120" in text
    assert f"te encoder_layers_0       1  {norm:.4g}" in text
    assert toml.loads(target.read_text()) == {"network_dim": 3, "seed": 5}


def test_inspecting_a_merged_file_names_its_sources(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = (write(tmp_path / f"{name}.safetensors", tensors_of(1)) for name in ("fox", "style"))
    target = tmp_path / "both.safetensors"
    words = [str(first), str(second), "--weights", "0.8", "-0.25", "--lbw", "1", "OUT=0,IN05=0.5"]
    assert main(["merge", *words, "--save_to", str(target)]) == 0
    capsys.readouterr()
    assert main(["inspect", str(target)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("made from")] == [
        "made from     fox.safetensors × 0.8, by block 1",
        "made from     style.safetensors × -0.25, by block OUT=0,IN05=0.5",
    ]


def test_inspecting_names_what_a_file_was_trained_with(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Other LoRAs below it, and protections against forgetting. Their files and folders are no settings: paths are not
    in the metadata."""
    below = write(tmp_path / "below.safetensors", tensors_of(1))
    metadata = {base_weights.KEY: base_weights.to_text(base_weights.of_files([str(below)], [0.5]))}
    metadata |= {"ss_ewc_data": '["noto"]', "ss_ewc_images": "20", "ss_ewc_lambda": "5.0"}
    file = write(tmp_path / "a.safetensors", tensors_of(1), metadata)
    assert main(["inspect", str(file)]) == 0
    text = capsys.readouterr().out
    assert "on top of     below.safetensors × 0.5\n" in text
    assert "protection    EWC for 20 images of noto, lambda 5\n" in text
    assert settings(metadata) == {"ewc_lambda": 5.0}


@pytest.mark.parametrize("text", ["someone else's words", "[1]", '{"a": 2}', '[{"name": "a"}]', "[" * 5000])
def test_other_programs_words_stay_as_they_are(text: str) -> None:
    assert origins({"ss_made_from": text}) == [text]


# -- averages


def _saves(tmp_path: Path, steps: tuple[int, ...]) -> list[Path]:
    return [
        write(tmp_path / f"{step}.safetensors", tensors_of(step), {"ss_steps": str(step), "ss_session_id": "1"})
        for step in steps
    ]


def test_the_mean_of_saved_files(tmp_path: Path) -> None:
    files, target = _saves(tmp_path, (10, 20, 30)), tmp_path / "mean.safetensors"
    assert main(["ema", *map(str, files), "--save_to", str(target)]) == 0
    found, sources = load_file(target), [load_file(file) for file in files]
    for key, tensor in found.items():
        assert torch.allclose(tensor, torch.stack([one[key] for one in sources]).mean(0), atol=1e-6)
    metadata = read_metadata(target)
    assert (metadata["ss_steps"], metadata["ss_made_by"]) == ("30", "mean")
    assert metadata["sshs_model_hash"] == safetensors_hashes(target)["sshs_model_hash"]


def test_an_exponential_average_has_the_half_life(tmp_path: Path) -> None:
    """Whatever the order in which the files are given: 10 steps earlier count half."""
    files, target = _saves(tmp_path, (20, 10, 30)), tmp_path / "ema.safetensors"
    assert main(["ema", *map(str, files), "--half_life", "10", "--save_to", str(target)]) == 0
    found, (second, first, third) = load_file(target), (load_file(file) for file in files)
    for key, tensor in found.items():
        assert torch.allclose(tensor, (first[key] + 2 * second[key] + 4 * third[key]) / 7, atol=1e-6)
    assert read_metadata(target)["ss_steps"] == "30"


def test_what_has_no_average(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, target = write(tmp_path / "a.safetensors", tensors_of(1)), str(tmp_path / "mean.safetensors")
    others = {
        "files of different ranks": tensors_of(2, rank=4),
        "only in": tensors_of(2, names={LINEAR: SHAPES[LINEAR]}),
        f"{TEXT}.alpha: 2.0 in": tensors_of(2, alpha=1.0),
    }
    for said, tensors in others.items():
        second = write(tmp_path / "b.safetensors", tensors)
        assert main(["ema", str(first), str(second), "--save_to", target]) == 2
        assert said in capsys.readouterr().err
    assert main(["ema", str(first), str(first), "--half_life", "5", "--save_to", target]) == 2
    assert "has no ss_steps" in capsys.readouterr().err
