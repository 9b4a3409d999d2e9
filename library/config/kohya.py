"""Every option name that kohya's scripts and its GUIs write, and how it is treated here.

A name is *implemented* if `options.py` declares it: no row here. Every other name has one row, in the table of its
treatment:

* `WITHOUT_EFFECT`: accepted, with one warning that says why ignoring it does not change the result;
* `NOT_YET`: known, not supported yet: an error, unless its value has no effect (kohya's default, 0, "");
* `GUI_EXTRAS`: names that GUIs write and kohya's scripts never read;
* `OTHER_SCRIPTS`: options of tools and of scripts that train other models or in other ways: an error, as `NOT_YET`.

When a name becomes implemented, its row goes.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Literal, TypedDict

from library.config.fields import is_truth, read_bool

if TYPE_CHECKING:
    from typing_extensions import Unpack


@dataclass(frozen=True)
class Row:
    """A known name. `default` is kohya's; `neutral` are further values without effect.

    `why`: ignoring it changes nothing, because of this. `only_with`: it matters only together with this other option,
    which is refused itself. `needs`: it matters only together with one of these, and then is refused. `instead`:
    kohya's scripts read these names and not it. A row without any of these is refused unless neutral. `hint`: what to
    do. `script`: what the scripts that know it are for.
    """

    kind: Literal["flag", "value", "list"]
    default: object = None
    neutral: tuple[object, ...] = ()
    why: str = ""
    only_with: str = ""
    needs: tuple[str, ...] = ()
    instead: tuple[str, ...] = ()
    hint: str = ""
    script: str = ""

    def asks_for_nothing(self, words: tuple[str, ...]) -> bool:
        """Whether these words have no effect, as if the option were not given."""
        if not words:
            return self.kind == "list" or self.default is True
        values = (self.default, *self.neutral)
        return all(word == "" or any(_same(word, value) for value in values) for word in words)


def _same(word: str, value: object) -> bool:
    if value is None:
        return word.lower() == "none"
    if isinstance(value, bool):
        return is_truth(word) and read_bool(word) == value
    if isinstance(value, int | float):
        try:
            return float(word) == value
        except ValueError:
            return False
    return word == str(value)


class _Rest(TypedDict, total=False):
    """The fields of a `Row` behind the values without effect."""

    why: str
    only_with: str
    needs: tuple[str, ...]
    instead: tuple[str, ...]
    hint: str
    script: str


def flag(*, default: bool = False, **more: Unpack[_Rest]) -> Row:
    return Row("flag", default, **more)


def value(default: object = None, *neutral: object, **more: Unpack[_Rest]) -> Row:
    return Row("value", default, neutral, **more)


def values(**more: Unpack[_Rest]) -> Row:
    return Row("list", **more)


_ATTENTION = "attention always uses PyTorch's scaled_dot_product_attention"
_ONE_FRAME = "it only tunes the memory of the VAE of Anima, which is given one image at a time"
_MEMORY = "weights are loaded tensor by tensor, straight to where they are needed"

WITHOUT_EFFECT: dict[str, Row] = {
    "xformers": flag(why=_ATTENTION),
    "diffusers_xformers": flag(why=_ATTENTION),
    "mem_eff_attn": flag(why=_ATTENTION),
    "sdpa": flag(why=_ATTENTION),
    "attn_mode": value(why=_ATTENTION),
    "split_attn": flag(why=_ATTENTION),
    "vae_chunk_size": value(why=_ONE_FRAME),
    "vae_disable_cache": flag(why=_ONE_FRAME),
    "qwen_image_vae_2d": flag(why=_ONE_FRAME),
    "lowram": flag(why=_MEMORY),
    "highvram": flag(why="torch keeps freed memory between steps in any case"),
    "disable_mmap_load_safetensors": flag(why=_MEMORY),
    "tokenizer_cache_dir": value(why="the tokenizer ships with this program"),
    "cache_info": flag(why="images and captions are read and checked at each start in any case"),
    "use_safetensors": flag(why="--save_model_as says in which format a LoRA is saved"),
    "ddp_gradient_as_bucket_view": flag(why="it only tunes the traffic between devices"),
    "ddp_static_graph": flag(why="it only tunes the traffic between devices"),
    "console_log_simple": flag(why="messages are plain lines in any case"),
    "cuda_allow_tf32": flag(why="it only tunes speed: products of fp32 numbers keep their precision"),
    "cuda_cudnn_benchmark": flag(why="it only tunes speed, and may choose other kernels in each run"),
}

NOT_YET: dict[str, Row] = {
    # data
    "dataset_class": value(),
    "train_inpainting": flag(),
    # precision, memory, speed
    "fused_backward_pass": flag(),
    # several devices
    "deepspeed": flag(hint="here: accelerate launch --config_file configs/accelerate/deepspeed_zero2.yaml"),
    "fp16_master_weights_and_gradients": flag(only_with="deepspeed"),
    "offload_optimizer_device": value(only_with="deepspeed"),
    "offload_optimizer_nvme_path": value(only_with="deepspeed"),
    "offload_param_device": value(only_with="deepspeed"),
    "offload_param_nvme_path": value(only_with="deepspeed"),
    "zero3_init_flag": flag(only_with="deepspeed"),
    "zero3_save_16bit_model": flag(only_with="deepspeed"),
    "zero_stage": value(2, only_with="deepspeed"),
    # state
    "initial_epoch": value(),
    "initial_step": value(),
    "resume_from_huggingface": flag(),
    "save_state_to_huggingface": flag(),
    "skip_until_initial_step": flag(only_with="initial_step"),
    # upload
    "async_upload": flag(only_with="huggingface_repo_id"),
    "huggingface_path_in_repo": value(only_with="huggingface_repo_id"),
    "huggingface_repo_id": value(),
    "huggingface_repo_type": value(only_with="huggingface_repo_id"),
    "huggingface_repo_visibility": value(only_with="huggingface_repo_id"),
    "huggingface_token": value(only_with="huggingface_repo_id"),
}

_FAMILY = "the model family is found from the weights"

GUI_EXTRAS: dict[str, Row] = {
    # kohya_ss
    "epoch": value(instead=("max_train_epochs", "max_train_steps")),
    "noise_offset_type": value(why="the kind of noise follows from noise_offset and multires_noise_iterations"),
    "sdxl": flag(why=_FAMILY),
    "stop_text_encoder_training": value(None, 0),
    # lora-scripts
    "batch_size": value(1, instead=("train_batch_size",)),
    "bucket_resolution_steps": value(64, instead=("bucket_reso_steps",)),
    "contrastive_warmup_steps": value(only_with="enable_contrastive"),
    "contrastive_weight": value(only_with="enable_contrastive"),
    "enable_contrastive": flag(),
    "lr_restart_cycles": value(1, instead=("lr_scheduler_num_cycles",)),
    "model_train_type": value(None, "sd-lora", "sdxl-lora", "flux-lora"),
    "negative_sampling_method": value(only_with="enable_contrastive"),
    "network_train_text_encoder": flag(default=True, instead=("network_train_unet_only",)),
    "noise_strength": value(only_with="enable_contrastive"),
}


_PLACES = "the table of places is cropped at its centre, as it is when images are drawn"
_RATE_BY_PATTERN = "here: network_reg_lrs in --network_args, with patterns of the layers' names"


def _of(script: str, **rows: Row) -> dict[str, Row]:
    return {name: replace(row, script=script) for name, row in rows.items()}


OTHER_SCRIPTS: dict[str, Row] = {
    **_of(
        "full fine-tuning or DreamBooth",
        block_lr=value(),
        blockwise_fused_optimizers=flag(),
        fused_optimizer_groups=value(),
        learning_rate_te=value(hint="here: --text_encoder_lr"),
        learning_rate_te1=value(hint="here: --text_encoder_lr"),
        learning_rate_te2=value(hint="here: --text_encoder_lr"),
        learning_rate_te3=value(hint="here: --text_encoder_lr"),
        mem_eff_save=flag(),
        no_token_padding=flag(),
        train_text_encoder=flag(hint="here the text encoder is trained unless --network_train_unet_only"),
    ),
    **_of(
        "ControlNet",
        cond_emb_dim=value(None, 32),
        conditioning_data_dir=value(hint="for masks: a subset's key in --dataset_config, with --masked_loss"),
        control_net_lr=value(0.0001),
        controlnet_model_name_or_path=value(),
        lllite_cond_dim=value(64),
        lllite_cond_in_channels=value(3),
        lllite_cond_resblocks=value(1),
        lllite_dropout=value(),
        lllite_mlp_dim=value(64),
        lllite_multiplier=value(1.0),
        lllite_target_layers=value("self_attn_q"),
        lllite_use_aspp=flag(),
    ),
    **_of(
        "SD3, FLUX, Lumina and Anima",
        show_timesteps=value(),
        show_timesteps_offset=value(None, 0, only_with="show_timesteps"),
        show_timesteps_resolution=value(None, only_with="show_timesteps"),
    ),
    **_of(
        "SD3",
        enable_scaled_pos_embed=flag(hint=_PLACES),
        num_last_block_to_freeze=value(),
        pos_emb_random_crop_rate=value(0.0, hint=_PLACES),
        save_clip=flag(),
        save_t5xxl=flag(),
        skip_latents_validity_check=flag(),
        t5xxl_device=value(),
        t5xxl_dtype=value(),
        train_t5xxl=flag(),
        use_t5xxl_cache_only=flag(),
    ),
    **_of(
        "FLUX",
        double_blocks_to_swap=value(hint="here: --blocks_to_swap"),
        single_blocks_to_swap=value(hint="here: --blocks_to_swap"),
        split_mode=flag(hint="here: --blocks_to_swap"),
    ),
    **_of(
        "Lumina",
        gemma2=value(),
        gemma2_max_token_length=value(),
        sample_batch_size=value(),
        system_prompt=value(""),
        use_flash_attn=flag(),
        use_sage_attn=flag(),
    ),
    **_of(
        "HunyuanImage or Anima",
        byt5=value(),
        cross_attn_lr=value(hint=_RATE_BY_PATTERN),
        fp8_scaled=flag(hint="here: --base_format fp8_scaled"),
        fp8_vl=flag(),
        llm_adapter_lr=value(None, 0, hint="the LLM adapter is not trained"),
        mlp_lr=value(hint=_RATE_BY_PATTERN),
        mod_lr=value(hint="its modulation is not trained"),
        self_attn_lr=value(hint=_RATE_BY_PATTERN),
        text_encoder=value(hint="here: --qwen3"),
        text_encoder_cpu=flag(),
        unsloth_offload_checkpointing=flag(hint="here: --cpu_offload_checkpointing"),
    ),
    **_of(
        "models of musubi-tuner",
        dit=value(hint="here: --pretrained_model_name_or_path"),
        fp8_llm=flag(hint="here: --text_encoder_format fp8"),
        fp8_text_encoder=flag(hint="here: --text_encoder_format fp8"),
        use_32bit_attention=flag(hint="here attention computes in the precision of the run"),
    ),
}

# Options of kohya's tools (merge, extract, resize, convert, check), for work that training does not do.
_TOOL_NAMES = """
    clamp_quantile clip_l_save_to concat conv_dim device diffusers dim dst dst_path dynamic_method dynamic_param
    flux_model input_image_dir lbws load_original_model_to load_precision load_tuned_model_to loading_device
    lora_weights mem_eff_load_save mem_eff_safe_open min_diff model model_id model_org model_tuned models
    negative_prompt new_conv_rank new_rank output_image_dir precision prompt ratios reverse save_to sd_model
    show_all_keys shuffle src src_path support_controlnet support_dreambooth support_dropout support_finetuning
    svd_lowrank svd_lowrank_niter t5xxl_save_to unit verbose working_device
