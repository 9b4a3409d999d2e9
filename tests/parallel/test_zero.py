"""DeepSpeed's ZeRO-2 with two processes (gloo): the LoRA and the state of one process, from a state that is shared out.

Skipped where DeepSpeed is not installed; what is refused is tested anyway.
"""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from library.training import state
from tests.parallel.test_two_processes import IMAGES, launch, words
from tests.training.written import ROUNDED, distance

needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed: pip install --no-deps deepspeed"
)

# Five batches of two images an epoch: the second step of two has one batch, so one process has nothing to do in it.
LONG = ("--max_train_steps", "6", "--lr_scheduler", "cosine", "--shuffle_caption", "--gradient_checkpointing")
MORE = ("--ema_decay", "0.9", "--validation_split", "0.2", "--max_grad_norm", "0.01")
TWICE = ("--gradient_accumulation_steps", "2")
ZERO = "@deepspeed=1"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What each of the two processes did in the run of that name."""
    folder = tmp_path_factory.mktemp("zero")
    (folder / "data" / "2_style").mkdir(parents=True)
    for image in sorted(IMAGES.glob("*.png"))[:6]:
        shutil.copy(image, folder / "data" / "2_style")
        shutil.copy(image.with_suffix(".txt"), folder / "data" / "2_style")
    end = "--save_state_on_train_end"
    table = {
        "whole": words(folder, "whole", *LONG, *MORE, *TWICE, end, ZERO),
        "broken": words(folder, "broken", *LONG, *MORE, *TWICE, ZERO, "@stop=3"),
        "resumed": words(folder, "broken", *LONG, *MORE, *TWICE, end, "--resume", "latest", ZERO),
        "skipped": words(folder, "skipped", *LONG, end, "--on_divergence", "skip", "@nan=2", ZERO),
        "plain": words(folder, "plain", *LONG, end, "--on_divergence", "skip", "@nan=2"),
        "back": words(folder, "back", *LONG, *ROLLBACK, "@nan=4", ZERO),
        "plainly": words(folder, "plainly", *LONG, *ROLLBACK, "@nan=4"),
    }
    return launch(folder, table, DS_ACCELERATOR="cpu")


ROLLBACK = ("--on_divergence", "rollback", "--divergence_limit", "1", "--save_every_n_steps", "2", "--save_state")


def saved(folder: Path, name: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    file = folder / "out" / f"{name}.safetensors"
    return load_file(file), torch.load(file.with_name(f"{name}-state") / state.TENSORS, weights_only=True)


def assert_near(a: tuple[Any, Any], b: tuple[Any, Any]) -> None:
    """Networks but for rounding; the optimizer's averages, tensor by tensor, to 1 %."""
    assert distance(a[0], b[0]) < ROUNDED
    torch.testing.assert_close(a[1]["losses"], b[1]["losses"], rtol=1e-4, atol=0, equal_nan=True)
    one, other = (tensors["optimizer"] for _, tensors in (a, b))
    assert one["state"].keys() == other["state"].keys()
    assert [group["params"] for group in one["param_groups"]] == [group["params"] for group in other["param_groups"]]
    for number, entry in one["state"].items():
        assert entry["step"] == other["state"][number]["step"]
        for name in ("exp_avg", "exp_avg_sq"):
            of_other = other["state"][number][name]
            assert entry[name].shape == of_other.shape
            assert (entry[name] - of_other).abs().max() <= 0.01 * of_other.abs().max() + 1e-20


@needs_deepspeed
def test_the_lora_and_the_state_of_one_process(runs: Any, tmp_path: Path) -> None:
    from train_network import main

    assert [run["code"] for run in runs("whole")] == [0, 0], runs("whole")[0]["error"]
    assert "of 139776 weights are sharded over 2 processes, 69888 each" in runs("whole")[0]["error"]
    shutil.copytree(runs.folder / "data", tmp_path / "data")
    one = words(tmp_path, "one", *LONG, *MORE, "--save_state_on_train_end", "--gradient_accumulation_steps", "4")
    assert main(one) == 0
    assert_near(saved(tmp_path, "one"), saved(runs.folder, "whole"))


@needs_deepspeed
def test_a_resumed_run_has_the_same_bits(runs: Any) -> None:
    assert [run["code"] for run in runs("broken")] == [130, 130]
    assert [run["code"] for run in runs("resumed")] == [0, 0], runs("resumed")[0]["error"]
    (whole, of_whole), (resumed, of_resumed) = (saved(runs.folder, name) for name in ("whole", "broken"))
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    assert torch.equal(of_whole["losses"], of_resumed["losses"])
    for number, entry in of_whole["optimizer"]["state"].items():
        for name, value in entry.items():
            assert torch.equal(value, of_resumed["optimizer"]["state"][number][name])


@needs_deepspeed
def test_one_process_goes_on_from_its_state(runs: Any) -> None:
    from train_network import main

    folder = runs.folder
    shutil.copytree(folder / "out" / "broken-step00000003-state", folder / "out" / "single-step00000003-state")
    more = ("--gradient_accumulation_steps", "4", "--resume", "latest", "--save_state_on_train_end")
    assert main(words(folder, "single", *LONG, *MORE, *more)) == 0
    assert_near(saved(folder, "single"), saved(folder, "whole"))


@needs_deepspeed
@pytest.mark.parametrize(("name", "of_plain"), [("skipped", "plain"), ("back", "plainly")])
def test_a_gradient_that_is_no_number_is_found_before_the_step(name: str, of_plain: str, runs: Any) -> None:
    assert [run["code"] for run in runs(name)] == [run["code"] for run in runs(of_plain)], runs(name)[0]["error"]
    said = [
        [line for line in runs(run)[0]["error"].splitlines() if "is NaN in batch" in line] for run in (name, of_plain)
    ]
    assert said[0] == said[1] != []
    if name == "skipped":
        assert_near(saved(runs.folder, "skipped"), saved(runs.folder, "plain"))


@pytest.mark.parametrize(
    ("variables", "more", "said"),
    [
        (
            {},
            ("--optimizer_type", "CustomAdamW"),
            "--optimizer_type CustomAdamW with DeepSpeed's ZeRO-2: only AdamW and",
        ),
        ({}, ("--network_args", "module_dropout=0.1"), "--network_args module_dropout 0.1 with DeepSpeed's ZeRO-2: "),
        ({}, ("--scale_weight_norms", "1"), "--scale_weight_norms 1.0 with DeepSpeed's ZeRO-2: it changes weights"),
        ({"ZERO_STAGE": "3"}, (), "accelerate's deepspeed_config: zero_stage: 3: only 2 is possible"),
        ({"OFFLOAD_OPTIMIZER_DEVICE": "cpu"}, (), "offload_optimizer_device: cpu: only none is possible"),
    ],
)
def test_what_does_not_go_with_it(
    variables: dict[str, str],
    more: tuple[str, ...],
    said: str,
    train: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: found("torch" if name == "deepspeed" else name))
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    for name, value in variables.items():
        monkeypatch.setenv(f"ACCELERATE_DEEPSPEED_{name}", value)
    assert train(*more) == 2
    assert said in capsys.readouterr().err


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is not None, reason="DeepSpeed is installed")
def test_deepspeed_that_is_not_installed(
    train: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    assert train() == 2
    assert "uses DeepSpeed, which is not installed: pip install deepspeed" in capsys.readouterr().err
