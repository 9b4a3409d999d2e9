"""Anima: its files and names, and that all it computes is what diffusers' own classes compute."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from library.errors import UserError
from library.models import modules
from library.models.anima import Anima
from library.models.checkpoints.anima_names import dotted_name, original_name
from library.models.checkpoints.parts.wan_vae import vae_entries
from library.models.opening import open_family
from tests import tiny_anima as tiny
from tests.models import flow_models
from tests.models.flow_models import ROUNDED, assert_same_weights, beside, noisy, texts

CAPTIONS = ["emoji of cat", "a much longer text, with more words", ""]


opened = partial(flow_models.opened, Anima)
loaded = partial(flow_models.loaded, Anima)


@pytest.fixture(scope="module")
def anima(tiny_anima: Path) -> Anima:
    return loaded(tiny_anima)


@pytest.fixture(scope="module")
def files(tiny_anima: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return tiny.single_files(tiny_anima, tmp_path_factory.mktemp("files"))


@pytest.fixture
def pipeline(tiny_anima: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """diffusers' modular pipeline, which without torchvision needs its function that resizes masks."""
    from diffusers.guiders import ClassifierFreeGuidance
    from diffusers.models.transformers import transformer_cosmos
    from diffusers.modular_pipelines.anima import AnimaAutoBlocks
    from diffusers.schedulers import FlowMatchEulerDiscreteScheduler
    from transformers import PreTrainedTokenizerFast

    def resize(mask: Tensor, size: list[int], interpolation: str) -> Tensor:
        return torch.nn.functional.interpolate(mask, size=size, mode=interpolation)

    stand_in = SimpleNamespace(
        functional=SimpleNamespace(resize=resize), InterpolationMode=SimpleNamespace(NEAREST="nearest")
    )
    monkeypatch.setattr(transformer_cosmos, "transforms", stand_in, raising=False)
    made = AnimaAutoBlocks().init_pipeline()
    made.update_components(
        **tiny.parts(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        tokenizer=PreTrainedTokenizerFast.from_pretrained(tiny_anima / "tokenizer"),
        t5_tokenizer=PreTrainedTokenizerFast.from_pretrained(tiny_anima / "t5_tokenizer"),
        guider=ClassifierFreeGuidance(guidance_scale=4.0),
    )
    return made


# -- names and files


def test_files_are_the_folder(files: dict[str, Path], anima: Anima) -> None:
    """The users' three files hold every weight of the diffusers folder, by its name there."""
    family = loaded(files["pretrained_model_name_or_path"], **beside(files))
    assert (family.architecture, family.base_model_version) == ("anima-preview", "anima")
    assert_same_weights(family, anima)
    for part in Anima.PARTS:
        if part != "vae":  # whose configuration says more
            ours, theirs = family.components.config(part), anima.components.config(part)
            assert {key: theirs.get(key) for key in ours if key in theirs} == {
                key: value for key, value in ours.items() if key in theirs
            }
    given = texts(anima, CAPTIONS)
    assert torch.equal(texts(family, CAPTIONS)["hidden_states"], given["hidden_states"])
    levels = torch.tensor([0.2, 0.5, 0.9])
    with torch.no_grad():
        assert torch.equal(family.predict(noisy(3), levels, given), anima.predict(noisy(3), levels, given))


def test_the_names_are_diffusers_own(tiny_anima: Path) -> None:
    """Against its converters."""
    from diffusers.loaders.single_file_utils import (
        convert_cosmos_transformer_checkpoint_to_diffusers,
        convert_wan_vae_to_diffusers,
    )

    states = tiny.weights_in(tiny_anima / "transformer")
    renamed = {f"net.{name}": tensor for name, tensor in tiny.original(states, {}).items()}
    assert convert_cosmos_transformer_checkpoint_to_diffusers(renamed).keys() == states.keys()
    of_vae = tiny.weights_in(tiny_anima / "vae")
    renamed = tiny.wan_vae(of_vae)
    entries: Any = {name: name for name in renamed}  # names are all that it reads
    theirs = convert_wan_vae_to_diffusers({name: name for name in renamed})
    assert vae_entries(entries) == theirs
    assert theirs.keys() == of_vae.keys()


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_other_beginnings_of_names(tiny_anima: Path, tmp_path: Path, prefix: str) -> None:
    files = tiny.single_files(tiny_anima, tmp_path, prefix=prefix)
    with opened(files["pretrained_model_name_or_path"], **beside(files)).outlined():
        pass


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_smaller_types_are_read_as_numbers(tiny_anima: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    files = tiny.single_files(tiny_anima, tmp_path, dtype=dtype)
    family = opened(files["pretrained_model_name_or_path"], **beside(files))
    for part, folder in (("denoiser", "transformer"), ("text_encoder_2", "text_conditioner")):
        found = dict(family.components.load(part, torch.float32, "cpu").named_parameters())
        for name, weight in tiny.weights_in(tiny_anima / folder).items():
            assert torch.equal(found[name], weight.to(dtype).float()), name


def test_an_llm_adapter_of_its_own(files: dict[str, Path], tmp_path: Path) -> None:
    whole = load_file(files["pretrained_model_name_or_path"])
    apart = {name.removeprefix("net."): tensor for name, tensor in whole.items() if "llm_adapter" in name}
    save_file({name: t for name, t in whole.items() if "llm_adapter" not in name}, tmp_path / "cosmos.safetensors")
    save_file(apart, tmp_path / "adapter.safetensors")
    with pytest.raises(UserError, match=r"does not hold all parts of Anima: give --llm_adapter_path, .* beside NVIDIA"):
        opened(tmp_path / "cosmos.safetensors", **beside(files))
    given = beside(files, llm_adapter_path=str(tmp_path / "adapter.safetensors"))
    with opened(tmp_path / "cosmos.safetensors", **given).outlined():
        pass


def test_missing_and_wrong_files(files: dict[str, Path], tiny_anima: Path, tmp_path: Path) -> None:
    base = files["pretrained_model_name_or_path"]
    with pytest.raises(UserError, match=r"give --qwen3, the text encoder's file and --vae, the VAE's file"):
        opened(base)
    with pytest.raises(
        UserError, match=r"--qwen3 .*qwen_image_vae.safetensors is a VAE, and not the text encoder Qwen3"
    ):
        opened(base, **beside({**files, "qwen3": files["vae"]}))
    with pytest.raises(UserError, match=r"--vae .* is a text encoder, and not the VAE of Qwen-Image"):
        opened(base, **beside({**files, "vae": files["qwen3"]}))
    with pytest.raises(UserError, match=r"--qwen3 .*nothing.safetensors: no such file"):
        opened(base, **beside({**files, "qwen3": tmp_path / "nothing.safetensors"}))
    wide = tiny.weights_in(tiny_anima / "text_encoder")
    save_file({**wide, "embed_tokens.weight": torch.zeros(128, 40)}, tmp_path / "wide.safetensors")
    with pytest.raises(UserError, match=r"its LLM adapter needs states .* with 32 channels and gets 40: another model"):
        opened(base, **beside({**files, "qwen3": tmp_path / "wide.safetensors"}))


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("qwen3_tokenizer_path", r"no tokenizer of Qwen3 .* give --qwen3_tokenizer_path, .* Qwen/Qwen3-0.6B"),
        ("t5_tokenizer_path", r"no tokenizer of T5 .* give --t5_tokenizer_path, .* google/t5-v1_1-xxl"),
    ],
)
def test_tokenizers_are_asked_for(files: dict[str, Path], tmp_path: Path, option: str, said: str) -> None:
    base = files["pretrained_model_name_or_path"]
    with pytest.raises(UserError, match=said):
        opened(base, **beside(files, **{option: None})).count_tokens("a cat")
    with pytest.raises(UserError, match=rf"--{option} .*: there is no tokenizer.json in it, nor vocab.json"):
        opened(base, **beside(files, **{option: str(tmp_path)}))


