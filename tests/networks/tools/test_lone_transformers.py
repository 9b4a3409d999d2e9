"""Tools on a transformer's file without text encoder and autoencoder, as users of newer models have them: the same as
on a folder of all parts."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from library.errors import UserError
from library.models.opening import open_family
from networks.create import create
from networks.settings import Asked
from networks.tools import __main__ as tools
from tests.quick import quick

FAMILIES = ["sd3", "flux", "chroma", "flux2", "anima", "z_image"]
OUTLINES = quick(FAMILIES, "sd3", "anima")


def lone(family: str, request: pytest.FixtureRequest, target: Path) -> tuple[Path, Path]:
    """A tiny model's folder, and its transformer's file."""
    folder: Path = request.getfixturevalue(f"tiny_{family}")
    files = import_module(f"tests.tiny_{family}").single_files(folder, target)
    return folder, files["pretrained_model_name_or_path"]


def adapter(folder: Path, target: Path, *more: str) -> Path:
    """A LoRA of rank 2 with random values on the layers of the transformer, and of `more` parts."""
    family, parts = open_family(str(folder)), ("denoiser", *more)
    family.components.load_all(parts, torch.float32, "cpu")
    network = create("lora", family.adapter_targets(*parts), Asked(dim=2, alpha=2, seed=1))
    generator = torch.Generator().manual_seed(2)
    for parameter in network.parameters():
        parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    network.save(str(target), None, {"ss_base_model_version": family.base_model_version})
    return target


def weights(model: Path) -> dict[str, torch.Tensor]:
    family = open_family(str(model), whole=False)
    return dict(family.components.load("denoiser", torch.float32, "cpu").state_dict())


@pytest.mark.parametrize("family", OUTLINES)
def test_merging_gives_what_a_folder_of_all_parts_gives(
    family: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    folder, file = lone(family, request, tmp_path / "files")
    lora = adapter(folder, tmp_path / "lora.safetensors")
    words = [str(lora), "--weights", "0.7"]
    merged = [tmp_path / "folder", tmp_path / "merged.safetensors"]
    for base, target in zip((folder, file), merged, strict=True):
        assert tools.main(["merge", *words, "--base", str(base), "--save_to", str(target)]) == 0
    before, (expected, found) = weights(file), map(weights, merged)
    assert load_file(merged[1]).keys() == load_file(file).keys()
    assert any(not torch.equal(found[name], before[name]) for name in found)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6)  # rows are added in other pieces


@pytest.mark.parametrize("family", OUTLINES)
def test_the_difference_of_two_transformers_is_a_lora(
    family: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Of rank 2, which the merged file is away from the base: nothing is lost."""
    folder, file = lone(family, request, tmp_path / "files")
    lora = adapter(folder, tmp_path / "lora.safetensors")
    tuned, found = tmp_path / "tuned.safetensors", tmp_path / "found.safetensors"
    again = tmp_path / "again.safetensors"
    assert tools.main(["merge", str(lora), "--base", str(file), "--save_to", str(tuned)]) == 0
    assert tools.main(["extract", str(file), str(tuned), "--rank", "8", "--save_to", str(found)]) == 0
    assert tools.main(["merge", str(found), "--base", str(file), "--save_to", str(again)]) == 0
    expected = weights(tuned)
    for name, tensor in weights(again).items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-5)  # singular values in fp32


def test_layers_of_an_absent_part_are_named(
    request: pytest.FixtureRequest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, file = lone("flux", request, tmp_path / "files")
    lora = adapter(folder, tmp_path / "lora.safetensors", "text_encoder")
    words = ["merge", str(lora), "--base", str(file), "--save_to", str(tmp_path / "merged.safetensors")]
    assert tools.main(words) == 2
    assert "12 of its layers are not in this base model" in capsys.readouterr().err
    assert tools.main([*words, "--allow_missing"]) == 0


def test_training_still_needs_all_parts(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    _, file = lone("flux", request, tmp_path / "files")
    with pytest.raises(UserError, match=r"does not hold all parts of FLUX\.1"):
        open_family(str(file))
