"""Two processes for real (gloo): the same LoRA as one process, data seen once, one writer, one decision to stop."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from library.training import state
from tests.conftest import PATIENCE
from tests.training.written import ROUNDED, distance

pytestmark = pytest.mark.slow  # a minute of two cores
ROOT = Path(__file__).parent.parent.parent
IMAGES = ROOT / "quickstart" / "images" / "train"

# With clip_skip the last layer of the text encoder is not used, so its LoRA has no gradient.
LONG = ("--max_train_steps", "8", "--lr_scheduler", "cosine", "--shuffle_caption", "--flip_aug", "--clip_skip", "2")
# Four images trained and one held back: three batches an epoch, so one process has nothing to do in every second step.
UNEVEN = ("--max_train_steps", "5", "--train_batch_size", "3", "--validation_split", "0.2", "--gradient_checkpointing")
WORD = (
    *("--token_string", "zfox", "--init_word", "flat", "--embedding_lr", "1e-2", "--caption_prefix", "zfox"),
    *("--network_train_unet_only", "--max_train_steps", "3"),
)
ADAM8 = ("--optimizer_type", "CustomAdamW", "--network_dim", "64")
# two of five images; nothing improves by a half, so the second validation after a step is the last
VALIDATED = (
    *("--validation_split", "0.4", "--validate_every_n_steps", "1", "--max_train_steps", "4"),
    *("--early_stopping_patience", "1", "--early_stopping_threshold", "0.5"),
)


def words(folder: Path, name: str, *more: str) -> list[str]:
    return [
        *("--pretrained_model_name_or_path", str(ROOT / "quickstart" / "base")),
        *("--train_data_dir", str(folder / "data"), "--caption_extension", ".txt", "--resolution", "64"),
        *("--output_dir", str(folder / "out"), "--output_name", name, "--network_dim", "4", "--network_alpha", "2"),
        *("--learning_rate", "1e-3", "--seed", "1", "--no-loss_plot", "--max_data_loader_n_workers", "0"),
        *("--train_batch_size", "1", *more),
    ]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[dict[str, Any]]]:
    """What each of the two processes did in the run of that name."""
    folder = tmp_path_factory.mktemp("two")
    (folder / "data" / "2_style").mkdir(parents=True)
    (folder / "few" / "1_style").mkdir(parents=True)
    for index, image in enumerate(sorted(IMAGES.glob("*.png"))[:5]):
        for target in ("data/2_style", *(("few/1_style",) if index == 0 else ())):
            shutil.copy(image, folder / target)
            shutil.copy(image.with_suffix(".txt"), folder / target)
    end = "--save_state_on_train_end"
    seedless = words(folder, "seedless", "--max_train_steps", "5")
    del seedless[(seed := seedless.index("--seed")) : seed + 2]
    table = {
        "sum": words(folder, "sum", *LONG, end, "--save_every_n_steps", "3", "--save_state"),
        "whole": words(folder, "whole", *LONG, *ADAM8, end),
        "broken": words(folder, "broken", *LONG, *ADAM8, "@stop=3"),
        "resumed": words(folder, "broken", *LONG, *ADAM8, end, "--resume", "latest"),
        "validated": words(folder, "validated", *VALIDATED, end),
        "nan": words(folder, "nan", *LONG, "@nan=2"),
        "copied": words(folder, "copied", *UNEVEN),
        "shared": words(folder, "shared", *UNEVEN, "@fsdp=1"),
        "word": words(folder, "word", *WORD, "@fsdp=1"),
        "seedless": seedless,
        "different": words(folder, "different", "--max_train_steps", "5", "@second=--noise_offset=0.1"),
        "few": words(folder, "few", "--train_data_dir", str(folder / "few"), "--max_train_steps", "2"),
    }
    return launch(folder, table)


def launch(folder: Path, table: dict[str, list[str]], **environment: str) -> Any:
    """Run each of these command lines in two processes. Returns a function from the name of one to what each process
    did, with the `folder`."""
    (folder / "runs.json").write_text(json.dumps(table))
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    done = subprocess.run(
        [*launcher, str(Path(__file__).with_name("two_processes.py")), str(folder)],
        env=os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]

    def of(name: str) -> list[dict[str, Any]]:
        return [json.loads((folder / f"{name}.{rank}.json").read_text()) for rank in (0, 1)]

    of.folder = folder  # type: ignore[attr-defined]
    return of


def final_state(folder: Path, name: str) -> dict[str, Any]:
    return torch.load(folder / "out" / f"{name}-state" / state.TENSORS, weights_only=True)


def test_the_same_lora_as_one_process_with_accumulation(runs: Any, tmp_path: Path) -> None:
    """The global batch is the same; the gradients are summed in another order, which Adam carries on for 8 steps."""
    from train_network import main

    assert [run["code"] for run in runs("sum")] == [0, 0]
    assert [run["world"] for run in runs("sum")] == [[2], [2]]
    shutil.copytree(runs.folder / "data", tmp_path / "data")
    single = words(tmp_path, "one", *LONG, "--save_state_on_train_end", "--gradient_accumulation_steps", "2")
    assert main(single) == 0
    one = load_file(tmp_path / "out" / "one.safetensors")
    two = load_file(runs.folder / "out" / "sum.safetensors")
    assert distance(one, two) < ROUNDED
    losses = [final_state(folder, name)["losses"] for folder, name in ((tmp_path, "one"), (runs.folder, "sum"))]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=0)
    schedules = [
        final_state(folder, name)["hooks"]["schedule"] for folder, name in ((tmp_path, "one"), (runs.folder, "sum"))
    ]
    assert schedules[0]["last_epoch"] == schedules[1]["last_epoch"] == 8
    trained = [
        final_state(folder, name)["optimizer"]["state"].keys()
        for folder, name in ((tmp_path, "one"), (runs.folder, "sum"))
    ]
    assert trained[0] == trained[1]
    assert len(trained[0]) < len(one)


def test_the_same_embedding_as_one_process_though_the_unet_is_sharded(runs: Any, tmp_path: Path) -> None:
    from train_network import main

    assert [run["code"] for run in runs("word")] == [0, 0]
    shutil.copytree(runs.folder / "data", tmp_path / "data")
    assert main([*words(tmp_path, "one", *WORD), "--gradient_accumulation_steps", "2"]) == 0
    one, two = (
        load_file(folder / "out" / f"{name}.safetensors") for folder, name in ((tmp_path, "one"), (runs.folder, "word"))
    )
    assert "bundle_emb.zfox.emb_params" in one
    assert distance(one, two) < ROUNDED


def test_nothing_is_seen_twice(runs: Any) -> None:
    first, second = ([key for _, keys in run["seen"] for key in keys] for run in runs("sum"))
    assert not set(first) & set(second)
    assert len(first) == len(set(first)) == len(second) == len(set(second)) == 8
    in_epoch = [key for key in first + second if key.startswith("0:")]
    assert len(in_epoch) == 10  # five images, two repeats


def test_only_the_first_process_writes(runs: Any) -> None:
    first, second = runs("sum")
    assert "sum.safetensors" in first["written"]
    assert second["written"] == []


def test_a_signal_to_one_process_stops_both_after_the_same_step(runs: Any) -> None:
    assert [run["code"] for run in runs("broken")] == [130, 130]
    assert [run["seen"][-1][0] for run in runs("broken")] == [3, 3]
    assert (runs.folder / "out" / "broken-step00000003-state").is_dir()


def test_resume_gives_the_same_bits(runs: Any) -> None:
    assert [run["code"] for run in runs("whole")] == [run["code"] for run in runs("resumed")] == [0, 0]
    whole, resumed = (load_file(runs.folder / "out" / f"{name}.safetensors") for name in ("whole", "broken"))
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    states = [final_state(runs.folder, name) for name in ("whole", "broken")]
    assert torch.equal(states[0]["losses"], states[1]["losses"])


def test_one_process_goes_on_from_the_state_of_two(runs: Any) -> None:
    """With accumulation, so that a step has the same batches; anything else is refused."""
    from train_network import main

    out = runs.folder / "out"
    shutil.copytree(out / "sum-step00000003-state", out / "single-step00000003-state")
    single = words(runs.folder, "single", *LONG, "--resume", "latest", "--save_state_on_train_end")
    assert main([*single, "--gradient_accumulation_steps", "3"]) == 2
    assert main([*single, "--gradient_accumulation_steps", "2"]) == 0
    two, one = (load_file(out / f"{name}.safetensors") for name in ("sum", "single"))
    assert distance(one, two) < ROUNDED
    torch.testing.assert_close(
        *(final_state(runs.folder, name)["losses"] for name in ("sum", "single")), rtol=1e-4, atol=0
    )


def test_the_loss_of_one_process_stops_both_and_names_its_images(runs: Any) -> None:
    assert [run["code"] for run in runs("nan")] == [2, 2]
    (of_second,) = (keys for step, keys in runs("nan")[1]["seen"] if step == 2)
    image = of_second[0].rsplit("/", 1)[-1].rsplit(":", 1)[-1]
    first, second = (run["error"] for run in runs("nan"))
    assert "step 2: the loss is NaN in batch 2 of 2, of " in first
    assert image in first.split("batch 2 of 2")[1]
    assert second == ""  # what all know is said once


def test_a_unet_that_is_shared_out_trains_the_same_lora(runs: Any) -> None:
    """FSDP of the frozen weights: the same numbers, but for matrices that are multiplied in other memory."""
    assert [run["code"] for run in runs("copied") + runs("shared")] == [0] * 4
    assert "are sharded over 2 processes" in runs("shared")[0]["error"]
    copied, shared = (load_file(runs.folder / "out" / f"{name}.safetensors") for name in ("copied", "shared"))
    assert distance(shared, copied) < ROUNDED
    validated = [
        re.findall(r"validation after 5 steps: ([\d.]+)", runs(name)[0]["error"]) for name in ("copied", "shared")
    ]
    assert len(validated[0]) == len(validated[1]) == 1
    assert float(validated[0][0]) == pytest.approx(float(validated[1][0]), rel=1e-3)


def test_a_seed_that_is_not_given_is_the_same_for_both(runs: Any) -> None:
    assert [run["code"] for run in runs("seedless")] == [0, 0]
    first, second = ([key for _, keys in run["seen"] for key in keys] for run in runs("seedless"))
    assert len({*first, *second}) == len(first) + len(second) == 10  # each image of the epoch once


def test_processes_that_would_train_different_things(runs: Any) -> None:
    for rank, run in enumerate(runs("different")):
        assert run["code"] == 2
        assert f"processes {rank} and {1 - rank} are not to train the same: noise_offset differ" in run["error"]


def test_too_few_images_for_the_processes(runs: Any) -> None:
    assert [run["code"] for run in runs("few")] == [2, 2]
    assert "2 processes, and an epoch has only 1 batches" in runs("few")[0]["error"]


def test_validation_gives_the_numbers_of_one_process_and_stops_both(runs: Any, tmp_path: Path) -> None:
    """The same but for the order of sums: of the losses at first, after training of the gradients, too."""
    from train_network import main

    assert [run["code"] for run in runs("validated")] == [0, 0]
    assert [run["seen"][-1][0] for run in runs("validated")] == [2, 2]
    assert "validated-best.safetensors" in runs("validated")[0]["written"]
    assert runs("validated")[1]["written"] == []
    shutil.copytree(runs.folder / "data", tmp_path / "data")
    single = words(tmp_path, "one", *VALIDATED, "--save_state_on_train_end", "--gradient_accumulation_steps", "2")
    assert main(single) == 0
    one, two = (
        final_state(folder, name)["hooks"]["validation"]["validations"]
        for folder, name in ((tmp_path, "one"), (runs.folder, "validated"))
    )
    assert one[0][1] == pytest.approx(two[0][1], rel=1e-6)
    assert one[0][2] == pytest.approx(two[0][2], rel=1e-6)
    assert [step for step, _, _ in one] == [step for step, _, _ in two] == [0, 1, 2]
    assert [loss for _, loss, _ in one] == pytest.approx([loss for _, loss, _ in two], rel=1e-5)
