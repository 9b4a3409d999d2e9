"""The fixed-noise losses of images, with each candidate on the base model: what validation measures, for any folder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from library.data.caches.memory import TextCache, encode_captions
from library.data.dataset import TrainingData
from library.evaluation.candidates import BASE
from library.losses.l2 import l2
from library.losses.main import MainLoss
from library.progress import progress
from library.training.fixed_noise import losses_of_batch

if TYPE_CHECKING:
    from library.data.prepared import Prepared
    from library.evaluation.base_model import BaseModel
    from library.evaluation.candidates import Candidate

LOSS = MainLoss(loss=l2).unweighted


@dataclass(frozen=True)
class Losses:
    """The losses of one candidate on one folder: fp64 [images, noise levels], the images in the same order for all."""

    candidate: Candidate
    folder: str
    by_image: Tensor


def measure(
    model: BaseModel,
    folders: Mapping[str, Prepared],
    candidates: Sequence[Candidate],
    *,
    timesteps: Sequence[int],
    seed: int,
    draws: int,
    vae_batch_size: int,
) -> list[Losses]:
    """The losses of the base alone, then of each candidate, on each folder, in that order.

    Mean squared errors without weights, with the noise that validation has for `seed`, keyed by an image's content;
    with `draws` > 1 means over the noise of so many seeds, `seed` and those after it. The parts of the model are loaded
    one after the other, and everything that the candidates share is encoded once.
    """
    data = {name: TrainingData(prepared, seed=seed) for name, prepared in folders.items()}
    model.load("vae")
    for one in data.values():
        one.cache_latents(model.family.encode_images, batch_size=vae_batch_size)
    model.release("vae")
    texts = _texts(model, data, candidates)
    model.load("denoiser")
    batches = sum(len(one.plan(0)) for one in data.values())
    found = []
    with progress(desc="evaluating", total=batches * (1 + len(candidates)) * draws, unit="batch") as bar:
        for candidate in (BASE, *candidates):
            with model.adapted(candidate, "denoiser"):
                for name, own in data.items():
                    own.texts = texts.get((candidate, name), texts[BASE, name])
                    total = torch.zeros((), dtype=torch.float64)
                    for number in range(draws):
                        rows = []
                        for losses in _batches(model, own, timesteps, seed=seed + number):
                            rows.append(losses)
                            bar.update()
                        total = total + torch.cat(rows).double().cpu()
                    found.append(Losses(candidate, name, total / draws))
    model.release("denoiser")
    return found


def _texts(
    model: BaseModel, data: Mapping[str, TrainingData], candidates: Sequence[Candidate]
) -> dict[tuple[Candidate, str], TextCache]:
    """The text encoders' states of each folder's captions, of the base and of those candidates that change them."""
    encoders = tuple(model.family.components.text_encoders)
    model.load(*encoders)
    texts = {}
    for candidate in (BASE, *(one for one in candidates if model.acts_on(one, *encoders))):
        with model.adapted(candidate, *encoders), model.autocast(), torch.no_grad():
            for name, own in data.items():
                encode = model.family.encode_prompts
                texts[candidate, name] = encode_captions(own.captions(), encode, batch_size=_batch_size(own))
    model.release(*encoders)
    return texts


def _batch_size(data: TrainingData) -> int:
    return data.groups[0].batch_size


def _batches(model: BaseModel, data: TrainingData, timesteps: Sequence[int], *, seed: int) -> Iterator[Tensor]:
    """The losses of each batch, [B, noise levels], on the model's device."""
    with torch.no_grad(), model.autocast():
        for batch in data.batches(data.plan(0), epoch=0, loader=data.loader(workers=0)):
            found = losses_of_batch(model.family, batch, timesteps, seed=seed, device=model.device, loss=LOSS)
            yield torch.stack([found[t] for t in timesteps], dim=1)
