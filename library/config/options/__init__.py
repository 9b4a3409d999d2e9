"""Every option of training, once: name, type, default and help, grouped as `--help` shows them.

Names, defaults and meanings are those of kohya's sd-scripts; options of this project's own are marked "(ours)" in their
help. To add an option, add a field: the command line, the TOML files, `--help` and `--output_config` follow. If kohya
knows the name, delete its row in `kohya.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal, get_type_hints

from library.config import kohya, source
from library.config.fields import (
    REQUIRED,
    Declared,
    declared,
    option,
    read_token_length,
)
from library.config.options.compile import CompileOptions
from library.config.options.custom_adamw import CustomAdamWOptions
from library.config.options.data import DataOptions
from library.config.options.divergence import DivergenceOptions
from library.config.options.ema import EmaOptions
from library.config.options.embedding import EmbeddingOptions
from library.config.options.flow import FlowOptions
from library.config.options.forgetting import ForgettingOptions
from library.config.options.guidance import GuidanceOptions
from library.config.options.monitoring import MonitoringOptions
from library.config.options.objective import ObjectiveOptions
from library.config.options.precision import PrecisionOptions
from library.config.options.schedule import ScheduleOptions
from library.config.options.slider import SliderOptions
from library.config.options.validation import ValidationOptions
from library.config.options.weight_decay import WeightDecayOptions
from library.config.samplers import SAMPLERS, read_sampler
from library.errors import UserError

# Options whose values are never written: neither into files that get shared nor into the record of a run.
SECRETS = frozenset({"wandb_api_key"})


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Base model"""

    pretrained_model_name_or_path: str = option(
        REQUIRED, help="the base model: a .safetensors or .ckpt file, a diffusers folder, or the name of one on the hub"
    )
    v2: bool = option(False, help="the base is Stable Diffusion 2.x (checked against the weights)")
    v_parameterization: bool = option(
        False, help="the base predicts v, not noise, as the 768 px version of Stable Diffusion 2 does"
    )
    vae: str | None = option(None, help="another VAE to use: a file or a diffusers folder")
    clip_skip: int | None = option(
        None,
        minimum=1,
        zero_is_unset=True,
        help="train on the output of the text encoder's n-th layer from the end (1: the last one)",
    )
    max_token_length: int | None = option(
        None, read=read_token_length, help="the longest caption in tokens: 75, 150 or 225 (default: 75)"
    )
    weighted_captions: bool = option(
        False, help="read A1111's weights in captions: (word:1.2), (word) and [word]; \\( is a bracket"
    )
    no_half_vae: bool = option(False, help="run the VAE in fp32 even under mixed precision")


_HIGHEST_RANK = 16384  # a larger number is a typing mistake, but with LoKr, where it stands for whole matrices
_WITH_LOKR = ("networks.lokr", "networks.lycoris")


