"""FLUX.2 klein: its files and names, and that all it computes is what diffusers' own classes compute."""

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
from torch import Tensor

from library.config.parser import parse
from library.errors import UserError
from library.models import modules
from library.models.checkpoints.flux2_files import vae_entries
from library.models.flux2 import Flux2Klein
from library.models.opening import open_family
from tests import tiny_flux2 as tiny
from tests.models import flow_models
from tests.models.flow_models import ROUNDED, assert_same_weights, beside, texts

CAPTIONS = ["emoji of cat", "a much longer text, with more than thirty-two letters in all of its words", ""]
TOKENS = 128  # all captions and the chat around them fit


opened = partial(flow_models.opened, Flux2Klein)
loaded = partial(flow_models.loaded, Flux2Klein, qwen3_max_token_length=TOKENS)


@pytest.fixture(scope="module")
def klein(tiny_flux2: Path) -> Flux2Klein:
    return loaded(tiny_flux2)


@pytest.fixture(scope="module")
def files(tiny_flux2: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return tiny.single_files(tiny_flux2, tmp_path_factory.mktemp("files"))


@pytest.fixture(scope="module")
def pipeline() -> Any:
    made = tiny.pipeline()
    made.set_progress_bar_config(disable=True)
    return made


def noisy(count: int) -> Tensor:
    """Of 96 × 80 pixels."""
    return flow_models.noisy(count, 4 * tiny.CHANNELS, height=5, width=6)


# -- names and files


def test_files_are_the_folder(files: dict[str, Path], klein: Flux2Klein) -> None:
    """The users' three files hold every weight of the diffusers folder, by its name there: the autoencoder's statistics
    too, and no layer of Qwen3 behind the last one that is read."""
    family = loaded(files["pretrained_model_name_or_path"], **beside(files))
    assert (family.architecture, family.base_model_version) == ("Flux.2-klein", "flux_2_klein")
    assert_same_weights(family, klein)
    ours, theirs = (one.components.config("denoiser") for one in (family, klein))
    same = ours.keys() & theirs.keys()
    assert {key: ours[key] for key in same} == {key: theirs[key] for key in same}
    assert len(klein.components["text_encoder"].layers) == 28 < tiny.TEXT_LAYERS  # type: ignore[arg-type]
    given = texts(klein, CAPTIONS[:2])
    assert torch.equal(texts(family, CAPTIONS[:2])["hidden_states"], given["hidden_states"])
    levels = torch.tensor([0.2, 0.9])
    with torch.no_grad():
        assert torch.equal(family.predict(noisy(2), levels, given), klein.predict(noisy(2), levels, given))
    pixels = torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert torch.equal(family.encode_images(pixels)[0], klein.encode_images(pixels)[0])


def test_the_names_are_diffusers_own(tiny_flux2: Path) -> None:
    """Against its converter, weights too."""
    from diffusers.loaders.single_file_utils import convert_flux2_transformer_checkpoint_to_diffusers

    states = tiny.weights_in(tiny_flux2 / "transformer")
    theirs = convert_flux2_transformer_checkpoint_to_diffusers(tiny.original(states))
    assert theirs.keys() == states.keys()
    assert all(torch.equal(theirs[name], states[name]) for name in states)


def test_other_beginnings_of_names(tiny_flux2: Path, tmp_path: Path) -> None:
    """Also the files of a diffusers folder by themselves, and one file with everything."""
    files = tiny.single_files(tiny_flux2, tmp_path, prefix="model.diffusion_model.")
    whole = load_file(files["pretrained_model_name_or_path"])
    text = {f"text_encoders.qwen3_4b.transformer.{name}": t for name, t in load_file(files["qwen3"]).items()}
    vae = {f"vae.{name}": tensor for name, tensor in load_file(files["ae"]).items()}
    save_file({**whole, **text, **vae}, tmp_path / "all.safetensors")
    inside = "diffusion_pytorch_model.safetensors"
    for path, more in (
        (files["pretrained_model_name_or_path"], {}),
        (tiny_flux2 / "transformer" / inside, {"ae": str(tiny_flux2 / "vae" / inside)}),
        (files["pretrained_model_name_or_path"], {"ae": None, "vae": str(tiny_flux2 / "vae")}),
        (tmp_path / "all.safetensors", {"qwen3": None, "ae": None}),
    ):
        with opened(path, **beside(files, **more)).outlined():
            pass


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_smaller_types_are_read_as_numbers(tiny_flux2: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    files = tiny.single_files(tiny_flux2, tmp_path, dtype=dtype)
    family = opened(files["pretrained_model_name_or_path"], **beside(files))
    found = dict(family.components.load("denoiser", torch.float32, "cpu").named_parameters())
    for name, weight in tiny.weights_in(tiny_flux2 / "transformer").items():
        assert torch.equal(found[name], weight.to(dtype).float()), name


def test_scales_beside_weights_are_read(tiny_flux2: Path, tmp_path: Path) -> None:
    """As the makers' fp8 files have them: of a layer that is three in the model, and of one that is one."""
    path = tiny.single_files(tiny_flux2, tmp_path)["pretrained_model_name_or_path"]
    tensors = load_file(path)
    scaled = {"double_blocks.0.img_attn.qkv": 0.01, "single_blocks.0.linear1": 0.02}
    for name, scale in scaled.items():
        tensors[f"{name}.weight"] = (tensors[f"{name}.weight"] / scale).to(torch.float8_e4m3fn)
        tensors |= {f"{name}.weight_scale": torch.tensor(scale), f"{name}.input_scale": torch.tensor(1.0)}
    save_file(tensors, path)
    family = opened(path, **beside(tiny.single_files(tiny_flux2, tmp_path / "others")))
    found = dict(family.components.load("denoiser", torch.float32, "cpu").named_parameters())
    width = tiny.WIDTH
    for name, part, layer, rows in (
        ("transformer_blocks.0.attn.to_k", "double_blocks.0.img_attn.qkv", 0.01, slice(width, 2 * width)),
        ("single_transformer_blocks.0.attn.to_qkv_mlp_proj", "single_blocks.0.linear1", 0.02, slice(None)),
    ):
        assert torch.equal(found[f"{name}.weight"], tensors[f"{part}.weight"].float()[rows] * layer), name


def test_missing_and_wrong_files(
    files: dict[str, Path], tiny_flux: Path, tiny_flux2: Path, tiny_z_image: Path, tmp_path: Path
) -> None:
    base = files["pretrained_model_name_or_path"]
    with pytest.raises(
        UserError, match=r"parts of FLUX.2 klein: give --qwen3, the file .*\) and --ae, the file of FLUX"
    ):
        opened(base)
    with pytest.raises(UserError, match=r"--qwen3 .* is a FLUX.2 klein model, and not the text encoder Qwen3"):
        opened(base, **beside({**files, "qwen3": base}))
    flux_1 = tiny_flux / "vae" / "diffusion_pytorch_model.safetensors"
    with pytest.raises(UserError, match=r"--ae .* is a VAE, and not the autoencoder of FLUX.2"):
        opened(base, **beside({**files, "ae": flux_1}))
    with pytest.raises(UserError, match=r"--vae a and --ae .* are two names for one thing"):
        opened(base, **beside(files, vae="a"))
    with pytest.raises(UserError, match=r"no tokenizer of Qwen3 .* give --qwen3_tokenizer_path, .* Qwen/Qwen3-4B"):
        opened(base, **beside(files, qwen3_tokenizer_path=None)).count_tokens("a cat")
    tokenizer = json.loads((files["qwen3_tokenizer_path"] / "tokenizer.json").read_text())
    tokenizer["added_tokens"] = [one for one in tokenizer["added_tokens"] if "think" not in one["content"]]
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UserError, match=r"not the whole tokenizer of Qwen3: <think>, </think> is no token of it"):
        opened(base, **beside(files, qwen3_tokenizer_path=str(tmp_path))).count_tokens("a cat")
    with pytest.raises(UserError, match=r"has 3 layers, where FLUX.2 klein reads the states behind the 27th"):
        opened(base, **beside({**files, "qwen3": tiny_z_image / "text_encoder"}))
    wide = {name: t for name, t in load_file(files["qwen3"]).items() if "embed" not in name}
    save_file({**wide, "model.embed_tokens.weight": torch.zeros(128, 40)}, tmp_path / "wide.safetensors")
    with pytest.raises(UserError, match=r"its transformer needs states with 96 channels and gets 120: another model"):
        opened(base, **beside({**files, "qwen3": tmp_path / "wide.safetensors"}))


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"double_blocks.0.img_mlp.0.weight_scale_2": (1,)}, "belongs to a packed weight, which is not supported"),
        (
            {"guidance_in.in_layer.weight": (4,)},
            r"is a FLUX.2 dev model of 32 billion .* which is not supported; .*ein",
        ),
        ({"double_blocks.0.img_attn.norm.query_norm.scale": (64,)}, "have 64 channels, where FLUX.2's have 128"),
    ],
)
def test_relatives_are_refused(
    files: dict[str, Path], tmp_path: Path, more: dict[str, tuple[int, ...]], said: str
) -> None:
    """By their marks."""
    tensors = load_file(files["pretrained_model_name_or_path"])
    tensors |= {name: torch.zeros(shape) for name, shape in more.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=said):
        opened(tmp_path / "model.safetensors", **beside(files))


