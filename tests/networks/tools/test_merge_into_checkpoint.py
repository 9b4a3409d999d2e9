"""Merging into a base model's files: folder, single files of every layout, with each kind, against closed forms."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tool_files import write
from torch import Tensor

from library.files.header import read_metadata
from library.models.checkpoints.single_file import open_file
from library.models.opening import open_family
from library.models.stable_diffusion import StableDiffusion
from library.models.stable_diffusion_xl import StableDiffusionXL
from networks import merge_lora
from networks.create import create, create_to_merge
from networks.files import read
from networks.kinds import load
from networks.settings import Asked
from networks.tools import into_checkpoint
from networks.tools.__main__ import main
from networks.tools.methods import Method
from tests import tiny_sd2
from tests import tiny_sdxl as tiny_sdxl_form
from tests.conftest import BASE
from tests.models.original_layout import configuration, sdxl_file, single_file, weights_of
from tests.networks.adapter_models import every_kind, randomize
from tests.networks.kinds.single_layers import fill, layer, site

QUERY = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight"
CONV = "mid_block.resnets.0.conv1.weight"
TEXT = "encoder.layers.1.self_attn.k_proj.weight"
LAYERS = {
    "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q": ("unet", QUERY),
    "lora_unet_mid_block_resnets_0_conv1": ("unet", CONV),
    "lora_te_text_model_encoder_layers_1_self_attn_k_proj": ("text_encoder", TEXT),
}


def _parts(folder: Path) -> dict[str, dict[str, Tensor]]:
    return dict(zip(("unet", "vae", "text_encoder"), weights_of(folder).values(), strict=True))


def _lora(path: Path, parts: Mapping[str, Mapping[str, Tensor]], seed: int, scale: float = 0.1) -> dict[str, Tensor]:
    """A LoRA of rank 2 on three layers; the differences by the definition, by layer."""
    generator, tensors, deltas = torch.Generator().manual_seed(seed), {}, {}
    for name, (part, key) in LAYERS.items():
        out, *rest = parts[part][key].shape
        down = torch.randn(2, *rest, generator=generator)
        up = scale * torch.randn(out, 2, *(1 for _ in rest[1:]), generator=generator)
        tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(1.0)}
        deltas[name] = 0.5 * torch.einsum("or,rn->on", up.flatten(1), down.flatten(1)).view(parts[part][key].shape)
    write(path, tensors)
    return deltas


def _merged(folder: Path, *words: str) -> int:
    return main(["merge", *words, "--save_to", str(folder)])


def _check(found: Mapping[str, Mapping[str, Tensor]], parts: Mapping[str, Mapping[str, Tensor]], deltas: Any) -> None:
    """W + delta in fp32, rounded once; all other tensors as they were, and each of its old type."""
    changed = {place: deltas[name] for name, place in LAYERS.items()}
    for part, own in parts.items():
        assert found[part].keys() == own.keys()
        for key, tensor in own.items():
            expected = tensor
            if (part, key) in changed:
                expected = tensor.float() + changed[part, key]
                # a sum in fp32 of another order, and the rounding to the tensor's type: one step of it
                step = torch.finfo(tensor.dtype).eps
                torch.testing.assert_close(found[part][key].float(), expected, rtol=step, atol=1e-6)
                assert found[part][key].dtype == tensor.dtype
                assert not torch.equal(found[part][key], tensor)
            else:
                assert torch.equal(found[part][key], expected), key


def test_a_folder_is_merged_and_the_rest_copied(tmp_path: Path) -> None:
    parts, target = _parts(BASE), tmp_path / "merged"
    deltas, others = (_lora(tmp_path / f"{name}.safetensors", parts, seed) for name, seed in (("a", 1), ("b", 2)))
    files = [str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors")]
    assert _merged(target, *files, "--base", str(BASE), "--weights", "0.5", "-1") == 0
    _check(_parts(target), parts, {name: 0.5 * deltas[name] - others[name] for name in LAYERS})
    names = {file.relative_to(BASE) for file in BASE.rglob("*")}
    assert {file.relative_to(target) for file in target.rglob("*")} == names
    metadata = read_metadata(target / "unet" / "diffusion_pytorch_model.safetensors")
    rows = json.loads(metadata["ss_made_from"])
    assert [(row["name"], row["weight"]) for row in rows] == [("a.safetensors", 0.5), ("b.safetensors", -1.0)]
    assert (metadata["ss_made_on"], metadata["ss_made_by"]) == ("base", "linear")
    open_family(str(target))


def test_the_door_of_kohyas_script_merges_the_whole_difference_too(tmp_path: Path) -> None:
    parts, target = _parts(BASE), tmp_path / "merged"
    deltas = _lora(tmp_path / "a.safetensors", parts, 1)
    words = ["--sd_model", str(BASE), "--models", str(tmp_path / "a.safetensors"), "--ratios", "0.6"]
    assert merge_lora.main([*words, "--save_to", str(target)]) == 0
    _check(_parts(target), parts, {name: 0.6 * delta for name, delta in deltas.items()})


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {"sd1": BASE, "sd2": tiny_sd2.write(tmp_path_factory.mktemp("tiny_v2"))}


@pytest.fixture
def single(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """Opens single files with this folder's configurations: a file of a small model has none."""

    def use(folder: Path) -> None:
        def opened(path: str, *, whole: bool) -> StableDiffusion:
            v2 = "sd2" in Path(path).name
            return StableDiffusion(open_file(path, Path(path), kind="sd", config=configuration(folder)), v2=v2)

        monkeypatch.setattr(into_checkpoint, "open_family", opened)

    return use


