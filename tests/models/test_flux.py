"""FLUX.1: its files and names, and that all it computes is what diffusers' own classes compute."""

from __future__ import annotations

import json
import math
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from library.errors import UserError
from library.files.index import read_index
from library.models.checkpoints.detect import kind_of_file
from library.models.checkpoints.flux_names import fused_name, members_of, original_name, transformer_entries
from library.models.flux import Flux1
from library.models.flux_tokens import packed, places, unpacked
from library.models.modules import new_flux_transformer, new_t5_encoder
from library.models.opening import open_family
from tests import tiny_flux as tiny
from tests.models import flow_models
from tests.models.flow_models import ROUNDED, beside, condition, noisy

TOKENS = 24  # of T5: enough for the captions here
CAPTIONS = ["emoji of cat", "a much longer text, cut off at its end", ""]


opened = partial(flow_models.opened, Flux1, t5xxl_max_token_length=TOKENS)
loaded = partial(flow_models.loaded, Flux1, t5xxl_max_token_length=TOKENS)
_options = partial(beside, t5xxl_max_token_length=TOKENS)


@pytest.fixture(scope="module")
def flux(tiny_flux: Path) -> Flux1:
    return loaded(tiny_flux)


@pytest.fixture(scope="module")
def pipeline(tiny_flux: Path) -> Any:
    from diffusers import FluxPipeline

    return FluxPipeline.from_pretrained(tiny_flux, dtype=torch.float32)