def test_exchanged_tokenizers_are_refused(files: dict[str, Path], tiny_anima: Path, tmp_path: Path) -> None:
    base, other = files["pretrained_model_name_or_path"], str(tiny_anima / "t5_tokenizer")
    with pytest.raises(UserError, match=r"t5_tokenizer is not the tokenizer of Qwen3: it adds tokens to every text"):
        opened(base, **beside(files, qwen3_tokenizer_path=other)).count_tokens("a cat")
    large = tiny.qwen_tokenizer()
    large.add_tokens([f"word{number}" for number in range(100)])
    large.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match=r"is not the tokenizer of T5: it has \d+ tokens, and Anima 128"):
        opened(base, **beside(files, t5_tokenizer_path=str(tmp_path))).count_tokens("a cat")


def test_a_distilled_version_is_known_by_its_name(files: dict[str, Path], tmp_path: Path) -> None:
    named = tmp_path / "anima-turbo-v1.safetensors"
    named.symlink_to(files["pretrained_model_name_or_path"])
    assert opened(named, **beside(files)).distilled
    assert not opened(files["pretrained_model_name_or_path"], **beside(files)).distilled


def test_a_folder_of_the_text_encoder_has_its_tokenizer(
    files: dict[str, Path], tiny_anima: Path, tmp_path: Path
) -> None:
    import shutil

    folder = shutil.copytree(tiny_anima / "text_encoder", tmp_path / "qwen3")
    shutil.copy(tiny_anima / "tokenizer" / "tokenizer.json", folder)
    given = beside(files, qwen3=str(folder), qwen3_tokenizer_path=None)
    assert opened(files["pretrained_model_name_or_path"], **given).count_tokens("a cat") == 6


