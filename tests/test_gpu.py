"""Operations without a deterministic form, settings of CUDA, and full fp16: as far as a machine without one goes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest
import torch

from library import gpu


def test_operations_that_have_no_deterministic_form_are_named() -> None:
    error = RuntimeError(
        "max_pool3d_backward does not have a deterministic implementation, but you set "
        "'torch.use_deterministic_algorithms(True)'. You can turn off determinism just for this operation"
    )
    assert gpu.explained(error) == (
        "max_pool3d_backward does not have a deterministic implementation. --no-deterministic lets it run; two runs "
        "may then differ in their last digits"
    )


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
