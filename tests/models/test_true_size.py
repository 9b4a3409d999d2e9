"""Stable Diffusion 1.5 and XL at their true sizes, from one file: all arrives, in little more memory than that."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from original_layout import sdxl_file, single_file
from safetensors.torch import save_file

from library.models.checkpoints.base_model import ASSETS
from library.models.modules import new_projected_text_encoder, new_text_encoder, new_unet, new_vae

_LOAD = """
import sys, torch
from pathlib import Path
import library.models.modules as modules
from library.models.opening import open_family

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 2**20

family = open_family(sys.argv[1])
modules.new_unet(family.components.config("denoiser"))  # the imports
before = peak()
family.components.load("denoiser", torch.bfloat16, "cpu")
grown = peak() - before
family.components.load("vae", torch.bfloat16, "cpu")
family.components.load_all(family.components.text_encoders, torch.bfloat16, "cpu")
modules_found = [sum(bool(t.linear.fullmatch(p)) for p, _ in t.root.named_modules()) for t in family.adapter_targets()]
with torch.no_grad():
    answer = family.predict(torch.randn(1, 4, 8, 8), torch.tensor([9]), family.encode_prompts(["a cat"]))
    mean, std = family.encode_images(torch.zeros(1, 3, 64, 64))
assert answer.shape == (1, 4, 8, 8) and answer.isfinite().all() and mean.shape == std.shape == (1, 4, 8, 8)
print(family.base_model_version, *modules_found, grown)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads peak memory from /proc")
def test_the_true_size_loads_from_one_file(tmp_path: Path) -> None:
    config = json.loads((ASSETS / "sd1.json").read_text())

    def half(module: torch.nn.Module) -> dict[str, torch.Tensor]:
        return {name: torch.randn(p.shape, dtype=torch.float16) * 0.02 for name, p in module.named_parameters()}

    unet, vae = half(new_unet(config["unet"])), half(new_vae(config["vae"]))
    states = single_file(unet, vae, half(new_text_encoder(config["text_encoder"])), config)
    path = tmp_path / "sd15.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in states.items()}, path)
    del states, unet, vae
    result = subprocess.run(
        [sys.executable, "-c", _LOAD, str(path)], check=True, capture_output=True, text=True, cwd=ASSETS.parents[2]
    )
    path.unlink()
    version, in_unet, in_text, grown = result.stdout.split()
    assert (version, in_unet, in_text) == ("sd_v1", "192", "72")
    assert 1.5 < float(grown) < 1.602 + 0.1, f"{grown} GiB for 1.60 GiB of weights"


_MAP = """
import sys, torch
from pathlib import Path
from library.models.opening import open_family

family = open_family(sys.argv[1])
family.components.load("vae", torch.float16, "cpu")
family.components.load_all(family.components.text_encoders, torch.float16, "cpu")
family.components.load("denoiser", torch.float16, "cpu")
found = [sum(bool(t.linear.fullmatch(p)) for p, _ in t.root.named_modules()) for t in family.adapter_targets()]
lines = Path("/proc/self/status").read_text().splitlines()
print(family.base_model_version, *found, next(int(l.split()[1]) for l in lines if l.startswith("VmHWM")) / 2**20)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads peak memory from /proc")
def test_sdxl_in_its_own_precision_is_mapped(tmp_path: Path) -> None:
    """6.5 GiB of zeros in a file with a hole, which takes no disk; none of it is read before it is needed."""
    config = json.loads((ASSETS / "sdxl.json").read_text())

    def shapes(module: torch.nn.Module) -> dict[str, torch.Tensor]:
        return {name: parameter.detach() for name, parameter in module.named_parameters()}

    texts = new_text_encoder(config["text_encoder"]), new_projected_text_encoder(config["text_encoder_2"])
    parts = map(shapes, (new_unet(config["unet"]), new_vae(config["vae"]), *texts))
    with torch.device("meta"):
        states = sdxl_file(*parts, config)
    assert len(states) == 2515  # as Stability's own file has
    header, end = {}, 0
    for name, tensor in states.items():
        header[name] = {"dtype": "F16", "shape": list(tensor.shape), "data_offsets": [end, end + 2 * tensor.numel()]}
        end += 2 * tensor.numel()
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (tmp_path / "sdxl.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    result = subprocess.run(
        [sys.executable, "-c", _MAP, str(tmp_path / "sdxl.safetensors")],
        check=True, capture_output=True, text=True, cwd=ASSETS.parents[2],
    )  # fmt: skip
    version, *counts, peak = result.stdout.split()
    assert (version, counts) == ("sdxl_base_v1-0", ["722", "72", "192"])
    assert float(peak) < 1, f"{peak} GiB"