def test_models_for_video_are_refused(tmp_path: Path) -> None:
    shapes = {"blocks.0.cross_attn.q_proj.weight": (8, 8), "x_embedder.proj.1.weight": (8, 72)}
    path = tmp_path / "model.safetensors"
    save_file({f"net.{name}": torch.zeros(shape) for name, shape in shapes.items()}, path)
    with pytest.raises(UserError, match=r"is a Cosmos-Predict2 model that is not for images alone, which is not sup"):
        open_family(str(path))


def test_the_ends_of_the_names() -> None:
    assert original_name("transformer_blocks.3.attn2.to_out.0") == "blocks.3.cross_attn.output_proj"
    assert original_name("transformer_blocks.3.norm3.linear_2") == "blocks.3.adaln_modulation_mlp.2"
    assert dotted_name("lora_unet_blocks_12_mlp_layer2") == "diffusion_model.blocks.12.mlp.layer2"
    text = "text_encoders.qwen3_06b.transformer.model.layers.0.mlp.gate_proj"
    assert dotted_name("lora_te_layers_0_mlp_gate_proj") == text
    assert dotted_name("lora_unet_blocks_0_other") == dotted_name("lora_unet_down_blocks_0_attn") == ""


# -- what is computed


def test_an_answer_is_diffusers(anima: Anima, pipeline: Any) -> None:
    """With its own mask of padding, and its own zeros behind a text."""
    levels = torch.tensor([0.1, 0.5, 0.95])
    with torch.no_grad():
        states = texts(anima, CAPTIONS)
        padded = torch.nn.functional.pad(states["hidden_states"], (0, 0, 0, 512 - states["hidden_states"].shape[1]))
        expected = pipeline.transformer(
            hidden_states=noisy(3)[:, :, None],
            timestep=levels,
            encoder_hidden_states=padded,
            padding_mask=torch.zeros(1, 1, 64, 96),
        ).sample[:, :, 0]
        found = anima.predict(noisy(3), levels, states)
    torch.testing.assert_close(found, expected, rtol=0, atol=ROUNDED)