@dataclass(frozen=True, kw_only=True)
class NetworkOptions:
    """Network (the LoRA)"""

    network_module: str = option(
        "networks.lora",
        not_yet=kohya.MODULES_NOT_YET,
        help="the kind of adapter: networks. and lora, dora, loha, lokr, glora, oft, boft, ia3, full, norm, lora_fa, "
        "dylora, t_lora, adalora, pissa, vera, or lycoris for LyCORIS' words; or another package's, such as "
        "lycoris.kohya; see docs/adapters.md",
    )
    network_dim: int | None = option(None, minimum=1, help="the network's rank (default: 4)")
    network_alpha: float = option(
        1.0, minimum=0, help="the network's output is scaled by alpha / rank; 0 means alpha = rank"
    )
    network_dropout: float | None = option(
        None, minimum=0, maximum=1, help="share of the rank's values that are dropped in each training step"
    )
    network_args: tuple[str, ...] = option(
        (), help="more settings of the module: conv_dim=4 conv_alpha=1 preset=full ..., see docs/adapters.md"
    )
    network_train_unet_only: bool = option(False, help="train the UNet only, not the text encoders")
    network_train_text_encoder_only: bool = option(False, help="train the text encoders only, not the UNet")
    network_weights: str | None = option(
        None, help="a LoRA file to start from, in the naming of kohya, diffusers, PEFT, OneTrainer or ComfyUI"
    )
    dim_from_weights: bool = option(False, help="take ranks and alphas from --network_weights")
    base_weights: tuple[str, ...] = option((), help="LoRA files to merge into the base model before training")
    base_weights_multiplier: tuple[float, ...] | None = option(
        None, help="the strength of each of these files (default: 1 each)"
    )
    base_weights_off_for_samples: bool | None = option(
        None,
        help="keep these files apart from the base's weights, in effect in training and off in samples (default: if "
        "the base is distilled to a few steps, for which they are a training adapter) (ours)",
    )
    scale_weight_norms: float | None = option(
        None,
        minimum=0,
        zero_is_unset=True,
        help="scale down the weights of adapters beyond this norm; 1 is a good start",
    )

    def __post_init__(self) -> None:
        if self.network_train_unet_only and self.network_train_text_encoder_only:
            raise UserError("--network_train_unet_only and --network_train_text_encoder_only leave nothing to train")
        # LyCORIS' users write 100000 and more for full matrices instead of low-rank ones
        limited = source.is_ours(self.network_module) and self.network_module not in _WITH_LOKR
        if limited and (self.network_dim or 0) > _HIGHEST_RANK:
            raise UserError(f"--network_dim {self.network_dim}: at most {_HIGHEST_RANK}")
        if self.dim_from_weights and self.network_weights is None:
            raise UserError("--dim_from_weights needs --network_weights, the file to take the ranks from")
        files, multipliers = len(self.base_weights), len(self.base_weights_multiplier or ())
        if multipliers > files:
            raise UserError(f"--base_weights_multiplier: {multipliers} of them for {files} files in --base_weights")


@dataclass(frozen=True, kw_only=True)
class OptimizerOptions:
    """Optimizer and learning rates"""

    optimizer_type: str = option("", help="AdamW (the default), AdamW8bit, Lion, Prodigy, ... or package.module.Class")
    optimizer_args: tuple[str, ...] = option((), help="the optimizer's settings: betas=0.9,0.99 eps=1e-6 ...")
    weight_decay: float | None = option(
        None, minimum=0, help="the weight decay of any optimizer that has one (default: the optimizer's own) (ours)"
    )
    use_8bit_adam: bool = option(False, help="the old name of --optimizer_type AdamW8bit")
    use_lion_optimizer: bool = option(False, help="the old name of --optimizer_type Lion")
    learning_rate: float = option(
        2e-6, minimum=0, help="the learning rate of the parts for which the next two are not given"
    )
    unet_lr: float | None = option(None, minimum=0, help="the UNet's learning rate")
    text_encoder_lr: tuple[float, ...] | None = option(
        None, minimum=0, help="the text encoder's learning rate; one for each of several"
    )
    lr_layer_decay: float | None = option(
        None,
        minimum=0,
        maximum=1,
        help="multiply the rate by this from each block of the UNet or layer of the text encoder to the one before "
        "it, towards the input; 0.9 is usual (ours)",
    )
    max_grad_norm: float = option(1.0, minimum=0, help="clip gradients to this norm; 0: never")

    def __post_init__(self) -> None:
        ways = [f"--{name}" for name in ("use_8bit_adam", "use_lion_optimizer") if getattr(self, name)]
        if self.optimizer_type:
            ways.append(f"--optimizer_type {self.optimizer_type}")
        if len(ways) > 1:
            raise UserError(f"{' and '.join(ways)} each choose an optimizer: give one of them")

    @property
    def optimizer_name(self) -> str:
        """The optimizer that these options choose together."""
        if self.use_8bit_adam:
            return "AdamW8bit"
        return "Lion" if self.use_lion_optimizer else self.optimizer_type or "AdamW"


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """Training"""

    max_train_steps: int = option(1600, minimum=0, help="steps of the optimizer, unless --max_train_epochs is given")
    max_train_epochs: int | None = option(None, minimum=1, zero_is_unset=True, help="epochs; overrides the steps")
    gradient_accumulation_steps: int = option(1, minimum=1, help="batches per step of the optimizer")
    seed: int | None = option(None, help="the same seed gives the same result (default: a random one, which is logged)")

    def __post_init__(self) -> None:
        if self.max_train_steps == 0 and self.max_train_epochs is None:
            raise UserError("--max_train_steps 0 and no --max_train_epochs: nothing to train")


