"""Training from caches on disk, through the real command line on the small base model."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState
from PIL import Image

from library.models.components import Components
from library.models.stable_diffusion import StableDiffusion
from library.units import human_bytes
from tests.conftest import BASE, PATIENCE, ROOT
from tests.training.written import ROUNDED, distance, same, weights

UNCACHED = ("--no-cache_latents", "--network_train_unet_only", "--train_batch_size", "1")
MEMORY = ("--cache_latents", "--cache_text_encoder_outputs", "--network_train_unet_only", "--train_batch_size", "1")
DISK = (*MEMORY[2:], "--no-cache_latents", "--cache_latents_to_disk", "--cache_text_encoder_outputs_to_disk")


class Calls:
    def __init__(self) -> None:
        self.images = self.captions = self.vaes = self.text_encoders = 0

    def take(self) -> tuple[int, int, int, int]:
        """(images, captions, VAEs loaded, text encoders loaded) since the last time."""
        taken = self.images, self.captions, self.vaes, self.text_encoders
        self.__init__()
        return taken


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """What the model is asked to do; it does it."""
    count = Calls()
    encode_images, encode_prompts = StableDiffusion.encode_images, StableDiffusion.encode_prompts
    load = Components.load

    def images(self, pixels):
        count.images += len(pixels)
        return encode_images(self, pixels)

    def prompts(self, captions):
        count.captions += len(captions)
        return encode_prompts(self, captions)

    def part(self, name, *words, **how):
        count.vaes += name == "vae"
        count.text_encoders += name == "text_encoder"
        return load(self, name, *words, **how)

    monkeypatch.setattr(StableDiffusion, "encode_images", images)
    monkeypatch.setattr(StableDiffusion, "encode_prompts", prompts)
    monkeypatch.setattr(Components, "load", part)
    return count


def test_with_without_and_from_the_cache_train_the_same(train, tmp_path, calls):
    for name, words in {"none": UNCACHED, "memory": MEMORY, "first": DISK, "second": DISK}.items():
        assert train(*words, "--flip_aug", "--output_name", name) == 0
        used = calls.take()
    assert used == (0, 0, 0, 0), "the second run loads neither VAE nor text encoder"
    one = weights(tmp_path, "none")
    assert any(tensor.abs().max() > 0 for key, tensor in one.items() if "lora_up" in key)
    for name in ("memory", "first"):  # what is encoded while training lies elsewhere in memory
        assert distance(weights(tmp_path, name), one) < ROUNDED
    assert same(weights(tmp_path, "first"), weights(tmp_path, "second"))


@pytest.mark.slow
def test_only_what_has_changed_is_encoded(train, tmp_path, image_folder, calls):
    run = iter(range(100))

    def encoded(*words: str) -> tuple[int, int, int, int]:
        assert train(*DISK, "--output_name", f"run{next(run)}", "--max_train_steps", "1", *words) == 0
        return calls.take()

    assert encoded() == (6, 6, 1, 1)
    image, other = sorted((image_folder / "2_style").glob("*.png"))[:2]
    with Image.open(image) as opened:
        opened.convert("RGB").transpose(Image.Transpose.ROTATE_90).save(image)
    assert encoded() == (1, 0, 1, 0)
    other.with_suffix(".txt").write_text("something else")
    assert encoded("--flip_aug") == (6, 1, 1, 1)
    assert encoded("--resolution", "32", "--clip_skip", "2") == (6, 6, 1, 1)
    vae = Path(shutil.copytree(BASE / "vae", tmp_path / "vae"))
    assert encoded("--vae", str(vae), "--learning_rate", "1e-4", "--seed", "2", "--network_dim", "2") == (0, 0, 0, 0)
    file = vae / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + bytes([file.read_bytes()[-1] ^ 1]))
    assert encoded("--vae", str(vae)) == (6, 0, 1, 0)
    AcceleratorState._reset_state(reset_partial_state=True)
    assert encoded("--mixed_precision", "bf16", "--no_half_vae") == (0, 6, 0, 1)


def test_the_place_can_be_chosen_and_is_said(train, tmp_path, image_folder, capsys):
    place = tmp_path / "kept"
    assert train(*DISK, "--cache_dir", str(place), "--max_train_steps", "1") == 0
    said = capsys.readouterr().err
    assert f"latents on disk: 0 read (0.0 MB), 6 encoded (0.1 MB), for 6 images, in {place / 'latents'}" in said
    assert f"6 encoded (0.1 MB), for 6 captions, in {place / 'texts'}" in said
    assert len(list(place.glob("*/*.safetensors"))) == 12
    assert not (image_folder / "2_style" / ".lora_cache").exists()


@pytest.mark.slow
def test_a_dry_run_says_what_it_will_take(train, image_folder, capsys):
    words = (*DISK, "--flip_aug", "--max_train_steps", "1")
    assert train(*words) == 0
    files = sorted((image_folder / "2_style" / ".lora_cache" / "latents").iterdir())
    sizes = [path.stat().st_size for path in files]
    for path in files[:5]:
        path.unlink()
    capsys.readouterr()
    assert train(*words, "--overwrite", "--dry_run") == 0
    latents, texts = (line for line in capsys.readouterr().out.splitlines() if line.startswith("cache"))
    assert f"latents: 12 files, {human_bytes(sum(sizes))}, in {files[0].parent}; " in latents
    assert f"7 ({human_bytes(sum(sizes[5:]))}) are there, 5 ({human_bytes(sum(sizes[:5]))}) to be made" in latents
    assert "text encoder outputs: 6 files" in texts
    assert "6 (" in texts
    assert not files[0].exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--cache_text_encoder_outputs_to_disk",), "--cache_text_encoder_outputs_to_disk needs --network_train_unet"),
        (("--cache_dir", "x"), "add --cache_latents_to_disk or --cache_text_encoder_outputs_to_disk"),
        ((*DISK, "--cache_dir", str(BASE / "model_index.json")), "Give another place with --cache_dir"),
        ((*DISK, "--shuffle_caption"), "cache_text_encoder_outputs_to_disk and shuffle_caption exclude"),
        ((*DISK, "--random_crop"), "cache_latents_to_disk and random_crop exclude"),
    ],
)
def test_what_cannot_be_is_refused(train, tmp_path, capsys, words, said):
    assert train(*words) == 2
    assert said in capsys.readouterr().err


def test_skip_cache_check_without_files_says_that_it_does_nothing(train, capsys):
    assert train("--skip_cache_check", "--max_train_steps", "1") == 0
    assert "--skip_cache_check: has no effect" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_share_the_work(train, tmp_path, image_folder, calls):
    """Each encodes its share, both train on all of it."""
    marks = tmp_path / "marks"
    marks.mkdir()
    script = tmp_path / "watched.py"
    script.write_text(f"""