@pytest.mark.parametrize(
    ("pipeline_of", "said"),
    [("Flux2Pipeline", "a FLUX.2 dev model"), ("Flux2KleinKVPipeline", "a FLUX.2 model of another kind")],
)
def test_folders_of_relatives_are_refused(tiny_flux2: Path, tmp_path: Path, pipeline_of: str, said: str) -> None:
    folder = shutil.copytree(tiny_flux2, tmp_path / "model")
    index = folder / "model_index.json"
    index.write_text(index.read_text().replace("Flux2KleinPipeline", pipeline_of))
    with pytest.raises(UserError, match=said):
        open_family(str(folder))


@pytest.mark.parametrize(
    ("name", "told", "expected"),
    [
        ("flux2-klein-base-4b", None, False),
        ("FLUX.2-Klein-9B", None, True),
        ("flux-2-klein-4b-bf16", "klein-base-4b", False),
        ("my_finetune", None, False),
        ("my_finetune", "klein-9b", True),
    ],
)
def test_distilled_versions_are_known_by_their_name_or_by_the_user(
    files: dict[str, Path], tmp_path: Path, name: str, told: str | None, expected: bool
) -> None:
    path = tmp_path / f"{name}.safetensors"
    path.symlink_to(files["pretrained_model_name_or_path"])
    family = opened(path, **beside(files), model_version=told)
    assert family.distilled is expected
    rendering = family.rendering
    assert (rendering.steps, rendering.scale) == ((4, 1.0) if expected else (50, 4.0))


