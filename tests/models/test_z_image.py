"""Z-Image: its files and names, and that all it computes is what diffusers' own classes compute."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from library.errors import UserError
from library.models import modules
from library.models.opening import open_family
from library.models.z_image import ZImage
from tests import tiny_z_image as tiny
from tests.models import flow_models
from tests.models.flow_models import ROUNDED, assert_same_weights, beside, texts

CAPTIONS = ["emoji of cat", "a much longer text, with more than thirty-two letters in all of its words", ""]


opened = partial(flow_models.opened, ZImage)
loaded = partial(flow_models.loaded, ZImage)


@pytest.fixture(scope="module")
def z_image(tiny_z_image: Path) -> ZImage:
    return loaded(tiny_z_image)


@pytest.fixture(scope="module")
def files(tiny_z_image: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return tiny.single_files(tiny_z_image, tmp_path_factory.mktemp("files"))


@pytest.fixture(scope="module")
def pipeline() -> Any:
    made = tiny.pipeline()
    made.set_progress_bar_config(disable=True)
    return made


def noisy(count: int) -> Tensor:
    """Of 96 × 80 pixels: 30 patches, which two more fill up."""
    return flow_models.noisy(count, height=10)


# -- names and files


def test_files_are_the_folder(files: dict[str, Path], z_image: ZImage) -> None:
    """The users' three files hold every weight of the diffusers folder, by its name there."""
    family = loaded(files["pretrained_model_name_or_path"], **beside(files))
    assert (family.architecture, family.base_model_version) == ("Z-Image", "z_image")
    assert_same_weights(family, z_image)
    for part in ZImage.PARTS:
        ours, theirs = family.components.config(part), z_image.components.config(part)
        same = ours.keys() & theirs.keys()
        assert {key: ours[key] for key in same} == {key: theirs[key] for key in same}
    given = texts(z_image, CAPTIONS)
    assert torch.equal(texts(family, CAPTIONS)["hidden_states"], given["hidden_states"])
    levels = torch.tensor([0.2, 0.5, 0.9])
    with torch.no_grad():
        assert torch.equal(family.predict(noisy(3), levels, given), z_image.predict(noisy(3), levels, given))


def test_the_names_are_diffusers_own(tiny_z_image: Path) -> None:
    """Against its converter, weights too."""
    from diffusers.loaders.single_file_utils import convert_z_image_transformer_checkpoint_to_diffusers

    states = tiny.weights_in(tiny_z_image / "transformer")
    theirs = convert_z_image_transformer_checkpoint_to_diffusers(
        {f"model.diffusion_model.{name}": tensor for name, tensor in tiny.original(states).items()}
    )
    assert theirs.keys() == states.keys()
    assert all(torch.equal(theirs[name], states[name]) for name in states)


def test_other_beginnings_of_names(tiny_z_image: Path, tmp_path: Path) -> None:
    """Also the transformer's file of a diffusers folder by itself, and one file with everything."""
    files = tiny.single_files(tiny_z_image, tmp_path, prefix="model.diffusion_model.")
    whole = load_file(files["pretrained_model_name_or_path"])
    text = {f"text_encoders.qwen3_4b.transformer.{name}": t for name, t in load_file(files["qwen3"]).items()}
    save_file({**whole, **text}, tmp_path / "all.safetensors")
    alone = tiny_z_image / "transformer" / "diffusion_pytorch_model.safetensors"
    for path, more in (
        (files["pretrained_model_name_or_path"], {}),
        (alone, {}),
        (tmp_path / "all.safetensors", {"qwen3": None}),
    ):
        with opened(path, **beside(files, **more)).outlined():
            pass


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_smaller_types_are_read_as_numbers(tiny_z_image: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    files = tiny.single_files(tiny_z_image, tmp_path, dtype=dtype)
    family = opened(files["pretrained_model_name_or_path"], **beside(files))
    found = dict(family.components.load("denoiser", torch.float32, "cpu").named_parameters())
    for name, weight in tiny.weights_in(tiny_z_image / "transformer").items():
        assert torch.equal(found[name], weight.to(dtype).float()), name


def test_missing_and_wrong_files(files: dict[str, Path], tiny_z_image: Path, tmp_path: Path) -> None:
    base = files["pretrained_model_name_or_path"]
    with pytest.raises(UserError, match=r"parts of Z-Image: give --qwen3, the file .* Qwen3-4B and --ae, the file of"):
        opened(base)
    with pytest.raises(UserError, match=r"--qwen3 .* is a Z-Image model, and not the text encoder Qwen3-4B"):
        opened(base, **beside({**files, "qwen3": base}))
    with pytest.raises(UserError, match=r"--ae .* is a text encoder, and holds no VAE"):
        opened(base, **beside({**files, "ae": files["qwen3"]}))
    with pytest.raises(UserError, match=r"--vae a and --ae .* are two names for one thing"):
        opened(base, **beside(files, vae="a"))
    with pytest.raises(UserError, match=r"no tokenizer of Qwen3 .* give --qwen3_tokenizer_path, .* Qwen/Qwen3-4B"):
        opened(base, **beside(files, qwen3_tokenizer_path=None)).count_tokens("a cat")
    wide = tiny.weights_in(tiny_z_image / "text_encoder")
    save_file({**wide, "embed_tokens.weight": torch.zeros(128, 40)}, tmp_path / "wide.safetensors")
    with pytest.raises(UserError, match=r"its transformer needs states with 32 channels and gets 40: another model"):
        opened(base, **beside({**files, "qwen3": tmp_path / "wide.safetensors"}))


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"siglip_embedder.0.weight": (4,)}, "is a Z-Image model of another kind, which is given images as well, wh"),
        ({"layers.0.adaLN_modulation.0.weight": None}, "is a Lumina-Image model, which is not supported"),
        ({"layers.0.attention.q_norm.weight": (64,)}, "heads of its transformer have 64 channels, where Z-Image's h"),
    ],
)
def test_relatives_are_refused(
    files: dict[str, Path], tmp_path: Path, more: dict[str, tuple[int, ...] | None], said: str
) -> None:
    """By their marks."""
    tensors = load_file(files["pretrained_model_name_or_path"])
    for name, shape in more.items():
        tensors.pop(name, None)
        tensors |= {} if shape is None else {name: torch.zeros(shape)}
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=said):
        opened(tmp_path / "model.safetensors", **beside(files))


