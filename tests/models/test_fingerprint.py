"""A fingerprint follows what a part computes, not where it lies."""

from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from original_layout import configuration
from safetensors.torch import load_file, save_file

from library.errors import UserError
from library.models.checkpoints.single_file import open_file
from library.models.fingerprint import part_fingerprint
from library.models.opening import open_base_model
from library.models.stable_diffusion import StableDiffusion
from library.models.text import prompts

BASE = Path(__file__).parents[2] / "quickstart" / "base"
MakeFamily = Callable[..., StableDiffusion]


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(BASE, tmp_path / "copy"))


def both(family: MakeFamily, path: Path, **options: object) -> tuple[str, str]:
    opened = family(open_base_model(str(path)), **options)
    return opened.vae_fingerprint(), opened.text_fingerprint()


def change_weight(folder: Path) -> None:
    """A small change of one weight."""
    (path,) = folder.glob("*.safetensors")
    tensors = load_file(path)
    name = sorted(tensors)[-1]
    flat = tensors[name].view(-1)
    flat.view(torch.uint8)[-2] ^= 1
    save_file(tensors, path)


def test_a_copy_has_the_same(family: MakeFamily, copy: Path) -> None:
    assert both(family, copy) == both(family, BASE)


@pytest.mark.parametrize(("part", "changed"), [("vae", (True, False)), ("text_encoder", (False, True))])
def test_one_weight_counts(family: MakeFamily, copy: Path, part: str, changed: tuple[bool, bool]) -> None:
    before = both(family, copy)
    change_weight(copy / part)
    assert tuple(a != b for a, b in zip(before, both(family, copy), strict=True)) == changed


def test_the_configuration_counts_but_not_who_wrote_it(family: MakeFamily, copy: Path) -> None:
    before = both(family, copy)
    path = copy / "vae" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"_diffusers_version": "9.9"}))
    assert both(family, copy) == before
    path.write_text(json.dumps(config | {"scaling_factor": 0.5}))
    assert both(family, copy)[0] != before[0]


def test_tokenizer_clip_skip_and_length_count(family: MakeFamily, copy: Path) -> None:
    before = both(family, copy)[1]
    assert both(family, copy, clip_skip=1)[1] == before  # the last layer, as without it
    found = {before, both(family, copy, clip_skip=2)[1], both(family, copy, max_token_length=150)[1]}
    found.add(both(family, copy, weighted_captions=True)[1])
    with (copy / "tokenizer" / "tokenizer.json").open("a") as tokenizer:
        tokenizer.write("\n")
    assert len(found | {both(family, copy)[1]}) == 5


def test_how_captions_are_cleaned_counts(family: MakeFamily, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another version of ftfy may give other tokens: cached states of a text are those of its tokens."""
    before = both(family, BASE)
    monkeypatch.setattr(prompts, "CLEANING", "another")
    vae, text = both(family, BASE)
    assert (vae == before[0], text == before[1]) == (True, False)


def test_every_setting_of_a_family_is_thought_of() -> None:
    """Whatever changes what `encode_prompts` gives must stand in `text_fingerprint`; then it may be named here."""
    counts = {"clip_skip", "max_token_length", "weighted_captions", "vae"}
    for_the_unet = {"v2", "v_parameterization", "zero_terminal_snr"}
    assert set(inspect.signature(StableDiffusion).parameters) == {"base"} | counts | for_the_unet


def test_another_vae_is_another(family: MakeFamily, copy: Path) -> None:
    change_weight(copy / "vae")
    assert both(family, BASE, vae=str(copy / "vae"))[0] != both(family, BASE)[0]


@pytest.mark.parametrize("name", ["sd1.safetensors", "sd1.ckpt", "sd1-old.ckpt", "sd2.safetensors"])
def test_every_kind_of_file_can_be_read(
    family: MakeFamily, tiny_files: dict[str, Path], tiny_v2: Path, name: str
) -> None:
    """Among them transposed tensors and one tensor that is three."""
    config = configuration(BASE if name.startswith("sd1") else tiny_v2, like=name[:3])
    opened = family(
        open_file(name, tiny_files[name], kind="sd", config=config), v_parameterization=name.startswith("sd2")
    )
    assert len({opened.vae_fingerprint(), opened.text_fingerprint()}) == 2
    assert opened.text_fingerprint() == opened.text_fingerprint()


def test_a_file_that_is_cut_off_meanwhile_is_named(copy: Path) -> None:
    part = open_base_model(str(copy)).parts["vae"]
    entries = part.entries()
    path = copy / "vae" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"diffusion_pytorch_model.*ended"):
        part_fingerprint(replace(part, entries=lambda: entries))
