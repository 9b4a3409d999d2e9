"""Files that are given where another is wanted: every reader says what a file is, and all say the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_models import foreign
from safetensors.torch import load_file, save_file
from torch import nn

from library.errors import UserError
from library.models.checkpoints.adapter_file import AdapterContents, describe
from library.models.checkpoints.open_file import open_vae
from library.models.opening import open_family
from networks import files, kinds
from networks.files import AdapterFile, check
from networks.merge import BaseWeights
from networks.tools.__main__ import main as tools

LAYER = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
PEFT = "base_model.model.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
O, I, R = 6, 8, 2  # outputs, inputs, rank


def of(layer: str, **shapes: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Tensors of one layer; "__" is "."."""
    return {f"{layer}.{name.replace('__', '.')}": torch.ones(shape) for name, shape in shapes.items()}


PAIR = of(LAYER, lora_down__weight=(R, I), lora_up__weight=(O, R), alpha=())
PEFT_PAIR = of(PEFT, lora_A__weight=(R, I), lora_B__weight=(O, R))
ADAPTERS: dict[str, tuple[dict[str, torch.Tensor], str]] = {
    "DoRA": ({**PAIR, **of(LAYER, dora_scale=(1, I))}, "a DoRA"),
    "DoRA of PEFT": ({**PEFT_PAIR, **of(PEFT, lora_magnitude_vector=(O,))}, "a DoRA"),
    "Tucker": ({**PAIR, **of(LAYER, lora_mid__weight=(R, R, 3, 3))}, "a LoRA with Tucker cores (lora_mid)"),
    "LoHa": (of(LAYER, hada_w1_a=(O, R), hada_w1_b=(R, I), hada_w2_a=(O, R), hada_w2_b=(R, I), alpha=()), "a LoHa"),
    "LoHa with DoRA": (
        of(LAYER, hada_w1_a=(O, R), hada_w1_b=(R, I), hada_w2_a=(O, R), hada_w2_b=(R, I), dora_scale=(O, 1)),
        "a LoHa with DoRA",
    ),
    "LoKr": (of(LAYER, lokr_w1=(2, 2), lokr_w2_a=(3, R), lokr_w2_b=(R, 4), alpha=()), "a LoKr"),
    "OFT": (of(LAYER, oft_blocks=(2, 3, 3), alpha=()), "an OFT"),
    "kohya's OFT": (of("oft_unet_mid_block_to_q", oft_blocks=(2, 3, 3), alpha=()), "an OFT"),
    "OFT of PEFT": (of(PEFT, oft_R__weight=(2, 6)), "an OFT"),
    "BOFT": (of(LAYER, oft_blocks=(2, 2, 3, 3), alpha=(), rescale=(O, 1)), "a BOFT"),
    "BOFT of PEFT": (of(PEFT, boft_R=(2, 4, 2, 2), boft_s=(O, 1)), "a BOFT"),
    "GLoRA": (of(LAYER, a1__weight=(I, R), a2__weight=(R, I), b1__weight=(O, R), b2__weight=(R, I)), "a GLoRA"),
    "IA3": ({**of(LAYER, weight=(O,)), f"{LAYER}.on_input": torch.tensor(0)}, "an (IA)³"),
    "IA3 of PEFT": (of(PEFT, ia3_l=(O, 1)), "an (IA)³"),
    "full": (of(LAYER, diff=(O, I), diff_b=(O,)), "a file of whole weight differences (diff)"),
    "norm": (of(LAYER, w_norm=(O,), b_norm=(O,)), "a file of normalisation layers (w_norm)"),
    "VeRA": (
        {**of(PEFT, vera_lambda_d=(R,), vera_lambda_b=(O,)), "base_model.vera_A": torch.ones(R, I)},
        "a VeRA",
    ),
    "AdaLoRA": ({**PEFT_PAIR, **of(PEFT, lora_E=(R, 1))}, "an AdaLoRA"),
    "T-LoRA": (of(LAYER, q_layer__weight=(R, I), p_layer__weight=(O, R), lambda_layer=(1, R)), "a T-LoRA"),
    "biases": ({**PEFT_PAIR, **of(PEFT, lora_B__bias=(O,))}, "a LoRA with biases"),
    "OneTrainer's LoHa": (
        of("unet.middle_block.1.proj_in", hada_w1_a=(O, R), hada_w1_b=(R, I), hada_w2_a=(O, R), hada_w2_b=(R, I)),
        "a LoHa",
    ),
    "OneTrainer's LoKr": (
        of("unet.middle_block.1.proj_in", lokr_w1=(2, 2), lokr_w2_a=(3, R), lokr_w2_b=(R, 4), alpha=()),
        "a LoKr",
    ),
    "OneTrainer's LoKr with a core": (
        of("unet.middle_block.1.proj_in", lokr_w1=(2, 2), lokr_w2_a=(R, 3), lokr_w2_b=(R, 4), lokr_t2=(R, R, 3, 3)),
        "a LoKr",
    ),
    "two kinds": (
        {**PAIR, **of(f"{LAYER}x", w_norm=(O,)), **of(f"{LAYER}y", w_norm=(O,))},
        "an adapter of 2 layers of norm and 1 layers of LoRA",
    ),
    "something new": (
        {**PAIR, **of(LAYER, gate=(O,))},
        f"an adapter of 1 layers of LoRA and 1 tensors of no known kind, such as {LAYER}.gate",
    ),
}
# Why files are not read although there is a kind of that name here
REASONS = {
    "OFT of PEFT": "PEFT and OneTrainer rotate what goes into the layer",
    "BOFT of PEFT": "PEFT rotates what goes into the layer",
    "VeRA": "the tables that all layers share do not say how wide each layer is",
    "AdaLoRA": "needs its adapter_config.json beside it",
    "biases": "no kind of adapter here has a bias beside a low-rank pair",
}
OTHERS: dict[str, tuple[dict[str, torch.Tensor], str]] = {
    "kohya's embedding": ({"emb_params": torch.ones(2, I)}, "a textual inversion embedding"),
    "SDXL's embedding": ({"clip_l": torch.ones(2, 8), "clip_g": torch.ones(2, 8)}, "a textual inversion embedding"),
    "diffusers' embedding": ({"<cat-toy>": torch.ones(I)}, "a textual inversion embedding"),
    "hypernetwork": ({"320.0.linear.0.weight": torch.ones(2, 2)}, "a hypernetwork"),
    "ControlNet": ({"controlnet_cond_embedding.conv_in.weight": torch.ones(1)}, "a ControlNet"),
    "ControlNet, old": ({"control_model.input_blocks.0.0.weight": torch.ones(1)}, "a ControlNet"),
    "ControlNet-LLLite": (of("lllite_unet_input_blocks_4_1_to_q", down__0__weight=(1,)), "a ControlNet-LLLite"),
    "Control-LoRA": (
        {"lora_controlnet": torch.ones(1), "input_blocks.0.0.weight": torch.ones(1)},
        "a Control-LoRA (a ControlNet of low rank)",
    ),
    "T2I-Adapter": ({"adapter.conv_in.weight": torch.ones(1)}, "a T2I-Adapter"),
    "IP-Adapter": ({"image_proj.proj.weight": torch.ones(1), "ip_adapter.1.to_k_ip.weight": torch.ones(1)},
                   "an IP-Adapter"),
    "motion LoRA": (
        of("down_blocks.0.motion_modules.0.attention_blocks.0.processor", to_q_lora__down__weight=(1, 1)),
        "a motion module of AnimateDiff",
    ),
    "upscaler": ({"conv_first.weight": torch.ones(1), "body.0.rdb1.conv1.weight": torch.ones(1)},
                 "an upscaler of images"),
    "image encoder": ({"vision_model.embeddings.class_embedding": torch.ones(1)}, "an image encoder (CLIP vision)"),
    "VAE": ({"encoder.conv_in.weight": torch.ones(1)}, "a VAE"),
    "checkpoint": (
        {"model.diffusion_model.x": torch.ones(1), "cond_stage_model.transformer.x": torch.ones(1)},
        "a Stable Diffusion 1.x or 2.x model",
    ),
    "nothing known": ({"foo": torch.ones(1), "bar": torch.ones(2)}, "of no known kind (2 tensors: bar, foo)"),
}  # fmt: skip


