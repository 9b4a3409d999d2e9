"""Runs that train an embedding: alone under kohya's names, and together with a LoRA."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from library.config.parser import parse
from library.models.opening import open_family
from library.run.word import learn
from tests.conftest import BASE, IMAGES, copy_images, forget_accelerator, run_training
from tests.networks.test_embeddings import opened
from tests.training.written import metadata, same

Train = Callable[..., int]
WORD = ("--token_string", "zfox", "--init_word", "flat drawing", "--num_vectors_per_token", "2")


def start(words: str) -> torch.Tensor:
    """The vectors of these words in the base's table."""
    family, _ = opened(BASE)
    table = load_file(BASE / "text_encoder" / "model.safetensors")
    (name,) = (name for name in table if name.endswith("token_embedding.weight"))
    return table[name][family.token_ids(words)].float()


@pytest.mark.slow
def test_an_embedding_alone(tmp_path: Path, image_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its words, its file, its rate, its samples, its validation, and nothing else."""
    from train_textual_inversion import main

    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a zfox cat --w 64 --h 64 --s 2 --d 1\na cat --w 64 --h 64 --s 2 --d 1\n")
    words = ["--pretrained_model_name_or_path", str(BASE), "--train_data_dir", str(image_folder), *WORD]
    words += ["--resolution", "64", "--use_style_template", "--train_batch_size", "4", "--learning_rate", "0.01"]
    words += [
        "--output_dir",
        str(tmp_path / "out"),
        "--seed",
        "1",
        "--cache_latents",
        "--max_data_loader_n_workers",
        "0",
    ]
    words += ["--max_train_steps", "3", "--no-loss_plot", "--no-report"]
    words += ["--validation_split", "0.3", "--compare_prompts", "a zfox cat", "--compare_steps", "2"]
    words += ["--sample_prompts", str(prompts), "--sample_every_n_steps", "3", "--sample_at_first"]
    assert main(words) == 0
    file = tmp_path / "out" / "zfox.safetensors"  # named after the word, as by kohya's script
    tensors = load_file(file)
    assert tensors.keys() == {"emb_params"}
    moved = (tensors["emb_params"] - start("flat drawing")).abs()
    assert (moved.amax(1) > 0.005).all()  # Adam's steps have the size of the rate
    assert moved.max() < 0.04
    about = metadata(tmp_path, "zfox")
    assert about["modelspec.architecture"] == "stable-diffusion-v1/textual-inversion"
    assert about["modelspec.trigger_phrase"] == about["ss_token_string"] == "zfox"
    assert about["ss_network_dim"] == "None"
    run = json.loads((tmp_path / "out" / "zfox-run.json").read_text(encoding="utf-8"))
    assert [wrote["kind"] for wrote in run["files"] if wrote["name"] == file.name] == ["network"]
    facts = run["facts"]["network"]["embedding"]
    assert facts == {"word": "zfox", "vectors": 2, "widths": [["emb_params", 64]], "start": "'flat drawing'"}
    drawn = sorted((tmp_path / "out" / "sample").glob("zfox_*_0?_*.png"))
    of_word, plain = drawn[0::2], drawn[1::2]
    assert len({path.read_bytes() for path in of_word}) == 2  # another picture after training …
    assert len({path.read_bytes() for path in plain}) == 1  # … but without the word the same
    assert (tmp_path / "out" / "zfox-compare.png").exists()


def test_kohyas_file_for_sdxl_has_both_encoders(tmp_path: Path, image_folder: Path, tiny_sdxl: Path) -> None:
    from sdxl_train_textual_inversion import main

    words = ["--pretrained_model_name_or_path", str(tiny_sdxl), "--train_data_dir", str(image_folder), *WORD]
    words += ["--resolution", "64", "--use_object_template", "--learning_rate", "0.01", "--gradient_checkpointing"]
    words += [
        "--output_dir",
        str(tmp_path),
        "--seed",
        "1",
        "--max_train_steps",
        "1",
        "--max_data_loader_n_workers",
        "0",
    ]
    assert main([*words, "--no-loss_plot", "--no-monitoring", "--mixed_precision", "bf16"]) == 0
    tensors = load_file(tmp_path / "zfox.safetensors")
    assert {key: len(tensor) for key, tensor in tensors.items()} == {"clip_l": 2, "clip_g": 2}
    family, _ = opened(tiny_sdxl)
    for table in family.token_tables():
        before = table.table.weight[family.token_ids("flat drawing")].bfloat16().float()
        moved = (tensors[table.key] - before).abs()
        torch.testing.assert_close(moved.amax(1), torch.full((2,), 0.01), atol=1e-3, rtol=0)  # Adam's first step


PIVOTAL = (*WORD, "--caption_prefix", "zfox", "--network_train_unet_only", "--embedding_lr", "0.01", "--no-monitoring")


@pytest.fixture(scope="module")
def pivotal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a run of four steps of a LoRA and an embedding, with a state after the second."""
    folder = tmp_path_factory.mktemp("pivotal")
    copy_images(folder / "data" / "2_style")
    assert run_training(folder, *PIVOTAL, *STATES) == 0
    forget_accelerator()
    return folder / "out"


STATES = ("--save_every_n_steps", "2", "--save_state", "--ema_decay", "0.9")


def test_a_lora_and_an_embedding_resume_bit_for_bit(pivotal: Path, train: Train, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(pivotal / "test-step00000002-state", out / "test-step00000002-state")
    assert train(*PIVOTAL, *STATES, "--resume", "latest") == 0
    for name in ("test.safetensors", "test-embedding.safetensors", "test-step00000004-embedding.safetensors"):
        assert same(load_file(pivotal / name), load_file(out / name))


def test_the_embedding_is_in_the_loras_file_and_in_its_own(pivotal: Path) -> None:
    lora, apart = load_file(pivotal / "test.safetensors"), load_file(pivotal / "test-embedding.safetensors")
    bundle = {key: tensor for key, tensor in lora.items() if not key.startswith("lora_unet_")}
    assert same(bundle, {"bundle_emb.zfox.emb_params": apart["emb_params"]})
    assert (apart["emb_params"] - start("flat drawing")).abs().amax(1).min() > 0.005
    assert len(lora) > 300
    assert metadata(pivotal.parent)["modelspec.architecture"].endswith("/lora")
    assert metadata(pivotal.parent, "test-embedding")["modelspec.architecture"].endswith("/textual-inversion")


def test_goes_on_from_its_own_file(pivotal: Path, train: Train, tmp_path: Path) -> None:
    """At a rate of nearly 0 a run that starts from a LoRA with an embedding writes both again, here into one file."""
    first = str(pivotal / "test.safetensors")
    words = ("--weights", first, "--network_weights", first, "--learning_rate", "1e-12", "--embedding_lr", "1e-12")
    assert train(*PIVOTAL, *words, "--max_train_steps", "1", "--save_embedding", "bundle") == 0
    assert not (tmp_path / "out" / "test-embedding.safetensors").exists()
    before, after = load_file(first), load_file(tmp_path / "out" / "test.safetensors")
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        torch.testing.assert_close(after[key], tensor, atol=1e-9, rtol=0)


def test_checkpointing_changes_no_gradient() -> None:
    """All encoders and the denoiser are frozen; their checkpoints must compute what leads to the rows all the same."""
    family, embedding = opened(BASE)
    family.components.load("denoiser", torch.float32, "cpu")

    def gradient() -> torch.Tensor:
        embedding.zero_grad()
        condition = family.encode_prompts(["a photo of <zfox1>"])
        torch.manual_seed(0)
        out = family.predict(torch.randn(1, 4, 8, 8), torch.tensor([500]), condition)
        out.square().mean().backward()
        (rows,) = embedding.parameters()
        assert rows.grad is not None
        return rows.grad.clone()

    plain = gradient()
    assert plain.abs().amax(1).min() > 0
    family.components["denoiser"].train()
    family.components.checkpoint("denoiser", "text_encoder")
    family.components["text_encoder"].train()
    torch.testing.assert_close(gradient(), plain, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("--train_embedding_only",), "--token_string is required"),
        (("--init_word", "fox"), "--init_word needs --token_string"),
        (("--weights", "x.pt"), "to start from a LoRA file: --network_weights"),
        ((*WORD, "--use_style_template", "--use_object_template"), "give one of them"),
        ((*WORD, "--network_train_unet_only", "--cache_text_encoder_outputs"), "leave the cache out"),
        ((*WORD, "--train_embedding_only", "--network_weights", "x"), "--train_embedding_only trains none"),
        ((*WORD, "--train_embedding_only", "--recommend"), "--train_embedding_only trains none"),
        ((*WORD, "--save_naming", "diffusers", "--save_embedding", "both"), "diffusers refuses a LoRA file"),
        ((*WORD, "--train_embedding_only", "--save_embedding", "apart"), "has no LoRA"),
        (("--token_string", "cat"), "has this word already"),
        (("--token_string", "zfox", "zcat"), "A run trains one word: train zfox and zcat in a run each"),
        (("--token_string", "zfox,zcat"), "A run trains one word: train zfox and zcat in a run each"),
        (("--token_string", "z.fox", "--caption_prefix", "z.fox"), "A1111 cuts words"),
        (WORD, "no caption has this word"),
        (("--token_string", "zfox", "--init_word", "!zFox"), "contains --token_string"),
        (("--token_string", "zfox", "--init_word", " "), "has no token"),
        ((*WORD, "--caption_prefix", "zfox", "--weights", "nothing.pt"), "nothing.pt: no such file"),
        ((*WORD, "--caption_prefix", "zfox", "--weights", str(IMAGES / "LICENSE")), "--weights"),
        ((*WORD, "--caption_prefix", "zfox", "--embedding_lr", "0"), "it would not be trained"),
    ],
    ids=lambda value: " ".join(value)[-60:] if isinstance(value, tuple) else "",
)
def test_mistakes_are_named_before_training(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], reason: str
) -> None:
    assert train(*words) == 2
    assert reason in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("vectors", "fate"),
    [
        ("1", "only the first is used"),
        ("3", "the first 3 are used"),
        ("7", "they are repeated to 7"),
        ("5", None),
    ],
)
def test_a_first_word_of_several_tokens_is_named(
    vectors: str, fate: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    required = ("--pretrained_model_name_or_path", str(BASE), "--output_dir", "out", "--token_string", "zfox")
    options = parse(
        [
            *required,
            "--learning_rate",
            "1e-3",
            "--init_word",
            "flat drawing of a fox",
            "--num_vectors_per_token",
            vectors,
        ]
    )
    learn(options, open_family(str(BASE)))
    assert (fate is None) == (caplog.text == "")
    if fate is not None:
        assert f"has 5 tokens, and --num_vectors_per_token is {vectors}: {fate}, as in kohya's scripts" in caplog.text


def test_the_default_rate_is_named(caplog: pytest.LogCaptureFixture) -> None:
    required = ("--pretrained_model_name_or_path", str(BASE), "--output_dir", "out", "--token_string", "zfox")
    learn(parse([*required]), open_family(str(BASE)))
    assert "at the default of --learning_rate, 2e-06, an embedding hardly moves" in caplog.text
    caplog.clear()
    learn(parse([*required, "--embedding_lr", "1e-3"]), open_family(str(BASE)))
    assert caplog.text == ""
