"""What the tests of adapters share: a toy model, the paths to adapt, random weights."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import networks
from library.models.checkpoints.base_model import BaseModel as BaseFiles
from library.models.checkpoints.base_model import Part
from library.models.family import AdapterTargets, ModelFamily
from library.models.opening import open_family
from library.models.stable_diffusion_xl import StableDiffusionXL
from networks import kinds
from networks.create import create, create_from_file
from networks.files import AdapterFile, read
from networks.foreign import BaseModel, ForeignNetwork
from networks.network import Network
from networks.settings import Asked
from networks.tools.convert import convert
from tests.flow_families import FLOW
from tests.quick import quick

BASE = Path(__file__).parents[2] / "quickstart" / "base"
MADE_UP = Path(__file__).parent / "made_up"


class Toy(nn.Module):
    """[B, 4, 8, 8] to [B, 6]: each kind of layer that adapters know, with paths like a UNet's."""

    def __init__(self) -> None:
        super().__init__()
        self.downsamplers = nn.ModuleList([nn.Conv2d(4, 8, 3, stride=2, padding=1)])
        self.resnets = nn.ModuleList([nn.Linear(8, 8)])
        attention = {"proj_in": nn.Conv2d(8, 8, 1), "to_q": nn.Linear(8, 6)}
        self.attentions = nn.ModuleList(
            [nn.ModuleDict(attention | {"norm": nn.GroupNorm(2, 8), "norm1": nn.LayerNorm(8)})]
        )
        self.conv_out = nn.Linear(6, 6)  # never adapted
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.downsamplers[0](x)
        hidden = hidden + self.resnets[0](hidden.mean((2, 3)))[:, :, None, None]
        attention = self.attentions[0]
        tokens = attention["proj_in"](attention["norm"](hidden)).flatten(2).transpose(1, 2)
        return self.conv_out(attention["to_q"](attention["norm1"](tokens))).mean(1)


def unet_targets(unet: nn.Module) -> AdapterTargets:
    return AdapterTargets(
        part="unet",
        prefix="lora_unet",
        root=unet,
        linear=re.compile(r"(.*\.)?attentions\..*"),
        conv=re.compile(r"(.*\.)?(resnets|downsamplers|upsamplers)\..*"),
        name=lambda path: path,
    )


def text_targets(text_encoder: nn.Module, prefix: str = "lora_te") -> AdapterTargets:
    return AdapterTargets(
        part="text_encoder",
        prefix=prefix,
        root=text_encoder,
        linear=re.compile(r".*\.(self_attn|mlp)\..*"),
        conv=re.compile(r"(?!)"),
        name=lambda path: f"text_model.{path}",  # transformers 5 leaves it out of the paths
    )


def sd_family(unet: nn.Module, text_encoder: nn.Module) -> ModelFamily:
    """The Stable Diffusion family with these modules as its own, whatever their size."""
    family = open_family(str(BASE))
    family.components["denoiser"], family.components["text_encoder"] = unet, text_encoder
    return family


def sdxl_family(config: Path, unet: nn.Module, *text_encoders: nn.Module) -> ModelFamily:
    """The family SDXL of the size that `config` (as assets/sdxl.json) has, with these modules as its own."""
    asset = json.loads(config.read_text())
    names = {"denoiser": "unet", "vae": "vae", "text_encoder": "text_encoder", "text_encoder_2": "text_encoder_2"}
    parts = {name: Part(asset[folder], name, dict) for name, folder in names.items()}
    base = BaseFiles("sdxl", "x", config, parts, asset["scheduler"], config, {}, "epsilon", "x")
    family = StableDiffusionXL(base)
    family.components["denoiser"] = unet
    for name, encoder in zip(family.components.text_encoders, text_encoders, strict=False):
        family.components[name] = encoder
    return family


