"""What a GPU would have to wait for in a step, looked for on a stand-in (stand_in_gpu.py): nothing was run on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from library.config.parser import parse
from library.guidance import dry_run
from library.run.build import Built, build
from library.run.plan import make_plan
from library.run.summary import facts_of
from library.run.watch import watch
from library.training import loop
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


def built_run(folder: Path, *words: str, base: Path = BASE) -> Built:
    """A run on the images of `folder/data` that is ready to start."""
    given = [
        *("--pretrained_model_name_or_path", str(base), "--train_data_dir", str(folder / "data")),
        *("--caption_extension", ".txt", "--resolution", "64", "--train_batch_size", "2"),
        *("--output_dir", str(folder / "out"), "--network_dim", "4", "--network_alpha", "2"),
        *("--max_data_loader_n_workers", "0", "--seed", "1", "--no-loss_plot", "--no-report"),
        *("--max_train_steps", "4", *words),
    ]
    return build(make_plan(parse(given)))


@pytest.fixture
def on_stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Built]:
    """`built_run` on the stand-in; without caches, for a VAE without contents has no finite latents."""
    place_on(monkeypatch)
    copy_images(tmp_path / "data" / "2_style")
    return lambda *words, base=BASE: built_run(tmp_path, *words, base=base)


def two_steps(built: Built) -> list[Stops]:
    """What stopped each of the first two steps: in the first some state is made."""
    found = []
    for item, _ in zip(loop.step_batches(built.run), range(2), strict=False):
        with watched() as stops:
            loop.optimizer_step(built.run, item)
            if built.run.ema is not None:
                built.run.ema.update()
        found.append(stops)
    return found


@pytest.mark.parametrize(
    "words",
    [
        pytest.param((*NOISE, "--gradient_accumulation_steps", "2", "--max_grad_norm", "0"), id="noise, not clipped"),
        pytest.param((*DROPOUT, "--ema_decay", "0.9", "--gradient_checkpointing"), id="dropout, average"),
        pytest.param((*EAGER, *CAPTIONS), id="captions, CustomAdamW"),
    ],
)
def test_a_step_is_read_once(on_stand_in: Callable[..., Built], words: tuple[str, ...]) -> None:
    """Its loss and the gradient's norm, together; nothing is copied to the GPU but from pinned memory."""
    built = on_stand_in(*words)
    assert {parameter.device for parameter in built.run.parameters} == {META}
    for stops in two_steps(built):
        assert stops.copies == []
        (read,) = stops.reads
        assert "loop.py" in read
        assert "optimizer_step" in read


def test_sdxl_is_read_once(on_stand_in: Callable[..., Built], tiny_sdxl: Path) -> None:
    for stops in two_steps(on_stand_in(base=tiny_sdxl)):
        assert stops.copies == []
        assert len(stops.reads) == 1


def test_preserved_outputs_cost_no_stop(on_stand_in: Callable[..., Built], tmp_path: Path) -> None:
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


def test_what_is_measured_is_read_once_more(on_stand_in: Callable[..., Built]) -> None:
    """The first step is measured; the norms of all layers, which are held below 1, are read together in every step."""
    built = on_stand_in("--scale_weight_norms", "1")
    watch(built, facts_of(built))
    first, second = two_steps(built)
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
def test_the_dry_runs_batch_is_where_the_model_is(
    on_stand_in: Callable[..., Built], tiny_sdxl: Path, sdxl: bool
) -> None:
    """A mixture with what lies on the CPU is an error; images are encoded first, as without caches."""
    built = on_stand_in("--dry_run", base=tiny_sdxl if sdxl else BASE)
    loss = dry_run.dummy_loss(built, lambda tensor: tensor)
    loss.backward()
    assert loss.device == META
    assert {parameter.grad.device for parameter in built.run.parameters if parameter.grad is not None} == {META}
