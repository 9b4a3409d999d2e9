from __future__ import annotations

import dataclasses
import logging
import pickle
from pathlib import Path

import pytest
import torch
from adapter_models import Toy, lora, lora_from_file, randomize, unet_targets
from safetensors.torch import load_file, save_file
from torch import nn

from library.errors import UserError
from networks import create as making
from networks.files import read
from networks.network import Network
from networks.settings import Asked


def create(toy: Toy, *, rank: int = 4, alpha: float = 2.0, conv_dim: int | None = None) -> Network:
    network = lora(rank, alpha, targets=[unet_targets(toy)], conv_dim=conv_dim)
    network.attach()
    return network


@pytest.fixture
def file(toy: Toy, tmp_path: Path) -> Path:
    """A file of both attention layers of the toy, rank 4, alpha 2."""
    network = create(toy)
    randomize(network)
    path = tmp_path / "adapter.safetensors"
    network.save(str(path), None, None)
    network.detach()
    return path


def change(path: Path, function) -> None:
    save_file(function(load_file(path)), path)


def test_a_file_that_fits_in_part_is_a_warning_with_counts(toy, file, caplog):
    other = {f"lora_te_text_model_x.lora_{end}.weight": torch.ones(4, 4) for end in ("down", "up")}
    change(file, lambda tensors: {key: value for key, value in tensors.items() if "proj_in" not in key} | other)
    network = create(toy, conv_dim=2)
    report = network.load(read(file))
    assert report.matched == ("lora_unet_attentions_0_to_q",)
    assert report.missing == (
        "lora_unet_attentions_0_proj_in",
        "lora_unet_downsamplers_0",
        "lora_unet_resnets_0",
    )
    assert report.unexpected == ("lora_te_text_model_x",)
    for message in (
        "3 modules of the network are not in it and start fresh:\n  lora_unet_attentions_0_proj_in\n",
        "1 modules of it are not in the network and are left out:\n  lora_te_text_model_x",
    ):
        assert message in caplog.text


def test_what_fits_is_counted(toy, file, caplog):
    with caplog.at_level(logging.INFO):
        create(toy).load(read(file))
    assert "2 of the network's 2 modules loaded" in caplog.text
    assert not [record for record in caplog.records if record.levelno > logging.INFO]


def test_another_shape_is_an_error_that_names_the_module_and_both_shapes(toy, file):
    change(file, lambda tensors: tensors | {"lora_unet_attentions_0_to_q.lora_up.weight": torch.ones(7, 4)})
    network = create(toy)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    with pytest.raises(UserError, match=r"lora_unet_attentions_0_to_q.lora_up.weight: \[7, 4\] in the file, \[6, 4\]"):
        network.load(read(file))
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


def test_another_rank_is_an_error_that_names_the_way_out(toy, file):
    with pytest.raises(
        UserError, match=r"(?s)2 layers .*\[4, 8, 1, 1\] in the file, \[8, 8, 1, 1\] here.*--dim_from_weights"
    ):
        create(toy, rank=8).load(read(file))


def test_alpha_may_be_a_list_of_one(toy, file):
    change(file, lambda tensors: {k: v.reshape(1) if k.endswith("alpha") else v for k, v in tensors.items()})
    network = create(toy, alpha=4.0)
    network.load(read(file))
    assert {adapter.scale for adapter in network.adapters} == {0.5}


def test_a_file_of_another_model_is_an_error(toy, file):
    change(file, lambda tensors: {key.replace("unet_", "unet_middle_"): value for key, value in tensors.items()})
    with pytest.raises(UserError, match=r"(?s)nothing in it fits .*lora_unet_middle_.*network has.*lora_unet_atten"):
        create(toy).load(read(file))
    with pytest.raises(
        UserError, match=r"none of its 2 modules, such as lora_unet_middle_attentions_0_.*, is in this model"
    ):
        lora_from_file(str(file), targets=[unet_targets(toy)])


def test_the_files_alpha_is_used_and_said(toy, file, caplog):
    """Weights act as they did when they were saved, whatever --network_alpha says now."""
    saved = create(toy)
    saved.load(read(file))
    x = torch.randn(2, 4, 8, 8)
    expected = toy(x)
    saved.detach()
    network = create(toy, alpha=4.0)
    network.load(read(file))
    assert "alpha differs from the one given in 2 modules: the file's is used" in caplog.text
    assert {adapter.scale for adapter in network.adapters} == {0.5}
    assert torch.equal(toy(x), expected)