def sdxl_outputs(family: ModelFamily) -> tuple[Tensor, Tensor, Tensor]:
    """What an SDXL's text encoders and UNet answer to a fixed prompt and noise."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        texts = family.encode_prompts(["a cat", "a dog, at night"])
        sizes: dict[str, Any] = {"original_sizes": [(96, 64), (64, 64)], "crops": [(16, 0), (0, 0)]}
        condition = family.condition(texts, **sizes, target_size=(64, 64))
        noisy = torch.randn(2, 4, 8, 8, generator=generator)
        answer = family.predict(noisy, torch.tensor([20, 800]), condition)
    return texts["hidden_states"], texts["pooled"], answer


CAPTIONS, LEVELS = ["emoji of cat", "a dog"], torch.tensor([0.3, 0.8])
FLOW_BOUND = 1e-5
"""Largest difference of an output, relative to the largest output, in fp32: the order of multiplications differs."""


def flow_family(name: str, folder: Path) -> Any:
    """The tiny model of a row of FLOW, loaded."""
    option, tokens = FLOW[name].length
    family = open_family(str(folder), options={option: tokens} if option else None)
    family.components.load_all(family.PARTS, torch.float32, "cpu")
    return family


def flow_noise(family: ModelFamily) -> Tensor:
    """[2, C, H, W] of images of 64 pixels a side."""
    side = 64 // family.latents.factor
    return torch.randn(2, family.latents.channels, side, side, generator=torch.Generator().manual_seed(1))


def flow_outputs(family: ModelFamily) -> tuple[Tensor, ...]:
    """The answer to fixed prompts and noise, and what there is of the texts where their encoders are trained."""
    sizes: Any = {"original_sizes": [(64, 64)] * 2, "crops": [(0, 0)] * 2, "target_size": (64, 64)}
    with torch.no_grad():
        texts = family.encode_prompts(CAPTIONS)
        answer = family.predict(flow_noise(family), LEVELS, family.condition(texts, **sizes))
    return answer, *(texts[name] for name in FLOW[family.NAME].trained_texts)


def sd_targets(unet: nn.Module, text_encoder: nn.Module) -> list[AdapterTargets]:
    return sd_family(unet, text_encoder).adapter_targets()


def lora(
    dim: int | None,
    alpha: float | None,
    *,
    targets: list[AdapterTargets],
    seed: int | None = None,
    neuron_dropout: float | None = None,
    **arguments: Any,
) -> Network:
    """A network of `networks.lora`; `arguments`: as of --network_args."""
    return create("lora", targets, Asked(dim=dim, alpha=alpha, dropout=neuron_dropout, seed=seed), arguments)


def lora_from_file(
    file: str | Path | AdapterFile,
    *,
    targets: list[AdapterTargets],
    multiplier: float = 1.0,
    neuron_dropout: float | None = None,
    **arguments: Any,
) -> Network:
    """A network of `networks.lora` with the layers, ranks and alphas of a file."""
    if not isinstance(file, AdapterFile):
        file = read(file, purpose="is trained by networks.lora")
    return create_from_file("lora", file, targets, Asked(dropout=neuron_dropout), arguments, multiplier=multiplier)


@contextmanager
def made_up_kind() -> Iterator[str]:
    """A context in which there is a second kind: `made_up/diagonal.py` lies in networks/, and KINDS has a line more."""
    networks.__path__.append(str(MADE_UP))
    kinds.KINDS["diagonal"] = "networks.diagonal.Diagonal"
    try:
        yield "diagonal"
    finally:
        del kinds.KINDS["diagonal"]
        networks.__path__.remove(str(MADE_UP))


def foreign(network: nn.Module, text_encoder: Any = None, unet: Any = None) -> ForeignNetwork:
    """Another package's network behind our protocol."""
    return ForeignNetwork(network, BaseModel(None, text_encoder, unet, unet))


def every_kind(*chosen: str) -> list[Any]:
    """All kinds for `parametrize`, the chosen in `make test`."""
    return quick(kinds.KINDS, *chosen)


