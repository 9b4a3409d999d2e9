"""Samples that are to look as without the network: their target is what the base predicts, as in kohya's trainer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from library.data.dataset import Batch, Draw
from library.diffusion.ddpm import DDPM
from library.diffusion.noise import Noise
from library.losses.l2 import l2
from library.losses.main import MainLoss
from library.losses.preservation import Preservation
from library.training.step import Objective, batch_loss

ALPHAS = torch.linspace(0.99, 0.01, 1000, dtype=torch.float64)


class Base:
    """Answers with the noisy latents times `k`, plus what the sample is conditioned on."""

    k = 1.0
    noisy = torch.zeros(0)

    def encode_prompts(self, captions: list[str]) -> dict[str, Tensor]:
        return {"h": torch.tensor([float(len(caption)) for caption in captions]).view(-1, 1, 1, 1)}

    def condition(self, texts: dict[str, Tensor], **sizes: object) -> dict[str, Tensor]:
        return texts

    def with_text_dropout(self, condition: Mapping[str, Tensor], draws: object) -> Mapping[str, Tensor]:
        return condition

    def predict(self, noisy: Tensor, t: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
        assert len(noisy) == len(t) == len(condition["h"])
        self.noisy = noisy
        return noisy * self.k + condition["h"]

    @contextmanager
    def without(self) -> Iterator[None]:
        self.k = 0.25
        yield
        self.k = 1.0


def loss(*preserved: bool, base: Base | None = None) -> float:
    base = base or Base()
    samples = [
        SimpleNamespace(key=f"0/{i}", subset=SimpleNamespace(prior="base" if keep else "", prior_region="all"))
        for i, keep in enumerate(preserved)
    ]
    mean = torch.arange(len(samples) * 16.0).view(-1, 1, 4, 4) / 16
    batch = Batch(
        samples=[Draw(sample, 0, 0) for sample in samples],  # type: ignore[arg-type]
        pixels=None,
        moments=(mean, torch.zeros_like(mean)),
        captions=["a", "bcd"][: len(samples)],
        condition=None,
        loss_weights=torch.ones(len(samples)),
        original_sizes=[(8, 8)] * len(samples),
        crops=[(0, 0)] * len(samples),
        target_size=(8, 8),
    )
    objective = Objective(
        process=DDPM("epsilon", ALPHAS),
        level=lambda generator, size: 500,
        steps=(0, 1000),
        noise=Noise(),
        main=MainLoss(l2),
        more=(Preservation(base.predict, {"base": base.without}, MainLoss(l2)),),
    )
    found = batch_loss(batch, base, objective, seed=1, device=torch.device("cpu"), train_text=False)  # type: ignore[arg-type]
    return found.loss.item()


def test_only_the_targets_of_those_samples_change() -> None:
    base = Base()
    alone = loss(True, True, base=base)
    # x + h is predicted, and with the network off x/4 + h
    assert alone == pytest.approx(float((0.75 * base.noisy).square().mean()))
    assert loss(True, False) != pytest.approx(loss(False, False))
    assert loss(True, False) + loss(False, True) == pytest.approx(loss(False, False) + alone)


def test_the_base_is_kept(train: Callable[..., int], image_folder: Path, tmp_path: Path) -> None:
    """At the start the network does nothing: what it is to preserve has no loss then, and nothing is learnt."""
    text = '[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = "{}"\ncaption_extension = ".txt"\n{}'
    for name, more in (("plain", ""), ("kept", "custom_attributes = {diff_output_preservation = true}\n")):
        file = tmp_path / f"{name}.toml"
        file.write_text(text.format((image_folder / "2_style").as_posix(), more), encoding="utf-8")
        assert train("--train_data_dir=", "--dataset_config", str(file), "--output_name", name) == 0
    plain, kept = (load_file(tmp_path / "out" / f"{name}.safetensors") for name in ("plain", "kept"))
    ups = [key for key in plain if key.endswith("lora_up.weight")]
    assert all(plain[key].abs().max() > 0 for key in ups)
    assert all(kept[key].abs().max() == 0 for key in ups)