def test_prompts_are_encoded_as_by_diffusers(anima: Anima, pipeline: Any) -> None:
    from diffusers.modular_pipelines.anima.encoders import AnimaTextEncoderStep

    with torch.no_grad():
        theirs = AnimaTextEncoderStep.encode_prompt(pipeline, CAPTIONS, prepare_unconditional_embeds=False)
        expected = pipeline.text_conditioner(
            source_hidden_states=theirs["qwen_prompt_embeds"],
            target_input_ids=theirs["t5_input_ids"],
            target_attention_mask=theirs["t5_attention_mask"],
            source_attention_mask=theirs["qwen_attention_mask"],
        )
    found = texts(anima, CAPTIONS)["hidden_states"]
    assert expected.shape == (3, 512, tiny.STATES)
    assert found.shape[1] == max(len(anima._t5_content(caption)) + 1 for caption in CAPTIONS)
    torch.testing.assert_close(found, expected[:, : found.shape[1]], rtol=0, atol=ROUNDED)
    assert not expected[:, found.shape[1] :].any()
    assert (found[0, :4] - found[1, :4]).abs().max() > 0.1, "captions differ"


def test_a_batch_is_its_singles(anima: Anima) -> None:
    """Captions of other lengths beside one have no effect: its padding is hidden where it is not zero."""
    levels, whole_texts = torch.tensor([0.1, 0.5, 0.95]), texts(anima, CAPTIONS)
    with torch.no_grad():
        whole = anima.predict(noisy(3), levels, whole_texts)
        for place, caption in enumerate(CAPTIONS):
            one, alone = slice(place, place + 1), texts(anima, [caption])
            length = alone["hidden_states"].shape[1]
            seen = whole_texts["hidden_states"][one]
            torch.testing.assert_close(seen[:, :length], alone["hidden_states"], rtol=0, atol=ROUNDED)
            assert not seen[:, length:].any()
            single = anima.predict(noisy(3)[one], levels[one], alone)
            torch.testing.assert_close(whole[one], single, rtol=0, atol=ROUNDED)


def test_long_captions_are_cut(tiny_anima: Path) -> None:
    family = loaded(tiny_anima, qwen3_max_token_length=8, t5_max_token_length=6)
    assert family.token_limit == 5
    long, cut = texts(family, ["abcdefghijklmno"]), texts(family, ["abcdefghijk"])
    assert long["hidden_states"].shape == (1, 6, tiny.STATES)
    assert torch.equal(long["hidden_states"], cut["hidden_states"])


def test_close_levels_differ_in_bf16(tiny_anima: Path) -> None:
    """0.700 and 0.701 are one number in bf16, in which diffusers' pipeline would take the time."""
    family = loaded(tiny_anima, torch.bfloat16)
    given = texts(family, ["emoji of cat"])
    with torch.no_grad():
        one, other = (family.predict(noisy(1), torch.tensor([level]), given) for level in (0.700, 0.701))
    assert torch.tensor(0.700).bfloat16() == torch.tensor(0.701).bfloat16()
    assert not torch.equal(one, other)


def test_large_images_have_places(anima: Anima) -> None:
    """diffusers' table ends at 2048 pixels, its formula does not."""
    with torch.no_grad():
        assert anima.predict(torch.zeros(1, 16, 2, 300), torch.tensor([0.5]), texts(anima, [""])).shape[-1] == 300