def _open_model(path: Path) -> Any:
    return open_family(str(path))


def said(read: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        read()
    return str(caught.value)


def refusal(read: Callable[[], object]) -> str:
    """The message of the error, "" if there is none."""
    try:
        read()
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_is_read_by_the_kinds_that_have_such_layers_and_named_otherwise(
    name: str, tmp_path: Path, capsys: Any
) -> None:
    tensors, title = ADAPTERS[name]
    path = tmp_path / "x.safetensors"
    save_file(tensors, path)
    contents = described(tensors)
    readable = name not in REASONS and contents.holds_only(kinds.readers())

    trained = refusal(lambda: check(path, purpose="is trained by networks.lora", allowed=["lora"]))
    trainers = [kind for kind in kinds.KINDS if readable and contents.holds_only(kinds.load(kind).reads())]
    if "lora" in trainers:
        assert trained == ""
    elif reason := REASONS.get(name):
        assert trained.startswith(f"{path} is {title}: ")
        assert reason in trained
    elif contents.naming == "OneTrainer" and not readable:
        assert trained.startswith(f"{path} is {title}: ")
    else:
        assert trained.startswith(f"{path} is {title}, and only plain LoRA is trained by networks.lora")
        assert all(f"--network_module networks.{kind}" in trained for kind in trainers)

    merged, converted = refusal(lambda: BaseWeights([str(path)], [])), tmp_path / "y.safetensors"
    code = tools(["convert", str(path), str(converted), "--to", "kohya"])
    if readable:
        assert (merged, code) == ("", 0)
        assert described(load_file(converted)).layers == contents.layers
    else:
        assert merged.startswith(f"--base_weights {path} is {title}")
        assert REASONS.get(name, "no kind of adapter here reads") in merged
        assert code == 2
        assert f"{path} is {title}" in capsys.readouterr().err
    assert said(lambda: _open_model(path)) == f"{path} is {title}, not a base model"
    assert said(lambda: open_vae(str(path), default_config={})) == f"{path} is {title}, and holds no VAE"


HALVES: dict[str, tuple[dict[str, torch.Tensor], str]] = {
    "a half": (of(LAYER, lora_up__weight=(O, R)), "has a lora_up.weight and no lora_down.weight"),
    "ranks": (of(LAYER, lora_down__weight=(3, I), lora_up__weight=(O, R)), "are not of one rank"),
    "axes": (of(LAYER, lora_down__weight=(R, I), lora_up__weight=(O,)), "are not of one rank"),
    "rank 0": (
        {f"{LAYER}.lora_down.weight": torch.ones(0, I), f"{LAYER}.lora_up.weight": torch.ones(O, 0)},
        "it holds nothing",
    ),
    "two kinds": (
        {**PAIR, **of(LAYER, dora_scale=(O, 1), w_norm=(O,))},
        "has tensors of two kinds: w_norm is no part of DoRA",
    ),
}


@pytest.mark.parametrize("name", HALVES)
def test_a_layer_that_is_wrong_in_itself_is_named_before_weights_are_read(
    name: str, tmp_path: Path, monkeypatch: Any
) -> None:
    tensors, words = HALVES[name]
    save_file(tensors, tmp_path / "x.safetensors")
    monkeypatch.setattr(files, "read_tensors", None)
    message = said(lambda: files.read(tmp_path / "x.safetensors", purpose="is merged"))
    assert message.startswith(f"{tmp_path / 'x.safetensors'}: {LAYER}")
    assert words in message


def test_a_dora_given_to_lora_is_told_what_trains_it(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file(ADAPTERS["DoRA"][0], path)
    assert said(lambda: check(path, purpose="is trained by networks.lora", allowed=["lora"])) == (
        f"{path} is a DoRA, and only plain LoRA is trained by networks.lora. --network_module networks.dora trains it"
    )


def test_a_tool_for_lora_alone_says_how_another_kind_becomes_one(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file(ADAPTERS["LoHa"][0], path)
    message = said(lambda: check(path, purpose="is resized", allowed=["lora"]))
    assert message.endswith("only plain LoRA is resized. python -m networks.tools convert --to lora makes it one")


def test_norms_beside_another_kind_are_trained_by_that_kind(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    norm = {f"{LAYER}_norm.w_norm": torch.zeros(4), f"{LAYER}_norm.b_norm": torch.zeros(4)}
    save_file({**ADAPTERS["LoHa"][0], **norm}, path)
    message = said(lambda: check(path, purpose="is trained by networks.lora", allowed=["lora", "norm"]))
    assert message.endswith("only plain LoRA is trained by networks.lora. --network_module networks.loha trains it")


def test_a_file_of_layers_of_two_kinds_is_merged_and_not_trained(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file(
        {**PAIR, **{name.replace(LAYER, f"{LAYER}x"): t.clone() for name, t in ADAPTERS["DoRA"][0].items()}}, path
    )
    check(path, purpose="is merged into the base")
    message = said(lambda: check(path, purpose="is trained by networks.dora", allowed=["dora"]))
    assert message.endswith("trained by networks.dora. No kind has layers of all of these: --base_weights merges it")


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_adapter_is_named_by_every_reader(name: str, tmp_path: Path, capsys: Any) -> None:
    tensors, title = OTHERS[name]
    path = tmp_path / "x.safetensors"
    save_file(tensors, path)
    for purpose in ("", "is trained by networks.lora"):
        assert said(lambda purpose=purpose: check(path, purpose=purpose)) == f"{path} is {title}, and no LoRA"
    assert said(lambda: BaseWeights([str(path)], [])) == f"--base_weights {path} is {title}, and no LoRA"
    assert tools(["convert", str(path), str(tmp_path / "y.safetensors"), "--to", "diffusers"]) == 2
    assert f"{path} is {title}, and no LoRA" in capsys.readouterr().err
    if name != "checkpoint":
        assert said(lambda: _open_model(path)).startswith(f"{path} is {title}, not a base model")
    if name != "VAE":
        assert said(lambda: open_vae(str(path), default_config={})) == f"{path} is {title}, and holds no VAE"


def test_embeddings_and_hypernetworks_of_the_web_ui_are_named(tmp_path: Path) -> None:
    embedding = {"string_to_token": {"*": 265}, "string_to_param": {"*": torch.ones(2, I)}, "name": "x", "step": 1}
    layers = {"linear.0.weight": torch.ones(2, 2)}
    for content, title in ((embedding, "a textual inversion embedding"), ({320: (layers, layers)}, "a hypernetwork")):
        torch.save(content, tmp_path / "x.pt")
        for read in (check, _open_model):
            assert f"x.pt is {title}, " in said(lambda read=read: read(tmp_path / "x.pt"))


def test_a_lora_as_the_base_model_says_where_it_belongs(tmp_path: Path) -> None:
    for tensors in (PAIR, PEFT_PAIR):
        save_file(tensors, tmp_path / "x.safetensors")
        assert said(lambda: _open_model(tmp_path / "x.safetensors")).endswith(
            "x.safetensors is a LoRA, not a base model; to train on from it, give it as --network_weights"
        )


# -- what the names say, against the programs that write them


def described(tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> AdapterContents:
    found = describe({name: tuple(tensor.shape) for name, tensor in tensors.items()}, metadata)
    assert found is not None
    return found


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 32)


# peft takes a bias of a LoRA, which has one axis, for a shard; its BOFT wants to compile a CUDA extension
@pytest.mark.filterwarnings(
    "ignore:Adapter 'default'. 1 LoRA tensor", "ignore:Failed to load the CUDA", "ignore:Setting boft_"
)
@pytest.mark.parametrize(
    ("config", "settings", "kind"),
    [
        ("LoraConfig", {}, "lora"),
        ("LoraConfig", {"use_dora": True}, "dora"),
        ("LoraConfig", {"lora_bias": True}, "bias"),
        ("AdaLoraConfig", {"total_step": 10}, "adalora"),
        ("LoHaConfig", {}, "loha"),
        ("LoKrConfig", {}, "lokr"),
        ("OFTConfig", {"oft_block_size": 4}, "oft"),
        ("BOFTConfig", {"boft_block_size": 4}, "boft"),
        ("VeraConfig", {}, "vera"),
        ("IA3Config", {"feedforward_modules": []}, "ia3"),
    ],
)
def test_the_kinds_of_peft_are_recognised(config: str, settings: dict[str, Any], kind: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(Model(), getattr(peft, config)(target_modules=["linear"], **settings))
    model.save_pretrained(tmp_path)
    found = described(load_file(tmp_path / "adapter_model.safetensors"))
    assert (found.layers, found.unknown) == ({kind: 1}, ())
    assert found.naming == "PEFT"


@pytest.mark.parametrize(
    ("arguments", "kind"),
    [
        ({"algo": "lora"}, {"lora": 1}),
        ({"algo": "lora", "dora_wd": "True"}, {"dora": 1}),
        ({"algo": "lora", "train_norm": "True"}, {"lora": 1, "norm": 1}),
        ({"algo": "loha"}, {"loha": 1}),
        ({"algo": "loha", "dora_wd": "True"}, {"loha": 1}),
        ({"algo": "lokr", "factor": "4"}, {"lokr": 1}),
        ({"algo": "diag-oft"}, {"oft": 1}),
        ({"algo": "boft"}, {"boft": 1}),
        ({"algo": "glora"}, {"glora": 1}),
        ({"algo": "full"}, {"full": 1}),
        ({"algo": "ia3"}, {"ia3": 1}),
    ],
    ids=str,
)
def test_the_kinds_of_lycoris_are_recognised(arguments: dict[str, str], kind: dict[str, int]) -> None:
    kohya = pytest.importorskip("lycoris.kohya")

    class Transformer2DModel(nn.Module):  # LyCORIS chooses layers by the names of classes
        def __init__(self) -> None:
            super().__init__()
            self.to_q, self.norm = nn.Linear(32, 32), nn.LayerNorm(32)

    unet = nn.Sequential(Transformer2DModel())
    network = kohya.create_network(1.0, 16, 1.0, None, [], unet, neuron_dropout=None, preset="attn-mlp", **arguments)
    network.apply_to([], unet, False, True)
    tensors = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    found = described(tensors)
    assert (found.naming, found.layers, found.unknown) == ("kohya", kind, ())
    assert found.decomposed == (arguments == {"algo": "loha", "dora_wd": "True"})
    if found.is_plain:
        return
    # what the message proposes makes a network that the file fits
    words = found.made_by.removeprefix("--network_module lycoris.kohya --network_args ").split()
    proposed = dict(word.split("=") for word in words)
    assert proposed == {name: value for name, value in arguments.items() if name != "factor"}
    report = foreign(network).load(AdapterFile.of(tensors, "x"))
    assert (report.missing, report.unexpected, report.mismatched) == ((), (), ())


def test_the_metadata_of_lycoris_says_how_a_file_was_made(tmp_path: Path) -> None:
    loha = ADAPTERS["LoHa"][0]
    metadata = {"ss_network_module": "lycoris.kohya", "ss_network_dim": "8", "ss_network_alpha": "4.0"}
    metadata["ss_network_args"] = '{"algo": "loha", "preset": "full"}'
    made = "--network_module lycoris.kohya --network_dim 8 --network_alpha 4.0 --network_args algo=loha preset=full"
    assert described(loha, metadata).made_by == made
    usual = "--network_module lycoris.kohya --network_args algo=loha"
    for changes in ({"ss_network_module": "networks.lora"}, {"ss_network_module": "x y"}):
        assert described(loha, metadata | changes).made_by == usual
    assert described(loha, metadata | {"ss_network_args": "[" * 100}).made_by.endswith("--network_alpha 4.0")
    assert described(loha, metadata | {"ss_network_args": "[" * 9999}).made_by == usual
    save_file(loha, tmp_path / "x.safetensors", metadata)
    own = ADAPTERS["T-LoRA"][0]  # a kind that LyCORIS alone has
    save_file(own, tmp_path / "x.safetensors", {**metadata, "ss_network_args": '{"algo": "tlora"}'})
    message = said(lambda: check(tmp_path / "x.safetensors", purpose="is trained by networks.lora"))
    made = "--network_module lycoris.kohya --network_dim 8 --network_alpha 4.0 --network_args algo=tlora"
    assert message.endswith(f"which no kind of adapter here reads. LyCORIS trains it: {made}")
    assert described(ADAPTERS["DoRA of PEFT"][0]).made_by == ""  # LyCORIS reads its own names only


def test_lycoris_refuses_a_file_of_another_kind_by_name(tmp_path: Path) -> None:
    class Other(nn.Module):
        def state_dict(self, *_args: Any, **_kwargs: Any) -> dict[str, torch.Tensor]:
            return PAIR

    assert said(lambda: foreign(Other()).load(AdapterFile.of(ADAPTERS["LoHa"][0], "x"))) == (
        "--network_weights x is a LoHa, and the network here is a LoRA. It goes with --network_module lycoris.kohya "
        "--network_args algo=loha"
    )
