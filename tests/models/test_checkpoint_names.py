"""Every name of the true SD 1.5, 2.1 and XL checkpoints, against diffusers' own conversion of whole files."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from original_layout import sdxl_file, single_file
from safetensors.torch import save_file

from library.files.index import read_index
from library.models.checkpoints.base_model import ASSETS
from library.models.checkpoints.checkpoint import (
    TEXT_PREFIXES,
    original_unet_name,
    projected_text_encoder_entries,
    text_encoder_entries,
    unet_entries,
    vae_entries,
)
from library.models.checkpoints.weights import Reader
from library.models.modules import new_projected_text_encoder, new_text_encoder, new_unet, new_vae


@pytest.fixture(scope="module", params=["sd1", "sd2", "sdxl"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A file with all the names of the true model, each tensor tiny and different from all others."""
    config = json.loads((ASSETS / f"{request.param}.json").read_text())
    number = iter(range(1, 10_000))

    def tiny(module: torch.nn.Module) -> dict[str, torch.Tensor]:
        # the number of axes is the true one; three rows, so that fused projections can be cut
        return {
            name: torch.full((3,) if p.ndim == 1 else (3, 2, 1, 1)[: p.ndim], float(next(number)))
            for name, p in module.named_parameters()
        }

    unet, vae = tiny(new_unet(config["unet"])), tiny(new_vae(config["vae"]))
    text = tiny(new_text_encoder(config["text_encoder"]))
    text_2 = {}
    if request.param == "sdxl":
        text_2 = tiny(new_projected_text_encoder(config["text_encoder_2"]))
        text_2["text_projection.weight"] = torch.arange(9.0).view(3, 3)  # square, and not its own transpose
        states = sdxl_file(unet, vae, text, text_2, config)
    else:
        states = single_file(unet, vae, text, config, open_clip=request.param == "sd2")
    path = tmp_path_factory.mktemp("names") / f"{request.param}.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in states.items()}, path)
    return SimpleNamespace(
        states=states, config=config, index=read_index(path), unet=unet, vae=vae, text=text, text_2=text_2
    )


def _same(entries: dict, expected: dict[str, torch.Tensor]) -> None:
    assert entries.keys() == expected.keys()
    with Reader() as reader:
        for name, entry in entries.items():
            values = reader.read(entry, dtype=torch.float32, device=torch.device("cpu"), mapped=False)
            assert torch.equal(values, expected[name].flatten()), name


def test_unet_names(checkpoint: SimpleNamespace) -> None:
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    entries = unet_entries(checkpoint.index.entries, layers_per_block=2)
    assert len(entries) == (1680 if checkpoint.text_2 else 686)
    _same(entries, convert_ldm_unet_checkpoint(dict(checkpoint.states), checkpoint.config["unet"]))
    _same(entries, checkpoint.unet)


def test_the_way_back_of_unet_names(checkpoint: SimpleNamespace) -> None:
    if not checkpoint.text_2:
        pytest.skip("LoRA files of Stable Diffusion 1.x and 2.x have diffusers' names")
    prefix = "model.diffusion_model."
    paths = {name.rpartition(".")[0] for name in checkpoint.unet}
    original = {name.removeprefix(prefix).rpartition(".")[0] for name in checkpoint.states if name.startswith(prefix)}
    assert {original_unet_name(path, layers_per_block=2) for path in paths} == original


def test_vae_names(checkpoint: SimpleNamespace) -> None:
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    entries = vae_entries(checkpoint.index.entries)
    assert len(entries) == 248
    _same(entries, convert_ldm_vae_checkpoint(dict(checkpoint.states), checkpoint.config["vae"]))
    _same(entries, checkpoint.vae)


def test_text_encoder_names(checkpoint: SimpleNamespace) -> None:
    from diffusers.loaders.single_file_utils import convert_ldm_clip_checkpoint, convert_open_clip_checkpoint

    layers = checkpoint.config["text_encoder"]["num_hidden_layers"]
    entries = text_encoder_entries(_text_states(checkpoint.index.entries, checkpoint), layers=layers)
    _same(entries, checkpoint.text)
    if layers == 12:
        expected = convert_ldm_clip_checkpoint(dict(checkpoint.states))
        expected.pop("text_model.embeddings.position_ids")
    else:
        model = SimpleNamespace(config=SimpleNamespace(hidden_size=3))
        expected = convert_open_clip_checkpoint(model, dict(checkpoint.states))
        expected.pop("text_projection.weight", None)
    _same(entries, {name.removeprefix("text_model."): tensor for name, tensor in expected.items()})


def _text_states(entries: dict, checkpoint: SimpleNamespace, part: str = "text_encoder") -> dict:
    prefixes = TEXT_PREFIXES["sdxl" if checkpoint.text_2 else "sd"][part]
    return {name: entry for name, entry in entries.items() if name.startswith(prefixes)}


def test_second_text_encoder_names(checkpoint: SimpleNamespace) -> None:
    from diffusers.loaders.single_file_utils import convert_open_clip_checkpoint

    if not checkpoint.text_2:
        pytest.skip("Stable Diffusion 1.x and 2.x have one text encoder")
    entries = projected_text_encoder_entries(
        _text_states(checkpoint.index.entries, checkpoint, "text_encoder_2"), layers=32
    )
    assert len(entries) == 517
    _same(entries, checkpoint.text_2)
    model = SimpleNamespace(config=SimpleNamespace(hidden_size=3))
    _same(
        entries, convert_open_clip_checkpoint(model, dict(checkpoint.states), prefix="conditioner.embedders.1.model.")
    )


def test_old_diffusers_vae_names(checkpoint: SimpleNamespace, tmp_path: Path) -> None:
    """Folders saved before diffusers 0.18 call the attention's projections query, key, value and proj_attn."""
    old = {"to_q.": "query.", "to_k.": "key.", "to_v.": "value.", "to_out.0.": "proj_attn."}
    renamed = {}
    for name, tensor in checkpoint.vae.items():
        for new, before in old.items():
            if ".attentions." in name:
                name = name.replace(new, before)
        renamed[name] = tensor
    assert renamed.keys() != checkpoint.vae.keys()
    save_file(renamed, tmp_path / "vae.safetensors")
    _same(vae_entries(read_index(tmp_path / "vae.safetensors").entries), checkpoint.vae)


def test_text_model_level_may_be_missing(checkpoint: SimpleNamespace) -> None:
    entries = _text_states(checkpoint.index.entries, checkpoint)
    shortened = {n.replace("transformer.text_model.", "transformer."): e for n, e in entries.items()}
    layers = checkpoint.config["text_encoder"]["num_hidden_layers"]
    _same(text_encoder_entries(shortened, layers=layers), checkpoint.text)
