"""The tables of what other programs load, against the programs' own code where a package has it: diffusers, LyCORIS."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_models import BASE, difference, every_kind, outputs, randomize, sd_family, sd_targets
from safetensors.torch import load_file, save_file
from torch import Tensor

from library.errors import UserError
from networks import kinds
from networks.create import create
from networks.formats.loaders import PROGRAMS, Verdict, in_words, verdicts
from networks.settings import Asked
from tests.quick import quick

LINEAR = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
CONV = "lora_unet_down_blocks_0_resnets_0_conv1"
NORM = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_norm1"
PLAIN = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
C, R = 48, 2  # channels of these layers, of the first block; rank
MID = 128  # channels of the middle block


def of(layer: str, **shapes: tuple[int, ...]) -> dict[str, Tensor]:
    """Small random tensors of one layer; "__" is ".". alpha is 1."""
    generator = torch.Generator().manual_seed(0)
    return {
        f"{layer}.{name.replace('__', '.')}": torch.ones(())
        if name == "alpha"
        else torch.randn(shape, generator=generator)
        for name, shape in shapes.items()
    }


def pair(layer: str, size: int = C, **more: tuple[int, ...]) -> dict[str, Tensor]:
    return of(layer, lora_down__weight=(R, size), lora_up__weight=(size, R), alpha=(), **more)


HADA = {"hada_w1_a": (C, R), "hada_w1_b": (R, C), "hada_w2_a": (C, R), "hada_w2_b": (R, C)}
# By the form of one layer: its tensors, how many layers LyCORIS and diffusers find of it and a plain pair on another
FORMS: dict[str, tuple[dict[str, Tensor], int, int]] = {
    "lora": (pair(LINEAR), 2, 2),
    "lora without alpha": ({k: t for k, t in pair(LINEAR).items() if "alpha" not in k}, 0, 2),
    "tucker": (
        of(CONV, lora_down__weight=(R, C, 1, 1), lora_mid__weight=(R, R, 3, 3), lora_up__weight=(C, R, 1, 1), alpha=()),
        2, 0,
    ),
    "dora of rows": (pair(LINEAR, dora_scale=(C, 1)), 2, 2),
    "dora of input channels": (pair(LINEAR, dora_scale=(1, C)), 0, 2),
    "loha": (of(LINEAR, **HADA, alpha=()), 2, 0),
    "loha without alpha": (of(LINEAR, **HADA), 0, 0),
    "loha with dora": (of(LINEAR, **HADA, alpha=(), dora_scale=(C, 1)), 2, 0),
    "loha with dora of input channels": (of(LINEAR, **HADA, alpha=(), dora_scale=(1, C)), 0, 0),
    "loha of four axes": (
        of(CONV, alpha=(), **{end: (*shape, *((1, 1) if end[-1] == "a" else (3, 3))) for end, shape in HADA.items()}),
        0, 0,
    ),
    "lokr": (of(LINEAR, lokr_w1=(6, 6), lokr_w2_a=(8, R), lokr_w2_b=(R, 8), alpha=()), 2, 0),
    "lokr with a core": (
        of(CONV, lokr_w1=(6, 6), lokr_t2=(R, R, 3, 3), lokr_w2_a=(R, 8), lokr_w2_b=(R, 8), alpha=()), 0, 0,
    ),
    "oft": (of(LINEAR, oft_blocks=(8, 6, 6), alpha=()), 2, 0),
    "oft of few blocks": (of(LINEAR, oft_blocks=(6, 8, 8), alpha=()), 0, 0),
    "oft with rescale": (of(LINEAR, oft_blocks=(8, 6, 6), rescale=(C, 1), alpha=()), 2, 0),
    "oft of kohya": (of(LINEAR.replace("lora", "oft", 1), oft_blocks=(8, 6, 6), alpha=()), 1, 0),
    "boft": (of(LINEAR, oft_blocks=(4, 8, 6, 6), alpha=()), 2, 0),
    "glora": (of(LINEAR, a1__weight=(C, R), a2__weight=(R, C), b1__weight=(C, R), b2__weight=(R, C), alpha=()), 2, 0),
    "ia3": ({**of(LINEAR, weight=(C,)), f"{LINEAR}.on_input": torch.tensor(0)}, 0, 0),
    "full": (of(LINEAR, diff=(C, C)), 2, 0),
    "norm": (of(NORM, w_norm=(C,), b_norm=(C,)), 2, 0),
    "norm without bias": (of(NORM, w_norm=(C,)), 2, 0),
    "tlora": (of(LINEAR, q_layer__weight=(R, C), p_layer__weight=(C, R), lambda_layer=(1, R), alpha=()), 2, 0),
    "something new": (of(LINEAR, gate=(C,)), 0, 0),
    "a layer of no model": (pair("lora_unet_foo"), 1, 1),
}  # fmt: skip


def by_program(tensors: Mapping[str, Tensor], **more: Any) -> dict[str, Verdict]:
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    return {one.program: one for one in verdicts(shapes, more=kinds.tensor_names(), **more)}


def of_lycoris(tensors: Mapping[str, Tensor], tiny: Any) -> Any:
    """The network that LyCORIS makes of a file, with its layers."""
    kohya = pytest.importorskip("lycoris.kohya")
    unet, text_encoder = tiny
    # LyCORIS 4.1.3 makes a network of all layers first, which raises on diffusers' UNets (duplicated lora name)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(kohya.LycorisNetworkKohya, "UNET_TARGET_REPLACE_MODULE", ["Transformer2DModel"])
        patched.setattr(kohya.LycorisNetworkKohya, "UNET_TARGET_REPLACE_NAME", [])
        return _of_lycoris(kohya, tensors, unet, text_encoder)


def _of_lycoris(kohya: Any, tensors: Mapping[str, Tensor], unet: Any, text_encoder: Any) -> Any:
    view, _ = sd_family(unet, text_encoder).third_party_views()
    network, _ = kohya.create_network_from_weights(1.0, "x", None, view, unet, weights_sd=dict(tensors))
    return network, view, unet


def taken_by_diffusers(folder: Path) -> tuple[int, Any]:
    """How many layers diffusers adapts with the file in this folder, and its pipeline."""
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(
        BASE, dtype=torch.float32, safety_checker=None, feature_extractor=None
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipeline.load_lora_weights(str(folder), weight_name="x.safetensors")
    parts = (pipeline.unet, pipeline.text_encoder)
    return sum("lora_A" in name for part in parts for name, _ in part.named_parameters()), pipeline


def found_by_lycoris(tensors: Mapping[str, Tensor], tiny: Any) -> int:
    try:
        network = of_lycoris(tensors, tiny)[0]
    except (TypeError, ValueError, RuntimeError, AttributeError, AssertionError):
        return 0  # its loader raises: nothing of the file is applied
    return len(network.unet_loras) + len(network.text_encoder_loras)


def found_by_diffusers(folder: Path) -> int:
    try:
        return taken_by_diffusers(folder)[0]
    except (ValueError, KeyError, RuntimeError):
        return 0


@pytest.mark.parametrize(
    "form", quick(FORMS, "lora", "tucker", "loha", "lokr", "dora of rows", "oft", "full", "tlora", "something new")
)
def test_each_form_is_found_as_the_table_has_it(form: str, tiny: Any, tmp_path: Path) -> None:
    own, lycoris, diffusers = FORMS[form]
    tensors = {**own, **pair(PLAIN, MID)}
    save_file(tensors, tmp_path / "x.safetensors")
    found = by_program(tensors, version="sd_v1")
    assert {one.total for one in found.values()} == {2}
    assert (found["LyCORIS"].found, found["diffusers"].found) == (lycoris, diffusers)
    assert found_by_lycoris(tensors, tiny) == lycoris
    assert found_by_diffusers(tmp_path) == diffusers


SIZES = {"boft": Asked(dim=6, seed=1)}  # of kinds that do not take a rank of 4 and an alpha of 2
SCALES = {"loha": 0.3}  # of the random weights, where a product of four is too small otherwise


@pytest.mark.parametrize("kind", every_kind("lora", "lokr"))
def test_each_kinds_own_files_act_in_lycoris_and_diffusers_as_the_table_says(
    kind: str, tiny: Any, tmp_path: Path
) -> None:
    asked = SIZES.get(kind, Asked(dim=4, alpha=2.0, seed=1))
    try:
        network = create(kind, sd_targets(*tiny), asked)
    except UserError:  # a kind without rank or alpha
        network = create(kind, sd_targets(*tiny), Asked(seed=1))
    network.attach()
    randomize(network, SCALES.get(kind, 0.05))
    network.eval()
    expected = outputs(*tiny)
    network.save(tmp_path / "x.safetensors", None, None)
    network.detach()
    base = outputs(*tiny)
    assert difference(expected[1], base[1]) > 1e-3
    tensors = load_file(tmp_path / "x.safetensors")
    found = by_program(tensors, version="sd_v1")

    lycoris = found["LyCORIS"]
    assert found_by_lycoris(tensors, tiny) == lycoris.found
    if lycoris.exact == lycoris.total:
        other, text, unet = of_lycoris(tensors, tiny)
        other.apply_to(text, unet, True, True)
        # another order of operations in fp32, through a UNet of four blocks
        assert all(difference(a, b) < 1e-4 for a, b in zip(outputs(*tiny), expected, strict=True))
        other.restore()

    assert found_by_diffusers(tmp_path) == found["diffusers"].found
    if found["diffusers"].found:
        pipeline = taken_by_diffusers(tmp_path)[1]
        actual = outputs(pipeline.unet, pipeline.text_encoder)
        same = all(difference(a, b) < 1e-4 for a, b in zip(actual, expected, strict=True))
        assert same == (found["diffusers"].exact == found["diffusers"].total)


def test_the_names_decide_as_well() -> None:
    """Rules of programs that no package has: ComfyUI's map of names, A1111's cut at the first dot, kohya's blocks."""
    dotted = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"

    def found(tensors: Mapping[str, Tensor], **more: Any) -> dict[str, int]:
        return {program: one.found for program, one in by_program(tensors, **more).items()}

    everyone = dict.fromkeys(PROGRAMS, 1)
    nobody = dict.fromkeys(PROGRAMS, 0)
    assert found(pair(LINEAR), version="sd_v1") == everyone
    assert found(pair(LINEAR), version="sdxl_base_v1-0") == everyone | {"kohya": 0, "LyCORIS": 0}
    sgm = "lora_unet_input_blocks_4_1_proj_in"
    assert found(pair(sgm), version="sdxl_base_v1-0") == everyone
    assert found(pair(sgm), version="sd_v1") == everyone | {"kohya": 0, "LyCORIS": 0}
    assert found(pair("lora_unet_conv_in")) == everyone | {"kohya": 0}
    assert found(pair("lora_te2_text_projection")) == everyone | {"kohya": 0}
    peft = {"lora_A.weight": torch.ones(R, C), "lora_B.weight": torch.ones(C, R)}
    of_diffusers = {f"unet.{dotted}.to_q.{end}": tensor for end, tensor in peft.items()}
    assert found(of_diffusers) == nobody | {"diffusers": 1}
    old = {f"unet.{dotted}.processor.to_q_lora.{end}.weight": torch.ones(R, R) for end in ("up", "down")}
    assert found(old) == nobody | {"diffusers": 1, "ComfyUI": 1, "Forge": 1}
    assert found({f"base_model.model.{dotted}.to_q.{end}": tensor for end, tensor in peft.items()}) == nobody
    comfy = {f"diffusion_model.input_blocks.1.1.proj_in.{end}": tensor for end, tensor in peft.items()}
    assert found(comfy) == nobody | {"ComfyUI": 1, "Forge": 1}
    one_trainer = {f"lora_unet.{dotted}.to_q.lora_{half}.weight": torch.ones(R, R) for half in ("up", "down")}
    assert found(one_trainer) == nobody


