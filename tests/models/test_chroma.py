"""Chroma: its files and names, and that all it computes is what diffusers' own classes compute."""

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
from library.models import modules
from library.models.checkpoints.flux_names import fused_name, original_name
from library.models.chroma import Chroma
from library.models.flux_tokens import packed, places
from library.models.opening import open_family
from tests import tiny_chroma as tiny
from tests.models import flow_models
from tests.models.flow_models import ROUNDED, assert_same_weights, beside, noisy, texts

TOKENS = 48
CAPTIONS = ["emoji of cat", "a much longer text, cut off at its end", ""]
LEVELS = torch.tensor([0.1, 0.5, 0.95])


opened = partial(flow_models.opened, Chroma, t5xxl_max_token_length=TOKENS)
loaded = partial(flow_models.loaded, Chroma, t5xxl_max_token_length=TOKENS)


@pytest.fixture(scope="module")
def chroma(tiny_chroma: Path) -> Chroma:
    return loaded(tiny_chroma)


@pytest.fixture(scope="module")
def pipeline() -> Any:
    made = tiny.pipeline()
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(scope="module")
def files(tiny_chroma: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return tiny.single_files(tiny_chroma, tmp_path_factory.mktemp("files"))


def theirs(pipeline: Any, captions: list[str], *, dtype: torch.dtype = torch.bool) -> Tensor:
    """diffusers' answer, with the padding of TOKENS tokens and a mask of this dtype; its own pipeline has numbers."""
    with torch.no_grad():
        states, mask = pipeline._get_t5_prompt_embeds(captions, max_sequence_length=TOKENS)
        count = len(captions)
        found: Tensor = pipeline.transformer(
            hidden_states=packed(noisy(count)),
            timestep=LEVELS[:count],
            encoder_hidden_states=states,
            txt_ids=torch.zeros(TOKENS, 3),
            img_ids=places(4, 6, device=torch.device("cpu")),
            attention_mask=torch.cat([mask, torch.ones(count, 24)], dim=1).to(dtype),
        ).sample
    return found


# -- names and files


def test_files_are_the_folder(files: dict[str, Path], chroma: Chroma) -> None:
    """kohya's three files hold every weight of the diffusers folder, by its name there, and give the same answer."""
    family = loaded(files["pretrained_model_name_or_path"], **beside(files))
    assert (family.architecture, family.base_model_version) == ("chroma", "chroma")
    assert_same_weights(family, chroma)
    ours, folders = family.components.config("denoiser"), chroma.components.config("denoiser")
    same = ours.keys() & folders.keys()
    assert len(same) >= 10
    assert {key: ours[key] for key in same} == {key: folders[key] for key in same if key != "axes_dims_rope"} | {
        "axes_dims_rope": list(folders["axes_dims_rope"])
    }
    given = texts(chroma, CAPTIONS)
    assert all(torch.equal(found, given[name]) for name, found in texts(family, CAPTIONS).items())
    with torch.no_grad():
        assert torch.equal(family.predict(noisy(3), LEVELS, given), chroma.predict(noisy(3), LEVELS, given))


def test_the_names_are_diffusers_own(tmp_path: Path) -> None:
    """Against its converter, which knows the true width only: with all rows, and two columns in place of thousands."""
    from diffusers.loaders.single_file_utils import convert_chroma_transformer_checkpoint_to_diffusers

    from library.files.index import read_index
    from library.models.checkpoints.flux_names import transformer_entries
    from library.models.checkpoints.weights import Reader

    config = tiny.configuration()["transformer"]
    config |= {"num_layers": tiny.DOUBLES, "num_single_layers": tiny.SINGLES, "num_attention_heads": 24}
    outline = modules.new_chroma_transformer(config)
    generator = torch.Generator().manual_seed(0)
    states = {
        name: torch.randn(len(p), *(1 for _ in p.shape[1:]), generator=generator)
        for name, p in outline.named_parameters()
    }
    original = tiny.original(states)
    save_file(original, tmp_path / "one.safetensors")
    entries = transformer_entries(read_index(tmp_path / "one.safetensors").entries)
    converted = convert_chroma_transformer_checkpoint_to_diffusers(
        {f"model.diffusion_model.{name}": tensor for name, tensor in original.items()}
    )
    assert entries.keys() == converted.keys() == states.keys()
    with Reader() as reader:
        for name, expected in converted.items():
            ours = reader.read(entries[name], dtype=torch.float32, device=torch.device("cpu"))
            assert torch.equal(ours.view(entries[name].shape), expected), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_smaller_types_are_read_as_numbers(tiny_chroma: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    files = tiny.single_files(tiny_chroma, tmp_path, dtype=dtype)
    family = opened(files["pretrained_model_name_or_path"], **beside(files))
    found = dict(family.components.load("denoiser", torch.float32, "cpu").named_parameters())
    for name, weight in load_file(tiny_chroma / "transformer" / "diffusion_pytorch_model.safetensors").items():
        assert torch.equal(found[name], weight.to(dtype).float()), name


def test_everything_in_one_file(files: dict[str, Path], tmp_path: Path) -> None:
    prefixes = {
        "pretrained_model_name_or_path": "model.diffusion_model.",
        "t5xxl": "text_encoders.t5xxl.transformer.",
    }
    tensors = {
        f"{prefix}{name}": tensor
        for option, prefix in prefixes.items()
        for name, tensor in load_file(files[option]).items()
    }
    save_file(tensors, tmp_path / "all.safetensors")
    with opened(tmp_path / "all.safetensors", **beside(files, t5xxl=None)).outlined():
        pass


def test_missing_and_wrong_files(files: dict[str, Path], tiny_chroma: Path, tmp_path: Path) -> None:
    base = files["pretrained_model_name_or_path"]
    with pytest.raises(UserError, match=r"parts of Chroma: give --t5xxl, the file .* T5 and --ae, the file of FLUX"):
        opened(base)
    with pytest.raises(UserError, match=r"--t5xxl .* is a Chroma model, and not the text encoder T5"):
        opened(base, **beside({**files, "t5xxl": base}))
    with pytest.raises(UserError, match=r"no tokenizer of T5 .* give --t5_tokenizer_path.* google/t5-v1_1-xxl"):
        opened(base, **beside(files, t5_tokenizer_path=None)).count_tokens("a cat")
    # the folder of a whole model, too, has T5's tokenizer
    assert opened(base, **beside(files, t5_tokenizer_path=str(tiny_chroma))).count_tokens("cat") == 4
    wide = load_file(files["t5xxl"])
    wide |= {name: torch.zeros(128, 40) for name in ("shared.weight", "encoder.embed_tokens.weight")}
    save_file(wide, tmp_path / "wide.safetensors")
    with pytest.raises(UserError, match=r"needs T5 states of 32 channels and gets 40: another model's file"):
        opened(base, **beside({**files, "t5xxl": tmp_path / "wide.safetensors"}))


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"nerf_image_embedder.embedder.0.weight": (4, 4)}, "is a Chroma1-Radiance model, which has no autoencoder, w"),
        ({"double_blocks.0.img_attn.norm.key_norm.scale": (64,)}, "have 64 channels, where Chroma's have 128"),
        ({"distilled_guidance_layer.in_proj.weight": None}, "has no 'distilled_guidance_layer.in_proj.weight', which"),
        ({"distilled_guidance_layer.norms.1.scale": None}, r"distilled_guidance_layer\.norms\.1"),
    ],
)
def test_relatives_and_damaged_files_are_refused(
    files: dict[str, Path], tmp_path: Path, more: dict[str, tuple[int, ...] | None], said: str
) -> None:
    tensors = load_file(files["pretrained_model_name_or_path"])
    for name, shape in more.items():
        tensors.pop(name, None)
        tensors |= {} if shape is None else {name: torch.zeros(shape)}
    save_file(tensors, tmp_path / "model.safetensors")
    with (
        pytest.raises(UserError, match=said),
        opened(tmp_path / "model.safetensors", **beside(files)).outlined(),
    ):
        pass