@pytest.mark.parametrize(("version", "form"), [("sd1", "safetensors"), ("sd1", "ckpt"), ("sd2", "safetensors")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16])
def test_a_single_file_keeps_its_layout(
    version: str, form: str, dtype: torch.dtype, models: dict[str, Path], single: Any, tmp_path: Path
) -> None:
    """SD 2.x holds query, key and value of its text encoder as one tensor: a third of it changes."""
    folder = models[version]
    single(folder)
    parts = {name: {key: one.to(dtype) for key, one in own.items()} for name, own in _parts(folder).items()}
    states = single_file(*parts.values(), configuration(folder), open_clip=version == "sd2")
    base = tmp_path / f"{version}.{form}"
    if form == "ckpt":
        torch.save({"state_dict": states, "global_step": 7}, base)
    else:
        about = {"modelspec.title": "tiny", "modelspec.hash_sha256": "0xold", "sshs_model_hash": "old"}
        save_file({name: one.contiguous() for name, one in states.items()}, base, about)
    deltas = _lora(tmp_path / "a.safetensors", parts, 1)
    target = tmp_path / "out.safetensors"
    before = base.read_bytes()
    assert _merged(target, str(tmp_path / "a.safetensors"), "--base", str(base), "--weights", "0.7") == 0
    assert base.read_bytes() == before
    merged = {name: dict(own) for name, own in parts.items()}
    for name, (part, key) in LAYERS.items():
        merged[part][key] = (parts[part][key].float() + 0.7 * deltas[name]).to(dtype)
    expected = single_file(*merged.values(), configuration(folder), open_clip=version == "sd2")
    found = load_file(target)
    assert found.keys() == expected.keys()
    changed = [name for name in states if not torch.equal(found[name], states[name])]
    assert len(changed) == len(LAYERS)
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        step = torch.finfo(dtype).eps
        torch.testing.assert_close(found[name], tensor, rtol=step, atol=1e-6)
    metadata = read_metadata(target)
    assert "sshs_model_hash" not in metadata
    if form == "safetensors":
        content = target.read_bytes()
        data = content[8 + int.from_bytes(content[:8], "little") :]
        assert metadata["modelspec.hash_sha256"] == f"0x{hashlib.sha256(data).hexdigest()}"
        assert metadata["modelspec.title"] == "tiny"


def test_a_single_file_of_sdxl(tiny_sdxl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its LoRAs have the original names; the second text encoder's query is a third of a tensor. EMA is left out."""
    parts = weights_of(tiny_sdxl)
    states = sdxl_file(parts["unet"], parts["vae"], parts["text"], parts["text_2"], tiny_sdxl_form.configuration())
    base, target, lora = (tmp_path / f"{name}.safetensors" for name in ("base", "out", "lora"))
    ema = {"model_ema.decay": torch.tensor(0.9999)}
    save_file({name: one.contiguous() for name, one in (states | ema).items()}, base)
    places = {
        "lora_unet_input_blocks_4_1_proj_in": ("model.diffusion_model.input_blocks.4.1.proj_in.weight", slice(None)),
        "lora_unet_output_blocks_0_1_transformer_blocks_1_attn2_to_k": (
            "model.diffusion_model.output_blocks.0.1.transformer_blocks.1.attn2.to_k.weight",
            slice(None),
        ),
        "lora_te1_text_model_encoder_layers_0_mlp_fc1": (
            "conditioner.embedders.0.transformer.text_model.encoder.layers.0.mlp.fc1.weight",
            slice(None),
        ),
        "lora_te2_text_model_encoder_layers_1_self_attn_k_proj": (
            "conditioner.embedders.1.model.transformer.resblocks.1.attn.in_proj_weight",
            slice(40, 80),  # of 3 · 40 rows
        ),
    }
    torch.manual_seed(1)
    tensors, expected = {}, {name: one.clone() for name, one in states.items()}
    for name, (key, rows) in places.items():
        out, inputs = states[key][rows].shape
        up, down = torch.randn(out, 2), torch.randn(2, inputs)
        tensors |= {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down}
        expected[key][rows] += 0.5 * up @ down
    write(lora, tensors, {"ss_base_model_version": "sdxl_base_v1-0"})
    config = tiny_sdxl_form.configuration()
    monkeypatch.setattr(
        into_checkpoint,
        "open_family",
        lambda path, whole: StableDiffusionXL(open_file(path, Path(path), kind="sdxl", config=config)),
    )
    assert _merged(target, str(lora), "--base", str(base), "--weights", "0.5") == 0
    found = load_file(target)
    assert found.keys() == states.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-5)  # fp32, in another order
        assert torch.equal(found[name], states[name]) == (name not in {key for key, _ in places.values()})