@pytest.fixture(scope="module")
def files(tiny_flux: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return tiny.single_files(tiny_flux, tmp_path_factory.mktemp("files"))


# -- names and files


def test_both_directions_of_the_names_agree(tiny_flux: Path, files: dict[str, Path]) -> None:
    """The test's own way from diffusers' names to the original ones, and the program's way back, weight by weight."""
    family = open_family(str(files["pretrained_model_name_or_path"]), options=_options(files))
    denoiser = family.components.load("denoiser", torch.float32, "cpu")
    expected = load_file(tiny_flux / "transformer" / "diffusion_pytorch_model.safetensors")
    found = dict(denoiser.named_parameters())
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_names_are_diffusers_own(tmp_path: Path) -> None:
    """Against its converter, which knows the true width only: with all rows, and two columns in place of thousands."""
    from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers

    width = 3072
    config = tiny.configuration()["transformer"] | {"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 24}
    outline = new_flux_transformer(config)
    rows = {name: (len(p), *(2 for _ in p.shape[1:])) for name, p in outline.named_parameters()}
    generator = torch.Generator().manual_seed(0)
    states = {name: torch.randn(shape, generator=generator) for name, shape in rows.items()}
    before = tiny.DOUBLES, tiny.SINGLES
    tiny.DOUBLES = tiny.SINGLES = 1
    try:
        original = tiny.original(states)
    finally:
        tiny.DOUBLES, tiny.SINGLES = before
    assert original["single_blocks.0.linear1.weight"].shape == (7 * width, 2)
    save_file(original, tmp_path / "one.safetensors")
    entries = transformer_entries(read_index(tmp_path / "one.safetensors").entries)
    theirs = convert_flux_transformer_checkpoint_to_diffusers(dict(original))
    assert entries.keys() == theirs.keys()
    from library.models.checkpoints.weights import Reader

    with Reader() as reader:
        for name, expected in theirs.items():
            ours = reader.read(entries[name], dtype=torch.float32, device=torch.device("cpu"))
            assert torch.equal(ours.view(entries[name].shape), expected), name


def test_files_are_the_folder(files: dict[str, Path], flux: Flux1) -> None:
    """kohya's four files give the same answer as the diffusers folder, to the bit."""
    family = open_family(str(files["pretrained_model_name_or_path"]), options=_options(files))
    family.components.load_all(family.PARTS, torch.float32, "cpu")
    assert (family.architecture, family.base_model_version) == ("flux-1-dev", "flux1")
    given = condition(flux, CAPTIONS)
    assert all(torch.equal(found, given[name]) for name, found in condition(family, CAPTIONS).items())
    levels = torch.tensor([0.2, 0.5, 0.9])
    with torch.no_grad():
        assert torch.equal(family.predict(noisy(3), levels, given), flux.predict(noisy(3), levels, given))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_smaller_types_are_read_as_numbers(tiny_flux: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    files = tiny.single_files(tiny_flux, tmp_path, dtype=dtype)
    family = open_family(str(files["pretrained_model_name_or_path"]), options=_options(files))
    found = dict(family.components.load("denoiser", torch.float32, "cpu").named_parameters())
    expected = load_file(tiny_flux / "transformer" / "diffusion_pytorch_model.safetensors")
    for name, weight in expected.items():
        assert torch.equal(found[name], weight.to(dtype).float()), name


def test_everything_in_one_file(tiny_flux: Path, files: dict[str, Path], tmp_path: Path) -> None:
    prefixes = {
        "pretrained_model_name_or_path": "model.diffusion_model.",
        "clip_l": "text_encoders.clip_l.transformer.",
        "t5xxl": "text_encoders.t5xxl.transformer.",
    }
    tensors = {
        prefix + name: tensor for part, prefix in prefixes.items() for name, tensor in load_file(files[part]).items()
    }
    save_file(tensors, tmp_path / "all.safetensors")
    only = {name: str(files[name]) for name in ("ae", "t5_tokenizer_path")}
    family = open_family(str(tmp_path / "all.safetensors"), options=only)
    with family.outlined():
        assert family.adapter_targets()[0].part == "unet"


@pytest.mark.parametrize("missing", ["clip_l", "t5xxl", "ae"])
def test_a_missing_file_is_named(files: dict[str, Path], missing: str) -> None:
    options = _options({name: path for name, path in files.items() if name != missing})
    with pytest.raises(UserError, match=rf"does not hold all parts of FLUX.1: give --{missing}, the others"):
        open_family(str(files["pretrained_model_name_or_path"]), options=options)


def test_wrong_files_are_named(files: dict[str, Path], tmp_path: Path) -> None:
    base = str(files["pretrained_model_name_or_path"])
    with pytest.raises(UserError, match=r"--clip_l .*t5xxl_fp16.safetensors is a text encoder, and not .* CLIP-L"):
        open_family(base, options=_options({**files, "clip_l": files["t5xxl"]}))
    with pytest.raises(UserError, match=r"--t5xxl .*clip_l.safetensors is a text encoder, and not .* T5"):
        open_family(base, options=_options({**files, "t5xxl": files["clip_l"]}))
    with pytest.raises(UserError, match=r"--ae .*clip_l.safetensors is a text encoder, and holds no VAE"):
        open_family(base, options=_options({**files, "ae": files["clip_l"]}))
    with pytest.raises(UserError, match=r"--t5_tokenizer_path .*: there is no tokenizer.json in it"):
        open_family(base, options=_options({**files, "t5_tokenizer_path": tmp_path}))
    with pytest.raises(UserError, match=r"--vae .* and --ae .* are two names for one thing"):
        open_family(base, vae="other", options=_options(files))
    wide = {**load_file(files["clip_l"])}
    name = "text_model.embeddings.token_embedding.weight"
    save_file({**wide, name: torch.zeros(49408, 80)}, tmp_path / "clip_g.safetensors")
    with pytest.raises(UserError, match=r"needs a CLIP state of 64 channels and gets 80: another model's file"):
        open_family(base, options=_options({**files, "clip_l": tmp_path / "clip_g.safetensors"}))


def test_the_tokenizer_of_t5_is_asked_for(files: dict[str, Path]) -> None:
    family = open_family(
        str(files["pretrained_model_name_or_path"]), options=_options({**files} | {}) | {"t5_tokenizer_path": None}
    )
    with pytest.raises(UserError, match=r"no tokenizer of T5 .* give --t5_tokenizer_path.* google/t5-v1_1-xxl"):
        family.count_tokens("a cat")


_FIRST = "double_blocks.0.img_attn.norm.key_norm.scale"
_OF_FLUX2_DEV = ("single_stream_modulation.lin", "guidance_in.in_layer")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"distilled_guidance_layer.in_proj.bias": (8,), "nerf_blocks.0.norm.scale": (8,)}, "a Chroma1-Radiance model"),
        ({f"{name}.weight": (8, 8) for name in _OF_FLUX2_DEV}, "a FLUX.2 dev model"),
        ({"img_in.weight": (128, 384)}, "a FLUX.1 Fill model"),
        ({"img_in.weight": (128, 128)}, "a FLUX.1 Depth or Canny model"),
    ],
)
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_relatives_are_refused_by_name(
    tmp_path: Path, more: dict[str, tuple[int, ...]], said: str, prefix: str
) -> None:
    shapes = {_FIRST: (128,), "img_in.weight": (128, 64), **more}
    path = tmp_path / "model.safetensors"
    save_file({prefix + name: torch.zeros(shape) for name, shape in shapes.items()}, path)
    with pytest.raises(UserError, match=rf"is .*{said}.*, which is not supported; this version trains"):
        open_family(str(path))


