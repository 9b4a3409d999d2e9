"""The benchmark beside kohya's scripts: loud without them, and gradients of fused layers are as in his files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import kohya_beside, kohya_peer
from library.config.options.objective import ObjectiveOptions
from library.models.opening import open_family
from networks.create import create
from networks.settings import Asked


def test_another_folder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["kohya_beside", "--sd_scripts", str(tmp_path), "--only", "flux"])
    with pytest.raises(SystemExit, match=r"no checkout of kohya-ss/sd-scripts with flux: it has no train_network.py"):
        kohya_beside.main()


def test_a_checkout_without_anima_is_named(tmp_path: Path) -> None:
    for name in kohya_beside.NEEDED:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    kohya_beside.check(tmp_path, ["flux"])
    with pytest.raises(SystemExit, match=r"flux and anima: it has no library/anima_models.py"):
        kohya_beside.check(tmp_path, ["flux", "anima"])


def test_the_ways_are_options_of_both_sides() -> None:
    """ours refuse an unknown name; his are attributes, of which a wrong one would go unnoticed."""
    for words in kohya_beside.WAYS.values():
        assert words.keys() <= kohya_peer.DEFAULTS.keys()
        ObjectiveOptions(**{name: value for name, value in words.items() if name != "discrete_flow_shift"})


def test_a_shared_down_has_the_sum_of_its_copies_gradients(tiny_flux: Path) -> None:
    """One pair over query, key and value, as kohya has it, against a pair for each that begins with the same `down`."""
    family = open_family(str(tiny_flux), options={"t5xxl_max_token_length": 8})
    with family.outlined():
        network = create("lora", family.adapter_targets("denoiser"), Asked(dim=2, alpha=2.0))
        sites = {adapter.site.name: adapter.site for adapter in network.adapters}
    group = [f"lora_unet_double_blocks_0_img_attn_to_{which}" for which in "qkv"]
    width = sites[group[0]].module.weight.shape[0]
    generator, exact = torch.Generator().manual_seed(0), {"dtype": torch.float64}
    x, down = torch.randn(3, width, generator=generator, **exact), torch.randn(2, width, generator=generator, **exact)
    up = torch.randn(3 * width, 2, generator=generator, **exact)
    shared = nn.Parameter(down), nn.Parameter(up)
    (x @ shared[0].T @ shared[1].T).square().sum().backward()
    gradients = {}
    for name, own in zip(group, up.chunk(3), strict=True):
        pair = nn.Parameter(down.clone()), nn.Parameter(own.clone())
        (x @ pair[0].T @ pair[1].T).square().sum().backward()
        gradients |= {f"{name}.lora_{end}.weight": one.grad for end, one in zip(("down", "up"), pair, strict=True)}
    others = {
        f"{name}.lora_{end}.weight": torch.zeros(2, 2) for name in sites if name not in group for end in ("down", "up")
    }
    found = kohya_beside.in_his_form(network, {**others, **gradients}, shared=True)
    for end, one in zip(("down", "up"), shared, strict=True):
        torch.testing.assert_close(found[f"lora_unet_double_blocks_0_img_attn_qkv.lora_{end}.weight"], one.grad)