def test_folders_of_relatives_are_refused(tiny_z_image: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_z_image, tmp_path / "model")
    index = folder / "model_index.json"
    index.write_text(index.read_text().replace("ZImagePipeline", "ZImageOmniPipeline"))
    with pytest.raises(UserError, match="is a Z-Image model of another kind"):
        open_family(str(folder))


@pytest.mark.parametrize(
    ("name", "told", "expected"),
    [("z_image", None, False), ("z_image_Turbo_bf16", None, True), ("z_image", True, True), ("my-turbo", False, False)],
)
def test_turbo_is_known_by_its_name_or_by_the_user(
    files: dict[str, Path], tmp_path: Path, name: str, told: bool | None, expected: bool
) -> None:
    path = tmp_path / f"{name}.safetensors"
    path.symlink_to(files["pretrained_model_name_or_path"])
    family = opened(path, **beside(files), turbo=told)
    assert family.distilled is expected
    rendering = family.rendering
    assert (rendering.steps, rendering.scale) == ((8, 1.0) if expected else (30, 4.0))


# -- what is computed


def test_prompts_are_encoded_as_by_diffusers(z_image: ZImage, pipeline: Any) -> None:
    with torch.no_grad():
        expected, _ = pipeline.encode_prompt(list(CAPTIONS), device="cpu", do_classifier_free_guidance=False)
    found = texts(z_image, CAPTIONS)
    assert found["mask"].sum(dim=1).tolist() == [len(states) for states in expected]
    for states, own, length in zip(found["hidden_states"], expected, found["mask"].sum(dim=1), strict=True):
        torch.testing.assert_close(states[:length], own, rtol=0, atol=ROUNDED)
        assert not states[length:].any()
    before = len(z_image._tokenizer.encode("<|im_start|>user\n").ids)
    first = found["hidden_states"][:, before + 2]
    assert (first[0] - first[1]).abs().max() > 0.1, "captions differ"


def test_long_captions_are_cut_as_by_diffusers(tiny_z_image: Path, pipeline: Any) -> None:
    """At the end, the words of the chat behind them first."""
    family = loaded(tiny_z_image, qwen3_max_token_length=24)
    assert family.token_limit == 21
    with torch.no_grad():
        (expected,), _ = pipeline.encode_prompt(
            [CAPTIONS[1]], device="cpu", do_classifier_free_guidance=False, max_sequence_length=24
        )
    found = texts(family, [CAPTIONS[1]])["hidden_states"]
    assert found.shape == (1, 24, tiny.STATES)
    torch.testing.assert_close(found[0], expected, rtol=0, atol=ROUNDED)