def test_a_folder_says_whether_it_is_distilled(tiny_flux2: Path, tmp_path: Path) -> None:
    folder = tmp_path / "klein"  # which a file of this name would be
    shutil.copytree(tiny_flux2, folder)
    assert not opened(folder).distilled
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "is_distilled": True}))
    assert opened(folder).distilled
    assert not opened(folder, model_version="klein-base-4b").distilled


def test_versions_that_there_are_not() -> None:
    with pytest.raises(UserError, match=r"--model_version.*FLUX.2 dev is not supported: 32 billion parameters"):
        parse(["--model_version", "dev"])
    with pytest.raises(UserError, match=r"--model_version.*'klein' is unknown; known are klein-base-4b, "):
        parse(["--model_version", "klein"])


# -- what is computed


def test_prompts_are_encoded_as_by_diffusers(klein: Flux2Klein, pipeline: Any) -> None:
    """Three layers' states of all tokens, those of padding too: they tell of the text before them."""
    with torch.no_grad():
        expected, _ = pipeline.encode_prompt(list(CAPTIONS), max_sequence_length=TOKENS)
    found = texts(klein, CAPTIONS)["hidden_states"]
    assert found.shape == (3, TOKENS, 3 * tiny.STATES)
    torch.testing.assert_close(found, expected, rtol=0, atol=ROUNDED)
    assert (found[0, -1] - found[1, -1]).abs().max() > 0.1, "captions differ, behind their ends as well"


def test_512_tokens_without_an_option(tiny_flux2: Path) -> None:
    family = opened(tiny_flux2)
    assert family.token_limit == 512 - 3
    family.components.load("text_encoder", torch.float32, "cpu")
    assert texts(family, ["a cat"])["hidden_states"].shape == (1, 512, 3 * tiny.STATES)