def test_folders_of_relatives_are_refused(tiny_chroma: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_chroma, tmp_path / "model")
    index = folder / "model_index.json"
    index.write_text(index.read_text().replace("ChromaPipeline", "ChromaRadiancePipeline"))
    with pytest.raises(UserError, match="is a Chroma model of another kind, which is not supported"):
        open_family(str(folder))


def test_options_that_contradict_the_file(tiny_chroma: Path, tiny_flux: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(UserError, match=r"^a\.toml: \[x\] model_type: 'flux' is wrong: .* is a Chroma model, 'chroma'"):
        open_family(str(tiny_chroma), options={"model_type": "flux"}, given={"model_type": "a.toml: [x] model_type"})
    with pytest.raises(UserError, match=r"^--model_type: 'chroma' is wrong: .* is a FLUX\.1 model, 'flux'"):
        open_family(str(tiny_flux), options={"model_type": "chroma"})
    with pytest.raises(UserError, match=r"^--clip_l: .* is a Chroma model; the option is for a FLUX\.1 model"):
        open_family(str(tiny_chroma), options={"clip_l": "x"}, given={"clip_l": "--clip_l"})
    with caplog.at_level(logging.INFO):
        given = {"guidance_scale": "--guidance_scale"}
        options = {"model_type": "chroma", "guidance_scale": 0.0, "apply_t5_attn_mask": True}
        open_family(str(tiny_chroma), options=options, given=given)
        open_family(str(tiny_chroma), options={"guidance_scale": 1.0})
        assert not caplog.records
        open_family(str(tiny_chroma), options={"guidance_scale": 1.0, "apply_t5_attn_mask": False}, given=given)
    assert "--guidance_scale has no effect: Chroma is told no guidance" in caplog.text
    assert "hidden without --apply_t5_attn_mask, too" in caplog.text


def test_flash_is_known_by_its_name(files: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "Chroma1-Flash.safetensors"
    path.symlink_to(files["pretrained_model_name_or_path"])
    flash = opened(path, **beside(files))
    assert (flash.distilled, flash.rendering.scale) == (True, 1.0)
    usual = opened(files["pretrained_model_name_or_path"], **beside(files))
    assert (usual.distilled, usual.rendering.steps, usual.rendering.scale) == (False, 35, 5.0)


# -- what is computed


def test_prompts_are_encoded_as_by_diffusers(chroma: Chroma, pipeline: Any) -> None:
    """As far as they are seen: the tokens and the first one of the padding."""
    with torch.no_grad():
        expected, seen = pipeline._get_t5_prompt_embeds(CAPTIONS, max_sequence_length=TOKENS)
    found = texts(chroma, CAPTIONS)
    length = chroma.count_tokens(CAPTIONS[1]) + 2  # the end, and one of the padding
    assert found["hidden_states"].shape == (3, length, tiny.T5_WIDTH)
    assert torch.equal(found["mask"].float(), seen[:, :length])
    assert not seen[:, length:].any()
    assert [chroma.count_tokens(text) + 2 for text in CAPTIONS] == found["mask"].sum(dim=1).tolist()
    visible = (expected * seen[..., None])[:, :length]
    torch.testing.assert_close(found["hidden_states"], visible, rtol=0, atol=ROUNDED)


def test_a_text_that_fills_all_tokens_has_no_padding(tiny_chroma: Path, pipeline: Any) -> None:
    family = loaded(tiny_chroma, t5xxl_max_token_length=16)
    assert family.token_limit == 15
    with torch.no_grad():
        expected, seen = pipeline._get_t5_prompt_embeds([CAPTIONS[1]], max_sequence_length=16)
    found = texts(family, [CAPTIONS[1]])
    assert found["mask"].tolist() == seen.tolist() == [[1] * 16]
    torch.testing.assert_close(found["hidden_states"], expected, rtol=0, atol=ROUNDED)


def test_an_answer_is_diffusers(chroma: Chroma, pipeline: Any) -> None:
    """With its padding, which a mask of truth values hides; one of numbers, as its own pipeline has, does not."""
    with torch.no_grad():
        found = packed(chroma.predict(noisy(3), LEVELS, texts(chroma, CAPTIONS)))
    torch.testing.assert_close(found, theirs(pipeline, CAPTIONS), rtol=0, atol=ROUNDED)
    assert (found - theirs(pipeline, CAPTIONS, dtype=torch.float32)).abs().max() > 0.1


def test_a_batch_is_its_singles_and_a_masked_text_is_a_trimmed_one(chroma: Chroma) -> None:
    """Whatever stands behind a text, masked: other lengths in a batch, or more padding of a cache."""
    whole_texts = texts(chroma, CAPTIONS)
    more = {
        "hidden_states": torch.nn.functional.pad(whole_texts["hidden_states"], (0, 0, 0, 9), value=7.0),
        "mask": torch.nn.functional.pad(whole_texts["mask"], (0, 9)),
    }
    with torch.no_grad():
        whole = chroma.predict(noisy(3), LEVELS, whole_texts)
        assert torch.equal(chroma.predict(noisy(3), LEVELS, more), whole)
        for place, caption in enumerate(CAPTIONS):
            one = slice(place, place + 1)
            single = chroma.predict(noisy(3)[one], LEVELS[one], texts(chroma, [caption]))
            torch.testing.assert_close(whole[one], single, rtol=0, atol=ROUNDED)
        less = {"hidden_states": whole_texts["hidden_states"], "mask": whole_texts["mask"].clone()}
        less["mask"][0, chroma.count_tokens(CAPTIONS[0]) + 1] = 0
        assert (chroma.predict(noisy(3), LEVELS, less)[0] - whole[0]).abs().max() > 1e-3, "the first padding is seen"


def test_checkpoints_hide_the_padding_too(tiny_chroma: Path) -> None:
    """diffusers gives single blocks no mask there. Answers and gradients are those without checkpoints."""
    from networks.create import create
    from networks.settings import Asked

    family = loaded(tiny_chroma)
    given, denoiser = texts(family, CAPTIONS), family.components["denoiser"].train()
    network = create("lora", family.adapter_targets(), Asked(dim=2, alpha=1.0), {})
    network.attach()
    for adapter in network.adapters:
        torch.nn.init.normal_(adapter.lora_up.weight, std=0.05, generator=torch.Generator().manual_seed(0))  # type: ignore[attr-defined]
    modulation: list[Tensor] = []
    denoiser.distilled_guidance_layer.register_forward_hook(lambda *found: modulation.append(found[-1]))  # type: ignore[union-attr,operator]
    answers, gradients = [], []
    for checkpoints in (False, True):
        if checkpoints:
            family.components.checkpoint("denoiser")
        network.zero_grad(set_to_none=True)
        answer = family.predict(noisy(3), LEVELS, given)
        answer.square().mean().backward()
        answers.append(answer.detach())
        gradients.append([parameter.grad for parameter in network.parameters()])
    torch.testing.assert_close(*answers, rtol=0, atol=ROUNDED)
    for one, other in zip(*gradients, strict=True):
        assert one is not None
        torch.testing.assert_close(other, one, rtol=1e-3, atol=1e-6)
    assert not any(found.requires_grad for found in modulation), "the distilled guidance layer runs without gradients"


def test_the_table_of_places_is_made_anew(chroma: Chroma, pipeline: Any) -> None:
    """It is in no file."""
    found, expected = (dict(one.named_buffers()) for one in (chroma.components["denoiser"], pipeline.transformer))
    assert found.keys() == expected.keys() == {"time_text_embed.mod_proj"}
    assert all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize("autocast", [False, True])
def test_close_levels_differ_in_bf16(tiny_chroma: Path, autocast: bool) -> None:
    """0.700 and 0.701 are one number in bf16, in which diffusers' transformer would take the time."""
    family = loaded(tiny_chroma, torch.bfloat16)
    given = texts(family, ["emoji of cat"])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        one, other = (family.predict(noisy(1), torch.tensor([level]), given) for level in (0.700, 0.701))
        same = family.predict(noisy(1), torch.tensor([0.700]), given)
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_bf16_is_near_fp32(tiny_chroma: Path, chroma: Chroma) -> None:
    """8 bits of mantissa, through five blocks: a few % of the answer's size."""
    small = loaded(tiny_chroma, torch.bfloat16)
    with torch.no_grad():
        exact = chroma.predict(noisy(3), LEVELS, texts(chroma, CAPTIONS))
        rounded = small.predict(noisy(3), LEVELS, texts(small, CAPTIONS)).float()
    assert (rounded - exact).norm() / exact.norm() < 0.05


@pytest.mark.parametrize("scale", [1.0, 5.0])
@pytest.mark.parametrize("shift", [None, 3.0])
def test_a_whole_sample_is_diffusers(
    tiny_chroma: Path, tmp_path: Path, pipeline: Any, scale: float, shift: float | None
) -> None:
    """Levels, shift, guidance and steps, with and without a negative prompt, as the folder's scheduler says: by the
    size, or by 3. diffusers' pipeline is given a mask of truth values."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    folder = shutil.copytree(tiny_chroma, tmp_path / "model")
    by_size = shift is None
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=by_size, shift=shift or 1.0)
    scheduler.save_pretrained(folder / "scheduler")
    pipeline.scheduler = scheduler
    family = loaded(folder)
    common: dict[str, Any] = {"num_inference_steps": 4, "width": 96, "height": 64, "output_type": "latent"}
    ours = {text: texts(family, [text]) for text in ("emoji of cat", "a dog")}
    with torch.no_grad():
        found = family.pipeline()(
            **family.pipeline_arguments(*ours.values()),
            **common,
            guidance_scale=scale,
            generator=torch.Generator().manual_seed(3),
        ).images
        own = [pipeline._get_t5_prompt_embeds(text, max_sequence_length=TOKENS) for text in ours]
        expected = pipeline(
            prompt_embeds=own[0][0],
            prompt_attention_mask=own[0][1].bool(),
            negative_prompt_embeds=own[1][0],
            negative_prompt_attention_mask=own[1][1].bool(),
            **common,
            guidance_scale=scale,
            generator=torch.Generator().manual_seed(3),
        ).images
    assert found.shape == (1, 16, 8, 12)
    torch.testing.assert_close(packed(found), expected, rtol=0, atol=20 * ROUNDED)  # 5 times each step's rounding


def test_shifts_of_the_drawn_levels(files: dict[str, Path]) -> None:
    """kohya's: sigma and shift by --discrete_flow_shift (3), flux_shift by the size, the others not at all."""
    base, size = files["pretrained_model_name_or_path"], (128, 128)  # 1024 pixels
    process = opened(base, **beside(files)).process
    shifts = {name: process.shift_at(size, name) for name in process.samplings}
    by_size = pytest.approx(3.158, abs=1e-3)
    assert shifts == {"sigma": 3.0, "shift": 3.0, "flux_shift": by_size, "uniform": 1.0, "sigmoid": 1.0}
    assert process.shift_at((8, 8)) == pytest.approx(3.0), "samples of a file, whatever their size"


# -- the true size, on the meta device


def test_true_counts() -> None:
    """Parameters, buffers, layers that get adapters, and keys of kohya's default set."""
    config = json.loads((Path(modules.__file__).parent / "assets" / "chroma.json").read_text(encoding="utf-8"))
    transformer = modules.new_chroma_transformer(config["transformer"])
    assert sum(p.numel() for p in transformer.parameters()) == 8_899_983_424
    assert sum(b.numel() for b in transformer.buffers()) == 11_008
    pattern = Chroma.PARTS["denoiser"].linear
    layers = {original_name(path): m for path, m in transformer.named_modules() if pattern.fullmatch(path)}
    assert len(layers) == 418
    groups: dict[str, list[Any]] = {}
    for name, layer in layers.items():
        groups.setdefault(fused_name(name) or name, []).append(layer)
    assert len(groups) == 228
    numbers = sum(group[0].in_features + sum(one.out_features for one in group) for group in groups.values())
    assert numbers == 3_502_080
