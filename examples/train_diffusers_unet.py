"""Trains a LoRA on a diffusers UNet with peft and CustomAdamW, in a plain loop: what a script of your own needs.

    python examples/train_diffusers_unet.py
    python examples/train_diffusers_unet.py --base runwayml/stable-diffusion-v1-5 --images my_images --size 512 \
        --learning_rate 1e-4 --steps 1000 --save_to my_lora

Images lie in train/ and validation/ as .png, each with its caption in a .txt file beside it. By default the
quickstart's tiny model and images are used. `train_network.py` does all of this and much more; this shows the optimizer
alone.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image, ImageOps
from transformers import CLIPTextModel, CLIPTokenizer, get_scheduler

from library.errors import UserError
from library.optimizers import CustomAdamW, preset_arguments

QUICKSTART = Path(__file__).parents[1] / "quickstart"


class Frozen:
    """The parts of the model that are not trained."""

    def __init__(self, base: str) -> None:
        self.tokenizer = CLIPTokenizer.from_pretrained(base, subfolder="tokenizer")
        self.text_encoder = CLIPTextModel.from_pretrained(base, subfolder="text_encoder").float().eval()
        self.vae = AutoencoderKL.from_pretrained(base, subfolder="vae").float().eval()
        self.noise = DDPMScheduler.from_pretrained(base, subfolder="scheduler")
        if (kind := self.noise.config.prediction_type) != "epsilon":
            raise UserError(f"--base {base}: predicts {kind}; models are trained here that predict epsilon")

    @torch.no_grad()
    def encode(self, folder: Path, *, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The latents [n, 4, h, w] of all images of a folder, and the states [n, tokens, width] of their captions.
        Raises UserError if there are none."""
        paths = sorted(folder.glob("*.png"))
        lacking = [path.with_suffix(".txt") for path in paths if not path.with_suffix(".txt").is_file()]
        if lacking or not paths:
            raise UserError(f"{lacking[0]}: no such caption" if lacking else f"--images: there is no .png in {folder}")
        pictures = (ImageOps.exif_transpose(Image.open(path)).convert("RGB") for path in paths)
        pixels = [np.asarray(picture.resize((size, size)), np.float32) for picture in pictures]
        images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2) / 127.5 - 1
        captions = [path.with_suffix(".txt").read_text(encoding="utf-8").strip() for path in paths]
        tokens = self.tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
        latents = torch.cat([self.vae.encode(part).latent_dist.mean for part in images.split(8)])
        return latents * self.vae.config.scaling_factor, self.text_encoder(tokens).last_hidden_state

    def loss(self, unet: UNet2DConditionModel, latents: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
        """The mean squared error of the predicted noise, at noise levels that are drawn."""
        noise = torch.randn_like(latents)
        steps = torch.randint(self.noise.config.num_train_timesteps, (len(latents),))
        noisy = self.noise.add_noise(latents, noise, steps)
        return (unet(noisy, steps, texts).sample - noise).square().mean()


def main(argv: list[str] | None = None) -> tuple[float, float]:
    """Train; the loss on images that were held out, before and after."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default=str(QUICKSTART / "base"), help="a diffusers model that predicts noise")
    parser.add_argument("--images", type=Path, default=QUICKSTART / "images")
    parser.add_argument("--size", type=int, default=64, help="pixels of a side")
    parser.add_argument("--preset", nargs="*", default=["stable_diffusion_lora"])
    parser.add_argument("--learning_rate", type=float, default=1e-3, help="the preset's is for bases of full size")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--save_to", help="a folder for the LoRA, in diffusers' names")
    wanted = parser.parse_args(argv)
    torch.manual_seed(0)

    frozen = Frozen(wanted.base)
    latents, texts = frozen.encode(wanted.images / "train", size=wanted.size)
    other_latents, other_texts = frozen.encode(wanted.images / "validation", size=wanted.size)
    unet = UNet2DConditionModel.from_pretrained(wanted.base, subfolder="unet").float().requires_grad_(False)
    unet.add_adapter(LoraConfig(r=16, lora_alpha=8, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))

    # with their names, by which it finds the LoRA pairs; 8 bits of state are its default
    trained = [(name, parameter) for name, parameter in unet.named_parameters() if parameter.requires_grad]
    optimizer = CustomAdamW(trained, **{**preset_arguments(*wanted.preset), "lr": wanted.learning_rate})
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=wanted.steps // 20, num_training_steps=wanted.steps)

    @torch.no_grad()
    def held_out_loss() -> float:
        state = torch.get_rng_state()
        torch.manual_seed(1)  # the same noise each time
        loss = frozen.loss(unet, other_latents, other_texts).item()
        torch.set_rng_state(state)
        return loss

    before = held_out_loss()
    for step in range(1, wanted.steps + 1):
        chosen = torch.randint(len(latents), (wanted.batch_size,))
        loss = frozen.loss(unet, latents[chosen], texts[chosen])
        loss.backward()
        torch.nn.utils.clip_grad_norm_([parameter for _, parameter in trained], 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            decay = optimizer.get_optimization_info()["weight_decay"][0]
            print(f"step {step}: loss {loss.item():.4f}, weight decay {decay:.4f}")
    after = held_out_loss()
    print(f"held-out loss {before:.4f} before, {after:.4f} after")
    if wanted.save_to:
        layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(unet))
        StableDiffusionPipeline.save_lora_weights(wanted.save_to, unet_lora_layers=layers)
    return before, after


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
