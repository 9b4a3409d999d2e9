"""Recognising base models, and naming what is none."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from original_layout import weights_of
from safetensors.torch import load_file, save_file

from library.errors import UserError
from library.models.checkpoints.folder import choose_weights, shards_of
from library.models.checkpoints.open_file import open_vae
from library.models.opening import open_base_model, open_family

BASE = Path(__file__).parents[2] / "quickstart" / "base"


def _open(path: Path | str, **options: Any) -> Any:
    return open_family(str(path), vae=options.pop("vae", None), options=options)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the small base model to take apart."""
    return Path(shutil.copytree(BASE, tmp_path / "model"))


def _edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _file(path: Path, **shapes: tuple[int, ...]) -> Path:
    """A .safetensors with empty-handed tensors of these names ("__" is ".")."""
    save_file({name.replace("__", "."): torch.zeros(shape) for name, shape in shapes.items()}, path)
    return path


_UNET = {
    "model__diffusion_model__input_blocks__0__0__weight": (320, 4, 3, 3),
    "model__diffusion_model__input_blocks__1__1__transformer_blocks__0__attn2__to_k__weight": (320, 768),
}
_CONV, _CONTEXT = _UNET
_CLIP = {"cond_stage_model__transformer__text_model__final_layer_norm__weight": (768,)}
_VAE = {"first_stage_model__encoder__conv_in__weight": (128, 3, 3, 3)}


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (
            {"lora_unet_mid_block_x__lora_down__weight": (4, 8)},
            "is a LoRA, not a base model; to train on from it, give it as --network_weights",
        ),
        ({"unet__mid_block__attn__to_q__lora_A__weight": (4, 8)}, "is a LoRA, not"),
        ({"lora_te1_x__hada_w1_a": (4, 8)}, "is a LoHa, not a base model"),
        ({**_UNET, **_VAE, "conditioner__embedders__0__x": (1,)}, "text states of 768, is neither that of SDXL"),
        ({"model__diffusion_model__label_emb__0__0__weight": (1280, 2816)}, "is a UNet without a text encoder"),
        ({**_UNET, "conditioner__embedders__0__x": (1,), "edm_mean": (4,)}, "is an SDXL model of another kind"),
        ({"model__diffusion_model__label_emb__0__0__weight": (1536, 2560)}, "is the SDXL refiner"),
        ({"model__diffusion_model__double_blocks__0__img_attn__qkv__weight": (9, 3)}, "is a FLUX model"),
        ({"double_blocks__0__img_attn__qkv__weight": (9, 3)}, "is a FLUX model"),
        ({"model__diffusion_model__joint_blocks__0__x": (1,)}, "is a Stable Diffusion 3 model"),
        (_VAE, "is a VAE, not a base model; give it as --vae"),
        ({"encoder__conv_in__weight": (128, 3, 3, 3)}, "is a VAE, not"),
        ({**_UNET, **_VAE}, "is a UNet without a text encoder"),
        ({"down_blocks__0__resnets__0__x": (1,), "time_embedding__x": (1,)}, "is the UNet of a diffusers folder"),
        ({"text_model__embeddings__x": (1,)}, "is a text encoder, not a base model"),
        ({"emb_params": (1, 768)}, "is a textual inversion embedding"),
        ({"control_model__input_blocks__0__0__weight": (1,)}, "is a ControlNet"),
        ({"foo": (1,), "bar": (2,)}, r"is of no known kind \(2 tensors: bar, foo\), not a base model"),
    ],
)
def test_other_files_are_named_for_what_they_are(
    tmp_path: Path, shapes: dict[str, tuple[int, ...]], message: str
) -> None:
    path = _file(tmp_path / "model.safetensors", **shapes)
    with pytest.raises(UserError, match=message) as caught:
        _open(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({_CONV: (320, 9, 3, 3)}, "an inpainting model"),
        ({_CONV: (320, 5, 3, 3)}, "a depth-to-image model"),
        ({_CONV: (48, 4, 3, 3)}, "48 channels wide .* neither Stable Diffusion 1.x .* as a diffusers folder"),
        ({_CONTEXT: (320, 2048)}, "text states of 2048"),
    ],
)
def test_checkpoints_of_other_sizes_are_refused(
    tmp_path: Path, shapes: dict[str, tuple[int, ...]], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        _open(_file(tmp_path / "x.safetensors", **{**_UNET, **_CLIP, **_VAE, **shapes}))


def test_single_files_of_both_versions_are_told_apart(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    first = _open(_file(tmp_path / "1.safetensors", **_UNET, **_CLIP, **_VAE, model_ema__x=(1,)))
    assert (first.base_model_version, first.architecture) == ("sd_v1", "stable-diffusion-v1")
    assert (first.latents.factor, first.latents.channels, first.native_resolution) == (8, 4, 512)
    assert "averaged (EMA) weights; they are not used" in caplog.text
    wide = {_CONTEXT: (320, 1024)}
    clip = {"cond_stage_model__model__ln_final__weight": (1024,)}
    path = _file(tmp_path / "2.safetensors", **{**_UNET, **wide}, **clip, **_VAE, extra__thing=(1,))
    caplog.clear()
    second = _open(path, v2=True)
    assert (second.base_model_version, second.architecture) == ("sd_v2", "stable-diffusion-v2-512")
    assert "noise is assumed" in caplog.text
    assert "1 tensors of no known part are ignored: extra.thing" in caplog.text
    third = _open(path, v_parameterization=True)
    assert (third.base_model_version, third.architecture) == ("sd_v2_v", "stable-diffusion-v2-768-v")
    assert (third.process.prediction_type, third.native_resolution) == ("v_prediction", 768)
    with pytest.raises(UserError, match=r"--v2 was given, but .* is a Stable Diffusion 1.x model"):
        _open(tmp_path / "1.safetensors", v2=True)


def test_what_a_file_says_of_its_prediction_is_heard(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    states = {n.replace("__", "."): torch.zeros(s) for n, s in {**_UNET, **_CLIP, **_VAE}.items()}
    path = tmp_path / "x.safetensors"
    save_file({**states, "v_pred": torch.zeros(0)}, path)
    assert _open(path).base_model_version == "sd_v1_v"
    save_file(states, path, metadata={"modelspec.prediction_type": "v"})
    assert _open(path).process.prediction_type == "v_prediction"
    save_file(states, path, metadata={"modelspec.prediction_type": "epsilon"})
    assert _open(path).process.prediction_type == "epsilon"
    assert _open(path, v_parameterization=True).process.prediction_type == "v_prediction"
    assert "the flag is used" in caplog.text


def test_folders_say_what_they_predict(folder: Path, tiny_v2: Path, caplog: pytest.LogCaptureFixture) -> None:
    second = _open(tiny_v2)
    assert (second.base_model_version, second.process.prediction_type) == ("sd_v2_v", "v_prediction")
    assert _open(tiny_v2, v2=True, v_parameterization=True).base_model_version == "sd_v2_v"
    caplog.clear()
    family = _open(folder, v_parameterization=True)  # converted folders carry wrong configurations
    assert (family.base_model_version, family.process.prediction_type) == ("sd_v1_v", "v_prediction")
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "--v_parameterization was given, but" in warning
    assert "scheduler_config.json; the flag is used" in warning
    with pytest.raises(UserError, match="--v2 was given"):
        _open(folder, v2=True)
    scheduler = folder / "scheduler" / "scheduler_config.json"
    _edit(scheduler, prediction_type="sample")
    with pytest.raises(UserError, match="prediction_type is 'sample'"):
        _open(folder)
    scheduler.unlink()
    with pytest.raises(UserError, match=r"scheduler_config\.json: no such file"):
        _open(folder)


def test_other_folders_are_named_for_what_they_are(folder: Path) -> None:
    with pytest.raises(UserError, match=r"it is one part of one: give .*model"):
        _open(folder / "unet")
    shutil.move(folder / "vae", folder / "other_vae")
    with pytest.raises(UserError, match=r"holds no VAE; give one with --vae"):
        _open(folder)
    assert _open(folder, vae=str(folder / "other_vae")).latents.factor == 4
    _edit(folder / "unet" / "config.json", in_channels=9)
    with pytest.raises(UserError, match=r"takes 9 channels .* an inpainting model"):
        _open(folder, vae=str(folder / "other_vae"))
    _edit(folder / "unet" / "config.json", in_channels=4, cross_attention_dim=32)
    with pytest.raises(UserError, match="needs text states of 32 channels, its text encoder has 64"):
        _open(folder, vae=str(folder / "other_vae"))
    (folder / "text_encoder" / "config.json").write_text('{"hidden_size": 64}')
    with pytest.raises(UserError, match=r"text_encoder.config\.json: has no 'num_hidden_layers'"):
        _open(folder)
    (folder / "text_encoder" / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json, line 1: not valid JSON"):
        _open(folder)
    _edit(folder / "unet" / "config.json", addition_embed_type="text_time")
    (folder / "text_encoder" / "config.json").write_text('{"hidden_size": 64, "num_hidden_layers": 2}')
    with pytest.raises(UserError, match=r"text_encoder_2.config\.json: no such file"):
        _open(folder)
    _edit(folder / "unet" / "config.json", projection_class_embeddings_input_dim=2560)
    with pytest.raises(UserError, match="is the SDXL refiner"):
        _open(folder)
    _edit(folder / "model_index.json", _class_name="Flux2Pipeline")
    shutil.rmtree(folder / "unet")
    with pytest.raises(UserError, match=r"is a FLUX\.2 dev model"):
        _open(folder)
    _edit(folder / "model_index.json", _class_name="WuerstchenPipeline")
    with pytest.raises(UserError, match="names a WuerstchenPipeline"):
        _open(folder)


def test_a_folder_of_files_lists_them(tmp_path: Path) -> None:
    (tmp_path / "anything.safetensors").touch()
    with pytest.raises(UserError, match=r"to use a single file, give its path: .*anything\.safetensors"):
        _open(tmp_path)


def test_a_wrong_path_gets_the_nearest_name(folder: Path) -> None:
    (folder.parent / "anything-v3.safetensors").touch()
    with pytest.raises(UserError, match=r"no such file or folder, did you mean '.*anything-v3\.safetensors'\?"):
        _open(folder.parent / "anything_v3.safetensors")
    with pytest.raises(UserError, match=r"did you mean '.*model'\?"):
        _open(folder.parent / "modell" / "unet")
    with pytest.raises(UserError, match=r"zzz: no such file or folder$"):
        _open(folder.parent / "zzz")


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (["diffusion_pytorch_model.bin", "diffusion_pytorch_model.safetensors"], "diffusion_pytorch_model.safetensors"),
        (["diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model.bin"], "diffusion_pytorch_model.bin"),
        (["model.fp16.safetensors", "pytorch_model.fp16.bin", "config.json"], "model.fp16.safetensors"),
        (
            ["diffusion_pytorch_model.non_ema.safetensors", "diffusion_pytorch_model.fp16.safetensors"],
            "diffusion_pytorch_model.fp16.safetensors",
        ),
        (
            ["model.safetensors.index.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"],
            "model.safetensors.index.json",
        ),
        (["model.safetensors.index.fp16.json", "model.fp16-00001-of-00002.safetensors"],
         "model.safetensors.index.fp16.json"),
        (["config.json", "flax_model.msgpack"], None),
    ],
)  # fmt: skip
def test_the_best_weights_of_a_folder_are_chosen(names: list[str], chosen: str | None) -> None:
    assert choose_weights(names) == chosen
    assert choose_weights(reversed(names)) == chosen


def test_shards_are_those_of_the_variant() -> None:
    names = ["model-00001-of-00002.safetensors", "model.fp16-00001-of-00002.safetensors", "model-00001-of-00002.bin"]
    assert shards_of("model.safetensors.index.json", names) == names[:1]
    assert shards_of("model.safetensors.index.fp16.json", names) == names[1:2]


def _entries_equal(folder: Path) -> bool:
    parts = open_base_model(str(folder)).parts
    want = open_base_model(str(BASE)).parts
    return all(parts[name].entries().keys() == want[name].entries().keys() for name in want)


def test_shards_variants_and_pickles_of_a_folder_are_read(folder: Path) -> None:
    unet = load_file(BASE / "unet" / "diffusion_pytorch_model.safetensors")
    names = sorted(unet)
    half = {name: f"diffusion_pytorch_model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(names)}
    for shard in set(half.values()):
        save_file({n: unet[n] for n in names if half[n] == shard}, folder / "unet" / shard)
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    index = folder / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": half}))
    text = folder / "text_encoder"
    states = {f"text_model.{n}": t for n, t in load_file(text / "model.safetensors").items()}
    torch.save({**states, "text_model.embeddings.position_ids": torch.arange(77)[None]}, text / "pytorch_model.bin")
    (text / "model.safetensors").unlink()
    vae = folder / "vae" / "diffusion_pytorch_model.safetensors"
    vae.rename(vae.with_name("diffusion_pytorch_model.fp16.safetensors"))
    assert _entries_equal(folder)
    (folder / "unet" / half[names[0]]).unlink()
    with pytest.raises(UserError, match="which is missing"):
        open_base_model(str(folder)).parts["denoiser"].entries()
    index.write_text(json.dumps({"weight_map": {"x": "../../secret.safetensors"}}))
    with pytest.raises(UserError, match="no table of files in the same folder"):
        open_base_model(str(folder)).parts["denoiser"].entries()
    index.unlink()
    for shard in set(half.values()):
        (folder / "unet" / shard).unlink(missing_ok=True)
    with pytest.raises(UserError, match=r"holds no weights, but config\.json"):
        open_base_model(str(folder)).parts["denoiser"].entries()


def test_a_folder_without_tokenizer_gets_the_shipped_one(folder: Path) -> None:
    shutil.rmtree(folder / "tokenizer")
    assert _open(folder).count_tokens("a photo of a cat") == 5


def test_another_vae_in_every_form(tmp_path: Path, folder: Path) -> None:
    states = weights_of(BASE)["vae"]
    config = json.loads((BASE / "vae" / "config.json").read_text())
    for place in (BASE / "vae", BASE, BASE / "vae" / "diffusion_pytorch_model.safetensors"):
        part = open_vae(str(place), default_config={})
        assert part.config["scaling_factor"] == config["scaling_factor"]
        assert part.entries().keys() == states.keys()
    alone = tmp_path / "vae.pt"
    torch.save({"state_dict": {**states, "loss.discriminator.main.0.weight": torch.ones(1)}}, alone)
    part = open_vae(str(alone), default_config=config)
    assert part.config == config
    assert part.entries().keys() == states.keys()
    with pytest.raises(UserError, match=r"--vae .*model\.safetensors is a text encoder, and holds no VAE"):
        _open(folder, vae=str(folder / "text_encoder" / "model.safetensors"))
    with pytest.raises(UserError, match=r"--vae .*no folder of a VAE"):
        _open(folder, vae=str(folder / "scheduler"))
    with pytest.raises(UserError, match=r"--vae .*vea: no such file or folder, did you mean '.*vae'"):
        _open(folder, vae=str(folder / "vea"))
    _edit(folder / "vae" / "config.json", _class_name="AutoencoderTiny")
    with pytest.raises(UserError, match="an AutoencoderTiny"):
        _open(folder)


def test_options_out_of_range_are_refused() -> None:
    with pytest.raises(UserError, match="clip_skip 4: must be 1 … 3"):
        _open(BASE, clip_skip=4)
    with pytest.raises(UserError, match="max_token_length 100: must be one of 75, 150, 225"):
        _open(BASE, max_token_length=100)
