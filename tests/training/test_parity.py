"""The first step against a loop in plain torch that shares no code with ours but the keyed random numbers."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from PIL import Image
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer

from library import rng
from library.config.parser import parse
from library.run.build import build
from library.run.plan import make_plan
from library.training import loop
from tests.conftest import BASE


class PlainLoRA(nn.Module):
    """Adds up(down(x)) * scale to a layer's output."""

    def __init__(self, layer: nn.Module, down: torch.Tensor, up: torch.Tensor, scale: float) -> None:
        super().__init__()
        self.forward_before, self.scale = layer.forward, scale
        self.down, self.up = nn.Parameter(down.clone()), nn.Parameter(up.clone())
        self.apply_to = nn.functional.conv2d if down.ndim == 4 else nn.functional.linear
        layer.forward = self.forward

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_before(x) + self.apply_to(self.apply_to(x, self.down), self.up) * self.scale


@pytest.fixture
def first_step(image_folder, tmp_path):
    """Our run before its first step: the built run and the step's batch."""
    words = (
        *("--pretrained_model_name_or_path", str(BASE), "--train_data_dir", str(image_folder)),
        *("--caption_extension", ".txt", "--resolution", "64", "--train_batch_size", "3", "--cache_latents"),
        *("--output_dir", str(tmp_path / "out"), "--network_dim", "4", "--network_alpha", "2"),
        *("--learning_rate", "1e-3", "--max_train_steps", "1", "--seed", "3", "--max_grad_norm", "0"),
    )
    run = build(make_plan(parse(list(words))))
    for name, parameter in run.network.named_parameters():  # at the start up = 0, and the gradient of down with it
        if "lora_up" in name:
            torch.nn.init.normal_(parameter, std=0.02, generator=torch.Generator().manual_seed(len(name)))
    return run, next(loop.step_batches(run)).batches[0]


def test_the_vae_is_given_back_once_the_latents_are_cached(first_step):
    run, _ = first_step
    assert "vae" not in run.family.components
    assert run.family.components.have_text_encoders, "it is trained, so it stays"


def plain_loss_and_gradients(run, batch):
    unet = UNet2DConditionModel.from_pretrained(BASE, subfolder="unet", dtype=torch.float32)
    text_encoder = CLIPTextModel.from_pretrained(BASE, subfolder="text_encoder", dtype=torch.float32)
    vae = AutoencoderKL.from_pretrained(BASE, subfolder="vae", dtype=torch.float32)
    tokenizer = CLIPTokenizer.from_pretrained(BASE / "tokenizer")
    scheduler = DDPMScheduler.from_pretrained(BASE, subfolder="scheduler")
    for model in (unet, text_encoder, vae):
        model.requires_grad_(False)

    adapters = {}
    state = run.network.state_dict()
    for prefix, root, inner in (("lora_unet_", unet, ""), ("lora_te_", text_encoder, "text_model.")):
        for path, layer in list(root.named_modules()):
            name = prefix + (inner * (not path.startswith(inner)) + path).replace(".", "_")
            if f"{name}.lora_down.weight" in state:
                pair = (state[f"{name}.lora_down.weight"], state[f"{name}.lora_up.weight"])
                adapters[name] = PlainLoRA(layer, *pair, scale=2 / 4)

    pixels, noise, vae_noise, timesteps = [], [], [], []
    for sample, epoch, repeat in batch.samples:
        image = torch.tensor(list(Image.open(sample.path).convert("RGB").tobytes()), dtype=torch.float32)
        pixels.append(image.view(64, 64, 3).permute(2, 0, 1) / 127.5 - 1)
        key = (run.seed, epoch, repeat, sample.key)
        noise.append(torch.randn(4, 16, 16, generator=rng.torch_generator(*key, "noise")))
        vae_noise.append(torch.randn(4, 16, 16, generator=rng.torch_generator(*key, "vae")))
        timesteps.append(torch.randint(0, 1000, (), generator=rng.torch_generator(*key, "timestep")))
    distribution = vae.encode(torch.stack(pixels)).latent_dist
    latents = (distribution.mean + distribution.std * torch.stack(vae_noise)) * vae.config.scaling_factor
    captions = [sample.caption for sample, _, _ in batch.samples]
    tokens = tokenizer(captions, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    noise, t = torch.stack(noise), torch.stack(timesteps)
    prediction = unet(scheduler.add_noise(latents, noise, t), t, text_encoder(tokens)[0]).sample
    loss = nn.functional.mse_loss(prediction, noise)
    loss.backward()
    return loss.item(), adapters


def test_first_loss_and_gradients_are_the_plain_loops(first_step):
    run, batch = first_step
    loss = loop.backward(run, batch, weight=1.0).item()
    plain_loss, adapters = plain_loss_and_gradients(run, batch)
    assert loss == pytest.approx(plain_loss, rel=1e-5)
    # every adapter of ours was found in the plain model, in both parts
    assert len(adapters) == sum(run.network.counts().values())
    pairs = {}
    for name, adapter in adapters.items():
        ours = run.network.get_submodule(name)
        pairs[f"{name}.down"] = (ours.lora_down.weight.grad, adapter.down.grad)
        pairs[f"{name}.up"] = (ours.lora_up.weight.grad, adapter.up.grad)
    assert relative_distance(*(torch.cat([pair[i].flatten() for pair in pairs.values()]) for i in (0, 1))) < 1e-5
    # a single layer's gradient can be small beside the rounding of what it is computed from
    far = {name: relative_distance(*pair) for name, pair in pairs.items() if relative_distance(*pair) > 1e-4}
    assert not far


def relative_distance(ours: torch.Tensor, plain: torch.Tensor) -> float:
    return ((ours - plain).norm() / plain.norm().clamp(min=1e-12)).item()
