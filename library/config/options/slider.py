"""The options of sliders, which are trained on prompts without images: kohya's names and meanings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from library.config.fields import option
from library.errors import UserError

_ABOUT_IMAGES = (
    *("train_data_dir", "reg_data_dir", "in_json", "dataset_config", "resolutions", "alpha_mask", "masked_loss"),
    *("balance", "reg_share"),
    *("validation_split", "validation_fold", "validation_dir", "validation_gap", "validation_group"),
    *("early_stopping_patience", "forgetting_dir", "distillation_weight", "ewc_data"),
    *("check_data", "debug_dataset", "recommend", "find_lr"),
)
"""Options that ask for something that only images can give."""

IDLE = {
    "resolution": ": --prompts_file has the resolution of each prompt",
    "train_batch_size": ": --prompts_file has the batch size of each prompt",
    **dict.fromkeys(
        (
            *("enable_bucket", "min_bucket_reso", "max_bucket_reso", "bucket_reso_steps", "bucket_no_upscale"),
            *("skip_image_resolution", "caption_extension", "caption_separator", "shuffle_caption", "keep_tokens"),
            *("keep_tokens_separator", "secondary_separator", "enable_wildcard", "caption_prefix", "caption_suffix"),
            *("caption_dropout_rate", "caption_dropout_every_n_epochs", "caption_tag_dropout_rate"),
            *("token_warmup_min", "token_warmup_step", "flip_aug", "color_aug", "random_crop", "face_crop_aug_range"),
            *("resize_interpolation", "dataset_repeats", "prior_loss_weight", "cache_latents", "cache_latents_to_disk"),
            *("vae_batch_size", "cache_text_encoder_outputs_to_disk", "cache_dir", "skip_cache_check"),
            *("max_data_loader_n_workers", "persistent_data_loader_workers", "skip_bad_images"),
            *("validate_every_n_steps", "validate_every_n_epochs", "max_validation_steps", "validation_seed"),
        ),
        " with --prompts_file: there are no images",
    ),
    **dict.fromkeys(
        (
            *("min_timestep", "max_timestep", "timestep_sampling", "sigmoid_scale", "weighting_scheme", "logit_mean"),
            *("logit_std", "mode_scale", "training_shift"),
        ),
        " with --prompts_file: the noise levels are those of --max_denoising_steps",
    ),
    **dict.fromkeys(
        ("clip_l_dropout_rate", "clip_g_dropout_rate", "t5_dropout_rate"),
        " with --prompts_file: its prompts are always read whole",
    ),
    **dict.fromkeys(
        ("adaptive_noise_scale", "ip_noise_gamma", "ip_noise_gamma_random_strength"),
        " with --prompts_file: no noise is added to images",
    ),
}
"""Options without effect beside --prompts_file, each with the words that follow "has no effect"."""


@dataclass(frozen=True, kw_only=True)
class SliderOptions:
    """A slider, trained on prompts without images (LECO)"""

    prompts_file: str | None = option(
        None, help="train on the prompts of this TOML file instead of images: a slider, or a concept to erase"
    )
    max_denoising_steps: int = option(
        40,
        minimum=2,
        maximum=1000,
        help="denoising steps from noise to a picture, of which each training step makes a random number",
    )
    leco_denoise_guidance_scale: float = option(3.0, minimum=0, help="classifier-free guidance in these steps")
    slider_picture: bool = option(
        True,
        help="after training render the slider's prompts at the multipliers -2, -1, 0, 1 and 2, in one grid (ours)",
    )

    @property
    def is_trained(self) -> bool:
        """Whether the run is one without images."""
        return self.prompts_file is not None

    @property
    def draws(self) -> bool:
        """Whether the slider's picture is rendered."""
        return self.is_trained and self.slider_picture

    def check_beside(self, values: Mapping[str, object], given: Mapping[str, str]) -> None:
        """Check the other options of a slider's run. `values`: of all options. Raises UserError."""
        if not self.is_trained:
            return
        for name in _ABOUT_IMAGES:
            if values[name] and name in given:
                raise UserError(f"--{name} is about images, and --prompts_file trains without any: leave it out")
        if values["network_train_text_encoder_only"]:
            raise UserError(
                "--network_train_text_encoder_only with --prompts_file: the targets are predictions of the UNet for "
                "fixed texts, so the UNet's adapters are trained, and no others: leave it out"
            )
        if values["token_string"] is not None or values["train_embedding_only"]:
            raise UserError(
                "--token_string with --prompts_file: a new word is learnt from images of it; train the embedding "
                "in a run of its own"
            )

    def idle(self) -> dict[str, str]:
        """The options without effect beside these, each with the words that follow "has no effect"."""
        if self.is_trained:
            return IDLE
        own = ("max_denoising_steps", "leco_denoise_guidance_scale", "slider_picture")
        return dict.fromkeys(own, " without --prompts_file")