@pytest.mark.parametrize("kind", every_kind("lora", "dora", "oft", "lokr", "ia3"))
def test_each_kind_is_merged(kind: str, tmp_path: Path) -> None:
    """As `effective_weight` of the kind has it, in fp32 and rounded once."""
    family = open_family(str(BASE))
    family.components.load_all(("denoiser", "text_encoder"), torch.float32, "cpu")
    targets = family.adapter_targets()
    network = create(kind, targets, Asked(seed=1, **_SIZES.get(kind, {})))
    randomize(network, 0.02)
    network.save(str(tmp_path / "a.safetensors"), None, {"ss_base_model_version": "sd_v1"})
    target = tmp_path / "merged"
    assert _merged(target, str(tmp_path / "a.safetensors"), "--base", str(BASE), "--weights", "0.6") == 0
    content = read(tmp_path / "a.safetensors")
    other = create_to_merge(content, targets, multiplier=0.6)
    other.load(content)
    found, paths = _parts(target), {}
    for part, module in (("unet", family.components["denoiser"]), ("text_encoder", family.components["text_encoder"])):
        paths |= {layer: (part, path) for path, layer in module.named_modules()}
    for adapter in other.adapters:
        part, path = paths[adapter.site.module]
        weight = adapter.site.module.weight
        expected = adapter.merged("weight", adapter.tensors(), weight)
        actual = found[part][f"{path}.weight"].float()
        torch.testing.assert_close(actual, expected.detach().view(actual.shape), rtol=2**-10, atol=1e-6)


_RANKED = ("lora", "loha", "lokr", "dora", "dylora", "lora_fa", "pissa", "adalora", "glora", "vera", "t_lora")
_SIZES: dict[str, dict[str, Any]] = {**{kind: {"dim": 2, "alpha": 1.0} for kind in _RANKED}, "boft": {"dim": 8}}