@dataclass(frozen=True, kw_only=True)
class OutputOptions:
    """What is written"""

    output_dir: str = option(REQUIRED, help="the folder to write to; created if it does not exist")
    output_name: str | None = option(None, help="the LoRA's file name without its ending (default: last)")
    overwrite: bool = option(False, help="overwrite files of an earlier run instead of stopping (ours)")
    save_precision: Literal["float", "fp16", "bf16"] | None = option(
        None, help="the precision of the file (default: as trained)"
    )
    save_model_as: Literal["safetensors", "ckpt", "pt"] = option(
        "safetensors", help="the file's format; ckpt and pt are pickled tables of tensors without metadata"
    )
    save_naming: Literal["kohya", "diffusers"] | None = option(
        None,
        help="whose names the file's tensors have: kohya's, which most programs read, or diffusers' (LoRA, and DoRA of "
        "rows) (default: kohya's, but for a LoRA of Anima and for all kinds for Z-Image diffusers', which ComfyUI "
        "reads as well) (ours)",
    )
    save_every_n_epochs: int | None = option(None, minimum=1, zero_is_unset=True, help="save after every n epochs")
    save_every_n_steps: int | None = option(None, minimum=1, zero_is_unset=True, help="save after every n steps")
    save_n_epoch_ratio: int | None = option(
        None, minimum=1, zero_is_unset=True, help="save at least n times, evenly over the epochs"
    )
    save_last_n_epochs: int | None = option(
        None, minimum=1, zero_is_unset=True, help="keep these files of the last n epochs only"
    )
    save_last_n_steps: int | None = option(
        None, minimum=1, zero_is_unset=True, help="keep these files of the last n steps only"
    )
    save_state: bool = option(False, help="with every file save the state that --resume needs")
    save_state_on_train_end: bool = option(False, help="save the state at the end")
    save_last_n_epochs_state: int | None = option(
        None, minimum=1, zero_is_unset=True, help="keep the states of the last n epochs (default: as for the files)"
    )
    save_last_n_steps_state: int | None = option(
        None, minimum=1, zero_is_unset=True, help="keep the states of the last n steps (default: as for the files)"
    )
    no_metadata: bool = option(False, help="write no metadata into the file")
    training_comment: str | None = option(None, help="a comment for the metadata", free_text=True)
    metadata_title: str | None = option(None, help="title for the metadata (default: the output name)", free_text=True)
    metadata_author: str | None = option(None, help="author for the metadata", free_text=True)
    metadata_description: str | None = option(None, help="description for the metadata", free_text=True)
    metadata_license: str | None = option(None, help="licence for the metadata", free_text=True)
    metadata_tags: str | None = option(None, help="tags for the metadata, separated by commas", free_text=True)
    metadata_usage_hint: str | None = option(None, help="usage hint for the metadata", free_text=True)
    metadata_trigger_phrase: str | None = option(None, help="trigger phrase for the metadata", free_text=True)
    metadata_thumbnail: str | None = option(None, help="thumbnail for the metadata, as a data URL")
    metadata_merged_from: str | None = option(
        None, help="models that it was merged from, for the metadata", free_text=True
    )
    metadata_preprocessor: str | None = option(None, help="preprocessor for the metadata", free_text=True)
    metadata_is_negative_embedding: str | None = option(
        None, help="whether it is a negative embedding, for the metadata", free_text=True
    )
    loss_plot: bool = option(True, help="draw the loss into a PNG beside the LoRA (ours)")
    compare_prompts: tuple[str, ...] = option(
        (),
        help="after training render each of these prompts without and with the LoRA, in one grid (ours)",
        free_text=True,
    )
    compare_steps: int = option(
        25, minimum=1, help="denoising steps for --compare_prompts and a slider's picture (ours)"
    )