def test_kontext_is_known_by_what_it_says(files: dict[str, Path], tmp_path: Path) -> None:
    """Its shapes are dev's."""
    named = shutil.copy(files["pretrained_model_name_or_path"], tmp_path / "flux1-kontext-dev.safetensors")
    assert kind_of_file(read_index(Path(named))).kind == "flux_kontext"
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "FluxKontextPipeline"}), encoding="utf-8")
    with pytest.raises(UserError, match=r"is a FLUX\.1 Kontext model, which edits images, which is not supported"):
        open_family(str(folder))


def test_the_ends_of_the_names() -> None:
    assert original_name("transformer_blocks.3.attn.add_k_proj") == "double_blocks.3.txt_attn.to_k"
    assert original_name("single_transformer_blocks.7.proj_mlp") == "single_blocks.7.proj_mlp"
    assert fused_name("double_blocks.3.txt_attn.to_k") == "double_blocks.3.txt_attn.qkv"
    assert fused_name("single_blocks.7.proj_mlp") == "single_blocks.7.linear1"
    assert fused_name("single_blocks.7.linear2") == ""
    assert [member.path for member in members_of("single_blocks_7_linear1")] == [
        *(f"single_transformer_blocks.7.attn.to_{which}" for which in "qkv"),
        "single_transformer_blocks.7.proj_mlp",
    ]
    assert members_of("double_blocks_0_other") == members_of("down_blocks_0_attn") == ()


# -- what is computed


def test_tokens_and_their_places_are_diffusers() -> None:
    from diffusers import FluxPipeline

    latents = noisy(2)
    tokens = packed(latents)
    assert torch.equal(tokens, FluxPipeline._pack_latents(latents, 2, 16, 8, 12))
    assert torch.equal(unpacked(tokens, 4, 6), latents)
    expected = FluxPipeline._prepare_latent_image_ids(2, 4, 6, torch.device("cpu"), torch.float32)
    assert torch.equal(places(4, 6, device=torch.device("cpu")), expected)
    wide = places(1, 400, device=torch.device("cpu"))
    assert wide[:, 2].unique().numel() == 400, "also where bf16 would round"


def test_prompts_are_encoded_as_by_diffusers(flux: Flux1, pipeline: Any) -> None:
    """States and pooled state, padding included. The text is in lower case for CLIP already."""
    with torch.no_grad():
        states, pooled, _ = pipeline.encode_prompt(CAPTIONS, None, max_sequence_length=TOKENS)
        found = flux.encode_prompts(CAPTIONS)
    torch.testing.assert_close(found["hidden_states"], states, rtol=0, atol=ROUNDED)
    torch.testing.assert_close(found["pooled"], pooled, rtol=0, atol=ROUNDED)
    assert found["hidden_states"].shape == (3, TOKENS, tiny.T5_WIDTH)
    assert not torch.equal(found["pooled"][0], found["pooled"][1])


def test_an_answer_is_diffusers(flux: Flux1, pipeline: Any) -> None:
    """With the guidance of training, 1."""
    given, levels = condition(flux, CAPTIONS), torch.tensor([0.1, 0.5, 0.95])
    with torch.no_grad():
        expected = pipeline.transformer(
            hidden_states=packed(noisy(3)),
            timestep=levels,
            guidance=torch.ones(3),
            pooled_projections=given["pooled"],
            encoder_hidden_states=given["hidden_states"],
            txt_ids=torch.zeros(TOKENS, 3),
            img_ids=places(4, 6, device=torch.device("cpu")),
        ).sample
        found = flux.predict(noisy(3), levels, given)
    torch.testing.assert_close(packed(found), expected, rtol=0, atol=ROUNDED)


def test_a_batch_is_its_singles(flux: Flux1) -> None:
    levels, captions = torch.tensor([0.1, 0.5, 0.95]), CAPTIONS
    with torch.no_grad():
        whole = flux.predict(noisy(3), levels, condition(flux, captions))
        for place, caption in enumerate(captions):
            one = slice(place, place + 1)
            single = flux.predict(noisy(3)[one], levels[one], condition(flux, [caption]))
            torch.testing.assert_close(whole[one], single, rtol=0, atol=ROUNDED)


