"""What a GPU would have to wait for in a step, looked for on a stand-in (stand_in_gpu.py): nothing was run on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from library.config.parser import parse
from library.guidance import dry_run
from library.guidance.estimate import peak_of
from library.run.build import build
from library.run.plan import Plan, make_plan
from library.training import loop
from library.training.run import Run
from tests.conftest import BASE, copy_images
from tests.training.stand_in_gpu import META, Stops, place_on, watched

NOISE = (
    *("--noise_offset", "0.1", "--noise_offset_random_strength", "--adaptive_noise_scale", "0.1"),
    *("--multires_noise_iterations", "3", "--ip_noise_gamma", "0.1", "--ip_noise_gamma_random_strength"),
    *("--min_snr_gamma", "5", "--loss_type", "huber"),
)
DROPOUT = ("--network_dropout", "0.1", "--network_args", "rank_dropout=0.1", "module_dropout=0.1", "conv_dim=2")
CAPTIONS = ("--weighted_captions", "--max_token_length", "150", "--clip_skip", "2")
EAGER = ("--optimizer_type", "CustomAdamW", "--optimizer_args", "implementation=eager")


def planned(folder: Path, *words: str, base: Path = BASE) -> Plan:
    """A run on the images of `folder/data`."""
    given = [
        *("--pretrained_model_name_or_path", str(base), "--train_data_dir", str(folder / "data")),
        *("--caption_extension", ".txt", "--resolution", "64", "--train_batch_size", "2"),
        *("--output_dir", str(folder / "out"), "--network_dim", "4", "--network_alpha", "2"),
        *("--max_data_loader_n_workers", "0", "--seed", "1", "--no-loss_plot", "--no-report"),
        "--no-monitoring",
        *("--max_train_steps", "4", *words),
    ]
    return make_plan(parse(given))


@pytest.fixture
def on_stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Run]:
    """A run on the stand-in, ready to start; without caches, for a VAE without contents has no finite latents."""
    place_on(monkeypatch)
    copy_images(tmp_path / "data" / "2_style")
    return lambda *words, base=BASE: build(planned(tmp_path, *words, base=base))


def two_steps(run: Run) -> list[Stops]:
    """What stopped each of the first two steps: in the first some state is made."""
    found = []
    for item, _ in zip(loop.step_batches(run), range(2), strict=False):
        with watched() as stops:
            loop.optimizer_step(run, item)
        found.append(stops)
    return found


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(
            (*NOISE, "--gradient_accumulation_steps", "2", "--max_grad_norm", "0"),
            id="noise, not clipped",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            (*DROPOUT, "--ema_decay", "0.9", "--gradient_checkpointing"), id="dropout, average", marks=pytest.mark.slow
        ),
        pytest.param((*EAGER, *CAPTIONS), id="captions, CustomAdamW"),
    ],
)
def test_a_step_is_read_once(on_stand_in: Callable[..., Run], words: tuple[str, ...]) -> None:
    """Its loss and the gradient's norm, together; nothing is copied to the GPU but from pinned memory."""
    run = on_stand_in(*words)
    assert {parameter.device for parameter in run.parameters} == {META}
    for stops in two_steps(run):
        assert stops.copies == []
        (read,) = stops.reads
        assert "loop.py" in read
        assert "_gradients" in read


@pytest.mark.slow
def test_sdxl_is_read_once(on_stand_in: Callable[..., Run], tiny_sdxl: Path) -> None:
    for stops in two_steps(on_stand_in(base=tiny_sdxl)):
        assert stops.copies == []
        assert len(stops.reads) == 1


@pytest.mark.slow
def test_preserved_outputs_cost_no_stop(on_stand_in: Callable[..., Run], tmp_path: Path) -> None:
    """Samples are picked by rows: a list as an index would be copied."""
    file = tmp_path / "data.toml"
    file.write_text(
        "[[datasets]]\nresolution = 64\nbatch_size = 2\n[[datasets.subsets]]\n"
        f"image_dir = '{tmp_path / 'data' / '2_style'}'\ncaption_extension = '.txt'\n"
        "custom_attributes = {diff_output_preservation = true}\n"
    )
    for stops in two_steps(on_stand_in("--dataset_config", str(file))):
        assert stops.copies == []
        assert len(stops.reads) == 1


@pytest.mark.slow
def test_what_is_measured_is_read_once_more(on_stand_in: Callable[..., Run]) -> None:
    """The first step is measured; the norms of all layers, which are held below 1, are read together in every step."""
    first, second = two_steps(on_stand_in("--scale_weight_norms", "1", "--monitoring"))
    assert first.copies == second.copies == []
    assert [read.split(":")[0] for read in first.reads] == ["in loop.py", "in network.py", "in meter.py"]
    assert [read.split(":")[0] for read in second.reads] == ["in loop.py", "in network.py"]


def test_the_stand_in_sees_what_stops_a_gpu() -> None:
    there = torch.zeros(4, 4, device=META)
    for act, kind in (
        (lambda: there.sum().item(), "reads"),
        (lambda: there.tolist(), "reads"),
        (lambda: bool(there.any()), "reads"),
        (lambda: torch.ones(4).to(META), "copies"),
        (lambda: there.copy_(torch.ones(4, 4)), "copies"),
        (lambda: torch.tensor([1.0], device=META), "copies"),
        (lambda: there[[0, 2]], "copies"),
    ):
        seen = _seen(act)
        assert len(getattr(seen, kind)) == 1, kind
        assert len(seen.reads) + len(seen.copies) == 1


def _seen(act: Callable[[], Any]) -> Stops:
    with watched() as stops:
        act()
    return stops


@pytest.mark.parametrize("sdxl", [False, True])
def test_the_dry_run_counts_a_step_on_a_device(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_sdxl: Path, sdxl: bool
) -> None:
    """Its tensors without contents are on no device, and may be mixed with what lies on one; images are encoded first,
    as without caches. Nothing stays on the model."""
    place_on(monkeypatch)
    copy_images(tmp_path / "data" / "2_style")
    plan = planned(tmp_path, "--dry_run", base=tiny_sdxl if sdxl else BASE)
    run = build(plan)
    modules = [*run.family.components.loaded(), run.network]
    peak = peak_of(lambda fake: dry_run.dummy_loss(plan, run, fake).backward(), modules)
    assert peak > 2 * sum(parameter.nbytes for parameter in run.parameters)
    assert {parameter.device for module in modules for parameter in module.parameters()} == {META}
    assert all(parameter.grad is None for parameter in run.parameters)
