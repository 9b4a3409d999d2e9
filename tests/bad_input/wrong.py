"""What a wrong input is: the files that are prepared, the words of the command line, and whether a model is needed."""

from __future__ import annotations

import io
import json
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.conftest import BASE

IMAGES = Path("data/2_style")  # below the folder that is the current one; it has a.png, a.txt, b.png and b.txt
USUAL = (
    *("--pretrained_model_name_or_path", "base", "--train_data_dir", "data", "--caption_extension", ".txt"),
    *("--resolution", "64", "--output_dir", "out", "--output_name", "test", "--network_dim", "4"),
    *("--network_alpha", "2", "--learning_rate", "1e-3", "--max_train_steps", "4", "--seed", "1", "--no-loss_plot"),
    *("--max_data_loader_n_workers", "0"),
)


def good_inputs() -> None:
    """Images with captions, and a base model, in the current folder."""
    IMAGES.mkdir(parents=True)
    for name in ("a", "b"):
        noise().save(IMAGES / f"{name}.png")
        write(IMAGES / f"{name}.txt", f"a picture of {name}")
    Path("base").symlink_to(BASE)


def nothing() -> None:
    """There is nothing to prepare: the words alone are wrong."""


@dataclass(frozen=True)
class Wrong:
    """`name` is unique within its kind. `prepare` runs in the folder of the test, which is the current one."""

    name: str
    words: tuple[str, ...]
    prepare: Callable[[], Any] = nothing
    needs_model: bool = False


def flags(*words: str, needs_model: bool = False) -> Wrong:
    """A command line that is wrong by itself."""
    return Wrong(" ".join(words)[:60], words, needs_model=needs_model)


def config(name: str, content: str | bytes) -> Wrong:
    """A wrong --config_file."""
    return Wrong(name, ("--config_file", "train.toml"), lambda: write("train.toml", content))


def dataset(name: str, content: str | bytes, *words: str, file: str = "data.toml") -> Wrong:
    """A wrong --dataset_config."""
    return Wrong(name, ("--dataset_config", file, *words), lambda: write(file, content))


def image(name: str, content: bytes, *words: str, file: str = "c.png") -> Wrong:
    """A wrong image among good ones."""
    return Wrong(name, words, lambda: write(IMAGES / file, content))


def caption(name: str, content: str | bytes, *words: str) -> Wrong:
    """A wrong caption of a good image."""
    return Wrong(name, words, lambda: write(IMAGES / "a.txt", content))


def write(path: str | Path, content: str | bytes) -> None:
    Path(path).write_bytes(content if isinstance(content, bytes) else content.encode())


def link(path: str | Path, target: str) -> None:
    """A symbolic link in place of what is there."""
    Path(path).unlink(missing_ok=True)
    Path(path).symlink_to(target)


def encoded(picture: Image.Image, format: str) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format)
    return buffer.getvalue()


def noise(width: int = 64, height: int = 64) -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def png_of_size(width: int, height: int) -> bytes:
    """A PNG of a few hundred bytes that says it is so large."""
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = zlib.compress(bytes(100_000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def raw_safetensors(path: str | Path, header: Any, data: bytes = b"", *, length: int | None = None) -> None:
    """A file of this header, which says it has `length` bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    write(path, struct.pack("<Q", len(text) if length is None else length) + text + data)


def zip_bomb(path: str | Path, *, megabytes: int) -> None:
    """A torch checkpoint whose pickle is so large once it is unpacked."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/version", "3\n")
        with archive.open("archive/data.pkl", "w") as file:
            for _ in range(megabytes):
                file.write(bytes(1_000_000))


def changed_lora(change: Callable[[str, torch.Tensor], torch.Tensor | None]) -> None:
    """lora.safetensors, which the test has put there, with each tensor changed, or left out for None."""
    tensors = {name: change(name, tensor) for name, tensor in load_file("lora.safetensors").items()}
    save_file({name: t.contiguous() for name, t in tensors.items() if t is not None}, "lora.safetensors")


def changed_json(path: str | Path, **changes: Any) -> None:
    content = json.loads(Path(path).read_text(encoding="utf-8"))
    write(path, json.dumps(content | changes))
