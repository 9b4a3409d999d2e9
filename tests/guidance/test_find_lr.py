"""The rate finder on a real run: what it tries, that it leaves no trace, what it prints and writes, what it refuses."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from library.config.parser import parse
from library.errors import UserError
from library.guidance import find_lr
from library.run.build import build
from library.run.plan import make_plan
from library.training import loop, snapshot
from library.training.run import Run
from tests.conftest import BASE

FEW = ("--find_lr_start", "1e-5", "--find_lr_end", "10", "--find_lr_steps", "20")


@pytest.fixture(autouse=True)
def measured_on_four(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(find_lr, "MEASURED_IMAGES", 4)


def words(image_folder: Path, tmp_path: Path, *more: str) -> list[str]:
    return [
        *("--pretrained_model_name_or_path", str(BASE), "--train_data_dir", str(image_folder)),
        *("--caption_extension", ".txt", "--resolution", "64", "--train_batch_size", "2", "--seed", "1"),
        *("--output_dir", str(tmp_path / "out"), "--output_name", "test", "--no-loss_plot", "--max_train_steps", "4"),
        *("--network_dim", "4", "--learning_rate", "1e-3", "--text_encoder_lr", "2e-4"),
        *("--max_data_loader_n_workers", "0", "--cache_latents", *more),
    ]


def make(words: list[str]) -> Run:
    return build(make_plan(parse(words)))


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


RUNS = [
    ("--optimizer_type", "AdamW8bit", "--network_dim", "64", "--lr_scheduler", "cosine", "--lr_warmup_steps", "1"),
    ("--optimizer_type", "CustomAdamW", "--network_dropout", "0.2", "--gradient_accumulation_steps", "2"),
    (
        *("--dynamic_weight_decay", "--wd_schedule", "adaptive", "--wd_flat", "window=3", "earliest=3"),
        *("--scale_weight_norms", "0.01", "--no-cache_latents", "--flip_aug", "--network_train_unet_only"),
    ),
]


@pytest.mark.parametrize("more", RUNS, ids=lambda more: " ".join(more))
@pytest.mark.slow
def test_a_run_is_the_same_whether_rates_were_looked_for_or_not(
    more: tuple[str, ...], image_folder: Path, tmp_path: Path
) -> None:
    given = words(image_folder, tmp_path, *more)
    run = make(given)
    random, before = torch.get_rng_state(), copy.deepcopy(snapshot.tensors_of(run))
    tried = find_lr.sweep(run, reference=1e-3, rates=find_lr.geometric(1e-4, 10, 8))
    assert len(set(tried.losses)) == len(tried.losses) > 3  # it did train
    assert torch.equal(torch.get_rng_state(), random)
    assert same(snapshot.tensors_of(run), before)
    loop.train(run)
    after = load_file(tmp_path / "out" / "test.safetensors")

    plain = make([*given, "--overwrite"])
    loop.train(plain)
    assert run.losses.curve() == plain.losses.curve()
    expected = load_file(tmp_path / "out" / "test.safetensors")
    assert same(dict(after), dict(expected))
    assert any(tensor.abs().max() > 0 for name, tensor in expected.items() if "lora_up" in name)


def test_all_rates_grow_together_and_the_same_images_measure(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make(words(image_folder, tmp_path))
    seen = []
    step = loop.optimizer_step

    def watched(run: Any, item: Any) -> Any:
        seen.append([(group["name"], group["lr"]) for group in run.optimizer.param_groups])
        return step(run, item)

    monkeypatch.setattr(loop, "optimizer_step", watched)
    batches = find_lr.measured_batches(run)
    assert find_lr.measure(run, batches) == find_lr.measure(run, find_lr.measured_batches(run))
    assert sum(len(batch.samples) for batch in batches) == 4
    find_lr.sweep(run, reference=1e-3, rates=[1e-4, 1e-3, 1e-2])
    assert [dict(rates) for rates in seen] == [
        {"text_encoder": pytest.approx(rate / 5), "unet": pytest.approx(rate)} for rate in (1e-4, 1e-3, 1e-2)
    ]


@pytest.mark.slow
def test_it_ends_where_the_loss_breaks(image_folder: Path, tmp_path: Path) -> None:
    run = make(words(image_folder, tmp_path))
    tried = find_lr.sweep(run, reference=1e-3, rates=find_lr.geometric(1e-3, 1e6, 20))
    assert tried.broken
    assert len(tried.rates) == len(tried.losses) < 20
    assert tried.losses[-1] > tried.before or len(tried.losses) < 19
    assert all(parameter.isfinite().all() for parameter in run.parameters)


def test_rates_by_pattern_are_part_of_the_suggestion() -> None:
    said = list(find_lr._other_rates({"network_reg_lrs": ".*attn2.*=1e-4"}, 12.345))
    assert said == ["             and 12 times each rate in network_reg_lrs"]
    assert not list(find_lr._other_rates({"conv_dim": 4}, 12.345))


@pytest.mark.slow
def test_the_command(train: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert train("--max_train_steps", "1") == 0
    before = {path: path.read_bytes() for path in out.rglob("*")}
    capsys.readouterr()
    logs = (
        "--train_batch_size",
        "6",
        "--logging_dir",
        str(tmp_path / "logs"),
        "--save_state",
        "--sample_every_n_steps",
        "1",
    )
    assert train("--find_lr", *FEW, "--text_encoder_lr", "1e-4", *logs) == 0
    said = capsys.readouterr().out
    found = re.search(r"suggestion +--learning_rate (\S+) --text_encoder_lr (\S+)\n", said)
    assert found, said
    rate, text = map(float, found.groups())
    assert 1e-4 < rate < 1
    assert text == pytest.approx(rate / 10, rel=0.06)  # each is rounded to two digits
    assert "no LoRA was trained or written" in said
    files = set(out.rglob("*")) - before.keys()
    assert files == {out / "test-find-lr.png", out / "test-find-lr.csv"}
    assert all(path.read_bytes() == content for path, content in before.items())
    assert not (tmp_path / "logs").exists()
    # again, with an optimizer that may have a rate of its own: the finder's files are replaced
    adafactor = ("--optimizer_type", "Adafactor", "--optimizer_args", "relative_step=False", "scale_parameter=False")
    assert train("--find_lr", *FEW, *adafactor) == 0


@pytest.mark.parametrize(
    ("optimizer", "said"),
    [
        (("Prodigy",), "--find_lr: Prodigy finds its rate itself: leave --learning_rate at 1"),
        (("DAdaptAdam",), "--find_lr: DAdaptAdam finds its rate itself"),
        (("AdamWScheduleFree",), "--find_lr: AdamWScheduleFree averages its weights over all steps"),
        (("Adafactor",), "--find_lr: Adafactor derives its rate from the step: --optimizer_args relative_step=False"),
    ],
)
def test_optimizers_with_a_rate_of_their_own(
    optimizer: tuple[str], said: str, train: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train("--find_lr", "--optimizer_type", *optimizer) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--find_lr", "--dry_run"), "--dry_run and --find_lr: give one of them"),
        (("--find_lr", "--recommend"), "--find_lr and --recommend: give one of them"),
        (("--find_lr", "--resume", "latest"), "--find_lr is for a new run"),
        (("--find_lr_steps", "50"), "--find_lr_steps has no effect without --find_lr"),
        (("--find_lr", "--find_lr_start", "2"), "--find_lr_start 2 must be above 0, and --find_lr_end 10 at least ten"),
        (("--find_lr", "--find_lr_steps", "5"), "--find_lr_steps: must be at least 20, not 5"),
        (("--find_lr", "--find_lr_steps", "1e9"), "--find_lr_steps: must be at most 10000, not 1e9"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_does_not_go_together(more: tuple[str, ...], said: str, image_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=re.escape(said)):
        parse(words(image_folder, tmp_path, *more))