def test_a_masked_text_is_a_shorter_one(tiny_flux: Path) -> None:
    """What --apply_t5_attn_mask hides has no effect: with room for twice as many tokens all is the same."""
    levels = torch.tensor([0.3, 0.7])
    answers = []
    for tokens in (TOKENS, 2 * TOKENS):
        family = loaded(tiny_flux, apply_t5_attn_mask=True, t5xxl_max_token_length=tokens)
        given = condition(family, ["emoji of cat", "a dog"])
        assert given["mask"].sum(dim=1).tolist() == [
            family.count_tokens(text) + 1 for text in ("emoji of cat", "a dog")
        ]
        with torch.no_grad():
            answers.append(family.predict(noisy(2), levels, given))
    torch.testing.assert_close(*answers, rtol=0, atol=ROUNDED)
    unmasked = loaded(tiny_flux)
    with torch.no_grad():
        seen = unmasked.predict(noisy(2), levels, condition(unmasked, ["emoji of cat", "a dog"]))
    assert (seen - answers[0]).abs().max() > 1e-3, "without the mask the padding is seen"


@pytest.mark.parametrize("autocast", [False, True])
def test_close_levels_differ_in_bf16(tiny_flux: Path, autocast: bool) -> None:
    """0.700 and 0.701 are one number in bf16, in which diffusers' transformer would take the time."""
    family = loaded(tiny_flux, torch.bfloat16)
    given = condition(family, ["emoji of cat"])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        one, other = (family.predict(noisy(1), torch.tensor([level]), given) for level in (0.700, 0.701))
        same = family.predict(noisy(1), torch.tensor([0.700]), given)
    assert torch.tensor(0.700).bfloat16() == torch.tensor(0.701).bfloat16()
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_bf16_is_near_fp32(tiny_flux: Path, flux: Flux1) -> None:
    """8 bits of mantissa, through five blocks: about 1 % of the answer's size."""
    small = loaded(tiny_flux, torch.bfloat16)
    levels = torch.tensor([0.1, 0.5, 0.95])
    with torch.no_grad():
        exact = flux.predict(noisy(3), levels, condition(flux, CAPTIONS))
        rounded = small.predict(noisy(3), levels, condition(small, CAPTIONS)).float()
    assert (rounded - exact).norm() / exact.norm() < 0.03


def test_latents_are_shifted_and_scaled(flux: Flux1, pipeline: Any) -> None:
    """(mean - 0.1159) · 0.3611, and the way back."""
    pixels = torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mean, std = flux.encode_images(pixels)
    with torch.no_grad():
        expected = pipeline.vae.encode(pixels).latent_dist
        torch.testing.assert_close(mean, (expected.mean - 0.1159) * 0.3611, rtol=0, atol=1e-6)
        torch.testing.assert_close(std, expected.std * 0.3611, rtol=0, atol=1e-6)
        back = pipeline.vae.decode(mean / 0.3611 + 0.1159).sample
    torch.testing.assert_close(flux.decode_latents(mean), back, rtol=0, atol=ROUNDED)
    assert mean.shape == (1, 16, 8, 12)
    assert (flux.size_divisor, flux.native_resolution) == (16, 1024)


@pytest.mark.parametrize(("scale", "guidance"), [(1.0, 3.5), (2.5, 1.5)])
def test_a_whole_sample_is_diffusers(flux: Flux1, pipeline: Any, scale: float, guidance: float) -> None:
    """Levels, shift, guidance and steps: of four steps, with and without a negative prompt."""
    with torch.no_grad():
        positive, negative = flux.encode_prompts(["emoji of cat"]), flux.encode_prompts(["a dog"])
        ours = flux.pipeline()(
            **flux.pipeline_arguments(positive, negative),
            num_inference_steps=4,
            guidance_scale=scale,
            width=96,
            height=64,
            generator=torch.Generator().manual_seed(3),
            output_type="latent",
            embedded_guidance=guidance,
        ).images
        pipeline.set_progress_bar_config(disable=True)
        theirs = pipeline(
            "emoji of cat",
            negative_prompt="a dog",
            true_cfg_scale=scale,
            guidance_scale=guidance,
            num_inference_steps=4,
            width=96,
            height=64,
            generator=torch.Generator().manual_seed(3),
            max_sequence_length=TOKENS,
            output_type="latent",
        ).images
    assert ours.shape == (1, 16, 8, 12)
    torch.testing.assert_close(packed(ours), theirs, rtol=0, atol=4 * ROUNDED)


