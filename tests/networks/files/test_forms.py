"""Files of other kinds as PEFT, diffusers, OneTrainer and kohya write them: read, they act as they did there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_models import BASE, difference, outputs, randomize, sd_targets
from safetensors.torch import load_file, save_file

from library.errors import UserError
from library.files.header import read_metadata
from networks import kinds
from networks.create import create, create_to_merge
from networks.files import read
from networks.formats.forms import flat
from networks.formats.naming import from_kohya
from networks.settings import Asked
from networks.tools.__main__ import main as tools
from tests.quick import slow

# Largest difference of an output, relative to the largest output, in fp32: the order of multiplications differs
BOUND = 2e-5
LAYERS = ["to_q", "proj_in", "ff.net.2", "conv1"]


def acts(file: Path, tiny: Any) -> Any:
    """The outputs of the base with the layers of a file."""
    content = read(file, purpose="is merged into the base")
    network = create_to_merge(content, sd_targets(*tiny), multiplier=1.0)
    network.attach()
    report = network.load(content)
    assert (report.missing, report.unexpected) == ((), ())
    found = outputs(*tiny)
    network.detach()
    return found


def peft_file(tiny: Any, folder: Path, config: Any) -> Any:
    """The outputs of a UNet with an adapter of PEFT's, which is saved."""
    from peft import get_peft_model

    unet, text_encoder = tiny
    torch.manual_seed(0)
    model = get_peft_model(unet, config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                factor = 1 + 0.2 * noise if "magnitude" in name or "ia3" in name else 0.2 * noise
                parameter.copy_(parameter * factor if "magnitude" in name else factor)
    expected = outputs(model, text_encoder)
    model.save_pretrained(folder)
    model.unload()
    return expected


@pytest.mark.parametrize(
    ("config", "settings", "kind"),
    [
        ("LoraConfig", {"use_dora": True, "r": 4, "lora_alpha": 6}, "dora"),
        slow(("LoHaConfig", {"r": 4, "alpha": 6}, "loha")),
        slow(("LoHaConfig", {"r": 4, "alpha": 6, "use_effective_conv2d": True}, "loha")),
        slow(("LoKrConfig", {"r": 4, "alpha": 6}, "lokr")),
        ("LoKrConfig", {"r": 100, "alpha": 60}, "lokr"),  # both matrices whole: PEFT alone scales these
        slow(("LoKrConfig", {"r": 2, "alpha": 6, "decompose_both": True}, "lokr")),
        ("AdaLoraConfig", {"init_r": 4, "target_r": 2, "lora_alpha": 6, "total_step": 10}, "lora"),
        ("IA3Config", {"feedforward_modules": ["ff.net.2"]}, "ia3"),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore")
def test_a_kind_of_peft_acts_as_there(config: str, settings: Any, kind: str, tiny: Any, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    if kind not in kinds.readers():
        pytest.skip(f"no kind of adapter here reads {kind}")
    targets = [
        layer for layer in LAYERS if config not in ("AdaLoraConfig", "IA3Config") or layer in ("to_q", "ff.net.2")
    ]
    base = outputs(*tiny)
    expected = peft_file(tiny, tmp_path, getattr(peft, config)(target_modules=targets, **settings))
    file = tmp_path / "adapter_model.safetensors"
    assert difference(base[1], expected[1]) > 0.01
    assert {layer.kind for layer in read(file).layers.values()} == {kind}
    assert difference(acts(file, tiny)[1], expected[1]) < BOUND
    own = tmp_path / "own.safetensors"
    assert tools(["convert", str(file), str(own), "--to", "kohya"]) == 0
    assert difference(acts(own, tiny)[1], expected[1]) < BOUND


@pytest.mark.parametrize("kind", ["lora", pytest.param("dora", marks=pytest.mark.slow)])
def test_a_file_in_diffusers_names_acts_there_and_back(kind: str, tiny: Any, tmp_path: Path) -> None:
    """Of several ranks, with alphas that are no rank."""
    from diffusers import StableDiffusionPipeline

    more = {"wd_on_output": True} if kind == "dora" else {}  # diffusers has the norms of rows
    network = create(kind, sd_targets(*tiny), Asked(dim=4, alpha=3.0), {"conv_dim": 2, "conv_alpha": 0.5, **more})
    network.attach()
    randomize(network, 0.2)
    expected = outputs(*tiny)
    network.naming = "diffusers"
    network.save(tmp_path / "x.safetensors", None, {"ss_steps": "1"})
    network.detach()
    config = json.loads(read_metadata(tmp_path / "x.safetensors")["lora_adapter_metadata"])
    assert config["unet.use_dora"] == (kind == "dora")
    assert set(config["unet.rank_pattern"].values()) == {2}
    assert config["text_encoder.r"] == config["text_encoder.lora_alpha"] == 4
    pipeline = StableDiffusionPipeline.from_pretrained(
        BASE, dtype=torch.float32, safety_checker=None, feature_extractor=None
    )
    pipeline.load_lora_weights(str(tmp_path), weight_name="x.safetensors")
    found = outputs(pipeline.unet, pipeline.text_encoder)
    assert all(difference(actual, wanted) < BOUND for actual, wanted in zip(found, expected, strict=True))
    assert all(difference(a, b) < BOUND for a, b in zip(acts(tmp_path / "x.safetensors", tiny), expected, strict=True))
    x, y, z = (str(tmp_path / f"{name}.safetensors") for name in "xyz")
    assert tools(["convert", x, y, "--to", "kohya"]) == 0
    assert all(difference(a, b) < BOUND for a, b in zip(acts(tmp_path / "y.safetensors", tiny), expected, strict=True))
    assert tools(["convert", y, z, "--to", "diffusers"]) == 0
    first, again = load_file(tmp_path / "x.safetensors"), load_file(tmp_path / "z.safetensors")
    assert first.keys() == again.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in first.items())


@pytest.mark.parametrize(
    ("kind", "arguments", "said"),
    [
        ("dora", {}, r"dora_scale .* has the norms of input channels"),
        ("lora", {"conv_dim": 2, "use_tucker": True}, "lora_mid.weight has no name in diffusers"),
    ],
)
def test_what_has_no_name_in_diffusers_is_refused(
    kind: str, arguments: Any, said: str, tiny: Any, tmp_path: Path
) -> None:
    network = create(kind, sd_targets(*tiny), Asked(dim=4), arguments)
    network.naming = "diffusers"
    with pytest.raises(UserError, match=f"--save_naming diffusers: .*{said}"):
        network.save(tmp_path / "x.safetensors", None, None)


def test_onetrainers_factors_of_convolutions_become_matrices() -> None:
    own = {"hada_w1_a": torch.randn(6, 2, 1, 1), "hada_w1_b": torch.randn(2, 4, 3, 3), "alpha": torch.ones(())}
    found = flat(own)
    assert [tuple(tensor.shape) for tensor in found.values()] == [(6, 2), (2, 36), ()]
    torch.testing.assert_close(
        (found["hada_w1_a"] @ found["hada_w1_b"]).view(6, 4, 3, 3),
        torch.einsum("orxy,rihw->oihw", own["hada_w1_a"], own["hada_w1_b"]),
    )
    core = own | {"hada_t1": torch.randn(2, 2, 3, 3)}
    assert flat(core)["hada_w1_b"].ndim == 4  # with a core the factors are other ones


def test_kohyas_oft_gets_the_usual_prefix() -> None:
    name = "unet_down_blocks_0_attentions_0_proj_in"
    tensors = {f"oft_{name}.oft_blocks": torch.ones(2, 3, 3), f"oft_{name}.alpha": torch.tensor(1e-3)}
    assert from_kohya(tensors, source="x").keys() == {f"lora_{name}.oft_blocks", f"lora_{name}.alpha"}
    with pytest.raises(
        UserError, match=r"x: oft_unet_.*alpha is 0: kohya's networks.oft allows this layer no rotation"
    ):
        from_kohya(tensors | {f"oft_{name}.alpha": torch.zeros(())}, source="x")


def test_check_prints_what_a_file_is_and_who_loads_it(tiny: Any, tmp_path: Path, capsys: Any) -> None:
    network = create("lora", sd_targets(*tiny), Asked(dim=4, alpha=3.0))
    randomize(network)
    file = tmp_path / "x.safetensors"
    about = {"ss_network_module": "networks.lora", "ss_base_model_version": "sd_v1", "ss_steps": "7"}
    about["ss_network_args"] = '{"conv_dim": "4", "rank_dropout": "0.1"}'
    base = '[{"name": "style.safetensors", "multiplier": 0.5, "sha256": "x", "sshs_model_hash": null}]'
    apart = base.replace("style", "adapter")
    network.save(file, None, {**about, "ss_base_weights": base, "ss_training_adapters": apart})
    assert tools(["check", str(file), "--base", str(BASE)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{file}: a LoRA, 138 layers, names in kohya's style"
    assert "rank        4" in lines
    assert "alpha       3" in lines
    assert "arguments   conv_dim=4, rank_dropout=0.1" in lines
    assert "on top of   style.safetensors × 0.5" in lines
    assert "trained     with adapter.safetensors × 0.5, for use without it" in lines
    assert "            138 layers fit it" in lines
    assert [line.split() for line in lines[-6:]] == [
        [program, "138", "of", "138", "138"]
        for program in ("ComfyUI", "A1111", "Forge", "diffusers", "kohya", "LyCORIS")
    ]


def test_check_says_which_layers_a_model_does_not_have(tiny: Any, tmp_path: Path, capsys: Any) -> None:
    network = create("lora", sd_targets(*tiny), Asked(dim=4))
    randomize(network)
    file = tmp_path / "x.safetensors"
    network.save(file, None, None)
    tensors = load_file(file)
    foreign = {key.replace("down_blocks_0", "down_blocks_7"): tensor for key, tensor in tensors.items()}
    lost = len({key.partition(".")[0] for key in foreign if "down_blocks_7" in key})
    save_file(foreign, file)
    assert tools(["check", str(file), "--base", str(BASE)]) == 0
    out = capsys.readouterr().out
    assert f"{138 - lost} layers fit it, {lost} are not in it" in out
    assert f"{lost} layers: not in this model" in out
    assert tools(["check", str(file)]) == 0  # without a model the names are good ones


def test_check_of_what_nobody_loads_exits_with_2(tmp_path: Path, capsys: Any) -> None:
    file = tmp_path / "x.safetensors"
    save_file({"base_model.model.mid_block.attentions.0.proj_in.oft_R.weight": torch.ones(2, 6)}, file)
    assert tools(["check", str(file)]) == 2
    captured = capsys.readouterr()
    assert "an OFT, 1 layers, names in PEFT's style" in captured.out
    assert "not read    is an OFT: base_model" in captured.out
    assert captured.err == f"error: {file}: no program that is known here loads a layer of it\n"
    (tmp_path / "y.safetensors").write_bytes(b"nonsense")
    assert tools(["check", str(tmp_path / "y.safetensors")]) == 2
    assert "Traceback" not in capsys.readouterr().err
