"""Errors of a GPU in plain words, its settings, and full fp16: as far as a machine without one goes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from library import gpu
from library.training import loop

FULL = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.19 GiB of which 1.06 GiB is "
    "free. Process 1 has 78.12 GiB memory in use. Of the allocated memory 77.01 GiB is allocated by PyTorch, and 0.30 "
    "GiB is reserved by PyTorch but unallocated. If reserved but unallocated memory is large try setting …"
)
WHAT = "Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.19 GiB of which 1.06 GiB is free"


def test_errors_of_memory_are_explained() -> None:
    assert gpu.explained(torch.OutOfMemoryError(FULL)) == f"the GPU's memory is too small: {WHAT}. {gpu.LESS_MEMORY}"
    assert gpu.explained(torch.OutOfMemoryError("")) is not None
    assert gpu.explained(RuntimeError(FULL)) is None


def test_operations_that_have_no_deterministic_form_are_named() -> None:
    error = RuntimeError(
        "max_pool3d_backward does not have a deterministic implementation, but you set "
        "'torch.use_deterministic_algorithms(True)'. You can turn off determinism just for this operation"
    )
    assert gpu.explained(error) == (
        "max_pool3d_backward does not have a deterministic implementation. --no-deterministic lets it run; two runs "
        "may then differ in their last digits"
    )


def test_every_option_that_is_recommended_exists() -> None:
    from library.config.options import declared_options

    words = [word.strip(",;.") for word in gpu.LESS_MEMORY.split() if word.startswith("--")]
    assert len(words) == 10
    assert {word[2:] for word in words} <= set(declared_options())


@pytest.mark.parametrize("step", [1, 3])
def test_a_step_without_memory_keeps_what_was_trained(
    train: Callable[..., int],
    tmp_path: Path,
    step: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    one_backward, calls = loop.backward, 0

    def backward(run: loop.Run, batch: object, *, weight: float) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == step:
            raise torch.OutOfMemoryError(FULL)
        return one_backward(run, batch, weight=weight)  # type: ignore[arg-type]

    monkeypatch.setattr(loop, "backward", backward)
    assert train() == 2
    error = capsys.readouterr().err
    kept = "The run is saved as of step 2" if step == 3 else "Nothing was trained yet, and nothing was written"
    assert f"error: step {step}: the GPU's memory is too small: {WHAT}. {kept}. {gpu.LESS_MEMORY}\n" in error
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert files == (["test-step00000002.safetensors"] if step == 3 else [])
    for name in files:
        assert load_file(tmp_path / "out" / name)


def test_memory_that_ends_before_training_is_an_error_without_traceback(
    train: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from library.models.components import Components

    def load(*_: object) -> None:
        raise torch.OutOfMemoryError(FULL)

    monkeypatch.setattr(Components, "load", load)
    assert train() == 2
    assert f"error: the GPU's memory is too small: {WHAT}" in capsys.readouterr().err


@pytest.fixture
def torchs_settings(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whatever a test sets is undone."""
    monkeypatch.delenv(gpu.WORKSPACE, raising=False)
    found = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = found
    os.environ.pop(gpu.WORKSPACE, None)


@pytest.mark.usefixtures("torchs_settings")
@pytest.mark.parametrize("tf32", [False, True])
def test_settings_of_cuda(tf32: bool) -> None:
    gpu.settle(deterministic=True, allow_tf32=tf32)
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
    assert os.environ[gpu.WORKSPACE] == ":4096:8"  # else cuBLAS refuses
    assert torch.backends.cuda.matmul.allow_tf32 == torch.backends.cudnn.allow_tf32 == tf32
    gpu.settle(deterministic=False, allow_tf32=tf32)
    assert not torch.are_deterministic_algorithms_enabled()


def test_settings_of_cuda_do_nothing_on_a_cpu(train: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert train("--max_train_steps", "1") == 0
    assert "has no effect on cpu" not in capsys.readouterr().err
    assert train("--max_train_steps", "1", "--overwrite", "--no-deterministic", "--allow_tf32") == 0
    error = capsys.readouterr().err
    assert "command line: --no-deterministic: has no effect on cpu" in error
    assert "command line: --allow_tf32: has no effect on cpu" in error
    assert not torch.are_deterministic_algorithms_enabled()


def test_gradients_in_fp16_are_unscaled() -> None:
    """torch's scaler refuses them; of what overflows the step is left out, and the scale is halved."""
    weight = torch.nn.Parameter(torch.ones(4, dtype=torch.float16))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    weight.grad = torch.full((4,), 2.0, dtype=torch.float16)
    scaler.scale(torch.ones(()))
    with pytest.raises(ValueError, match="Attempting to unscale FP16 gradients"):
        scaler.unscale_(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    gpu.unscale_fp16(scaler)
    scaler.scale(torch.ones(()))
    scaler.unscale_(optimizer)
    assert weight.grad.tolist() == [0.25] * 4
    scaler.step(optimizer)
    scaler.update()
    assert weight.tolist() == [0.75] * 4
    weight.grad = torch.full((4,), float("inf"), dtype=torch.float16)
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    assert weight.tolist() == [0.75] * 4
    assert scaler.get_scale() == 4.0