def test_long_captions_are_cut_as_by_diffusers(tiny_flux2: Path, pipeline: Any) -> None:
    """At the end, the words of the chat behind them first."""
    family = loaded(tiny_flux2, qwen3_max_token_length=24)
    with torch.no_grad():
        expected, _ = pipeline.encode_prompt([CAPTIONS[1]], max_sequence_length=24)
    torch.testing.assert_close(texts(family, [CAPTIONS[1]])["hidden_states"], expected, rtol=0, atol=ROUNDED)


def test_an_answer_is_diffusers(klein: Flux2Klein, pipeline: Any) -> None:
    levels = torch.tensor([0.1, 0.5, 0.95])
    latents = noisy(3)
    with torch.no_grad():
        states, text_ids = pipeline.encode_prompt(list(CAPTIONS), max_sequence_length=TOKENS)
        found = klein.predict(latents, levels, texts(klein, CAPTIONS))
        expected = pipeline.transformer(
            hidden_states=pipeline._pack_latents(latents),
            encoder_hidden_states=states,
            timestep=levels,
            img_ids=pipeline._prepare_latent_ids(latents),
            txt_ids=text_ids,
        ).sample
    assert found.shape == latents.shape
    torch.testing.assert_close(pipeline._pack_latents(found), expected, rtol=0, atol=ROUNDED)


def test_a_batch_is_its_singles(klein: Flux2Klein) -> None:
    levels, whole_texts = torch.tensor([0.1, 0.5, 0.95]), texts(klein, CAPTIONS)
    with torch.no_grad():
        whole = klein.predict(noisy(3), levels, whole_texts)
        for place, caption in enumerate(CAPTIONS):
            one = slice(place, place + 1)
            single = klein.predict(noisy(3)[one], levels[one], texts(klein, [caption]))
            torch.testing.assert_close(whole[one], single, rtol=0, atol=ROUNDED)


def test_padding_is_seen(klein: Flux2Klein) -> None:
    """As in diffusers' pipeline, whose transformer has no mask: without it the answer is another."""
    given, levels = texts(klein, CAPTIONS[:1]), torch.tensor([0.5])
    length = len(klein._tokenizer.encode("<|im_start|>user\n").ids) + klein.count_tokens(CAPTIONS[0])
    with torch.no_grad():
        whole = klein.predict(noisy(1), levels, given)
        trimmed = klein.predict(noisy(1), levels, {"hidden_states": given["hidden_states"][:, :length]})
    assert (whole - trimmed).abs().max() > 1e-2


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_a_whole_sample_is_diffusers(klein: Flux2Klein, pipeline: Any, scale: float) -> None:
    """Levels, shift by size and steps, guidance, steps: of four steps, with and without a negative prompt. diffusers
    returns the autoencoder's latents."""
    common: dict[str, Any] = {"num_inference_steps": 4, "guidance_scale": scale, "width": 96, "height": 80}
    common["output_type"] = "latent"
    with torch.no_grad():
        ours = klein.pipeline()(
            **klein.pipeline_arguments(texts(klein, ["emoji of cat"]), texts(klein, [""])),
            **common,
            generator=torch.Generator().manual_seed(3),
        ).images
        theirs = pipeline(
            prompt="emoji of cat",
            **common,
            max_sequence_length=TOKENS,
            generator=torch.Generator().manual_seed(3),
        ).images
        expected = pipeline.vae.decode(theirs).sample
        assert ours.shape == (1, 4 * tiny.CHANNELS, 5, 6)
        torch.testing.assert_close(klein.decode_latents(ours), expected, rtol=0, atol=4 * ROUNDED)


def test_latents_are_normalised_patches(klein: Flux2Klein, pipeline: Any) -> None:
    """By the statistics beside the autoencoder's weights; and the way back."""
    pixels = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        mean, std = klein.encode_images(pixels)
        torch.testing.assert_close(mean, pipeline._encode_vae_image(pixels, None), rtol=0, atol=ROUNDED)
        assert std.shape == mean.shape
        assert not std.any(), "the middle of the distribution, as the pipeline takes it"
        expected = pipeline.vae.decode(pipeline.vae.encode(pixels).latent_dist.mean).sample
        torch.testing.assert_close(klein.decode_latents(mean), expected, rtol=0, atol=4 * ROUNDED)
    assert (klein.latents.channels, klein.latents.factor, klein.size_divisor) == (16, 16, 16)


