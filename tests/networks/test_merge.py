"""LoRA files merged into the base: the base alone then gives what base and adapter gave together."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from adapter_models import difference, lora, lora_from_file, outputs, randomize, sd_targets
from safetensors.torch import load_file, save_file

from library.errors import UserError
from networks import base_weights
from networks.files import read
from networks.merge import BaseWeights
from tests.merging import merge_into
from tests.quick import quick

# Largest difference of an output, relative to the largest output: fp32 rounds W + dW once, and sums in another order
BOUND = 5e-5


def save(tiny, path, *, rank=4, alpha=3.0, conv_dim=None, conv_alpha=None) -> None:
    more = {"conv_dim": conv_dim, "conv_alpha": conv_alpha}
    network = lora(rank, alpha, targets=sd_targets(*tiny), **more)
    randomize(network, 0.2)
    network.save(str(path), None, None)


def together(tiny, files, multipliers):
    """What base and adapters give, the adapters beside the base."""

    attached = []
    for file, multiplier in zip(files, multipliers, strict=True):
        network = lora_from_file(str(file), multiplier=multiplier, targets=sd_targets(*tiny))
        network.attach()
        network.load(read(file))
        attached.append(network)
    expected = outputs(*tiny)
    for network in reversed(attached):
        network.detach()
    return expected


def merge(tiny, files, multipliers) -> None:
    """In two stages, as training does it: text encoder first."""
    weights = BaseWeights([str(file) for file in files], multipliers)
    targets = sd_targets(*tiny)
    for part in ("text_encoder", "unet"):
        merge_into(weights, [target for target in targets if target.part == part])
    weights.report()


@pytest.mark.parametrize("multiplier", quick([1.0, 0.35, -0.5], -0.5))
@pytest.mark.parametrize(
    "kind",
    [{}, {"alpha": 8.0}, {"rank": 2, "conv_dim": 3, "conv_alpha": 0.5}],
    ids=["linear", "alpha above rank", "conv"],
)
def test_merged_is_base_plus_lora(tiny, tmp_path, kind, multiplier, caplog):
    base = outputs(*tiny)
    save(tiny, tmp_path / "a.safetensors", **kind)
    expected = together(tiny, [tmp_path / "a.safetensors"], [multiplier])
    assert all(difference(without, wanted) > 0.01 for without, wanted in zip(base, expected, strict=True))
    with caplog.at_level(logging.INFO):
        merge(tiny, [tmp_path / "a.safetensors"], [multiplier])
    assert f"{196 if 'conv_dim' in kind else 138} of {196 if 'conv_dim' in kind else 138} modules" in caplog.text
    for actual, wanted in zip(outputs(*tiny), expected, strict=True):
        assert difference(actual, wanted) < BOUND


def test_several_files_add_up_and_a_missing_multiplier_is_one(tiny, tmp_path):
    save(tiny, tmp_path / "a.safetensors")
    save(tiny, tmp_path / "b.safetensors", rank=8, alpha=1.0, conv_dim=4)
    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    expected = together(tiny, files, [0.5, 1.0])
    merge(tiny, files, [0.5])
    for actual, wanted in zip(outputs(*tiny), expected, strict=True):
        assert difference(actual, wanted) < BOUND


def test_a_merge_that_would_be_wrong_is_refused(tiny, tmp_path, caplog):
    path = tmp_path / "a.safetensors"
    save(tiny, path)
    tensors = load_file(path)
    before = outputs(*tiny)
    name = next(key for key in tensors if key.startswith("lora_unet")).partition(".")[0]
    save_file(tensors | {f"{name}.dora_scale": torch.ones(3)}, path)
    with pytest.raises(
        UserError, match=r"(?s)--base_weights .*dora_scale: \[3, 1, 1, 1\] in the file, \[48, 1, 1, 1\]"
    ):
        merge_into(BaseWeights([str(path)], []), sd_targets(*tiny))
    save_file(tensors | {f"{name}.lora_up.weight": torch.ones(3, 4)}, path)
    with pytest.raises(UserError, match=rf"{name}.lora_up.weight: \[3, 4\] in the file, \["):
        merge_into(BaseWeights([str(path)], []), sd_targets(*tiny))
    save_file(
        {key.replace("lora_unet_", "lora_unet_x_"): value for key, value in tensors.items() if "unet" in key}, path
    )
    with pytest.raises(UserError, match="none of its"):
        merge(tiny, [path], [])
    assert all(torch.equal(a, b) for a, b in zip(outputs(*tiny), before, strict=True))


def test_what_is_not_in_the_model_is_named(tiny, tmp_path, caplog):
    path = tmp_path / "a.safetensors"
    save(tiny, path)
    pair = {f"lora_unet_nowhere.lora_{x}.weight": torch.ones(2, 2) for x in ("up", "down")}
    save_file(load_file(path) | pair, path)
    merge(tiny, [path], [])
    assert "1 modules are not in this model:\n  lora_unet_nowhere" in caplog.text


def test_the_fingerprint_follows_tensors_and_multipliers(tiny, tmp_path):
    save(tiny, tmp_path / "a.safetensors")
    save(tiny, tmp_path / "b.safetensors", alpha=3.5)
    a, b = str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors")
    found = [BaseWeights(*given).fingerprint() for given in (([a], []), ([b], []), ([a], [0.5]), ([a, b], []))]
    assert len(set(found)) == 4
    assert BaseWeights([a], [1.0]).fingerprint() == found[0]
    assert BaseWeights([], []).fingerprint() == ""


def test_base_weights_are_read_for_their_hashes_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, read = tmp_path / "style.safetensors", []
    real = base_weights.sha256
    monkeypatch.setattr(base_weights, "sha256", lambda file: read.append(file) or real(file))
    save_file({"x": torch.zeros(2)}, path)
    first = base_weights.of_files([str(path), str(path)], [0.5])
    assert [one.multiplier for one in first] == [0.5, 1.0]
    assert base_weights.of_files([str(path)], [0.5]) == first[:1]
    assert len(read) == 1
    save_file({"x": torch.ones(3)}, path)  # another file under its name
    (changed,) = base_weights.of_files([str(path)], [0.5])
    assert not changed.is_same(first[0])
