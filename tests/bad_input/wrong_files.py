"""Wrong files: images, captions, models, LoRA files, states."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.bad_input.wrong import (
    IMAGES,
    Wrong,
    caption,
    changed_json,
    changed_lora,
    encoded,
    image,
    link,
    noise,
    png_of_size,
    raw_safetensors,
    write,
    zip_bomb,
)

JPEG = encoded(noise(256, 256), "JPEG")
PNG = encoded(noise(), "PNG")

IMAGE = [
    image("empty", b""),
    image("text", b"hello world"),
    image("a web page", b"<html><body>403 Forbidden", file="c.jpg"),
    image("half a PNG", PNG[: len(PNG) // 2]),
    image("half a JPEG", JPEG[: len(JPEG) // 2], file="c.jpg"),
    image("the first bytes of a PNG", PNG[:8]),
    image("a vector graphic", b"<svg xmlns='http://www.w3.org/2000/svg'/>"),
    image("PostScript", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n"),
    image("pixels that are no numbers", encoded(Image.fromarray(np.full((64, 64), np.nan, np.float32)), "TIFF")),
    image("50000 x 50000 in a kilobyte", png_of_size(50_000, 50_000)),
    image("0 x 0", png_of_size(0, 0)),
    image(
        "1 x 1 and no enlargement",
        encoded(noise(1, 1), "PNG"),
        *("--enable_bucket", "--bucket_no_upscale", "--bucket_reso_steps", "32"),
    ),
    Wrong("a link in a circle", (), lambda: link(IMAGES / "c.png", "c.png")),
    Wrong("a link to nothing", (), lambda: link(IMAGES / "c.png", "nothing.png")),
    Wrong("a name in Latin-1", (), lambda: write(IMAGES / "caf\udce9.png", PNG)),
    Wrong("a folder's name in Latin-1", (), lambda: IMAGES.rename("data/2_caf\udce9")),
    Wrong("no images", (), lambda: [path.unlink() for path in IMAGES.glob("*.png")]),
    Wrong(
        "only in a folder below",
        (),
        lambda: (IMAGES.rename("data/x"), IMAGES.mkdir(), Path("data/x").rename(IMAGES / "x")),
    ),
]

ENTRY = '{"a.png": {"caption": %s}}'
IN_JSON = ("--in_json", "m.json", "--train_data_dir", str(IMAGES))

CAPTION = [
    caption("Latin-1", "café".encode("latin-1")),
    caption("UTF-16", "a cat".encode("utf-16")),
    caption("an image", PNG),
    caption("a megabyte", "a cat, " * 150_000),
    Wrong("a folder", (), lambda: ((IMAGES / "a.txt").unlink(), (IMAGES / "a.txt").mkdir())),
    Wrong("a link in a circle", (), lambda: link(IMAGES / "a.txt", "a.txt")),
    Wrong("a link to nothing", (), lambda: link(IMAGES / "a.txt", "nothing.txt")),
    caption("UTF-16 without its mark", "a cat".encode("utf-16-le")),
    Wrong("a pipe", (), lambda: ((IMAGES / "a.txt").unlink(), os.mkfifo(IMAGES / "a.txt"))),
    Wrong("of another ending", ("--caption_extension", ".caption")),
    Wrong("two of them", (), lambda: ((IMAGES / "a.txt").rename(IMAGES / "A.txt"), write(IMAGES / "a.TXT", "x"))),
    Wrong("half a character in JSON", IN_JSON, lambda: write("m.json", ENTRY % '"\\ud83d"')),
    Wrong("no JSON", IN_JSON, lambda: write("m.json", "{a: 1}")),
    Wrong("JSON 100000 deep", IN_JSON, lambda: write("m.json", '{"a":' * 100_000)),
    Wrong("a number in JSON", IN_JSON, lambda: write("m.json", ENTRY % 3)),
    Wrong("an image that is not there", IN_JSON, lambda: write("m.json", '{"c.png": {}}')),
    Wrong("an image's backslash", IN_JSON, lambda: write("m.json", '{"D:\\train\\c.png": {}}'.replace("\\c", "\\\\c"))),
    Wrong("an image's name of 300", IN_JSON, lambda: write("m.json", f'{{"{"x" * 300}.png": {{}}}}')),
    Wrong("a megabyte in JSON", IN_JSON, lambda: write("m.json", ENTRY % f'"{"cat " * 250_000}"')),
]


def model(name: str, file: str, make: object = None) -> Wrong:
    """A file as the base model."""
    assert callable(make)
    return Wrong(name, ("--pretrained_model_name_or_path", file), make)


def broken_base(name: str, change: object) -> Wrong:
    """A diffusers folder, a copy of the good one, with something wrong."""

    def prepare() -> None:
        shutil.copytree("base", "broken", symlinks=False)
        assert callable(change)
        change(Path("broken"))

    return Wrong(name, ("--pretrained_model_name_or_path", "broken"), prepare)


def config_of(part: str, content: str) -> object:
    return lambda base: write(base / part / "config.json", content)


SDXL = {"model.diffusion_model.label_emb.0.0.weight": torch.zeros(2, 2816)}
INPAINTING = {
    "model.diffusion_model.input_blocks.0.0.weight": torch.zeros(320, 9, 3, 3),
    "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": torch.zeros(320, 768),
    "cond_stage_model.transformer.x": torch.zeros(1),
}
SHORT_ENTRY = {"a": {"dtype": "F32", "shape": [1000], "data_offsets": [0, 4000]}}

MODEL = [
    model("empty", "m.safetensors", lambda: write("m.safetensors", b"")),
    model("a web page", "m.safetensors", lambda: write("m.safetensors", b"<!DOCTYPE html>")),
    model("a Git LFS pointer", "m.ckpt", lambda: write("m.ckpt", b"version https://git-lfs.github.com/spec/v1\n")),
    model("no tensors", "m.safetensors", lambda: raw_safetensors("m.safetensors", {})),
    model("cut off", "m.safetensors", lambda: raw_safetensors("m.safetensors", SHORT_ENTRY, bytes(100))),
    model("an odd header", "m.safetensors", lambda: raw_safetensors("m.safetensors", {"a": {"dtype": [1]}})),
    model("half a checkpoint", "m.ckpt", lambda: write("m.ckpt", b"PK\x03\x04" + bytes(1000))),
    model(
        "an archive of something else",
        "m.ckpt",
        lambda: shutil.make_archive("m", "zip", "data") and Path("m.zip").rename("m.ckpt"),
    ),
    model("a LoRA", "lora.safetensors", lambda: None),
    model("an embedding", "m.safetensors", lambda: save_file({"emb_params": torch.zeros(2, 64)}, "m.safetensors")),
    model(
        "SDXL's refiner",
        "m.safetensors",
        lambda: save_file({"model.diffusion_model.label_emb.0.0.weight": torch.zeros(2, 2560)}, "m.safetensors"),
    ),
    model("an inpainting model", "m.safetensors", lambda: save_file(INPAINTING, "m.safetensors")),
    broken_base("no UNet", lambda base: shutil.rmtree(base / "unet")),
    broken_base("no text encoder", lambda base: shutil.rmtree(base / "text_encoder")),
    broken_base("no VAE", lambda base: shutil.rmtree(base / "vae")),
    broken_base("no weights", lambda base: next((base / "unet").glob("*.safetensors")).unlink()),
    broken_base("an empty configuration", config_of("unet", "")),
    broken_base("a configuration 100000 deep", config_of("unet", "[" * 100_000)),
    broken_base(
        "a configuration of other types", config_of("text_encoder", '{"hidden_size": 64, "num_hidden_layers": "two"}')
    ),
    broken_base("a configuration of nothing", config_of("vae", '{"block_out_channels": []}')),
    broken_base(
        "another prediction",
        lambda base: changed_json(base / "scheduler" / "scheduler_config.json", prediction_type="sample"),
    ),
    broken_base(
        "blocks of no known kind",
        lambda base: changed_json(base / "unet" / "config.json", down_block_types=["Foo"] * 4),
    ),
    broken_base("a factor of text", lambda base: changed_json(base / "vae" / "config.json", scaling_factor="x")),
    broken_base(
        "another part's weights",
        lambda base: shutil.copy(
            base / "vae" / "diffusion_pytorch_model.safetensors", base / "unet" / "diffusion_pytorch_model.safetensors"
        ),
    ),
    broken_base(
        "betas of text",
        lambda base: changed_json(base / "scheduler" / "scheduler_config.json", trained_betas=[0.1, "x"]),
    ),
    Wrong("a LoRA as the VAE", ("--vae", "lora.safetensors")),
]


def lora(
    name: str, make: object = None, *words: str, file: str = "lora.safetensors", needs_model: bool = False
) -> Wrong:
    """A wrong file for --network_weights, or for what `words` say."""
    assert callable(make)
    return Wrong(name, words or ("--network_weights", file), make, needs_model)


HALF = {"lora_unet_x.lora_down.weight": {"dtype": "F32", "shape": [4, 64], "data_offsets": [0, 1024]}}
DORA = {"lora_te_text_model_encoder_layers_0_mlp_fc1.dora_scale": torch.ones(1, 64)}
LORA = [
    lora("empty", lambda: write("lora.safetensors", b"")),
    lora("cut off", lambda: raw_safetensors("lora.safetensors", HALF, bytes(100))),
    lora("no JSON as the header", lambda: raw_safetensors("lora.safetensors", b"[1, 2]")),
    lora("no tensors", lambda: raw_safetensors("lora.safetensors", {})),
    lora(
        "a base model's part", lambda: shutil.copy("base/unet/diffusion_pytorch_model.safetensors", "lora.safetensors")
    ),
    lora("an embedding", lambda: save_file({"emb_params": torch.zeros(2, 64)}, "lora.safetensors")),
    lora("a pickle of numbers", lambda: torch.save({"a": 1}, "lora.pt"), file="lora.pt"),
    lora("a pickle of something else", lambda: write("lora.pt", b"\x80\x04N."), file="lora.pt"),
    lora(
        "a base model's part to merge", lambda: None, "--base_weights", "base/unet/diffusion_pytorch_model.safetensors"
    ),
    lora(
        "T-LoRA to merge",
        lambda: save_file({"lora_unet_a.lambda_layer": torch.zeros(1, 4)}, "lora.safetensors"),
        "--base_weights",
        "lora.safetensors",
    ),
    lora(
        "DoRA, with its ranks",
        lambda: save_file(load_file("lora.safetensors") | DORA, "lora.safetensors"),
        *("--network_weights", "lora.safetensors", "--dim_from_weights"),
    ),
    lora("another rank", lambda: None, "--network_weights", "lora.safetensors", "--network_dim", "2"),
    lora("whole numbers", lambda: changed_lora(lambda _name, tensor: tensor.to(torch.int8))),
    lora(
        "of other layers",
        lambda: save_file(
            {f"lora_unet_x{name}": tensor for name, tensor in load_file("lora.safetensors").items()}, "lora.safetensors"
        ),
        "--base_weights",
        "lora.safetensors",
    ),
    lora(
        "of a wider model to merge",
        lambda: changed_lora(
            lambda name, tensor: tensor.repeat(1, 2) if name.endswith("k_proj.lora_down.weight") else tensor
        ),
        "--base_weights",
        "lora.safetensors",
    ),
    lora(
        "SDXL's",
        lambda: save_file(
            {"lora_unet_input_blocks_4_1_proj_in.lora_down.weight": torch.zeros(4, 64)}, "lora.safetensors"
        ),
    ),
    lora("half of each pair", lambda: changed_lora(lambda name, tensor: None if "lora_up" in name else tensor)),
    lora(
        "half of each pair to merge",
        lambda: changed_lora(lambda name, tensor: None if "lora_up" in name else tensor),
        "--base_weights",
        "lora.safetensors",
    ),
    lora(
        "rank 0",
        lambda: changed_lora(lambda name, tensor: tensor[:0] if "lora_down" in name else tensor),
        "--network_weights",
        "lora.safetensors",
        "--dim_from_weights",
    ),
    lora("NaN", lambda: changed_lora(lambda name, tensor: tensor * float("nan"))),
]

STATE_FOLDER = Path("fox-state")  # which the test has put there


def state(name: str, change: object = None, *words: str, folder: str = "fox-state") -> Wrong:
    """A wrong state to go on from."""
    assert callable(change)
    return Wrong(name, ("--resume", folder, "--max_train_steps", "6", *words), change)


def facts(**changes: object) -> object:
    return lambda: changed_json(STATE_FOLDER / "state.json", **changes)


TENSORS = STATE_FOLDER / "state.pt"
STATE = [
    state("not there", lambda: None, folder="fox-stat"),
    state("a LoRA", lambda: None, folder="lora.safetensors"),
    state("the folder that holds it", lambda: None, folder="."),
    state("none of this name", lambda: None, folder="latest"),
    state("without its facts", lambda: (STATE_FOLDER / "state.json").unlink()),
    state("without its tensors", lambda: TENSORS.unlink()),
    state("empty facts", lambda: write(STATE_FOLDER / "state.json", "")),
    state("facts 100000 deep", lambda: write(STATE_FOLDER / "state.json", "[" * 100_000)),
    state("a list of facts", lambda: write(STATE_FOLDER / "state.json", "[]")),
    state("a later format", facts(format=99)),
    state("steps as text", facts(step="2")),
    state("steps below 0", facts(step=-2)),
    state("no configuration", facts(configuration=None)),
    state("half its tensors", lambda: write(TENSORS, TENSORS.read_bytes()[:5000])),
    state("no tensors", lambda: write(TENSORS, b"")),
    state("text for tensors", lambda: write(TENSORS, "hello")),
    state("a list for tensors", lambda: torch.save([1], TENSORS)),
    state("a compressed archive", lambda: (TENSORS.unlink(), zip_bomb(TENSORS, megabytes=1))),
    state("at its end", lambda: None, "--max_train_steps", "2"),
    state("of another optimizer", lambda: None, "--optimizer_type", "SGD"),
    state("of another rank and seed", lambda: None, "--network_dim", "2", "--seed", "7"),
    state("of another rank anyway", lambda: None, "--network_dim", "2", "--resume_anyway"),
    state("of other captions", lambda: write(IMAGES / "a.txt", "something else")),
    state(
        "of kohya's scripts",
        lambda: ((STATE_FOLDER / "state.json").unlink(), write(STATE_FOLDER / "train_state.json", "{}")),
    ),
]
