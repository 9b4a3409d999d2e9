"""What many tests need: the small base model, a few images, and the real command line."""

from __future__ import annotations

import gc
import logging
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

# Several test processes share the cores, and the model is small.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# torch.compile would start a pool of processes in each of them.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

ROOT = Path(__file__).parent.parent
BASE = ROOT / "quickstart" / "base"
IMAGES = ROOT / "quickstart" / "images"
PATIENCE = 400  # seconds until another process counts as hanging: beside other work it may take twenty times as long
BASE_STYLE_IMAGES = ROOT / "tests" / "assets" / "noto"


# No clock and no chance decide a test.
calm = settings(deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("tests", calm)
settings.load_profile("tests")


def pytest_collection_finish() -> None:
    """What the tests import stays to the end. Each collection of garbage would walk through all of it, more than a
    million objects: a sixth of the time of a short training run.

    Some warnings torch gives once in a process: whichever test comes first would fail."""
    gc.freeze()
    if "torch" in sys.modules:
        sys.modules["torch"].set_warn_always(True)


@pytest.fixture(scope="session", autouse=True)
def warnings_elsewhere(pytestconfig: pytest.Config) -> None:
    """What is an error here is one in the processes that tests start."""
    os.environ["PYTHONWARNINGS"] = ",".join(pytestconfig.getini("filterwarnings"))


@pytest.fixture(autouse=True)
def fresh_accelerator() -> Iterator[None]:
    yield
    forget_accelerator()


def forget_accelerator() -> None:
    """accelerate keeps the settings of a process's first run; here one process makes many."""
    if "accelerate" in sys.modules:
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(autouse=True)
def logs_are_heard() -> Iterator[None]:
    """What a test has switched off, as a second process does with its warnings, is on again for the next one."""
    yield
    logging.disable(logging.NOTSET)
    for package in ("library", "networks"):
        ours = logging.getLogger(package)
        ours.setLevel(min(ours.level, logging.WARNING))


def _tiny(name: str) -> Any:
    """The fixture of a diffusers folder of a tiny model with random weights, as tests/tiny_NAME.py writes it."""

    @pytest.fixture(scope="session", name=f"tiny_{name}")
    def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
        written: Path = import_module(f"tests.tiny_{name}").write(tmp_path_factory.mktemp(f"tiny_{name}"))
        return written

    return folder


tiny_sdxl, tiny_sd3 = _tiny("sdxl"), _tiny("sd3")
tiny_flux, tiny_chroma, tiny_flux2 = _tiny("flux"), _tiny("chroma"), _tiny("flux2")
tiny_anima, tiny_z_image = _tiny("anima"), _tiny("z_image")


def copy_images(folder: Path, count: int = 6) -> None:
    """The first captioned images of the quickstart."""
    folder.mkdir(parents=True)
    for image in sorted((IMAGES / "train").glob("*.png"))[:count]:
        shutil.copy(image, folder)
        shutil.copy(image.with_suffix(".txt"), folder)


def run_training(folder: Path, *words: str) -> int:
    """train_network.py's main on `folder/data` at 64 px for four steps, into `folder/out`; `words` come last, so they
    win."""
    from train_network import main

    return main(
        [
            *("--pretrained_model_name_or_path", str(BASE), "--train_data_dir", str(folder / "data")),
            *("--caption_extension", ".txt", "--resolution", "64", "--train_batch_size", "2"),
            *("--output_dir", str(folder / "out"), "--output_name", "test"),
            *("--network_dim", "4", "--network_alpha", "2", "--learning_rate", "1e-3"),
            *("--max_train_steps", "4", "--seed", "1", "--no-loss_plot", "--no-report", "--cache_latents"),
            *("--max_data_loader_n_workers", "0", *words),
        ]
    )


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """`tmp_path/data` with `2_style`: six captioned images, two repeats, as --train_data_dir wants it."""
    copy_images(tmp_path / "data" / "2_style")
    return tmp_path / "data"


@pytest.fixture
def train(tmp_path: Path, image_folder: Path) -> Callable[..., int]:
    """`run_training` in `tmp_path`, on `image_folder`."""
    return partial(run_training, tmp_path)
