"""The command line on a GPU: losses, bits, resuming, precision, 8 bits, caches, samples, memory."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from library.data.loader import PixelLoader
from library.data.views import View
from library.models.opening import open_family
from library.quantization.fp8 import FLOAT8
from tests.conftest import IMAGES, run_training
from tests.gpu.conftest import GPU, REHEARSED, Trained

pytestmark = pytest.mark.gpu
Train = Callable[..., Trained]

# How far a loss may be from fp32's on a CPU, relative to it. fp32 sums in another order: 2e-7 between two ways to do so
# on a CPU, where TF32 would be off by about 1e-3. bf16 on a CPU: 8e-3 at most in 12 steps; fp16 has three more bits.
BOUNDS = {"no": 5e-5, "bf16": 2e-2, "fp16": 5e-3}


def apart(losses: list[float], expected: list[float]) -> float:
    return max(abs(a - b) / b for a, b in zip(losses, expected, strict=True))


@pytest.mark.parametrize("precision", BOUNDS)
def test_losses_are_those_of_a_cpu(on_gpu: Train, on_cpu: Trained, precision: str) -> None:
    if REHEARSED and precision == "fp16":
        pytest.skip("fp16 needs a GPU")
    found = apart(on_gpu("gpu", "--mixed_precision", precision).losses, on_cpu.losses)
    print(f"{precision}: losses differ by {found:.1e}")
    assert found <= BOUNDS[precision]


@pytest.mark.usefixtures("real_gpu")
def test_an_overflow_in_fp16_is_left_out(on_gpu: Train, on_cpu: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a scale of 2^40 every gradient is infinite: no step is made until it is small enough, and then all are."""
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", functools.partial(scaler, init_scale=2.0**40))
    run = on_gpu("gpu", "--mixed_precision", "fp16", "--max_train_steps", "40")
    norms = [line["gradient_norm"] for line in run.lines if "gradient_norm" in line]
    skipped = sum(norm is None for norm in norms)
    print(f"{skipped} steps were left out")
    assert 3 <= skipped <= 36
    assert all(norm is None for norm in norms[:skipped])
    ratios = [line["update_ratio"] for line in run.lines if "update_ratio" in line]
    assert ratios[0] == 0  # the first step is measured: it changed nothing
    assert ratios[-1] > 0
    assert apart(run.losses[:1], on_cpu.losses[:1]) <= BOUNDS["fp16"]


@pytest.mark.usefixtures("real_gpu")
def test_weights_in_fp16_train(on_gpu: Train) -> None:
    words = ("--mixed_precision", "fp16", "--full_fp16", "--optimizer_args", "eps=1e-4")
    run = on_gpu("gpu", *words)
    assert {tensor.dtype for name, tensor in run.tensors.items() if "alpha" not in name} == {torch.float16}
    assert all(tensor.isfinite().all() for tensor in run.tensors.values())
    assert any(tensor.any() for name, tensor in run.tensors.items() if "lora_up" in name)


@pytest.mark.parametrize(
    "words",
    [
        pytest.param((), id="fp32"),
        pytest.param(("--mixed_precision", "bf16", "--gradient_checkpointing"), id="bf16, checkpointing"),
        pytest.param(
            ("--mixed_precision", "bf16", "--fp8_base", "--network_args", "conv_dim=2"), id="fp8, convolutions"
        ),
        pytest.param(
            ("--mixed_precision", "bf16", "--network_dropout", "0.2", "--optimizer_type", "CustomAdamW"),
            id="CustomAdamW",
        ),
    ],
)
def test_one_seed_gives_the_same_bits(on_gpu: Train, words: tuple[str, ...]) -> None:
    first = on_gpu("one", *words)
    assert first.has_the_bits_of(on_gpu("two", *words))
    assert not first.has_the_bits_of(on_gpu("other", *words, "--seed", "2"))