def test_a_layer_that_is_not_in_the_model_is_not_found() -> None:
    tensors = {**pair(LINEAR), **pair(PLAIN)}
    found = by_program(tensors, known={LINEAR})
    assert {one.found for one in found.values()} == {1}
    assert all(one.notes == ("1 layers: not in this model",) for one in found.values())


def test_forge_rejects_a_file_with_more_than_twelve_unknown_tensors() -> None:
    tensors = pair(PLAIN)
    for number in range(7):
        tensors |= of(f"lora_unet_up_blocks_{number}_attentions_0_proj_in", oft_blocks=(8, 6, 6), alpha=())
        forge = by_program(tensors)["Forge"]
        assert forge.found == (1 if 2 * (number + 1) <= 12 else 0)
    assert forge.notes[-1] == "it rejects the whole file for 14 tensors that it does not know"


def test_embeddings_beside_the_layers_keep_diffusers_from_the_file(tmp_path: Path) -> None:
    tensors = {**pair(LINEAR), "bundle_emb.fox.emb_params": torch.ones(2, 8)}
    assert by_program(tensors)["diffusers"].found == 0
    save_file(tensors, tmp_path / "x.safetensors")
    assert found_by_diffusers(tmp_path) == 0


def test_the_words_put_the_programs_that_load_all_first() -> None:
    def said(tensors: Mapping[str, Tensor]) -> list[str]:
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        return in_words(verdicts(shapes, version="sd_v1"))

    assert said(pair(LINEAR)) == ["1 of 1 layers load, as trained, in ComfyUI, A1111, Forge, diffusers, kohya, LyCORIS"]
    assert said(FORMS["loha"][0]) == [
        "1 of 1 layers load, as trained, in ComfyUI, A1111, Forge, kohya (by networks.loha), LyCORIS",
        "diffusers: none of 1 layers load (it does not know this kind)",
    ]
    assert said(FORMS["dora of input channels"][0])[1] == (
        "diffusers: 1 of 1 layers load (as plain LoRA: dora_scale is ignored)"
    )