import os, sys
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
from library.models.stable_diffusion import StableDiffusion
from train_network import main
for name in ("encode_images", "encode_prompts"):
    def counting(self, items, *, name=name, original=getattr(StableDiffusion, name)):
        with (Path({str(marks)!r}) / (name + os.environ["RANK"])).open("a") as file:
            file.write("x" * len(items))
        return original(self, items)
    setattr(StableDiffusion, name, counting)
sys.exit(main(sys.argv[1:]))
""")
    words = [
        *("--pretrained_model_name_or_path", str(BASE), "--train_data_dir", str(image_folder)),
        *("--caption_extension", ".txt", "--resolution", "64", "--output_dir", str(tmp_path / "out2")),
        *("--max_train_steps", "2", "--seed", "1", "--no-loss_plot", "--max_data_loader_n_workers", "0", *DISK),
    ]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    result = subprocess.run(
        [*launcher, str(script), *words],
        env=os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert result.returncode == 0, result.stderr
    counts = {path.name: len(path.read_text()) for path in marks.iterdir()}
    assert counts == dict.fromkeys(("encode_images0", "encode_images1", "encode_prompts0", "encode_prompts1"), 3)
    assert train(*DISK, "--max_train_steps", "1") == 0
    assert calls.take() == (0, 0, 0, 0)