OPTIMIZERS = {
    "AdamW": ("AdamW",),
    "AdamW8bit": ("AdamW8bit",),
    "PagedAdamW8bit": ("PagedAdamW8bit",),
    "Lion8bit": ("Lion8bit", "--learning_rate", "1e-4"),
    "CustomAdamW": ("CustomAdamW",),
    "CustomAdamW, paged": ("CustomAdamW", "--is_paged", "--min_8bit_size", "0"),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_resumed_run_has_the_same_bits(on_gpu: Train, tmp_path: Path, name: str) -> None:
    """Dropout, a schedule and an average too. Large ranks, so that moments are kept in 8 bits."""
    if name.endswith("8bit"):
        pytest.importorskip("bitsandbytes")
        if REHEARSED and name != "AdamW8bit":
            pytest.skip("bitsandbytes has these on GPUs only")
    words = ("--optimizer_type", *OPTIMIZERS[name], "--network_dim", "32", "--network_dropout", "0.1")
    words += ("--lr_scheduler", "cosine", "--ema_decay", "0.9", "--mixed_precision", "bf16")
    whole = on_gpu("whole", *words)
    assert all(tensor.isfinite().all() for tensor in whole.tensors.values())
    on_gpu("broken", *words, "--save_every_n_steps", "4", "--save_state")
    (tmp_path / "out" / "broken.safetensors").unlink()
    state = tmp_path / "out" / "broken-step00000004-state"
    assert state.is_dir()
    resumed = on_gpu("broken", *words, "--resume", str(state))
    assert resumed.has_the_bits_of(whole)


@pytest.mark.usefixtures("real_gpu")
@pytest.mark.parametrize(
    ("eight", "plain"), [("AdamW8bit", "AdamW"), ("PagedAdamW8bit", "AdamW"), ("Lion8bit", "Lion")]
)
def test_eight_bits_train_like_thirty_two(on_gpu: Train, eight: str, plain: str) -> None:
    """Losses within 2 %, of which 1 % is what bf16 makes of them; the same loss twice would be no comparison."""
    pytest.importorskip("bitsandbytes")
    if plain == "Lion":
        pytest.importorskip("lion_pytorch")
    words = ("--network_dim", "32", "--learning_rate", "1e-4")
    ours = on_gpu("eight", *words, "--optimizer_type", eight)
    theirs = on_gpu("plain", *words, "--optimizer_type", plain)
    found = apart(ours.losses, theirs.losses)
    print(f"{eight}: losses differ by {found:.1e} from {plain}'s")
    assert 0 < found <= 2e-2


def test_frozen_weights_in_8_bits(on_gpu: Train, on_cpu: Trained) -> None:
    """A GPU rounds to 8 bits as a CPU does, and losses stay near those of bf16: 10 % for three bits of mantissa."""
    numbers = torch.randn(100_000, generator=torch.Generator().manual_seed(0)) * 30
    numbers = numbers.to(torch.bfloat16)
    assert torch.equal(numbers.to(FLOAT8).view(torch.uint8), numbers.to(GPU).to(FLOAT8).cpu().view(torch.uint8))
    found = apart(on_gpu("gpu", "--mixed_precision", "bf16", "--fp8_base").losses, on_cpu.losses)
    print(f"fp8: losses differ by {found:.1e}")
    assert found <= 0.1


def test_workers_and_pinned_memory_change_nothing(on_gpu: Train) -> None:
    words = ("--no-cache_latents", "--flip_aug", "--shuffle_caption", "--mixed_precision", "bf16")
    alone = on_gpu("alone", *words)
    assert alone.has_the_bits_of(on_gpu("two", *words, "--max_data_loader_n_workers", "2"))


@pytest.mark.usefixtures("real_gpu")
def test_pixels_come_in_pinned_memory() -> None:
    path = next((IMAGES / "train").glob("*.png"))
    views = [View(path, (64, 64), (0, 0), (64, 64), False)]
    for workers in (0, 1):
        loaded = list(PixelLoader(workers=workers, most_batches=2, pin=True)([views, views]))
        assert [pixels.is_pinned() for pixels, _ in loaded] == [True, True]


def test_latents_on_disk_are_those_in_memory(on_gpu: Train, tmp_path: Path) -> None:
    words = ("--mixed_precision", "bf16", "--network_train_unet_only", "--cache_text_encoder_outputs")
    memory = on_gpu("memory", *words)
    places = ("--cache_latents_to_disk", "--cache_text_encoder_outputs_to_disk", "--cache_dir", str(tmp_path / "cache"))
    assert memory.has_the_bits_of(on_gpu("written", *words, *places))
    assert memory.has_the_bits_of(on_gpu("read", *words, *places))


# Relative to the norm of the latents. Measured on a CPU: bf16 7e-3, fp16 9e-4.
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2), (torch.float16, 5e-3)])
def test_latents_are_those_of_a_cpu(tiny_sdxl: Path, dtype: torch.dtype, bound: float) -> None:
    """Of an SDXL-like VAE in each precision."""
    pixels = torch.rand(2, 3, 128, 96, generator=torch.Generator().manual_seed(0)) * 2 - 1
    moments = []
    for device, kind in ((torch.device("cpu"), torch.float32), (GPU, dtype)):
        family = open_family(str(tiny_sdxl))
        family.components.load("vae", kind, device)
        mean, std = family.encode_images(pixels)
        moments.append(torch.cat([mean, std]).cpu())
    found = float((moments[0] - moments[1]).norm() / moments[0].norm())
    print(f"{dtype}: latents differ by {found:.1e}")
    assert found <= bound


