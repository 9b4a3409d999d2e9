"""The families that are trained by flow matching, a row each: what tests that are said once need to know of each.

A new family is one row here and its tests/tiny_NAME.py, with a fixture `tiny_NAME` in tests/conftest.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from library.config.registry import load
from library.models import FAMILIES
from tests import tiny_anima, tiny_chroma, tiny_flux, tiny_flux2, tiny_sd3, tiny_z_image

Words = tuple[str, ...]
TOKENS = -1
"""In a shape: as many as the caption has tokens."""
CACHED = ("--network_train_unet_only", "--cache_text_encoder_outputs")


@dataclass(frozen=True, kw_only=True)
class FlowFamily:
    """One family and its tiny model.

    name: in FAMILIES. door: its own script. page: its page in docs/, with so many `commands`. length: the option that
    shortens its texts and the tokens that are enough for short ones; "": they are as short as they are.

    Of a usual run (test_flow_runs.py): `words` of the command line, what follows the two prompts (`prompts`), `facts`
    of the file's metadata, the number of its `layers` by how their names begin, some of those names, and patterns of
    what is `said`. cache_words: options with which the caches of texts are compared; cached: shapes of a cached text.
    resume_words: options of a run that is resumed.

    Of a command line for another program, kohya's or musubi-tuner's: its words, what the metadata then have (None: no
    such entry), the number of layers in the file and a pattern of all of their names.

    blocks: a rank for each block, as block_dims has them. swapped: how many can be. settings: that this family alone
    has. own_options: that are refused for others.

    Of adapter files (test_flow_files.py): the texts that trained encoders change, and the naming other than kohya's.

    Of a learning run (test_flow_learning.py): the tokens of its texts, and below which part of the first loss, and of
    the loss of the answer 0, it ends.
    """

    name: str
    tiny: ModuleType
    door: str
    page: str
    commands: int = 1
    length: tuple[str, int] = ("", 0)
    words: Words = ()
    prompts: tuple[str, str] = ("--s 2 --d 5", "--s 2")
    facts: Mapping[str, str]
    layers: Mapping[str, int]
    among: frozenset[str] = frozenset()
    said: Words = ()
    cache_words: Words = ()
    cached: Mapping[str, tuple[int, ...]]
    resume_words: Words = ()
    their_words: Words
    their_facts: Mapping[str, str | None]
    their_layers: int
    their_names: str
    blocks: str
    swapped: int
    settings: tuple[Words, ...] = ()
    own_options: tuple[Words, ...] = ()
    trained_texts: Words = ()
    other_naming: str = "diffusers"
    learning_tokens: int = 0
    falls_to: float = 0.5
    falls_to_of_nothing: float = 0.85

    def __str__(self) -> str:
        return self.name

    @property
    def title(self) -> str:
        """What messages call its models."""
        title: str = load(FAMILIES, self.name).TITLE
        return title

    @property
    def fixture(self) -> str:
        """The fixture that is the folder of the tiny model."""
        return f"tiny_{self.name}"

    def short(self, tokens: int = 0) -> Words:
        """The option that shortens texts, to `tokens` if any are given."""
        option, usual = self.length
        return (f"--{option}", str(tokens or usual)) if option else ()

    def options(self, tokens: int) -> dict[str, Any]:
        """The same as `open_family` takes it."""
        option, _ = self.length
        return {option: tokens} if option else {}


_FLUX_SETTINGS = (
    ("--network_args", "train_blocks=double"),
    ("--save_naming", "diffusers"),
)

FLOW = {
    row.name: row
    for row in (
        FlowFamily(
            name="flux",
            tiny=tiny_flux,
            door="flux_train_network",
            page="flux",
            length=("t5xxl_max_token_length", 16),
            words=("--timestep_sampling", "flux_shift", "--compare_prompts", "a cat"),
            prompts=("--s 2 --d 5 --g 2", ""),
            facts={
                "ss_base_model_version": "flux1",
                "modelspec.architecture": "flux-1-dev/lora",
                "modelspec.implementation": "https://github.com/black-forest-labs/flux",
                "ss_guidance_scale": "1.0",
                "ss_timestep_sampling": "flux_shift",
                "ss_discrete_flow_shift": "3.0",
                "ss_model_prediction_type": "raw",
            },
            layers={"lora_unet": 10 * tiny_flux.DOUBLES + 3 * tiny_flux.SINGLES, "lora_te1": 12},
            cache_words=("--apply_t5_attn_mask",),
            cached={"hidden_states": (16, tiny_flux.T5_WIDTH), "mask": (16,), "pooled": (tiny_flux.CLIP_WIDTH,)},
            resume_words=("--timestep_sampling", "shift"),
            # as 16 of 27 published configurations have it
            their_words=(
                *("--network_module", "networks.lora_flux", "--network_dim", "16", "--network_alpha", "16"),
                *("--timestep_sampling", "shift", "--discrete_flow_shift", "3.1582", "--model_prediction_type", "raw"),
                *("--guidance_scale", "1.0", "--save_precision", "bf16", "--optimizer_type", "adafactor"),
            ),
            their_facts={"ss_network_module": "networks.lora_flux", "ss_timestep_sampling": "shift"},
            their_layers=10 * tiny_flux.DOUBLES + 3 * tiny_flux.SINGLES,
            their_names="lora_unet_(double|single)_blocks_",
            blocks="2,4,2,4,8",
            swapped=4,
            settings=_FLUX_SETTINGS,
            own_options=(("--guidance_scale", "1.5"), ("--clip_l", "clip_l.safetensors")),
            trained_texts=("pooled",),
            # from 5.1 to 1.5 in 42 s of one thread; predicting nothing gives 2.0, the mean square of the velocity
            learning_tokens=32,
        ),
        FlowFamily(
            name="chroma",
            tiny=tiny_chroma,
            door="flux_train_network",
            page="chroma",
            words=("--timestep_sampling", "sigmoid", "--compare_prompts", "a cat"),
            prompts=("--n a dog --s 2 --d 5", "--s 2 --l 1"),
            facts={
                "ss_base_model_version": "chroma",
                "modelspec.architecture": "chroma/lora",
                "modelspec.implementation": "https://huggingface.co/lodestones/Chroma",
                "ss_guidance_scale": "0.0",
                "ss_timestep_sampling": "sigmoid",
                "ss_model_type": "chroma",
                "ss_apply_t5_attn_mask": "True",
            },
            layers={"lora_unet": 8 * tiny_chroma.DOUBLES + 2 * tiny_chroma.SINGLES},
            cached={"hidden_states": (TOKENS, tiny_chroma.T5_WIDTH), "mask": (TOKENS,)},
            resume_words=("--timestep_sampling", "shift"),
            # as kohya's documents have it
            their_words=(
                *("--network_module", "networks.lora_flux", "--network_dim", "16", "--network_alpha", "16"),
                *("--model_type", "chroma", "--apply_t5_attn_mask", "--guidance_scale", "0.0"),
                *("--timestep_sampling", "sigmoid", "--model_prediction_type", "raw", "--save_precision", "bf16"),
            ),
            their_facts={"ss_network_module": "networks.lora_flux", "ss_timestep_sampling": "sigmoid"},
            their_layers=8 * tiny_chroma.DOUBLES + 2 * tiny_chroma.SINGLES,
            their_names="lora_unet_(double|single)_blocks_",
            blocks="2,4,2,4,8",
            swapped=4,
            settings=(
                *_FLUX_SETTINGS,
                ("--gradient_checkpointing", "--cpu_offload_checkpointing", *CACHED),
                ("--timestep_sampling", "flux_shift", "--ip_noise_gamma", "0.1", "--loss_type", "huber"),
            ),
            # From 2.7 to 1.57 in 40 s of one thread; predicting nothing gives 1.90. Its answer before training is
            # nearer to that than FLUX.1's, so half of it is no bound.
            falls_to=0.7,
        ),
        FlowFamily(
            name="anima",
            tiny=tiny_anima,
            door="anima_train_network",
            page="anima",
            facts={
                "ss_base_model_version": "anima",
                "modelspec.architecture": "anima-preview/lora",
                "ss_timestep_sampling": "sigmoid",
                "ss_discrete_flow_shift": "1.0",
            },
            layers={
                "diffusion_model.blocks.": 10 * tiny_anima.BLOCKS,
                "text_encoders.qwen3_06b.transformer.model.layers.": 7 * tiny_anima.TEXT_LAYERS,
            },
            said=(
                r"test.safetensors: 44 of 44 layers load, as trained, in ComfyUI",
                r"diffusers: 30 of 44 layers load \(14 layers: it adapts the transformer alone\)",
            ),
            cached={"hidden_states": (TOKENS, tiny_anima.STATES)},
            resume_words=("--timestep_sampling", "shift"),
            their_words=(
                *("--network_module", "networks.lora_anima", "--network_dim", "16", "--network_alpha", "16"),
                *("--timestep_sampling", "sigma", "--discrete_flow_shift", "1.0", "--attn_mode", "torch"),
                *("--vae_chunk_size", "64", "--qwen3_max_token_length", "512", "--save_naming", "kohya"),
                *("--optimizer_type", "adafactor", "--save_precision", "bf16"),
            ),
            # uniform levels have no entry, as in kohya's
            their_facts={"ss_network_module": "networks.lora_anima", "ss_timestep_sampling": None},
            their_layers=10 * tiny_anima.BLOCKS,
            their_names=r"lora_unet_blocks_\d_(self_attn|cross_attn|mlp)_",
            blocks="2,4,2",
            swapped=3,
            settings=(("--mixed_precision", "fp16"), ("--network_args", "preset=full")),
            own_options=(("--qwen3", "qwen3.safetensors"),),
            trained_texts=("hidden_states",),
            other_naming="ComfyUI",
            # from 6.4 to 1.5 in 77 s of a thread beside another; predicting nothing gives 2.3
        ),
        FlowFamily(
            name="z_image",
            tiny=tiny_z_image,
            door="zimage_train_network",
            page="z-image",
            commands=2,
            facts={
                "ss_base_model_version": "z_image",
                "modelspec.architecture": "Z-Image/lora",
                "modelspec.implementation": "https://github.com/Tongyi-MAI/Z-Image",
                "ss_timestep_sampling": "shift",
                "ss_discrete_flow_shift": "2.0",
            },
            layers={"diffusion_model.layers.": 7 * tiny_z_image.LAYERS},
            said=("21 of 21 layers load, as trained, in ComfyUI, diffusers",),
            cached={"hidden_states": (TOKENS, tiny_z_image.STATES), "mask": (TOKENS,)},
            resume_words=("--ema_decay", "0.9"),
            their_words=(
                *("--network_module", "networks.lora_zimage", "--network_dim", "16", "--network_alpha", "16"),
                *("--timestep_sampling", "shift", "--weighting_scheme", "none", "--discrete_flow_shift", "2.0"),
                *("--save_naming", "kohya", "--optimizer_type", "adafactor"),
            ),
            their_facts={"ss_network_module": "networks.lora_zimage", "ss_timestep_sampling": "shift"},
            their_layers=7 * tiny_z_image.LAYERS,
            their_names=r"lora_unet_layers_\d_(attention|feed_forward)_",
            blocks="2,4,2",
            swapped=3,
            settings=(
                ("--base_format", "fp8_scaled", *CACHED),
                ("--text_encoder_format", "int8"),
                ("--network_args", "preset=full"),
                ("--network_args", "preset=attn-qv"),
            ),
            own_options=(("--turbo",),),
            other_naming="ComfyUI",
            # To 1.68, in 65 s of one thread; predicting nothing gives 1.90. The bound is wider than FLUX.1's: the last
            # layer, which is frozen, lets less through.
            falls_to_of_nothing=0.95,
        ),
        FlowFamily(
            name="flux2",
            tiny=tiny_flux2,
            door="flux2_train_network",
            page="flux2",
            commands=2,
            length=("qwen3_max_token_length", 48),
            facts={
                "ss_base_model_version": "flux_2_klein",
                "modelspec.architecture": "Flux.2-klein/lora",
                "modelspec.implementation": "https://github.com/black-forest-labs/flux2",
                "ss_timestep_sampling": "flux2_shift",
                "ss_discrete_flow_shift": "3.0",
            },
            layers={"lora_unet": 8 * tiny_flux2.DOUBLES + 2 * tiny_flux2.SINGLES},
            among=frozenset({"lora_unet_double_blocks_0_txt_attn_qkv", "lora_unet_single_blocks_1_linear2"}),
            said=("20 of 20 layers load, as trained, in ComfyUI, diffusers",),
            cached={"hidden_states": (48, 3 * tiny_flux2.STATES)},
            resume_words=("--ema_decay", "0.9"),
            their_words=(
                *("--network_module", "networks.lora_flux_2", "--network_dim", "32", "--network_alpha", "32"),
                *("--timestep_sampling", "flux2_shift", "--weighting_scheme", "none"),
                *("--model_version", "klein-base-4b", "--optimizer_type", "adafactor"),
            ),
            their_facts={"ss_network_module": "networks.lora_flux_2", "ss_timestep_sampling": "flux2_shift"},
            their_layers=8 * tiny_flux2.DOUBLES + 2 * tiny_flux2.SINGLES,
            their_names="lora_unet_(double|single)_blocks_",
            blocks="2,4,2,1",
            swapped=3,
            settings=(
                ("--base_format", "fp8_scaled", *CACHED),
                ("--text_encoder_format", "int8"),
                ("--timestep_sampling", "shift", "--discrete_flow_shift", "2.5"),
                ("--network_module", "networks.lokr"),
                (
                    "--network_module",
                    "networks.dora",
                    "--network_args",
                    "wd_on_output=True",
                    "--save_naming",
                    "diffusers",
                ),
                ("--network_args", "preset=attn-only"),
                ("--network_args", "preset=attn-qv"),
            ),
            own_options=(("--model_version", "klein-4b"),),
            # from 6.3 to 1.7 in two minutes of one slow thread; predicting nothing gives 2.9
            learning_tokens=48,
            falls_to_of_nothing=0.75,
        ),
        FlowFamily(
            name="sd3",
            tiny=tiny_sd3,
            door="sd3_train_network",
            page="sd3",
            length=("t5xxl_max_token_length", 16),
            words=("--weighting_scheme", "logit_normal", "--training_shift", "2"),
            prompts=("--s 2 --d 5 --l 2", "--s 2"),
            facts={
                "ss_base_model_version": "5-medium",
                "modelspec.architecture": "stable-diffusion-3-5-medium/lora",
                "modelspec.implementation": "https://github.com/Stability-AI/sd3.5",
                "ss_weighting_scheme": "logit_normal",
                "ss_training_shift": "2.0",
                "ss_apply_lg_attn_mask": "False",
                "ss_apply_t5_attn_mask": "False",
            },
            layers={"lora_unet": 10 * (tiny_sd3.BLOCKS - 1) + 7 + 4, "lora_te1": 12, "lora_te2": 12},
            said=(r"diffusers: none of \d+ layers load \(it wants names that begin with transformer\.",),
            cache_words=("--apply_t5_attn_mask", "--clip_l_dropout_rate", "0.3"),
            cached={
                "clip": (77, tiny_sd3.L_WIDTH + tiny_sd3.G_WIDTH),
                "pooled": (tiny_sd3.L_WIDTH + tiny_sd3.G_WIDTH,),
                "t5": (16, tiny_sd3.T5_WIDTH),
            },
            # also of what the encoders are left out of
            resume_words=tuple(
                word for name in ("clip_l", "clip_g", "t5") for word in (f"--{name}_dropout_rate", "0.4")
            ),
            their_words=(
                *("--network_module", "networks.lora_sd3", "--network_dim", "16", "--network_alpha", "16"),
                *("--network_args", "loraplus_unet_lr_ratio=4", "context_mod_dim=0", "x_mod_dim=0"),
                *("train_block_indices=0-2", "--weighting_scheme", "uniform", "--training_shift", "1.0"),
                *("--save_precision", "bf16", "--optimizer_type", "adafactor", "--bucket_reso_steps", "32"),
            ),
            their_facts={"ss_network_module": "networks.lora_sd3", "ss_weighting_scheme": None},
            # without the modulations: two in each block
            their_layers=8 * (tiny_sd3.BLOCKS - 1) + 5 + 4,
            their_names=r"lora_unet_joint_blocks_\d_(x|context)_block_(attn|mlp)",
            blocks="2,4,8",
            swapped=3,
            settings=(
                ("--weighting_scheme", "mode", "--min_timestep", "100", "--max_timestep", "900"),
                ("--apply_lg_attn_mask", "--apply_t5_attn_mask", "--text_encoder_lr", "1e-4", "2e-4"),
                ("--save_naming", "diffusers"),
            ),
            own_options=(
                ("--clip_g", "clip_g.safetensors"),
                ("--t5_dropout_rate", "0.1"),
                ("--apply_lg_attn_mask",),
            ),
            trained_texts=("pooled",),
            # from 5.1 to 1.5; predicting nothing gives 2.0
            learning_tokens=32,
        ),
    )
}
ROWS = tuple(FLOW.values())
