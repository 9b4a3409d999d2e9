"""The command lines that are measured: each case is a folder (`world.py`) and the commands that are run in it.

`make test` compares those that are `fast`. A case is a part of its expectation: one that is changed is recorded anew.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

BASES = ("quickstart", "sd2", "sdxl", "v", "vae")  # quickstart's own, and those of `bases.py`

# Four small steps on the quickstart's base; what a case says comes behind it, so it wins.
TRAIN = (
    "train_network --pretrained_model_name_or_path {quickstart} --train_data_dir data --caption_extension .txt "
    "--resolution 32 --train_batch_size 2 --output_dir out --output_name lora --network_dim 4 --network_alpha 2 "
    "--learning_rate 1e-3 --max_train_steps 4 --seed 1 --cache_latents --max_data_loader_n_workers 0 --no-loss_plot "
    "--no-report"
)
SDXL = "--pretrained_model_name_or_path {sdxl} --max_train_steps 3"
UNET = "--network_train_unet_only"
TEXTS = f"{UNET} --cache_text_encoder_outputs"
STATE = "--save_state_on_train_end"
CONFIG = "--train_data_dir= --dataset_config data.json"


@dataclass(frozen=True)
class Case:
    """A folder as one of `WORLDS` makes it, and commands: what stands behind `python -m`, with {base} for a base.

    compiler: it needs one, for CustomAdamW's kernel. package: that it needs. processes: started by torchrun, with
    `environment`, if there are more than one.
    """

    name: str
    commands: tuple[str, ...]
    data: str = "plain"
    fast: bool = False
    compiler: bool = False
    package: str = ""
    processes: int = 1
    environment: tuple[tuple[str, str], ...] = ()

    @property
    def bases(self) -> list[str]:
        """The bases that it names."""
        return [name for name in BASES if any(f"{{{name}}}" in command for command in self.commands)]

    def words(self, number: int, bases: Mapping[str, str]) -> list[str]:
        """Those of one of its commands; `bases`: the folders of the bases."""
        return shlex.split(self.commands[number].format_map(bases))


def _case(name: str, *commands: str, **details: object) -> Case:
    """A command that begins with a dash goes on from `TRAIN`."""
    whole = tuple(f"{TRAIN} {command}" if command.startswith("-") else command for command in commands)
    return Case(name, whole, **details)  # type: ignore[arg-type]


def _optimizers() -> Iterator[Case]:
    yield _case("adamw", f"--save_every_n_steps 2 {STATE} --lr_scheduler cosine --lr_warmup_steps 2")
    own = "--optimizer_type CustomAdamW --optimizer_args min_8bit_size=128 weight_decay=0.1 --network_dim 16"
    yield _case("custom_adamw", f"{own} --wd_transition_steps 2 {STATE}", compiler=True, fast=True)
    yield _case(
        "custom_adamw_techniques",
        "--optimizer_type CustomAdamW --optim_bits 32 --use_orthogonal_grad --use_tam --use_alora "
        f"--use_adopt_stability --alora_ratio 3 --tam_beta 0.8 --spd_lambda 0.1 {STATE}",
        compiler=True,
    )
    yield _case(
        "custom_adamw_bf16",
        f"{own} --use_grams --no-use_cautious --no-use_agr --use_tam --full_bf16 --mixed_precision bf16 {STATE} "
        "--max_train_steps 3",
        compiler=True,
    )
    yield _case("custom_adamw_presets", *(f"{own} --preset {p} --output_name {p}" for p in ("origin", "aggressive")))
    without = "spd_anchor=initial"  # the kernel does not know it: the batched tier
    yield _case("custom_adamw_batched", f"{own} {STATE}".replace("weight_decay", f"{without} weight_decay"))
    yield _case("adamw_8_bits", f"--optimizer_type AdamW8bit --network_dim 32 {STATE}")
    yield _case(
        "lion", "--optimizer_type Lion --lr_scheduler polynomial --lr_scheduler_power 2", package="lion_pytorch"
    )
    yield _case(
        "prodigy",
        "--optimizer_type Prodigy --optimizer_args decouple=True weight_decay=0.01 d_coef=2 use_bias_correction=True "
        "--learning_rate 1 --lr_scheduler cosine",
        package="prodigyopt",
    )
    yield _case("adafactor", f"--optimizer_type Adafactor --lr_scheduler adafactor:1e-3 {STATE}")
    yield _case(
        "adafactor_fixed_rate",
        "--optimizer_type Adafactor --optimizer_args relative_step=False scale_parameter=False "
        "--lr_scheduler constant_with_warmup --lr_warmup_steps 2",
    )
    yield _case(
        "schedule_free",
        f"--optimizer_type AdamWScheduleFree --optimizer_args warmup_steps=2 --save_every_n_steps 3 {STATE}",
        package="schedulefree",
    )
    yield _case("sgd", "--optimizer_type SGDNesterov --learning_rate 0.1 --max_grad_norm 0")
    yield _case("dadapt_adam", "--optimizer_type DAdaptAdam --learning_rate 1", package="dadaptation")
    yield _case("lion_8_bits", "--optimizer_type Lion8bit --network_dim 32")
    yield _case("any_class", "--optimizer_type torch.optim.NAdam --optimizer_args betas=0.8,0.95 weight_decay=0.1")


def _schedules() -> Iterator[Case]:
    rates = {
        "linear": "--lr_warmup_steps 0.2",
        "cosine_with_restarts": "--lr_scheduler_num_cycles 2 --lr_warmup_steps 1",
        "cosine_with_min_lr": "--lr_scheduler_min_lr_ratio 0.1 --lr_warmup_steps 20%",
        "inverse_sqrt": "--lr_scheduler_timescale 3",
        "warmup_stable_decay": "--lr_warmup_steps 1 --lr_decay_steps 2 --lr_scheduler_min_lr_ratio 0.2",
        "piecewise_constant": "--lr_scheduler_args step_rules=1:2,0.1:4,0.01",
        "exponential": "--lr_scheduler_args gamma=0.8",
        "step": "--lr_scheduler_args step_size=2 gamma=0.5",
        "rex": "--text_encoder_lr 1e-4",
    }
    named = (f"--lr_scheduler {name} --output_name {name} {words}" for name, words in rates.items())
    classes = f"{UNET} --lr_scheduler_type CosineAnnealingLR --lr_scheduler_args T_max=4 eta_min=1e-5 {STATE}"
    yield _case("rate_schedules", *named, classes)
    decays = {
        "exponential": "--wd_transition_steps 2 --wd_decay_factor 0.5 --wd_max_progress inf",
        "cosine": "--wd_transition_steps 20% --wd_min_ratio 0.2",
        "sigmoid": "--wd_transition_steps 2",
        "linear": "--wd_transition_steps auto --task image_generation",
        "multi_stage": "--wd_stages 0:1.0,2:0.5,60%:0.2 --wd_interpolate",
        "adaptive": "--wd_flat window=4 slope=1 earliest=4 --max_train_steps 10",
    }
    common = f"{UNET} --optimizer_type AdamW --optimizer_args weight_decay=0.5 --dynamic_weight_decay"
    yield _case(
        "decay_schedules",
        *(f"{common} --wd_schedule {name} --output_name {name} {words}" for name, words in decays.items()),
    )
    yield _case(
        "adaptive_decay",
        f"{UNET} --optimizer_type CustomAdamW --wd_schedule adaptive --wd_flat window=4 slope=1 earliest=4 "
        f"--max_train_steps 10 {STATE}",
        compiler=True,
    )


def _objectives() -> Iterator[Case]:
    yield _case(
        "objective",
        "--min_snr_gamma 5 --noise_offset 0.1 --adaptive_noise_scale 0.05 --multires_noise_iterations 6 "
        "--ip_noise_gamma 0.1 --loss_type huber --huber_schedule snr --huber_c 0.2 --min_timestep 10 "
        "--max_timestep 900 --timestep_sampling sigmoid --sigmoid_scale 1.5",
        fast=True,
    )
    yield _case(
        "objective_random",
        "--debiased_estimation_loss --noise_offset 0.1 --noise_offset_random_strength --ip_noise_gamma 0.1 "
        "--ip_noise_gamma_random_strength --loss_type smooth_l1 --huber_schedule exponential --huber_scale 1.5 "
        "--weighting_scheme logit_normal --logit_mean 0.5 --logit_std 1.5",
    )
    more = "--weighting_scheme mode --mode_scale 1.2 --training_shift 2"
    yield _case("objective_l1", f"--loss_type l1 --v_pred_like_loss 0.5 {more}")
    coarse = "--multires_noise_iterations 8 --multires_noise_discount 0.5"
    yield _case("objective_huber", f"--loss_type huber --huber_schedule constant {coarse}")
    v = "--zero_terminal_snr --scale_v_pred_loss_like_noise_pred"
    sd2 = "--pretrained_model_name_or_path {sd2} --v2 --v_parameterization"
    yield _case("sd2_v", f"{sd2} {v} --min_snr_gamma 5 --text_encoder_lr 5e-4")
    drawn = "--compare_prompts 'emoji of cat' --compare_steps 2"
    yield _case("sd15_v", f"--pretrained_model_name_or_path {{v}} {v} --debiased_estimation_loss {drawn}")


def _data() -> Iterator[Case]:
    captions = (
        "--shuffle_caption --keep_tokens_separator '|||' --secondary_separator ';;;' --enable_wildcard "
        "--caption_prefix art, --caption_suffix ', end' --caption_tag_dropout_rate 0.2 --caption_dropout_rate 0.2 "
        "--token_warmup_min 2 --token_warmup_step 3 --weighted_captions --max_token_length 150 --clip_skip 2"
    )
    yield _case("captions", captions, data="tags", fast=True)
    dropped = "--caption_dropout_every_n_epochs 2 --keep_tokens 1 --shuffle_caption --max_train_epochs 2"
    yield _case("captions_dropped", dropped, data="tags")
    buckets = "--resolution 64 --enable_bucket --min_bucket_reso 32 --max_bucket_reso 128 --bucket_reso_steps 16"
    yield _case("buckets", f"{buckets} --flip_aug", data="shapes")
    small = "--bucket_no_upscale --resize_interpolation bicubic --max_train_epochs 1"
    yield _case("buckets_small", f"{buckets} {small}", data="shapes")
    crops = "--no-cache_latents --random_crop --color_aug --flip_aug --max_data_loader_n_workers 2"
    yield _case("crops", crops, data="shapes")
    yield _case("masks", f"{CONFIG} --masked_loss", data="masks")
    yield _case("alpha_masks", "--alpha_mask --no-cache_latents", data="masks")
    own = f"{CONFIG} --resolution= --train_batch_size="
    yield _case("several_folders", f"{own} --prior_loss_weight 0.5", data="several")
    regularised = "--reg_data_dir reg --prior_loss_weight 0.3 --gradient_accumulation_steps 2"
    yield _case("regularisation", regularised, data="regularised")
    yield _case("preservation", f"{own} --network_dropout 0.1", data="preserved")
    yield _case("metadata_file", "--in_json meta.json --shuffle_caption --caption_extension=", data="described")
    disk = f"{TEXTS}_to_disk --no-cache_latents --cache_latents_to_disk"
    yield _case("disk_caches", f"{disk} --flip_aug", f"{disk} --flip_aug --output_name again")
    kept = f"{disk} --cache_dir kept"
    yield _case("kept_caches", kept, f"{kept} --skip_cache_check --output_name again")
    workers = "--max_data_loader_n_workers 2 --persistent_data_loader_workers --max_train_epochs 2"
    yield _case("memory_caches", f"{TEXTS} --text_encoder_batch_size 4 --vae_batch_size 3 {workers}")


def _families() -> Iterator[Case]:
    yield _case("sdxl", f"{SDXL} --text_encoder_lr 1e-3 5e-4 --max_token_length 150 {STATE}", fast=True)
    small = "--mixed_precision bf16 --gradient_checkpointing --save_precision bf16"
    yield _case("sdxl_bf16", f"{SDXL} {TEXTS} {small} --full_bf16")
    eight = f"{SDXL} {TEXTS} {small} --fp8_base --gradient_accumulation_steps 2 --max_train_steps 2"
    yield _case("sdxl_float8", eight)
    command = TRAIN.replace("train_network", "sdxl_train_network")
    yield _case("sdxl_command", f"{command} {SDXL} --preset sdxl_style --resolution 64 --no-enable_bucket")
    resumed = f"{SDXL} --network_dropout 0.1 --flip_aug --save_every_n_steps 2 --save_state"
    yield _case("sdxl_resumed", resumed, f"{resumed} --overwrite --resume out/lora-step00000002-state")
    blocks = f"conv_dim=2 block_dims={','.join(['0'] * 10 + ['2'] * 13)} down_lr_weight=linear"
    yield _case("sdxl_blocks", f"{SDXL} --optimizer_type CustomAdamW --network_args {blocks}", compiler=True)
    encoders = "--network_train_text_encoder_only --weighted_captions --validation_split 0.2"
    yield _case("sdxl_text_encoders", f"{SDXL} {encoders}", data="tags")
    yield _case(
        "sd2_text_encoder",
        "--pretrained_model_name_or_path {sd2} --network_train_text_encoder_only --max_token_length 225 "
        "--lr_layer_decay 0.9",
    )
    yield _case("other_vae", "--vae {vae}/vae.safetensors --clip_skip 2 --vae_batch_size 2")


def _networks() -> Iterator[Case]:
    blocks = ",".join(str(2 + number % 3) for number in range(25))
    yield _case(
        "ranks_and_rates",
        f"--network_args conv_dim=2 conv_alpha=1 block_dims={blocks} network_reg_lrs=.*attn2.*=2e-3 "
        "loraplus_lr_ratio=4 rank_dropout=0.1 module_dropout=0.1 --network_dropout 0.1 --scale_weight_norms 0.02 "
        "--unet_lr 5e-4",
    )
    yield _case(
        "rates_by_block",
        "--network_args down_lr_weight=cosine mid_lr_weight=0.5 up_lr_weight=reverse_linear "
        "block_lr_zero_threshold=0.1 loraplus_unet_lr_ratio=2 --lr_layer_decay 0.9 --optimizer_type CustomAdamW",
        compiler=True,
    )
    merged = "--base_weights out/first.safetensors out/second.safetensors --base_weights_multiplier 0.5 -1"
    yield _case(
        "started_from_files",
        f"--output_name first --network_dim 2 {UNET} --max_train_steps 2",
        "--output_name second --network_weights out/first.safetensors --dim_from_weights --network_dim= "
        "--max_train_steps 2",
        f"--output_name third {merged} --max_train_steps 2",
    )
    yield _case(
        "converted",
        "--max_train_steps 2 --save_precision fp16",
        "networks.tools.convert out/lora.safetensors out/diffusers.safetensors --to diffusers",
        "networks.tools.convert out/diffusers.safetensors out/back.safetensors --to kohya",
        "--output_name on --network_weights out/diffusers.safetensors --max_train_steps 2",
    )
    lycoris = "--network_module lycoris.kohya --network_args preset=attn-mlp"
    yield _case("lokr", f"{lycoris} algo=lokr factor=4 {STATE}", package="lycoris")
    yield _case("loha", f"{lycoris} algo=loha --scale_weight_norms 1", package="lycoris")
    yield _case(
        "text_encoder_only", "--network_train_text_encoder_only --network_alpha 0 --full_bf16 --mixed_precision bf16"
    )


def _precision() -> Iterator[Case]:
    small = "--fp8_base --full_bf16 --gradient_checkpointing --gradient_accumulation_steps 2 --max_train_steps 2"
    yield _case("small", f"--mixed_precision bf16 {small}")
    yield _case("bf16", "--mixed_precision bf16 --no_half_vae --save_precision bf16 --max_grad_norm 0.01")


def _runs() -> Iterator[Case]:
    stop = "--optimizer_type tests.yardstick.stumbling.CtrlC"
    stop += f" --network_dropout 0.2 --shuffle_caption --flip_aug --lr_scheduler cosine --ema_decay 0.9 {STATE}"
    yield _case("stopped_and_resumed", stop, f"{stop} --resume latest", fast=True)
    longer = (
        "--optimizer_type CustomAdamW --optimizer_args min_8bit_size=128 --network_dim 16 --save_state "
        "--save_every_n_epochs 1"
    )
    yield _case(
        "prolonged",
        f"{longer} --max_train_epochs 1",
        f"{longer} --max_train_epochs 2 --resume latest",
        f"{longer} --max_train_epochs 3 --resume latest --learning_rate 1e-4",
        f"{longer} --max_train_epochs 3 --resume latest --learning_rate 1e-4 --resume_anyway",
        compiler=True,
    )
    yield _case(
        "validated",
        "--validation_split 0.3 --validation_seed 5 --ema_decay 0.9 --early_stopping_patience 1 "
        "--early_stopping_threshold 0.5 --max_train_steps 8 --validate_every_n_steps 2 --max_validation_steps 1 "
        f"{STATE}",
        data="held_out",
        fast=True,
    )
    epochs = "--validation_split 0.2 --ema_decay 0.5 --ema_for save --max_train_epochs 2 --validate_every_n_epochs 1"
    yield _case("validated_by_epochs", epochs, data="held_out")
    accident = f"--optimizer_type tests.yardstick.stumbling.NotANumber {STATE}"
    back = "--on_divergence rollback --save_every_n_steps 2 --lr_scheduler linear"
    yield _case("rolled_back", f"{accident} {back} --max_train_steps 5")
    yield _case("diverged", accident)
    yield _case("skipped", f"{accident} --on_divergence skip --divergence_limit 2 --max_train_steps 8")
    kept = "--save_every_n_steps 1 --save_last_n_steps 2 --save_state --save_last_n_steps_state 1"
    said = (
        "--metadata_title 'A title' --metadata_author me --metadata_tags a,b --training_comment 'a comment' "
        "--metadata_trigger_phrase emoji --metadata_license MIT"
    )
    yield _case(
        "files",
        f"--save_model_as ckpt {kept} --max_train_steps 4",
        "--save_model_as pt --output_name bare --no-monitoring --max_train_steps 1",
        "--output_name little --no_metadata --max_train_steps 1",
        f"--output_name facts {said} --max_train_epochs 2 --save_n_epoch_ratio 2 --save_precision fp16",
        "--output_name facts",
    )
    logs = "--logging_dir logs --log_with tensorboard --log_config --log_prefix a_ --console_log_file out/log.txt"
    yield _case("logs", f"{logs} --monitor_every_n_steps 2 --report --loss_plot", package="tensorboard")
    prompts = "--sample_prompts prompts.txt --sample_every_n_steps 2 --max_train_steps 2"
    compared = "--compare_prompts 'emoji of cat' --compare_steps 1"
    yield _case("samples", f"{prompts} {compared}", data="prompted")
    more = "--sample_at_first --sample_sampler dpmsolver++ --report"
    yield _case("sdxl_samples", f"{SDXL} {TEXTS} {prompts} {more}", data="prompted")
    small = "--dataset_config= --train_data_dir data --resolution 64 --caption_extension .txt --max_train_epochs 1"
    yield _case(
        "quickstart",
        "train_network --config_file {quickstart}/../../configs/quickstart.toml --output_dir out --compare_prompts= "
        f"--pretrained_model_name_or_path {{quickstart}} {small} --max_data_loader_n_workers 0",
    )
    yield _case(
        "from_file",
        "train_network --config_file settings.toml --output_name other --max_train_steps 2",
        "train_network --config_file written.toml --output_config --pretrained_model_name_or_path x --output_dir out "
        "--learning_rate 1e-4 --network_args conv_dim=4",
        data="settings",
    )


def _guidance() -> Iterator[Case]:
    planned = "--dry_run --save_every_n_steps 2 --save_state --optimizer_type CustomAdamW"
    yield _case("dry_run", f"--pretrained_model_name_or_path {{sd2}} {planned}", compiler=True)
    small = "--fp8_base --mixed_precision bf16 --gradient_checkpointing"
    yield _case(
        "dry_runs",
        f"--dry_run {small}",
        "--dry_run=measure --compare_prompts x --report --lr_layer_decay 0.9 --validation_split 0.2 "
        "--cache_latents_to_disk --optimizer_type AdamW8bit",
    )
    yield _case("recommended", "--recommend", f"--recommend {SDXL} --output_name xl", fast=True)
    yield _case("rate_found", f"--find_lr --find_lr_start 1e-5 --find_lr_end 1 --find_lr_steps 20 {UNET}")
    sheet = "--debug_dataset --enable_bucket --min_bucket_reso 32 --bucket_reso_steps 16 --flip_aug"
    yield _case("contact_sheet", sheet, data="shapes", fast=True)
    yield _case("told", "train_network --list_presets", "train_network --help", fast=True)
    presets = ("sd15_style", "sd15_character", "sd15_concept", "default", "conservative")
    small = "--resolution 32 --no-enable_bucket --max_train_steps 2"
    yield _case("presets", *(f"--preset {name} --output_name {name} {small}" for name in presets), compiler=True)
    yield _case(
        "refused",
        "--learning_rat 1e-4",
        "--optimizer_type AdmW",
        "--lr_scheduler cosin --network_dim x",
        "--train_data_dir nowhere",
        "--zero_terminal_snr",
        "--pretrained_model_name_or_path data",
        "--network_args conv_dmi=4",
        "--network_module networks.oft_flux",
        "--optimizer_args betta=0.9",
        "--xformers --lowram --cache_text_encoder_outputs",
        "--preset origin --optimizer_type AdamW",
        fast=True,
    )


def _several_processes() -> Iterator[Case]:
    common = f"--train_batch_size 1 --lr_scheduler cosine --shuffle_caption --clip_skip 2 {STATE}"
    yield _case("two_processes", f"{common} --validation_split 0.2 --ema_decay 0.9", processes=2)
    yield _case(
        "sharded",
        f"{common} --gradient_checkpointing --validation_split 0.2",
        processes=2,
        environment=(("ACCELERATE_USE_FSDP", "true"),),
    )


CASES: dict[str, Case] = {
    case.name: case
    for group in (
        *(_optimizers, _schedules, _objectives, _data, _families, _networks, _precision, _runs, _guidance),
        _several_processes,
    )
    for case in group()
}