def test_sdxl_trains(on_gpu: Train, tiny_sdxl: Path) -> None:
    words = ("--pretrained_model_name_or_path", str(tiny_sdxl), "--mixed_precision", "bf16", "--gradient_checkpointing")
    first = on_gpu("one", *words)
    assert first.has_the_bits_of(on_gpu("two", *words))
    found = apart(first.losses, on_gpu("cpu", *words[:2], on_cpu=True).losses)
    print(f"SDXL in bf16: losses differ by {found:.1e}")
    assert found <= BOUNDS["bf16"]


def test_samples_are_those_of_a_cpu(on_gpu: Train, tmp_path: Path) -> None:
    """fp32, so to one level of 255 in the mean; validated, averaged and compared in the same runs."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("emoji of a red fox --w 64 --h 64 --s 8 --d 1\n")
    words = ("--sample_prompts", str(prompts), "--sample_every_n_steps", "8", "--validation_split", "0.4")
    words += ("--ema_decay", "0.9", "--compare_prompts", "emoji of a red fox", "--compare_steps", "4")
    on_gpu("gpu", *words)
    on_gpu("cpu", *words, on_cpu=True)
    drawn = {
        name: [np.asarray(Image.open(path), dtype=np.float32) for path in sorted((tmp_path / "out").glob(pattern))]
        for name, pattern in (("gpu", "sample/gpu_0*.png"), ("cpu", "sample/cpu_0*.png"))
    }
    assert len(drawn["gpu"]) == len(drawn["cpu"]) == 1
    found = float(np.abs(drawn["gpu"][0] - drawn["cpu"][0]).mean())
    print(f"samples differ by {found:.3f} levels")
    assert found <= 1
    assert (tmp_path / "out" / "gpu-compare.png").is_file()


def test_the_dry_run_and_what_is_held(on_gpu: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """At most 200 MB more than is computed: the workspaces of cuBLAS and cuDNN; benchmarks.gpu has the true sizes."""
    words = ("--train_batch_size", "4", "--mixed_precision", "bf16")
    assert run_training(tmp_path, *words, "--dry_run=measure") == 0
    printed = capsys.readouterr().out
    assert "s a step, measured" in printed
    found = re.search(r"about ([\d.]+) (MiB|GiB) in a step", printed)
    assert found is not None
    computed = float(found[1]) * {"MiB": 2**20, "GiB": 2**30}[found[2]]
    if not REHEARSED:
        torch.cuda.reset_peak_memory_stats()
        (end,) = (line["end"] for line in on_gpu("gpu", *words).lines if "end" in line)
        held = end["memory"]["of the GPU"]
        print(f"computed {computed / 2**20:.0f} MiB, held {held / 2**20:.0f} MiB at the most")
        assert held <= computed + 200 * 2**20


def test_the_rate_finder_runs(tmp_path: Path, on_gpu: Train, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_training(tmp_path, "--find_lr", "--find_lr_steps", "20", "--mixed_precision", "bf16") == 0
    assert "suggestion" in capsys.readouterr().out
