"""Memory that runs out in each part of a run: a sentence with the part, exit code 2, and no trained step is lost."""

from __future__ import annotations

import errno
import json
import pkgutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from library.config import command
from library.config.options import declared_options
from library.out_of_memory import LESS_MEMORY, OutOfMemory, during, reason_of
from library.training import loop

FULL = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.19 GiB of which 1.06 GiB is "
    "free. Process 1 has 78.12 GiB memory in use. Of the allocated memory 77.01 GiB is allocated by PyTorch, and 0.30 "
    "GiB is reserved by PyTorch but unallocated. If reserved but unallocated memory is large try setting …"
)
WHAT = "the GPU's memory is too small: Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.19 GiB of which "
WHAT += "1.06 GiB is free"
Train = Callable[..., int]
Failing = Callable[..., None]


def test_errors_of_a_gpus_memory_are_recognised() -> None:
    assert reason_of(torch.OutOfMemoryError(FULL)) == WHAT
    assert reason_of(torch.OutOfMemoryError("")) is not None
    assert reason_of(RuntimeError("CUDA error: out of memory")) is not None
    assert reason_of(RuntimeError(FULL.removeprefix("CUDA out of memory. "))) is None
    assert reason_of(ValueError("DefaultCPUAllocator")) is None


def test_errors_of_the_computers_memory_are_recognised() -> None:
    """Those that torch and numpy really raise."""
    import numpy as np

    with pytest.raises(RuntimeError) as of_torch:
        torch.empty(2**58, dtype=torch.uint8)
    reason = reason_of(of_torch.value)
    assert reason is not None
    assert reason.startswith("the computer's memory is too small: 268435456.0 GiB were asked for, ")
    assert reason.endswith(" are free")
    with pytest.raises(MemoryError) as of_numpy:
        np.zeros(2**58, dtype=np.uint8)
    assert "256. PiB were asked for" in str(reason_of(of_numpy.value))
    assert reason_of(OSError(errno.ENOMEM, "Cannot allocate memory")) is not None
    assert reason_of(OSError(errno.ENOSPC, "No space left on device")) is None


def test_the_innermost_part_is_named_with_the_steps_of_the_outermost() -> None:
    with pytest.raises(OutOfMemory) as found, during("outside", done=3), during("inside"):
        raise MemoryError
    assert (found.value.part, found.value.done, found.value.is_whole) == ("inside", 3, True)
    assert str(found.value).startswith("inside: the computer's memory is too small: ")
    with pytest.raises(RuntimeError, match="other"), during("part"):
        raise RuntimeError("other")


def test_tensors_of_the_failed_call_are_freed() -> None:
    """Saving may need their memory."""
    import weakref

    held: list[weakref.ref[torch.Tensor]] = []

    def work() -> None:
        large = torch.zeros(8)
        held.append(weakref.ref(large))
        raise torch.OutOfMemoryError(FULL)

    with pytest.raises(OutOfMemory), during("work"):
        work()
    assert held[0]() is None


def test_every_option_that_is_recommended_exists() -> None:
    words = [word.strip(",;.") for word in LESS_MEMORY.split() if word.startswith("--")]
    assert len(words) == 10
    assert {word[2:] for word in words} <= set(declared_options())


@pytest.fixture(autouse=True)
def without_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    """tests/guidance/test_fit.py has the advice, whose estimates take seconds."""
    monkeypatch.setattr("library.job._advice", lambda plan: LESS_MEMORY)


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Failing:
    """Have a method fail at its n-th call."""

    def fail(owner: object, name: str, *, call: int = 1, error: BaseException | None = None) -> None:
        whole, calls = getattr(owner, name), 0

        def failed(*args: object, **kwargs: object) -> object:
            nonlocal calls
            calls += 1
            if calls == call:
                raise error or torch.OutOfMemoryError(FULL)
            return whole(*args, **kwargs)

        monkeypatch.setattr(owner, name, failed)

    return fail


def error_of(capsys: pytest.CaptureFixture[str]) -> str:
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error[error.index("error: ") :]


def test_a_tool_that_runs_out_of_memory(capsys: pytest.CaptureFixture[str]) -> None:
    def draw(_: Sequence[str]) -> int:
        raise torch.OutOfMemoryError(FULL)

    assert command.run(draw, []) == 2
    assert error_of(capsys).startswith(f"error: {WHAT}")


@pytest.mark.parametrize("step", [1, 3])
def test_a_step_keeps_what_was_trained(
    train: Train, failing: Failing, tmp_path: Path, step: int, capsys: pytest.CaptureFixture[str]
) -> None:
    failing(loop, "backward", call=step)
    assert train() == 2
    kept = "The run is saved as of step 2" if step == 3 else "Nothing was trained yet, and nothing was written"
    assert error_of(capsys).startswith(f"error: step {step}: {WHAT}. {kept}. ")
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert files == (["test-step00000002.safetensors"] if step == 3 else [])
    for name in files:
        assert load_file(tmp_path / "out" / name)
    record = json.loads((tmp_path / "out" / "test-run.json").read_text(encoding="utf-8"))
    assert record["status"] == "failed"
    assert record["reason"].startswith(f"step {step}: the GPU's memory is too small")