@dataclass(frozen=True, kw_only=True)
class LoggingOptions:
    """Logs"""

    logging_dir: str | None = option(None, help="the folder for logs; without --log_with they are TensorBoard's")
    log_with: Literal["tensorboard", "wandb", "all"] | None = option(
        None, help="the tracker to log to; wandb needs that package; all means both"
    )
    log_prefix: str | None = option(None, help="a prefix to the time in the name of the run's log folder")
    log_tracker_name: str | None = option(
        None, help="the name of the tracker, wandb's project (default: network_train)"
    )
    log_tracker_config: str | None = option(
        None, help="a TOML file with more settings of the trackers, under [tensorboard] and [wandb]"
    )
    log_config: bool = option(False, help="log the options as well, except keys and paths")
    wandb_run_name: str | None = option(None, help="the run's name in wandb")
    wandb_api_key: str | None = option(None, help="the API key for wandb")
    console_log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"] | None = option(
        None, help="the lowest level of the messages that are shown (default: INFO)"
    )
    console_log_file: str | None = option(None, help="a file for the messages, instead of the console")

    def __post_init__(self) -> None:
        if self.log_with in ("tensorboard", "all") and self.logging_dir is None:
            raise UserError(f"--log_with {self.log_with} needs --logging_dir, the folder to write to")


@dataclass(frozen=True, kw_only=True)
class SampleOptions:
    """Samples during training"""

    sample_prompts: str | None = option(
        None, help="a file of prompts to render: .txt (one a line, with flags such as --w 512 --d 1), .toml or .json"
    )
    sample_every_n_steps: int | None = option(None, minimum=1, zero_is_unset=True, help="render them every n steps")
    sample_every_n_epochs: int | None = option(
        None, minimum=1, zero_is_unset=True, help="render them every n epochs; takes precedence over the steps"
    )
    sample_at_first: bool = option(False, help="render them before training, too")
    sample_sampler: str = option("ddim", read=read_sampler, help=f"the sampler: {', '.join(SAMPLERS)}")


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """This run"""

    config_file: str | None = option(
        None, help="a TOML file with any of these options, in sections of any name; the command line wins"
    )
    resume: str | None = option(
        None, help="resume from a state: its folder, or latest for the newest of --output_name in --output_dir"
    )
    resume_anyway: bool = option(False, help="resume even if options or data differ from those of the state (ours)")
    ddp_timeout: int | None = option(
        None,
        minimum=1,
        zero_is_unset=True,
        help="minutes that processes wait for each other (default: 10 on GPUs, else 30)",
    )
    output_config: bool = option(False, help="write the given options to --config_file instead of training")
    debug_dataset: bool = option(
        False, help="render the network's input, images and captions, into NAME-dataset.png instead of training"
    )
    check_data: Literal["", "page", "list"] = option(
        "",
        alone="page",
        help="look for flaws in images and captions instead of training: prints them and writes NAME-data.html with "
        "pictures; --check_data=list writes all files' names into NAME-data.tsv as well (ours)",
    )
    dry_run: Literal["", "plan", "measure", "curves"] = option(
        "",
        alone="plan",
        help="do everything but train, and report; --dry_run=measure times one step as well, --dry_run=curves draws "
        "the curves of learning rate and weight decay into the output folder (ours)",
    )