"""
TOOLS = frozenset(_TOOL_NAMES.split())
_TOOLS = "merging, extracting, resizing and converting"
_TOOL_HINTS = {
    "conv_dim": "here: --network_args conv_dim=N",
    "dim": "here: --network_dim",
    "model": "here: --pretrained_model_name_or_path",
    "precision": "here: --mixed_precision or --save_precision",
    "shuffle": "here: --shuffle_caption",
    "unit": "here: --network_args unit=N",
}


# Network modules of kohya's that are not supported yet, and settings (--network_args) of networks.lora's relatives
# there: what to use instead today.
MODULES_NOT_YET = {
    **dict.fromkeys(("networks.oft_flux", "networks.lora_lumina"), ""),
    "networks.lora_hunyuan_image": "",
}
_BY_PATTERN = "here: network_reg_dims, with patterns of the layers' names"
_BY_BLOCK = "here: include_patterns or exclude_patterns"
NETWORK_ARGS_NOT_YET = {
    "train_llm_adapter": "Anima's LLM adapter is not trained",
    "split_qkv": "query, key and value have adapters of their own in any case; the file has them as one layer",
    "train_t5xxl": "T5 is not trained",
    "in_dims": "only layers in the blocks are adapted",
    **dict.fromkeys(("train_double_block_indices", "train_single_block_indices"), _BY_BLOCK),
    **dict.fromkeys(("img_attn_dim", "txt_attn_dim", "img_mlp_dim", "txt_mlp_dim"), _BY_PATTERN),
    **dict.fromkeys(("img_mod_dim", "txt_mod_dim", "single_dim", "single_mod_dim"), _BY_PATTERN),
}


@dataclass(frozen=True)
class Verdict:
    """The treatment of a known name that was given: `error` or `warning`, or neither if its value has no effect."""

    error: str = ""
    warning: str = ""


@lru_cache(maxsize=1)
def rows() -> dict[str, Row]:
    """Every known name that is not implemented."""
    tools = {name: Row("value", hint=_TOOL_HINTS.get(name, ""), script=_TOOLS) for name in TOOLS}
    return {**tools, **OTHER_SCRIPTS, **WITHOUT_EFFECT, **NOT_YET, **GUI_EXTRAS}


def judge(name: str, words: tuple[str, ...], *, given: Collection[str] = (), asked: Collection[str] = ()) -> Verdict:
    """The treatment of the known name `name` with these words.

    `given`: the implemented options that are set, too; `asked`: the other known names whose values have an effect.
    """
    row = rows()[name]
    if row.kind == "flag" and words and not (words[0] == "" or is_truth(words[0])):
        return Verdict(error=f"'{words[0]}' is neither true nor false")
    if row.asks_for_nothing(words):
        return Verdict()
    if row.why:
        return Verdict(warning=f"has no effect: {row.why}")
    if row.only_with or (row.needs and not any(other in asked for other in row.needs)):
        others = row.only_with or " or ".join(row.needs)
        return Verdict(warning=f"has no effect: it matters only together with {others}")
    if row.instead:
        names = " or ".join(row.instead)
        if any(other in given for other in row.instead):
            return Verdict(warning=f"has no effect: kohya's scripts do not read it, but {names}")
        return Verdict(error=f"kohya's scripts do not read this name; give {names} instead")
    known = "known to kohya's scripts"
    if name in GUI_EXTRAS:
        known = "written by GUIs, read by none of kohya's scripts"
    elif row.script:
        known = f"known to kohya's scripts for {row.script}"
    hint = f" ({row.hint})" if row.hint else ""
    return Verdict(error=f"{known}, not supported here yet{hint}")
