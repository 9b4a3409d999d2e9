"""The main job through the real command line, on the small base model: image folder in, LoRA file out."""

from __future__ import annotations

import json

import pytest
import torch

from library.optimizers.registry import OPTIMIZERS
from tests.conftest import ROOT
from tests.quick import quick, slow
from tests.training.written import ROUNDED, distance, metadata, same, weights


def test_a_lora_comes_out(train, tmp_path):
    assert train() == 0
    tensors, facts = weights(tmp_path), metadata(tmp_path)
    ups = [tensor for key, tensor in tensors.items() if key.endswith("lora_up.weight")]
    assert all(up.abs().max() > 0 for up in ups), "an adapter was not trained"
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert facts["ss_steps"] == "4"
    assert facts["ss_network_dim"] == "4"
    assert facts["ss_num_train_images"] == "12"
    assert facts["ss_base_model_version"] == "sd_v1"
    assert facts["modelspec.architecture"] == "stable-diffusion-v1/lora"
    assert json.loads(facts["ss_dataset_dirs"]) == {"2_style": {"n_repeats": 2, "img_count": 6}}
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        *("test-metrics.jsonl", "test-run.json", "test.safetensors")
    ]


def test_the_same_seed_gives_the_same_bits_and_another_seed_others(train, tmp_path):
    for name, seed in (("a", "5"), ("b", "5"), ("c", "6")):
        assert train("--seed", seed, "--output_name", name, "--network_dropout", "0.1", "--shuffle_caption") == 0
    a, b, c = (weights(tmp_path, name) for name in "abc")
    assert same(a, b)
    assert not same(a, c)


def test_what_is_cached_changes_nothing(train, tmp_path):
    """Only the size of the batch that goes through the VAE differs, which moves the last bits."""
    common = ("--network_train_unet_only", "--max_train_steps", "2")
    assert train(*common, "--output_name", "cached", "--cache_text_encoder_outputs") == 0
    assert train(*common, "--output_name", "fresh", "--no-cache_latents") == 0
    assert distance(weights(tmp_path, "cached"), weights(tmp_path, "fresh")) < ROUNDED


def test_workers_change_nothing(train, tmp_path):
    common = ("--no-cache_latents", "--flip_aug", "--shuffle_caption", "--max_train_steps", "3")
    assert train(*common, "--output_name", "none") == 0
    assert train(*common, "--output_name", "two", "--max_data_loader_n_workers", "2") == 0
    assert same(weights(tmp_path, "none"), weights(tmp_path, "two"))


def test_accumulation_is_a_larger_batch_in_pieces(train, tmp_path):
    """One step over three batches of two, against the same gradients averaged: SGD makes the mean visible."""
    common = ("--optimizer_type", "SGD", "--learning_rate", "1", "--max_grad_norm", "0", "--max_train_steps", "1")
    assert train(*common, "--output_name", "pieces", "--gradient_accumulation_steps", "3") == 0
    assert train(*common, "--output_name", "first") == 0
    pieces, first = weights(tmp_path, "pieces"), weights(tmp_path, "first")
    assert metadata(tmp_path, "pieces")["ss_gradient_accumulation_steps"] == "3"
    assert not same(pieces, first)
    # an epoch of 6 batches has 2 steps of 3
    assert metadata(tmp_path, "pieces")["ss_num_batches_per_epoch"] == "6"


def test_gradient_checkpointing_changes_memory_only(train, tmp_path):
    assert train("--output_name", "plain", "--max_train_steps", "2") == 0
    assert train("--output_name", "checkpointed", "--max_train_steps", "2", "--gradient_checkpointing") == 0
    assert distance(weights(tmp_path, "checkpointed"), weights(tmp_path, "plain")) < ROUNDED


