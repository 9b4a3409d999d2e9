"""Options without what they are about are said to have no effect."""

from __future__ import annotations

from pathlib import Path

import pytest

from library.config.idle import warn_of_idle_options
from library.config.options import Options
from library.config.parser import parse
from library.errors import UserError

REQUIRED = ("--pretrained_model_name_or_path", "x", "--output_dir", "out", "--train_data_dir", "data")


@pytest.mark.parametrize(
    ("idle", "works"),
    [
        ("--save_last_n_steps 3", "--save_every_n_steps 1"),
        ("--save_last_n_epochs 3", "--save_n_epoch_ratio 2"),
        ("--save_last_n_steps_state 3", "--save_every_n_steps 1 --save_state"),
        ("--save_last_n_epochs_state 3", "--save_every_n_epochs 1 --save_state"),
        ("--divergence_limit 11", "--on_divergence rollback"),
        ("--compile_backend eager", "--compile"),
        ("--dynamo_backend eager", "--torch_compile"),
        ("--compile_mode max-autotune", "--torch_compile"),
        ("--compile_dynamic true", "--compile"),
        ("--compile_fullgraph", "--compile"),
        ("--compile_cache_size_limit 9", "--compile"),
        ("--compare_steps 9", "--compare_prompts x"),
        ("--base_weights_off_for_samples", "--base_weights a.safetensors"),
        ("--prior_loss_weight 0.5", "--reg_data_dir r"),
        ("--dataset_repeats 3", "--in_json m.json"),
        ("--max_bucket_reso 2048", "--enable_bucket"),
        ("--bucket_no_upscale", "--dataset_config d.toml"),
        ("--text_encoder_batch_size 3", "--cache_text_encoder_outputs --network_train_unet_only"),
        ("--max_train_steps 3 --max_train_epochs 1", "--max_train_epochs 0"),
        ("--network_alpha 8 --network_weights x --dim_from_weights", "--no-dim_from_weights"),
        ("--metadata_title x --save_model_as pt", "--save_model_as safetensors"),
        ("--training_comment x --save_model_as ckpt", "--save_model_as safetensors"),
        ("--resume_anyway", "--resume latest"),
        ("--network_dim 8 --network_weights x --dim_from_weights", "--network_weights x --no-dim_from_weights"),
    ],
)
def test_what_has_no_effect_is_said(idle: str, works: str, caplog: pytest.LogCaptureFixture) -> None:
    warn_of_idle_options(parse([*REQUIRED, *idle.split(), *works.split()]))
    assert caplog.messages == []
    warn_of_idle_options(parse([*REQUIRED, *idle.split()]))
    (message,) = caplog.messages
    assert message.startswith(f"command line: {idle.split()[0]}: has no effect with")


# What kohya's scripts never look at, in the words of its users, and what makes it matter
IGNORED = {
    "--lr_scheduler cosine --lr_scheduler_num_cycles 0": "--lr_scheduler cosine_with_restarts",
    "--lr_scheduler_power -1": "--lr_scheduler polynomial",
    "--lr_scheduler_timescale -5": "--lr_scheduler inverse_sqrt",
    "--lr_scheduler_min_lr_ratio 10": "--lr_scheduler cosine_with_min_lr",
    "--lr_decay_steps 150%": "--lr_scheduler warmup_stable_decay",
    "--lr_scheduler_type X --lr_scheduler_num_cycles -1": "--lr_scheduler_type= --lr_scheduler cosine_with_restarts",
    "--huber_c -0.1": "--loss_type huber",
    "--huber_c 0": "--loss_type smooth_l1",
    "--huber_scale 0": "--loss_type huber --huber_schedule constant",
    "--multires_noise_discount -1": "--multires_noise_iterations 6",
    "--logit_std 0": "--weighting_scheme logit_normal",
    "--mode_scale 3": "--weighting_scheme mode",
    "--sigmoid_scale -1": "--timestep_sampling sigmoid",
    "--prior_loss_weight -1": "--reg_data_dir r",
    "--dataset_repeats 0": "--in_json m.json",
    "--min_bucket_reso 0": "--enable_bucket",
    "--max_bucket_reso 99999": "--enable_bucket",
    "--bucket_reso_steps -64": "--enable_bucket",
    "--enable_bucket --face_crop_aug_range 0": "--no-enable_bucket",
    "--token_warmup_min -1": "--token_warmup_step 5",
    "--max_train_epochs 1 --max_train_steps -1": "--max_train_epochs 0",
    "--save_last_n_steps -1": "--save_every_n_steps 5",
    "--save_last_n_epochs_state -1": "--save_every_n_epochs 1 --save_state",
    "--sample_every_n_steps -1": "--sample_prompts x.txt",
    "--validate_every_n_steps -1": "--validation_split 0.1",
    "--max_validation_steps -1": "--validation_split 0.1",
    "--early_stopping_threshold 2": "--early_stopping_patience 3",
    "--network_train_unet_only --text_encoder_lr -1": "--no-network_train_unet_only",
    "--network_train_text_encoder_only --unet_lr -1": "--no-network_train_text_encoder_only",
    "--network_weights x --dim_from_weights --network_dim 0": "--no-dim_from_weights",
    "--network_weights x --dim_from_weights --network_alpha -1": "--no-dim_from_weights",
    "--compare_steps 0": "--compare_prompts x",
    "--divergence_limit 0": "--on_divergence skip",
    "--no-dynamic_weight_decay --wd_decay_factor 2": "--dynamic_weight_decay",
    "--wd_schedule cosine --wd_decay_factor 2": "--wd_schedule exponential",
    "--wd_schedule multi_stage --wd_transition_steps 0": "--wd_schedule linear",
    "--wd_schedule multi_stage --wd_max_progress -1": "--wd_schedule linear",
}


