"""Training adapters, for bases that are distilled to a few steps: they act in training and are off for samples."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from library.files.hashes import sha256
from library.record import run_file
from tests import tiny_flux2, tiny_z_image
from tests.flow_families import CACHED, FLOW, FlowFamily, Words
from tests.quick import quick
from tests.training.written import ROUNDED, distance, metadata, refused, same, weights

Train = Callable[..., int]
SHORT = (*CACHED, "--max_train_steps", "2", "--save_naming", "kohya")
DRAWN = ("--sample_prompts", "prompts.txt", "--sample_at_first")
DISTILLED: dict[str, tuple[Words, list[str]]] = {
    "z_image": (("--turbo",), [f"diffusion_model.layers.{i}.attention" for i in range(tiny_z_image.LAYERS)]),
    "flux2": (
        ("--model_version", "klein-4b"),
        [f"transformer.transformer_blocks.{i}.attn" for i in range(tiny_flux2.DOUBLES)],
    ),
}
"""The words that say that the base is distilled, and its attentions as adapter files name them."""
Z_IMAGE = FLOW["z_image"]
KNOWN = [FLOW[name] for name in DISTILLED]


@pytest.fixture
def adapter(family: FlowFamily, tmp_path: Path) -> Path:
    """A file that changes the base a lot."""
    generator, tensors, width = torch.Generator().manual_seed(2), {}, family.tiny.WIDTH
    for attention in DISTILLED[family.name][1]:
        for name in ("to_q", "to_k", "to_v", "to_out.0"):
            place = f"{attention}.{name}"
            tensors[f"{place}.lora_A.weight"] = torch.randn(4, width, generator=generator) * 0.2
            tensors[f"{place}.lora_B.weight"] = torch.randn(width, 4, generator=generator) * 0.2
    save_file(tensors, tmp_path / "adapter.safetensors")
    return tmp_path / "adapter.safetensors"


@pytest.fixture
def first_samples(tmp_path: Path) -> Callable[[str], np.ndarray]:
    """The pixels of a run's sample before the first step, by the run's name, with the words that render it."""
    (tmp_path / "prompts.txt").write_text("emoji of cat --w 64 --h 64 --s 2 --d 5\n", encoding="utf-8")

    def pixels(name: str) -> np.ndarray:
        (path,) = (tmp_path / "out" / "sample").glob(f"{name}_e000000_00_*")
        return np.asarray(Image.open(path))

    return pixels


@pytest.mark.parametrize("family", quick(KNOWN, Z_IMAGE), ids=str)
def test_a_training_adapter_acts_in_training_and_not_in_samples(
    family: FlowFamily, train_family: Train, adapter: Path, tmp_path: Path, capsys, monkeypatch, first_samples
) -> None:
    """Samples before the first step are the base's own, to the bit; the LoRA is another than without the adapter."""
    monkeypatch.chdir(tmp_path)
    runs = {"alone": (), "apart": ("--base_weights", str(adapter), "--sample_every_n_steps", "1", "--report")}
    said = {}
    for name, words in runs.items():
        assert train_family(*SHORT, *DRAWN, *DISTILLED[family.name][0], "--output_name", name, *words) == 0
        said[name] = capsys.readouterr().err
    assert np.array_equal(first_samples("apart"), first_samples("alone"))
    assert distance(weights(tmp_path, "apart"), weights(tmp_path, "alone")) > 100 * ROUNDED
    assert "is distilled to a few steps: training unlearns them, unless --base_weights" in said["alone"]
    assert "unlearns" not in said["apart"]
    facts = metadata(tmp_path, "apart")
    assert "adapter.safetensors" in facts["ss_training_adapters"]
    assert "ss_base_weights" not in facts
    record = run_file.read(tmp_path / "out" / "apart-run.json")
    assert record is not None
    assert record.facts is not None
    (file,) = record.facts.model.base_weights
    assert (file.file, file.multiplier, file.sha256, file.apart) == (str(adapter), 1.0, sha256(adapter), True)
    assert f"in training alone: {adapter} × 1" in said["apart"]
    page = (tmp_path / "out" / "apart-report.html").read_text(encoding="utf-8")
    assert "trained with adapter.safetensors × 1, for use without it" in page


@pytest.mark.slow
@pytest.mark.parametrize("family", [Z_IMAGE], ids=str)
def test_a_training_adapter_apart_is_one_that_is_merged(
    train_family: Train, adapter: Path, tmp_path: Path, monkeypatch, first_samples
) -> None:
    """But for the samples; and it makes no difference whether there are any."""
    monkeypatch.chdir(tmp_path)
    given = ("--base_weights", str(adapter))
    runs = {
        "apart": (*DRAWN, "--sample_every_n_steps", "1"),
        "unseen": (),
        "merged": (*DRAWN, "--no-base_weights_off_for_samples"),
    }
    for name, words in runs.items():
        assert train_family(*SHORT, "--turbo", *given, "--output_name", name, *words) == 0
    assert not np.array_equal(first_samples("merged"), first_samples("apart"))
    found = {name: weights(tmp_path, name) for name in runs}
    assert same(found["apart"], found["unseen"])
    assert distance(found["apart"], found["merged"]) < 10 * ROUNDED
    assert "adapter.safetensors" in metadata(tmp_path, "merged")["ss_base_weights"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ("--base_format", "nf4"),
        ("--base_format", "int8"),
        ("--network_module", "networks.dora"),
        ("--gradient_checkpointing", "--blocks_to_swap", "3"),
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("family", [Z_IMAGE], ids=str)
def test_a_training_adapter_goes_with(train_family: Train, adapter: Path, tmp_path: Path, words: Words) -> None:
    """Formats of the base, kinds that look at its weights, swapped blocks."""
    given = ("--turbo", "--base_weights", str(adapter), "--max_train_steps", "2", "--compare_prompts", "a cat")
    assert train_family(*CACHED, *given, *words) == 0
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path).values())


@pytest.mark.parametrize("family", [Z_IMAGE], ids=str)
def test_a_training_adapter_is_refused_where_it_would_not_act(
    train_family: Train, adapter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ("--turbo", "--base_weights", str(adapter), "--network_module", "lycoris.kohya")
    refused(train_family, (*CACHED, *given), "modules of other packages do not see what is apart", capsys)