def test_an_answer_is_diffusers(z_image: ZImage, pipeline: Any) -> None:
    """Of texts and an image that have to be filled up; the time is 1 - σ, and the answer's sign turned."""
    levels = torch.tensor([0.1, 0.5, 0.95])
    with torch.no_grad():
        states, _ = pipeline.encode_prompt(list(CAPTIONS), device="cpu", do_classifier_free_guidance=False)
        found = z_image.predict(noisy(3), levels, texts(z_image, CAPTIONS))
        expected = pipeline.transformer(list(noisy(3)[:, :, None]), 1 - levels, states).sample
    torch.testing.assert_close(found, -torch.stack(expected)[:, :, 0], rtol=0, atol=ROUNDED)


def test_a_batch_is_its_singles_and_a_masked_text_is_a_trimmed_one(z_image: ZImage) -> None:
    """Whatever stands behind a text, masked: other lengths in a batch, or more padding of a cache."""
    levels, whole_texts = torch.tensor([0.1, 0.5, 0.95]), texts(z_image, CAPTIONS)
    more = {
        "hidden_states": torch.nn.functional.pad(whole_texts["hidden_states"], (0, 0, 0, 40), value=7.0),
        "mask": torch.nn.functional.pad(whole_texts["mask"], (0, 40)),
    }
    with torch.no_grad():
        whole = z_image.predict(noisy(3), levels, whole_texts)
        assert torch.equal(z_image.predict(noisy(3), levels, more), whole)
        for place, caption in enumerate(CAPTIONS):
            one = slice(place, place + 1)
            single = z_image.predict(noisy(3)[one], levels[one], texts(z_image, [caption]))
            torch.testing.assert_close(whole[one], single, rtol=0, atol=ROUNDED)


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_a_whole_sample_is_diffusers(z_image: ZImage, pipeline: Any, scale: float) -> None:
    """Levels, shift, guidance and steps: of four steps, with and without a negative prompt. diffusers adds its guidance
    to the answer with the prompt, so that 0 is none and 3 is our 4."""
    positive, negative = texts(z_image, ["emoji of cat"]), texts(z_image, ["a dog"])
    common: dict[str, Any] = {"num_inference_steps": 4, "width": 96, "height": 80, "output_type": "latent"}
    with torch.no_grad():
        ours = z_image.pipeline()(
            **z_image.pipeline_arguments(positive, negative),
            **common,
            guidance_scale=scale,
            generator=torch.Generator().manual_seed(3),
        ).images
        theirs = pipeline(
            prompt="emoji of cat",
            negative_prompt="a dog",
            **common,
            guidance_scale=scale - 1,
            generator=torch.Generator().manual_seed(3),
        ).images
    assert ours.shape == (1, 16, 10, 12)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=4 * ROUNDED)


def test_shifts_of_the_drawn_levels(tiny_z_image: Path) -> None:
    """By --discrete_flow_shift, 2, with sigma and shift; samples by 3, whatever their size."""
    process, size = opened(tiny_z_image).process, (128, 128)
    assert {name: process.shift_at(size, name) for name in process.samplings} == {
        "sigma": 2.0, "uniform": 1.0, "sigmoid": 1.0, "shift": 2.0
    }  # fmt: skip
    assert opened(tiny_z_image, discrete_flow_shift=3.0).process.shift_at(size, "shift") == 3.0
    assert process.shift_at(size) == process.shift_at((8, 8)) == pytest.approx(3.0)


# -- the true size, on the meta device


def test_true_counts() -> None:
    """Parameters, and layers that get adapters."""
    config = json.loads((Path(tiny.ASSETS) / "z_image.json").read_text(encoding="utf-8"))
    transformer = modules.new_z_image_transformer(config["transformer"])
    qwen = modules.new_qwen3_encoder(config["text_encoder"])
    counts = [sum(p.numel() for p in module.parameters()) for module in (transformer, qwen)]
    assert counts == [6_154_908_736, 4_022_468_096]
    pattern, more = ZImage.PARTS["denoiser"].linear, ZImage.PARTS["denoiser"].more
    layers = [layer for path, layer in transformer.named_modules() if pattern.fullmatch(path)]
    assert len(layers) == 210
    assert sum(layer.in_features + layer.out_features for layer in layers) == 2_188_800  # type: ignore[operator,misc]
    beside = [path for path, layer in transformer.named_modules() if more.fullmatch(path)]
    assert len(beside) == 30 + 4 * 7 + 2
    assert all(isinstance(transformer.get_submodule(path), torch.nn.Linear) for path in beside)
    texts_of = ZImage.PARTS["text_encoder"].linear
    assert sum(bool(texts_of.fullmatch(path)) for path, _ in qwen.named_modules()) == 36 * 7