def _warned(options: Options, caplog: pytest.LogCaptureFixture) -> list[str]:
    """All that is said about options without effect before training."""
    warn_of_idle_options(options)
    said = [*options.schedule.without_effect(), *options.objective.without_effect()]
    return [message for message in [*caplog.messages, *said] if "has no effect" in message]


@pytest.mark.parametrize("words", IGNORED)
def test_a_number_that_is_not_used_may_be_out_of_range(words: str, caplog: pytest.LogCaptureFixture) -> None:
    name = [word for word in words.split() if word.startswith("--")][-1]
    (message,) = _warned(parse([*REQUIRED, *words.split()]), caplog)
    assert name in message
    with pytest.raises(UserError, match=name):
        parse([*REQUIRED, *words.split(), *IGNORED[words].split()])


def test_of_two_numbers_only_the_one_in_force_counts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "x.toml").write_text("min_bucket_reso = -1\nlr_scheduler_power = -2\ntrain_batch_size = 0\n")
    words = [*REQUIRED, "--config_file", str(tmp_path / "x.toml"), "--train_batch_size", "2"]
    assert parse([*words, "--min_bucket_reso", "128", "--enable_bucket"]).data.min_bucket_reso == 128
    (message,) = caplog.messages
    assert message.endswith(
        "x.toml: lr_scheduler_power: must be at least 0, not -2, but it has no effect with --lr_scheduler constant: it "
        "is for polynomial"
    )
    with pytest.raises(UserError, match=r"^command line: --seed: .*\n.*x\.toml: min_bucket_reso: must be at least"):
        parse([*words, "--seed", "x"])
    with pytest.raises(UserError, match=r"(?s)leave nothing to train\n.*x\.toml: min_bucket_reso: must be at least 1"):
        parse([*words, "--network_train_unet_only", "--network_train_text_encoder_only"])
    with pytest.raises(UserError, match="min_bucket_reso: must be at least 1"):
        parse(["--min_bucket_reso=-1", "--config_file", str(tmp_path / "y"), "--output_config"])


def test_the_rank_of_others_networks_has_no_bound() -> None:
    """LyCORIS' LoKr has whole matrices where the rank is large enough; its users write 100000."""
    words = ("--network_module", "lycoris.kohya", "--network_args", "algo=lokr", "--network_dim", "10000000000000")
    assert parse([*REQUIRED, *words]).network.network_dim == 10**13
    with pytest.raises(UserError, match="--network_dim 100000: at most 16384"):
        parse([*REQUIRED, "--network_dim", "100000"])


def test_zero_asks_for_nothing(caplog: pytest.LogCaptureFixture) -> None:
    warn_of_idle_options(parse([*REQUIRED, "--save_last_n_steps", "0", "--no-resume_anyway"]))
    assert caplog.messages == []