@pytest.mark.parametrize(
    "words",
    [
        slow((("--mixed_precision", "bf16"),)),
        slow((("--mixed_precision", "bf16", "--full_bf16", "--save_precision", "bf16"),)),
        ("--mixed_precision", "fp16"),
        slow((("--mixed_precision", "fp16", "--full_fp16", "--optimizer_args", "eps=1e-4"),)),
        ("--optimizer_type", "CustomAdamW", "--use_orthogonal_grad", "--optim_bits", "32"),
        slow((("--network_train_unet_only",),)),
        ("--network_train_text_encoder_only",),
        slow((("--min_snr_gamma", "5", "--scale_weight_norms", "1"),)),
        ("--network_args", "conv_dim=2", "conv_alpha=1", "rank_dropout=0.1", "module_dropout=0.1"),
        slow((("--clip_skip", "2", "--max_token_length", "150", "--vae_batch_size", "4"),)),
        ("--enable_bucket", "--min_bucket_reso", "32", "--max_bucket_reso", "96", "--bucket_reso_steps", "16"),
        slow((("--lr_scheduler", "cosine", "--lr_warmup_steps", "50%"),)),
    ],
    ids=" ".join,
)
def test_settings_train(train, tmp_path, words):
    assert train(*words, "--max_train_steps", "2") == 0
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path).values())


@pytest.mark.parametrize("name", quick(OPTIMIZERS, "AdamW8bit", "Adafactor", "DAdaptation"))
def test_every_optimizer_trains(train, tmp_path, name):
    rate = "1" if name.startswith(("DAdapt", "Prodigy")) else "1e-3"
    steps = "8" if name == "RAdamScheduleFree" else "3"  # it only counts in its first steps
    assert train("--optimizer_type", name, "--learning_rate", rate, "--max_train_steps", steps) == 0
    ups = [tensor for key, tensor in weights(tmp_path).items() if key.endswith("lora_up.weight")]
    assert all(up.isfinite().all() for up in ups)
    assert any(up.abs().max() > 0 for up in ups)


def test_full_fp16_refuses_an_eps_that_is_zero_there(train, capsys):
    assert train("--mixed_precision", "fp16", "--full_fp16") == 2
    assert "eps=1e-4" in capsys.readouterr().err


def test_files_are_named_and_kept_as_in_kohya(train, tmp_path):
    assert train("--max_train_epochs", "4", "--save_every_n_epochs", "1", "--save_last_n_epochs", "2") == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "test-000002.safetensors",
        "test-000003.safetensors",
        "test-metrics.jsonl",
        "test-run.json",
        "test.safetensors",
    ]
    assert train("--output_name", "s", "--save_every_n_steps", "2") == 0
    assert (tmp_path / "out" / "s-step00000002.safetensors").exists()
    assert metadata(tmp_path, "s-step00000002")["ss_steps"] == "2"


def test_an_output_that_exists_stops_the_run_before_it_starts(train, tmp_path, capsys):
    assert train() == 0
    before = (tmp_path / "out" / "test.safetensors").read_bytes()
    capsys.readouterr()
    assert train() == 2
    message = capsys.readouterr().err
    assert "test.safetensors" in message
    assert "--overwrite" in message
    assert "--output_name" in message
    assert (tmp_path / "out" / "test.safetensors").read_bytes() == before
    assert train("--overwrite") == 0


def test_a_picture_that_exists_counts_as_well(train, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "test-loss.png").write_text("mine")
    assert train("--loss_plot") == 2
    assert "test-loss.png" in capsys.readouterr().err
    assert (tmp_path / "out" / "test-loss.png").read_text() == "mine"


@pytest.mark.parametrize("precision", [(), slow((("--mixed_precision", "bf16"),))], ids=["fp32", "bf16"])
def test_prompts_are_drawn_without_and_with_the_lora(train, tmp_path, precision):
    from PIL import Image

    words = ("--loss_plot", "--compare_prompts", "emoji of cat", "emoji of dog", "--compare_steps", "2")
    assert train(*words, "--network_train_unet_only", "--cache_text_encoder_outputs", *precision) == 0
    for name in ("test-loss.png", "test-compare.png"):
        with Image.open(tmp_path / "out" / name) as image:
            assert min(image.size) > 300
            assert len(image.convert("RGB").getcolors(1 << 24)) > 100


def test_training_goes_on_from_a_file(train, tmp_path):
    assert train("--output_name", "first") == 0
    start = ("--network_weights", str(tmp_path / "out" / "first.safetensors"), "--dim_from_weights")
    assert train("--output_name", "second", *start, "--network_dim", "16", "--learning_rate", "0.0000001") == 0
    first, second = weights(tmp_path, "first"), weights(tmp_path, "second")
    for key in first:
        torch.testing.assert_close(first[key], second[key], rtol=0, atol=1e-5)


