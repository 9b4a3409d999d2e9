"""kohya's side of `benchmarks.kohya_beside`, which runs this file as a program of its own.

Both projects call their package `library`, so they cannot be in one process. This one imports kohya's modules out of
his checkout and nothing of ours; files in a folder go between the two. It needs the packages of kohya's
requirements.txt; torchvision may be missing, as nothing here transforms images.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, TypeAlias
from unittest.mock import MagicMock

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

Models: TypeAlias = "tuple[list[nn.Module], nn.Module]"
"""Text encoders, and the transformer."""
CPU = torch.device("cpu")
CHUNK = 1000  # draws at a time
# What his scripts' options are by default, but for the prediction, which is raw, and the guidance, which is 1
DEFAULTS = {
    "timestep_sampling": "sigmoid",
    "sigmoid_scale": 1.0,
    "weighting_scheme": "uniform",
    "logit_mean": 0.0,
    "logit_std": 1.0,
    "mode_scale": 1.29,
    "discrete_flow_shift": 3.0,
    "ip_noise_gamma": None,
    "ip_noise_gamma_random_strength": False,
    "guidance_scale": 1.0,
    "model_prediction_type": "raw",
    "apply_t5_attn_mask": False,
    "gradient_checkpointing": False,
    "loss_type": "l2",
    "huber_schedule": "constant",
    "huber_c": 0.1,
    "huber_scale": 1.0,
    "masked_loss": False,
    "weighted_captions": False,
    "full_fp16": False,
    "vae_batch_size": None,
    "cache_text_encoder_outputs": False,
}


def of_kohya(name: str) -> Any:
    """One of his modules."""
    return importlib.import_module(name)


def prepare(sd_scripts: Path) -> None:
    """Make his modules importable, with a stand-in for torchvision where it is missing."""
    import diffusers
    import transformers

    # both look for torchvision when they are imported first, and would take a stand-in for the true one
    assert hasattr(diffusers, "AutoencoderKL")
    assert hasattr(transformers, "CLIPTextModel")
    if importlib.util.find_spec("torchvision") is None:
        stand_in: Any = MagicMock(name="torchvision")
        stand_in.__spec__ = None
        stand_in.transforms.functional.resize = of_that_size
        sys.modules["torchvision"] = stand_in
        sys.modules["torchvision.transforms"] = stand_in.transforms
        sys.modules["torchvision.transforms.functional"] = stand_in.transforms.functional
    sys.path.insert(0, str(sd_scripts))
    package = of_kohya("library")
    assert Path(package.__file__ or "").is_relative_to(sd_scripts), f"library is {package.__file__}"


def of_that_size(images: Tensor, size: Sequence[int], **settings: object) -> Tensor:
    """torchvision's `resize` where there is nothing to do: kohya's Anima resizes a mask that has the size already."""
    assert images.shape[-2:] == tuple(size), (images.shape, size)
    return images


class Peer:
    """What both families share: a step of his trainer, adapters, and draws of levels.

    folder: with settings.json and inputs.safetensors, and where the results go.
    """

    trainer: Any
    network: ModuleType

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.settings: dict[str, Any] = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
        self.inputs = load_file(folder / "inputs.safetensors")
        self.found: dict[str, Tensor] = {}
        self.utilities = of_kohya("library.flux_train_utils")
        self.scheduler = of_kohya("library.sd3_train_utils").FlowMatchEulerDiscreteScheduler(
            num_train_timesteps=1000, shift=DEFAULTS["discrete_flow_shift"]
        )
        self.accelerator = SimpleNamespace(device=CPU, autocast=contextlib.nullcontext)

    # -- of each family

    def models(self) -> Models:
        """New ones: the text encoders and the transformer."""
        raise NotImplementedError

    def tokenize(self) -> Any:
        """The strategy that makes tokens of captions."""
        raise NotImplementedError

    def encode(self, **options: bool) -> Any:
        """The strategy that makes states of tokens."""
        raise NotImplementedError

    def texts(self) -> None:
        """The states of the captions."""
        raise NotImplementedError

    # -- shared

    def step(self, models: Models, network: Any = None, **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a batch from its captions on, and its "levels", "noise" and "answer"."""
        encoders, transformer = models
        args = argparse.Namespace(**{**DEFAULTS, **options})
        masked = {"apply_t5_attn_mask": True} if args.apply_t5_attn_mask else {}
        drawn = self.utilities.get_noisy_model_input_and_timesteps
        seen: dict[str, Tensor] = {}

        def recorded(args: Any, scheduler: Any, latents: Tensor, noise: Tensor, *more: Any) -> Any:
            found = drawn(args, scheduler, latents, noise, *more)
            seen.update(noise=noise, levels=found[2].flatten())
            return found

        predicted = self.trainer.get_noise_pred_and_target

        def answered(*words: Any, **named: Any) -> Any:
            found = predicted(*words, **named)
            seen["answer"] = found[0]
            return found

        batch = {
            "latents": self.inputs["latents"],
            "captions": self.settings["captions"],
            "input_ids_list": self.tokenize().tokenize(self.settings["captions"]),
            "loss_weights": torch.ones(len(self.settings["captions"])),
        }
        self.utilities.get_noisy_model_input_and_timesteps = recorded
        self.trainer.get_noise_pred_and_target = answered
        torch.manual_seed(self.settings["seed"])
        try:
            loss: Tensor = self.trainer.process_batch(
                *(batch, encoders, transformer, network, None, self.scheduler, torch.float32, torch.float32),
                *(self.accelerator, args, self.encode(**masked), self.tokenize()),
            )
        finally:
            self.utilities.get_noisy_model_input_and_timesteps = drawn
            self.trainer.get_noise_pred_and_target = predicted
        return loss, seen

    def losses(self) -> None:
        """Without an adapter: of each kind of loss, and the base's answer."""
        models = self.models()
        with torch.no_grad():
            self.found["loss"], seen = self.step(models)
            self.found |= seen
            for kind, schedule in self.settings["losses"]:
                found, _ = self.step(models, loss_type=kind, huber_schedule=schedule)
                self.found[f"loss.{kind}.{schedule}"] = found
            if self.settings["masks"]:
                self.found["loss.masked"], seen = self.step(models, apply_t5_attn_mask=True)
                self.found["answer.masked"] = seen["answer"]

    def adapters(self) -> None:
        """Of the same weights: from a file of ours, and a new one of his with random weights, which he writes."""
        encoders, transformer = models = self.models()
        network, states = self.network.create_network_from_weights(
            1.0, str(self.folder / "ours.safetensors"), None, encoders, transformer
        )
        network.apply_to(encoders, transformer, True, True)
        report = network.load_state_dict(states, strict=False)
        assert not report.missing_keys, report
        assert not report.unexpected_keys, report
        self.gradients("ours", network, models)
        encoders, transformer = models = self.models()
        rank, alpha = self.settings["rank"], self.settings["alpha"]
        network = self.network.create_network(1.0, rank, alpha, None, encoders, transformer)
        network.apply_to(encoders, transformer, True, True)
        generator = torch.Generator().manual_seed(11)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * self.settings["spread"])
        self.gradients("own", network, models)
        network.save_weights(str(self.folder / "own.safetensors"), None, {})

    def gradients(self, name: str, network: Any, models: Models) -> None:
        """`{name}.loss` and `{name}.gradient.KEY` of a network on these models."""
        network.requires_grad_(True)
        loss, _ = self.step(models, network)
        loss.backward()
        self.found[f"{name}.loss"] = loss.detach()
        for key, parameter in network.named_parameters():
            assert parameter.grad is not None, f"{key} has no gradient"
            self.found[f"{name}.gradient.{key}"] = parameter.grad

    def levels(self) -> None:
        """`levels.NAME` [N] for each way of drawing them, and the times that the transformer is told in bf16."""
        rows, columns = self.settings["drawn_for"]
        for name, options in self.settings["ways"].items():
            args = argparse.Namespace(**{**DEFAULTS, **options})
            scheduler = type(self.scheduler)(num_train_timesteps=1000, shift=args.discrete_flow_shift)
            torch.manual_seed(self.settings["seed"])
            parts = []
            for _ in range(self.settings["draws"] // CHUNK):
                latents = torch.zeros(CHUNK, 1, rows, columns)
                parts.append(self.drawn(args, scheduler, latents, torch.float32)[1].flatten())
            self.found[f"levels.{name}"] = torch.cat(parts)
        args = argparse.Namespace(**DEFAULTS)
        times, levels = self.drawn(args, self.scheduler, torch.zeros(CHUNK, 1, 2, 2), torch.bfloat16)
        self.found["told in bf16"] = times.float() / 1000 - levels.flatten()

    def drawn(self, args: Any, scheduler: Any, latents: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        found = self.utilities.get_noisy_model_input_and_timesteps(args, scheduler, latents, latents, CPU, dtype)
        return found[1], found[2]

    def run(self) -> None:
        """All of it, into kohya.safetensors."""
        with torch.no_grad():
            self.texts()
        self.losses()
        self.adapters()
        with torch.no_grad():
            self.levels()
        save_file({name: tensor.contiguous() for name, tensor in self.found.items()}, self.folder / "kohya.safetensors")


class FluxPeer(Peer):
    """FLUX.1."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.network = of_kohya("networks.lora_flux")
        self.trainer = of_kohya("flux_train_network").FluxNetworkTrainer()
        self.strategies = of_kohya("library.strategy_flux")
        self.tokens = self.strategies.FluxTokenizeStrategy(
            self.settings["tokens"], tokenizer_cache_dir=str(folder / "tokenizers")
        )
        configs = of_kohya("library.flux_models").configs
        configs["dev"] = replace(configs["dev"], params=replace(configs["dev"].params, **self.settings["transformer"]))

    def models(self) -> Models:
        from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

        files, made = self.settings["files"], []
        for option, kind, config in (
            ("clip_l", CLIPTextModel, CLIPTextConfig(**self.settings["text_encoder"])),
            ("t5xxl", T5EncoderModel, T5Config(**self.settings["text_encoder_2"])),
        ):
            encoder = kind(config)
            filled(encoder, load_file(files[option]), known_buffers=("position_ids",))
            made.append(encoder)
        schnell, transformer = of_kohya("library.flux_utils").load_flow_model(files["model"], torch.float32, "cpu")
        assert not schnell
        states = load_file(files["model"])
        assert all(torch.equal(tensor, states.pop(name)) for name, tensor in transformer.state_dict().items())
        assert not states, f"kohya's model has no {sorted(states)}"
        return made, transformer.eval().requires_grad_(False)

    def tokenize(self) -> Any:
        return self.tokens

    def encode(self, **options: bool) -> Any:
        return self.strategies.FluxTextEncodingStrategy(options.get("apply_t5_attn_mask", False))

    def texts(self) -> None:
        encoders, _ = self.models()
        tokens = self.tokens.tokenize(self.settings["captions"])
        for name, masked in (("", False), (".masked", True)):
            strategy = self.encode(apply_t5_attn_mask=masked)
            pooled, states, *_ = strategy.encode_tokens(self.tokens, encoders, tokens)
            self.found |= {f"pooled{name}": pooled, f"states{name}": states}


class AnimaPeer(Peer):
    """Anima."""

    def __init__(self, folder: Path) -> None:
        from transformers import PreTrainedTokenizerFast

        super().__init__(folder)
        self.network = of_kohya("networks.lora_anima")
        self.trainer = of_kohya("anima_train_network").AnimaNetworkTrainer()
        strategies = of_kohya("library.strategy_anima")
        qwen3, t5 = (
            PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizers" / name / "tokenizer.json"), pad_token=pad)
            for name, pad in self.settings["pads"].items()
        )
        self.tokens = strategies.AnimaTokenizeStrategy(qwen3, t5, *([self.settings["tokens"]] * 2))
        self.strategy = strategies.AnimaTextEncodingStrategy()

    def models(self) -> Models:
        from transformers import Qwen3Config, Qwen3Model

        files, anima = self.settings["files"], of_kohya("library.anima_models")
        encoder = Qwen3Model(Qwen3Config(**self.settings["text_encoder"], use_cache=False))
        states = load_file(files["qwen3"])
        filled(encoder, {name.removeprefix("model."): tensor for name, tensor in states.items()})
        sizes = self.settings["llm_adapter"]
        transformer = anima.Anima(**self.settings["transformer"], use_llm_adapter=False)
        embedding = nn.Embedding(sizes.pop("vocabulary"), sizes["target_dim"])
        transformer.llm_adapter = anima.LLMAdapter(**sizes, embed=embedding, self_attn=True)
        sizes["vocabulary"] = embedding.num_embeddings
        transformer.use_llm_adapter = True
        states = {name.removeprefix("net."): tensor for name, tensor in load_file(files["model"]).items()}
        states = {name: tensor for name, tensor in states.items() if not name.startswith("pos_embedder.")}
        filled(transformer, states, known_buffers=("pos_embedder.", "inv_freq"))
        return [encoder], transformer

    def tokenize(self) -> Any:
        return self.tokens

    def encode(self, **options: bool) -> Any:
        return self.strategy

    def texts(self) -> None:
        encoders, transformer = self.models()
        tokens = self.tokens.tokenize(self.settings["captions"])
        states, seen, ids, wanted = self.strategy.encode_tokens(self.tokens, encoders, tokens)
        self.found["states"] = transformer._preprocess_text_embeds(states, ids, wanted, seen)  # type: ignore[operator]

    def losses(self) -> None:
        super().losses()
        vae = of_kohya("library.qwen_image_autoencoder_kl").AutoencoderKLQwenImage(**self.settings["vae"])
        filled(vae, load_file(self.settings["files"]["vae"]))
        with torch.no_grad():
            self.found["latents"] = vae.encode_pixels_to_latents(self.inputs["pixels"])


def filled(module: nn.Module, states: Mapping[str, Tensor], known_buffers: Sequence[str] = ()) -> None:
    """Fill a module that is then frozen; buffers of these names may be missing in the file, and nothing else."""
    report = module.load_state_dict(dict(states), strict=False)
    missing = [name for name in report.missing_keys if not any(known in name for known in known_buffers)]
    assert not missing, f"missing: {missing}"
    assert not report.unexpected_keys, f"unknown: {report.unexpected_keys}"
    module.eval().requires_grad_(False)


def main() -> None:
    sd_scripts, folder, family = sys.argv[1:]
    torch.set_num_threads(1)
    prepare(Path(sd_scripts).resolve())
    {"flux": FluxPeer, "anima": AnimaPeer}[family](Path(folder)).run()


if __name__ == "__main__":
    main()
