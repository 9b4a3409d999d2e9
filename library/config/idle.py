"""Options without effect, because the feature that they configure is off."""

from __future__ import annotations

import logging

from library.config.options import Options, declared_options
from library.config.options.validation import WITHOUT_IMAGES

logger = logging.getLogger(__name__)

_OF_ADAPTERS = (
    *("network_module", "network_dim", "network_alpha", "network_dropout", "network_args", "network_train_unet_only"),
    *("network_train_text_encoder_only", "unet_lr", "text_encoder_lr", "lr_layer_decay", "save_naming"),
)


def idle(options: Options) -> dict[str, str]:
    """Every option that has no effect beside the others, each with the words that follow "has no effect".

    Only the options are looked at, not the keys of a dataset config, the model or the optimizer.
    """
    wanted = options.validation
    elsewhere: dict[str, str] = {}  # options that other modules warn of, in more detail
    if options.data.dataset_config is None:
        held_out = wanted.validation_split or wanted.validation_fold is not None or wanted.validation_dir
        times = ("validate_every_n_steps", "validate_every_n_epochs", "max_validation_steps")
        if not (held_out or wanted.forgetting_dir):
            elsewhere |= dict.fromkeys(times, f": {WITHOUT_IMAGES}")
        if not wanted.validation_split and wanted.validation_fold is None:
            elsewhere["validation_group"] = f": {WITHOUT_IMAGES}"
        if not options.data.token_warmup_step:
            elsewhere["token_warmup_min"] = ": it matters only together with --token_warmup_step"
        if options.data.enable_bucket:
            elsewhere["face_crop_aug_range"] = " with --enable_bucket"
    if wanted.early_stopping_patience is None:
        elsewhere["early_stopping_threshold"] = " without --early_stopping_patience"
    if options.samples.sample_prompts is None:
        elsewhere["sample_every_n_steps"] = elsewhere["sample_every_n_epochs"] = " without --sample_prompts"
    if options.network.network_train_unet_only:
        elsewhere["text_encoder_lr"] = ": with --network_train_unet_only that part is not trained"
    if options.network.network_train_text_encoder_only:
        elsewhere["unet_lr"] = ": with --network_train_text_encoder_only that part is not trained"
    groups = (options.schedule, options.objective, options.weight_decay)
    return {name: why for group in groups for name, why in group.idle().items()} | elsewhere | _unsaid(options)


def _unsaid(options: Options) -> dict[str, str]:
    """The options without effect that no other module warns of."""
    output, data, described = options.output, options.data, options.data.dataset_config is not None
    by_steps = bool(output.save_every_n_steps)
    by_epochs = bool(output.save_every_n_epochs or output.save_n_epoch_ratio)
    needs = {
        "save_last_n_steps": (by_steps, "--save_every_n_steps"),
        "save_last_n_epochs": (by_epochs, "--save_every_n_epochs"),
        "save_last_n_steps_state": (by_steps and output.save_state, "--save_every_n_steps and --save_state"),
        "save_last_n_epochs_state": (by_epochs and output.save_state, "--save_every_n_epochs and --save_state"),
        "divergence_limit": (options.divergence.on_divergence != "stop", "--on_divergence skip or rollback"),
        "resume_anyway": (options.run.resume is not None, "--resume"),
        "base_weights_off_for_samples": (bool(options.network.base_weights), "--base_weights"),
        "compare_steps": (bool(output.compare_prompts) or options.slider.draws, "--compare_prompts"),
        "prior_loss_weight": (described or data.reg_data_dir is not None, "--reg_data_dir"),
        "dataset_repeats": (described or data.in_json is not None, "--in_json or --dataset_config"),
        "text_encoder_batch_size": (data.cache_text_encoder_outputs, "--cache_text_encoder_outputs"),
    }
    for name in ("min_bucket_reso", "max_bucket_reso", "bucket_reso_steps", "bucket_no_upscale"):
        needs[name] = described or data.enable_bucket, "--enable_bucket"
    for name in vars(output):
        if name.startswith("metadata_") or name == "training_comment":
            needs[name] = output.save_model_as == "safetensors", "--save_model_as safetensors"
    found = {name: f" without {others}" for name, (works, others) in needs.items() if not works}
    found |= options.compile.idle() | options.forgetting.idle() | options.slider.idle()
    if options.embedding.train_embedding_only:
        found |= dict.fromkeys(_OF_ADAPTERS, " with --train_embedding_only: there is no LoRA")
    if options.embedding.weights is not None:
        found["init_word"] = " with --weights, the vectors to start from"
    if options.network.dim_from_weights:
        found["network_dim"] = " with --dim_from_weights: the file has the ranks"
        found["network_alpha"] = " with --dim_from_weights: the file has the alphas"
    if options.training.max_train_epochs is not None:
        found["max_train_steps"] = " with --max_train_epochs"
    return found


def warn_of_idle_options(options: Options) -> None:
    """Warn of each option without effect that was given a value other than its default."""
    for name, why in _unsaid(options).items():
        group = next(group for group in vars(options).values() if hasattr(group, name))
        value = getattr(group, name)
        if name in options.given and value and value != declared_options()[name].default:
            logger.warning("%s: has no effect%s", options.given[name], why)