def test_regularisation_images_weigh_what_they_should(train, tmp_path, image_folder):
    """With a weight of 0, their share of the gradient is gone: other images, the same result."""
    import shutil

    for name in ("reg1", "reg2"):
        shutil.copytree(image_folder / "2_style", tmp_path / name / "1_thing")
    for path in (tmp_path / "reg2" / "1_thing").glob("*.txt"):
        path.write_text("something else")
    for name in ("reg1", "reg2"):
        words = ("--reg_data_dir", str(tmp_path / name), "--prior_loss_weight", "0", "--output_name", name)
        assert train(*words) == 0
    assert same(weights(tmp_path, "reg1"), weights(tmp_path, "reg2"))


def test_lycoris_trains_by_kohyas_protocol(train, tmp_path):
    """A third party's network module, the real package."""
    words = ("--network_module", "lycoris.kohya", "--network_args", "algo=loha", "conv_dim=2", "conv_alpha=1")
    assert train(*words, "preset=attn-mlp") == 0
    tensors = weights(tmp_path)
    assert any("hada_w1_a" in key for key in tensors)
    assert metadata(tmp_path)["ss_network_module"] == "lycoris.kohya"
    assert json.loads(metadata(tmp_path)["ss_network_args"])["algo"] == "loha"
    # its initial weights come from torch's stream, which must be the seed's, on every process
    torch.manual_seed(5)
    assert train(*words, "preset=attn-mlp", "--output_name", "again") == 0
    assert same(tensors, weights(tmp_path, "again"))


def test_lycoris_needs_no_other_words_than_in_kohyas_scripts(train, tmp_path, capsys):
    """Its default preset, with LyCORIS 4.1.3, has the layers that LyCORIS 3.4.0 has (tests/networks/golden, which that
    version made on this model), among them the time embedding, which 4.1 finds twice; and every one of them learns."""
    words = ("--network_module", "lycoris.kohya", "--network_args", "algo=lora", "conv_dim=4", "conv_alpha=1")
    assert train(*words, "--network_dim", "8") == 0
    tensors = weights(tmp_path)
    golden = json.loads((ROOT / "tests" / "networks" / "golden" / "lycoris_3.4_full.json").read_text())
    downs = {key.partition(".")[0]: list(t.shape) for key, t in tensors.items() if key.endswith("lora_down.weight")}
    assert downs == golden
    assert len(golden) == 200
    assert all(tensor.any() for key, tensor in tensors.items() if key.endswith("lora_up.weight"))
    assert "without effect" not in capsys.readouterr().err


def test_settings_of_convolutions_that_a_preset_leaves_out_are_told(train, capsys):
    words = ("--network_module", "lycoris.kohya", "--max_train_steps", "1", "--network_args", "algo=loha", "conv_dim=2")
    assert train(*words, "conv_alpha=1", "use_tucker=True", "preset=attn-mlp") == 0
    said = capsys.readouterr().err
    assert "--network_args: conv_dim, conv_alpha, use_tucker without effect" in said
    assert "no convolution larger than 1 × 1 (preset=attn-mlp)" in said


def test_what_a_third_party_refuses_is_the_users_to_mend(train, capsys):
    assert train("--network_module", "lycoris.kohya", "--network_args", "algo=lorra") == 2
    assert "--network_module lycoris.kohya refuses these settings: KeyError('lorra')" in capsys.readouterr().err


def test_tensorboard_has_correct_names(train, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    words = ("--logging_dir", str(tmp_path / "logs"), "--log_with", "tensorboard", "--log_prefix", "my-")
    assert train(*words, "--text_encoder_lr", "5e-4", "--no-monitoring") == 0
    (event,) = (tmp_path / "logs").rglob("events*")
    assert event.relative_to(tmp_path / "logs").parts[0].startswith("my-")
    events = EventAccumulator(str(event.parent))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {"loss/current", "loss/average", "epoch", "lr/unet", "lr/text_encoder"}
    assert [e.step for e in events.Scalars("loss/current")] == [1, 2, 3, 4]
    assert events.Scalars("lr/text_encoder")[0].value == pytest.approx(5e-4)
    assert events.Scalars("lr/unet")[0].value == pytest.approx(1e-3)
