"""Stable Diffusion 3 and 3.5: their files and names, and that all they compute is what diffusers' classes compute."""

from __future__ import annotations

import json
import logging
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from library.errors import UserError
from library.files.index import read_index
from library.files.tensors import TensorEntry
from library.models.checkpoints.checkpoint import vae_entries
from library.models.checkpoints.sd3.files import configurations
from library.models.checkpoints.sd3.names import fused_name, group_of, members_of, original_name, transformer_entries
from library.models.checkpoints.weights import Reader
from library.models.modules import new_projected_text_encoder, new_sd3_transformer, new_vae
from library.models.opening import open_family
from library.models.stable_diffusion_3 import StableDiffusion3
from tests import tiny_sd3 as tiny
from tests.models import flow_models
from tests.models.flow_models import ROUNDED, condition, noisy
from tests.models.original_layout import vae_name
from tests.quick import quick

TOKENS = 24  # of T5: enough for the captions here
CAPTIONS = ["emoji of cat", "a much longer text, cut off at its end", ""]
NORMS = ("norm_out.linear", f"transformer_blocks.{tiny.BLOCKS - 1}.norm1_context.linear")


opened = partial(flow_models.opened, StableDiffusion3, t5xxl_max_token_length=TOKENS)
loaded = partial(flow_models.loaded, StableDiffusion3, t5xxl_max_token_length=TOKENS)


@pytest.fixture(scope="module")
def sd3(tiny_sd3: Path) -> StableDiffusion3:
    return loaded(tiny_sd3)


@pytest.fixture(scope="module")
def pipeline(tiny_sd3: Path) -> Any:
    from diffusers import StableDiffusion3Pipeline

    return StableDiffusion3Pipeline.from_pretrained(tiny_sd3, dtype=torch.float32)


