"""kohya's sd-scripts beside this project: texts, answers, losses, gradients and noise levels of FLUX.1 and Anima.

    python -m benchmarks.kohya_beside --sd_scripts ~/sd-scripts                       # two minutes of one core
    python -m benchmarks.kohya_beside --sd_scripts ~/sd-scripts --packages ~/his-packages --only anima

Both get the same tiny model with random weights, in the files that users have; kohya's own model classes, trainers,
strategies of texts and LoRA modules compute in fp32 in a process of their own (`benchmarks.kohya_peer`). His trainer
draws noise and levels, and ours computes with the same ones. `--packages`: a folder with packages that go before this
environment's there, such as the versions that his requirements.txt names:

    pip install --no-deps --target his-packages transformers==4.54.1 diffusers==0.32.1 huggingface-hub==0.34.3 \
      tokenizers==0.21.4 accelerate==1.6.0 einops==0.7.0 imagesize opencv-python-headless voluptuous

Prints Markdown tables. A difference of tensors is the largest, relative to the largest value of kohya's; of gradients
the norm of the difference over all layers, relative to the norm, and the same of the layer where it is most.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from library.config.options.objective import ObjectiveOptions
from library.diffusion.process import predict_and_target
from library.models.checkpoints.base_model import ASSETS
from library.models.family import ModelFamily
from library.models.opening import open_family
from library.run.objective import make_objective
from networks.create import create, create_from_file
from networks.files import read
from networks.formats.fused import fuse, members
from networks.network import Network
from networks.settings import Asked
from tests import tiny_anima, tiny_flux

NEEDED = ("train_network.py", "library/flux_train_utils.py", "library/strategy_flux.py", "networks/lora_flux.py")
NEEDED_FOR_ANIMA = ("library/anima_models.py", "library/strategy_anima.py", "networks/lora_anima.py")
CAPTIONS = (
    "emoji of cat",
    "A Longer text (with) [brackets]: CAPITALS, 100 numbers, “quotes” & naïve accents… " * 6,
    "",
)
RANK, ALPHA, SPREAD = 4, 2.0, 0.2  # of the adapters, and the deviation of their random weights
SIDES = (64, 96)  # of the images, height and width in pixels
DRAWN_FOR = (64, 48)  # latent cells, where levels depend on them
LOSSES = tuple((kind, schedule) for kind in ("huber", "smooth_l1") for schedule in ("constant", "exponential"))
SHIFT = 3.1582
CHANCE = 1.95  # Kolmogorov and Smirnov's bound of two samples of n, times sqrt(2 / n), for a probability of 0.001
# The ways of drawing levels, by kohya's options; ours have the same names
WAYS: dict[str, dict[str, Any]] = {
    "sigma": {"timestep_sampling": "sigma"},
    "sigma, logit_normal": {"timestep_sampling": "sigma", "weighting_scheme": "logit_normal"},
    "sigma, logit_normal, logit_mean 0.5": {
        "timestep_sampling": "sigma",
        "weighting_scheme": "logit_normal",
        "logit_mean": 0.5,
    },
    "sigma, mode": {"timestep_sampling": "sigma", "weighting_scheme": "mode"},
    "uniform": {"timestep_sampling": "uniform"},
    "sigmoid": {"timestep_sampling": "sigmoid"},
    "sigmoid, sigmoid_scale 1.5": {"timestep_sampling": "sigmoid", "sigmoid_scale": 1.5},
    f"shift {SHIFT}": {"timestep_sampling": "shift", "discrete_flow_shift": SHIFT},
    "flux_shift": {"timestep_sampling": "flux_shift"},
}


@dataclass(frozen=True)
class Bench:
    """sd_scripts: kohya's checkout. packages: for his process alone, or "". draws: of each way of drawing levels."""

    sd_scripts: Path
    packages: str
    python: str
    draws: int

    def run(self, folder: Path, family: str) -> dict[str, Tensor]:
        """kohya's results for the files in a folder. Ends if he fails."""
        words = [self.python, str(Path(__file__).with_name("kohya_peer.py")), str(self.sd_scripts), str(folder), family]
        # HF_HUB_OFFLINE: his tokenizers must come from the folder, and not from the hub
        environment = {**os.environ, "PYTHONPATH": self.packages, "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(words, env=environment, cwd=folder, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"kohya's side of {family} failed:\n{done.stderr[-4000:]}")
        return load_file(folder / "kohya.safetensors")


@dataclass
class Beside:
    """A tiny model of ours, in the files of a folder. settings: what kohya's side needs to know of it."""

    name: str
    family: ModelFamily
    folder: Path
    settings: dict[str, Any]

    def prepare(self, draws: int) -> None:
        """Write the inputs, and an adapter of ours with random weights under kohya's names."""
        generator = torch.Generator().manual_seed(0)
        pixels = torch.rand(len(CAPTIONS), 3, *SIDES, generator=generator) * 2 - 1
        factor = self.family.latents.factor
        latents = torch.randn(len(CAPTIONS), 16, *(side // factor for side in SIDES), generator=generator)
        save_file({"pixels": pixels, "latents": latents}, self.folder / "inputs.safetensors")
        more = {"captions": CAPTIONS, "seed": 5, "losses": LOSSES, "rank": RANK, "alpha": ALPHA, "spread": SPREAD}
        more |= {"draws": draws, "drawn_for": DRAWN_FOR, "ways": WAYS}
        (self.folder / "settings.json").write_text(json.dumps({**self.settings, **more}), encoding="utf-8")
        network = create("lora", self.family.adapter_targets(), Asked(dim=RANK, alpha=ALPHA))
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * SPREAD)
        network.naming = "kohya"
        network.save(str(self.folder / "ours.safetensors"), None, {"ss_network_module": "networks.lora"})

    def condition(self, family: ModelFamily | None = None) -> dict[str, Tensor]:
        family = family or self.family
        count = len(CAPTIONS)
        texts = family.encode_prompts(CAPTIONS)
        return family.condition(texts, original_sizes=[SIDES] * count, crops=[(0, 0)] * count, target_size=SIDES)

    def step(
        self, theirs: Mapping[str, Tensor], options: ObjectiveOptions, family: ModelFamily | None = None
    ) -> tuple[Tensor, Tensor]:
        """The loss, and the answer, for kohya's noise and levels."""
        family = family or self.family
        objective, latents = make_objective(options, family), load_file(self.folder / "inputs.safetensors")["latents"]
        seen = predict_and_target(
            *(objective.process, family.predict, latents, theirs["noise"], theirs["levels"], self.condition(family))
        )
        batch: Any = SimpleNamespace(masks=None, loss_weights=torch.ones(len(latents)))
        return objective.main.per_sample(seen, batch).mean(), seen.prediction_BCHW

    def rows(self, theirs: Mapping[str, Tensor]) -> Iterator[tuple[str, str]]:
        """What was compared, and how far it is apart."""
        with torch.no_grad():
            yield from self.texts(theirs)
            loss, answer = self.step(theirs, ObjectiveOptions())
            yield "answer", said(difference(answer, theirs["answer"]))
            yield "loss", said(difference(loss, theirs["loss"]))
            for kind, schedule in LOSSES:
                options = ObjectiveOptions(loss_type=kind, huber_schedule=schedule)  # type: ignore[arg-type]
                loss, _ = self.step(theirs, options)
                yield f"loss, {kind}, {schedule}", said(difference(loss, theirs[f"loss.{kind}.{schedule}"]))
            yield from self.more(theirs)
        yield from self.adapters(theirs)
        yield from self.levels(theirs)

    def texts(self, theirs: Mapping[str, Tensor]) -> Iterator[tuple[str, str]]:
        raise NotImplementedError

    def more(self, theirs: Mapping[str, Tensor]) -> Iterator[tuple[str, str]]:
        yield from ()

    def adapters(self, theirs: Mapping[str, Tensor]) -> Iterator[tuple[str, str]]:
        """Of our file: all of our gradients are his, where his pair of fused layers has zeros he has more. Of his: what
        he has one `down` for is ours' sum."""
        targets = self.family.adapter_targets()
        for name, title in (("ours", "a file of ours"), ("own", "a file of kohya's")):
            file = read(self.folder / f"{name}.safetensors")
            network = create_from_file("lora", file, targets, Asked())
            network.attach()
            report = network.load(file)
            assert not report.missing, report
            assert not report.unexpected, report
            loss, _ = self.step(theirs, ObjectiveOptions())
            loss.backward()
            network.detach()
            gradients = {name: one.grad for name, one in network.named_parameters() if one.grad is not None}
            start = f"{name}.gradient."
            his = {key.removeprefix(start): tensor for key, tensor in theirs.items() if key.startswith(start)}
            ours = in_his_form(network, gradients, shared=name == "own")
            if name == "ours":
                used = in_his_form(network, {key: torch.ones_like(one) for key, one in gradients.items()}, shared=False)
                his = {key: tensor * used[key] for key, tensor in his.items()}
            assert ours.keys() == his.keys(), ours.keys() ^ his.keys()
            yield f"loss with a LoRA, {title}", said(difference(loss, theirs[f"{name}.loss"]))
            whole = math.hypot(*(float((ours[key] - his[key]).norm()) for key in his))
            whole /= math.hypot(*(float(tensor.norm()) for tensor in his.values()))
            most = max(float((ours[key] - his[key]).norm() / his[key].norm()) for key in his)
            modules = len({key.partition(".")[0] for key in his})
            yield f"its gradients, {modules} layers in the file", f"{said(whole)}, at most {said(most)}"

    def levels(self, theirs: Mapping[str, Tensor]) -> Iterator[tuple[str, str]]:
        """The largest distance of the distributions (Kolmogorov and Smirnov), and of their quantiles."""
        for name, words in WAYS.items():
            his = theirs[f"levels.{name}"].double()
            options = {key: value for key, value in words.items() if key != "discrete_flow_shift"}
            family = self.opened(discrete_flow_shift=words.get("discrete_flow_shift", 3.0))
            if words["timestep_sampling"] not in family.process.samplings:
                continue
            level = make_objective(ObjectiveOptions(**options), family).level
            generator = torch.Generator().manual_seed(1)
            ours = torch.tensor([level(generator, DRAWN_FOR) for _ in range(len(his))], dtype=torch.float64)
            every = torch.cat([ours, his])
            shares = [torch.searchsorted(one.sort().values, every, right=True) / len(one) for one in (ours, his)]
            points = torch.arange(1, 100, dtype=torch.float64) / 100
            apart = (ours.quantile(points) - his.quantile(points)).abs().max()
            yield (
                f"levels, {name}",
                f"{(shares[0] - shares[1]).abs().max():.4f}; quantiles {apart:.4f}; medians "
                f"{ours.median():.3f} and {his.median():.3f}",
            )
        yield "time told in bf16, less the level", f"0; kohya's up to {theirs['told in bf16'].abs().max():.4f}"

    def opened(self, **options: Any) -> ModelFamily:
        """The model with these options; no weights are loaded."""
        raise NotImplementedError


class FluxBeside(Beside):
    TOKENS = 96

    def __init__(self, folder: Path) -> None:
        whole = tiny_flux.write(folder / "model")
        self.files = tiny_flux.single_files(whole, folder / "files")
        config = tiny_flux.configuration()
        tokenizers = folder / "tokenizers"
        shutil.copytree(ASSETS / "clip_tokenizer", tokenizers / "openai_clip-vit-large-patch14")
        shutil.copytree(whole / "tokenizer_2", tokenizers / "google_t5-v1_1-xxl")
        settings = {
            "tokens": self.TOKENS,
            "files": {"model": str(self.files["pretrained_model_name_or_path"])}
            | {option: str(self.files[option]) for option in ("clip_l", "t5xxl")},
            "transformer": {
                "vec_in_dim": tiny_flux.CLIP_WIDTH,
                "context_in_dim": tiny_flux.T5_WIDTH,
                "hidden_size": tiny_flux.WIDTH,
                "num_heads": 1,
            },
            "text_encoder": config["text_encoder"],
            "text_encoder_2": config["text_encoder_2"],
            "masks": True,
        }
        super().__init__("FLUX.1", self.opened(), folder, settings)
        self.family.components.load_all(self.family.PARTS, torch.float32, "cpu")

    def opened(self, **options: Any) -> ModelFamily:
        own = {name: str(path) for name, path in self.files.items()}
        model = own.pop("pretrained_model_name_or_path")
        return open_family(model, options={**own, "t5xxl_max_token_length": self.TOKENS, **options})

    def masked(self) -> ModelFamily:
        family = self.opened(apply_t5_attn_mask=True)
        family.components.load_all(family.PARTS, torch.float32, "cpu")
        return family

    def texts(self, theirs: Mapping[str, Tensor]) -> Iterator[tuple[str, str]]:
        for end, family in (("", self.family), (".masked", self.masked())):
            found, words = family.encode_prompts(CAPTIONS), ", --apply_t5_attn_mask" if end else ""
            yield f"T5's states{words}", said(difference(found["hidden_states"], theirs[f"states{end}"]))
            if not end:
                yield "CLIP's pooled state", said(difference(found["pooled"], theirs[f"pooled{end}"]))

    def more(self, theirs: Mapping[str, Tensor]) -> Iterator[tuple[str, str]]:
        loss, answer = self.step(theirs, ObjectiveOptions(), self.masked())
        yield "answer, --apply_t5_attn_mask", said(difference(answer, theirs["answer.masked"]))
        yield "loss, --apply_t5_attn_mask", said(difference(loss, theirs["loss.masked"]))


class AnimaBeside(Beside):
    TOKENS = 512

    def __init__(self, folder: Path) -> None:
        whole = tiny_anima.write(folder / "model")
        self.files = tiny_anima.single_files(whole, folder / "files")
        config = tiny_anima.configuration()
        transformer, adapter = config["transformer"], config["text_conditioner"]
        for name, source in (("qwen3", "tokenizer"), ("t5", "t5_tokenizer")):
            shutil.copytree(whole / source, folder / "tokenizers" / name)
        settings = {
            "tokens": self.TOKENS,
            "pads": {"qwen3": "<|endoftext|>", "t5": "<pad>"},
            "files": {"model": str(self.files["pretrained_model_name_or_path"]), "qwen3": str(self.files["qwen3"])}
            | {"vae": str(next((whole / "vae").glob("*.safetensors")))},
            "transformer": {
                # what kohya's loader has for the true model, but for the sizes
                "max_img_h": 512,
                "max_img_w": 512,
                "max_frames": 128,
                "patch_spatial": 2,
                "patch_temporal": 1,
                "in_channels": transformer["in_channels"],
                "out_channels": transformer["out_channels"],
                "model_channels": tiny_anima.WIDTH,
                "num_blocks": tiny_anima.BLOCKS,
                "num_heads": transformer["num_attention_heads"],
                "mlp_ratio": transformer["mlp_ratio"],
                "crossattn_emb_channels": tiny_anima.STATES,
                "adaln_lora_dim": transformer["adaln_lora_dim"],
                "pos_emb_cls": "rope3d",
                "pos_emb_learnable": True,
                "use_adaln_lora": True,
                "attn_mode": "torch",
                "rope_h_extrapolation_ratio": 4.0,
                "rope_w_extrapolation_ratio": 4.0,
                "rope_enable_fps_modulation": False,
            },
            "llm_adapter": {
                **{name: adapter[name] for name in ("source_dim", "target_dim", "model_dim", "num_layers")},
                "num_heads": adapter["num_attention_heads"],
                "vocabulary": adapter["target_vocab_size"],
            },
            "text_encoder": config["text_encoder"],
            "vae": {"base_dim": config["vae"]["base_dim"]},
            "masks": False,
        }
        super().__init__("Anima", self.opened(), folder, settings)
        self.family.components.load_all(self.family.PARTS, torch.float32, "cpu")

    def opened(self, **options: Any) -> ModelFamily:
        own = {name: str(path) for name, path in self.files.items()}
        model = own.pop("pretrained_model_name_or_path")
        return open_family(model, vae=own.pop("vae"), options={**own, **options})

    def texts(self, theirs: Mapping[str, Tensor]) -> Iterator[tuple[str, str]]:
        found, his = self.family.encode_prompts(CAPTIONS)["hidden_states"], theirs["states"]
        padded = torch.nn.functional.pad(found, (0, 0, 0, his.shape[1] - found.shape[1]))
        written = [bool(caption) for caption in CAPTIONS]
        yield "the LLM adapter's states", said(difference(padded[written], his[written]))
        empty = [not one for one in written]
        yield "the same of an empty caption", said(difference(padded[empty], his[empty]))

    def more(self, theirs: Mapping[str, Tensor]) -> Iterator[tuple[str, str]]:
        mean, std = self.family.encode_images(load_file(self.folder / "inputs.safetensors")["pixels"])
        assert not std.any(), "a draw, where kohya's are the middle of the distribution"
        yield "latents of an image", said(difference(mean, theirs["latents"]))


def in_his_form(network: Network, tensors: Mapping[str, Tensor], *, shared: bool) -> dict[str, Tensor]:
    """A network's tensors, or their gradients, under kohya's names. Fused layers are written as our files have them,
    or, `shared`, with one `down`: then its gradient is the sum of its copies'."""
    sites = [adapter.site for adapter in network.adapters]
    if not shared:
        return {key: one for key, one in fuse(tensors, sites).items() if not key.endswith(".alpha")}
    left = dict(tensors)
    for name, group in members(sites).items():
        downs, ups = ([left.pop(f"{site.name}.lora_{end}.weight") for site in group] for end in ("down", "up"))
        left[f"{name}.lora_down.weight"] = torch.stack(downs).sum(0)
        left[f"{name}.lora_up.weight"] = torch.cat(ups)
    return left


def difference(ours: Tensor, theirs: Tensor) -> float:
    """The largest, relative to the largest value."""
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    return float(((ours - theirs).abs().max() / theirs.abs().max()).detach())


def said(number: float) -> str:
    return "0" if number == 0 else f"{number:.1e}"


def check(sd_scripts: Path, families: list[str]) -> None:
    """Ends unless the folder is a checkout of kohya's repository that has these families."""
    needed = NEEDED + (NEEDED_FOR_ANIMA if "anima" in families else ())
    if missing := [name for name in needed if not (sd_scripts / name).is_file()]:
        raise SystemExit(
            f"--sd_scripts {sd_scripts}: no checkout of kohya-ss/sd-scripts with {' and '.join(families)}: it has no "
            f"{missing[0]}"
        )


FAMILIES = {"flux": FluxBeside, "anima": AnimaBeside}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sd_scripts", type=Path, required=True, help="a checkout of kohya-ss/sd-scripts")
    parser.add_argument("--packages", default="", help="a folder with packages for kohya's side")
    parser.add_argument("--python", default=sys.executable, help="the interpreter of kohya's side")
    parser.add_argument("--only", choices=FAMILIES, action="append")
    parser.add_argument("--draws", type=int, default=100_000, help="of each way of drawing levels, in thousands")
    options = parser.parse_args()
    families = options.only or list(FAMILIES)
    check(options.sd_scripts, families)
    bench = Bench(options.sd_scripts.resolve(), options.packages, options.python, options.draws)
    torch.set_num_threads(1)
    chance = CHANCE * math.sqrt(2 / options.draws)
    print(
        f"{options.draws} draws of levels: by chance distributions are {chance:.4f} apart in one of a thousand cases\n"
    )
    for family in families:
        with tempfile.TemporaryDirectory() as folder:
            beside = FAMILIES[family](Path(folder))
            beside.prepare(options.draws)
            theirs = bench.run(Path(folder), family)
            print(f"| {beside.name} | difference |\n|---|---|")
            for what, apart in beside.rows(theirs):
                print(f"| {what} | {apart} |", flush=True)
            print()


if __name__ == "__main__":
    main()