def randomize(network: nn.Module, scale: float = 0.05) -> None:
    """Give every parameter values, so that the network does something."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)


def outputs(unet: nn.Module, text_encoder: nn.Module) -> tuple[Tensor, Tensor]:
    """What the small base's text encoder and UNet answer to a fixed prompt and noise."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        condition = text_encoder(torch.tensor([[49406, 320, 1125, 539, 320, 2368, 49407]])).last_hidden_state
        noisy = torch.randn(2, 4, 16, 16, generator=generator)
        return condition, unet(noisy, torch.tensor([20, 800]), condition.expand(2, -1, -1)).sample


def difference(actual: Tensor, expected: Tensor) -> float:
    """The largest, relative to the largest expected value."""
    return ((actual - expected).abs().max() / expected.abs().max()).item()


Outputs = Callable[[Any], tuple[Tensor, ...]]


def trained(family: ModelFamily, outputs: Outputs, file: Path, naming: str, *parts: str) -> tuple[Tensor, ...]:
    """The `outputs` of a model of a whole family with a network that is saved to `file`, and taken off again."""
    network = lora(3, 2.0, targets=family.adapter_targets(*parts))
    network.naming = naming  # type: ignore[assignment]
    network.attach()
    randomize(network, 0.2)
    answer = outputs(family)
    network.save(str(file), None, {"ss_network_module": "networks.lora"})
    network.detach()
    return answer


def check_reading(family: ModelFamily, outputs: Outputs, file: Path, naming: str, *, bound: float) -> AdapterFile:
    """A file of such a network acts as it did, read back. Returns what was read."""
    base = outputs(family)
    expected = trained(family, outputs, file, naming)
    assert all(difference(now, before) > 0.02 for now, before in zip(expected, base, strict=True))
    content = read(file)
    network = lora_from_file(content, targets=family.adapter_targets())
    network.attach()
    report = network.load(content)
    assert (report.missing, report.unexpected) == ((), ())
    found = outputs(family)
    network.detach()
    for now, before in zip(found, expected, strict=True):
        assert difference(now, before) < bound
    return content


def check_conversion(folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """kohya.safetensors in `folder` becomes diffusers.safetensors and then itself. Returns the tensors of both."""
    convert(folder / "kohya.safetensors", folder / "diffusers.safetensors", to="diffusers")
    convert(folder / "diffusers.safetensors", folder / "again.safetensors", to="kohya")
    before, between, after = (load_file(folder / f"{name}.safetensors") for name in ("kohya", "diffusers", "again"))
    assert before.keys() == after.keys()
    for key in before:
        if key.endswith("lora_up.weight"):  # diffusers' names have no alpha: the scale went into these
            scale = before[key.replace("lora_up.weight", "alpha")] / before[key].shape[1]
            torch.testing.assert_close(after[key], before[key] * scale, rtol=1e-6, atol=0)
    return before, between


def load_in_diffusers(
    pipeline: Any, file: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> list[str]:
    """Load an adapter file into diffusers' pipeline. Returns what is said of LoRAs meanwhile."""
    for library in ("diffusers", "transformers", "peft"):
        monkeypatch.setattr(logging.getLogger(library), "propagate", True)
    with caplog.at_level(logging.WARNING):
        pipeline.load_lora_weights(str(file.parent), weight_name=file.name)
    return [record.getMessage() for record in caplog.records if "lora" in record.getMessage().lower()]


def adapted(*parts: nn.Module) -> int:
    """The number of layers of these on which peft has put an adapter."""
    return sum(hasattr(module, "lora_A") for part in parts for module in part.modules())


def numbered(layers: Iterable[tuple[str, Any]]) -> dict[str, Tensor]:
    """The tensors of a LoRA of rank 1 under kohya's names, each of another number: of (name, layer)."""
    tensors = {}
    for number, (name, layer) in enumerate(layers):
        rows, columns = layer.weight.shape
        tensors[f"{name}.lora_down.weight"] = torch.full((1, columns), float(number))
        tensors[f"{name}.lora_up.weight"] = torch.full((rows, 1), float(number + 1))
        tensors[f"{name}.alpha"] = torch.tensor(1.0)
    return tensors