def test_shifts_of_the_levels(tiny_flux2: Path) -> None:
    """Drawn ones by the size as for FLUX.1, in tokens of 16 pixels; samples by size and steps, as diffusers has it."""
    from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

    process, size = opened(tiny_flux2).process, (64, 64)
    assert {name: process.shift_at(size, name) for name in process.samplings} == {
        "sigma": 3.0, "uniform": 1.0, "sigmoid": 1.0, "shift": 3.0, "flux2_shift": pytest.approx(math.exp(1.15))
    }  # fmt: skip
    assert process.shift_at((16, 16), "flux2_shift") == pytest.approx(math.exp(0.5))
    assert opened(tiny_flux2, discrete_flow_shift=2.0).process.shift_at(size, "shift") == 2.0
    for rows, columns, steps in ((16, 16, 4), (64, 64, 50), (65, 66, 50), (96, 96, 4)):
        expected = math.exp(compute_empirical_mu(rows * columns, steps))
        assert process.shift_at((rows, columns), steps=steps) == pytest.approx(expected)
    assert process.shift_at(size) == process.shift_at(size, steps=50)


@pytest.mark.slow
@pytest.mark.parametrize("autocast", [False, True])
def test_close_levels_differ_in_bf16(tiny_flux2: Path, autocast: bool) -> None:
    """0.700 and 0.701 are one number in bf16, in which diffusers' transformer would take the time."""
    family = loaded(tiny_flux2, torch.bfloat16)
    given = texts(family, ["emoji of cat"])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        one, other = (family.predict(noisy(1), torch.tensor([level]), given) for level in (0.700, 0.701))
        same = family.predict(noisy(1), torch.tensor([0.700]), given)
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


@pytest.mark.slow
def test_bf16_is_near_fp32(tiny_flux2: Path, klein: Flux2Klein) -> None:
    """8 bits of mantissa, through 28 layers of the text encoder and four blocks: a few percent of the answer's size."""
    small, levels = loaded(tiny_flux2, torch.bfloat16), torch.tensor([0.1, 0.5, 0.95])
    with torch.no_grad():
        exact = klein.predict(noisy(3), levels, texts(klein, CAPTIONS))
        rounded = small.predict(noisy(3), levels, texts(small, CAPTIONS)).float()
    assert (rounded - exact).norm() / exact.norm() < 0.05


# -- the true size, on the meta device


@pytest.mark.parametrize(
    ("more", "parameters", "linears", "layers", "per_rank"),
    [
        ({}, 3_875_544_576, 109, 100, 490 * 3072),
        (
            {"num_layers": 8, "num_single_layers": 24, "num_attention_heads": 32, "joint_attention_dim": 12288},
            *(9_078_581_248, 153, 144, 664 * 4096),
        ),
    ],
    ids=["4B", "9B"],
)
def test_true_counts(more: dict[str, int], parameters: int, linears: int, layers: int, per_rank: int) -> None:
    """Parameters, and layers that get adapters."""
    config = json.loads((tiny.ASSETS / "flux2.json").read_text(encoding="utf-8"))
    transformer = modules.new_flux2_transformer({**config["transformer"], **more})
    assert sum(p.numel() for p in transformer.parameters()) == parameters
    found = [(path, layer) for path, layer in transformer.named_modules() if isinstance(layer, torch.nn.Linear)]
    assert len(found) == linears
    pattern = Flux2Klein.PARTS["denoiser"].linear
    own = [layer for path, layer in found if pattern.fullmatch(path)]
    assert len(own) == layers
    assert sum(layer.in_features + layer.out_features for layer in own) == per_rank


def test_the_true_autoencoder_and_text_encoders() -> None:
    config = json.loads((tiny.ASSETS / "flux2.json").read_text(encoding="utf-8"))
    vae = dict(modules.new_flux2_vae(config["vae"]).named_parameters())
    assert sum(p.numel() for name, p in vae.items() if not name.startswith("bn.")) == 84_046_115
    assert vae["bn.running_mean"].shape == vae["bn.running_var"].shape == (128,)
    assert vae_entries({"bn.num_batches_tracked": None}) == {}  # type: ignore[dict-item]
