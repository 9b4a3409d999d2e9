"""The main job with each family that is trained by flow matching, through the real command line: image folder in, LoRA
file out. What one family alone has is in test_NAME_runs.py."""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from library.config.registry import load
from library.models import FAMILIES
from library.models.flow_matching import FlowMatching
from tests.flow_families import CACHED, FLOW, ROWS, TOKENS, FlowFamily, Words
from tests.quick import quick
from tests.training.written import ROUNDED, check_files, distance, metadata, refused, same, weights

Train = Callable[..., int]
KOHYAS, DOTTED = {"lora_down.weight", "lora_up.weight", "alpha"}, {"lora_A.weight", "lora_B.weight"}


def test_every_family_of_flow_matching_has_a_row() -> None:
    assert FLOW.keys() == {name for name in FAMILIES if issubclass(load(FAMILIES, name), FlowMatching)}


@pytest.mark.parametrize("family", ROWS, ids=str)
def test_it_trains_validates_samples_and_saves(
    family: FlowFamily, train_family: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without --network_train_unet_only: where no text encoder can be trained, that is so in any case."""
    prompts = tmp_path / "prompts.txt"
    first, second = family.prompts
    lines = (f"emoji of cat {first} --w 72 --h 64", f"emoji of dog {second} --w 64 --h 64")
    prompts.write_text("\n".join(lines), encoding="utf-8")
    words = ("--sample_prompts", str(prompts), "--sample_every_n_steps", "1", "--validation_split", "0.3", "--report")
    assert train_family(*words, *family.words, "--max_train_steps", "2") == 0
    facts = metadata(tmp_path)
    assert {name: facts.get(name) for name in family.facts} == family.facts
    ends: dict[str, set[str]] = {}
    for key in weights(tmp_path):
        layer, end = re.fullmatch(r"(.*?)\.(alpha|lora_\w+\.weight)", key).groups()  # type: ignore[union-attr]
        ends.setdefault(layer, set()).add(end)
    assert {part: sum(layer.startswith(part) for layer in ends) for part in family.layers} == family.layers
    assert len(ends) == sum(family.layers.values())
    assert ends.keys() >= family.among
    assert all(found == (KOHYAS if layer.startswith("lora_") else DOTTED) for layer, found in ends.items())
    said = capsys.readouterr().err
    for pattern in family.said:
        assert re.search(pattern, said), pattern
    samples = sorted((tmp_path / "out" / "sample").glob("test_0*.png"))
    assert len(samples) == 4
    assert np.asarray(Image.open(samples[0])).shape == (64, 64, 3)  # 72 is no multiple of 16
    for name in ("report.html", "best.safetensors", *["compare.png"] * ("--compare_prompts" in family.words)):
        assert (tmp_path / "out" / f"test-{name}").is_file(), name


@pytest.mark.parametrize("family", quick(ROWS, FLOW["flux"], FLOW["anima"]), ids=str)
def test_a_resumed_run_has_the_bits_of_one_that_was_not_stopped(
    family: FlowFamily, train_family: Train, tmp_path: Path
) -> None:
    common = ("--network_dropout", "0.1", "--gradient_checkpointing", "--max_train_steps", "2", *family.resume_words)
    assert train_family(*common, "--output_name", "whole") == 0
    assert train_family(*common, "--output_name", "part", "--save_every_n_steps", "1", "--save_state") == 0
    state = tmp_path / "out" / "part-step00000001-state"
    assert train_family(*common, "--output_name", "part", "--overwrite", "--resume", str(state)) == 0
    assert same(weights(tmp_path, "whole"), weights(tmp_path, "part"))


@pytest.mark.slow
@pytest.mark.parametrize("family", ROWS, ids=str)
def test_what_is_cached_changes_nothing(family: FlowFamily, train_family: Train, tmp_path: Path) -> None:
    """Nor does recomputing activations; with captions of unequal lengths in a batch."""
    common = ("--network_train_unet_only", "--max_train_steps", "2", "--save_naming", "kohya", *family.cache_words)
    disk = ("--cache_text_encoder_outputs_to_disk", "--cache_latents_to_disk")
    ways = {"memory": CACHED, "disk": disk, "again": disk, "fresh": ("--no-cache_latents",)}
    ways["checkpoints"] = ("--gradient_checkpointing", *CACHED)
    for caption, letter in zip(sorted((tmp_path / "data" / "2_style").glob("*.txt")), "aabbcc", strict=True):
        caption.write_text(letter * {"a": 10, "b": 15, "c": 3}[letter], encoding="utf-8")
    for name, words in ways.items():
        assert train_family(*common, "--output_name", name, *words) == 0
    found = {name: weights(tmp_path, name) for name in ways}
    assert same(found["disk"], found["again"])
    for other in ("disk", "fresh", "checkpoints"):
        assert distance(found[other], found["memory"]) < ROUNDED, other
    entries = list((tmp_path / "data" / "2_style" / ".lora_cache" / "texts").glob("*.safetensors"))
    assert entries
    for entry in entries:
        shapes = {name: tuple(tensor.shape) for name, tensor in load_file(entry).items()}
        length = max((shapes[name][0] for name, shape in family.cached.items() if TOKENS in shape), default=0)
        assert length < 64, "without the padding of 512 tokens"
        assert shapes == {
            name: tuple(length if side == TOKENS else side for side in shape) for name, shape in family.cached.items()
        }


COMMAND_LINES = [(family, torch.bfloat16 if family.name in ("flux", "chroma", "sd3") else None) for family in ROWS]


@pytest.mark.parametrize(
    ("family", "dtype"), quick([*COMMAND_LINES, (FLOW["chroma"], None)], (FLOW["chroma"], None)), ids=str
)
def test_the_command_line_of_another_program(
    family: FlowFamily, model: Path, image_folder: Path, tmp_path: Path, dtype: torch.dtype | None
) -> None:
    """With files of their own, the other program's name of the module, and its names of the layers. dtype: of the
    transformer's file; None: fp32."""
    files = family.tiny.single_files(model, tmp_path / "files", dtype=dtype or torch.float32)
    words = [word for name, path in files.items() for word in (f"--{name}", str(path))]
    words += ["--train_data_dir", str(image_folder), "--caption_extension", ".txt", "--resolution", "64"]
    words += ["--output_dir", str(tmp_path / "out"), "--output_name", "test", "--seed", "1", "--max_train_steps", "2"]
    words += [*CACHED, "--cache_latents", "--sdpa", "--gradient_checkpointing", "--learning_rate", "1e-3"]
    words += ["--mixed_precision", "bf16", "--fp8_base"] if dtype else []
    assert import_module(family.door).main([*words, *family.their_words, *family.short()]) == 0
    found = weights(tmp_path)
    assert len(found) == 3 * family.their_layers
    assert [key for key in found if not re.match(family.their_names, key)] == []
    saved = torch.bfloat16 if "--save_precision" in family.their_words else torch.float32
    assert {tensor.dtype for tensor in found.values()} == {saved}
    assert all(tensor.isfinite().all() for tensor in found.values())
    facts = metadata(tmp_path)
    assert {name: facts.get(name) for name in family.their_facts} == family.their_facts


def settings_of(family: FlowFamily) -> list[Words]:
    """Those of every family, then those that it has alone."""
    swapped = ("--blocks_to_swap", str(family.swapped))
    return [
        ("--train_batch_size", "3", "--enable_bucket", "--min_bucket_reso", "32", "--bucket_reso_steps", "16"),
        ("--mixed_precision", "bf16", "--full_bf16", *CACHED),
        ("--mixed_precision", "fp16", *CACHED),
        ("--fp8_base", "--mixed_precision", "bf16", *CACHED),
        ("--base_format", "nf4", *CACHED),
        ("--base_format", "int8"),
        (*swapped, *CACHED),
        (*swapped, "--gradient_checkpointing", *CACHED),
        ("--timestep_sampling", "sigmoid", "--ip_noise_gamma", "0.1", "--loss_type", "huber"),
        ("--weighting_scheme", "logit_normal", "--min_timestep", "100", "--max_timestep", "900"),
        ("--network_args", f"block_dims={family.blocks}"),
        ("--lr_layer_decay", "0.5"),
        ("--dry_run", "--gpu_memory", "24GB"),
        ("--fit", "24GB"),
        ("--recommend",),
        ("--find_lr", "--find_lr_steps", "20"),
        *family.settings,
    ]


SETTINGS = [(family, words) for family in ROWS for words in settings_of(family)]
QUICK = {
    "flux": (
        *("--train_batch_size", "--mixed_precision", "--base_format nf4", "--blocks_to_swap 4 --network"),
        *("--weighting_scheme", "--network_args block_dims", "--save_naming", "--fit"),
    ),
    "chroma": ("--train_batch_size", "--blocks_to_swap 4 --gradient", "--network_args block_dims", "--fit"),
}
"""How those begin that are run by `make test`."""
CHOSEN = [(family, words) for family, words in SETTINGS if " ".join(words).startswith(QUICK.get(family.name, ()))]


@pytest.mark.parametrize(
    ("family", "words"), quick(SETTINGS, *CHOSEN), ids=lambda it: " ".join(it) if isinstance(it, tuple) else str(it)
)
def test_settings_work(train_family: Train, tmp_path: Path, words: Words) -> None:
    assert train_family("--max_train_steps", "2", *words) == 0
    check_files(tmp_path)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--min_snr_gamma", "5"), "--min_snr_gamma: .* is trained by flow matching"),
        (("--noise_offset", "0.05"), "--noise_offset: .* is {title}: its samples begin with plain noise"),
        (("--zero_terminal_snr",), "is {title}; the option is for a Stable Diffusion"),
        (("--clip_skip", "2"), "is {title}; the option is for a Stable Diffusion"),
        (("--token_string", "sks"), "--token_string: embeddings of {title} are not supported here yet"),
    ],
    ids=lambda it: it[0] if isinstance(it, tuple) else "",
)
@pytest.mark.parametrize("family", ROWS, ids=str)
def test_what_has_no_meaning_is_refused(
    family: FlowFamily, train_family: Train, capsys: pytest.CaptureFixture[str], words: Words, said: str
) -> None:
    refused(train_family, words, said.format(title=re.escape(family.title)), capsys)


@pytest.mark.parametrize(
    ("family", "words"),
    [(family, words) for family in ROWS for words in family.own_options],
    ids=lambda it: it[0] if isinstance(it, tuple) else str(it),
)
def test_its_options_are_refused_for_others(
    train: Train, family: FlowFamily, capsys: pytest.CaptureFixture[str], words: Words
) -> None:
    refused(train, words, f"{words[0]}: .*the option is for {re.escape(family.title)}", capsys)