def test_the_saved_state_can_be_resumed(train: Train, failing: Failing, capsys: pytest.CaptureFixture[str]) -> None:
    failing(loop, "backward", call=3)
    assert train() == 2
    capsys.readouterr()
    assert train("--resume", "latest") == 0


@pytest.mark.slow
def test_the_computers_memory_in_a_step(train: Train, failing: Failing, capsys: pytest.CaptureFixture[str]) -> None:
    error = RuntimeError(
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
        "allocate 17179869184 bytes. Error code 12 (Cannot allocate memory)"
    )
    failing(loop, "backward", call=2, error=error)
    assert train() == 2
    message = error_of(capsys)
    assert message.startswith("error: step 2: the computer's memory is too small: 16.0 GiB were asked for, ")
    assert "The run is saved as of step 1" in message


@pytest.mark.parametrize(
    ("owner", "name"),
    [("accelerate.optimizer:AcceleratedOptimizer", "step"), ("networks.network:Network", "after_step")],
)
def test_the_optimizer_may_have_changed_weights(
    train: Train, failing: Failing, owner: str, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the middle of its step, and until the step is over, weights are of two steps: they are not saved."""
    failing(pkgutil.resolve_name(owner), name, call=3)
    assert train() == 2
    message = error_of(capsys)
    assert message.startswith(f"error: the optimizer in step 3: {WHAT}. It has changed some of the weights, so nothing")
    assert not list((tmp_path / "out").glob("*.safetensors"))


@pytest.mark.parametrize(
    ("owner", "name", "words", "part"),
    [
        pytest.param("library.models.checkpoints.weights", "fill", (), "loading the VAE", id="loading"),
        pytest.param(
            "library.models.stable_diffusion:StableDiffusion",
            "encode_images",
            ("--vae_batch_size", "2"),
            "encoding 2 images with the VAE",
            id="latents",
        ),
        pytest.param(
            "library.models.stable_diffusion:StableDiffusion",
            "encode_prompts",
            ("--cache_text_encoder_outputs", "--network_train_unet_only"),
            "encoding 2 captions with the text encoders",
            id="captions",
        ),
    ],
)
def test_parts_before_training(
    train: Train,
    failing: Failing,
    owner: str,
    name: str,
    words: tuple[str, ...],
    part: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    failing(pkgutil.resolve_name(owner), name)
    assert train(*words) == 2
    assert error_of(capsys).startswith(f"error: {part}: {WHAT}. ")


@pytest.mark.slow
def test_validation(train: Train, failing: Failing, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from library.training import fixed_noise

    failing(fixed_noise, "image_losses", call=16)  # 5 levels each time, 1 image: the one after step 3
    words = ("--validation_split", "0.2", "--validate_every_n_steps", "1")
    assert train(*words) == 2
    message = error_of(capsys)
    assert message.startswith(f"error: validation after step 3: {WHAT}. The run is saved as of step 3. ")
    assert (tmp_path / "out" / "test-step00000003.safetensors").is_file()


def test_sampling(train: Train, failing: Failing, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from library.models.stable_diffusion import StableDiffusion

    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a fox --w 64 --h 64 --s 2\n", encoding="utf-8")
    failing(StableDiffusion, "decode_latents")
    assert train("--sample_prompts", str(prompts), "--sample_every_n_steps", "2") == 2
    message = error_of(capsys)
    assert message.startswith(f"error: rendering samples after step 2: {WHAT}. The run is saved as of step 2. ")


def test_saving(train: Train, failing: Failing, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from library.record import saves

    failing(saves, "save_network", call=2)
    assert train("--save_every_n_steps", "1") == 2
    message = error_of(capsys)
    assert message.startswith(f"error: saving after step 2: {WHAT}. The run is saved as of step 2. ")
    assert {path.name for path in (tmp_path / "out").glob("*.safetensors")} == {
        "test-step00000001.safetensors",
        "test-step00000002.safetensors",
    }


@pytest.mark.slow
def test_the_rate_finder(train: Train, failing: Failing, capsys: pytest.CaptureFixture[str]) -> None:
    failing(loop, "backward", call=2)
    assert train("--find_lr", "--find_lr_steps", "20") == 2
    assert error_of(capsys).startswith(f"error: step 2: {WHAT}. ")


def test_a_plan_that_does_not_fit_the_computer(
    train: Train, failing: Failing, capsys: pytest.CaptureFixture[str]
) -> None:
    from library.data import prepare

    failing(prepare, "prepare", error=MemoryError())
    assert train() == 2
    assert error_of(capsys).startswith("error: the computer's memory is too small: ")
