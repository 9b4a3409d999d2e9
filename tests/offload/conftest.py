"""Runs whose offloading is seen: on the CPU, with a lane of the tests in a GPU's place."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from library.config.parser import parse
from library.offload import swap
from library.offload.lane import Lane
from library.run import encode
from library.run.build import build
from library.run.plan import Plan, make_plan
from library.training import loop
from library.training.run import Run
from tests.conftest import BASE, copy_images, forget_accelerator
from tests.offload.held_back import HeldBackLane

Planned = Callable[..., Plan]
Made = Callable[..., Run]


@pytest.fixture
def planned(tmp_path: Path) -> Planned:
    """`planned(*words, base=…)`: the plan of a run on two images."""
    copy_images(tmp_path / "data" / "1_style", 2)

    def plan(*words: str, base: Path = BASE) -> Plan:
        forget_accelerator()
        sizes = () if "--network_module" in words else ("--network_dim", "4", "--network_alpha", "2")
        given = [
            *("--pretrained_model_name_or_path", str(base), "--train_data_dir", str(tmp_path / "data")),
            *("--caption_extension", ".txt", "--resolution", "64", "--train_batch_size", "2", "--seed", "1"),
            *("--output_dir", str(tmp_path / "out"), "--max_data_loader_n_workers", "0", "--no-loss_plot"),
            *("--no-report", "--no-monitoring", "--max_train_steps", "2", "--learning_rate", "1e-2"),
            *("--network_train_unet_only", "--cache_latents", *sizes, *words),
        ]
        return make_plan(parse(given))

    return plan


def started(plan: Plan, lane: Lane | None) -> Run:
    """The run of a plan, with this lane in that of a GPU's place."""
    own = swap.Ring

    def hiding(*args: Any) -> swap.Ring:
        ring = own(*args)
        if isinstance(lane, HeldBackLane):
            lane.hide()
        return ring

    with mock.patch.object(encode, "lane_of", return_value=lane), mock.patch.object(swap, "Ring", hiding):
        return build(plan)


@pytest.fixture
def made(planned: Planned) -> Made:
    """`made(*words, lane=…, base=…)`: `started` of `planned`."""
    return lambda *words, lane=None, base=BASE: started(planned(*words, base=base), lane)


def trained(run: Run) -> tuple[list[float], dict[str, Tensor]]:
    """The losses of two steps, and the weights after them."""
    losses = [loop.optimizer_step(run, item).loss for item in loop.step_batches(run)]
    return losses, {name: tensor.clone() for name, tensor in run.network.state_dict().items()}


def same(one: Any, other: Any) -> bool:
    """Whether two results of `trained` have the same bits, and are finite."""
    assert one[1].keys() == other[1].keys()
    assert all(torch.isfinite(torch.tensor(losses)).all() for losses, _ in (one, other))
    return one[0] == other[0] and all(torch.equal(tensor, other[1][name]) for name, tensor in one[1].items())