def test_another_form_is_an_error_that_names_the_way_out_once(toy, tmp_path):
    file = tmp_path / "x.safetensors"
    making.create("lokr", [unet_targets(toy)], Asked(dim=1), {"factor": 2}).save(file, None, None)
    content = read(file)
    with pytest.raises(UserError, match="other settings, which --dim_from_weights takes from it"):
        making.create("lokr", [unet_targets(toy)], Asked(dim=1), {"factor": 1}).load(content)
    other = nn.ModuleDict({"attentions": nn.ModuleList([nn.ModuleDict({"to_q": nn.Linear(10, 6)})])})
    layers = {name: layer for name, layer in content.layers.items() if name.endswith("to_q")}
    content = dataclasses.replace(content, layers=layers)
    with pytest.raises(UserError, match=r"(?s)1 layers have.*\nIt is for a model of other sizes\.$"):
        making.create_from_file("lokr", content, [unet_targets(other)], Asked()).load(content)


def test_an_old_file_without_alphas_has_the_rank_as_alpha(toy, file):
    change(file, lambda tensors: {key: value for key, value in tensors.items() if not key.endswith("alpha")})
    network = create(toy)
    assert len(network.load(read(file)).matched) == 2
    assert {adapter.scale for adapter in network.adapters} == {1.0}
    network.detach()
    network = lora_from_file(str(file), targets=[unet_targets(toy)])
    assert {(adapter.rank, adapter.scale) for adapter in network.adapters} == {(4, 1.0)}


def test_ranks_and_alphas_of_each_layer_come_from_the_file(toy, tmp_path):
    tensors = {}
    for name, rank, alpha in (("attentions_0_to_q", 2, 1.0), ("resnets_0", 5, 10.0)):
        tensors[f"lora_unet_{name}.lora_down.weight"] = torch.randn(rank, 8)
        tensors[f"lora_unet_{name}.lora_up.weight"] = torch.randn(6 if rank == 2 else 8, rank)
        tensors[f"lora_unet_{name}.alpha"] = torch.tensor(alpha)
    save_file(tensors, tmp_path / "mixed.safetensors")
    network = lora_from_file(str(tmp_path / "mixed.safetensors"), targets=[unet_targets(toy)], rank_dropout=0.1)
    assert [(a.site.name, a.rank, a.scale, a.rank_dropout) for a in network.adapters] == [
        ("lora_unet_resnets_0", 5, 2.0, 0.1),
        ("lora_unet_attentions_0_to_q", 2, 0.5, 0.1),
    ]
    network.attach()
    assert not network.load(read(tmp_path / "mixed.safetensors")).missing


def test_tensors_that_lora_does_not_have_are_not_ignored(toy, file):
    """A DoRA's scale or a Tucker core change what the pair does: loading the pair alone would be wrong."""
    scales = {f"lora_unet_attentions_0_{x}.dora_scale": torch.ones(1, 8) for x in ("proj_in", "to_q")}
    change(file, lambda tensors: tensors | scales)
    with pytest.raises(UserError, match=r"(?s)2 layers have other .*: the network has no dora_scale"):
        create(toy).load(read(file))


def test_a_loha_is_no_lora(toy, tmp_path):
    path = tmp_path / "loha.safetensors"
    save_file({"lora_unet_attentions_0_to_q.hada_w1_a": torch.ones(6, 4)}, path)
    with pytest.raises(UserError, match=r"is a LoHa, and only plain LoRA is trained by networks.lora|and no hada_w1_b"):
        read(path, purpose="is trained by networks.lora", allowed=["lora"])


def test_unreadable_files_are_named(tmp_path):
    for name, content, said in (
        ("cut.safetensors", b"\x10\0\0\0\0\0\0\0{", "cut off or damaged"),
        ("cut.pt", b"nonsense", "neither a .safetensors nor a torch checkpoint"),
        ("empty.pt", b"", "neither a .safetensors nor a torch checkpoint"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=f"{name}: {said}"):
            read(tmp_path / name)
    with pytest.raises(UserError, match="no such file"):
        read(tmp_path / "absent.safetensors")
    save_file({"model.diffusion_model.x": torch.ones(2)}, tmp_path / "base.safetensors")
    with pytest.raises(UserError, match=r"base.safetensors is a UNet without a text encoder, and no LoRA"):
        read(tmp_path / "base.safetensors")


class Harmful:
    ran = False

    def __reduce__(self):
        return (setattr, (Harmful, "ran", True))


def test_pickled_files_hold_tensors_only(tmp_path, toy, file):
    tensors = load_file(file)
    torch.save(tensors, tmp_path / "adapter.pt")
    assert read(tmp_path / "adapter.pt").tensors.keys() == tensors.keys()
    (tmp_path / "bad.pt").write_bytes(pickle.dumps({"lora_unet_x.alpha": Harmful()}))
    torch.save(tensors | {"lora_unet_x.alpha": Harmful()}, tmp_path / "worse.pt")
    for name, said in (("bad.pt", "not one that torch wrote"), ("worse.pt", "holds more than tensors")):
        with pytest.raises(UserError, match=said):
            read(tmp_path / name)
    assert not Harmful.ran
    torch.save({"state_dict": tensors}, tmp_path / "nested.pt")
    with pytest.raises(UserError, match="not a flat table of tensors"):
        read(tmp_path / "nested.pt")