def test_schnell_is_told_no_guidance(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from diffusers import FluxPipeline

    folder = tiny.write(tmp_path / "schnell", guidance=False)
    family = loaded(folder, guidance_scale=3.5)
    assert family.architecture == "flux-1-schnell"
    assert family.distilled
    assert "--guidance_scale 3.5 has no effect" in caplog.text
    assert (family.rendering.steps, family.rendering.guidance) == (4, None)
    with torch.no_grad():
        texts = family.encode_prompts(["emoji of cat"])
        ours = family.pipeline()(
            **family.pipeline_arguments(texts, texts),
            num_inference_steps=3,
            guidance_scale=1.0,
            width=64,
            height=64,
            generator=torch.Generator().manual_seed(3),
            output_type="latent",
        ).images
        theirs = FluxPipeline.from_pretrained(folder, dtype=torch.float32)(
            "emoji of cat",
            num_inference_steps=3,
            width=64,
            height=64,
            generator=torch.Generator().manual_seed(3),
            max_sequence_length=TOKENS,
            output_type="latent",
        ).images
    torch.testing.assert_close(packed(ours), theirs, rtol=0, atol=4 * ROUNDED)


def test_lengths_of_t5_follow_the_model(tiny_flux: Path, tmp_path: Path) -> None:
    assert opened(tiny_flux, t5xxl_max_token_length=None).token_limit == 511
    config = tiny_flux / "transformer" / "config.json"
    folder = Path(shutil.copytree(tiny_flux, tmp_path / "schnell"))
    changed = json.loads(config.read_text(encoding="utf-8")) | {"guidance_embeds": False}
    (folder / "transformer" / "config.json").write_text(json.dumps(changed), encoding="utf-8")
    states = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    save_file(
        {name: t for name, t in states.items() if "guidance" not in name},
        folder / "transformer" / "diffusion_pytorch_model.safetensors",
    )
    assert opened(folder, t5xxl_max_token_length=None).token_limit == 255


def test_shifts_of_the_drawn_levels(tiny_flux: Path) -> None:
    """kohya's: sigma and shift by --discrete_flow_shift (3), flux_shift by the size, the others not at all."""
    process, size = opened(tiny_flux).process, (128, 128)  # 1024 pixels
    shifts = {name: process.shift_at(size, name) for name in process.samplings}
    by_size = pytest.approx(math.exp(1.15))
    assert shifts == {"sigma": 3.0, "shift": 3.0, "flux_shift": by_size, "uniform": 1.0, "sigmoid": 1.0}
    assert opened(tiny_flux, discrete_flow_shift=3.1582).process.shift_at(size, "shift") == 3.1582
    assert process.shift_at(size) == by_size


def test_t5_keeps_its_states_where_its_weights_are_of_8_bits(tiny_flux: Path, flux: Flux1) -> None:
    """transformers would cast the states of the MLP to the last weight's type, float8."""
    from library.quantization.frozen import Held

    family = opened(tiny_flux)
    family.components.load("text_encoder", torch.float32, "cpu")
    family.components.load("text_encoder_2", torch.bfloat16, "cpu", held=Held("fp8", "--fp8_base"))
    with torch.no_grad():
        found = family.encode_prompts(CAPTIONS)["hidden_states"].float()
        expected = flux.encode_prompts(CAPTIONS)["hidden_states"]
    # fp8 has 3 bits of mantissa: each weight is off by up to 6 %
    assert (found - expected).norm() / expected.norm() < 0.15
    layer: Any = family.components["text_encoder_2"].get_submodule("encoder.block.0.layer.1.DenseReluDense.wo")
    assert layer.weight.dtype == torch.float8_e4m3fn


def test_t5_is_never_of_fp16(tiny_flux: Path) -> None:
    family = opened(tiny_flux)
    encoder = family.components.load("text_encoder_2", torch.float16, "cpu")
    assert {parameter.dtype for parameter in encoder.parameters()} == {torch.bfloat16}


# -- the true size, on the meta device


def test_true_counts() -> None:
    """families: parameters, layers that get adapters, and keys of kohya's default set."""
    config = json.loads((Path(tiny.ASSETS) / "flux.json").read_text(encoding="utf-8"))
    transformer, t5 = new_flux_transformer(config["transformer"]), new_t5_encoder(config["text_encoder_2"])
    assert sum(p.numel() for p in transformer.parameters()) == 11_901_408_320
    assert sum(p.numel() for p in t5.parameters()) == 4_762_310_656
    schnell = new_flux_transformer(config["transformer"] | {"guidance_embeds": False})
    assert sum(p.numel() for p in schnell.parameters()) == 11_891_178_560
    pattern = Flux1.PARTS["denoiser"].linear
    names = [original_name(path) for path, _ in transformer.named_modules() if pattern.fullmatch(path)]
    assert len(names) == 494
    assert len({fused_name(name) or name for name in names}) == 304
    held = Flux1.PARTS["text_encoder_2"].linear
    assert sum(bool(held.fullmatch(path)) for path, _ in t5.named_modules()) == 168