def test_latents_are_normalised_by_channel(anima: Anima, pipeline: Any) -> None:
    pixels = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mean, std = anima.encode_images(pixels)
    config = pipeline.vae.config
    means, deviations = (torch.tensor(table).view(1, 16, 1, 1) for table in (config.latents_mean, config.latents_std))
    with torch.no_grad():
        expected = pipeline.vae.encode(pixels[:, :, None]).latent_dist
        torch.testing.assert_close(mean, (expected.mean[:, :, 0] - means) / deviations, rtol=0, atol=ROUNDED)
        assert not std.any(), "the middle of the distribution, as diffusers' own encoder of images takes it"
        back = pipeline.vae.decode((mean * deviations + means)[:, :, None]).sample[:, :, 0]
    torch.testing.assert_close(anima.decode_latents(mean), back, rtol=0, atol=ROUNDED)
    assert mean.shape == (2, 16, 8, 12)
    assert (anima.size_divisor, anima.native_resolution) == (16, 1024)


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_a_whole_sample_is_diffusers(anima: Anima, pipeline: Any, scale: float) -> None:
    """Levels, shift, guidance and steps: of four steps, with and without a negative prompt."""
    from diffusers.guiders import ClassifierFreeGuidance

    positive, negative = texts(anima, ["emoji of cat"]), texts(anima, ["a dog"])
    common: dict[str, Any] = {"num_inference_steps": 4, "width": 96, "height": 64}
    with torch.no_grad():
        ours = anima.pipeline()(
            **anima.pipeline_arguments(positive, negative),
            **common,
            guidance_scale=scale,
            generator=torch.Generator().manual_seed(3),
            output_type="latent",
        ).images
        pipeline.update_components(guider=ClassifierFreeGuidance(guidance_scale=scale))
        pipeline.set_progress_bar_config(disable=True)
        theirs = pipeline(
            prompt="emoji of cat",
            negative_prompt="a dog",
            **common,
            generator=torch.Generator().manual_seed(3),
            output="latents",
        )[:, :, 0]
    assert ours.shape == (1, 16, 8, 12)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=4 * ROUNDED)


def test_shifts_of_the_drawn_levels(tiny_anima: Path) -> None:
    """kohya's: by --discrete_flow_shift, 1, with sigma and shift; samples by 3, whatever their size."""
    process, size = opened(tiny_anima).process, (128, 128)
    assert {name: process.shift_at(size, name) for name in process.samplings} == dict.fromkeys(
        ("sigma", "uniform", "sigmoid", "shift"), 1.0
    )
    assert opened(tiny_anima, discrete_flow_shift=3.0).process.shift_at(size, "shift") == 3.0
    assert process.shift_at(size) == process.shift_at((8, 8)) == pytest.approx(3.0)


# -- the true size, on the meta device


def test_true_counts() -> None:
    """Parameters, and layers that get adapters."""
    config = json.loads((Path(tiny.ASSETS) / "anima.json").read_text(encoding="utf-8"))
    transformer = modules.new_anima_transformer(config["transformer"])
    adapter = modules.new_llm_adapter(config["text_conditioner"])
    qwen, vae = modules.new_qwen3_encoder(config["text_encoder"]), modules.new_qwen_vae(config["vae"])
    counts = [sum(p.numel() for p in module.parameters()) for module in (transformer, adapter, qwen, vae)]
    assert counts[0] + counts[1] == 2_091_068_928
    assert counts[1:] == [134_663_680, 596_049_920, 126_892_531]
    pattern = Anima.PARTS["denoiser"].linear
    layers = {path: layer for path, layer in transformer.named_modules() if pattern.fullmatch(path)}
    names = [original_name(path) for path in layers]
    assert len(names) == len(set(names)) == 280
    per_rank = sum(layer.in_features + layer.out_features for layer in layers.values())  # type: ignore[operator]
    assert per_rank == 1_433_600
    more = Anima.PARTS["denoiser"].more
    assert sum(bool(more.fullmatch(path)) for path, _ in transformer.named_modules()) == 168
    texts = Anima.PARTS["text_encoder"].linear
    assert sum(bool(texts.fullmatch(path)) for path, _ in qwen.named_modules()) == 196