@pytest.fixture(scope="module")
def files(tiny_sd3: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return tiny.single_files(tiny_sd3, tmp_path_factory.mktemp("files"))


def given(files: dict[str, Path], **more: Any) -> dict[str, Any]:
    """`open_family`'s arguments for these files beside the base."""
    own = {name: str(path) for name, path in files.items() if name not in ("pretrained_model_name_or_path", "vae")}
    vae = {"vae": str(files["vae"])} if "vae" in files else {}
    return {**vae, "options": {**own, "t5xxl_max_token_length": TOKENS, **more}}


LEVELS = torch.tensor([0.1, 0.5, 0.95])


# -- names and files


def test_both_directions_of_the_names_agree(tiny_sd3: Path, files: dict[str, Path]) -> None:
    """The test's own way from diffusers' names to the original ones, and the program's way back, weight by weight. The
    last norms keep the original's order, shift before scale."""
    family = open_family(str(files["pretrained_model_name_or_path"]), **given(files))
    folder = open_family(str(tiny_sd3))
    expected = load_file(tiny_sd3 / "transformer" / "diffusion_pytorch_model.safetensors")
    for one in (family, folder):
        found = one.components.load("denoiser", torch.float32, "cpu").state_dict()
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            exchanged = name.rpartition(".")[0] in NORMS
            assert torch.equal(found[name], tensor.roll(len(tensor) // 2, 0) if exchanged else tensor), name


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_the_names_are_diffusers_own(kind: str, tmp_path: Path) -> None:
    """Against its converter, with all rows, and two columns in place of hundreds. It has the other order of the last
    norms' rows."""
    from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers

    outline = new_sd3_transformer(tiny.configuration(kind)["transformer"]).state_dict()
    generator = torch.Generator().manual_seed(0)
    columns = {"pos_embed.pos_embed": 128, "context_embedder.weight": tiny.T5_WIDTH}
    states = {
        name: torch.randn(len(t), *(min(side, columns.get(name, 2)) for side in t.shape[1:]), generator=generator)
        for name, t in outline.items()
    }
    original = tiny.original(states)
    save_file(original, tmp_path / "one.safetensors")
    entries = transformer_entries(read_index(tmp_path / "one.safetensors").entries)
    theirs = convert_sd3_transformer_checkpoint_to_diffusers(dict(original))
    assert entries.keys() == theirs.keys() == states.keys()
    with Reader() as reader:
        for name, expected in theirs.items():
            ours = reader.read(entries[name], dtype=torch.float32, device=torch.device("cpu"))
            exchanged = name.rpartition(".")[0] in NORMS
            expected = expected.roll(len(expected) // 2, 0) if exchanged else expected
            assert torch.equal(ours.view(entries[name].shape), expected), name


def test_files_are_the_folder(files: dict[str, Path], sd3: StableDiffusion3) -> None:
    """kohya's five files give the same answer as the diffusers folder, to the bit."""
    family = open_family(str(files["pretrained_model_name_or_path"]), **given(files))
    family.components.load_all(family.PARTS, torch.float32, "cpu")
    assert (family.architecture, family.base_model_version) == ("stable-diffusion-3-5-medium", "5-medium")
    own = condition(sd3, CAPTIONS)
    assert all(torch.equal(found, own[name]) for name, found in condition(family, CAPTIONS).items())
    with torch.no_grad():
        assert torch.equal(family.predict(noisy(3), LEVELS, own), sd3.predict(noisy(3), LEVELS, own))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_smaller_types_are_read_as_numbers(tiny_sd3: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    files = tiny.single_files(tiny_sd3, tmp_path, dtype=dtype)
    family = open_family(str(files["pretrained_model_name_or_path"]), **given(files))
    found = family.components.load("denoiser", torch.float32, "cpu").state_dict()
    expected = load_file(tiny_sd3 / "transformer" / "diffusion_pytorch_model.safetensors")
    for name, weight in expected.items():
        if name.rpartition(".")[0] not in NORMS:
            assert torch.equal(found[name], weight.to(dtype).float()), name


def test_everything_in_one_file(tiny_sd3: Path, files: dict[str, Path], tmp_path: Path, sd3: StableDiffusion3) -> None:
    """With the text encoders inside, as sd3_medium_incl_clips_t5xxl has them."""
    prefixes = {name: f"text_encoders.{name}.transformer." for name in ("clip_l", "clip_g", "t5xxl")}
    prefixes["pretrained_model_name_or_path"] = ""
    tensors = {
        prefix + name: tensor for part, prefix in prefixes.items() for name, tensor in load_file(files[part]).items()
    }
    save_file(tensors, tmp_path / "all.safetensors")
    only = {name: files[name] for name in ("vae", "t5_tokenizer_path")}
    family = open_family(str(tmp_path / "all.safetensors"), **given(only))
    family.components.load_all(family.components.text_encoders, torch.float32, "cpu")
    own = condition(sd3, CAPTIONS)
    assert all(torch.equal(found, own[name]) for name, found in condition(family, CAPTIONS).items())


def test_the_vae_inside_of_a_file_is_the_true_one(files: dict[str, Path]) -> None:
    """At the true size, under its original names, without layers before and behind the latents; and its scale."""
    outline = dict(new_vae(configurations()["vae"]).named_parameters())
    assert (len(outline), sum(tensor.numel() for tensor in outline.values())) == (244, 83_819_683)
    tensors = {f"first_stage_model.{vae_name(name, blocks=4)}": tensor for name, tensor in outline.items()}
    entries = {name: TensorEntry(Path(), 0, "float32", tuple(tensor.shape)) for name, tensor in tensors.items()}
    found = vae_entries(entries)
    assert found.keys() == outline.keys()
    latents = open_family(str(files["pretrained_model_name_or_path"]), **given(files)).latents
    assert (latents.scaling, latents.shift, latents.channels) == (1.5305, 0.0609, 16)


@pytest.mark.parametrize("missing", ["clip_l", "clip_g", "vae"])
def test_a_missing_file_is_named(files: dict[str, Path], missing: str) -> None:
    with pytest.raises(UserError, match=rf"does not hold all parts of Stable Diffusion 3: give --{missing}$"):
        open_family(
            str(files["pretrained_model_name_or_path"]),
            **given({name: path for name, path in files.items() if name != missing}),
        )


def test_wrong_files_are_named(files: dict[str, Path], tmp_path: Path) -> None:
    base = str(files["pretrained_model_name_or_path"])
    with pytest.raises(UserError, match=r"--clip_g .*t5xxl_fp16.safetensors is a text encoder, and not .* CLIP-G"):
        open_family(base, **given({**files, "clip_g": files["t5xxl"]}))
    with pytest.raises(UserError, match=r"--clip_l and --clip_g are exchanged"):
        open_family(base, **given({**files, "clip_l": files["clip_g"], "clip_g": _with_projection(files, tmp_path)}))
    with pytest.raises(UserError, match=r"needs pooled CLIP states of 192 channels and gets 128"):
        open_family(base, **given({**files, "clip_g": _with_projection(files, tmp_path)}))
    with pytest.raises(UserError, match=r"--clip_g .*clip_l.safetensors: has no 'text_projection.weight'"):
        open_family(base, **given({**files, "clip_g": files["clip_l"]}))
    with pytest.raises(UserError, match=r"the option is for a FLUX.1 model"):
        open_family(base, **given(files, ae="ae.safetensors"), given={"ae": "--ae"})


def _with_projection(files: dict[str, Path], folder: Path) -> Path:
    """CLIP-L as transformers writes it."""
    tensors = {**load_file(files["clip_l"]), "text_projection.weight": torch.eye(tiny.L_WIDTH)}
    save_file(tensors, folder / "clip_l_projected.safetensors")
    return folder / "clip_l_projected.safetensors"


def test_the_tokenizer_of_t5_is_asked_for(files: dict[str, Path]) -> None:
    family = open_family(str(files["pretrained_model_name_or_path"]), **given(files, t5_tokenizer_path=None))
    with pytest.raises(UserError, match=r"no tokenizer of T5 .* give --t5_tokenizer_path.* google/t5-v1_1-xxl"):
        family.count_tokens("a cat")


def test_relatives_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    mark = "joint_blocks.0.context_block.adaLN_modulation.1.bias"
    save_file({mark: torch.zeros(8), "x_embedder.proj.weight": torch.zeros(8, 33, 2, 2)}, path)
    with pytest.raises(UserError, match=r"is a Stable Diffusion 3 model of another kind, which is not supported"):
        open_family(str(path))
    save_file({"pos_embed.proj.weight": torch.zeros(8, 16, 2, 2)}, path)
    with pytest.raises(UserError, match=r"is the transformer of a diffusers folder, .* give the folder that holds"):
        open_family(str(path))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "model_index.json").write_text(
        json.dumps({"_class_name": "StableDiffusion3ControlNetPipeline"}), encoding="utf-8"
    )
    with pytest.raises(UserError, match=r"is a Stable Diffusion 3 model of another kind"):
        open_family(str(tmp_path / "folder"))


def test_weights_with_scales_are_read(files: dict[str, Path], tmp_path: Path) -> None:
    """Also of a layer that becomes three, and of the last norms."""
    tensors, name = load_file(files["pretrained_model_name_or_path"]), "model.diffusion_model.joint_blocks.0.x_block."
    scaled = {f"{name}attn.qkv", "model.diffusion_model.final_layer.adaLN_modulation.1"}
    expected, stored = dict(tensors), dict(tensors)
    for layer in scaled:
        small = (tensors[f"{layer}.weight"] / 0.25).to(torch.float8_e4m3fn)
        stored |= {f"{layer}.weight": small, f"{layer}.scale_weight": torch.tensor(0.25)}
        expected[f"{layer}.weight"] = small.float() * 0.25
    found = []
    for number, content in enumerate((stored, expected)):
        save_file(content, tmp_path / f"{number}.safetensors")
        family = open_family(str(tmp_path / f"{number}.safetensors"), **given(files))
        found.append(family.components.load("denoiser", torch.float32, "cpu").state_dict())
    assert all(torch.equal(tensor, found[1][key]) for key, tensor in found[0].items())


def test_the_ends_of_the_names() -> None:
    assert original_name("transformer_blocks.3.attn.add_k_proj") == "joint_blocks.3.context_block.attn.to_k"
    assert original_name("transformer_blocks.3.attn2.to_out.0") == "joint_blocks.3.x_block.attn2.proj"
    assert original_name("pos_embed.proj") == "x_embedder.proj"
    assert fused_name("joint_blocks.3.x_block.attn2.to_k") == "joint_blocks.3.x_block.attn2.qkv"
    assert fused_name("joint_blocks.3.x_block.mlp.fc1") == ""
    assert [member.path for member in members_of("joint_blocks_7_context_block_attn_qkv")] == [
        f"transformer_blocks.7.attn.add_{which}_proj" for which in "qkv"
    ]
    assert [member.path for member in members_of("final_layer_linear")] == ["proj_out"]
    assert members_of("joint_blocks_0_other") == members_of("double_blocks_0_img_attn_qkv") == ()
    assert group_of("joint_blocks_0_x_block_mlp_fc1") is group_of("single_blocks_0_linear1") is None


# -- what is computed


@pytest.mark.parametrize("captions", [CAPTIONS, ["word " * 100]], ids=["short", "cut off"])
def test_prompts_are_encoded_as_by_diffusers(sd3: StableDiffusion3, pipeline: Any, captions: list[str]) -> None:
    """All states as the transformer gets them, padding included, and the pooled one."""
    with torch.no_grad():
        states, _, pooled, _ = pipeline.encode_prompt(captions, None, None, max_sequence_length=TOKENS)
        found = sd3.encode_prompts(captions)
    clip = torch.nn.functional.pad(found["clip"], (0, tiny.T5_WIDTH - found["clip"].shape[2]))
    torch.testing.assert_close(torch.cat([clip, found["t5"]], dim=1), states, rtol=0, atol=ROUNDED)
    torch.testing.assert_close(found["pooled"], pooled, rtol=0, atol=ROUNDED)
    assert states.shape == (len(captions), 77 + TOKENS, tiny.T5_WIDTH)


@pytest.mark.parametrize("kind", quick(tiny.KINDS, "medium", "5-medium"))
def test_an_answer_is_diffusers(
    kind: str, tiny_sd3: Path, sd3: StableDiffusion3, pipeline: Any, tmp_path: Path
) -> None:
    """Of all three kinds; the table of places is cropped in the middle."""
    theirs, ours, own = pipeline.transformer, sd3, condition(sd3, CAPTIONS)
    if kind != "5-medium":
        made = tiny.pipeline(kind)
        folder = Path(shutil.copytree(tiny_sd3, tmp_path / kind))
        made.transformer.save_pretrained(folder / "transformer")
        theirs, ours = made.transformer, opened(folder)
        ours.components.load("denoiser", torch.float32, "cpu")
    assert ours.base_model_version == kind
    clip = torch.nn.functional.pad(own["clip"], (0, tiny.T5_WIDTH - own["clip"].shape[2]))
    with torch.no_grad():
        expected = theirs(
            hidden_states=noisy(3),
            timestep=1000 * LEVELS,
            pooled_projections=own["pooled"],
            encoder_hidden_states=torch.cat([clip, own["t5"]], dim=1),
        ).sample
        found = ours.predict(noisy(3), LEVELS, own)
    torch.testing.assert_close(found, expected, rtol=0, atol=ROUNDED)


def test_a_batch_is_its_singles(sd3: StableDiffusion3) -> None:
    with torch.no_grad():
        whole = sd3.predict(noisy(3), LEVELS, condition(sd3, CAPTIONS))
        for place, caption in enumerate(CAPTIONS):
            one = slice(place, place + 1)
            single = sd3.predict(noisy(3)[one], LEVELS[one], condition(sd3, [caption]))
            torch.testing.assert_close(whole[one], single, rtol=0, atol=ROUNDED)


def test_masks_act_inside_of_the_encoders(tiny_sd3: Path, sd3: StableDiffusion3) -> None:
    """The states of a text do not depend on its padding where that is hidden; CLIP's never do, since it looks back
    alone."""
    captions = ["emoji of cat", "a dog"]
    plain = condition(sd3, captions)
    for tokens in (TOKENS, 2 * TOKENS):
        masked = loaded(tiny_sd3, apply_lg_attn_mask=True, apply_t5_attn_mask=True, t5xxl_max_token_length=tokens)
        found = condition(masked, captions)
        for row, caption in enumerate(captions):
            length = masked.count_tokens(caption) + 1
            if tokens == TOKENS:
                before, text = found["t5"][row, :length], found["clip"][row, :4]
                torch.testing.assert_close(text, plain["clip"][row, :4], rtol=0, atol=ROUNDED)
                assert not torch.allclose(found["clip"][row], plain["clip"][row], atol=1e-3)
                assert not torch.allclose(before, plain["t5"][row, :length], atol=1e-3)
                ids = torch.tensor(masked._t5.rows([caption]))
                shorter = masked.components["text_encoder_3"](ids).last_hidden_state[0]
                torch.testing.assert_close(before, shorter, rtol=0, atol=ROUNDED)
    torch.testing.assert_close(found["pooled"], plain["pooled"], rtol=0, atol=ROUNDED)


def test_without_t5_there_are_zeros(
    tiny_sd3: Path, tmp_path: Path, pipeline: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """As diffusers has it, and it is said."""
    folder = Path(shutil.copytree(tiny_sd3, tmp_path / "small", ignore=shutil.ignore_patterns("text_encoder_3")))
    with caplog.at_level(logging.WARNING):
        family = loaded(folder, t5_dropout_rate=0.1)
    assert "has no T5: zeros take the place of its states" in caplog.text
    assert "--t5_dropout_rate has no effect: there is no T5" in caplog.text
    assert (family.token_limit, family.count_tokens("a cat")) == (75, 2)
    own = condition(family, CAPTIONS)
    assert own.keys() == {"clip", "pooled"}
    third, pipeline.text_encoder_3 = pipeline.text_encoder_3, None
    try:
        with torch.no_grad():
            states, _, pooled, _ = pipeline.encode_prompt(CAPTIONS, None, None, max_sequence_length=TOKENS)
            expected = pipeline.transformer(
                hidden_states=noisy(3),
                timestep=1000 * LEVELS,
                pooled_projections=pooled,
                encoder_hidden_states=states,
            ).sample
            found = family.predict(noisy(3), LEVELS, own)
    finally:
        pipeline.text_encoder_3 = third
    torch.testing.assert_close(found, expected, rtol=0, atol=ROUNDED)


def test_encoders_are_left_out_independently(tiny_sd3: Path, sd3: StableDiffusion3) -> None:
    """Zeros in the place of the states of one, and its part of the pooled ones, for the samples that it hits."""
    family = opened(tiny_sd3, clip_l_dropout_rate=0.5, clip_g_dropout_rate=0.5, t5_dropout_rate=0.5)
    own, width = condition(sd3, CAPTIONS), tiny.L_WIDTH
    draws = {"clip_l_dropout_rate": [0.4, 0.6, 0.6], "clip_g_dropout_rate": [0.6, 0.4, 0.6]}
    draws["t5_dropout_rate"] = [0.6, 0.6, 0.4]
    found = family.with_text_dropout(own, draws.__getitem__)
    for row, part in enumerate(("l", "g", "t5")):
        parts = {
            "l": (found["clip"][row, :, :width], found["pooled"][row, :width]),
            "g": (found["clip"][row, :, width:], found["pooled"][row, width:]),
            "t5": (found["t5"][row],),
        }
        assert {name for name, tensors in parts.items() if not any(t.any() for t in tensors)} == {part}
    assert sd3.with_text_dropout(own, draws.__getitem__) is own


@pytest.mark.parametrize("autocast", [False, True])
def test_close_levels_differ_in_bf16(tiny_sd3: Path, autocast: bool) -> None:
    """0.700 and 0.701 are one number in bf16; the time is told in float32."""
    family = opened(tiny_sd3)
    denoiser: Any = family.components.load("denoiser", torch.bfloat16, "cpu")
    seen: list[Tensor] = []
    handle = denoiser.time_text_embed.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    own = {"clip": torch.zeros(1, 77, 192), "pooled": torch.zeros(1, 192)}
    try:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            for level in (0.700, 0.701):
                family.predict(noisy(1), torch.tensor([level]), own)
    finally:
        handle.remove()
    assert [float(time) for time in seen] == pytest.approx([700.0, 701.0])
    assert {time.dtype for time in seen} == {torch.float32}


def test_latents_are_shifted_and_scaled(sd3: StableDiffusion3, pipeline: Any) -> None:
    """(mean - 0.0609) · 1.5305, and the way back."""
    pixels = torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mean, std = sd3.encode_images(pixels)
    with torch.no_grad():
        expected = pipeline.vae.encode(pixels).latent_dist
        torch.testing.assert_close(mean, (expected.mean - 0.0609) * 1.5305, rtol=0, atol=1e-6)
        torch.testing.assert_close(std, expected.std * 1.5305, rtol=0, atol=1e-6)
        back = pipeline.vae.decode(mean / 1.5305 + 0.0609).sample
    torch.testing.assert_close(sd3.decode_latents(mean), back, rtol=0, atol=ROUNDED)
    assert (sd3.size_divisor, sd3.native_resolution, sd3.longest_side) == (16, 1024, 128)


@pytest.mark.parametrize("scale", [1.0, 4.5])
def test_a_whole_sample_is_diffusers(sd3: StableDiffusion3, pipeline: Any, scale: float) -> None:
    """Levels, the shift, guidance and steps: of four steps, with and without a negative prompt."""
    with torch.no_grad():
        positive, negative = sd3.encode_prompts(["emoji of cat"]), sd3.encode_prompts(["a dog"])
        ours = sd3.pipeline()(
            **sd3.pipeline_arguments(positive, negative),
            num_inference_steps=4,
            guidance_scale=scale,
            width=96,
            height=64,
            generator=torch.Generator().manual_seed(3),
            output_type="latent",
        ).images
        pipeline.set_progress_bar_config(disable=True)
        theirs = pipeline(
            "emoji of cat",
            negative_prompt="a dog",
            guidance_scale=scale,
            num_inference_steps=4,
            width=96,
            height=64,
            generator=torch.Generator().manual_seed(3),
            max_sequence_length=TOKENS,
            output_type="latent",
        ).images
    assert ours.shape == (1, 16, 8, 12)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=4 * ROUNDED)


def test_too_large_an_image_is_refused(sd3: StableDiffusion3) -> None:
    with pytest.raises(UserError, match="has places for 128 pixels a side, and an image has more"):
        sd3.predict(torch.zeros(1, 16, 8, 18), torch.tensor([0.5]), condition(sd3, ["a cat"]))


def test_shifts_of_the_drawn_levels(sd3: StableDiffusion3) -> None:
    """Of samples 3; none of those that are drawn: that is --training_shift."""
    process = sd3.process
    assert {name: process.shift_at((128, 128), name) for name in process.samplings} == {
        "sigma": 1.0,
        "uniform": 1.0,
        "sigmoid": 1.0,
    }
    assert process.shift_at((128, 128)) == 3.0
    assert process.samplers == ("euler", "heun")


def test_renderings_are_the_kinds(tiny_sd3: Path, tmp_path: Path) -> None:
    scales = {}
    for kind in tiny.KINDS:
        folder = Path(shutil.copytree(tiny_sd3, tmp_path / kind, ignore=shutil.ignore_patterns("*.safetensors")))
        config = folder / "transformer" / "config.json"
        changed = json.loads(config.read_text(encoding="utf-8")) | tiny.KINDS[kind] | {"_name_or_path": kind}
        changed.setdefault("qk_norm", "rms_norm")
        config.write_text(json.dumps(changed), encoding="utf-8")
        from library.models.checkpoints.sd3.files import open_sd3

        rendering = StableDiffusion3(open_sd3(kind, folder, kind="sd3")).rendering
        scales[kind] = (rendering.steps, rendering.scale)
        turbo = StableDiffusion3(open_sd3(kind, folder, kind="sd3"), turbo=True)
        assert (turbo.rendering.steps, turbo.rendering.scale, turbo.distilled) == (4, 1.0, True)
    assert scales == {"medium": (28, 7.0), "5-medium": (28, 5.0), "5-large": (28, 4.5)}
    named = shutil.copytree(tiny_sd3, tmp_path / "sd3.5-large-turbo")
    assert opened(Path(named)).distilled


# -- the true size, on the meta device

TRUE = {
    "medium": ({"qk_norm": None, "dual_attention_layers": (), "pos_embed_max_size": 192}, 2_028_328_000, 333, 237),
    "5-medium": ({}, 2_243_171_520, 385, 263),
    "5-large": (
        {
            "num_layers": 38,
            "num_attention_heads": 38,
            "caption_projection_dim": 2432,
            "pos_embed_max_size": 192,
            "dual_attention_layers": (),
        },
        8_056_627_520,
        529,
        377,
    ),
}


@pytest.mark.parametrize("kind", TRUE)
def test_true_counts(kind: str) -> None:
    """families: parameters without the table of places, layers that get adapters, and kohya's layers."""
    more, parameters, leaves, fused = TRUE[kind]
    transformer = new_sd3_transformer(configurations()["transformer"] | more)
    assert sum(p.numel() for p in transformer.parameters()) == parameters
    pattern = StableDiffusion3.PARTS["denoiser"].linear
    names = [original_name(path) for path, _ in transformer.named_modules() if pattern.fullmatch(path)]
    assert len(names) == leaves
    assert len({fused_name(name) or name for name in names}) == fused
    table: Any = transformer.get_submodule("pos_embed").pos_embed
    assert table.numel() == {"medium": 192**2 * 1536, "5-medium": 226_492_416, "5-large": 89_653_248}[kind]
    every = StableDiffusion3.PARTS["denoiser"].more
    assert sum(bool(every.fullmatch(path)) for path, _ in transformer.named_modules()) == 8


def test_true_counts_of_the_text_encoders() -> None:
    encoder = new_projected_text_encoder(configurations()["text_encoder_2"])
    pattern = StableDiffusion3.PARTS["text_encoder_2"].linear
    assert sum(bool(pattern.fullmatch(path)) for path, _ in encoder.named_modules()) == 192
    assert sum(p.numel() for p in encoder.parameters()) == 694_659_840