@dataclass(frozen=True, kw_only=True)
class Options:
    """All options of one run. `given` names those that the user set, with the place where each stands; `command` is the
    command line, without the program and without secrets."""

    model: ModelOptions
    flow: FlowOptions = field(default_factory=FlowOptions)
    precision: PrecisionOptions = field(default_factory=PrecisionOptions)
    compile: CompileOptions = field(default_factory=CompileOptions)
    data: DataOptions = field(default_factory=DataOptions)
    network: NetworkOptions = field(default_factory=NetworkOptions)
    embedding: EmbeddingOptions = field(default_factory=EmbeddingOptions)
    slider: SliderOptions = field(default_factory=SliderOptions)
    optimizer: OptimizerOptions = field(default_factory=OptimizerOptions)
    schedule: ScheduleOptions = field(default_factory=ScheduleOptions)
    custom_adamw: CustomAdamWOptions = field(default_factory=CustomAdamWOptions)
    weight_decay: WeightDecayOptions = field(default_factory=WeightDecayOptions)
    training: TrainingOptions = field(default_factory=TrainingOptions)
    divergence: DivergenceOptions = field(default_factory=DivergenceOptions)
    objective: ObjectiveOptions = field(default_factory=ObjectiveOptions)
    validation: ValidationOptions = field(default_factory=ValidationOptions)
    forgetting: ForgettingOptions = field(default_factory=ForgettingOptions)
    ema: EmaOptions = field(default_factory=EmaOptions)
    output: OutputOptions
    logging: LoggingOptions = field(default_factory=LoggingOptions)
    monitoring: MonitoringOptions = field(default_factory=MonitoringOptions)
    samples: SampleOptions = field(default_factory=SampleOptions)
    run: RunOptions = field(default_factory=RunOptions)
    guidance: GuidanceOptions = field(default_factory=GuidanceOptions)
    given: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)
    command: tuple[str, ...] = field(default=(), compare=False, repr=False)

    def __post_init__(self) -> None:
        self._check_slider()
        self.embedding.check_beside(
            text_cache=self.data.text_cache_option if self.data.cache_text_encoder_outputs else "",
            naming=self.output.save_naming,
            of_loras={
                "network_weights": self.network.network_weights,
                "scale_weight_norms": self.network.scale_weight_norms,
                "recommend": self.guidance.recommend,
            },
        )
        if self.output.output_name is None and (name := self.embedding.file_name):
            object.__setattr__(self.output, "output_name", name)  # as kohya's script names it
        if self.data.cache_text_encoder_outputs and not self.network.network_train_unet_only:
            raise UserError(
                f"--{self.data.text_cache_option} needs --network_train_unet_only: cached text encoders cannot train"
            )
        if self.forgetting.distillation_weight and self.network.network_weights is None:
            raise UserError(
                "--distillation_weight needs --network_weights, the network whose predictions are kept; the base's are "
                'kept by subsets with prior = "base"'
            )
        if (name := self.precision.formats.get("fp8")) and not source.is_ours(self.network.network_module):
            raise UserError(
                f"--{name} with --network_module {self.network.network_module}: it computes with the base's weights "
                "itself, which torch's 8-bit floats do not allow; --base_format fp8_scaled, int8 and nf4 do"
            )
        instead = {
            **{name: getattr(self.run, name) for name in ("dry_run", "check_data", "debug_dataset")},
            **{name: getattr(self.guidance, name) for name in ("find_lr", "recommend")},
        }
        asked = [f"--{name}" for name, value in instead.items() if value]
        if len(asked) > 1:
            raise UserError(f"{' and '.join(asked)}: give one of them; each does something else instead of training")
        if self.run.resume is not None and (self.guidance.find_lr or self.guidance.recommend):
            raise UserError(f"{asked[0]} is for a new run, and --resume continues an old one: give one of them")

    def _check_slider(self) -> None:
        """Check a slider's run, and set what it implies: only the UNet is trained, and the prompts are encoded once."""
        if not self.slider.is_trained:
            return
        values = {name: value for group in option_groups() for name, value in vars(getattr(self, group)).items()}
        self.slider.check_beside(values, self.given)
        object.__setattr__(self.network, "network_train_unet_only", True)
        for name in ("cache_latents", "cache_text_encoder_outputs"):
            object.__setattr__(self.data, name, True)

    @property
    def trains(self) -> bool:
        """Whether this run trains and writes a LoRA."""
        return not (self.run.dry_run or self.guidance.find_lr)


@lru_cache(maxsize=1)
def option_groups() -> dict[str, type]:
    """The dataclasses that declare options, by their name in `Options`."""
    hints = get_type_hints(Options)
    return {name: hint for name, hint in hints.items() if dataclasses.is_dataclass(hint) and isinstance(hint, type)}


@lru_cache(maxsize=1)
def declared_options() -> dict[str, Declared]:
    """Every option by its name, in the order of `--help`."""
    options: dict[str, Declared] = {}
    for group in option_groups().values():
        items = declared(group)
        assert not options.keys() & items.keys(), f"declared twice: {options.keys() & items.keys()}"
        options |= items
    return options
