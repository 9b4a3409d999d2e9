"""The data of a slider: rounds in a keyed order, and batches that depend on their keys alone."""

from __future__ import annotations

from pathlib import Path

import torch

from library.config.data.slider_prompts import Setting
from library.config.options import ModelOptions, Options, OutputOptions
from library.data.sources.prompts import ROUNDS, PromptBatch, PromptData, prepared
from library.run.slider import datasets_of


def setting(target: str, **more: object) -> Setting:
    values = {"target": target, "positive": target, "unconditional": "", "neutral": "", "size": (64, 64), **more}
    return Setting(**values)  # type: ignore[arg-type]


def data_of(*settings: Setting, seed: int = 1) -> PromptData:
    options = Options(model=ModelOptions(pretrained_model_name_or_path=""), output=OutputOptions(output_dir=""))
    datasets = datasets_of(settings, options)
    ready = prepared(settings, datasets, file=Path("prompts.toml"))
    return PromptData(ready, settings, seed=seed, batches_per_step=1, total_steps=9)


def batches(data: PromptData, epoch: int = 0, first: int = 0) -> list[PromptBatch]:
    return list(data.batches(data.plan(epoch)[first:], epoch=epoch, loader=data.loader(workers=0)))


def test_every_round_has_each_setting_once() -> None:
    data = data_of(setting("a", batch_size=2), setting("b"), setting("c"))
    plan = data.plan(0)
    assert len(plan) == data.batches_per_epoch == 3 * ROUNDS
    rounds = [[planned[0][0] for planned in plan[start : start + 3]] for start in range(0, len(plan), 3)]
    assert all(sorted(one) == [0, 1, 2] for one in rounds)
    assert len({tuple(one) for one in rounds}) == 6  # all orders of three occur in a hundred rounds
    assert data.plan(1) != plan
    assert data_of(*data.settings, seed=2).plan(0) != plan
    draws = [draw for planned in plan for draw in planned]
    assert len(set(draws)) == len(draws) == 4 * ROUNDS  # no key of a draw stands twice


def test_a_batch_is_one_setting_with_draws_of_its_own() -> None:
    data = data_of(setting("a", batch_size=3, weight=0.5, size=(64, 128)))
    batch = batches(data)[0]
    assert batch.captions == ["a"] * 3
    assert batch.loss_weights.tolist() == [0.5] * 3
    assert (batch.target_size, batch.original_sizes, batch.crops) == ((64, 128), [(64, 128)] * 3, [(0, 0)] * 3)
    assert len({draw.repeat for draw in batch.samples}) == 3


def test_batches_do_not_depend_on_those_before() -> None:
    data = data_of(setting("a", size=(512, 512), dynamic_resolution=True, dynamic_crops=True), setting("b"))
    whole, rest = batches(data), batches(data, first=7)
    shapes = [(batch.captions, batch.target_size, batch.original_sizes, batch.crops) for batch in whole]
    assert shapes[7:] == [(batch.captions, batch.target_size, batch.original_sizes, batch.crops) for batch in rest]


def test_drawn_sizes_and_crops_are_in_their_ranges() -> None:
    data = data_of(setting("a", size=(256, 256), dynamic_resolution=True, dynamic_crops=True))
    found = [(batch.target_size, batch.original_sizes[0], batch.crops[0]) for batch in batches(data)]
    assert {side for size, _, _ in found for side in size} == {128, 192, 256}
    for (width, height), (whole_width, whole_height), (left, top) in found:
        assert width <= whole_width <= 3 * width
        assert 0 <= left <= whole_width - width
        assert 0 <= top <= whole_height - height
    assert any(crop != (0, 0) for _, _, crop in found)


def test_texts_are_encoded_once_each() -> None:
    data = data_of(setting("a", positive="b"), setting("b", unconditional="a"))
    asked: list[str] = []

    def encode(texts: list[str]) -> dict[str, torch.Tensor]:
        asked.extend(texts)
        return {"states": torch.tensor([[float(len(asked))]] * len(texts))}

    data.cache_captions(encode, batch_size=1)
    assert sorted(asked) == ["", "a", "b"]
    texts = batches(data)[0].texts
    assert texts is not None
    assert texts.get(["a", "", "a"])["states"].shape == (3, 1)
