"""Makes each harmful file, gives it to the program, and writes down what came of it. See test_malicious_files.py."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import struct
import sys
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.bad_input.wrong import (
    IMAGES,
    USUAL,
    encoded,
    good_inputs,
    link,
    noise,
    png_of_size,
    raw_safetensors,
    write,
    zip_bomb,
)

GIGABYTES_100 = 100 * 2**30
COMMAND = "touch executed"  # in the folder of the row, which is the current one


class RunsACommand:
    """What pickles as a call of os.system."""

    def __reduce__(self) -> Any:
        return os.system, (COMMAND,)


@dataclass(frozen=True)
class Harm:
    prepare: Callable[[], Any]
    words: tuple[str, ...]
    message: str


def _evil_checkpoint(path: str) -> None:
    import torch

    names = ("model.diffusion_model.x.weight", "cond_stage_model.transformer.x", "lora_unet_x.lora_down.weight")
    torch.save({**{name: torch.ones(2) for name in names}, "evil": RunsACommand()}, path)


def _text_bomb() -> bytes:
    """A PNG with a comment of 300 MB in 300 KB."""
    png = encoded(noise(), "PNG")
    squeeze = zlib.compressobj(9)
    data = b"comment\0\0" + b"".join(squeeze.compress(bytes(1_000_000)) for _ in range(300)) + squeeze.flush()
    chunk = struct.pack(">I", len(data)) + b"zTXt" + data + struct.pack(">I", zlib.crc32(b"zTXt" + data))
    return png[:33] + chunk + png[33:]


EVIL = (
    "names posix.system, which no model needs and which programs that open such files carelessly would execute: "
    "delete the file. "
    "Nothing in it was executed"
)
ONE_BAD = "1 unreadable images (--skip_bad_images leaves them out):\n  data/2_style/c.png: "
CLAIM = {"lora_unet_x.lora_down.weight": {"dtype": "F32", "shape": [2**35], "data_offsets": [0, 2**37]}}
TABLE = {
    "a command in a base model": Harm(
        lambda: _evil_checkpoint("m.ckpt"), ("--pretrained_model_name_or_path", "m.ckpt"), f"m.ckpt: {EVIL}"
    ),
    "a command in a VAE": Harm(lambda: _evil_checkpoint("m.ckpt"), ("--vae", "m.ckpt"), f"--vae m.ckpt: {EVIL}"),
    "a command in a LoRA": Harm(
        lambda: _evil_checkpoint("m.ckpt"), ("--network_weights", "m.ckpt"), f"--network_weights m.ckpt: {EVIL}"
    ),
    "a command in a LoRA to merge": Harm(
        lambda: _evil_checkpoint("m.pt"), ("--base_weights", "m.pt"), f"--base_weights m.pt: {EVIL}"
    ),
    "a command and nothing else": Harm(
        lambda: write("m.ckpt", pickle.dumps(RunsACommand())),
        ("--network_weights", "m.ckpt"),
        "--network_weights m.ckpt: a pickle, but not one that torch wrote",
    ),
    "a header of 100 GB": Harm(
        lambda: raw_safetensors("m.safetensors", {}, bytes(100), length=GIGABYTES_100),
        ("--pretrained_model_name_or_path", "m.safetensors"),
        "m.safetensors: cut off or damaged: its header takes 107374182400 bytes and the file has 110",
    ),
    "a header of 100 GB in a LoRA": Harm(
        lambda: raw_safetensors("m.safetensors", {}, bytes(100), length=GIGABYTES_100),
        ("--network_weights", "m.safetensors"),
        "--network_weights m.safetensors: cut off or damaged: its header takes 107374182400 bytes and the file has 110",
    ),
    "a tensor of 128 GB": Harm(
        lambda: raw_safetensors("m.safetensors", CLAIM, bytes(100)),
        ("--base_weights", "m.safetensors"),
        "--base_weights m.safetensors: cut off: 'lora_unet_x.lora_down.weight' ends at byte 137438953589, the file has "
        "217: copy or download it again",
    ),
    "a header of lists in lists": Harm(
        lambda: raw_safetensors("m.safetensors", b'{"a":' + b"[" * 100_000),
        ("--network_weights", "m.safetensors"),
        "--network_weights m.safetensors: neither a .safetensors nor a torch checkpoint, or damaged at its start",
    ),
    "a zip bomb": Harm(
        lambda: zip_bomb("m.ckpt", megabytes=400),
        ("--pretrained_model_name_or_path", "m.ckpt"),
        "m.ckpt: a compressed archive; torch writes uncompressed ones: load it and save it again with torch",
    ),
    "a zip bomb in a LoRA": Harm(
        lambda: zip_bomb("m.pt", megabytes=400),
        ("--network_weights", "m.pt"),
        "--network_weights m.pt: a compressed archive; torch writes uncompressed ones: load it and save it again with "
        "torch",
    ),
    "an image of 10 gigapixels": Harm(
        lambda: write(IMAGES / "c.png", png_of_size(100_000, 100_000)),
        (),
        f"{ONE_BAD}more than 89478485 pixels (a decompression bomb?): make it smaller",
    ),
    "an image with a comment of 300 MB": Harm(
        lambda: write(IMAGES / "c.png", _text_bomb()),
        (),
        f"{ONE_BAD}Decompressed data too large for PngImagePlugin.MAX_TEXT_CHUNK",
    ),
    "an image that is a link in a circle": Harm(
        lambda: link(IMAGES / "c.png", "c.png"), (), f"{ONE_BAD}it is a link that leads back to itself"
    ),
    "a folder that is a link in a circle": Harm(
        lambda: link("loop", "loop"),
        ("--train_data_dir", "loop"),
        "command line: --train_data_dir: no such folder: loop; it is a link that leads back to itself",
    ),
    "a caption of a megabyte": Harm(
        lambda: write(IMAGES / "a.txt", "a cat, " * 150_000),
        (),
        "data/2_style/a.txt: 1050000 bytes; a caption has at most 131072",
    ),
    "a caption of 4 GB": Harm(
        lambda: os.truncate(IMAGES / "a.txt", 4 * 2**30),
        (),
        "data/2_style/a.txt: 4294967296 bytes; a caption has at most 131072",
    ),
    "a configuration of lists in lists": Harm(
        lambda: write("t.toml", f"optimizer_args = {'[' * 20_000}"),
        ("--config_file", "t.toml"),
        "t.toml: its lists or tables are nested too deeply",
    ),
    "JSON of lists in lists": Harm(
        lambda: write("d.json", "[" * 1_000_000),
        ("--dataset_config", "d.json"),
        "d.json: its lists or tables are nested too deeply",
    ),
}


def prepare(folder: Path) -> None:
    """A folder for each row, with good inputs and the harmful one."""
    before = Path.cwd()
    for number, harm in enumerate(TABLE.values()):
        own = folder / str(number)
        own.mkdir()
        os.chdir(own)
        try:
            good_inputs()
            harm.prepare()
        finally:
            os.chdir(before)


def main(folder: str) -> None:
    """Write results.json: for each row the exit code, the error, and by how many MiB the process has grown by then."""
    import resource

    from library.models.components import Components
    from train_network import main as program

    class ModelWanted(Exception):
        pass

    def load(*_arguments: object) -> None:
        raise ModelWanted

    Components.load = load
    os.chdir(folder)
    Path("good").mkdir()
    os.chdir("good")
    good_inputs()
    with contextlib.suppress(ModelWanted):
        program(list(USUAL))  # what is imported does not count
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    results = {}
    for number, (name, harm) in enumerate(TABLE.items()):
        os.chdir(Path(folder) / str(number))
        printed = io.StringIO()
        with contextlib.redirect_stderr(printed):
            code = program([*USUAL, *harm.words])
        error = printed.getvalue().partition("error: ")[2].rstrip("\n")
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        unit = 2**20 if sys.platform == "darwin" else 2**10
        results[name] = {"code": code, "error": error, "grown": (peak - before) / unit}
    write(Path(folder) / "results.json", json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1])