@pytest.mark.parametrize("words", [["--method", "ties"], ["--method", "dare", "--density", "0.5", "--seed", "3"]])
def test_another_method_in_a_base_model(words: list[str], tmp_path: Path) -> None:
    parts, target = _parts(BASE), tmp_path / "merged"
    a, b = (_lora(tmp_path / f"{name}.safetensors", parts, seed) for name, seed in (("a", 1), ("b", 2)))
    files = [str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors")]
    assert _merged(target, *files, "--base", str(BASE), "--weights", "0.5", "1", *words) == 0
    method = Method.of(words[1], 0.5 if "dare" in words else None, 3 if "dare" in words else None, files=2)
    expected = {name: method.combine([a[name], b[name]], [0.5, 1.0], layer=name) for name in LAYERS}
    _check(_parts(target), parts, expected)


@pytest.mark.parametrize(
    ("kind", "sizes"), [("lora", {}), ("dora", {}), ("loha", {"dora_wd": True}), ("glora", {}), ("oft", {})]
)
def test_another_method_takes_the_whole_difference_of_each_kind(kind: str, sizes: dict[str, Any]) -> None:
    """TIES of one file with all of its weights is that file: DoRA's norms count, and GLoRA's product with W."""
    cls, weight = load(kind), layer("linear").weight
    asked = Asked(dim=2, alpha=1.0, seed=1, is_lenient=True)
    adapter = cls.new(site(layer("linear")), asked, cls.SIZES(**sizes), cls.SETTINGS(), None)
    assert adapter is not None
    fill(adapter)
    tensors = {name: tensor.detach() for name, tensor in adapter.tensors().items()}
    change = into_checkpoint._LayerChange([into_checkpoint._Share(0, adapter, tensors, 1.0)], Method("ties", 1.0), 1)
    torch.testing.assert_close(change.whole("weight")(weight), adapter.effective_weight(weight, tensors, 1.0))


def test_weights_by_block_in_a_base_model(tmp_path: Path) -> None:
    parts, target = _parts(BASE), tmp_path / "merged"
    deltas = _lora(tmp_path / "a.safetensors", parts, 1)
    words = ["--base", str(BASE), "--weights", "0.5", "--lbw", "BASE=2,MID=3"]
    assert _merged(target, str(tmp_path / "a.safetensors"), *words) == 0
    _check(
        _parts(target),
        parts,
        {name: delta * w for (name, delta), w in zip(deltas.items(), (0.5, 1.5, 1.0), strict=True)},
    )


def test_layers_that_the_base_lacks_are_named(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    parts, file, target = _parts(BASE), tmp_path / "a.safetensors", tmp_path / "merged"
    deltas = _lora(file, parts, 1)
    stranger = "lora_unet_up_blocks_7_attentions_0_proj_in"
    more = {f"{stranger}.lora_down.weight": torch.ones(1, 4), f"{stranger}.lora_up.weight": torch.ones(4, 1)}
    write(file, load_file(file) | more)
    assert _merged(target, str(file), "--base", str(BASE)) == 2
    said = capsys.readouterr().err
    assert stranger in said
    assert "--allow_missing" in said
    assert not target.exists()
    assert _merged(target, str(file), "--base", str(BASE), "--allow_missing") == 0
    _check(_parts(target), parts, deltas)


def test_an_overflow_names_the_tensor_and_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    _lora(tmp_path / "a.safetensors", _parts(BASE), 1, scale=1e5)
    assert _merged(tmp_path / "merged", str(tmp_path / "a.safetensors"), "--base", str(BASE)) == 2
    said = capsys.readouterr().err
    assert "which float16 does not hold" in said
    assert "weight'" in said
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]


def test_old_weights_beside_the_merged_ones_are_left_out(tmp_path: Path) -> None:
    """Shards are merged; weights of another type beside them, and a whole model, would be the old ones."""
    base, target = tmp_path / "base", tmp_path / "merged"
    shutil.copytree(BASE, base)
    parts = _parts(BASE)
    unet, names = parts["unet"], sorted(parts["unet"])
    shards = {
        name: f"diffusion_pytorch_model-0000{1 + (place % 2)}-of-00002.safetensors" for place, name in enumerate(names)
    }
    (base / "unet" / "diffusion_pytorch_model.safetensors").rename(
        base / "unet" / "diffusion_pytorch_model.fp16.safetensors"
    )
    for shard in set(shards.values()):
        save_file({name: unet[name] for name in names if shards[name] == shard}, base / "unet" / shard)
    index = base / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": shards}))
    save_file({"x": torch.ones(1)}, base / "whole.safetensors")
    deltas = _lora(tmp_path / "a.safetensors", parts, 1)
    assert _merged(target, str(tmp_path / "a.safetensors"), "--base", str(base)) == 0
    assert {file.name for file in (target / "unet").iterdir()} == {"config.json", index.name, *shards.values()}
    assert not (target / "whole.safetensors").exists()
    found = _parts_of_shards(target)
    _check(found, parts, deltas)


def _parts_of_shards(folder: Path) -> dict[str, dict[str, Tensor]]:
    read_parts = {}
    for part in ("unet", "vae", "text_encoder"):
        read_parts[part] = {k: t for file in (folder / part).glob("*.safetensors") for k, t in load_file(file).items()}
    return read_parts


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--rank", "4"], "--rank has no effect with --base"),
        (["--save_precision", "fp16"], "--save_precision has no effect with --base"),
        (["--method", "svd"], "--method svd: has no use with --base"),
        (["--weights", "0"], "every weight is 0"),
        (["--save_to", "x.safetensors"], "give the name of a folder"),
    ],
)
def test_wrong_options_are_refused(words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    _lora(tmp_path / "a.safetensors", _parts(BASE), 1)
    place = ["--save_to", str(tmp_path / "merged"), *words]
    assert main(["merge", str(tmp_path / "a.safetensors"), "--base", str(BASE), *place]) == 2
    assert said in capsys.readouterr().err


def test_neither_a_source_nor_a_strange_folder_is_replaced(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    _lora(tmp_path / "a.safetensors", _parts(BASE), 1)
    base, full = tmp_path / "base", tmp_path / "full"
    shutil.copytree(BASE, base)
    full.mkdir()
    (full / "diary.txt").write_text("dear diary")
    refused = {
        base: "one of the sources",
        tmp_path: "holds one",
        full: "not of a model",
        base / "new": "inside of the base",
    }
    for target, said in refused.items():
        assert _merged(target, str(tmp_path / "a.safetensors"), "--base", str(base), "--overwrite") == 2
        assert said in capsys.readouterr().err
    assert (full / "diary.txt").read_text() == "dear diary"
